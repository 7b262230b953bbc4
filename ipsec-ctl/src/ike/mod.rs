//! IKEv2 (RFC 7296) as a sans-IO core: datagrams and the time go in, datagrams, events and jobs come out.
//!
//! Nothing here reads a clock, opens a socket, starts a thread or draws from a global random number generator.
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod message;
