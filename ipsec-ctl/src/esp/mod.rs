//! The algorithms and keys of ESP (RFC 4303), as the daemon hands them to a data plane.
#![forbid(unsafe_code)]

mod suite;

pub use suite::{EspKeys, EspSuite, Integrity};
