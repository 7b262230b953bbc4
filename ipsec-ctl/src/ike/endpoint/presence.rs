//! Who is up with peers that take no second one of the same identity (`unique = "keep"`), so that whoever comes is held against
//! those alone who say that they are the same.

use std::{collections::BTreeMap, net::IpAddr};

use super::index::Owner;
use crate::ike::{Identity, event::IkeSaId};

/// An IKE SA that is up: who has it, and where.
#[derive(Clone, Debug)]
pub(in crate::ike) struct Present {
    pub(in crate::ike) ike: IkeSaId,
    pub(in crate::ike) identity: Identity,
    pub(in crate::ike) address: IpAddr,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Presence(BTreeMap<(Owner, IkeSaId), Present>);

impl Presence {
    /// Notes that an IKE SA of that owner is up, or that it is not, or not of interest any more.
    pub(super) fn note(&mut self, owner: Owner, ike: IkeSaId, present: Option<Present>) {
        match present {
            Some(present) => self.0.insert((owner, ike), present),
            None => self.0.remove(&(owner, ike)),
        };
    }

    /// Those whose owner probably is this one, oldest first.
    pub(super) fn of_owner(&self, owner: Owner) -> impl Iterator<Item = &Present> {
        let (from, to) = ((owner, IkeSaId(u64::MIN)), (owner, IkeSaId(u64::MAX)));
        self.0.range(from..=to).map(|(_, present)| present)
    }
}
