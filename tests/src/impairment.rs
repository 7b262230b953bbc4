//! A bad network between the gateways: packets from and to site A pass a process in the router that loses, reorders,
//! and translates addresses, all as a seed decides.
//!
//! Site A appears under [`NAT_ADDRESS`], and under the same one, if wanted, who is in the attacker's place. Rebinding gives
//! either other ports, as a NAT does that has restarted. The kernels that tests run on may lack netem, so this is done between
//! reads and writes of a TUN device.

use std::{
    collections::VecDeque,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use ipsec_ctl::net::tun::Tun;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
    ping::checksum,
    topology::{Family, Side, Topology, attacker},
};

/// Where gateway B sees those who are behind the NAT.
pub const NAT_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 200);

/// The TUN device in the router.
const DEVICE: &str = "bad";
/// First port of the first binding of each; each rebinding takes the next ones.
const FIRST_PORTS: [u16; 2] = [20_000, 40_000];
/// Ports of a binding: one for each of IKE's.
const PORTS: [u16; 2] = [500, 4500];
/// Longest that a packet is held back.
const HOLD: Duration = Duration::from_millis(3);

/// Who is behind the NAT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behind {
    /// Gateway A.
    GatewayA,
    /// Who is in the attacker's place.
    Attacker,
}

impl Behind {
    const ALL: [Self; 2] = [Self::GatewayA, Self::Attacker];

    fn address(self) -> IpAddr {
        match self {
            Self::GatewayA => Side::A.outside(Family::V4),
            Self::Attacker => attacker(Family::V4),
        }
    }

    /// The router's interface towards it.
    fn port(self) -> &'static str {
        match self {
            Self::GatewayA => "to-a",
            Self::Attacker => "to-x",
        }
    }
}

/// Shares of packets in thousandths.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Lost.
    pub lost: u64,
    /// Held back until others have passed.
    pub reordered: u64,
}

impl Rates {
    /// Of a network that does no harm beyond translating addresses.
    pub const NONE: Self = Self {
        lost: 0,
        reordered: 0,
    };
}

/// What the network did, by direction: from behind the NAT, to there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// ESP packets lost on purpose.
    pub lost: [u64; 2],
    /// ESP packets that came for a binding that is gone.
    pub unbound: u64,
    /// Packets held back.
    pub reordered: u64,
}

/// A small generator (splitmix64), so that a run can be had again from its seed.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (value ^ (value >> 31)) % bound.max(1)
    }
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    bindings: [AtomicU16; 2],
    lost: [AtomicU64; 2],
    unbound: AtomicU64,
    reordered: AtomicU64,
}

/// The running process.
#[derive(Debug)]
pub struct Impairment {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Impairment {
    /// Leads the traffic of site A through it.
    ///
    /// # Errors
    ///
    /// No TUN device, or no routes into it.
    pub fn start(topology: &Topology, seed: u64, rates: Rates) -> anyhow::Result<Self> {
        Self::of(&[Behind::GatewayA], topology, seed, rates)
    }

    /// A NAT before gateway A and before who is in the attacker's place, which does no harm beyond that.
    ///
    /// # Errors
    ///
    /// As for [`Self::start`].
    pub fn nat_before_both(topology: &Topology) -> anyhow::Result<Self> {
        Self::of(&Behind::ALL, topology, 1, Rates::NONE)
    }

    fn of(inside: &[Behind], topology: &Topology, seed: u64, rates: Rates) -> anyhow::Result<Self> {
        let router = &topology.router;
        let tun = router.run(|| Tun::open(DEVICE).context("a TUN device"))?;
        router.ip(&format!("link set {DEVICE} up txqueuelen 10000"))?;
        for one in inside {
            router.ip(&format!("rule add iif {} lookup 100", one.port()))?;
        }
        router.ip(&format!("route add default dev {DEVICE} table 100"))?;
        router.ip(&format!("route add {NAT_ADDRESS}/32 dev {DEVICE}"))?;
        let shared = Arc::new(Shared::default());
        let mut path = Path {
            tun,
            shared: Arc::clone(&shared),
            dice: Dice::new(seed),
            rates,
            held: VecDeque::new(),
        };
        let thread = thread::Builder::new()
            .name("impairment".to_owned())
            .spawn(move || path.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// The NAT forgets who is behind it and gives it other ports.
    pub fn rebind(&self, who: Behind) {
        self.shared.bindings[who as usize].fetch_add(1, Relaxed);
    }

    /// What it did so far.
    pub fn losses(&self) -> Losses {
        Losses {
            lost: [0, 1].map(|way| self.shared.lost[way].load(Relaxed)),
            unbound: self.shared.unbound.load(Relaxed),
            reordered: self.shared.reordered.load(Relaxed),
        }
    }

    /// Ends it.
    ///
    /// # Errors
    ///
    /// It had failed.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.shared.stop.store(true, Relaxed);
        self.thread.take().map_or(Ok(()), |thread| {
            thread
                .join()
                .map_err(|_| anyhow!("the impairment panicked"))?
        })
    }
}

impl Drop for Impairment {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Path {
    tun: Tun,
    shared: Arc<Shared>,
    dice: Dice,
    rates: Rates,
    /// Packets held back, and until when.
    held: VecDeque<(Instant, Vec<u8>)>,
}

impl Path {
    fn run(&mut self) -> anyhow::Result<()> {
        let mut buffer = vec![0; 65_536];
        while !self.shared.stop.load(Relaxed) {
            self.release();
            let wait = if self.held.is_empty() { 20_u8 } else { 1 };
            let mut ready = [PollFd::new(self.tun.as_fd(), PollFlags::POLLIN)];
            poll(&mut ready, PollTimeout::from(wait))?;
            while let Ok(length) = self.tun.read(&mut buffer) {
                self.pass(&mut buffer[..length]);
            }
        }
        Ok(())
    }

