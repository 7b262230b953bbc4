//! The algorithms that IKE SAs and CHILD SAs are negotiated from, and what they compute.

pub mod auth;
pub mod ke;
pub mod keys;
mod prf;
mod proposal;
pub mod sk;
mod suite;
mod transform;

pub use proposal::{EspProposal, IkeProposal, ProposalError};
pub use suite::{ChildSuite, IkeSuite};
pub use transform::{Encryption, Esn, Group, Integrity, Prf};

#[cfg(test)]
mod known_answers;
