//! What the kernel knows and does: links, addresses, routes, rules, TUN devices, sockets, sysctls.
//!
//! Mechanism only. What is wanted of the kernel, and why, is decided by the data plane.

pub mod bpf_fs;
mod esp_filter;
pub mod forwarding;
mod heir;
pub mod netfilter;
pub mod netlink;
pub mod preflight;
pub mod privileges;
pub mod queues;
pub mod socket;
pub mod sysctl;
pub mod tun;
pub mod watch;
pub mod xfrm;

#[cfg(test)]
mod tests;
