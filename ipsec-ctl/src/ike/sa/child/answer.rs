//! Children that the peer asks for: judged, refused, or agreed on (RFC 7296 sections 1.3.1 and 2.9).

use ipsec_common::TrafficSelector;

use super::{Agreed, ChildAnswer, ChildJob, Grant, Sides, Waiting, transport_mode};
use crate::ike::{
    config::{ChildConfig, Mode},
    crypto::ke::PrivateKey,
    endpoint::{Origin, Shared},
    event::{FailureReason, Stage},
    exchange::{ChildOffer, ChildRequest, Notifies},
    job::JobResult,
    message::{
        ExchangeType, Payload,
        payload::{KeMethod, KeyExchange, Nonce, Notify, NotifyType, TrafficSelectors},
    },
    negotiate::{
        proposals::{self, ChildChoice},
        selectors,
    },
    sa::{IkeSa, State, initiate::NONCE_BYTES, rekey::Replaced},
    time::Time,
};

/// Children in one IKE SA.
const MOST_CHILDREN: usize = 256;

/// An offer of the peer that we can accept.
struct Judged {
    child: ChildConfig,
    choice: ChildChoice,
    local: Vec<TrafficSelector>,
    remote: Vec<TrafficSelector>,
    narrowed: bool,
}

impl IkeSa {
    /// Whether the peer gets no more children. What replaces another is there beside it for a while.
    // An honest peer has one child for each pair of selectors at the most.
    fn has_most_children(&self, notifies: &Notifies<'_>) -> bool {
        let most = if notifies.has(NotifyType::REKEY_SA) {
            2 * MOST_CHILDREN
        } else {
            MOST_CHILDREN
        };
        self.children.len() >= most
    }

    /// Looks for a configured child that fits an offer; a refusal is told to the operator at once.
    fn judge_child(
        &self,
        shared: &mut Shared,
        offer: &ChildOffer<'_>,
        first: bool,
        replaces: Option<Replaced>,
    ) -> Result<Judged, NotifyType> {
        let children = self.children_asked_for(shared, replaces);
        let children = children.ok_or(NotifyType::NO_ADDITIONAL_SAS)?;
        let remote: Vec<_> = offer.ts_i.known().collect();
        let local: Vec<_> = offer.ts_r.known().collect();
        let Some(narrowed) = selectors::choose(&children, &local, &remote) else {
            return Err(self.refuse_selectors(shared, &children, (&local, &remote)));
        };
        let child = narrowed.child.clone();
        let Some(choice) = proposals::choose_child(&child.proposals, &offer.sa, first) else {
            return Err(self.refuse_proposals(shared, &child, offer, first));
        };
        self.judge_mode(shared, &child, offer)?;
        let whole = selectors::all_covered(&narrowed.local, &local)
            && selectors::all_covered(&narrowed.remote, &remote);
        Ok(Judged {
            choice,
            narrowed: !whole,
            local: narrowed.local,
            remote: narrowed.remote,
            child,
        })
    }

    /// The configured children that the peer may mean; none at all if the tunnel was removed.
    fn children_asked_for(
        &self,
        shared: &Shared,
        replaces: Option<Replaced>,
    ) -> Option<Vec<ChildConfig>> {
        let mut children = self.peer_config(shared)?.children.clone();
        // What replaces a pair is of the same child.
        if let Some(old) = self
            .children
            .iter()
            .find(|old| Some(old.id) == replaces.map(|(sa, _)| sa))
        {
            children.retain(|child| child.id == old.child);
        }
        Some(children)
    }

    /// No configured child has selectors in common with those that the peer wants.
    fn refuse_selectors(
        &self,
        shared: &mut Shared,
        children: &[ChildConfig],
        (local, remote): Sides<'_>,
    ) -> NotifyType {
        let policy: Vec<String> = children
            .iter()
            .map(|child| {
                format!(
                    "{}: {} <-> {}",
                    child.name,
                    selectors::describe(&child.local),
                    selectors::describe(&child.remote)
                )
            })
            .collect();
        let detail = format!(
            "the peer wants {} <-> {}, here are {}",
            selectors::describe(local),
            selectors::describe(remote),
            policy.join("; ")
        );
        let reason = FailureReason::WeRefusedSelectors;
        self.fail(shared, Stage::Child, reason, detail);
        NotifyType::TS_UNACCEPTABLE
    }

