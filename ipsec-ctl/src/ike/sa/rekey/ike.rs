//! Rekeying of the IKE SA itself, in both roles (RFC 7296 sections 1.3.2, 2.8, 2.18 and 2.25.2).
//!
//! The IKE SA that takes the place of another, its *heir*, inherits all children as soon as this side has it. If both
//! sides have asked at once, the heir of the peer's request waits with exchanges of its own until it is clear which stays.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{
    Succession,
    collision::{Decision, Ours, Theirs, decide_ike},
    lowest,
};
use crate::ike::{
    crypto::{IkeSuite, ke::PrivateKey, keys::Nonces},
    endpoint::Shared,
    event::{DownReason, Event, FailureReason, IkeSaId, IkeUp, Stage},
    exchange::{ChildResponse, Notifies},
    job::JobResult,
    message::{
        ExchangeType, IkeSpi, Payload,
        payload::{KeMethod, KeyExchange, Nonce, NotifyType, SecurityAssociation},
    },
    negotiate::proposals,
    sa::{
        Closed, Exchange, FollowUp, IkeSa, SIMULTANEOUS, State, Task,
        child::{ChildJob, Waiting},
        initiate::NONCE_BYTES,
    },
    time::Time,
};

/// Time that a peer has to delete an IKE SA that it has replaced, or one that has turned out to be one too many.
const PEER_DELETES: Duration = Duration::from_secs(60);
/// Pause before a peer that could not rekey for now is asked again.
const AGAIN: Duration = Duration::from_secs(2);

/// An IKE SA that we have asked for in the place of this one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::ike) struct PendingIke {
    pub(in crate::ike::sa) spi: IkeSpi,
    nonce: Vec<u8>,
    private: PrivateKey,
    /// Groups that the responder has asked for instead.
    detours: u32,
    /// What the peer has made in the place of this one at the same time.
    rival: Option<Rival>,
}

/// The heir that the peer has asked for while we do the same.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Rival {
    /// The heir, once it is there.
    ike: Option<IkeSaId>,
    /// The lower of its two nonces.
    lowest: Vec<u8>,
}

/// A key exchange for an heir.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::ike::sa) enum IkeJob {
    /// We ask, and need our public value.
    Public(PendingIke),
    /// We asked, and need the secret.
    Agree(PendingIke, Agreed),
    /// We answer, and need both.
    Answer {
        /// The request, to answer and to recognise it again.
        request: Vec<u8>,
        agreed: Agreed,
        spi: IkeSpi,
        nonce_r: Vec<u8>,
        number: u8,
    },
}

impl IkeJob {
    /// Our SPI of the heir.
    pub(in crate::ike::sa) fn spi(&self) -> IkeSpi {
        match self {
            Self::Public(pending) | Self::Agree(pending, _) => pending.spi,
            Self::Answer { spi, .. } => *spi,
        }
    }
}

/// What the peer has said about the heir.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::ike::sa) struct Agreed {
    suite: IkeSuite,
    spi: IkeSpi,
    nonce: Vec<u8>,
}

/// What an heir is made of.
struct Birth<'a> {
    initiator: bool,
    suite: IkeSuite,
    spi_i: IkeSpi,
    spi_r: IkeSpi,
    nonces: Nonces<'a>,
}

impl IkeSa {
    /// Begins to replace this IKE SA, as a task.
    pub(in crate::ike::sa) fn rekey_ike(&mut self, shared: &mut Shared) {
        let Some(suite) = self
            .suite
            .filter(|_| self.succession == Succession::InForce)
        else {
            return;
        };
        let pending = PendingIke {
            spi: shared.allocate_ike_spi(),
            nonce: shared.random_bytes(NONCE_BYTES),
            private: PrivateKey::generate(suite.group, &mut *shared.random),
            detours: 0,
            rival: None,
        };
        self.begin_ike(shared, pending);
    }

    fn begin_ike(&mut self, shared: &mut Shared, pending: PendingIke) {
        let job = self.queue_job(shared, pending.private.clone(), None, true);
        let what = ChildJob::Ike(IkeJob::Public(pending));
        self.asking = Some(Box::new(Waiting { job, what }));
    }

