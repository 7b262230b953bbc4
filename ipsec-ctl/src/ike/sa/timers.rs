//! What becomes of an IKE SA when time passes: repetition, giving up, keep-alives, the end of its life.

use std::time::Duration;

use super::{
    ChildSa, Closed, Exchange, IkeSa, State, Task,
    rekey::{Lifetime, Standing, Succession},
};
use crate::ike::{
    config::DpdMode,
    endpoint::Shared,
    event::{ChildSaId, DownReason, FailureReason, Stage},
    time::Time,
};

/// Time in which an IKE SA must come up; what a FortiGate allows, too.
const NEGOTIATION: Duration = Duration::from_secs(30);
/// The NAT keep-alive of RFC 3948 section 2.3.
const KEEP_ALIVE: &[u8] = &[0xff];

impl IkeSa {
    /// Its life begins.
    pub(super) fn set_lifetime(&mut self, shared: &mut Shared, now: Time) {
        if let Some(configured) = self.peer_config(shared).map(|peer| peer.lifetime) {
            let proof = self.proof.as_deref().map(|proof| *proof - now);
            let lifetime = proof.map_or(configured, |proof| proof.min(configured));
            self.life = Some(Lifetime {
                soft: Some(now + shared.soft(lifetime, self.initiator)),
                hard: now + lifetime,
            });
        }
    }

    /// When something is to be done next.
    pub(in crate::ike) fn next_timeout(&self, shared: &Shared) -> Option<Time> {
        let negotiation = (self.established.is_none() && self.state != State::Closed)
            .then(|| self.begun + NEGOTIATION);
        let again = self
            .outstanding
            .as_ref()
            .map(|outstanding| outstanding.again_at);
        let up = self.state == State::Up;
        let replaced = self.is_being_replaced();
        let life = self.life.map(|life| life.due(replaced));
        let children = self.children.iter().map(|child| child.life.due(replaced));
        [
            negotiation,
            again,
            life.filter(|_| up),
            self.retirement().map(|(at, _)| at),
            self.children_at.filter(|_| up),
            self.keep_alive_at(shared),
            self.liveness_at(shared),
        ]
        .into_iter()
        .flatten()
        .chain(children)
        .min()
    }

    fn keep_alive_at(&self, shared: &Shared) -> Option<Time> {
        let interval = self.peer_config(shared)?.keepalive;
        (self.nat.local && self.state == State::Up && !interval.is_zero())
            .then(|| self.sent + interval)
    }

    /// When a peer that is silent is asked whether it lives, though we do not send to it.
    fn liveness_at(&self, shared: &Shared) -> Option<Time> {
        let peer = self.peer_config(shared)?;
        let asks = peer.dpd_mode == DpdMode::Periodic
            && self.state == State::Up
            && self.outstanding.is_none()
            && self.asking.is_none();
        asks.then(|| self.heard + peer.dpd_interval)
    }

    /// Asks the peer whether it lives, unless a request that is under way tells that anyway.
    pub(in crate::ike) fn ask_if_alive(&mut self, shared: &mut Shared, now: Time) {
        if self.state == State::Up && self.outstanding.is_none() {
            self.push_task(shared, now, Task::Liveness);
        }
    }

    pub(in crate::ike) fn handle_timeout(&mut self, shared: &mut Shared, now: Time) {
        if self.established.is_none() && now - self.begun >= NEGOTIATION {
            return self.give_up_negotiation(shared);
        }
        self.repeat(shared, now);
        if self.state != State::Up {
            return;
        }
        if self.life.is_some_and(|life| life.hard <= now) {
            return self.delete(shared, now, DownReason::Expired);
        }
        if let Some((_, why)) = self.retirement().filter(|(at, _)| *at <= now) {
            return self.delete(shared, now, why);
        }
        self.end_expired_children(shared, now);
        if self.state != State::Up {
            return;
        }
        if self.children_at.is_some_and(|at| at <= now) {
            self.ask_for_missing(shared, now);
        }
        if !self.is_being_replaced() {
            if self.life.is_some_and(|life| life.is_soft_over(now)) {
                self.renew(shared, now);
            }
            self.rekey_due_children(shared, now);
        }
        if self.keep_alive_at(shared).is_some_and(|at| at <= now) {
            self.transmit(shared, now, KEEP_ALIVE.to_vec());
        }
        if self.liveness_at(shared).is_some_and(|at| at <= now) {
            self.ask_if_alive(shared, now);
        }
    }

