//! Routes, rules and backstops of the tunnels: what must never loop or leak.
//!
//! [`plan`] decides from plain values what the kernel should have; [`Routing`] compares that with what carries our
//! origin there and changes the difference, backstops first. [`guard`] decides likewise which plaintext must not arrive.
//! Everything stays when the process ends.

mod apply;
pub mod guard;
pub mod plan;

pub use apply::{Routing, release};

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// What one tunnel wants of the kernel's routing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoutingSpec {
    /// Who installs routes.
    pub mode: RoutesMode,
    /// Configured remote prefixes, the cover of the remote selectors' ranges.
    pub remote: Vec<IpNet>,
    /// Configured local prefixes, the cover of the local selectors' ranges.
    pub local: Vec<IpNet>,
    /// The peer's outer addresses, as far as they are configured or known by now.
    pub peers: Vec<IpAddr>,
    /// The peer may be anywhere, and nobody knows its addresses before it comes.
    pub anywhere: bool,
    /// Our outer address, if it is configured.
    pub outer_local: Option<IpAddr>,
    /// Addresses put onto the device.
    pub addresses: Vec<IpNet>,
    /// Prefixes that may go and come in the clear though a remote selector covers them.
    pub bypass: Vec<IpNet>,
}

/// Whether a tunnel's routes lead into a device: while it goes from one engine to another it has two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// They do.
    InUse,
    /// They lead into the other one.
    Aside,
}

/// Who installs the routes of a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RoutesMode {
    /// From the remote selectors; plaintext between the selectors is refused on other interfaces.
    #[default]
    Selectors,
    /// From the remote selectors; plaintext is refused where the route back is a tunnel (route-based).
    Routed,
    /// A routing daemon or the operator does; nothing is protected but what they point at the device.
    Manual,
}
