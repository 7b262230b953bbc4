//! What all IKE SAs share: configuration, randomness, SPIs of ESP, and what there is to do.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ring::digest;

use super::{handover::Handover, peers::Peers};
use crate::ike::{
    config::{ChildName, EndpointConfig, PeerId},
    event::{
        ChildSaId, ChildUp, DownReason, Event, Failure, FailureReason, IkeInfo, IkeSaId, IkeUp,
        Stage, Transmit,
    },
    job::{Job, JobId},
    message::IkeSpi,
    rng::Random,
    sa::FollowUp,
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
    /// There are no keys yet.
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
    spis: BTreeSet<u32>,
    handover: Handover,
    refusals: BTreeMap<Refusal, u64>,
    next_job: u64,
    next_child: u64,
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
            spis: BTreeSet::new(),
            handover: Handover::default(),
            refusals: BTreeMap::new(),
            next_job: 1,
            next_child: 1,
        }
    }

    pub(in crate::ike) fn random_bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.random.fill(&mut bytes);
        bytes
    }

    /// A fraction of `span` between 0 and a quarter, so that a thousand tunnels do not act as one.
    pub(super) fn jitter(&mut self, span: Duration) -> Duration {
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
        let percent = if first { 85 } else { 93 };
        lifetime * percent / 100 + self.jitter(lifetime / 5)
    }

    pub(in crate::ike) fn next_job(&mut self) -> JobId {
        let id = JobId(self.next_job);
        self.next_job += 1;
        id
    }

    pub(in crate::ike) fn next_child(&mut self) -> ChildSaId {
        let id = ChildSaId(self.next_child);
        self.next_child += 1;
        id
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

    /// Hands a pair of SAs to the data plane.
    pub(in crate::ike) fn install(&mut self, now: Time, up: ChildUp, ours: bool) {
        let (sa, at_once) = (up.sa, self.handover.installed(now, &up, ours));
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

    /// Takes a pair of SAs from the data plane, once another takes its traffic, if there is one.
    pub(in crate::ike) fn uninstall(
        &mut self,
        peer: PeerId,
        child: ChildName,
        sa: ChildSaId,
        reason: DownReason,
    ) {
        let events = self.handover.removed(sa);
        self.events.extend(events);
        self.events.push_back(Event::ChildDown {
            peer,
            child,
            sa,
            reason,
        });
    }

    /// The IKE SA that a pair belongs to.
    pub(super) fn owner(&self, sa: ChildSaId) -> Option<IkeSaId> {
        self.handover.owner(sa)
    }

    pub(super) fn hand_over_what_is_due(&mut self, now: Time) {
        let events = self.handover.due(now);
        self.events.extend(events);
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