    fn send_ike(&mut self, shared: &mut Shared, now: Time, pending: PendingIke, public: &[u8]) {
        let Some(peer) = self.peer_config(shared) else {
            return shared.release_ike_spi(pending.spi);
        };
        let spi = pending.spi.0.to_be_bytes();
        let nonce = pending.nonce.clone();
        let Ok(nonce) = Nonce::new(&nonce) else {
            return;
        };
        let payloads = [
            Payload::SecurityAssociation(proposals::ike_rekey_offer(&peer.proposals, &spi)),
            Payload::Nonce(nonce),
            Payload::KeyExchange(KeyExchange {
                method: KeMethod(pending.private.group().id()),
                public,
            }),
        ];
        let kind = ExchangeType::CREATE_CHILD_SA;
        self.request(shared, now, kind, &payloads, Exchange::RekeyIke(pending));
    }

    /// Our request under way for an heir.
    fn asked_for_heir(&mut self) -> Option<&mut PendingIke> {
        let waiting = self.asking.as_mut().map(|waiting| &mut waiting.what);
        if let Some(ChildJob::Ike(IkeJob::Public(pending) | IkeJob::Agree(pending, _))) = waiting {
            return Some(pending);
        }
        match self.outstanding.as_mut().map(|sent| &mut sent.exchange) {
            Some(Exchange::RekeyIke(pending)) => Some(pending),
            _ => None,
        }
    }

    /// Where we are with this IKE SA, when the peer asks for something.
    fn ike_position(&mut self) -> Ours {
        let busy = match (&self.outstanding, &self.asking) {
            (Some(sent), _) => {
                matches!(
                    sent.exchange,
                    Exchange::Child(_) | Exchange::DeleteChildren(_)
                )
            }
            (None, Some(waiting)) => !matches!(waiting.what, ChildJob::Ike(_)),
            (None, None) => false,
        };
        match (self.state, self.succession) {
            (State::Up, Succession::Retires { .. } | Succession::Undecided(_)) => Ours::Rekeyed,
            (
                State::Up,
                Succession::InForce | Succession::BeingReplaced | Succession::LeftToPeer,
            ) => match self.asked_for_heir().map(|pending| pending.rival.is_some()) {
                Some(true) => Ours::Contested {
                    ours_is_lowest: false,
                },
                Some(false) => Ours::Asked,
                None if busy => Ours::Busy,
                None => Ours::InForce,
            },
            _ => Ours::Closing,
        }
    }

    /// Whether a child can be made or rekeyed in this IKE SA.
    pub(in crate::ike::sa) fn takes_children(&mut self, shared: &mut Shared) -> bool {
        self.withdraw_unsent_heir(shared);
        decide_ike(self.ike_position(), Theirs::WantsChild) == Decision::Answer
    }

    /// Takes back a request for an heir that was not sent yet: what the peer wants comes first. The wish for it stays.
    fn withdraw_unsent_heir(&mut self, shared: &mut Shared) {
        let unsent =
            |waiting: &mut Box<Waiting>| matches!(waiting.what, ChildJob::Ike(IkeJob::Public(_)));
        if let Some(Waiting {
            what: ChildJob::Ike(job),
            ..
        }) = self.asking.take_if(unsent).as_deref()
        {
            shared.release_ike_spi(job.spi());
            self.tasks.push_back(Task::RekeyIke);
        }
    }

