//! What becomes of a pair of SAs in the data plane: when outbound traffic moves to it, and when it is removed.
//!
//! Who asks for a pair knows that the peer has installed it, and uses it as soon as the answer is there. Who answers does
//! not know when the answer arrives, and goes on with the pair before it until the peer provably has the new one. A pair
//! whose traffic another has taken still receives for a while after both sides have deleted it, for packets on their way
//! may be overtaken by the Delete.
//!
//! Pairs that replace each other within one IKE SA are of one *line*. A child may have several lines at once, with
//! different selectors, none of which can stand in for another. In another IKE SA a child starts new lines, which take the
//! place of the old ones that are for the same traffic; under one tunnel several peers may have come in, each with its own.

mod pairs;
mod remotes;

use std::{collections::BTreeSet, ops::Bound, time::Duration};

use serde::{Deserialize, Serialize};

pub(super) use self::pairs::Pair;
use self::pairs::Pairs;
use crate::ike::{
    event::{ChildSaId, ChildUp, DownReason, Event, IkeSaId},
    time::Time,
};

/// Time after which a peer that has sent nothing must have our answer: some repetitions of its request.
const PATIENCE: Duration = Duration::from_secs(3);

/// Time for which a deleted pair whose traffic another has taken still receives.
const LINGER: Duration = Duration::from_secs(5);

/// Time after which both sides send on the new pair, and what was sent on the old one before has arrived.
pub(in crate::ike) const HANDOVER: Duration = Duration::from_secs(6);

/// How a pair has come about, which tells when it may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ike) enum Origin {
    /// We asked for it, and the answer is here.
    Asked,
    /// We answer, and do not know when the answer arrives.
    Answered,
    /// We asked for it, and of two that were made at once it is the one that must go.
    Lost,
}

/// What a pair is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Use {
    /// It receives, and sends once the peer provably has it; from then on at the latest, if there is such a time.
    Waits(Option<Time>),
    /// It sends and receives.
    Both,
    /// It receives, and sends only if nothing else of its line is left.
    Redundant,
    /// Its traffic has moved on; it receives until it is removed.
    Closing,
    /// Both sides have deleted it; it receives until then.
    Lingers(Time, DownReason),
}

impl Use {
    /// Whether another may count on it.
    fn is_alive(self) -> bool {
        match self {
            Self::Waits(_) | Self::Both | Self::Redundant => true,
            Self::Closing | Self::Lingers(..) => false,
        }
    }

    fn due(self) -> Option<Time> {
        match self {
            Self::Waits(at) => at,
            Self::Lingers(at, _) => Some(at),
            Self::Both | Self::Redundant | Self::Closing => None,
        }
    }
}

/// What all installed pairs are used for.
#[derive(Clone, Debug, Default)]
pub(super) struct Handover {
    pairs: Pairs,
    /// Those that are not saved as they are now.
    changed: BTreeSet<ChildSaId>,
}

impl Handover {
    /// Notes a pair of a line; tells whether it is to be used at once.
    pub(super) fn installed(
        &mut self,
        now: Time,
        up: &ChildUp,
        line: ChildSaId,
        origin: Origin,
    ) -> bool {
        let mut pair = Pair::of(up, line);
        // Within its line the peer will delete the one before, which is proof enough, and goes on with it until then.
        let is_rekeying = self.carries(line);
        let is_alone = || {
            let mut others = self.pairs.that_stand_in_for(&pair);
            !is_rekeying && !others.any(|(_, other)| other.usage.is_alive())
        };
        pair.usage = match origin {
            Origin::Asked => Use::Both,
            Origin::Answered | Origin::Lost if is_alone() => Use::Both,
            Origin::Answered if is_rekeying => Use::Waits(None),
            Origin::Answered => Use::Waits(Some(now + PATIENCE)),
            Origin::Lost => Use::Redundant,
        };
        let usage = pair.usage;
        self.pairs.insert(up.sa, pair);
        self.changed.insert(up.sa);
        usage == Use::Both
    }

