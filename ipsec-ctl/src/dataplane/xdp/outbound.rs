//! From an inner packet that was routed into a tunnel to the ESP packet that leaves: the same for slow path and workers.
//!
//! Works in place on a frame with room on both sides. Reads no clock, sends nothing, counts nothing but the SA's words.

use std::{ops::Range, sync::Arc};

use arc_swap::Guard;
use ipsec_common::Reason;

use super::{
    events::{Events, RateLimit},
    inner::{Inner, clamp_mss, decrement_ttl},
    sa::{Origin, OutboundSa},
    selectors::{Flow, Match},
    senders::Senders,
    table::{Child, Settings, Tunnel},
    waiting::Turn,
};
use crate::dataplane::seam::{self, ChildId, Event, Outer, TunnelId};

/// Room that sealing may need before an inner packet: IPv6, UDP, ESP and an IV of AES-CBC.
pub const HEADROOM: usize = 40 + 8 + 8 + 16;
/// Room that sealing may need behind it: padding, trailer and the longest ICV.
pub const TAILROOM: usize = 15 + 2 + 32;
/// The least MTU that IPv6 lets a link have (RFC 8200 section 5).
pub const LEAST_IPV6_MTU: u16 = 1280;

/// What becomes of a packet that was routed into a tunnel.
#[derive(Debug, PartialEq, Eq)]
pub enum Outbound {
    /// It goes out.
    Send(Sealed),
    /// It goes nowhere.
    Drop(Reason),
    /// It waits for an SA, as a copy.
    Waits,
    /// It is too long and must not be fragmented: its sender is told this MTU in bytes.
    TooBig(u16),
    /// It is to be cut into fragments of this many bytes at most, each of which comes here again.
    Fragment(u16),
}

/// A packet ready to leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The outer packet's place in the frame.
    pub packet: Range<usize>,
    /// Its addresses, by which its next hop is found.
    pub outer: Outer,
    /// Its TOS byte or traffic class.
    pub tos: u8,
    /// The path does not take it in one piece, and IPv6 inside needs it to pass all the same.
    pub in_fragments: bool,
}

/// A child, what it sends with, and which of that takes the packet, if the child has any.
struct Found<'a> {
    child: &'a Child,
    senders: Guard<Arc<Senders>>,
    place: Option<usize>,
}

impl Found<'_> {
    fn sa(&self) -> Option<&OutboundSa> {
        self.senders.get(self.place?).map(Arc::as_ref)
    }
}

/// The outbound half of the pipeline. Cheap to clone.
#[derive(Clone, Debug)]
pub struct OutboundPipeline {
    events: Events,
    acquires: RateLimit<(TunnelId, ChildId)>,
    recursions: RateLimit<TunnelId>,
}

impl OutboundPipeline {
    /// Reports to `events`.
    pub fn new(events: Events) -> Self {
        Self {
            events,
            acquires: RateLimit::new(1, 65_536),
            recursions: RateLimit::new(10, 65_536),
        }
    }

    /// Seals the inner packet at `inner` in `frame`, which has [`HEADROOM`] before and [`TAILROOM`] behind it. `now` is
    /// in seconds of CLOCK_MONOTONIC.
    pub fn process(
        &self,
        tunnel: &Tunnel,
        frame: &mut [u8],
        inner: Range<usize>,
        origin: Origin,
        now: u64,
    ) -> Outbound {
        self.carry(tunnel, frame, inner, origin, now, true)
    }

    /// Seals a packet that has waited for its SA, and so goes past those that still do. It is the slow path's.
    pub fn process_waited(
        &self,
        tunnel: &Tunnel,
        frame: &mut [u8],
        inner: Range<usize>,
        now: u64,
    ) -> Outbound {
        self.carry(tunnel, frame, inner, Origin::Slow, now, false)
    }

    fn carry(
        &self,
        tunnel: &Tunnel,
        frame: &mut [u8],
        inner: Range<usize>,
        origin: Origin,
        now: u64,
        may_wait: bool,
    ) -> Outbound {
        let Some(bytes) = frame.get_mut(inner.clone()) else {
            return Outbound::Drop(Reason::Malformed);
        };
        let Ok(packet) = Inner::parse(bytes) else {
            return Outbound::Drop(Reason::Malformed);
        };
        let settings = tunnel.settings.load();
        if tunnel.is_recursive() {
            return Outbound::Drop(Reason::RecursiveRoute);
        }
        if settings.is_own_esp(&packet.flow) {
            self.report_recursion(tunnel, &packet.flow, now);
            return Outbound::Drop(Reason::RecursiveRoute);
        }
        let mut found = match self.select(tunnel, &settings, &packet.flow, now) {
            Ok(found) => found,
            Err(reason) => return Outbound::Drop(reason),
        };
        let child = found.child;
        if child.on_demand && may_wait && (found.place.is_none() || child.waiting.any()) {
            match wait(child, bytes, &packet, origin, now) {
                Ok(Turn::Waits) => return Outbound::Waits,
                Ok(Turn::Full) => return Outbound::Drop(Reason::NoSa),
                Ok(Turn::Now) => {
                    found.senders = child.outbound.load();
                    found.place = found.senders.choose(&packet.flow).ok();
                }
                Err(reason) => return Outbound::Drop(reason),
            }
        }
        let Some(sa) = found.sa() else {
            return Outbound::Drop(Reason::NoSa);
        };
        if let Some(verdict) = too_long(&packet, tunnel.mtu()) {
            return verdict;
        }
        // On the slow path the kernel has decremented it.
        if origin == Origin::Fast && !decrement_ttl(bytes, &packet) {
            return Outbound::Drop(Reason::TtlExpired);
        }
        if tunnel.clamps_mss() {
            clamp_mss(bytes, &packet, tunnel.mtu());
        }
        let payload = inner.start..inner.start + packet.bytes;
        match self.seal(sa, frame, payload, &packet) {
            Ok(mut sealed) => {
                sealed.in_fragments = packet.bytes > usize::from(tunnel.whole());
                sa.core.account(origin, packet.bytes, now, &self.events);
                Outbound::Send(sealed)
            }
            Err(reason) => Outbound::Drop(reason),
        }
    }