    fn release(&mut self) {
        let now = Instant::now();
        while self.held.front().is_some_and(|(due, _)| *due <= now) {
            if let Some((_, packet)) = self.held.pop_front() {
                let _ = self.tun.write(&packet);
            }
        }
    }

    fn pass(&mut self, packet: &mut [u8]) {
        let way = usize::from(source(packet).is_none());
        let sealed = is_sealed(packet);
        let count = |counter: &AtomicU64| counter.fetch_add(u64::from(sealed), Relaxed);
        let bindings = [0, 1].map(|who| self.shared.bindings[who].load(Relaxed));
        if !translate(packet, bindings) {
            count(&self.shared.unbound);
            return;
        }
        let roll = self.dice.below(1000);
        if roll < self.rates.lost {
            count(&self.shared.lost[way]);
        } else if roll < self.rates.lost + self.rates.reordered {
            count(&self.shared.reordered);
            self.held
                .push_back((Instant::now() + HOLD, packet.to_vec()));
        } else {
            let _ = self.tun.write(packet);
        }
    }
}

/// Who of those behind the NAT has sent a packet.
fn source(packet: &[u8]) -> Option<Behind> {
    let source = packet.get(12..16)?.first_chunk::<4>()?;
    let source = IpAddr::V4(Ipv4Addr::from(*source));
    Behind::ALL.into_iter().find(|who| who.address() == source)
}

/// ESP in UDP that carries more than a keep-alive.
fn is_sealed(packet: &[u8]) -> bool {
    packet.get(9) == Some(&17) && packet.len() > 100 && packet[28..32] != [0; 4]
}

/// Translates an IPv4 packet with UDP in it; false where there is no binding for it.
fn translate(packet: &mut [u8], bindings: [u16; 2]) -> bool {
    if packet.len() < 28 || packet[0] != 0x45 || packet[9] != 17 {
        return false;
    }
    // Everybody's own ports, and those that the NAT shows in their place.
    let ports = Behind::ALL.into_iter().flat_map(|who| {
        let first = FIRST_PORTS[who as usize] + bindings[who as usize] * 2;
        PORTS.into_iter().zip(first..).map(move |pair| (who, pair))
    });
    let [mut from, mut to] = [20, 22].map(|at| u16::from_be_bytes([packet[at], packet[at + 1]]));
    if let Some(sender) = source(packet) {
        let mut of_sender = ports.filter(|(who, _)| *who == sender);
        let Some((_, (_, shown))) = of_sender.find(|(_, (own, _))| *own == from) else {
            return false;
        };
        from = shown;
        packet[12..16].copy_from_slice(&NAT_ADDRESS.octets());
    } else {
        let mut ports = ports;
        let Some((who, (own, _))) = ports.find(|(_, (_, shown))| *shown == to) else {
            return false;
        };
        to = own;
        if let IpAddr::V4(address) = who.address() {
            packet[16..20].copy_from_slice(&address.octets());
        }
    }
    packet[20..22].copy_from_slice(&from.to_be_bytes());
    packet[22..24].copy_from_slice(&to.to_be_bytes());
    // No checksum is a checksum in UDP over IPv4.
    packet[26..28].copy_from_slice(&[0; 2]);
    packet[10..12].copy_from_slice(&[0; 2]);
    let sum = checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(from: [u8; 4], to: [u8; 4], ports: [u16; 2]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0];
        packet.extend(from);
        packet.extend(to);
        packet.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
        packet.extend([0; 8]);
        packet
    }

    #[test]
    fn what_comes_back_through_the_binding_is_what_went_out() {
        let mut out = packet([198, 51, 100, 2], [203, 0, 113, 2], [4500, 4500]);
        assert!(translate(&mut out, [3, 0]));
        assert_eq!(out[12..16], NAT_ADDRESS.octets());
        let port = u16::from_be_bytes([out[20], out[21]]);
        let mut back = packet([203, 0, 113, 2], NAT_ADDRESS.octets(), [4500, port]);
        assert!(translate(&mut back, [3, 0]));
        assert_eq!(back[16..20], [198, 51, 100, 2]);
        assert_eq!(u16::from_be_bytes([back[22], back[23]]), 4500);
        let mut late = packet([203, 0, 113, 2], NAT_ADDRESS.octets(), [4500, port]);
        assert!(!translate(&mut late, [4, 0]), "the binding is gone");
    }

    #[test]
    fn two_behind_the_nat_have_ports_of_their_own() {
        let shown = |from: [u8; 4]| {
            let mut out = packet(from, [203, 0, 113, 2], [4500, 4500]);
            assert!(translate(&mut out, [1, 1]));
            assert_eq!(out[12..16], NAT_ADDRESS.octets());
            u16::from_be_bytes([out[20], out[21]])
        };
        let ports = [shown([198, 51, 100, 2]), shown([192, 0, 2, 66])];
        for (port, inside) in ports.into_iter().zip([[198, 51, 100, 2], [192, 0, 2, 66]]) {
            let mut back = packet([203, 0, 113, 2], NAT_ADDRESS.octets(), [4500, port]);
            assert!(translate(&mut back, [1, 1]));
            assert_eq!(back[16..20], inside);
        }
    }

    #[test]
    fn the_same_seed_makes_the_same_network() {
        let rolls = |seed| {
            let mut dice = Dice::new(seed);
            [(); 8].map(|()| dice.below(1000))
        };
        assert_eq!(rolls(7), rolls(7));
        assert_ne!(rolls(7), rolls(8));
    }
}
