//! A fresh IKE SA in the place of one that cannot be renewed, or whose proofs of identity are at their end (RFC 7296 section
//! 2.8.3). Where we cannot call the peer, it is asked to begin one (RFC 4478).

use std::time::Duration;

use super::{Standing, Succession};
use crate::ike::{
    endpoint::Shared,
    exchange::Notifies,
    message::{
        ExchangeType, Payload,
        payload::{Notify, NotifyType},
    },
    sa::{Exchange, FollowUp, IkeSa, State, Task},
    time::Time,
};

/// Time within which a peer that is asked for a fresh IKE SA should have begun it.
const SOON: Duration = Duration::from_secs(60);
/// What a peer asks for is not taken for less, so that it cannot have us authenticate without a pause.
const SHORTEST: Duration = Duration::from_secs(10);

impl IkeSa {
    /// Whether we can begin an IKE SA with the peer.
    pub(in crate::ike::sa) fn can_call_peer(&self, shared: &Shared) -> bool {
        let peer = self.peer_config(shared);
        peer.is_some_and(|peer| !peer.remote.ways().is_empty())
    }

    /// Whether only the peer can begin the IKE SA that is needed in the place of this one.
    pub(in crate::ike::sa) fn is_left_to_peer(&self) -> bool {
        self.succession == Succession::LeftToPeer
    }

    /// A fresh IKE SA is to come up beside this one and take its place.
    pub(in crate::ike::sa) fn ask_for_replacement(&mut self, shared: &mut Shared, now: Time) {
        if let Some(life) = &mut self.life {
            life.soft = None;
        }
        let (Some(peer), Succession::InForce) = (self.peer, self.succession) else {
            return;
        };
        if self.can_call_peer(shared) {
            self.succession = Succession::BeingReplaced;
            shared.follow_ups.push_back(FollowUp::Replace(peer));
        } else {
            self.succession = Succession::LeftToPeer;
            self.push_task(shared, now, Task::AskForFresh);
        }
    }

    /// The attempt to replace it has failed; another may be made.
    pub(in crate::ike) fn not_replaced(&mut self, now: Time, again: Duration) {
        if self.succession == Succession::BeingReplaced {
            self.succession = Succession::InForce;
            if let Some(life) = &mut self.life {
                life.soft = Some(now + again);
            }
            for child in &mut self.children {
                if child.standing == Standing::InForce {
                    child.life.soft = Some(now + again);
                }
            }
        }
    }

    /// Asks the peer for a fresh IKE SA, as a task.
    // RFC 4478 section 3: AUTH_LIFETIME tells when identities must have been proved anew. Who does not know it ignores it.
    pub(in crate::ike::sa) fn ask_for_fresh(&mut self, shared: &mut Shared, now: Time) {
        let in_force = self
            .children
            .iter()
            .filter(|child| child.standing == Standing::InForce);
        let ends = in_force
            .map(|child| child.life.hard)
            .chain(self.life.map(|life| life.hard));
        let left = ends.min().map_or(SOON, |ends| (ends - now).min(SOON));
        let seconds = u32::try_from(left.as_secs()).unwrap_or(0).to_be_bytes();
        let asks = Payload::Notify(Notify::new(NotifyType::AUTH_LIFETIME, &seconds));
        let kind = ExchangeType::INFORMATIONAL;
        self.request(shared, now, kind, &[asks], Exchange::AskForFresh);
    }

    /// Both sides have proved their identities just now.
    pub(in crate::ike::sa) fn begin_proof(&mut self, shared: &Shared, now: Time) {
        let peer = self.peer_config(shared).filter(|peer| peer.reauth);
        self.proof = peer.map(|peer| Box::new(now + peer.lifetime));
    }

    /// Whether identities are to be proved anew when it nears its end.
    // RFC 7296 section 2.8.3: that takes a fresh IKE SA.
    pub(in crate::ike::sa) fn needs_fresh_proof(&self, shared: &Shared) -> bool {
        let wanted = self.peer_config(shared).is_some_and(|peer| peer.reauth);
        let proof = self.proof.as_deref().zip(self.life);
        wanted || proof.is_some_and(|(proof, life)| *proof <= life.hard)
    }

    /// The peer may have told when it wants identities to be proved anew.
    // RFC 4478 section 3: that is on the side that can begin an IKE SA.
    pub(in crate::ike::sa) fn peer_limits_proof(
        &mut self,
        shared: &mut Shared,
        now: Time,
        notifies: &Notifies<'_>,
    ) {
        let told = notifies.find(NotifyType::AUTH_LIFETIME);
        let told = told.and_then(|notify| <[u8; 4]>::try_from(notify.data).ok());
        let Some(seconds) = told.filter(|_| self.state == State::Up && self.can_call_peer(shared))
        else {
            return;
        };
        let left = Duration::from_secs(u32::from_be_bytes(seconds).into()).max(SHORTEST);
        let ends = now + left;
        if self.proof.as_deref().is_none_or(|known| ends < *known) {
            self.proof = Some(Box::new(ends));
        }
        let soft = now + shared.soft(left, true);
        if let Some(life) = self.life.as_mut().filter(|life| ends < life.hard) {
            life.hard = ends;
            life.soft = life.soft.map(|known| known.min(soft));
        }
    }
}
