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

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use ipsec_common::TrafficSelector;

use crate::ike::{
    config::{ChildName, PeerId},
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

    /// Whether something will become of it that has not yet.
    fn waits(self) -> bool {
        matches!(self, Self::Waits(_) | Self::Lingers(..))
    }

    fn due(self) -> Option<Time> {
        match self {
            Self::Waits(at) => at,
            Self::Lingers(at, _) => Some(at),
            Self::Both | Self::Redundant | Self::Closing => None,
        }
    }
}

/// One installed pair.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Pair {
    ike: IkeSaId,
    peer: PeerId,
    child: ChildName,
    spi_in: u32,
    /// The first pair of its line.
    line: ChildSaId,
    /// The peer's side of its traffic.
    remote: Vec<TrafficSelector>,
    usage: Use,
}

impl Pair {
    /// Its inbound SPI.
    pub(super) fn spi_in(&self) -> u32 {
        self.spi_in
    }

    /// Whether one of both may carry what the other has carried.
    fn stands_in_for(&self, other: &Self) -> bool {
        self.line == other.line
            || ((self.peer, self.child) == (other.peer, other.child)
                && self.ike != other.ike
                && self.shares_traffic(other))
    }

    /// Whether some address of the peer's side belongs to both.
    fn shares_traffic(&self, other: &Self) -> bool {
        self.remote.iter().any(|one| {
            other.remote.iter().any(|other| {
                one.addresses.0 <= other.addresses.1 && other.addresses.0 <= one.addresses.1
            })
        })
    }
}

