//! What every part of the gateway must agree on, an XDP program included: SPIs, traffic selectors, counters and the words of an SA.
//!
//! Pure and allocation-free, so that the same code can run in the kernel, in userspace and in tests.
#![cfg_attr(not(test), no_std)]
#![warn(missing_docs)]

pub mod classify;
pub mod generator;
pub mod maps;
pub mod reason;
#[cfg(not(target_arch = "bpf"))]
pub mod replay;
pub mod selector;
pub mod spi;
pub mod words;

pub use reason::{REASONS, Reason};
pub use selector::TrafficSelector;
pub use spi::Spi;
pub use words::SaWords;
