//! The slow path: what the kernel routed into a TUN device is sealed and sent through raw sockets, and ESP that the
//! kernel delivered is opened and written into a TUN device.
//!
//! Correct alone, without XDP, and the oracle for the fast path. Two threads: one reads all devices, one all sockets.

pub mod devices;
mod exit;
pub mod sockets;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use ipsec_common::Reason;
use nix::time::{ClockId, clock_gettime};

use self::{
    devices::{Device, Devices},
    sockets::{Datagram, Inlet, Kind, Sockets, ike},
};
use super::{
    counters::Counters,
    events::{Events, RateLimit},
    fragment::fragment_v4,
    icmp::too_big,
    inbound::{self, Arrival, Inbound, InboundPipeline},
    outbound::{HEADROOM, Outbound, OutboundPipeline, Sealed, TAILROOM},
    path_mtu::PathMtus,
    sa::Origin,
    strays::{Stray, Strays},
    table::{Tables, Tunnel},
};
use crate::dataplane::seam::{Event, TunnelId};

/// The longest IP packet.
const LONGEST_PACKET: usize = 65_535;
/// Packets taken from one device or socket before the others get their turn.
const BATCH: usize = 64;
/// How soon a thread sees that it is to stop.
const WAIT_MILLISECONDS: u8 = 100;

/// What both threads work with.
pub struct SlowPath {
    /// Devices of the tunnels.
    pub devices: Devices,
    /// Sockets.
    pub sockets: Sockets,
    /// What was dropped.
    pub counters: Counters,
    /// What belongs to an SA of the kernel, and has not come by its sockets.
    pub strays: Strays,
    /// What outer paths take.
    pub path_mtus: Arc<PathMtus>,
    outbound: OutboundPipeline,
    inbound: InboundPipeline,
    events: Events,
    tables: Arc<Tables>,
    too_big_reports: RateLimit<IpAddr>,
    stop: AtomicBool,
}

/// Whose a packet was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opened {
    /// Ours, or nobody's.
    Here,
    /// The kernel's.
    Elsewhere,
}

/// The running threads.
pub struct Threads {
    slow: Arc<SlowPath>,
    handles: Vec<JoinHandle<()>>,
}

impl SlowPath {
    /// A slow path over these sockets, at rest.
    ///
    /// # Errors
    ///
    /// Those of epoll_create1(2).
    pub fn new(
        sockets: Sockets,
        outbound: OutboundPipeline,
        inbound: InboundPipeline,
        path_mtus: Arc<PathMtus>,
        tables: Arc<Tables>,
        events: Events,
    ) -> io::Result<Self> {
        Ok(Self {
            devices: Devices::new()?,
            sockets,
            counters: Counters::default(),
            strays: Strays::default(),
            path_mtus,
            outbound,
            inbound,
            events,
            tables,
            too_big_reports: RateLimit::new(1, 1024),
            stop: AtomicBool::new(false),
        })
    }

    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// Those of the operating system.
    pub fn start(self: &Arc<Self>) -> io::Result<Threads> {
        let mut threads = Threads {
            slow: Arc::clone(self),
            handles: Vec::new(),
        };
        for (name, work) in [
            ("slow-out", Self::read_devices as fn(&Self)),
            ("slow-in", Self::read_sockets),
        ] {
            let slow = Arc::clone(self);
            let thread = thread::Builder::new().name(name.to_owned());
            threads.handles.push(thread.spawn(move || work(&slow))?);
        }
        Ok(threads)
    }

