//! Children that we ask for, and what we make of the answer (RFC 7296 sections 1.3.1 and 2.9).

use super::{Agreed, ChildJob, Part, PendingChild, Waiting, transport_mode};
use crate::ike::{
    config::{ChildName, Mode, Role},
    crypto::{Group, ke::PrivateKey, keys::Nonces},
    endpoint::Shared,
    event::{FailureReason, Stage},
    exchange::{ChildOffer, ChildResponse, Notifies},
    job::JobResult,
    message::{
        ExchangeType, Payload,
        payload::{KeMethod, KeyExchange, Nonce, Notify, NotifyType, Protocol},
    },
    negotiate::{
        proposals::{self},
        selectors,
    },
    sa::{Exchange, IkeSa, State, Task, rekey::Replaces},
    time::Time,
};

impl IkeSa {
    /// Asks for a configured child, or for one pair of its selectors.
    pub(in crate::ike::sa) fn ask_for_child(
        &mut self,
        shared: &mut Shared,
        now: Time,
        child: ChildName,
        pair: Option<(usize, usize)>,
    ) {
        let Some(config) = self
            .peer_config(shared)
            .and_then(|peer| peer.children.iter().find(|config| config.id == child))
            .cloned()
        else {
            return;
        };
        let sides = match pair {
            None => Some((config.local.clone(), config.remote.clone())),
            Some((local, remote)) => config
                .local
                .get(local)
                .zip(config.remote.get(remote))
                .map(|(local, remote)| (vec![*local], vec![*remote])),
        };
        let Some((local, remote)) = sides else { return };
        let packet = self.packets.remove(&child);
        let mut pending = PendingChild::of(shared, &config, local, remote).asked_for_by(packet);
        if pair.is_some() {
            pending.part = Part::Some;
        }
        let group = pending.first_group();
        self.begin_child(shared, now, pending, group);
    }

    pub(in crate::ike::sa) fn begin_child(
        &mut self,
        shared: &mut Shared,
        now: Time,
        mut pending: PendingChild,
        group: Option<Group>,
    ) {
        match group {
            None => self.send_child(shared, now, pending, &[]),
            Some(group) => {
                let private = PrivateKey::generate(group, &mut *shared.random);
                pending.private = Some(private.clone());
                let job = self.queue_job(shared, private, None, true);
                let what = ChildJob::Public(pending);
                self.asking = Some(Box::new(Waiting { job, what }));
            }
        }
    }

    pub(in crate::ike::sa) fn send_child(
        &mut self,
        shared: &mut Shared,
        now: Time,
        pending: PendingChild,
        public: &[u8],
    ) {
        let spi = pending.spi_in.to_be_bytes();
        let nonce = pending.nonce.clone();
        let Ok(nonce) = Nonce::new(&nonce) else {
            return;
        };
        let rekeyed = pending.replaces.as_ref().map(Replaces::spi_bytes);
        let mut payloads = Vec::new();
        // RFC 7296 section 1.3.3: it names the SA by the SPI that the sender of this message receives on.
        if let Some(spi) = &rekeyed {
            payloads.push(Payload::Notify(Notify {
                protocol: Protocol::ESP,
                spi,
                ..Notify::new(NotifyType::REKEY_SA, &[])
            }));
        }
        payloads.extend(transport_mode(pending.mode));
        payloads.extend([
            Payload::SecurityAssociation(proposals::child_offer(&pending.proposals, &spi, false)),
            Payload::Nonce(nonce),
        ]);
        if let Some(private) = &pending.private {
            payloads.push(Payload::KeyExchange(KeyExchange {
                method: KeMethod(private.group().id()),
                public,
            }));
        }
        payloads.extend([
            Payload::TsInitiator(pending.ts_local()),
            Payload::TsResponder(pending.ts_remote()),
        ]);
        let exchange = Exchange::Child(pending.clone());
        self.request(
            shared,
            now,
            ExchangeType::CREATE_CHILD_SA,
            &payloads,
            exchange,
        );
    }

