//! When outbound traffic moves from one pair of SAs to the next: as soon as the peer provably receives on it.
//!
//! Who asks for a child knows that the peer has installed it. Who answers does not know when the answer arrives, and
//! must go on with the pair before it, if there is one.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use crate::ike::{
    config::{ChildName, PeerId},
    event::{ChildSaId, ChildUp, Event, IkeSaId},
    time::Time,
};

/// Time after which a peer that has sent nothing must have our answer: some repetitions of its request.
const PATIENCE: Duration = Duration::from_secs(3);

/// Time after which both sides send on the new pair, and what was sent on the old one before has arrived.
pub(in crate::ike) const HANDOVER: Duration = Duration::from_secs(6);

/// One installed pair.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Pair {
    ike: IkeSaId,
    peer: PeerId,
    child: ChildName,
    /// When it is used at the latest; none if it is used already.
    waits_until: Option<Time>,
}

/// All installed pairs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Handover {
    pairs: BTreeMap<ChildSaId, Pair>,
    /// How many of them wait, so that the usual case costs nothing.
    waiting: usize,
}

impl Handover {
    /// Notes a pair; tells whether it is to be used at once. `ours` tells whether we asked for it.
    pub(super) fn installed(&mut self, now: Time, up: &ChildUp, ours: bool) -> bool {
        // Several pairs of one child within one IKE SA have different selectors, so none can stand in for another.
        let at_once = ours
            || !self
                .pairs
                .values()
                .any(|pair| (pair.peer, pair.child) == (up.peer, up.child) && pair.ike != up.ike);
        let waits_until = (!at_once).then(|| now + PATIENCE);
        self.waiting += usize::from(!at_once);
        let pair = Pair {
            ike: up.ike,
            peer: up.peer,
            child: up.child,
            waits_until,
        };
        self.pairs.insert(up.sa, pair);
        at_once
    }

    /// The IKE SA that a pair belongs to.
    pub(super) fn owner(&self, sa: ChildSaId) -> Option<IkeSaId> {
        self.pairs.get(&sa).map(|pair| pair.ike)
    }

    /// The peer has proved that it has a pair.
    pub(super) fn proved(&mut self, sa: ChildSaId) -> Option<Event> {
        if self.waiting == 0 {
            return None;
        }
        self.pairs.get_mut(&sa)?.waits_until.take()?;
        self.waiting -= 1;
        Some(Event::Outbound(sa))
    }

    /// Forgets a pair. What waits for the same child is used from now on.
    pub(super) fn removed(&mut self, sa: ChildSaId) -> Vec<Event> {
        let Some(gone) = self.pairs.remove(&sa) else {
            return Vec::new();
        };
        self.waiting -= usize::from(gone.waits_until.is_some());
        self.release(|pair, _| (pair.peer, pair.child) == (gone.peer, gone.child))
    }

    /// Those that have waited long enough.
    pub(super) fn due(&mut self, now: Time) -> Vec<Event> {
        self.release(|_, until| until <= now)
    }

    pub(super) fn next(&self) -> Option<Time> {
        if self.waiting == 0 {
            return None;
        }
        self.pairs
            .values()
            .filter_map(|pair| pair.waits_until)
            .min()
    }

    fn release(&mut self, which: impl Fn(&Pair, Time) -> bool) -> Vec<Event> {
        if self.waiting == 0 {
            return Vec::new();
        }
        let chosen: Vec<ChildSaId> = self
            .pairs
            .iter()
            .filter(|(_, pair)| pair.waits_until.is_some_and(|until| which(pair, until)))
            .map(|(sa, _)| *sa)
            .collect();
        chosen
            .into_iter()
            .filter_map(|sa| self.proved(sa))
            .collect()
    }
}
