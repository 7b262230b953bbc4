//! What a worker does to packets: seals what the FIB sends into a tunnel and opens what comes out of one.
//!
//! Between two AF_XDP sockets: the XDP program's note says what to do, the pipeline does it in the frame, and the next
//! hop cache says where it leaves. Whatever that cache does not know, and whatever the kernel is better at, goes on by
//! [`SlowExit`]; no packet takes both ways.

use std::{
    net::{IpAddr, SocketAddr},
    ops::Range,
    sync::Arc,
};

use ipsec_common::{
    Reason,
    maps::{NOTE_BYTES, Note, SA_SLOTS, TUNNEL_SLOTS, Work},
};

use super::{
    af_xdp::forward::{Handler, Verdict},
    counters::Counters,
    inbound::{Arrival, Inbound, InboundPipeline},
    inner::{Inner, decrement_ttl},
    link_layer::{complete_checksum, write_header},
    next_hop::{Key, NextHops},
    outbound::{Outbound, OutboundPipeline, Sealed},
    prefetch::Hints,
    sa::Origin,
    table::{Tables, Tunnel},
};

/// DSCP without ECN.
const DSCP: u8 = 0xfc;

/// Where packets go on that a worker cannot send itself. What fails there is counted there.
pub trait SlowExit: Send {
    /// Hands an inner packet to the kernel, as received on the tunnel's device.
    fn deliver(&self, tunnel: &Tunnel, packet: &[u8]);

    /// Sends a sealed packet through the kernel.
    fn send(&self, frame: &[u8], sealed: &Sealed);

    /// Tells the sender of a packet that it is too long for the tunnel, or cuts and seals it.
    fn too_long(&self, tunnel: &Tunnel, frame: &mut [u8], inner: Range<usize>, now: u64);
}

/// An interface that a worker has a socket on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its index.
    pub ifindex: u32,
    /// Virtual interfaces hand checksums on that hold the pseudo-header only, for a NIC to complete.
    pub partial_checksums: bool,
}

/// What all workers of an engine share.
#[derive(Clone)]
pub struct Shared {
    /// SAs and tunnels.
    pub tables: Arc<Tables>,
    /// The outbound half of the pipeline.
    pub outbound: OutboundPipeline,
    /// The inbound half.
    pub inbound: InboundPipeline,
}

/// The packet work of one worker.
pub struct Gateway<S> {
    shared: Shared,
    ports: Vec<Port>,
    next_hops: NextHops,
    exit: S,
    counters: Arc<Counters>,
    clock: fn() -> u64,
    now: u64,
    /// The tunnel of the last outbound packet of this batch.
    tunnel: Option<Arc<Tunnel>>,
    /// Of tunnels, by the index of the device.
    outbound: Hints,
    /// Of inbound SAs, by the slot of the words.
    inbound: Hints,
}

impl<S: SlowExit> Gateway<S> {
    /// The work for a worker with sockets on `ports`, in this order. `clock` tells seconds of CLOCK_MONOTONIC.
    pub fn new(
        shared: Shared,
        ports: Vec<Port>,
        next_hops: NextHops,
        exit: S,
        counters: Arc<Counters>,
        clock: fn() -> u64,
    ) -> Self {
        Self {
            shared,
            ports,
            next_hops,
            exit,
            counters,
            clock,
            now: 0,
            tunnel: None,
            outbound: Hints::new(TUNNEL_SLOTS),
            inbound: Hints::new(SA_SLOTS),
        }
    }

    fn work(
        &mut self,
        port: usize,
        frame: &mut [u8],
        packet: Range<usize>,
    ) -> Result<Verdict, Reason> {
        let (work, note) = read_note(frame, packet.start).ok_or(Reason::Malformed)?;
        let network = packet.start + usize::from(note.network);
        match work {
            Work::Outbound => self.seal(port, frame, network..packet.end, note.target),
            Work::Inbound => {
                let esp = packet.start + usize::from(note.esp);
                self.open(frame, network..packet.end, esp, note.target)
            }
        }
    }

    fn seal(
        &mut self,
        port: usize,
        frame: &mut [u8],
        inner: Range<usize>,
        device: u32,
    ) -> Result<Verdict, Reason> {
        let tunnel = self.tunnel(device).ok_or(Reason::NoSa)?;
        if self
            .ports
            .get(port)
            .is_some_and(|port| port.partial_checksums)
            && let Some(packet) = frame.get_mut(inner.clone())
        {
            complete_checksum(packet);
        }
        let verdict =
            self.shared
                .outbound
                .process(&tunnel, frame, inner.clone(), Origin::Fast, self.now);
        match verdict {
            Outbound::Send(sealed) => {
                let key = outer_key(&sealed);
                self.outbound.renew(device, self.now, |places| {
                    self.shared.tables.note_outbound_places(device, places);
                    self.next_hops.note_places(&key, places);
                });
                self.send_sealed(&key, frame, &sealed)
            }
            Outbound::Drop(reason) => Err(reason),
            Outbound::Waits => Ok(Verdict::Done),
            // The XDP program passes such packets to the kernel: only while the MTU changes do they come here.
            Outbound::TooBig(_) | Outbound::Fragment(_) => {
                self.counters.count(Reason::SlowTooLong);
                self.exit.too_long(&tunnel, frame, inner, self.now);
                Ok(Verdict::Done)
            }
        }
    }