    /// The responder's answer to the first child.
    pub(in crate::ike::sa) fn first_child_agreed(
        &mut self,
        shared: &mut Shared,
        now: Time,
        pending: PendingChild,
        offer: &ChildOffer<'_>,
    ) {
        match self.check_answer(shared, &pending, offer, true) {
            Ok(agreed) => {
                let keys = self.child_keys(&agreed.suite, None, None);
                self.child_agreed(shared, now, &pending, &agreed, keys);
            }
            Err(detail) => self.bad_answer(shared, now, &pending, detail),
        }
    }

    pub(in crate::ike::sa) fn child_response(
        &mut self,
        shared: &mut Shared,
        now: Time,
        pending: PendingChild,
        response: &ChildResponse<'_>,
    ) {
        self.note_busy(now, response);
        let (offer, nonce, ke) = match response {
            ChildResponse::Refused(notifies) => {
                return self.child_refused(shared, now, pending, notifies);
            }
            ChildResponse::Ike { .. } => {
                let detail = "it answers with an IKE SA".to_owned();
                return self.bad_answer(shared, now, &pending, detail);
            }
            ChildResponse::Agreed { offer, nonce, ke } => (offer, nonce, ke),
        };
        let mut agreed = match self.check_answer(shared, &pending, offer, false) {
            Ok(agreed) => agreed,
            Err(detail) => return self.bad_answer(shared, now, &pending, detail),
        };
        agreed.nonce = nonce.bytes().to_vec();
        match (agreed.suite.group, pending.private.clone(), ke) {
            (None, _, _) => {
                let nonces = Nonces {
                    initiator: &pending.nonce,
                    responder: &agreed.nonce,
                };
                let keys = self.child_keys(&agreed.suite, None, Some(nonces));
                self.child_agreed(shared, now, &pending, &agreed, keys);
            }
            (Some(group), Some(private), Some(ke))
                if group == private.group() && ke.method.0 == group.id() =>
            {
                let public = ke.public.to_vec();
                let job = self.queue_job(shared, private, Some(public), false);
                let what = ChildJob::Agree(pending, agreed);
                self.asking = Some(Box::new(Waiting { job, what }));
            }
            _ => {
                let detail = "its key exchange is not the one that was asked for".to_owned();
                self.bad_answer(shared, now, &pending, detail);
            }
        }
    }

    /// The key exchange of a child that the peer has agreed to is done, or the peer's public value is not valid.
    pub(super) fn secret_computed(
        &mut self,
        shared: &mut Shared,
        now: Time,
        pending: &PendingChild,
        agreed: &Agreed,
        result: &JobResult,
    ) {
        let Some(Ok(secret)) = &result.shared else {
            let detail = "its public value is not valid".to_owned();
            self.fail(shared, Stage::Child, FailureReason::BadMessage, detail);
            self.tasks
                .push_back(Task::DeleteChildren(vec![pending.spi_in]));
            shared.release_pending(Some(pending.spi_in));
            return self.child_not_had(shared, now, &pending.replaces);
        };
        let nonces = Nonces {
            initiator: &pending.nonce,
            responder: &agreed.nonce,
        };
        let keys = self.child_keys(&agreed.suite, Some(secret), Some(nonces));
        self.child_agreed(shared, now, pending, agreed, keys);
    }

