//! One IKE SA: what it knows, and what becomes of it when a message, a result or a moment comes.
//!
//! The state is one value, without tasks or closures, so that it can be saved. What concerns several IKE SAs is left to
//! the endpoint by way of [`FollowUp`].

mod child;
mod fragments;
mod informational;
mod initiate;
mod mobike;
mod rekey;
mod requests;
mod respond;
mod sync;
mod timers;

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    Identity,
    config::{ChildName, PeerId},
    crypto::{
        IkeSuite,
        ke::PrivateKey,
        keys::{IkeKeys, Nonces},
    },
    endpoint::{HANDOVER, Shared},
    event::{ChildSaId, DownReason, Event, IkeInfo, IkeSaId, OuterAddresses},
    job::{JobId, JobResult},
    message::{ExchangeType, IkeSpi},
    time::Time,
};

use child::ChildJob;
pub(super) use child::{ChildSa, Packet, PendingChild};
pub(super) use initiate::Start;
use rekey::{IkeJob, Lifetime, PendingIke, Standing, Succession};
pub(super) use respond::Accept;

/// Time within which two IKE SAs that both sides have started count as started at once.
const SIMULTANEOUS: Duration = Duration::from_secs(30);

/// Time between two looks at whether an IKE SA that was replaced is still needed.
const STAY: Duration = Duration::from_millis(500);

/// What an IKE SA waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum State {
    /// Our public value, to send it in IKE_SA_INIT.
    Public,
    /// The response to IKE_SA_INIT.
    InitSent,
    /// The shared secret, as initiator.
    Agree,
    /// Public value and shared secret, as responder.
    Respond,
    /// The response to IKE_AUTH.
    AuthSent,
    /// The request of IKE_AUTH.
    AwaitAuth,
    /// Nothing: it is authenticated.
    Up,
    /// The response to our Delete.
    Deleting,
    /// Nothing but repetitions of the request that ended it, whose response may have been lost.
    Lingering,
    /// Nothing ever again.
    Closed,
}

/// What NAT detection found (RFC 7296 section 2.23).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Nat {
    /// Both sides take part in NAT detection.
    pub(super) supported: bool,
    /// There is a NAT in front of us.
    pub(super) local: bool,
    /// There is a NAT in front of the peer.
    pub(super) remote: bool,
}

/// An exchange of ours that waits for its turn: the window is one request (RFC 7296 section 2.3).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Task {
    /// CREATE_CHILD_SA for a configured child.
    Child(ChildName),
    /// CREATE_CHILD_SA for one pair of selectors of a child, for a peer that takes no more at once.
    Pair(ChildName, usize, usize),
    /// CREATE_CHILD_SA for another pair of SAs in the place of one.
    RekeyChild(ChildSaId),
    /// CREATE_CHILD_SA for another IKE SA in the place of this one.
    RekeyIke,
    /// A Delete for children, by our inbound SPIs.
    DeleteChildren(Vec<u32>),
    /// A Delete for this IKE SA; an error goes with it where the peer's proof was wrong.
    DeleteIke {
        /// AUTHENTICATION_FAILED goes with it.
        refused: bool,
    },
    /// A request to see whether the peer lives.
    Liveness,
    /// UPDATE_SA_ADDRESSES: the addresses in use are others than before.
    UpdateAddresses,
    /// A request to see whether the peer receives at its new address.
    CheckPath,
    /// Our further addresses.
    TellAddresses,
    /// AUTH_LIFETIME: the peer should begin a fresh IKE SA.
    AskForFresh,
}

/// A request that has no response yet.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Outstanding {
    message_id: u32,
    /// One datagram, or the fragments of the message.
    datagrams: Vec<Vec<u8>>,
    exchange: Exchange,
    first_sent: Time,
    attempt: u32,
    again_at: Time,
}

/// What a request of ours is about.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Exchange {
    Init,
    Auth(Option<PendingChild>),
    Child(PendingChild),
    RekeyIke(PendingIke),
    /// A Delete for children, by our inbound SPIs.
    DeleteChildren(Vec<u32>),
    DeleteIke,
    Liveness,
    UpdateAddresses(mobike::Probe),
    CheckPath(mobike::Probe),
    TellAddresses,
    AskForFresh,
}

