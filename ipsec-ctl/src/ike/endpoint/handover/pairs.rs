//! All installed pairs, and how they are found without a look at each: by line, by child, by IKE SA, by when something is due.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use ipsec_common::TrafficSelector;
use serde::{Deserialize, Serialize};

use super::{Use, remotes::Remotes};
use crate::ike::{
    config::{ChildName, PeerId},
    event::{ChildSaId, ChildUp, IkeSaId},
    time::Time,
};

/// One installed pair.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::ike::endpoint) struct Pair {
    pub(super) ike: IkeSaId,
    pub(super) peer: PeerId,
    pub(super) child: ChildName,
    pub(super) spi_in: u32,
    /// The first pair of its line.
    pub(super) line: ChildSaId,
    /// The peer's side of its traffic.
    remote: Vec<TrafficSelector>,
    pub(super) usage: Use,
}

impl Pair {
    /// A pair of a line that is about to be installed.
    pub(super) fn of(up: &ChildUp, line: ChildSaId) -> Self {
        Self {
            ike: up.ike,
            peer: up.peer,
            child: up.child,
            spi_in: up.spi_in.0,
            line,
            remote: up.remote.clone(),
            usage: Use::Both,
        }
    }

    /// Its inbound SPI.
    pub(in crate::ike::endpoint) fn spi_in(&self) -> u32 {
        self.spi_in
    }

    /// Whether one of both may carry what the other has carried.
    pub(super) fn stands_in_for(&self, other: &Self) -> bool {
        self.line == other.line
            || ((self.peer, self.child) == (other.peer, other.child)
                && self.ike != other.ike
                && self.shares_traffic(other))
    }

    /// Whether some address of the peer's side belongs to both.
    fn shares_traffic(&self, other: &Self) -> bool {
        let shares = |one: &TrafficSelector| {
            let mut others = other.remote.iter();
            others.any(|other| one.shares_addresses(other))
        };
        self.remote.iter().any(shares)
    }
}

/// All installed pairs.
#[derive(Clone, Debug, Default)]
pub(super) struct Pairs {
    by_id: BTreeMap<ChildSaId, Pair>,
    lines: BTreeSet<(ChildSaId, ChildSaId)>,
    remotes: Remotes,
    ikes: BTreeSet<(IkeSaId, ChildSaId)>,
    due: BTreeSet<(Time, ChildSaId)>,
}

const FIRST: ChildSaId = ChildSaId(u64::MIN);
const LAST: ChildSaId = ChildSaId(u64::MAX);

impl Pairs {
    pub(super) fn get(&self, sa: ChildSaId) -> Option<&Pair> {
        self.by_id.get(&sa)
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = ChildSaId> {
        self.by_id.keys().copied()
    }

    /// Those after one.
    pub(super) fn after(&self, sa: Bound<ChildSaId>) -> impl Iterator<Item = (ChildSaId, &Pair)> {
        let after = self.by_id.range((sa, Bound::Unbounded));
        after.map(|(sa, pair)| (*sa, pair))
    }

    /// Those of a line, oldest first, as all that follow.
    pub(super) fn of_line(&self, line: ChildSaId) -> impl Iterator<Item = (ChildSaId, &Pair)> {
        let ids = self.lines.range((line, FIRST)..=(line, LAST));
        ids.filter_map(|(_, sa)| Some((*sa, self.get(*sa)?)))
    }

    /// Those that may carry what one has carried, oldest first.
    pub(super) fn that_stand_in_for(
        &self,
        pair: &Pair,
    ) -> impl Iterator<Item = (ChildSaId, &Pair)> {
        let mut near = self.remotes.near((pair.peer, pair.child), &pair.remote);
        near.extend(self.of_line(pair.line).map(|(sa, _)| sa));
        near.into_iter()
            .filter_map(|sa| Some((sa, self.get(sa)?)))
            .filter(|(_, other)| other.stands_in_for(pair))
    }

    /// Those of an IKE SA.
    pub(super) fn of_ike(&self, ike: IkeSaId) -> Vec<ChildSaId> {
        let ids = self.ikes.range((ike, FIRST)..=(ike, LAST));
        ids.map(|(_, sa)| *sa).collect()
    }

    /// Those of which something is to become by then.
    pub(super) fn due(&self, now: Time) -> Vec<ChildSaId> {
        let due = self.due.iter().take_while(|(at, _)| *at <= now);
        due.map(|(_, sa)| *sa).collect()
    }

    /// When something is to become of one next.
    pub(super) fn next_due(&self) -> Option<Time> {
        self.due.first().map(|(at, _)| *at)
    }

    pub(super) fn insert(&mut self, sa: ChildSaId, pair: Pair) {
        self.remove(sa);
        self.lines.insert((pair.line, sa));
        self.remotes
            .insert((pair.peer, pair.child), sa, &pair.remote);
        self.ikes.insert((pair.ike, sa));
        self.due.extend(pair.usage.due().map(|at| (at, sa)));
        self.by_id.insert(sa, pair);
    }

    pub(super) fn remove(&mut self, sa: ChildSaId) -> Option<Pair> {
        let pair = self.by_id.remove(&sa)?;
        self.lines.remove(&(pair.line, sa));
        self.remotes
            .remove((pair.peer, pair.child), sa, &pair.remote);
        self.ikes.remove(&(pair.ike, sa));
        if let Some(at) = pair.usage.due() {
            self.due.remove(&(at, sa));
        }
        Some(pair)
    }

    /// Notes what one is used for; tells whether there is one.
    pub(super) fn set_usage(&mut self, sa: ChildSaId, usage: Use) -> bool {
        let Some(pair) = self.by_id.get_mut(&sa) else {
            return false;
        };
        let before = std::mem::replace(&mut pair.usage, usage);
        if let Some(at) = before.due() {
            self.due.remove(&(at, sa));
        }
        self.due.extend(usage.due().map(|at| (at, sa)));
        true
    }

    /// Another IKE SA has one from here on.
    pub(super) fn set_ike(&mut self, sa: ChildSaId, ike: IkeSaId) {
        if let Some(pair) = self.by_id.get_mut(&sa) {
            let before = std::mem::replace(&mut pair.ike, ike);
            self.ikes.remove(&(before, sa));
            self.ikes.insert((ike, sa));
        }
    }
}
