//! The `xdp` engine: XDP classifies, AF_XDP workers carry what they can, and the slow path carries the rest with the same SAs.
//!
//! The pipeline ([`outbound`], [`inbound`]) is pure: a frame and the time in, a verdict out. Threads and sockets are
//! around it.

pub mod af_xdp;
pub mod counters;
pub mod engine;
pub mod events;
pub mod fast;
pub mod fleet;
pub mod fragment;
pub mod gateway;
pub mod icmp;
pub mod inbound;
pub mod inner;
pub mod link_layer;
pub mod next_hop;
pub mod offload;
pub mod outbound;
pub mod outer;
pub mod path_mtu;
pub mod prefetch;
pub mod program;
pub mod resolver;
pub mod sa;
pub mod selectors;
pub mod senders;
pub mod slow;
pub mod strays;
pub mod table;
pub mod waiting;
pub mod words;

#[cfg(test)]
mod tests;