impl Exchange {
    /// The inbound SPI of the child that it is about.
    fn spi(&self) -> Option<u32> {
        match self {
            Self::Auth(Some(pending)) | Self::Child(pending) => Some(pending.spi_in),
            Self::Init
            | Self::Auth(None)
            | Self::RekeyIke(_)
            | Self::DeleteChildren(_)
            | Self::DeleteIke
            | Self::Liveness
            | Self::UpdateAddresses(_)
            | Self::CheckPath(_)
            | Self::TellAddresses
            | Self::AskForFresh => None,
        }
    }

    /// Whether an encrypted response of this kind may be the one to it; for what INFORMATIONAL asks any is taken.
    fn may_be_answered_by(&self, kind: ExchangeType) -> bool {
        match self {
            Self::Init => false,
            Self::Auth(_) => kind == ExchangeType::IKE_AUTH,
            Self::Child(_) | Self::RekeyIke(_) => kind == ExchangeType::CREATE_CHILD_SA,
            Self::DeleteChildren(_)
            | Self::DeleteIke
            | Self::Liveness
            | Self::UpdateAddresses(_)
            | Self::CheckPath(_)
            | Self::TellAddresses
            | Self::AskForFresh => true,
        }
    }
}

/// The last request of the peer and our response to it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Answered {
    /// Enough to recognise it by.
    request: Digest,
    /// One datagram, or the fragments of the message.
    response: Vec<Vec<u8>>,
}

/// SHA-256 of a message.
type Digest = [u8; 32];

fn digest(message: &[u8]) -> Digest {
    let mut bytes = Digest::default();
    let digest = ring::digest::digest(&ring::digest::SHA256, message);
    for (to, from) in bytes.iter_mut().zip(digest.as_ref()) {
        *to = *from;
    }
    bytes
}

/// What the endpoint must see to after an IKE SA has been at work.
pub(super) enum FollowUp {
    /// It is authenticated; the peer says that it knows of no other.
    Authenticated {
        ike: IkeSaId,
        peer: PeerId,
        initial_contact: bool,
    },
    /// It is gone.
    Closed { peer: Option<PeerId>, why: Closed },
    /// A fresh one should take its place.
    Replace(PeerId),
    /// Another has taken its place, with its children.
    Born(Box<IkeSa>),
    /// Of two that were made at once, this one stays.
    Decided(IkeSaId),
    /// Of two that were made at once, the one takes the children of the other, which is the peer's to delete.
    Inherits {
        /// The other.
        from: IkeSaId,
        /// The one that stays.
        heir: IkeSaId,
    },
    /// Of two that were made at once, the peer has deleted its own: the children go back to where they were.
    Returns {
        /// The one that the peer has deleted.
        from: IkeSaId,
        /// The one that both were to replace, and that ours still is.
        to: IkeSaId,
    },
    /// Of two that were started at once, this one goes: the other lives.
    Yields(IkeSaId),
    /// Another claims its identity: does its peer still live?
    Doubt(IkeSaId),
}

/// How an IKE SA ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closed {
    /// It never came up.
    Failed,
    /// It was up and the peer wants it no more.
    Lost,
    /// It was up and the peer does not answer any more.
    Dead,
    /// We wanted it so.
    Wanted,
}

/// One IKE SA. There may be tens of thousands: what is rare is boxed, and what only the first exchanges need does not
/// outlive them.
#[derive(Serialize, Deserialize)]
pub(super) struct IkeSa {
    pub(super) id: IkeSaId,
    pub(super) peer: Option<PeerId>,
    pub(super) initiator: bool,
    pub(super) spi_i: IkeSpi,
    pub(super) spi_r: IkeSpi,
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) state: State,
    pub(super) nat: Nat,
    pub(super) established: Option<Time>,
    /// When the exchanges that bring it up, or take it down, were begun.
    begun: Time,
    suite: Option<IkeSuite>,
    keys: Option<IkeKeys>,
    private: Option<PrivateKey>,
    public: Vec<u8>,
    /// The responder takes IKE_AUTH without a child (RFC 6023).
    peer_takes_childless: bool,
    cookie: Vec<u8>,
    /// Times that IKE_SA_INIT was begun again at the responder's wish.
    detours: u32,
    nonce_i: Vec<u8>,
    nonce_r: Vec<u8>,
    /// The lower of both nonces, once it is up, if somebody has started it: an heir has none.
    lowest_nonce: Vec<u8>,
    pub(super) init_request: Vec<u8>,
    pub(super) init_response: Vec<u8>,
    local_id: Option<Identity>,
    pub(super) remote_id: Option<Identity>,
    next_request: u32,
    expected_request: u32,
    outstanding: Option<Box<Outstanding>>,
    answered: Option<Answered>,
    /// Our address and the peer's of the request that is being answered: there the response goes.
    asked_from: mobike::Path,
    fragments: fragments::Fragments,
    sync: sync::Sync,
    mobike: mobike::Mobike,
    tasks: VecDeque<Task>,
    job: Option<JobId>,
    /// A key exchange for a child that we ask for, and one for a child that the peer asks for: both may be under way.
    asking: Option<Box<child::Waiting>>,
    answering: Option<Box<child::Waiting>>,
    /// Packets that have asked for children, as selectors of our side and of the peer's.
    packets: BTreeMap<ChildName, Packet>,
    children: Vec<ChildSa>,
    /// When children that are missing are asked for again, and not before.
    children_at: Option<Time>,
    /// When a child came up last.
    children_since: Option<Time>,
    /// Children refused since one came up last.
    child_failures: u32,
    /// The peer is at work on something else, and what we ask must wait.
    busy: Option<Box<rekey::Busy>>,
    /// The pair that our answer to the peer's last request has made: whether the peer has that is not known before its next.
    made_by_last_answer: Option<ChildSaId>,
    heard: Time,
    sent: Time,
    /// One that was started at once with this one, and goes if this one is heard of again.
    younger: Option<Box<IkeSaId>>,
    /// When it is replaced and when it ends, once it is authenticated.
    life: Option<Lifetime>,
    /// Until when the proofs of identity count, if they do not count for ever. Rekeying changes nothing about it.
    proof: Option<Box<Time>>,
    succession: Succession,
}