    fn send_sealed(
        &mut self,
        key: &Key,
        frame: &mut [u8],
        sealed: &Sealed,
    ) -> Result<Verdict, Reason> {
        if sealed.in_fragments {
            self.counters.count(Reason::SlowTooLong);
            self.exit.send(frame, sealed);
            return Ok(Verdict::Done);
        }
        match self.leave(key, frame, &sealed.packet) {
            Ok(verdict) => Ok(verdict),
            Err(Reason::RecursiveRoute) => Err(Reason::RecursiveRoute),
            Err(reason) => {
                self.counters.count(reason);
                self.exit.send(frame, sealed);
                Ok(Verdict::Done)
            }
        }
    }

    fn open(
        &mut self,
        frame: &mut [u8],
        packet: Range<usize>,
        esp: usize,
        slot: u32,
    ) -> Result<Verdict, Reason> {
        let (mut arrival, end) = frame
            .get(packet.clone())
            .and_then(|bytes| outer_header(bytes, esp.checked_sub(packet.start)?))
            .ok_or(Reason::Malformed)?;
        arrival.slot = Some(slot);
        let esp = esp..packet.start + end;
        let verdict = self
            .shared
            .inbound
            .process(frame, esp, &arrival, Origin::Fast, self.now);
        match verdict {
            Inbound::Deliver { packet, inner, sa } => {
                let tunnel = &sa.tunnel;
                let key = inner_key(&inner, tunnel);
                self.inbound.renew(slot, self.now, |places| {
                    self.shared.tables.note_inbound_places(slot, places);
                    self.next_hops.note_places(&key, places);
                });
                self.deliver(&key, frame, packet, &inner, tunnel)
            }
            Inbound::Dummy | Inbound::Elsewhere => Ok(Verdict::Done),
            Inbound::Drop(reason) => Err(reason),
        }
    }

    fn deliver(
        &mut self,
        key: &Key,
        frame: &mut [u8],
        packet: Range<usize>,
        inner: &Inner,
        tunnel: &Tunnel,
    ) -> Result<Verdict, Reason> {
        match self.forward(key, frame, &packet, inner) {
            Ok(verdict) => Ok(verdict),
            Err(reason) => {
                self.counters.count(reason);
                let packet = frame.get(packet).ok_or(Reason::BadInner)?;
                self.exit.deliver(tunnel, packet);
                Ok(Verdict::Done)
            }
        }
    }

    /// Sends an inner packet to its next hop. An error is why the kernel has to do it, with the packet untouched.
    fn forward(
        &mut self,
        key: &Key,
        frame: &mut [u8],
        packet: &Range<usize>,
        inner: &Inner,
    ) -> Result<Verdict, Reason> {
        let bytes = frame.get(packet.clone()).ok_or(Reason::BadInner)?;
        if let Some(reason) = kernel_routes(bytes, inner) {
            return Err(reason);
        }
        let verdict = self.leave(key, frame, packet)?;
        // A TTL of 1 was refused above.
        if let Some(bytes) = frame.get_mut(packet.clone()) {
            decrement_ttl(bytes, inner);
        }
        Ok(verdict)
    }

    /// Finds the next hop of a packet and writes the Ethernet header before it.
    fn leave(
        &mut self,
        key: &Key,
        frame: &mut [u8],
        packet: &Range<usize>,
    ) -> Result<Verdict, Reason> {
        let hop = self.next_hops.lookup(key, self.now)?;
        if u32::try_from(packet.len()).is_ok_and(|bytes| bytes > hop.mtu) {
            return Err(Reason::SlowTooLong);
        }
        let port = self
            .ports
            .iter()
            .position(|port| port.ifindex == hop.ifindex)
            .ok_or(Reason::SlowPolicy)?;
        let start = write_header(frame, packet.start, &hop).ok_or(Reason::SlowPolicy)?;
        Ok(Verdict::Send(port, start..packet.end))
    }

    fn tunnel(&mut self, device: u32) -> Option<Arc<Tunnel>> {
        if let Some(tunnel) = &self.tunnel
            && tunnel.ifindex == device
        {
            return Some(Arc::clone(tunnel));
        }
        self.tunnel = self.shared.tables.tunnel_of_device(device);
        self.tunnel.clone()
    }
}