    /// All of them.
    pub(super) fn all(&self) -> impl Iterator<Item = ChildSaId> {
        self.pairs.ids()
    }

    /// Those after one.
    pub(super) fn after(&self, sa: Bound<ChildSaId>) -> impl Iterator<Item = (ChildSaId, &Pair)> {
        self.pairs.after(sa)
    }

    /// Puts a pair back that was saved.
    pub(super) fn restore(&mut self, sa: ChildSaId, pair: Pair) {
        self.pairs.insert(sa, pair);
    }

    /// What has become of the pairs that have changed since this was asked last; none of those that are gone.
    pub(super) fn changes(&mut self) -> Vec<(ChildSaId, Option<Pair>)> {
        let changed = std::mem::take(&mut self.changed);
        let now = |sa: ChildSaId| (sa, self.pairs.get(sa).cloned());
        changed.into_iter().map(now).collect()
    }

    /// As if all pairs had changed.
    pub(super) fn all_have_changed(&mut self) {
        self.changed.extend(self.pairs.ids());
    }

    /// The IKE SA that a pair belongs to.
    pub(super) fn owner(&self, sa: ChildSaId) -> Option<IkeSaId> {
        self.pairs.get(sa).map(|pair| pair.ike)
    }

    /// Whether the peer has yet to prove that it has a pair.
    pub(super) fn is_unproved(&self, sa: ChildSaId) -> bool {
        let pair = self.pairs.get(sa);
        pair.is_some_and(|pair| matches!(pair.usage, Use::Waits(_)))
    }

    /// Whether a pair of a line is there to count on.
    fn carries(&self, line: ChildSaId) -> bool {
        let mut pairs = self.pairs.of_line(line);
        pairs.any(|(_, pair)| pair.usage.is_alive())
    }

    /// Whether another pair of a line is there to carry the traffic of this one.
    pub(super) fn has_successor(&self, sa: ChildSaId, line: ChildSaId) -> bool {
        let mut pairs = self.pairs.of_line(line);
        pairs.any(|(id, pair)| id != sa && pair.usage.is_alive())
    }

    fn set(&mut self, sa: ChildSaId, usage: Use) {
        if self.pairs.set_usage(sa, usage) {
            self.changed.insert(sa);
        }
    }

    /// The peer has proved that it has a pair.
    pub(super) fn proved(&mut self, sa: ChildSaId) -> Option<Event> {
        if !self.is_unproved(sa) {
            return None;
        }
        self.set(sa, Use::Both);
        Some(Event::Outbound(sa))
    }

    /// Of two pairs that were made at once, this is the one that must go.
    pub(super) fn redundant(&mut self, sa: ChildSaId) {
        self.set(sa, Use::Redundant);
    }

    /// Of two IKE SAs that were begun at once this is the one that goes: what waits to send in it need not, where another can.
    // Else traffic could come back to it just before the peer deletes it.
    pub(super) fn yields(&mut self, ike: IkeSaId) {
        for sa in self.pairs.of_ike(ike) {
            let Some(pair) = self.pairs.get(sa).filter(|_| self.is_unproved(sa)) else {
                continue;
            };
            let another = |(_, other): (_, &Pair)| other.ike != ike && other.usage.is_alive();
            let has_another = self.pairs.that_stand_in_for(pair).any(another);
            if has_another {
                self.redundant(sa);
            }
        }
    }

    /// Its traffic has moved on, so it sends no more.
    pub(super) fn closing(&mut self, sa: ChildSaId) -> Vec<Event> {
        let Some(pair) = self.pairs.get(sa).cloned() else {
            return Vec::new();
        };
        if !pair.usage.is_alive() {
            return Vec::new();
        }
        self.set(sa, Use::Closing);
        let mut events = self.take_over(&pair);
        events.push(Event::OutboundDown(sa));
        events
    }

