//! A peer that says TEMPORARY_FAILURE: it is at work on the same, and is asked again; but not for ever (RFC 7296 section 2.25).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ike::{
    endpoint::Shared, event::DownReason, exchange::ChildResponse, message::payload::NotifyType,
    sa::IkeSa, time::Time,
};

/// For so long a peer may be at work on something else.
const PATIENCE: Duration = Duration::from_secs(180);
/// What it says after so long a silence about it has nothing to do with what it has said before.
const FORGOTTEN: Duration = Duration::from_secs(120);

/// How long the peer has answered to all that we ask that it is busy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::ike::sa) struct Busy {
    since: Time,
    last: Time,
}

impl IkeSa {
    /// Notes whether a response of CREATE_CHILD_SA says that the peer is busy.
    pub(in crate::ike::sa) fn note_busy(&mut self, now: Time, response: &ChildResponse<'_>) {
        let before = self.busy.take();
        let is_busy = match response {
            ChildResponse::Refused(notifies) => {
                notifies.error() == Some(NotifyType::TEMPORARY_FAILURE)
            }
            ChildResponse::Agreed { .. } | ChildResponse::Ike { .. } => false,
        };
        if is_busy {
            let still = before.filter(|busy| now - busy.last < FORGOTTEN);
            let since = still.map_or(now, |busy| busy.since);
            self.busy = Some(Box::new(Busy { since, last: now }));
        }
    }

    /// Whether the peer is busy, and may well be.
    pub(in crate::ike::sa) fn is_only_busy(&self) -> bool {
        let busy = self.busy.as_deref();
        busy.is_some_and(|busy| busy.last - busy.since < PATIENCE)
    }

    /// The peer is busy without end: what it knows of this IKE SA is not what we know, and the IKE SA is closed.
    // RFC 7296 section 2.25: after several minutes. Where we can call the peer, a fresh one is there before.
    pub(in crate::ike::sa) fn leave_busy_peer(&mut self, shared: &mut Shared, now: Time) {
        if self.can_call_peer(shared) {
            self.ask_for_replacement(shared, now);
        } else {
            self.delete(shared, now, DownReason::Protocol);
        }
    }
}
