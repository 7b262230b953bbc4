//! What the endpoint must find without looking at every IKE SA: who is due, who is half-open, who has asked already, which
//! are one peer's.
//!
//! A datagram of a stranger, and an IKE SA that comes up, cost the same with one tunnel and with thousands.

use std::{
    collections::{BTreeSet, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, SocketAddr},
};

use crate::ike::{
    Identity, config::PeerId, event::IkeSaId, message::IkeSpi, sa::IkeSa, time::Time,
};

/// What tells one IKE_SA_INIT from another: the initiator's address, port and SPI.
pub(super) type Asked = (SocketAddr, IkeSpi);

/// Whose an IKE SA is: the configured peer, and a hash of the identity that it has shown, for one peer may have many.
pub(super) type Owner = Option<(PeerId, u64)>;

/// Whose an IKE SA is now.
pub(super) fn owner(sa: &IkeSa) -> Owner {
    owner_of(sa.peer, sa.remote_id.as_ref())
}

/// Whose an IKE SA is with which that peer has shown this identity.
pub(super) fn owner_of(peer: Option<PeerId>, identity: Option<&Identity>) -> Owner {
    // Without a key, so that the order of IKE SAs is the same in every run. Who finds identities with equal hashes makes
    // only his own IKE SAs slow to find.
    let mut hasher = DefaultHasher::new();
    identity.hash(&mut hasher);
    peer.map(|peer| (peer, hasher.finish()))
}

/// What is noted of one IKE SA.
#[derive(Debug, Default)]
struct Entry {
    due: Option<Time>,
    half_open: Option<IpAddr>,
    asked: Option<Asked>,
}

/// The index.
#[derive(Debug, Default)]
pub(super) struct Index {
    entries: HashMap<IkeSaId, Entry>,
    due: BTreeSet<(Time, IkeSaId)>,
    half_open: HashMap<IpAddr, u32>,
    half_open_in_all: u32,
    asked: HashMap<Asked, IkeSaId>,
    owned: BTreeSet<(PeerId, u64, IkeSaId)>,
}

impl Index {
    /// Notes that an IKE SA has become somebody else's.
    pub(super) fn owned(&mut self, id: IkeSaId, before: Owner, now: Owner) {
        if before == now {
            return;
        }
        if let Some((peer, identity)) = before {
            self.owned.remove(&(peer, identity, id));
        }
        self.owned
            .extend(now.map(|(peer, identity)| (peer, identity, id)));
    }

    /// The IKE SAs of a peer, in no order that means anything.
    pub(super) fn of_peer(&self, peer: PeerId) -> impl Iterator<Item = IkeSaId> {
        self.range((peer, u64::MIN), (peer, u64::MAX))
    }

    /// The IKE SAs of a peer whose identity probably is the one of the owner, oldest first.
    pub(super) fn of_owner(&self, owner: Owner) -> impl Iterator<Item = IkeSaId> {
        owner.into_iter().flat_map(|owner| self.range(owner, owner))
    }

    fn range(&self, from: (PeerId, u64), to: (PeerId, u64)) -> impl Iterator<Item = IkeSaId> {
        let (from, to) = (
            (from.0, from.1, IkeSaId(u64::MIN)),
            (to.0, to.1, IkeSaId(u64::MAX)),
        );
        self.owned.range(from..=to).map(|(.., id)| *id)
    }

    /// Notes what has become of an IKE SA.
    pub(super) fn update(&mut self, sa: &IkeSa, due: Option<Time>) {
        let entry = self.entries.entry(sa.id).or_default();
        if entry.due != due {
            if let Some(at) = entry.due {
                self.due.remove(&(at, sa.id));
            }
            self.due.extend(due.map(|at| (at, sa.id)));
            entry.due = due;
        }
        let half_open = sa.is_half_open().then(|| sa.remote.ip());
        if entry.half_open != half_open {
            let before = std::mem::replace(&mut entry.half_open, half_open);
            self.count(before, half_open);
        }
    }

    /// Forgets an IKE SA.
    pub(super) fn remove(&mut self, sa: &IkeSa) {
        let id = sa.id;
        self.owned(id, owner(sa), None);
        let Some(entry) = self.entries.remove(&id) else {
            return;
        };
        if let Some(at) = entry.due {
            self.due.remove(&(at, id));
        }
        if let Some(asked) = entry.asked {
            self.asked.remove(&asked);
        }
        self.count(entry.half_open, None);
    }

    fn count(&mut self, less: Option<IpAddr>, more: Option<IpAddr>) {
        if let Some(address) = less {
            self.half_open_in_all = self.half_open_in_all.saturating_sub(1);
            if let Some(count) = self.half_open.get_mut(&address) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.half_open.remove(&address);
                }
            }
        }
        if let Some(address) = more {
            self.half_open_in_all += 1;
            *self.half_open.entry(address).or_default() += 1;
        }
    }

    /// Half-open IKE SAs in all, and from one address.
    pub(super) fn half_open(&self, address: IpAddr) -> (u32, u32) {
        let same = self.half_open.get(&address).copied().unwrap_or(0);
        (self.half_open_in_all, same)
    }

    /// Notes which request an IKE SA has come from.
    pub(super) fn asked(&mut self, id: IkeSaId, asked: Asked) {
        self.entries.entry(id).or_default().asked = Some(asked);
        self.asked.insert(asked, id);
    }

    /// The IKE SA that a request has led to.
    pub(super) fn answer_to(&self, asked: &Asked) -> Option<IkeSaId> {
        self.asked.get(asked).copied()
    }

    /// When something is to be done next.
    pub(super) fn next(&self) -> Option<Time> {
        self.due.first().map(|(at, _)| *at)
    }

    /// Those for which something is to be done.
    pub(super) fn due(&self, now: Time) -> Vec<IkeSaId> {
        self.due
            .iter()
            .take_while(|(at, _)| *at <= now)
            .map(|(_, id)| *id)
            .collect()
    }
}