impl<S: SlowExit> Handler for Gateway<S> {
    fn begin(&mut self) {
        self.now = (self.clock)();
        self.next_hops.update();
        // It may have been removed since.
        self.tunnel = None;
    }

    fn announce(&mut self, frame: &[u8], packet: &Range<usize>) {
        match read_note(frame, packet.start) {
            Some((Work::Outbound, note)) => self.outbound.announce(note.target),
            Some((Work::Inbound, note)) => self.inbound.announce(note.target),
            None => {}
        }
    }

    fn prepare(&mut self, frame: &[u8], packet: &Range<usize>) {
        match read_note(frame, packet.start) {
            Some((Work::Outbound, note)) => self.outbound.fetch(note.target),
            Some((Work::Inbound, note)) => self.inbound.fetch(note.target),
            None => {}
        }
    }

    fn handle(&mut self, socket: usize, frame: &mut [u8], packet: Range<usize>) -> Verdict {
        match self.work(socket, frame, packet) {
            Ok(verdict) => verdict,
            Err(reason) => {
                self.counters.count(reason);
                Verdict::Done
            }
        }
    }

    fn send_failed(&mut self) {
        self.counters.count(Reason::SendFailed);
    }
}

/// What the next hop of a sealed packet is looked up by.
fn outer_key(sealed: &Sealed) -> Key {
    Key {
        device: None,
        source: sealed.outer.local,
        destination: sealed.outer.remote,
        tos: sealed.tos & DSCP,
    }
}

/// What the next hop of an inner packet that came out of a tunnel is looked up by.
fn inner_key(inner: &Inner, tunnel: &Tunnel) -> Key {
    Key {
        device: Some(tunnel.ifindex),
        source: inner.flow.source,
        destination: inner.flow.destination,
        tos: inner.tos & DSCP,
    }
}

fn read_note(frame: &[u8], packet: usize) -> Option<(Work, Note)> {
    let start = packet.checked_sub(NOTE_BYTES)?;
    Note::read(frame.get(start..)?.first_chunk()?)
}

/// Why the kernel has to route an inner packet, if it has to whatever the next hop.
fn kernel_routes(packet: &[u8], inner: &Inner) -> Option<Reason> {
    let has_options = match packet.first().map(|byte| byte >> 4) {
        Some(4) => packet.first().is_some_and(|byte| byte & 0xf != 5),
        // Behind extension headers the protocol is another than the fixed header's.
        _ => packet.get(6) != Some(&inner.flow.protocol),
    };
    match inner.flow.destination {
        _ if has_options && !inner.fragment => Some(Reason::SlowOptions),
        IpAddr::V4(to) if to.is_multicast() || to.is_broadcast() => Some(Reason::SlowMulticast),
        IpAddr::V6(to) if to.is_multicast() => Some(Reason::SlowMulticast),
        IpAddr::V6(to) if to.is_unicast_link_local() => Some(Reason::SlowLocal),
        _ if inner.ttl <= 1 => Some(Reason::SlowTtl),
        _ if inner.fragment => Some(Reason::SlowFragment),
        _ => None,
    }
}

/// What the headers before ESP say, and where ESP ends, for the outer packet `packet` whose ESP header is at `esp`.
fn outer_header(packet: &[u8], esp: usize) -> Option<(Arrival, usize)> {
    const UDP_BYTES: usize = 8;
    let (source, destination, tos, header, end): (IpAddr, IpAddr, u8, usize, usize) =
        match packet.first()? >> 4 {
            4 => {
                let header = packet.first_chunk::<20>()?;
                (
                    <[u8; 4]>::try_from(&header[12..16]).ok()?.into(),
                    <[u8; 4]>::try_from(&header[16..20]).ok()?.into(),
                    header[1],
                    20,
                    usize::from(u16::from_be_bytes([header[2], header[3]])),
                )
            }
            6 => {
                let header = packet.first_chunk::<40>()?;
                (
                    <[u8; 16]>::try_from(&header[8..24]).ok()?.into(),
                    <[u8; 16]>::try_from(&header[24..40]).ok()?.into(),
                    header[0] << 4 | header[1] >> 4,
                    40,
                    40 + usize::from(u16::from_be_bytes([header[4], header[5]])),
                )
            }
            _ => return None,
        };
    let (port, end) = if esp == header + UDP_BYTES {
        let udp = packet.get(header..)?.first_chunk::<UDP_BYTES>()?;
        let length = usize::from(u16::from_be_bytes([udp[4], udp[5]]));
        (u16::from_be_bytes([udp[0], udp[1]]), header + length)
    } else {
        (0, end)
    };
    let arrival = Arrival {
        source: SocketAddr::new(source, port),
        destination,
        tos,
        slot: None,
    };
    (esp <= end && end <= packet.len()).then_some((arrival, end))
}
