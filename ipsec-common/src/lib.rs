//! What the XDP program and userspace must agree on: identifiers, map layouts, packet parsing, the ESP format and
//! the replay window.
//!
//! Pure and allocation-free: the XDP program, the workers and the tests on the host run this very code.
#![cfg_attr(not(test), no_std)]
#![warn(missing_docs)]

pub mod selector;
pub mod spi;

pub use selector::TrafficSelector;
pub use spi::Spi;
