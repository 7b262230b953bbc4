//! Agreement: which algorithms and which selectors both sides can live with (RFC 7296 sections 2.7 and 2.9).

pub mod proposals;
pub mod selectors;
