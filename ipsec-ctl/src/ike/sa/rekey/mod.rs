//! Rekeying in place (RFC 7296 sections 1.3.2, 1.3.3 and 2.8): one SA takes the place of another, and whatever both sides
//! do at once, both end with the same one.

mod busy;
mod child;
mod collision;
mod ike;
mod reauth;

use serde::{Deserialize, Serialize};

pub(super) use {
    busy::Busy,
    child::Replaced,
    ike::{IkeJob, PendingIke},
};

use crate::ike::{
    event::{ChildSaId, DownReason, IkeSaId},
    time::Time,
};

/// What is to become of an IKE SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::ike) enum Succession {
    /// It stays, as far as anybody knows.
    InForce,
    /// Both sides want another in the place of that one; whether this is the one that stays is not clear yet.
    Undecided(IkeSaId),
    /// A fresh one is coming up beside it.
    BeingReplaced,
    /// A fresh one is needed, which only the peer can begin. Until then what can be renewed is.
    LeftToPeer,
    /// Another has taken its place. Unless the peer deletes it before, we do so then.
    Retires {
        /// When.
        at: Time,
        /// With this reason.
        why: DownReason,
    },
}

/// When an SA is replaced, and when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lifetime {
    /// When to begin with its replacement; none once that has begun.
    pub(super) soft: Option<Time>,
    /// When it ends, replaced or not.
    pub(super) hard: Time,
}

impl Lifetime {
    /// When something is to be done about it; not before `hard` while something else replaces it already.
    pub(super) fn due(&self, replaced: bool) -> Time {
        match self.soft {
            Some(soft) if !replaced => soft.min(self.hard),
            _ => self.hard,
        }
    }

    /// Whether its replacement is to begin now.
    pub(super) fn is_soft_over(&self, now: Time) -> bool {
        self.soft.is_some_and(|at| at <= now)
    }

    /// It is to end soon by itself, unless the peer deletes it first.
    fn shorten(&mut self, until: Time) {
        self.soft = None;
        self.hard = self.hard.min(until);
    }
}

/// What is to become of a pair of SAs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Standing {
    /// It stays, as far as anybody knows.
    InForce,
    /// The peer has rekeyed it and will delete it.
    Rekeyed,
    /// Of two that were made at once, it is the one that the peer will delete.
    Redundant,
    /// We delete it.
    Closing,
}

/// What a child that we ask for is to take the place of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Replaces {
    pub(super) sa: ChildSaId,
    /// The first of the pairs that have replaced each other.
    pub(super) line: ChildSaId,
    /// Our inbound SPI of it.
    spi_in: u32,
    /// What the peer has made in its place at the same time.
    rival: Option<Rival>,
}

impl Replaces {
    /// The SPI that a REKEY_SA notify of ours names.
    pub(super) fn spi_bytes(&self) -> [u8; 4] {
        self.spi_in.to_be_bytes()
    }
}

/// What the peer makes in the place of an SA while we do the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Rival {
    /// The pair, once it is installed.
    sa: Option<ChildSaId>,
    /// The lower of its two nonces.
    lowest: Vec<u8>,
}

/// The lower of the nonces of an exchange.
// RFC 7296 section 2.8.1: compared byte by byte; the shorter of two that are equal so far is the lower.
fn lowest(a: &[u8], b: &[u8]) -> Vec<u8> {
    a.min(b).to_vec()
}