/// All installed pairs.
#[derive(Clone, Debug, Default)]
pub(super) struct Handover {
    pairs: BTreeMap<ChildSaId, Pair>,
    /// Those that are not saved as they are now.
    changed: BTreeSet<ChildSaId>,
    /// How many of them have something to wait for, so that the usual case costs nothing.
    waiting: usize,
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
        let mut pair = Pair {
            ike: up.ike,
            peer: up.peer,
            child: up.child,
            spi_in: up.spi_in.0,
            line,
            remote: up.remote.clone(),
            usage: Use::Both,
        };
        let others = || {
            let others = self.pairs.values();
            others.filter(|other| other.usage.is_alive() && other.stands_in_for(&pair))
        };
        // Within its line the peer will delete the one before, which is proof enough, and goes on with it until then.
        let is_rekeying = others().any(|other| other.line == line);
        pair.usage = match origin {
            Origin::Asked => Use::Both,
            Origin::Answered | Origin::Lost if others().next().is_none() => Use::Both,
            Origin::Answered if is_rekeying => Use::Waits(None),
            Origin::Answered => Use::Waits(Some(now + PATIENCE)),
            Origin::Lost => Use::Redundant,
        };
        let usage = pair.usage;
        self.waiting += usize::from(usage.waits());
        self.pairs.insert(up.sa, pair);
        self.changed.insert(up.sa);
        usage == Use::Both
    }

    /// All of them.
    pub(super) fn all(&self) -> impl Iterator<Item = ChildSaId> {
        self.pairs.keys().copied()
    }

    /// Those after one.
    pub(super) fn after(&self, sa: Bound<ChildSaId>) -> impl Iterator<Item = (ChildSaId, &Pair)> {
        let after = self.pairs.range((sa, Bound::Unbounded));
        after.map(|(sa, pair)| (*sa, pair))
    }

    /// Puts a pair back that was saved.
    pub(super) fn restore(&mut self, sa: ChildSaId, pair: Pair) {
        self.waiting += usize::from(pair.usage.waits());
        self.pairs.insert(sa, pair);
    }

    /// What has become of the pairs that have changed since this was asked last; none of those that are gone.
    pub(super) fn changes(&mut self) -> Vec<(ChildSaId, Option<Pair>)> {
        let changed = std::mem::take(&mut self.changed);
        let now = |sa: ChildSaId| (sa, self.pairs.get(&sa).cloned());
        changed.into_iter().map(now).collect()
    }

    /// As if all pairs had changed.
    pub(super) fn all_have_changed(&mut self) {
        self.changed.extend(self.pairs.keys());
    }

    /// The IKE SA that a pair belongs to.
    pub(super) fn owner(&self, sa: ChildSaId) -> Option<IkeSaId> {
        self.pairs.get(&sa).map(|pair| pair.ike)
    }

    /// Whether the peer has yet to prove that it has a pair.
    pub(super) fn is_unproved(&self, sa: ChildSaId) -> bool {
        self.pairs
            .get(&sa)
            .is_some_and(|pair| matches!(pair.usage, Use::Waits(_)))
    }

    /// Whether another pair of a line is there to carry the traffic of this one.
    pub(super) fn has_successor(&self, sa: ChildSaId, line: ChildSaId) -> bool {
        self.pairs
            .iter()
            .any(|(id, pair)| *id != sa && pair.line == line && pair.usage.is_alive())
    }

    fn set(&mut self, sa: ChildSaId, usage: Use) {
        if let Some(pair) = self.pairs.get_mut(&sa) {
            let before = std::mem::replace(&mut pair.usage, usage);
            self.changed.insert(sa);
            self.waiting += usize::from(usage.waits());
            self.waiting -= usize::from(before.waits());
        }
    }

    /// The peer has proved that it has a pair.
    pub(super) fn proved(&mut self, sa: ChildSaId) -> Option<Event> {
        if self.waiting == 0 || !matches!(self.pairs.get(&sa)?.usage, Use::Waits(_)) {
            return None;
        }
        self.set(sa, Use::Both);
        Some(Event::Outbound(sa))
    }

    /// Of two pairs that were made at once, this is the one that must go.
    pub(super) fn redundant(&mut self, sa: ChildSaId) {
        self.set(sa, Use::Redundant);
    }

    /// Its traffic has moved on, so it sends no more.
    pub(super) fn closing(&mut self, sa: ChildSaId) -> Vec<Event> {
        let Some(pair) = self.pairs.get(&sa).cloned() else {
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
        let Some(pair) = self.pairs.get(&sa).cloned() else {
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
        let Some(pair) = self.pairs.get(&sa).cloned() else {
            return Vec::new();
        };
        self.set(sa, Use::Closing);
        let mut events = self.take_over(&pair);
        events.extend(self.forget(sa, reason));
        events
    }

    /// What lingers of an IKE SA that has ended is removed with it.
    pub(super) fn ended(&mut self, ike: IkeSaId) -> Vec<(u32, Event)> {
        self.remove_lingering(|pair, _| pair.ike == ike)
    }

    /// Another IKE SA inherits all pairs.
    pub(super) fn inherited(&mut self, from: IkeSaId, to: IkeSaId) {
        for (sa, pair) in self.pairs.iter_mut().filter(|(_, pair)| pair.ike == from) {
            pair.ike = to;
            self.changed.insert(*sa);
        }
    }

    /// What is to be used or removed now, with the SPIs of what is removed.
    pub(super) fn due(&mut self, now: Time) -> (Vec<Event>, Vec<(u32, Event)>) {
        if self.waiting == 0 {
            return (Vec::new(), Vec::new());
        }
        let used = self.release(|_, until| until.is_some_and(|until| until <= now));
        (used, self.remove_lingering(|_, until| until <= now))
    }

    pub(super) fn next(&self) -> Option<Time> {
        if self.waiting == 0 {
            return None;
        }
        self.pairs
            .values()
            .filter_map(|pair| pair.usage.due())
            .min()
    }

    /// If nothing else sends in the place of a pair, what waits does so from now on, else what is redundant.
    fn take_over(&mut self, gone: &Pair) -> Vec<Event> {
        let other = |usage: Use| {
            self.pairs
                .iter()
                .rev()
                .find(|(_, pair)| pair.usage == usage && pair.stands_in_for(gone))
                .map(|(id, _)| *id)
        };
        if other(Use::Both).is_some() {
            return Vec::new();
        }
        let redundant = other(Use::Redundant);
        let released = self.release(|pair, _| pair.stands_in_for(gone));
        match redundant {
            Some(left) if released.is_empty() => {
                self.set(left, Use::Both);
                vec![Event::Outbound(left)]
            }
            _ => released,
        }
    }

    fn release(&mut self, which: impl Fn(&Pair, Option<Time>) -> bool) -> Vec<Event> {
        if self.waiting == 0 {
            return Vec::new();
        }
        let chosen: Vec<ChildSaId> = self
            .pairs
            .iter()
            .filter(|(_, pair)| matches!(pair.usage, Use::Waits(until) if which(pair, until)))
            .map(|(sa, _)| *sa)
            .collect();
        chosen
            .into_iter()
            .filter_map(|sa| self.proved(sa))
            .collect()
    }

    fn remove_lingering(&mut self, which: impl Fn(&Pair, Time) -> bool) -> Vec<(u32, Event)> {
        let chosen: Vec<(ChildSaId, DownReason)> = self
            .pairs
            .iter()
            .filter_map(|(sa, pair)| match pair.usage {
                Use::Lingers(until, reason) if which(pair, until) => Some((*sa, reason)),
                _ => None,
            })
            .collect();
        chosen
            .into_iter()
            .filter_map(|(sa, reason)| {
                let spi = self.pairs.get(&sa)?.spi_in;
                Some((spi, self.forget(sa, reason)?))
            })
            .collect()
    }

    fn forget(&mut self, sa: ChildSaId, reason: DownReason) -> Option<Event> {
        let pair = self.pairs.remove(&sa)?;
        self.changed.insert(sa);
        self.waiting -= usize::from(pair.usage.waits());
        Some(Event::ChildDown {
            peer: pair.peer,
            child: pair.child,
            sa,
            reason,
        })
    }
}
