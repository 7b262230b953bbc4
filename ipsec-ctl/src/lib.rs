//! The IPsec gateway, one folder per concern.
//!
//! Imports between the folders point downwards in this order and never up (`cargo xtask tidy` checks it):
//! `cli`, `daemon`, `api`, `config`, `ike`, `dataplane`, `esp`, `net`. `ike` and `dataplane` do not know each other.

pub mod api;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod dataplane;
pub mod esp;
pub mod ike;
pub mod net;
pub mod wiped;

#[cfg(test)]
#[path = "../tests/support/skip.rs"]
mod skip;