    /// Whether another takes its place in any case, so that nothing in it need be renewed.
    fn is_being_replaced(&self) -> bool {
        match self.succession {
            Succession::InForce | Succession::Undecided(_) | Succession::LeftToPeer => false,
            Succession::BeingReplaced | Succession::Retires { .. } => true,
        }
    }

    /// It nears its end.
    fn renew(&mut self, shared: &mut Shared, now: Time) {
        if self.needs_fresh_proof(shared) {
            self.ask_for_replacement(shared, now);
        } else {
            self.wish_ike_rekeyed(shared, now);
        }
    }

    /// Begins to rekey the IKE SA, unless that is under way.
    pub(in crate::ike) fn wish_ike_rekeyed(&mut self, shared: &mut Shared, now: Time) {
        if self
            .life
            .as_mut()
            .is_some_and(|life| life.soft.take().is_some())
        {
            self.push_task(shared, now, Task::RekeyIke);
        }
    }

    /// Begins to rekey all children.
    pub(in crate::ike) fn wish_all_rekeyed(&mut self, shared: &mut Shared, now: Time) {
        let all: Vec<ChildSaId> = self.children.iter().map(|child| child.id).collect();
        for sa in all {
            self.wish_rekeyed(shared, now, sa);
        }
    }

    fn end_expired_children(&mut self, shared: &mut Shared, now: Time) {
        let over = |child: &ChildSa| child.life.hard <= now;
        let replaced = |child: &ChildSa| match child.standing {
            Standing::InForce => false,
            Standing::Rekeyed | Standing::Redundant | Standing::Closing => true,
        };
        let left = |child: &ChildSa| over(child) && replaced(child);
        let ended = self.end_children(shared, now, DownReason::Rekeyed, left);
        if !ended.is_empty() {
            self.push_task(shared, now, Task::DeleteChildren(ended));
        }
        self.expire_children(shared, now, over);
    }

    fn rekey_due_children(&mut self, shared: &mut Shared, now: Time) {
        let due: Vec<ChildSaId> = self
            .children
            .iter()
            .filter(|child| child.life.is_soft_over(now))
            .map(|child| child.id)
            .collect();
        for sa in due {
            self.wish_rekeyed(shared, now, sa);
        }
    }

    fn give_up_negotiation(&mut self, shared: &mut Shared) {
        match self.state {
            State::Deleting => return self.deleted(shared),
            State::Lingering => {
                self.state = State::Closed;
                return;
            }
            State::InitSent => {
                let detail = "no response to IKE_SA_INIT; is UDP 500 open on the way?".to_owned();
                self.fail(shared, Stage::Init, FailureReason::Timeout, detail);
            }
            State::AuthSent => {
                let detail = format!(
                    "no response to IKE_AUTH; is UDP {} open on the way?",
                    self.remote.port()
                );
                self.fail(shared, Stage::Auth, FailureReason::Timeout, detail);
            }
            // A half-open IKE SA that nobody finishes is what an attacker leaves behind: counted by limits, not logged.
            State::Public
            | State::Agree
            | State::Respond
            | State::AwaitAuth
            | State::Up
            | State::Closed => {}
        }
        self.close(shared, DownReason::Dead, Closed::Failed);
    }

    /// Repeats the request that has no response, or takes the peer for dead.
    // RFC 7296 section 2.4: repeated over at least minutes, with growing intervals.
    fn repeat(&mut self, shared: &mut Shared, now: Time) {
        let Some(outstanding) = &self.outstanding else {
            return;
        };
        if outstanding.again_at > now {
            return;
        }
        let patience = self
            .peer_config(shared)
            .map_or(NEGOTIATION, |peer| peer.dpd_timeout);
        let waited = now - outstanding.first_sent;
        let negotiates = matches!(outstanding.exchange, Exchange::Init | Exchange::Auth(_));
        if !negotiates && waited >= patience {
            if self.state == State::Deleting {
                return self.deleted(shared);
            }
            return self.close(shared, DownReason::Dead, Closed::Dead);
        }
        let datagrams = outstanding.datagrams.clone();
        let attempt = outstanding.attempt + 1;
        let pause = shared.retransmission(attempt);
        if let Some(outstanding) = &mut self.outstanding {
            outstanding.attempt = attempt;
            outstanding.again_at = now + pause;
        }
        self.transmit_all(shared, now, datagrams);
        self.note_silence(shared, attempt);
    }
}
