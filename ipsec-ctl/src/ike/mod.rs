//! IKEv2 (RFC 7296) as a sans-IO core: message codecs, what peers are called, what they may agree on.
//!
//! Nothing here reads a clock, opens a socket, starts a thread or draws from a global random number generator.
#![forbid(unsafe_code)]

pub mod crypto;
mod identity;
pub mod message;
pub mod rng;

pub use identity::{Identity, IdentityError};