    /// The peer offers no algorithms that a child may have.
    fn refuse_proposals(
        &self,
        shared: &mut Shared,
        child: &ChildConfig,
        offer: &ChildOffer<'_>,
        first: bool,
    ) -> NotifyType {
        let detail = format!(
            "child {}: the peer offers {}; {}",
            child.name,
            proposals::describe(&offer.sa),
            proposals::nearest_child(&child.proposals, &offer.sa, first)
        );
        let reason = FailureReason::WeRefusedProposals;
        self.fail(shared, Stage::Child, reason, detail);
        NotifyType::NO_PROPOSAL_CHOSEN
    }

    /// Whether a child that is in transport mode here is asked for in transport mode, and can have it.
    fn judge_mode(
        &self,
        shared: &mut Shared,
        child: &ChildConfig,
        offer: &ChildOffer<'_>,
    ) -> Result<(), NotifyType> {
        let problem = match child.mode {
            // RFC 7296 section 1.3.1: transport mode is a wish, which an answer without the notify declines.
            Mode::Tunnel => return Ok(()),
            Mode::Transport if !offer.transport => "the peer asks for tunnel mode",
            Mode::Transport if self.encapsulates(shared) => "there is a NAT in between",
            Mode::Transport => return Ok(()),
        };
        let detail = format!("child {} is in transport mode, and {problem}", child.name);
        let reason = FailureReason::WeRefusedProposals;
        self.fail(shared, Stage::Child, reason, detail);
        Err(NotifyType::NO_PROPOSAL_CHOSEN)
    }

    /// Answers the child that came with IKE_AUTH; its keys come from the nonces of IKE_SA_INIT.
    pub(in crate::ike::sa) fn accept_first_child(
        &mut self,
        shared: &mut Shared,
        now: Time,
        offer: &ChildOffer<'_>,
    ) -> ChildAnswer {
        let judged = match self.judge_child(shared, offer, true, None) {
            Ok(judged) => judged,
            Err(notify) => return ChildAnswer::Refused(notify),
        };
        let agreed = judged.agreed(shared, Vec::new());
        let keys = self.child_keys(&agreed.suite, None, None);
        let how = (Origin::Answered, None);
        self.install(shared, now, judged.child.id, &agreed, keys, how);
        ChildAnswer::Agreed {
            agreed,
            number: judged.choice.number,
            narrowed: judged.narrowed,
        }
    }

    /// The peer asks for a child, or for an IKE SA that takes the place of this one.
    pub(in crate::ike::sa) fn child_request(
        &mut self,
        shared: &mut Shared,
        now: Time,
        bytes: &[u8],
        request: &ChildRequest<'_>,
    ) {
        let kind = ExchangeType::CREATE_CHILD_SA;
        #[cfg(test)]
        if shared.watched.is_minimal {
            let notify = NotifyType::NO_ADDITIONAL_SAS;
            return self.respond_notify(shared, now, kind, bytes, notify, &[]);
        }
        let (offer, nonce, ke, notifies) = match request {
            ChildRequest::RekeyIke { sa, nonce, ke } => {
                return self.ike_rekey_request(shared, now, bytes, (sa, nonce, ke));
            }
            ChildRequest::Child {
                offer,
                nonce,
                ke,
                notifies,
            } => (offer, nonce, ke, notifies),
        };
        let (judged, replaces) = match self.judge_request(shared, offer, notifies) {
            Ok(judged) => judged,
            Err(notify) => {
                return self.respond(shared, now, kind, bytes, &[Payload::Notify(notify)]);
            }
        };
        let group = judged.choice.suite.group;
        if let Some(group) = group
            && ke.as_ref().is_none_or(|ke| ke.method.0 != group.id())
        {
            let data = group.id().to_be_bytes();
            let notify = NotifyType::INVALID_KE_PAYLOAD;
            return self.respond_notify(shared, now, kind, bytes, notify, &data);
        }
        let nonce_r = shared.random_bytes(NONCE_BYTES);
        let grant = Grant {
            request: bytes.to_vec(),
            agreed: judged.agreed(shared, nonce_r),
            child: judged.child.id,
            number: judged.choice.number,
            nonce_i: nonce.bytes().to_vec(),
            replaces,
        };
        if let Some(replaced) = replaces {
            self.note_rival(replaced, grant.nonces());
        }
        let (Some(group), Some(ke)) = (group, ke) else {
            self.grant(shared, now, &grant, None, &[]);
            return self.next_task(shared, now);
        };
        let private = PrivateKey::generate(group, &mut *shared.random);
        let job = self.queue_job(shared, private, Some(ke.public.to_vec()), true);
        let what = ChildJob::Answer(grant);
        self.answering = Some(Box::new(Waiting { job, what }));
    }