impl IkeSa {
    /// Whether it counts against the limits of half-open IKE SAs.
    pub(super) fn is_half_open(&self) -> bool {
        !self.initiator
            && match self.state {
                State::Respond | State::AwaitAuth => true,
                // One that was refused costs as much as one that waits.
                State::Lingering => self.peer.is_none(),
                _ => false,
            }
    }

    /// Whether it is at its end, so that another may be begun.
    pub(super) fn is_ending(&self) -> bool {
        matches!(
            self.state,
            State::Deleting | State::Lingering | State::Closed
        )
    }

    /// Whether it still asks for children, or has got one just now, so that those that it replaces are needed.
    pub(super) fn is_taking_over(&self, now: Time) -> bool {
        self.state == State::Up
            && (self
                .children_since
                .is_some_and(|since| now - since < HANDOVER)
                || self.asking.is_some()
                || self
                    .tasks
                    .iter()
                    .any(|task| matches!(task, Task::Child(_) | Task::Pair(..)))
                || matches!(
                    self.outstanding.as_deref(),
                    Some(Outstanding {
                        exchange: Exchange::Child(_),
                        ..
                    })
                ))
    }

    /// It was saved and is restored: what has no response yet is sent again at once, and the peer has all its time to answer.
    pub(super) fn go_on(&mut self, now: Time) {
        if let Some(outstanding) = &mut self.outstanding {
            outstanding.first_sent = now;
            outstanding.again_at = now;
        }
    }

    /// SPIs of ours that are taken for what is not made yet: of IKE SAs and of ESP.
    pub(super) fn pending_spis(&self) -> (Vec<IkeSpi>, Vec<u32>) {
        let (mut ike, mut esp) = (Vec::new(), Vec::new());
        if let Some(outstanding) = &self.outstanding {
            esp.extend(outstanding.exchange.spi());
            if let Exchange::RekeyIke(pending) = &outstanding.exchange {
                ike.push(pending.spi);
            }
        }
        for waiting in self.asking.iter().chain(&self.answering) {
            esp.extend(waiting.what.spi());
            if let ChildJob::Ike(job) = &waiting.what {
                ike.push(job.spi());
            }
        }
        (ike, esp)
    }

    /// Our own SPI.
    pub(super) fn our_spi(&self) -> IkeSpi {
        if self.initiator {
            self.spi_i
        } else {
            self.spi_r
        }
    }

    /// Whether there is a pair for a configured child that nothing takes the place of.
    pub(super) fn has_child(&self, child: ChildName) -> bool {
        self.children
            .iter()
            .any(|sa| sa.child == child && sa.standing == Standing::InForce)
    }

    /// Whether it is, or is about to be, the one for a configured child.
    pub(super) fn is_busy_with(&self, child: ChildName) -> bool {
        self.has_child(child)
            || self.tasks.iter().any(
                |task| matches!(task, Task::Child(name) | Task::Pair(name, ..) if *name == child),
            )
            || matches!(self.outstanding.as_deref(), Some(Outstanding { exchange: Exchange::Child(pending) | Exchange::Auth(Some(pending)), .. }) if pending.child == child)
            || self
                .asking
                .iter()
                .chain(&self.answering)
                .any(|waiting| waiting.what.child() == Some(child))
    }

