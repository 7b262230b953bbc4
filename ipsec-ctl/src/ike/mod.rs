//! IKEv2 (RFC 7296) as a sans-IO core: message codecs, agreement, and the exchanges.
//!
//! Nothing here reads a clock, opens a socket, starts a thread or draws from a global random number generator.
#![forbid(unsafe_code)]

pub mod config;
pub mod crypto;
pub mod endpoint;
pub mod event;
pub mod exchange;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod identity;
pub mod job;
pub mod message;
pub mod negotiate;
pub mod rng;
mod sa;
pub mod time;

pub use endpoint::Endpoint;
pub use identity::{Identity, IdentityError};

#[cfg(test)]
mod simulation;