    fn seal(
        &self,
        sa: &OutboundSa,
        frame: &mut [u8],
        payload: Range<usize>,
        inner: &Inner,
    ) -> Result<Sealed, Reason> {
        let core = &sa.core;
        core.admit(&self.events)?;
        let sequence = core.next_sequence(&self.events)?;
        let esp = core
            .transform
            .seal(core.spi, sequence, inner.next_header(), frame, payload)
            .map_err(|_| Reason::SendFailed)?;
        let packet = sa
            .template
            .write(frame, esp, inner, sequence)
            .ok_or(Reason::SendFailed)?;
        Ok(Sealed {
            packet,
            outer: sa.template.outer,
            tos: sa.template.tos(inner),
            in_fragments: false,
        })
    }

    fn report_recursion(&self, tunnel: &Tunnel, flow: &Flow, now: u64) {
        if self.recursions.pass(tunnel.id, now) {
            self.events.send(Event::RecursiveRoute {
                tunnel: tunnel.id,
                remote: flow.destination,
            });
        }
    }

    /// The first child that the packet belongs to: by what its SAs were negotiated for, and while it has none by what was
    /// configured.
    // RFC 4301 section 4.4.1: the SPD is ordered; a later child does not carry what belongs to an earlier one without SA.
    fn select<'a>(
        &self,
        tunnel: &Tunnel,
        settings: &'a Settings,
        flow: &Flow,
        now: u64,
    ) -> Result<Found<'a>, Reason> {
        let mut reason = Reason::OutboundSelectors;
        for child in &settings.children {
            let senders = child.outbound.load();
            let chosen = if senders.is_empty() {
                match child.selectors.match_outbound(flow) {
                    Match::Yes => Ok(None),
                    no @ (Match::No | Match::NeedsPorts) => Err(no),
                }
            } else {
                senders.choose(flow).map(Some)
            };
            let place = match chosen {
                Ok(place) => place,
                Err(Match::NeedsPorts) => {
                    reason = Reason::FragmentPorts;
                    continue;
                }
                Err(Match::No | Match::Yes) => continue,
            };
            if place.is_none() && child.on_demand && self.acquires.pass((tunnel.id, child.id), now)
            {
                self.events.send(Event::Acquire {
                    tunnel: tunnel.id,
                    child: child.id,
                    flow: seam_flow(flow),
                });
            }
            return Ok(Found {
                child,
                senders,
                place,
            });
        }
        Err(reason)
    }
}

/// Lines a packet up behind those that wait for the child's SA.
fn wait(
    child: &Child,
    bytes: &mut [u8],
    packet: &Inner,
    origin: Origin,
    now: u64,
) -> Result<Turn, Reason> {
    // It goes on as the slow path's, whose TTL the kernel has decremented.
    let mut copy = bytes.get(..packet.bytes).unwrap_or_default().to_vec();
    if origin == Origin::Fast && !decrement_ttl(&mut copy, packet) {
        return Err(Reason::TtlExpired);
    }
    let has_sa = || !child.outbound.load().is_empty();
    Ok(child.waiting.line_up(copy, now, has_sa))
}

/// Too long for the tunnel, which the kernel lets happen only while the MTU changes.
fn too_long(inner: &Inner, mtu: u16) -> Option<Outbound> {
    if inner.bytes <= usize::from(mtu) {
        return None;
    }
    Some(if inner.is_v6() {
        Outbound::TooBig(mtu.max(LEAST_IPV6_MTU))
    } else if inner.df {
        Outbound::TooBig(mtu)
    } else {
        Outbound::Fragment(mtu)
    })
}

fn seam_flow(flow: &Flow) -> seam::Flow {
    let (source_port, destination_port) = flow.ports.unwrap_or_default();
    seam::Flow {
        source: flow.source,
        destination: flow.destination,
        protocol: flow.protocol,
        source_port,
        destination_port,
    }
}