    /// What a request asks for, as far as we agree to it, and what it replaces; else the notify that refuses it.
    fn judge_request<'a>(
        &mut self,
        shared: &mut Shared,
        offer: &ChildOffer<'_>,
        notifies: &Notifies<'a>,
    ) -> Result<(Judged, Option<Replaced>), Notify<'a>> {
        let refused = |kind| Notify::new(kind, &[]);
        if !self.takes_children(shared) {
            return Err(refused(NotifyType::TEMPORARY_FAILURE));
        }
        if self.has_most_children(notifies) {
            return Err(refused(NotifyType::NO_ADDITIONAL_SAS));
        }
        let replaces = self.rekeyed_by_peer(shared, notifies)?;
        let judged = self.judge_child(shared, offer, false, replaces);
        Ok((judged.map_err(refused)?, replaces))
    }

    /// The key exchange of a child that the peer asks for is done, or the peer's public value is not valid.
    pub(super) fn grant_computed(
        &mut self,
        shared: &mut Shared,
        now: Time,
        grant: &Grant,
        result: &JobResult,
    ) {
        let is_wanted = self.state == State::Up && self.still_replaceable(grant.replaces);
        let notify = match &result.shared {
            Some(Ok(secret)) if is_wanted => {
                return self.grant(shared, now, grant, Some(secret), &result.public);
            }
            // What it was to replace is at its end by now.
            Some(Ok(_)) => NotifyType::TEMPORARY_FAILURE,
            Some(Err(_)) | None => NotifyType::INVALID_SYNTAX,
        };
        let kind = ExchangeType::CREATE_CHILD_SA;
        shared.release_pending(Some(grant.agreed.spi_in));
        self.forget_rival(now, grant.replaces);
        self.respond_notify(shared, now, kind, &grant.request, notify, &[]);
    }

    /// Installs a child that the peer gets, whose key exchange has yielded a secret if it has one, and answers.
    fn grant(
        &mut self,
        shared: &mut Shared,
        now: Time,
        grant: &Grant,
        secret: Option<&[u8]>,
        public: &[u8],
    ) {
        let (agreed, replaces) = (&grant.agreed, grant.replaces);
        let keys = self.child_keys(&agreed.suite, secret, Some(grant.nonces()));
        let how = (Origin::Answered, replaces);
        let new = self.install(shared, now, grant.child, agreed, keys, how);
        self.replaced_by_peer(now, replaces, new);
        self.answer_child(shared, now, grant, public);
        self.yield_to_twin(shared, new);
    }

    fn answer_child(&mut self, shared: &mut Shared, now: Time, grant: &Grant, public: &[u8]) {
        let agreed = &grant.agreed;
        let spi = agreed.spi_in.to_be_bytes();
        let Ok(nonce) = Nonce::new(&agreed.nonce) else {
            return;
        };
        let chosen = proposals::child_answer(&agreed.suite, grant.number, &spi);
        let mut payloads = vec![Payload::SecurityAssociation(chosen), Payload::Nonce(nonce)];
        if let Some(group) = agreed.suite.group {
            payloads.push(Payload::KeyExchange(KeyExchange {
                method: KeMethod(group.id()),
                public,
            }));
        }
        payloads.extend([
            Payload::TsInitiator(TrafficSelectors::new(&agreed.remote)),
            Payload::TsResponder(TrafficSelectors::new(&agreed.local)),
        ]);
        payloads.extend(transport_mode(agreed.mode));
        let kind = ExchangeType::CREATE_CHILD_SA;
        self.respond(shared, now, kind, &grant.request, &payloads);
    }
}

impl Judged {
    fn agreed(&self, shared: &mut Shared, nonce: Vec<u8>) -> Agreed {
        Agreed {
            spi_in: shared.allocate_spi(),
            spi_out: self.choice.spi.0,
            suite: self.choice.suite,
            local: self.local.clone(),
            remote: self.remote.clone(),
            mode: self.child.mode,
            nonce,
        }
    }
}