    /// What the responder chose, if it is among what we offered.
    pub(in crate::ike::sa) fn check_answer(
        &self,
        shared: &Shared,
        pending: &PendingChild,
        offer: &ChildOffer<'_>,
        first: bool,
    ) -> Result<Agreed, String> {
        let choice = proposals::choose_child(&pending.proposals, &offer.sa, first)
            .filter(|_| offer.sa.proposals.len() == 1)
            .ok_or_else(|| {
                format!(
                    "it chose {}, which we did not offer",
                    proposals::describe(&offer.sa)
                )
            })?;
        // RFC 7296 section 1.3.1: a responder that leaves the notify out has set up tunnel mode; one that we did not ask
        // for transport mode must not agree to it.
        if offer.transport != (pending.mode == Mode::Transport) {
            return Err(format!(
                "it answers in {} mode",
                if offer.transport {
                    "transport"
                } else {
                    "tunnel"
                }
            ));
        }
        if offer.transport && self.encapsulates(shared) {
            return Err("transport mode does not cross the NAT in between".to_owned());
        }
        let local: Vec<_> = offer.ts_i.known().collect();
        let remote: Vec<_> = offer.ts_r.known().collect();
        // RFC 7296 section 2.9: the responder may narrow and must not widen.
        if local.is_empty()
            || remote.is_empty()
            || !selectors::all_covered(&pending.local, &local)
            || !selectors::all_covered(&pending.remote, &remote)
        {
            return Err(format!(
                "it chose selectors {} <-> {}, which go beyond ours",
                selectors::describe(&local),
                selectors::describe(&remote)
            ));
        }
        Ok(Agreed {
            spi_in: pending.spi_in,
            spi_out: choice.spi.0,
            suite: choice.suite,
            local,
            remote,
            mode: pending.mode,
            nonce: Vec::new(),
        })
    }

    /// The responder has set up a child that we cannot have: it is told to forget it.
    pub(in crate::ike::sa) fn bad_answer(
        &mut self,
        shared: &mut Shared,
        now: Time,
        pending: &PendingChild,
        detail: String,
    ) {
        self.fail(shared, Stage::Child, FailureReason::BadMessage, detail);
        self.push_task(shared, now, Task::DeleteChildren(vec![pending.spi_in]));
        shared.release_pending(Some(pending.spi_in));
        self.child_not_had(shared, now, &pending.replaces);
    }

    /// Some peers take several selectors and answer with one pair of them: the others get children of their own.
    // RFC 7296 section 2.9: what was narrowed away can be asked for in a further exchange.
    pub(in crate::ike::sa) fn ask_for_pairs_left(
        &mut self,
        pending: &PendingChild,
        agreed: &Agreed,
    ) {
        if pending.part == Part::Some {
            return;
        }
        let child = pending.child;
        let left = selectors::pairs_left(
            (&pending.local, &pending.remote),
            (&agreed.local, &agreed.remote),
        );
        self.tasks.extend(
            left.into_iter()
                .map(|(local, remote)| Task::Pair(child, local, remote)),
        );
    }

    /// A child did not come about. One that was to take the place of another leaves that one in force.
    pub(in crate::ike::sa) fn child_not_had(
        &mut self,
        shared: &mut Shared,
        now: Time,
        replaces: &Option<Replaces>,
    ) {
        match replaces {
            Some(replaces) => self.cannot_rekey(shared, now, replaces),
            None => self.child_failed(shared, now),
        }
    }

    /// A child did not come about: after a pause that grows it is tried again, and not before.
    pub(in crate::ike::sa) fn child_failed(&mut self, shared: &mut Shared, now: Time) {
        let pause = shared.pause(self.child_failures);
        self.child_failures = self.child_failures.saturating_add(1);
        self.children_at = Some(now + pause);
    }

    /// A child has ended while its IKE SA lives on; it is brought back if we are to keep the tunnel up.
    pub(in crate::ike::sa) fn child_lost(&mut self, shared: &mut Shared, now: Time) {
        if self.keeps_children_up(shared) && self.children_at.is_none() {
            self.children_at = Some(now + shared.pause(self.child_failures));
        }
    }

    fn keeps_children_up(&self, shared: &Shared) -> bool {
        self.state == State::Up
            && !self.is_retiring()
            && self
                .peer
                .is_some_and(|peer| shared.role(peer) == Some(Role::Initiate) && shared.wants(peer))
    }

