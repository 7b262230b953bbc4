//! The packets of the benchmarks: inner ones, and inner ones sealed by the peer.
//!
//! Tunnels have numbers. The remote network of number `n` is 10.(2 + n / 256).(n % 256).0/24.

use std::sync::Arc;

use anyhow::Context;
use ipsec_common::{Spi, TrafficSelector};
use ipsec_ctl::{
    dataplane::{
        routing::{RoutesMode, RoutingSpec},
        seam::{
            ChildId, ChildTrap, Df, Direction, EngineChoice, FastPath, Lifetime, Mode, NicOffload,
            Outer, SaId, SaSpec, SelectorPair, TunnelId, TunnelSpec,
        },
        xdp::{
            events::Events,
            outbound::{HEADROOM, Outbound, OutboundPipeline, TAILROOM},
            sa::Origin,
            table::{Tables, Tunnel},
            words::WordsArray,
        },
    },
    esp::{EspKeys, EspSuite},
};

/// Seven packets of 64 bytes to four of 590 and one of 1400: the usual mixture, scaled to what fits into a tunnel.
const IMIX: [usize; 12] = [64, 590, 64, 64, 590, 64, 1400, 64, 590, 64, 590, 64];
/// Source and destination port of all packets.
pub(super) const PORTS: (u16, u16) = (0x1234, 0x5678);
/// The host behind the measured gateway.
const LOCAL_HOST: [u8; 4] = [10, 1, 0, 9];
/// Outer addresses of the measured gateway and of its peer.
pub(super) const LOCAL: [u8; 4] = [192, 0, 2, 1];
pub(super) const REMOTE: [u8; 4] = [192, 0, 2, 2];
/// MTU of every tunnel.
pub(super) const MTU: u16 = 1420;

/// Bytes of inner IP packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Size {
    /// All alike.
    Fixed(usize),
    /// [`IMIX`].
    Mixed,
}

impl Size {
    /// What is measured.
    pub(super) const ALL: [Self; 4] = [
        Self::Fixed(64),
        Self::Fixed(590),
        Self::Fixed(1400),
        Self::Mixed,
    ];

    /// Sizes of packets in turn, over and over.
    pub(super) fn pattern(&self) -> &[usize] {
        match self {
            Self::Fixed(size) => std::slice::from_ref(size),
            Self::Mixed => &IMIX,
        }
    }

    /// Name in the report.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Fixed(size) => format!("{size} B"),
            Self::Mixed => "IMIX".to_owned(),
        }
    }
}

/// The host behind the peer of a tunnel.
fn remote_host(number: u16) -> [u8; 4] {
    let [high, low] = number.to_be_bytes();
    [10, 2 + high, low, 9]
}

/// The prefix of the network behind the peer of a tunnel.
pub(super) fn remote_network(number: u16) -> String {
    let [a, b, c, _] = remote_host(number);
    format!("{a}.{b}.{c}.0/24")
}

/// The inbound SPI of a tunnel.
pub(super) fn spi(number: u16) -> Spi {
    Spi(0x0102_0000 + u32::from(number))
}

/// A UDP packet over IPv4 of `size` bytes in all from one host to the other.
///
/// # Errors
///
/// The size is none that an IP packet can have.
pub(super) fn udp(source: [u8; 4], destination: [u8; 4], size: usize) -> anyhow::Result<Vec<u8>> {
    let total = u16::try_from(size)?;
    let length = total
        .checked_sub(20)
        .context("a packet of 28 bytes at least")?;
    let mut packet = vec![0x45, 0];
    packet.extend(total.to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    packet.extend(source);
    packet.extend(destination);
    let sum: u32 = packet
        .as_chunks::<2>()
        .0
        .iter()
        .map(|word| u32::from(u16::from_be_bytes(*word)))
        .sum();
    let checksum = !u16::try_from((sum & 0xffff) + (sum >> 16))?;
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet.extend(PORTS.0.to_be_bytes());
    packet.extend(PORTS.1.to_be_bytes());
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0]);
    packet.resize(size, 0xab);
    Ok(packet)
}

/// An inner packet that is routed into a tunnel.
///
/// # Errors
///
/// The size is none that an IP packet can have.
pub(super) fn outwards(number: u16, size: usize) -> anyhow::Result<Vec<u8>> {
    udp(LOCAL_HOST, remote_host(number), size)
}

fn selectors(address: [u8; 4]) -> Vec<TrafficSelector> {
    let [a, b, c, _] = address;
    vec![TrafficSelector {
        protocol: 0,
        ports: (0, u16::MAX),
        addresses: ([a, b, c, 0].into(), [a, b, c, 255].into()),
    }]
}

