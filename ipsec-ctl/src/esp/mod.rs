//! ESP packets (RFC 4303): sealing and opening one packet or a batch, with ring.
#![forbid(unsafe_code)]

mod suite;

pub use suite::{EspKeys, EspSuite, Integrity};