    /// Asks for the configured children that are not there.
    pub(in crate::ike) fn ask_for_missing(&mut self, shared: &mut Shared, now: Time) {
        self.children_at = None;
        if !self.keeps_children_up(shared) {
            return;
        }
        let missing: Vec<ChildName> = self
            .peer_config(shared)
            .map(|peer| peer.children.iter().map(|child| child.id).collect())
            .unwrap_or_default();
        for child in missing {
            if !self.is_dormant(shared, child) && !self.is_busy_with(child) {
                self.push_task(shared, now, Task::Child(child));
            }
        }
    }

    /// The peer does not agree to a child, or not to one like this.
    pub(in crate::ike::sa) fn child_refused(
        &mut self,
        shared: &mut Shared,
        now: Time,
        mut pending: PendingChild,
        notifies: &Notifies<'_>,
    ) {
        let error = notifies.error();
        if error == Some(NotifyType::INVALID_KE_PAYLOAD)
            && pending.detours == 0
            && let Some(group) = proposals::wanted_group(notifies, pending.groups())
        {
            pending.detours += 1;
            return self.begin_child(shared, now, pending, Some(group));
        }
        shared.release_pending(Some(pending.spi_in));
        if let Some(replaces) = &pending.replaces
            && self.rekey_refused(shared, now, replaces, error)
        {
            return;
        }
        if error == Some(NotifyType::SINGLE_PAIR_REQUIRED) && pending.part == Part::Whole {
            return self.ask_for_each_pair(&pending);
        }
        // RFC 7296 section 2.25: the peer is at work on the IKE SA, and there is nothing wrong.
        if self.is_only_busy() {
            return self.child_not_had(shared, now, &pending.replaces);
        }
        self.report_refusal(shared, &pending, error);
        if error == Some(NotifyType::TEMPORARY_FAILURE) {
            return self.leave_busy_peer(shared, now);
        }
        self.child_not_had(shared, now, &pending.replaces);
        // RFC 7296 section 1.3: where the peer takes no more, another IKE SA does. One that still carries something stays.
        let is_full = error == Some(NotifyType::NO_ADDITIONAL_SAS);
        let is_of_use = !self.children.is_empty() || self.is_as_young(now);
        if is_full && !is_of_use && self.can_call_peer(shared) {
            self.ask_for_replacement(shared, now);
        }
    }

    /// The peer takes no more selectors than one pair in each child, so each pair gets its own.
    // RFC 7296 section 2.9: this is what SINGLE_PAIR_REQUIRED asks for.
    fn ask_for_each_pair(&mut self, pending: &PendingChild) {
        let pairs = (0..pending.local.len())
            .flat_map(|local| (0..pending.remote.len()).map(move |remote| (local, remote)));
        let child = pending.child;
        self.tasks
            .extend(pairs.map(|(local, remote)| Task::Pair(child, local, remote)));
    }

    /// Tells the operator why the peer refuses a child, and what it was offered.
    fn report_refusal(
        &self,
        shared: &mut Shared,
        pending: &PendingChild,
        error: Option<NotifyType>,
    ) {
        let reason = match error {
            Some(NotifyType::NO_PROPOSAL_CHOSEN) => FailureReason::PeerRefusedProposals,
            Some(NotifyType::TS_UNACCEPTABLE) => FailureReason::PeerRefusedSelectors,
            Some(NotifyType::SINGLE_PAIR_REQUIRED) => FailureReason::SinglePair,
            Some(NotifyType::NO_ADDITIONAL_SAS) => FailureReason::NoAdditionalSas,
            _ => FailureReason::PeerError,
        };
        let offered = proposals::describe(&proposals::child_offer(&pending.proposals, &[], false));
        let detail = format!(
            "{}; we offered {offered} for {} <-> {}",
            error.map_or_else(|| "no reason given".to_owned(), |error| error.to_string()),
            selectors::describe(&pending.local),
            selectors::describe(&pending.remote)
        );
        self.fail(shared, Stage::Child, reason, detail);
    }
}