fn pair(number: u16, swapped: bool) -> SelectorPair {
    let (local, remote) = (selectors(LOCAL_HOST), selectors(remote_host(number)));
    if swapped {
        SelectorPair {
            local: remote,
            remote: local,
        }
    } else {
        SelectorPair { local, remote }
    }
}

/// A tunnel, seen from the measured gateway or, `swapped`, from its peer.
pub(super) fn tunnel(number: u16, swapped: bool) -> TunnelSpec {
    TunnelSpec {
        id: TunnelId(number.into()),
        name: "bench".into(),
        device: format!("tun{number}"),
        mtu: None,
        engine: EngineChoice::Xdp,
        fast_path: FastPath::On,
        offload: NicOffload::Off,
        mode: Mode::Tunnel,
        policy_based: false,
        df: Df::Copy,
        clamp_mss: true,
        copy_dscp: true,
        children: vec![ChildTrap {
            id: ChildId(0),
            name: "net".into(),
            selectors: pair(number, swapped),
            on_demand: false,
        }],
        routing: RoutingSpec {
            mode: RoutesMode::Manual,
            remote: vec![],
            local: vec![],
            peers: Vec::new(),
            anywhere: false,
            outer_local: None,
            addresses: vec![],
            bypass: vec![],
        },
    }
}

fn keys(suite: EspSuite) -> EspKeys {
    let cipher = match suite {
        EspSuite::Aes128Gcm16 => 20,
        EspSuite::Aes256Gcm16 | EspSuite::ChaCha20Poly1305 | EspSuite::AesCbc { .. } => 36,
    };
    EspKeys {
        cipher: vec![7; cipher].into(),
        integrity: vec![].into(),
    }
}

/// What the engine calls an SA.
pub(super) fn sa_id(number: u16, direction: Direction) -> SaId {
    SaId(2 * u64::from(number) + u64::from(direction == Direction::Inbound))
}

/// An SA of a tunnel, seen from the measured gateway or, `swapped`, from its peer.
pub(super) fn sa(number: u16, suite: EspSuite, direction: Direction, swapped: bool) -> SaSpec {
    let (local, remote) = if swapped {
        (REMOTE, LOCAL)
    } else {
        (LOCAL, REMOTE)
    };
    SaSpec {
        id: sa_id(number, direction),
        tunnel: TunnelId(number.into()),
        child: ChildId(0),
        direction,
        spi: spi(number),
        suite,
        keys: keys(suite),
        esn: true,
        replay_window: 4096,
        outer: Outer {
            local: local.into(),
            remote: remote.into(),
            encap: None,
        },
        selectors: pair(number, swapped),
        lifetime: Lifetime {
            soft_packets: u64::MAX,
            hard_packets: u64::MAX,
            soft_bytes: u64::MAX,
            hard_bytes: u64::MAX,
            expires: None,
        },
    }
}

/// The peer of a tunnel: seals what is to be opened.
pub(super) struct Sealer {
    pipeline: OutboundPipeline,
    tunnel: Arc<Tunnel>,
    _tables: Tables,
    frame: Vec<u8>,
    number: u16,
}

impl Sealer {
    /// With the keys of that tunnel's inbound SA, and its sequence numbers from 1 on.
    ///
    /// # Errors
    ///
    /// The SA is refused.
    pub(super) fn new(number: u16, suite: EspSuite) -> anyhow::Result<Self> {
        let (events, _) = Events::channel(1);
        let tables = Tables::new(WordsArray::anonymous(2)?);
        let tunnel = tables.set_tunnel(&tunnel(number, true), 1, MTU);
        tables.install(&sa(number, suite, Direction::Outbound, true))?;
        Ok(Self {
            pipeline: OutboundPipeline::new(events),
            tunnel,
            _tables: tables,
            frame: vec![0; HEADROOM + 1500 + TAILROOM],
            number,
        })
    }

    /// The next outer packet of the peer, with an inner one of `size` bytes.
    ///
    /// # Errors
    ///
    /// The pipeline does not send it.
    pub(super) fn next(&mut self, size: usize) -> anyhow::Result<Vec<u8>> {
        let inner = udp(remote_host(self.number), LOCAL_HOST, size)?;
        let range = HEADROOM..HEADROOM + size;
        self.frame[range.clone()].copy_from_slice(&inner);
        let sent = self
            .pipeline
            .process(&self.tunnel, &mut self.frame, range, Origin::Slow, 1);
        match sent {
            Outbound::Send(sealed) => Ok(self.frame[sealed.packet].to_vec()),
            other => anyhow::bail!("the peer does not send: {other:?}"),
        }
    }
}