    /// The peer asks for an heir.
    pub(in crate::ike::sa) fn ike_rekey_request(
        &mut self,
        shared: &mut Shared,
        now: Time,
        bytes: &[u8],
        (sa, nonce, ke): (&SecurityAssociation<'_>, &Nonce<'_>, &KeyExchange<'_>),
    ) {
        let kind = ExchangeType::CREATE_CHILD_SA;
        self.withdraw_unsent_heir(shared);
        let decision = decide_ike(self.ike_position(), Theirs::Rekeys);
        if !matches!(decision, Decision::Answer | Decision::AnswerAndCompare) {
            let notify = NotifyType::TEMPORARY_FAILURE;
            return self.respond_notify(shared, now, kind, bytes, notify, &[]);
        }
        let choice = self
            .peer_config(shared)
            .and_then(|peer| proposals::choose_ike_rekey(&peer.proposals, sa, Some(ke.method.0)));
        let Some(choice) = choice else {
            let detail = format!("the peer offers {} to rekey", proposals::describe(sa));
            self.fail(
                shared,
                Stage::Init,
                FailureReason::WeRefusedProposals,
                detail,
            );
            let notify = NotifyType::NO_PROPOSAL_CHOSEN;
            return self.respond_notify(shared, now, kind, bytes, notify, &[]);
        };
        if choice.suite.group.id() != ke.method.0 {
            let wanted = choice.suite.group.id().to_be_bytes();
            let notify = NotifyType::INVALID_KE_PAYLOAD;
            return self.respond_notify(shared, now, kind, bytes, notify, &wanted);
        }
        let nonce_r = shared.random_bytes(NONCE_BYTES);
        if let Some(pending) = self.asked_for_heir() {
            pending.rival = Some(Rival {
                ike: None,
                lowest: lowest(nonce.bytes(), &nonce_r),
            });
        }
        let private = PrivateKey::generate(choice.suite.group, &mut *shared.random);
        let job = self.queue_job(shared, private, Some(ke.public.to_vec()), true);
        let what = ChildJob::Ike(IkeJob::Answer {
            request: bytes.to_vec(),
            agreed: Agreed {
                suite: choice.suite,
                spi: choice.spi,
                nonce: nonce.bytes().to_vec(),
            },
            spi: shared.allocate_ike_spi(),
            nonce_r,
            number: choice.number,
        });
        self.answering = Some(Box::new(Waiting { job, what }));
    }

    /// A key exchange for an heir is done.
    pub(in crate::ike::sa) fn ike_computed(
        &mut self,
        shared: &mut Shared,
        now: Time,
        job: IkeJob,
        result: JobResult,
    ) {
        match (job, result.shared) {
            (IkeJob::Public(pending), _) => self.send_ike(shared, now, pending, &result.public),
            (IkeJob::Agree(pending, agreed), Some(Ok(secret))) => {
                self.heir_agreed(shared, now, &pending, &agreed, &secret);
            }
            (IkeJob::Agree(pending, _), _) => {
                let detail = "its public value is not valid".to_owned();
                self.bad_heir(shared, now, &pending, detail);
            }
            (
                IkeJob::Answer {
                    request,
                    agreed,
                    spi,
                    nonce_r,
                    number,
                },
                Some(Ok(secret)),
            ) if self.state == State::Up => {
                let birth = Birth {
                    initiator: false,
                    suite: agreed.suite,
                    spi_i: agreed.spi,
                    spi_r: spi,
                    nonces: Nonces {
                        initiator: &agreed.nonce,
                        responder: &nonce_r,
                    },
                };
                self.answer_with_heir(
                    shared,
                    now,
                    &birth,
                    &secret,
                    (&request, number, &result.public),
                );
            }
            (IkeJob::Answer { request, spi, .. }, secret) => {
                shared.release_ike_spi(spi);
                if let Some(pending) = self.asked_for_heir() {
                    pending.rival = None;
                }
                let notify = if matches!(secret, Some(Ok(_))) {
                    NotifyType::TEMPORARY_FAILURE
                } else {
                    NotifyType::INVALID_SYNTAX
                };
                let kind = ExchangeType::CREATE_CHILD_SA;
                self.respond_notify(shared, now, kind, &request, notify, &[]);
            }
        }
    }

    /// Answers the peer's request for an heir, which inherits at once.
    fn answer_with_heir(
        &mut self,
        shared: &mut Shared,
        now: Time,
        birth: &Birth<'_>,
        secret: &[u8],
        (request, number, public): (&[u8], u8, &[u8]),
    ) {
        let Some(mut heir) = self.heir(shared, now, birth, secret) else {
            return;
        };
        let spi = birth.spi_r.0.to_be_bytes();
        let Ok(nonce) = Nonce::new(birth.nonces.responder) else {
            return;
        };
        let payloads = [
            Payload::SecurityAssociation(proposals::ike_rekey_answer(&birth.suite, number, &spi)),
            Payload::Nonce(nonce),
            Payload::KeyExchange(KeyExchange {
                method: KeMethod(birth.suite.group.id()),
                public,
            }),
        ];
        let kind = ExchangeType::CREATE_CHILD_SA;
        self.respond(shared, now, kind, request, &payloads);
        heir.inherit(shared, self);
        let id = self.id;
        match self.asked_for_heir() {
            Some(pending) => {
                heir.succession = Succession::Undecided(id);
                if let Some(rival) = &mut pending.rival {
                    rival.ike = Some(heir.id);
                }
            }
            None => self.leave_to_peer(now),
        }
        heir.announce_heir(shared);
        shared.follow_ups.push_back(FollowUp::Born(Box::new(heir)));
    }

    /// The peer is to delete this IKE SA. If it never does, we do.
    pub(in crate::ike) fn leave_to_peer(&mut self, now: Time) {
        self.succession = Succession::Retires {
            at: now + PEER_DELETES,
            why: DownReason::Rekeyed,
        };
    }

    /// The peer's response to our request for an heir.
    pub(in crate::ike::sa) fn heir_response(
        &mut self,
        shared: &mut Shared,
        now: Time,
        pending: PendingIke,
        response: &ChildResponse<'_>,
    ) {
        self.note_busy(now, response);
        let (sa, nonce, ke) = match response {
            ChildResponse::Refused(notifies) => {
                return self.heir_refused(shared, now, pending, notifies);
            }
            ChildResponse::Agreed { .. } => {
                let detail = "it answers with a child".to_owned();
                return self.bad_heir(shared, now, &pending, detail);
            }
            ChildResponse::Ike { sa, nonce, ke } => (sa, nonce, ke),
        };
        let group = pending.private.group();
        let choice = self
            .peer_config(shared)
            .and_then(|peer| proposals::choose_ike_rekey(&peer.proposals, sa, Some(ke.method.0)))
            .filter(|choice| {
                sa.proposals.len() == 1 && choice.suite.group == group && ke.method.0 == group.id()
            });
        let Some(choice) = choice else {
            let detail = format!(
                "it chose {}, which we did not offer",
                proposals::describe(sa)
            );
            return self.bad_heir(shared, now, &pending, detail);
        };
        let public = ke.public.to_vec();
        let job = self.queue_job(shared, pending.private.clone(), Some(public), false);
        let agreed = Agreed {
            suite: choice.suite,
            spi: choice.spi,
            nonce: nonce.bytes().to_vec(),
        };
        let what = ChildJob::Ike(IkeJob::Agree(pending, agreed));
        self.asking = Some(Box::new(Waiting { job, what }));
    }

    /// The peer believes in an heir that we cannot have: a fresh IKE SA makes an end of it.
    fn bad_heir(&mut self, shared: &mut Shared, now: Time, pending: &PendingIke, detail: String) {
        shared.release_ike_spi(pending.spi);
        self.fail(shared, Stage::Init, FailureReason::BadMessage, detail);
        self.cannot_rekey_ike(shared, now, pending, Theirs::Refuses);
    }

    /// Both sides have the heir that we asked for.
    fn heir_agreed(
        &mut self,
        shared: &mut Shared,
        now: Time,
        pending: &PendingIke,
        agreed: &Agreed,
        secret: &[u8],
    ) {
        if self.state != State::Up {
            return shared.release_ike_spi(pending.spi);
        }
        let nonces = Nonces {
            initiator: &pending.nonce,
            responder: &agreed.nonce,
        };
        let birth = Birth {
            initiator: true,
            suite: agreed.suite,
            spi_i: pending.spi,
            spi_r: agreed.spi,
            nonces,
        };
        let Some(mut heir) = self.heir(shared, now, &birth, secret) else {
            return;
        };
        let ours = match &pending.rival {
            Some(rival) => Ours::Contested {
                ours_is_lowest: lowest(nonces.initiator, nonces.responder) < rival.lowest,
            },
            None => Ours::Asked,
        };
        let rival = pending.rival.as_ref().and_then(|rival| rival.ike);
        if decide_ike(ours, Theirs::Agrees) == Decision::Use {
            heir.inherit(shared, self);
            heir.announce_heir(shared);
            let id = heir.id;
            shared.follow_ups.push_back(FollowUp::Born(Box::new(heir)));
            if let Some(from) = rival {
                shared
                    .follow_ups
                    .push_back(FollowUp::Inherits { from, heir: id });
            }
            self.delete(shared, now, DownReason::Rekeyed);
        } else {
            // RFC 7296 section 2.8.1: its creator deletes it, by its own hand.
            heir.state = State::Deleting;
            heir.established = None;
            heir.tasks.push_back(Task::DeleteIke { refused: false });
            heir.next_task(shared, now);
            shared.follow_ups.push_back(FollowUp::Born(Box::new(heir)));
            self.yield_to(shared, now, pending);
        }
    }

    /// What the peer has made takes the place of this IKE SA.
    fn yield_to(&mut self, shared: &mut Shared, now: Time, pending: &PendingIke) {
        // Its answer may still be computed; then it finds nothing of ours any more, and inherits.
        match pending.rival.as_ref().and_then(|rival| rival.ike) {
            Some(heir) => {
                self.leave_to_peer(now);
                shared.follow_ups.push_back(FollowUp::Decided(heir));
            }
            None if self.answering.is_some() => {}
            None => self.leave_to_peer(now),
        }
    }

    /// Our request for an heir will have no answer any more: what the peer has made, if anything, stays.
    pub(in crate::ike::sa) fn give_up_heir(&self, shared: &mut Shared, pending: &PendingIke) {
        shared.release_ike_spi(pending.spi);
        if let Some(heir) = pending.rival.as_ref().and_then(|rival| rival.ike) {
            shared.follow_ups.push_back(FollowUp::Decided(heir));
        }
    }

    /// The peer does not agree to an heir.
    fn heir_refused(
        &mut self,
        shared: &mut Shared,
        now: Time,
        mut pending: PendingIke,
        notifies: &Notifies<'_>,
    ) {
        let error = notifies.error();
        if error == Some(NotifyType::INVALID_KE_PAYLOAD)
            && pending.detours == 0
            && let Some(group) = self.wanted_group(shared, notifies)
        {
            pending.detours += 1;
            pending.private = PrivateKey::generate(group, &mut *shared.random);
            return self.begin_ike(shared, pending);
        }
        shared.release_ike_spi(pending.spi);
        let theirs = if self.is_only_busy() {
            Theirs::IsBusy
        } else {
            Theirs::Refuses
        };
        self.cannot_rekey_ike(shared, now, &pending, theirs);
    }

    fn cannot_rekey_ike(
        &mut self,
        shared: &mut Shared,
        now: Time,
        pending: &PendingIke,
        theirs: Theirs,
    ) {
        let ours = match pending.rival {
            Some(_) => Ours::Contested {
                ours_is_lowest: false,
            },
            None => Ours::Asked,
        };
        match decide_ike(ours, theirs) {
            Decision::AskLater => {
                let at = now + AGAIN + shared.jitter(AGAIN);
                if let Some(life) = &mut self.life {
                    life.soft = Some(at);
                }
            }
            Decision::Reauthenticate if self.busy.is_some() => {
                self.leave_busy_peer(shared, now);
            }
            Decision::Reauthenticate if self.may_be_one_of_two(shared, now) => {
                if let Some(life) = &mut self.life {
                    life.soft = Some(now + SIMULTANEOUS);
                }
            }
            Decision::Reauthenticate => self.ask_for_replacement(shared, now),
            Decision::Yield => self.yield_to(shared, now, pending),
            Decision::Answer
            | Decision::AnswerAndCompare
            | Decision::SayBusy
            | Decision::SayNone
            | Decision::End
            | Decision::EndUnnamed
            | Decision::Ignore
            | Decision::Use
            | Decision::GiveUp
            | Decision::StartOver => {}
        }
    }

    /// The IKE SA that takes the place of this one, without children yet. What both sides have told each other in
    /// IKE_SA_INIT and IKE_AUTH holds for it, too.
    fn heir(
        &self,
        shared: &mut Shared,
        now: Time,
        birth: &Birth<'_>,
        secret: &[u8],
    ) -> Option<Self> {
        let (keys, old) = self.keys.as_ref().zip(self.suite)?;
        let mut keys = keys.rekeyed(
            old.prf,
            &birth.suite,
            secret,
            birth.nonces,
            birth.spi_i,
            birth.spi_r,
        );
        keys.forget_proofs();
        let mut heir = Self {
            peer: self.peer,
            initiator: birth.initiator,
            spi_i: birth.spi_i,
            spi_r: birth.spi_r,
            state: State::Up,
            nat: self.nat,
            established: Some(now),
            suite: Some(birth.suite),
            keys: Some(keys),
            local_id: self.local_id.clone(),
            remote_id: self.remote_id.clone(),
            fragments: self.fragments.inherited(),
            sync: self.sync.inherited(),
            mobike: self.mobike.inherited(),
            proof: self.proof.clone(),
            succession: match self.succession {
                Succession::LeftToPeer => Succession::LeftToPeer,
                Succession::InForce
                | Succession::Undecided(_)
                | Succession::BeingReplaced
                | Succession::Retires { .. } => Succession::InForce,
            },
            ..Self::blank(shared.next_ike(), now, self.local, self.remote)
        };
        heir.set_lifetime(shared, now);
        Some(heir)
    }

    fn announce_heir(&self, shared: &mut Shared) {
        if let Some((peer, info)) = self.peer.zip(self.info()) {
            let up = IkeUp {
                peer,
                ike: self.id,
                info,
            };
            shared.events.push_back(Event::IkeRekeyed(Box::new(up)));
        }
    }

    /// Takes the children of another IKE SA, and what was still to be done about them.
    // RFC 7296 section 2.8: the new IKE SA inherits all children of the old one.
    pub(in crate::ike) fn inherit(&mut self, shared: &mut Shared, from: &mut Self) {
        self.children.append(&mut from.children);
        self.packets.append(&mut from.packets);
        self.children_at = from.children_at.take();
        self.children_since = from.children_since;
        self.child_failures = from.child_failures;
        let (stays, moves) =
            std::mem::take(&mut from.tasks)
                .into_iter()
                .partition(|task| match task {
                    Task::DeleteIke { .. }
                    | Task::Liveness
                    | Task::RekeyIke
                    | Task::UpdateAddresses
                    | Task::CheckPath
                    | Task::TellAddresses
                    | Task::AskForFresh => true,
                    Task::Child(_)
                    | Task::Pair(..)
                    | Task::RekeyChild(_)
                    | Task::DeleteChildren(_) => false,
                });
        from.tasks = stays;
        let moves: std::collections::VecDeque<Task> = moves;
        // The peer may have made its half of this one before it has heard of them.
        self.tasks.extend(from.unfinished_moves());
        self.tasks.extend(moves);
        shared.inherited(from.id, self.id);
    }

    /// It is clear that this IKE SA stays.
    pub(in crate::ike) fn decided(&mut self, shared: &mut Shared, now: Time) {
        if matches!(self.succession, Succession::Undecided(_)) {
            self.succession = Succession::InForce;
            self.next_task(shared, now);
        }
    }

    /// What the peer has made in the place of this one is gone again.
    pub(in crate::ike) fn forget_rival_heir(&mut self) {
        if let Some(pending) = self.asked_for_heir() {
            pending.rival = None;
        }
    }

    /// The peer has deleted this IKE SA, which was one too many and has no children any more.
    pub(in crate::ike) fn deleted_as_redundant(&mut self, shared: &mut Shared, now: Time) {
        self.close_with_response(shared, now, DownReason::Rekeyed, Closed::Wanted);
    }
}
