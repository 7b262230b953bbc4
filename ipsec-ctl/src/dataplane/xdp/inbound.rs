//! From an ESP packet to the inner packet that goes on: the same for slow path and workers.
//!
//! Works in place on a frame. Reads no clock, sends nothing, counts nothing but the SA's words.

use std::{
    net::{IpAddr, SocketAddr},
    ops::Range,
    sync::{Arc, atomic::Ordering},
};

use ipsec_common::{Reason, Spi, replay};

use super::{
    events::{Events, RateLimit},
    inner::{Inner, clamp_mss, decapsulate_ecn, set_ecn},
    sa::{InboundSa, Origin},
    selectors::Match,
    table::Tables,
};
use crate::{dataplane::seam::Event, esp::OpenError};

const IPV4: u8 = 4;
const IPV6: u8 = 41;
/// RFC 4303 section 2.6: a dummy packet, made to hide traffic.
const NO_NEXT_HEADER: u8 = 59;

/// The outer headers of an ESP packet, as far as they matter.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// Where it came from; port 0 unless it was encapsulated in UDP.
    pub source: SocketAddr,
    /// The address of ours that it was sent to.
    pub destination: IpAddr,
    /// The outer TOS byte or traffic class.
    pub tos: u8,
    /// Slot of the SA's words, where the XDP program has found it.
    pub slot: Option<u32>,
}

/// What becomes of an ESP packet.
#[derive(Debug)]
pub enum Inbound {
    /// The inner packet goes on as if it had arrived on the tunnel's device.
    Deliver {
        /// Its place in the frame.
        packet: Range<usize>,
        /// What it is. Its TTL is still as it arrived: who routes it decrements it, and the kernel does so itself with
        /// what a TUN device received.
        inner: Inner,
        /// The SA that it came through, out of its tunnel.
        sa: Arc<InboundSa>,
    },
    /// A dummy packet, which ends here without being an error.
    Dummy,
    /// It is another engine's: this is a copy, or one that the kernel could not take.
    Elsewhere,
    /// It goes nowhere.
    Drop(Reason),
}

/// The inbound half of the pipeline. Cheap to clone.
#[derive(Clone)]
pub struct InboundPipeline {
    tables: Arc<Tables>,
    events: Events,
    unknown: RateLimit<IpAddr>,
}

impl InboundPipeline {
    /// Looks SAs up in `tables` and reports to `events`.
    pub fn new(tables: Arc<Tables>, events: Events) -> Self {
        Self {
            tables,
            events,
            unknown: RateLimit::new(1, 1024),
        }
    }

    /// Opens the ESP packet at `esp` in `frame`. `now` is in seconds of CLOCK_MONOTONIC.
    pub fn process(
        &self,
        frame: &mut [u8],
        esp: Range<usize>,
        arrival: &Arrival,
        origin: Origin,
        now: u64,
    ) -> Inbound {
        let Some((spi, sequence)) = frame.get(esp.clone()).and_then(header) else {
            return Inbound::Drop(Reason::Malformed);
        };
        let found = match arrival.slot {
            Some(slot) => self.tables.inbound_at(slot, spi, arrival.destination),
            None => self.tables.inbound(spi, arrival.destination),
        };
        let Some(sa) = found else {
            if self.tables.passes(spi, arrival.destination) {
                return Inbound::Elsewhere;
            }
            self.report_unknown(spi, arrival, now);
            return Inbound::Drop(Reason::UnknownSpi);
        };
        match self.open(&sa, sequence, frame, esp, arrival, origin, now) {
            Ok(Some((packet, inner))) => Inbound::Deliver { packet, inner, sa },
            Ok(None) => Inbound::Dummy,
            Err(reason) => {
                let words = &sa.core.words;
                match reason {
                    Reason::Replayed | Reason::TooOld => &words.replayed,
                    Reason::BadIcv => &words.forged,
                    _ => return Inbound::Drop(reason),
                }
                .fetch_add(1, Ordering::Relaxed);
                Inbound::Drop(reason)
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the second half of `process`")]
    fn open(
        &self,
        sa: &InboundSa,
        low_sequence: u32,
        frame: &mut [u8],
        esp: Range<usize>,
        arrival: &Arrival,
        origin: Origin,
        now: u64,
    ) -> Result<Option<(Range<usize>, Inner)>, Reason> {
        let core = &sa.core;
        core.admit(&self.events)?;
        // RFC 4303 section 3.4.3: look before the ICV is verified, record after it.
        let sequence = replay::recover(&core.words, core.window, core.esn, low_sequence);
        replay::check(&core.words, core.window, sequence)?;
        let opened = core
            .transform
            .open(sequence, frame, esp)
            .map_err(|error| match error {
                OpenError::Malformed => Reason::Malformed,
                OpenError::BadIcv => Reason::BadIcv,
                OpenError::BadTrailer => Reason::BadTrailer,
            })?;
        let newest = sequence >= core.words.sequence.load(Ordering::Relaxed);
        replay::accept(&core.words, core.window, sequence)?;
        if newest {
            sa.note_source(arrival.source, now, &self.events);
        }
        match opened.next_header {
            IPV4 | IPV6 => {}
            NO_NEXT_HEADER => return Ok(None),
            _ => return Err(Reason::BadTrailer),
        }
        let bytes = frame
            .get_mut(opened.payload.clone())
            .ok_or(Reason::BadInner)?;
        let mut inner = Inner::parse(bytes).map_err(|_| Reason::BadInner)?;
        if inner.next_header() != opened.next_header {
            return Err(Reason::BadInner);
        }
        // RFC 4301 section 5.2: what the peer sends through an SA must match what was negotiated for it.
        match core.selectors.match_inbound(&inner.flow) {
            Match::Yes => {}
            Match::No => return Err(Reason::InboundSelectors),
            Match::NeedsPorts => return Err(Reason::FragmentPorts),
        }
        let ecn = decapsulate_ecn(inner.tos, arrival.tos).ok_or(Reason::EcnInvalid)?;
        set_ecn(bytes, &mut inner, ecn);
        if sa.tunnel.clamps_mss() {
            clamp_mss(bytes, &inner, sa.tunnel.mtu());
        }
        core.account(origin, inner.bytes, now, &self.events);
        Ok(Some((
            opened.payload.start..opened.payload.start + inner.bytes,
            inner,
        )))
    }

    fn report_unknown(&self, spi: Spi, arrival: &Arrival, now: u64) {
        let remote = arrival.source.ip();
        if self.unknown.pass(remote, now) {
            self.events.send(Event::UnknownSpi {
                spi,
                local: arrival.destination,
                remote,
            });
        }
    }
}

/// SPI and the low 32 bits of the sequence number of an ESP packet.
pub(super) fn header(esp: &[u8]) -> Option<(Spi, u32)> {
    let (spi, rest) = esp.split_first_chunk::<4>()?;
    let sequence = rest.first_chunk::<4>()?;
    Some((Spi::from_be_bytes(*spi), u32::from_be_bytes(*sequence)))
}