    /// What `status` shows, once authenticated.
    pub(super) fn info(&self) -> Option<IkeInfo> {
        Some(IkeInfo {
            spi_i: self.spi_i,
            spi_r: self.spi_r,
            initiator: self.initiator,
            suite: self.suite?,
            local: self.local,
            remote: self.remote,
            local_id: self.local_id.clone()?,
            remote_id: self.remote_id.clone()?,
            nat_local: self.nat.local,
            nat_remote: self.nat.remote,
            mobike: self.mobike.agreed,
            leads: self.mobike.leads(),
            ways_to_peer: self.ways_to_peer(),
            since: self.established?,
            next_request: self.next_request,
            expected_request: self.expected_request,
        })
    }

    /// The lower of both nonces, which decides between two IKE SAs that were started by both sides at once.
    // RFC 7296 section 2.8.1 decides so between two rekeyings; two first exchanges are no different.
    pub(super) fn lowest_nonce(&self) -> &[u8] {
        &self.lowest_nonce
    }

    /// It is up: what only the exchanges that have brought it up needed is worth no memory.
    fn forget_first_exchanges(&mut self) {
        let (one, other) = (
            std::mem::take(&mut self.nonce_i),
            std::mem::take(&mut self.nonce_r),
        );
        self.lowest_nonce = one.min(other);
        self.private = None;
        self.public = Vec::new();
        self.cookie = Vec::new();
        self.init_request = Vec::new();
        self.init_response = Vec::new();
        if let Some(keys) = &mut self.keys {
            keys.forget_proofs();
        }
    }

    /// Takes the result of a job.
    pub(super) fn handle_job(&mut self, shared: &mut Shared, now: Time, result: JobResult) {
        if self.job != Some(result.id) {
            return self.child_computed(shared, now, result);
        }
        self.job = None;
        match self.state {
            State::Public => self.public_computed(shared, now, result),
            State::Agree => self.agreed_as_initiator(shared, now, result),
            State::Respond => self.agreed_as_responder(shared, now, result),
            State::InitSent
            | State::AuthSent
            | State::AwaitAuth
            | State::Up
            | State::Deleting
            | State::Lingering
            | State::Closed => {}
        }
    }

    /// Ends it without a word to the peer.
    pub(super) fn close(&mut self, shared: &mut Shared, reason: DownReason, why: Closed) {
        if matches!(self.state, State::Closed | State::Lingering) {
            return;
        }
        let was_up = self.established.is_some();
        self.drop_children(shared, reason);
        self.abandon_children(shared);
        self.state = State::Closed;
        if let Some(outstanding) = self.outstanding.take() {
            self.abandon(shared, &outstanding.exchange);
        }
        self.tasks.clear();
        if let (Some(peer), true) = (self.peer, was_up) {
            shared.events.push_back(Event::IkeDown {
                peer,
                ike: self.id,
                reason,
            });
        }
        shared.follow_ups.push_back(FollowUp::Closed {
            peer: self.peer,
            why,
        });
    }

    /// Ends it with a Delete, so that the peer knows. Its children end at once.
    pub(super) fn delete(&mut self, shared: &mut Shared, now: Time, reason: DownReason) {
        match self.state {
            State::Up => {
                self.drop_children(shared, reason);
                self.abandon_children(shared);
                if let Some(peer) = self.peer {
                    shared.events.push_back(Event::IkeDown {
                        peer,
                        ike: self.id,
                        reason,
                    });
                }
                self.established = None;
                self.begun = now;
                self.state = State::Deleting;
                self.tasks.clear();
                self.tasks.push_back(Task::DeleteIke { refused: false });
                self.next_task(shared, now);
            }
            State::Deleting | State::Lingering | State::Closed => {}
            // The peer may have it up already: it is deleted as soon as the response shows how far the peer is.
            State::AuthSent => {
                self.begun = now;
                self.state = State::Deleting;
                self.tasks.clear();
                self.tasks.push_back(Task::DeleteIke { refused: false });
            }
            State::Public | State::InitSent | State::Agree | State::Respond | State::AwaitAuth => {
                self.close(shared, reason, Closed::Wanted)
            }
        }
    }