    /// Both sides have deleted a pair, or it has ended for good. It lingers if another has taken its traffic.
    pub(super) fn removed(&mut self, now: Time, sa: ChildSaId, reason: DownReason) -> Vec<Event> {
        let Some(pair) = self.pairs.get(sa).cloned() else {
            return Vec::new();
        };
        if pair.usage != Use::Closing && !self.has_successor(sa, pair.line) {
            return self.dropped(sa, reason);
        }
        let events = self.closing(sa);
        self.set(sa, Use::Lingers(now + LINGER, reason));
        events
    }

    /// A pair is removed at once, in one piece; what waits for that is used from now on.
    pub(super) fn dropped(&mut self, sa: ChildSaId, reason: DownReason) -> Vec<Event> {
        let Some(pair) = self.pairs.get(sa).cloned() else {
            return Vec::new();
        };
        self.set(sa, Use::Closing);
        let mut events = self.take_over(&pair);
        events.extend(self.forget(sa, reason));
        events
    }

    /// What lingers of an IKE SA that has ended is removed with it.
    pub(super) fn ended(&mut self, ike: IkeSaId) -> Vec<(u32, Event)> {
        let all = self.pairs.of_ike(ike);
        all.into_iter()
            .filter_map(|sa| self.remove_lingering(sa))
            .collect()
    }

    /// Another IKE SA inherits all pairs.
    pub(super) fn inherited(&mut self, from: IkeSaId, to: IkeSaId) {
        for sa in self.pairs.of_ike(from) {
            self.pairs.set_ike(sa, to);
            self.changed.insert(sa);
        }
    }

    /// What is to be used or removed now, with the SPIs of what is removed.
    pub(super) fn due(&mut self, now: Time) -> (Vec<Event>, Vec<(u32, Event)>) {
        let due = self.pairs.due(now);
        let used = due.iter().filter_map(|sa| self.proved(*sa)).collect();
        let ended = due.into_iter().filter_map(|sa| self.remove_lingering(sa));
        (used, ended.collect())
    }

    pub(super) fn next(&self) -> Option<Time> {
        self.pairs.next_due()
    }

    /// If nothing else sends in the place of a pair, what waits does so from now on, else what is redundant.
    fn take_over(&mut self, gone: &Pair) -> Vec<Event> {
        let sends = |(_, pair): (ChildSaId, &Pair)| pair.usage == Use::Both;
        if self.pairs.of_line(gone.line).any(sends) || self.pairs.that_stand_in_for(gone).any(sends)
        {
            return Vec::new();
        }
        let (mut waiting, mut redundant) = (Vec::new(), None);
        for (sa, pair) in self.pairs.that_stand_in_for(gone) {
            match pair.usage {
                Use::Waits(_) => waiting.push(sa),
                Use::Redundant => redundant = Some(sa),
                Use::Both | Use::Closing | Use::Lingers(..) => {}
            }
        }
        match redundant {
            Some(left) if waiting.is_empty() => {
                self.set(left, Use::Both);
                vec![Event::Outbound(left)]
            }
            Some(_) | None => waiting
                .into_iter()
                .filter_map(|sa| self.proved(sa))
                .collect(),
        }
    }

    fn remove_lingering(&mut self, sa: ChildSaId) -> Option<(u32, Event)> {
        let pair = self.pairs.get(sa)?;
        let Use::Lingers(_, reason) = pair.usage else {
            return None;
        };
        let spi = pair.spi_in();
        Some((spi, self.forget(sa, reason)?))
    }

    fn forget(&mut self, sa: ChildSaId, reason: DownReason) -> Option<Event> {
        let pair = self.pairs.remove(sa)?;
        self.changed.insert(sa);
        Some(Event::ChildDown {
            peer: pair.peer,
            child: pair.child,
            sa,
            reason,
        })
    }
}
