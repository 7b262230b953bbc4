//! What all IKE SAs share: configuration, randomness, SPIs of ESP, and what there is to do.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ring::digest;
use serde::{Deserialize, Serialize};

use super::{
    handover::{Handover, Origin},
    index::{owner, owner_of},
    peers::Peers,
    presence::{Presence, Present},
};
#[cfg(test)]
use crate::ike::message::{Payload, payload::NotifyType};
use crate::ike::{
    Identity,
    config::{EndpointConfig, PeerId, Unique},
    event::{
        ChildSaId, ChildUp, DownReason, Event, Failure, FailureReason, IkeInfo, IkeSaId, IkeUp,
        Stage, Transmit,
    },
    job::{Job, JobId},
    message::IkeSpi,
    rng::Random,
    sa::{FollowUp, IkeSa, State},
    time::Time,
};

/// Port of a peer for IKE (RFC 7296 section 2).
pub(super) const IKE_PORT: u16 = 500;
/// Port of a peer for IKE and ESP behind NAT (RFC 7296 section 2.23).
pub(in crate::ike) const NAT_PORT: u16 = 4500;
/// SPIs below are reserved (RFC 4303 section 2.1).
const FIRST_SPI: u32 = 256;
/// First interval between two transmissions of a request.
const FIRST_PAUSE: Duration = Duration::from_millis(800);
/// Longest interval between two transmissions of a request.
const LONGEST_PAUSE: Duration = Duration::from_secs(20);

/// Time before the end of an SA within which it should be possible to replace it on a bad network.
const MARGIN: Duration = Duration::from_secs(30);

/// Why a datagram was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Refusal {
    /// It is no IKE message.
    Malformed,
    /// Its SPIs name no IKE SA.
    UnknownSpi,
    /// It claims to come from our side.
    WrongSide,
    /// It should be encrypted.
    NotEncrypted,
    /// There are no keys yet, or its sender has yet to prove who it is.
    TooEarly,
    /// It is forged or damaged.
    NotAuthentic,
    /// Its message ID is not the next one.
    OutOfWindow,
    /// There are too many half-open IKE SAs.
    TooManyHalfOpen,
    /// It lacks the cookie that is demanded under load.
    CookieDemanded,
    /// It comes from where no peer is configured.
    UnknownPeer,
    /// It offers nothing that is acceptable.
    NoProposal,
}

/// What all IKE SAs share.
pub(in crate::ike) struct Shared {
    pub(in crate::ike) config: EndpointConfig,
    pub(in crate::ike) random: Box<dyn Random + Send>,
    pub(in crate::ike) transmits: VecDeque<Transmit>,
    pub(in crate::ike) events: VecDeque<Event>,
    pub(in crate::ike) jobs: VecDeque<Job>,
    pub(in crate::ike) follow_ups: VecDeque<FollowUp>,
    pub(super) peers: Peers,
    presence: Presence,
    /// Our addresses that peers may be told of.
    pub(in crate::ike) addresses: Vec<IpAddr>,
    pub(super) spis: BTreeSet<u32>,
    pub(super) ike_spis: BTreeSet<IkeSpi>,
    pub(super) handover: Handover,
    refusals: BTreeMap<Refusal, u64>,
    pub(super) next: Numbers,
    #[cfg(test)]
    pub(in crate::ike) watched: Watched,
}

/// What tests make of an endpoint, and see of it.
#[cfg(test)]
#[derive(Default)]
pub(in crate::ike) struct Watched {
    /// As of a minimal implementation (RFC 7815), its IKE SAs take no SA beyond those of IKE_AUTH.
    pub(in crate::ike) is_minimal: bool,
    /// Errors that its responses have told.
    pub(in crate::ike) told: BTreeSet<NotifyType>,
}

/// Numbers that are given out next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Numbers {
    job: u64,
    child: u64,
    ike: u64,
}

impl Shared {
    pub(super) fn new(config: EndpointConfig, random: Box<dyn Random + Send>) -> Self {
        Self {
            config,
            random,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
            jobs: VecDeque::new(),
            follow_ups: VecDeque::new(),
            peers: Peers::default(),
            presence: Presence::default(),
            addresses: Vec::new(),
            spis: BTreeSet::new(),
            ike_spis: BTreeSet::new(),
            handover: Handover::default(),
            refusals: BTreeMap::new(),
            next: Numbers {
                job: 1,
                child: 1,
                ike: 1,
            },
            #[cfg(test)]
            watched: Watched::default(),
        }
    }

