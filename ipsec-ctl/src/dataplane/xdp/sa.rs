//! The SAs as workers and slow path see them: immutable but for the shared words and what was reported already.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use ipsec_common::{Reason, Spi};

use super::{
    events::Events, outer::OuterTemplate, prefetch::Places, selectors::Selectors, table::Tunnel,
    words::WordsRef,
};
use crate::{
    dataplane::seam::{
        ChildId, Direction, Event, LifetimeKind, Outer, PathCounters, Rejected, SaId, SaSpec,
        SaStats, TunnelId,
    },
    esp::EspTransform,
};

/// Who carries a packet: decides on TTL, for the kernel decrements it on the slow path, and on counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The slow path: the kernel routed the packet into or out of a TUN device.
    Slow,
    /// An AF_XDP worker: nobody touched the packet before.
    Fast,
}

/// What does not change when an SA moves to other outer addresses.
#[derive(Debug)]
pub struct SaCore {
    /// Its id.
    pub id: SaId,
    /// Its tunnel.
    pub tunnel: TunnelId,
    /// Its child.
    pub child: ChildId,
    /// Its direction.
    pub direction: Direction,
    /// Its SPI.
    pub spi: Spi,
    /// Its cryptography.
    pub transform: EspTransform,
    /// Its shared words.
    pub words: WordsRef,
    /// Its negotiated selectors.
    pub selectors: Selectors,
    /// 64-bit sequence numbers.
    pub esn: bool,
    /// Anti-replay window in packets; 0 accepts replays.
    pub window: u32,
    soft_packets: u64,
    soft_bytes: u64,
    soft_reported: AtomicBool,
    hard_reported: AtomicBool,
}

impl SaCore {
    /// Prepares an SA over freshly allocated words.
    pub fn new(spec: &SaSpec, words: WordsRef) -> Result<Self, Rejected> {
        let transform =
            EspTransform::new(spec.suite, &spec.keys, spec.esn).map_err(|_| Rejected::BadKeys)?;
        words
            .hard_packets
            .store(spec.lifetime.hard_packets, Ordering::Relaxed);
        words
            .hard_bytes
            .store(spec.lifetime.hard_bytes, Ordering::Relaxed);
        Ok(Self {
            id: spec.id,
            tunnel: spec.tunnel,
            child: spec.child,
            direction: spec.direction,
            spi: spec.spi,
            transform,
            words,
            selectors: Selectors::new(&spec.selectors),
            esn: spec.esn,
            window: spec.replay_window,
            soft_packets: spec.lifetime.soft_packets,
            soft_bytes: spec.lifetime.soft_bytes,
            soft_reported: AtomicBool::new(false),
            hard_reported: AtomicBool::new(false),
        })
    }

    /// Where the memory is that every packet of the SA needs.
    pub fn note_places(self: &Arc<Self>, places: &mut Places) {
        places.add_shared(self);
        places.add_addresses(self.transform.key_addresses());
        self.words.note_places(places);
        self.selectors.note_places(places);
    }

    /// Takes the next sequence number, each one once, whoever asks.
    // RFC 4303 section 3.3.3: the counter must never cycle while anti-replay is on; with an AEAD a repeated number would
    // be a repeated nonce.
    pub fn next_sequence(&self, events: &Events) -> Result<u64, Reason> {
        let last = if self.esn {
            u64::MAX - 1
        } else {
            u64::from(u32::MAX)
        };
        // An overshooting counter stays above the limit for good: 64 bits do not wrap in practice.
        let sequence = self
            .words
            .sequence
            .fetch_add(1, Ordering::Relaxed)
            .saturating_add(1);
        if sequence > last {
            self.report(LifetimeKind::Hard, events);
            return Err(Reason::SequenceExhausted);
        }
        // Exact whatever other threads do, for each packet has a number of its own.
        if sequence > self.words.hard_packets.load(Ordering::Relaxed) {
            self.report(LifetimeKind::Hard, events);
            return Err(Reason::HardLimit);
        }
        Ok(sequence)
    }

    /// Refuses a packet of an SA that is past a hard limit.
    pub fn admit(&self, events: &Events) -> Result<(), Reason> {
        let (packets, bytes) = self.carried();
        if packets >= self.words.hard_packets.load(Ordering::Relaxed)
            || bytes >= self.words.hard_bytes.load(Ordering::Relaxed)
        {
            self.report(LifetimeKind::Hard, events);
            return Err(Reason::HardLimit);
        }
        Ok(())
    }