    fn running(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn read_devices(&self) {
        let mut frame = vec![0; HEADROOM + LONGEST_PACKET + TAILROOM];
        while self.running() {
            for device in self.devices.wait(WAIT_MILLISECONDS) {
                let now = monotonic_seconds();
                for _ in 0..BATCH {
                    let room = &mut frame[HEADROOM..HEADROOM + LONGEST_PACKET];
                    match device.tun.read(room) {
                        Ok(0) => break,
                        Ok(length) => {
                            self.seal(&device, &mut frame, HEADROOM..HEADROOM + length, now);
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                        Err(error) => {
                            // The device was removed under our hands: it would be ready for ever.
                            tracing::warn!(tunnel = device.tunnel.settings.load().name, %error, "the TUN device cannot be read");
                            self.devices.remove(device.tunnel.id);
                            break;
                        }
                    }
                }
            }
        }
    }

    fn seal(&self, device: &Device, frame: &mut [u8], inner: Range<usize>, now: u64) {
        let verdict =
            self.outbound
                .process(&device.tunnel, frame, inner.clone(), Origin::Slow, now);
        self.finish(device, frame, inner, now, verdict);
    }

    /// Sends what has waited for an SA of the tunnel, wherever there is one now.
    pub fn release(&self, tunnel: TunnelId) {
        let Some(device) = self.devices.get(tunnel) else {
            return;
        };
        let settings = device.tunnel.settings.load_full();
        let now = monotonic_seconds();
        for child in &settings.children {
            if !child.waiting.any() || child.outbound.load().is_empty() {
                continue;
            }
            child.waiting.release(|packet| {
                let inner = HEADROOM..HEADROOM + packet.len();
                let mut frame = vec![0; inner.end + TAILROOM];
                if let Some(room) = frame.get_mut(inner.clone()) {
                    room.copy_from_slice(packet);
                }
                let verdict =
                    self.outbound
                        .process_waited(&device.tunnel, &mut frame, inner.clone(), now);
                self.finish(&device, &mut frame, inner, now, verdict);
            });
        }
    }

    /// Drops what has waited for an SA for too long.
    pub fn expire_waiting(&self) {
        let now = monotonic_seconds();
        for tunnel in self.tables.tunnels() {
            for child in &tunnel.settings.load().children {
                for _ in 0..child.waiting.expire(now) {
                    self.counters.count(Reason::Unanswered);
                }
            }
        }
    }

    fn finish(
        &self,
        device: &Device,
        frame: &mut [u8],
        inner: Range<usize>,
        now: u64,
        verdict: Outbound,
    ) {
        let tunnel = &device.tunnel;
        match verdict {
            Outbound::Send(sealed) => self.send(frame, &sealed),
            Outbound::Drop(reason) => self.counters.count(reason),
            Outbound::Waits => {}
            Outbound::TooBig(mtu) => {
                self.counters.count(Reason::TooBig);
                if let Some(answer) = frame.get(inner).and_then(|packet| too_big(packet, mtu)) {
                    // Lost like any ICMP message may be, for instance while the device is down.
                    let _ = device.tun.write(&answer);
                }
            }
            Outbound::Fragment(mtu) => self.seal_fragments(tunnel, frame, inner, mtu, now),
        }
    }

    fn seal_fragments(
        &self,
        tunnel: &Tunnel,
        frame: &mut [u8],
        inner: Range<usize>,
        mtu: u16,
        now: u64,
    ) {
        let fragments = frame
            .get(inner)
            .and_then(|packet| fragment_v4(packet, mtu.into()));
        for fragment in fragments.unwrap_or_default() {
            let range = HEADROOM..HEADROOM + fragment.len();
            let Some(room) = frame.get_mut(range.clone()) else {
                return;
            };
            room.copy_from_slice(&fragment);
            match self
                .outbound
                .process(tunnel, frame, range, Origin::Slow, now)
            {
                Outbound::Send(sealed) => self.send(frame, &sealed),
                Outbound::Drop(reason) => self.counters.count(reason),
                Outbound::Waits => {}
                // The MTU has just become smaller still.
                Outbound::TooBig(_) | Outbound::Fragment(_) => self.counters.count(Reason::TooBig),
            }
        }
    }

    fn send(&self, frame: &[u8], sealed: &Sealed) {
        let Some(packet) = frame.get(sealed.packet.clone()) else {
            return;
        };
        let to = sealed.outer.remote;
        if let Err((reason, error)) = self.sockets.send_packet(to, packet, self.path_mtus.get(to)) {
            self.counters.count(reason);
            if error.raw_os_error() == Some(libc::EMSGSIZE) {
                self.path_mtus.doubt(to);
            }
        }
    }

    fn read_sockets(&self) {
        let mut buffer = vec![0; LONGEST_PACKET];
        while self.running() {
            for (inlet, has_errors) in self.sockets.wait(WAIT_MILLISECONDS) {
                let now = monotonic_seconds();
                if has_errors {
                    self.read_errors(inlet, &mut buffer, now);
                }
                for _ in 0..BATCH {
                    // Errors are those of earlier datagrams (ICMP), which reading them clears.
                    let Ok(received) = inlet.listener.receive(&mut buffer) else {
                        break;
                    };
                    let Some(bytes) = buffer.get_mut(..received.length) else {
                        break;
                    };
                    self.receive(
                        inlet,
                        bytes,
                        received.local,
                        received.remote,
                        received.class,
                        now,
                    );
                }
            }
        }
    }

    fn receive(
        &self,
        inlet: &Inlet,
        bytes: &mut [u8],
        local: SocketAddr,
        remote: SocketAddr,
        class: u8,
        now: u64,
    ) {
        let arrival = Arrival {
            source: remote,
            destination: local.ip(),
            tos: class,
            slot: None,
        };
        match inlet.kind {
            Kind::Ike => self.deliver_ike(local, remote, bytes),
            Kind::Nat => match Datagram::of(bytes) {
                Datagram::Nothing => {}
                Datagram::Ike(at) => {
                    self.deliver_ike(local, remote, bytes.get(at..).unwrap_or_default());
                }
                Datagram::Esp => {
                    if self.open(bytes, 0..bytes.len(), &arrival, now) == Opened::Elsewhere
                        && let Some((spi, _)) = inbound::header(bytes)
                    {
                        let stray = Stray { spi, local, remote };
                        self.strays.report(stray, now);
                    }
                }
            },
            Kind::Esp if inlet.v6 => {
                let source = SocketAddr::new(remote.ip(), 0);
                let arrival = Arrival { source, ..arrival };
                self.open(bytes, 0..bytes.len(), &arrival, now);
            }
            Kind::Esp => match esp_of_raw_v4(bytes, remote.ip()) {
                Some((esp, arrival)) => {
                    self.open(bytes, esp, &arrival, now);
                }
                None => self.counters.count(Reason::Malformed),
            },
        }
    }

    /// Learns from ICMP messages what the paths take. The queue must be emptied, or the socket would stay ready.
    fn read_errors(&self, inlet: &Inlet, buffer: &mut [u8], now: u64) {
        for _ in 0..BATCH {
            let Ok(error) = inlet.listener.receive_too_big(buffer) else {
                return;
            };
            if let Some(error) = error
                && self.too_big_reports.pass(error.remote, now)
                && let Some(packet) = buffer.get(..error.length)
                && self.was_ours(packet, error.remote)
            {
                self.path_mtus.learn(error.remote, error.mtu, now);
                self.path_mtus.doubt(error.remote);
            }
        }
    }

    /// Whether what came back is the beginning of an ESP packet that we sent lately.
    // RFC 4301 section 8.2.1: an unauthenticated message must at least fit to an SA; who is not on the path does not know
    // its SPI and where its sequence numbers are.
    fn was_ours(&self, packet: &[u8], remote: IpAddr) -> bool {
        const LATELY: u32 = 1 << 16;
        let Some((spi, sequence)) = inbound::header(packet) else {
            return false;
        };
        self.tables.outbound_by_spi(spi, remote).is_some_and(|sa| {
            let [.., a, b, c, d] = sa.core.stats().sequence.to_be_bytes();
            u32::from_be_bytes([a, b, c, d]).wrapping_sub(sequence) < LATELY
        })
    }

    fn deliver_ike(&self, local: SocketAddr, remote: SocketAddr, bytes: &[u8]) {
        // With a full queue it is lost like any datagram may be: the peer sends it again.
        self.events.send(Event::Ike(ike(local, remote, bytes)));
    }

    fn open(&self, frame: &mut [u8], esp: Range<usize>, arrival: &Arrival, now: u64) -> Opened {
        match self.inbound.process(frame, esp, arrival, Origin::Slow, now) {
            Inbound::Deliver { packet, sa, .. } => {
                let packet = frame.get(packet).unwrap_or_default();
                if self.devices.write(sa.tunnel.id, packet).is_err() {
                    self.counters.count(Reason::SendFailed);
                }
            }
            Inbound::Dummy => {}
            Inbound::Elsewhere => return Opened::Elsewhere,
            Inbound::Drop(reason) => self.counters.count(reason),
        }
        Opened::Here
    }
}

impl Threads {
    /// Stops the threads and waits for them.
    pub fn stop(self) {
        self.slow.stop.store(true, Ordering::Relaxed);
        for handle in self.handles {
            // A thread that panicked has said so itself.
            let _ = handle.join();
        }
    }
}

/// Where ESP is in an IPv4 packet from a raw socket, and its outer header.
fn esp_of_raw_v4(packet: &[u8], source: IpAddr) -> Option<(Range<usize>, Arrival)> {
    let header = packet.first_chunk::<20>()?;
    let header_bytes = usize::from(header[0] & 0x0f) * 4;
    if header_bytes < 20 || header_bytes > packet.len() {
        return None;
    }
    let arrival = Arrival {
        source: SocketAddr::new(source, 0),
        destination: Ipv4Addr::from(*header[16..].first_chunk::<4>()?).into(),
        tos: header[1],
        slot: None,
    };
    Some((header_bytes..packet.len(), arrival))
}

/// Seconds of CLOCK_MONOTONIC.
pub fn monotonic_seconds() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .ok()
        .and_then(|time| u64::try_from(time.tv_sec()).ok())
        .unwrap_or_default()
}
