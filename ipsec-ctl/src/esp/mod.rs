//! The transform of a packet: algorithms and keys of an ESP SA, and sealing and opening with them.

#![forbid(unsafe_code)]

mod suite;
mod transform;

pub use suite::{EspKeys, EspSuite, Integrity};
pub use transform::{BadKeys, EspTransform, OpenError, Opened, SealError};
