//! The `kernel` engine: the kernel's own ESP (XFRM) carries the packets, behind an xfrm interface for each tunnel, or by policies of
//! the whole host where there is none.
//!
//! [`policies`] and [`host`] decide from plain values which policies the kernel should have; [`engine`] keeps them and the states,
//! and follows what the kernel reports. Sockets, routes and the XDP program belong to the `xdp` engine, in which a
//! tunnel of this one lodges.

pub mod algorithms;
pub mod capabilities;
pub mod counters;
mod encap;
pub mod engine;
pub mod host;
pub mod policies;
pub mod probe;
pub mod selectors;