    /// Ends it after a response that the peer may not get: while the peer repeats its request, it is answered.
    pub(super) fn close_with_response(
        &mut self,
        shared: &mut Shared,
        now: Time,
        reason: DownReason,
        why: Closed,
    ) {
        self.close(shared, reason, why);
        if self.answered.is_some() && self.state == State::Closed {
            self.state = State::Lingering;
            self.established = None;
            self.begun = now;
        }
    }

    /// Gives up the children whose key exchange is not done.
    fn abandon_children(&mut self, shared: &mut Shared) {
        for waiting in [self.asking.take(), self.answering.take()]
            .into_iter()
            .flatten()
        {
            match &waiting.what {
                ChildJob::Ike(IkeJob::Public(pending) | IkeJob::Agree(pending, _)) => {
                    self.give_up_heir(shared, pending);
                }
                ChildJob::Ike(IkeJob::Answer { spi, .. }) => shared.release_ike_spi(*spi),
                ChildJob::Public(_) | ChildJob::Agree(..) | ChildJob::Answer(_) => {
                    shared.release_pending(waiting.what.spi());
                }
            }
        }
    }

    /// A request of ours will have no answer any more.
    fn abandon(&self, shared: &mut Shared, exchange: &Exchange) {
        shared.release_pending(exchange.spi());
        if let Exchange::RekeyIke(pending) = exchange {
            self.give_up_heir(shared, pending);
        }
    }

    /// Sends the response to a repeated IKE_SA_INIT once more.
    pub(super) fn repeat_init_response(&mut self, shared: &mut Shared, now: Time) {
        let bytes = self.init_response.clone();
        self.transmit(shared, now, bytes);
    }

    /// Another has taken its place: it is deleted after a while, so that packets under way still find their SA.
    pub(super) fn retire(&mut self, at: Time) {
        let (at, why) = match self.succession {
            Succession::Retires { at: planned, why } => (planned.min(at), why),
            Succession::InForce
            | Succession::Undecided(_)
            | Succession::BeingReplaced
            | Succession::LeftToPeer => (at, DownReason::Replaced),
        };
        self.succession = Succession::Retires { at, why };
    }

    /// Of two that were started at once this is the one to stay, if the peer still knows it.
    pub(super) fn stays_if_alive(&mut self, shared: &mut Shared, now: Time, younger: IkeSaId) {
        self.younger = Some(Box::new(younger));
        self.ask_if_alive(shared, now);
    }

    /// Whether another has taken its place.
    pub(super) fn is_retiring(&self) -> bool {
        matches!(self.succession, Succession::Retires { .. })
    }

    /// When its time to go comes, and why.
    fn retirement(&self) -> Option<(Time, DownReason)> {
        match self.succession {
            Succession::Retires { at, why } if self.state == State::Up => Some((at, why)),
            _ => None,
        }
    }

    /// Whether its time to go has come.
    pub(super) fn retires(&self, now: Time) -> bool {
        self.retirement().is_some_and(|(at, _)| at <= now)
    }

    /// Lets it stay a little longer.
    pub(super) fn stay(&mut self, now: Time) {
        if self.retires(now)
            && let Succession::Retires { at, .. } = &mut self.succession
        {
            *at = now + STAY;
        }
    }

    /// Whether it came up so recently that the peer may have started it without knowing of another.
    pub(super) fn is_as_young(&self, now: Time) -> bool {
        // One that has inherited another was not started by anybody.
        !self.lowest_nonce.is_empty()
            && self
                .established
                .is_some_and(|since| now - since < SIMULTANEOUS)
    }

    /// Whether one that we begin now could be taken for one that was begun at the same time as this one.
    fn may_be_one_of_two(&self, shared: &Shared, now: Time) -> bool {
        !self.initiator && self.is_as_young(now) && self.can_call_peer(shared)
    }

    fn nonces(&self) -> Nonces<'_> {
        Nonces {
            initiator: &self.nonce_i,
            responder: &self.nonce_r,
        }
    }

    fn outer(&self, shared: &Shared) -> OuterAddresses {
        self.held().unwrap_or_else(|| OuterAddresses {
            local: self.local,
            remote: self.remote,
            encapsulated: self.encapsulates(shared),
        })
    }

    /// Whether ESP goes in UDP: what detection found, or what the configuration forces on a peer that can.
    pub(in crate::ike::sa) fn encapsulates(&self, shared: &Shared) -> bool {
        use super::config::NatPolicy;
        match shared.nat_policy(self.peer) {
            NatPolicy::Forbid => false,
            NatPolicy::Force => self.nat.supported,
            NatPolicy::Auto => self.nat.supported && (self.nat.local || self.nat.remote),
        }
    }
}
