//! Traffic selectors (RFC 7296 section 3.13.1) as values that IKE negotiates and the data plane matches.
//!
//! The wire form is the IKE codec's business.

use core::net::IpAddr;

/// One range of addresses, with a protocol and a range of ports.
///
/// Both ends of a range are inclusive and of one address family; `addresses.0 <= addresses.1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct TrafficSelector {
    /// IP protocol number; 0 is any.
    pub protocol: u8,
    /// First and last port in host byte order, `(0, 65535)` for any. For ICMP the type is the high and the code the
    /// low byte. RFC 7296 section 3.13.1: `(65535, 0)` is OPAQUE, packets whose ports cannot be seen.
    pub ports: (u16, u16),
    /// First and last address.
    pub addresses: (IpAddr, IpAddr),
}