    /// Counts a packet of `bytes` inner bytes at `now` (seconds of CLOCK_MONOTONIC), and reports the soft limit once.
    pub fn account(&self, origin: Origin, bytes: usize, now: u64, events: &Events) {
        let words = &*self.words;
        let (packet_count, byte_count) = match origin {
            Origin::Slow => (&words.slow_packets, &words.slow_bytes),
            Origin::Fast => (&words.fast_packets, &words.fast_bytes),
        };
        packet_count.fetch_add(1, Ordering::Relaxed);
        byte_count.fetch_add(bytes as u64, Ordering::Relaxed);
        if words.last_used.load(Ordering::Relaxed) != now {
            words.last_used.store(now, Ordering::Relaxed);
        }
        let (packets, bytes) = self.carried();
        if packets >= self.soft_packets || bytes >= self.soft_bytes {
            self.report(LifetimeKind::Soft, events);
        }
    }

    /// Its counters.
    pub fn stats(&self) -> SaStats {
        let words = &*self.words;
        let load = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let last = if self.esn {
            u64::MAX
        } else {
            u64::from(u32::MAX)
        };
        SaStats {
            sa: self.id,
            fast: PathCounters {
                packets: load(&words.fast_packets),
                bytes: load(&words.fast_bytes),
            },
            slow: PathCounters {
                packets: load(&words.slow_packets),
                bytes: load(&words.slow_bytes),
            },
            sequence: load(&words.sequence).min(last),
            replayed: load(&words.replayed),
            forged: load(&words.forged),
        }
    }

    fn carried(&self) -> (u64, u64) {
        let words = &*self.words;
        let sum = |fast: &AtomicU64, slow: &AtomicU64| {
            fast.load(Ordering::Relaxed)
                .saturating_add(slow.load(Ordering::Relaxed))
        };
        (
            sum(&words.fast_packets, &words.slow_packets),
            sum(&words.fast_bytes, &words.slow_bytes),
        )
    }

    /// Whoever was told of a limit may have forgotten it: the next packet reports it again.
    pub(super) fn report_again(&self) {
        self.soft_reported.store(false, Ordering::Relaxed);
        self.hard_reported.store(false, Ordering::Relaxed);
    }

    /// Reports a limit once; again with the next packet if the daemon's queue was full.
    fn report(&self, kind: LifetimeKind, events: &Events) {
        let reported = match kind {
            LifetimeKind::Soft => &self.soft_reported,
            LifetimeKind::Hard => &self.hard_reported,
        };
        if reported.load(Ordering::Relaxed) || reported.swap(true, Ordering::Relaxed) {
            return;
        }
        if !events.send(Event::Lifetime { sa: self.id, kind }) {
            reported.store(false, Ordering::Relaxed);
        }
    }
}

/// An SA that we send with.
#[derive(Debug)]
pub struct OutboundSa {
    /// What stays when it moves.
    pub core: Arc<SaCore>,
    /// Its outer headers.
    pub template: OuterTemplate,
}

impl OutboundSa {
    /// The longest inner packet whose outer packet has at most `outer_mtu` bytes.
    pub fn inner_mtu(&self, outer_mtu: usize) -> usize {
        self.core
            .transform
            .max_payload(outer_mtu.saturating_sub(self.template.header_bytes()))
    }
}

/// An SA that the peer sends with.
#[derive(Debug)]
pub struct InboundSa {
    /// What stays when it moves.
    pub core: Arc<SaCore>,
    /// Its tunnel.
    pub tunnel: Arc<Tunnel>,
    /// Outer addresses the peer is known by.
    pub outer: Outer,
    /// Second of the last report that the peer moved.
    moved: AtomicU64,
}

impl InboundSa {
    /// Where the memory is that every packet of the SA needs.
    pub fn note_places(self: &Arc<Self>, places: &mut Places) {
        places.add_shared(self);
        self.core.note_places(places);
        self.core.words.note_window(places);
        places.add_shared(&self.tunnel);
    }

    /// An inbound SA of `tunnel`.
    pub fn new(core: Arc<SaCore>, tunnel: Arc<Tunnel>, outer: Outer) -> Self {
        Self {
            core,
            tunnel,
            outer,
            moved: AtomicU64::new(u64::MAX),
        }
    }

    /// Reports, once a second, that an authenticated packet came from another place than the SA says.
    // RFC 7296 section 2.23: only where a NAT is between the peers, which is where ESP is encapsulated.
    pub fn note_source(&self, source: SocketAddr, now: u64, events: &Events) {
        let Some(encap) = self.outer.encap else {
            return;
        };
        let known = SocketAddr::new(self.outer.remote, encap.remote_port);
        if source != known && self.moved.swap(now, Ordering::Relaxed) != now {
            events.send(Event::PeerMoved {
                sa: self.core.id,
                remote: source,
            });
        }
    }
}
