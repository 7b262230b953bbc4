//! Children that are agreed on: their keys, their life in the data plane, their end (RFC 7296 sections 1.4.1 and 2.17).

use ipsec_common::Spi;

use super::{Agreed, ChildJob, ChildSa};
use crate::ike::{
    config::ChildName,
    crypto::{
        ChildSuite,
        keys::{ChildKeys, Nonces},
    },
    endpoint::Shared,
    event::{ChildSaId, ChildUp, DownReason, FailureReason, Stage},
    job::JobResult,
    message::{
        ExchangeType, Payload,
        payload::{Delete, NotifyType},
    },
    sa::{Exchange, FollowUp, IkeSa, State, Task},
    time::Time,
};

impl IkeSa {
    /// A key exchange for a child is done.
    pub(in crate::ike::sa) fn child_computed(
        &mut self,
        shared: &mut Shared,
        now: Time,
        result: JobResult,
    ) {
        let waiting = [&mut self.asking, &mut self.answering]
            .into_iter()
            .find_map(|slot| slot.take_if(|waiting| waiting.job == result.id));
        match (waiting.map(|waiting| waiting.what), result.shared) {
            (Some(ChildJob::Public(pending)), _) => {
                self.send_child(shared, now, pending, &result.public);
            }
            (Some(ChildJob::Agree(pending, agreed)), Some(Ok(secret))) => {
                let nonces = Nonces {
                    initiator: &pending.nonce,
                    responder: &agreed.nonce,
                };
                let keys = self.child_keys(&agreed.suite, Some(&secret), Some(nonces));
                self.install(shared, now, pending.child, &agreed, keys, true);
                self.ask_for_pairs_left(&pending, &agreed);
            }
            (
                Some(ChildJob::Answer {
                    request,
                    agreed,
                    child,
                    number,
                    nonce_i,
                }),
                Some(Ok(secret)),
            ) => {
                let nonces = Nonces {
                    initiator: &nonce_i,
                    responder: &agreed.nonce,
                };
                let keys = self.child_keys(&agreed.suite, Some(&secret), Some(nonces));
                self.install(shared, now, child, &agreed, keys, false);
                self.answer_child(shared, now, &request, &agreed, number, &result.public);
            }
            (Some(ChildJob::Agree(pending, _)), _) => {
                let detail = "its public value is not valid".to_owned();
                self.fail(shared, Stage::Child, FailureReason::BadMessage, detail);
                self.tasks
                    .push_back(Task::DeleteChildren(vec![pending.spi_in]));
                shared.release_pending(Some(pending.spi_in));
                self.child_failed(shared, now);
            }
            (
                Some(ChildJob::Answer {
                    request, agreed, ..
                }),
                _,
            ) => {
                let kind = ExchangeType::CREATE_CHILD_SA;
                shared.release_pending(Some(agreed.spi_in));
                self.respond_notify(shared, now, kind, &request, NotifyType::INVALID_SYNTAX, &[]);
            }
            (None, _) => {}
        }
        self.next_task(shared, now);
    }

    /// Keys of a child, from nonces of its own or from those of IKE_SA_INIT.
    pub(in crate::ike::sa) fn child_keys(
        &self,
        suite: &ChildSuite,
        secret: Option<&[u8]>,
        nonces: Option<Nonces<'_>>,
    ) -> Option<ChildKeys> {
        let (keys, ike) = self.keys.as_ref().zip(self.suite)?;
        let nonces = nonces.unwrap_or_else(|| self.nonces());
        Some(keys.child(ike.prf, secret, nonces, suite))
    }