    pub(in crate::ike) fn random_bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.random.fill(&mut bytes);
        bytes
    }

    /// A fraction of `span` between 0 and a quarter, so that a thousand tunnels do not act as one.
    pub(in crate::ike) fn jitter(&mut self, span: Duration) -> Duration {
        let quarter = span / 4;
        let steps = u32::try_from(self.random.number() % 1024).unwrap_or(0);
        quarter * steps / 1024
    }

    /// The pause before the transmission after the given one: it grows by half and has jitter.
    pub(in crate::ike) fn retransmission(&mut self, attempt: u32) -> Duration {
        let pause = (0..attempt.min(16))
            .fold(FIRST_PAUSE, |pause, _| pause * 3 / 2)
            .min(LONGEST_PAUSE);
        pause + self.jitter(pause)
    }

    /// Time after which an SA should be replaced. The side that started it goes first, so that rarely both do.
    pub(in crate::ike) fn soft(&mut self, lifetime: Duration, first: bool) -> Duration {
        // Enough for requests that must be repeated, also where the lifetime is short.
        let margin = (lifetime * 15 / 100).max(MARGIN.min(lifetime / 2));
        let margin = if first { margin } else { margin / 2 };
        lifetime - margin + self.jitter(margin)
    }

    pub(in crate::ike) fn next_job(&mut self) -> JobId {
        let id = JobId(self.next.job);
        self.next.job += 1;
        id
    }

    pub(in crate::ike) fn next_child(&mut self) -> ChildSaId {
        let id = ChildSaId(self.next.child);
        self.next.child += 1;
        id
    }

    /// A name for an IKE SA.
    pub(in crate::ike) fn next_ike(&mut self) -> IkeSaId {
        let id = IkeSaId(self.next.ike);
        self.next.ike += 1;
        id
    }

    /// An SPI of ours for an IKE SA that no other has. RFC 7296 section 3.1: it must not be zero.
    pub(in crate::ike) fn allocate_ike_spi(&mut self) -> IkeSpi {
        loop {
            let spi = IkeSpi(self.random.number());
            if spi != IkeSpi(0) && self.ike_spis.insert(spi) {
                return spi;
            }
        }
    }

    /// Gives an SPI of an IKE SA back.
    pub(in crate::ike) fn release_ike_spi(&mut self, spi: IkeSpi) {
        self.ike_spis.remove(&spi);
    }

    /// An inbound SPI that no other SA of ours has.
    pub(in crate::ike) fn allocate_spi(&mut self) -> u32 {
        loop {
            let mut bytes = [0; 4];
            self.random.fill(&mut bytes);
            let spi = u32::from_be_bytes(bytes);
            if spi >= FIRST_SPI && self.spis.insert(spi) {
                return spi;
            }
        }
    }

    /// Gives an SPI back.
    pub(in crate::ike) fn release_pending(&mut self, spi: Option<u32>) {
        if let Some(spi) = spi {
            self.spis.remove(&spi);
        }
    }

    pub(in crate::ike) fn refuse(&mut self, refusal: Refusal) {
        *self.refusals.entry(refusal).or_default() += 1;
    }

    pub(super) fn refusals(&self) -> impl Iterator<Item = (Refusal, u64)> {
        self.refusals
            .iter()
            .map(|(refusal, count)| (*refusal, *count))
    }

    /// Notes whether an IKE SA is one that no other may take the place of.
    pub(super) fn note_presence(&mut self, sa: &IkeSa) {
        let keeps = |peer: &PeerId| self.unique(*peer) == Unique::Keep;
        let is_up = sa.state == State::Up && sa.peer.as_ref().is_some_and(keeps);
        let present = sa.remote_id.clone().filter(|_| is_up);
        let present = present.map(|identity| Present {
            ike: sa.id,
            identity,
            address: sa.remote.ip(),
        });
        self.presence.note(owner(sa), sa.id, present);
    }

    /// Who is up with a peer under an identity, at another address than this one.
    pub(in crate::ike) fn present_elsewhere(
        &self,
        peer: PeerId,
        identity: &Identity,
        address: IpAddr,
    ) -> Option<&Present> {
        let mut same = self.presence.of_owner(owner_of(Some(peer), Some(identity)));
        same.find(|other| other.identity == *identity && other.address != address)
    }

    /// Hands a pair of SAs to the data plane.
    pub(in crate::ike) fn install(
        &mut self,
        now: Time,
        up: ChildUp,
        line: ChildSaId,
        origin: Origin,
    ) {
        self.wake(up.peer, up.child);
        let (sa, at_once) = (up.sa, self.handover.installed(now, &up, line, origin));
        self.events.push_back(Event::ChildUp(Box::new(up)));
        if at_once {
            self.events.push_back(Event::Outbound(sa));
        }
    }

    /// The peer has shown that it can receive on a pair.
    pub(in crate::ike) fn proved(&mut self, sa: ChildSaId) {
        let event = self.handover.proved(sa);
        self.events.extend(event);
    }

    /// Whether the peer has yet to prove that it has a pair.
    pub(in crate::ike) fn is_unproved(&self, sa: ChildSaId) -> bool {
        self.handover.is_unproved(sa)
    }

    /// Of two pairs that were made at once, this is the one that must go.
    pub(in crate::ike) fn redundant(&mut self, sa: ChildSaId) {
        self.handover.redundant(sa);
    }

    /// Of two IKE SAs that were begun at once, this is the one that goes.
    pub(super) fn yields(&mut self, ike: IkeSaId) {
        self.handover.yields(ike);
    }

    /// Whether another pair than `sa` carries the traffic of a line.
    pub(in crate::ike) fn has_successor(&self, sa: ChildSaId, line: ChildSaId) -> bool {
        self.handover.has_successor(sa, line)
    }

    /// A pair that another replaces sends no more, and receives until it is uninstalled.
    pub(in crate::ike) fn stop_sending(&mut self, sa: ChildSaId) {
        let events = self.handover.closing(sa);
        self.events.extend(events);
    }

    /// Takes a pair of SAs from the data plane, once another takes its traffic, if there is one.
    pub(in crate::ike) fn uninstall(
        &mut self,
        now: Time,
        sa: ChildSaId,
        spi_in: u32,
        reason: DownReason,
    ) {
        let events = self.handover.removed(now, sa, reason);
        if self.handover.owner(sa).is_none() {
            self.spis.remove(&spi_in);
        }
        self.events.extend(events);
    }

    /// Takes a pair of SAs from the data plane at once, with all that its IKE SA had.
    pub(in crate::ike) fn drop_pair(&mut self, sa: ChildSaId, spi_in: u32, reason: DownReason) {
        let events = self.handover.dropped(sa, reason);
        self.spis.remove(&spi_in);
        self.events.extend(events);
    }

    /// Takes away what still receives of an IKE SA that has ended.
    pub(in crate::ike) fn end_lingering(&mut self, ike: IkeSaId) {
        let ended = self.handover.ended(ike);
        self.take_away(ended);
    }

    fn take_away(&mut self, ended: Vec<(u32, Event)>) {
        for (spi, event) in ended {
            self.spis.remove(&spi);
            self.events.push_back(event);
        }
    }

    /// An IKE SA inherits all pairs of another.
    pub(in crate::ike) fn inherited(&mut self, from: IkeSaId, to: IkeSaId) {
        self.handover.inherited(from, to);
    }

    /// The IKE SA that a pair belongs to.
    pub(super) fn owner(&self, sa: ChildSaId) -> Option<IkeSaId> {
        self.handover.owner(sa)
    }

    pub(super) fn hand_over_what_is_due(&mut self, now: Time) {
        let (used, ended) = self.handover.due(now);
        self.events.extend(used);
        self.take_away(ended);
    }

    pub(super) fn next_handover(&self) -> Option<Time> {
        self.handover.next()
    }

    pub(in crate::ike) fn announce(&mut self, peer: PeerId, ike: IkeSaId, info: IkeInfo) {
        self.events
            .push_back(Event::IkeUp(Box::new(IkeUp { peer, ike, info })));
    }

    pub(in crate::ike) fn fail(
        &mut self,
        peer: Option<PeerId>,
        remote: SocketAddr,
        stage: Stage,
        reason: FailureReason,
        detail: String,
    ) {
        self.events.push_back(Event::Failed(Box::new(Failure {
            peer,
            remote,
            stage,
            reason,
            detail,
        })));
    }
}

#[cfg(test)]
impl Watched {
    pub(in crate::ike) fn note(&mut self, payloads: &[Payload<'_>]) {
        self.told
            .extend(payloads.iter().filter_map(|payload| match payload {
                Payload::Notify(notify) if notify.kind.is_error() => Some(notify.kind),
                _ => None,
            }));
    }
}

/// The hash of NAT detection.
// RFC 7296 section 2.23: SHA-1 of the SPIs, the address and the port. It protects nothing, so SHA-1 does no harm.
pub(in crate::ike) fn nat_hash(spi_i: IkeSpi, spi_r: IkeSpi, address: SocketAddr) -> [u8; 20] {
    let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    context.update(&spi_i.0.to_be_bytes());
    context.update(&spi_r.0.to_be_bytes());
    match address.ip() {
        IpAddr::V4(address) => context.update(&address.octets()),
        IpAddr::V6(address) => context.update(&address.octets()),
    }
    context.update(&address.port().to_be_bytes());
    let mut hash = [0; 20];
    for (to, from) in hash.iter_mut().zip(context.finish().as_ref()) {
        *to = *from;
    }
    hash
}
