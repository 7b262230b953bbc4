//! The algorithms that IKE SAs and CHILD SAs are negotiated from.

mod proposal;
mod transform;

pub use proposal::{EspProposal, IkeProposal, ProposalError};
pub use transform::{Encryption, Esn, Group, Integrity, Prf};