    /// Hands a pair of SAs to the data plane. `ours` tells whether the exchange was ours.
    pub(in crate::ike::sa) fn install(
        &mut self,
        shared: &mut Shared,
        now: Time,
        child: ChildName,
        agreed: &Agreed,
        keys: Option<ChildKeys>,
        ours: bool,
    ) {
        let (Some(keys), Some(peer)) = (keys, self.peer) else {
            return;
        };
        let (key_out, key_in) = if ours {
            (keys.initiator, keys.responder)
        } else {
            (keys.responder, keys.initiator)
        };
        let lifetime = shared.child_lifetime(peer, child);
        let sa = ChildSa {
            id: shared.next_child(),
            child,
            spi_in: agreed.spi_in,
            spi_out: agreed.spi_out,
            inbound: 0,
            outbound: 0,
            replace_at: now + shared.soft(lifetime, self.initiator),
            expire_at: now + lifetime,
        };
        let up = ChildUp {
            peer,
            child,
            sa: sa.id,
            ike: self.id,
            spi_in: Spi(agreed.spi_in),
            spi_out: Spi(agreed.spi_out),
            suite: agreed.suite,
            key_in,
            key_out,
            local: agreed.local.clone(),
            remote: agreed.remote.clone(),
            outer: self.outer(shared),
        };
        shared.install(now, up, ours);
        self.children.push(sa);
        self.children_since = Some(now);
        self.child_failures = 0;
    }

    /// Ends all children at once.
    pub(in crate::ike::sa) fn drop_children(&mut self, shared: &mut Shared, reason: DownReason) {
        for child in std::mem::take(&mut self.children) {
            self.tell_child_down(shared, &child, reason);
        }
    }

    /// Ends the children that `which` picks; returns our SPIs of them.
    pub(in crate::ike::sa) fn end_children(
        &mut self,
        shared: &mut Shared,
        reason: DownReason,
        which: impl Fn(&ChildSa) -> bool,
    ) -> Vec<u32> {
        let (gone, kept) = std::mem::take(&mut self.children)
            .into_iter()
            .partition(|child| which(child));
        self.children = kept;
        let gone: Vec<ChildSa> = gone;
        for child in &gone {
            self.tell_child_down(shared, child, reason);
        }
        gone.iter().map(|child| child.spi_in).collect()
    }

    pub(in crate::ike::sa) fn tell_child_down(
        &self,
        shared: &mut Shared,
        child: &ChildSa,
        reason: DownReason,
    ) {
        shared.release_pending(Some(child.spi_in));
        if let Some(peer) = self.peer {
            shared.uninstall(peer, child.child, child.id, reason);
        }
    }

    pub(in crate::ike::sa) fn delete_children(
        &mut self,
        shared: &mut Shared,
        now: Time,
        spis: &[u32],
    ) {
        let spis = spis.iter().copied().map(Spi).collect();
        let payloads = [Payload::Delete(Delete::Esp(spis))];
        let kind = ExchangeType::INFORMATIONAL;
        self.request(shared, now, kind, &payloads, Exchange::DeleteChildren);
    }

    /// What the data plane has carried tells whether the peer lives.
    pub(in crate::ike) fn traffic(
        &mut self,
        shared: &mut Shared,
        now: Time,
        sa: ChildSaId,
        inbound: u64,
        outbound: u64,
    ) {
        let Some(child) = self.children.iter_mut().find(|child| child.id == sa) else {
            return;
        };
        let sends = outbound > child.outbound;
        if inbound > child.inbound {
            self.heard = now;
            shared.proved(sa);
        }
        child.inbound = inbound;
        child.outbound = outbound;
        let interval = self
            .peer_config(shared)
            .map(|peer| peer.dpd_interval)
            .unwrap_or_default();
        // RFC 7296 section 2.4: liveness is of interest only while there is traffic to lose.
        if sends
            && self.state == State::Up
            && !interval.is_zero()
            && now - self.heard >= interval
            && self.outstanding.is_none()
        {
            self.push_task(shared, now, Task::Liveness);
        }
    }

    /// The data plane has reached a limit by volume.
    pub(in crate::ike) fn volume_reached(
        &mut self,
        shared: &mut Shared,
        now: Time,
        sa: ChildSaId,
        hard: bool,
    ) {
        if hard {
            let spis = self.end_children(shared, DownReason::Expired, |child| child.id == sa);
            self.push_task(shared, now, Task::DeleteChildren(spis));
            self.child_lost(shared, now);
        }
        if let (Some(peer), false) = (self.peer, self.replacing) {
            self.replacing = true;
            shared.follow_ups.push_back(FollowUp::Replace(peer));
        }
    }
}
