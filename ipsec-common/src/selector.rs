//! Traffic selectors (RFC 7296 section 3.13.1) as values that IKE negotiates and the data plane matches.
//!
//! The wire form is the IKE codec's business.

use core::{fmt, net::IpAddr};

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

impl TrafficSelector {
    /// Whether some address is in both, whatever the protocols and ports.
    // Of two families one range is wholly before the other.
    pub fn shares_addresses(&self, other: &Self) -> bool {
        self.addresses.0 <= other.addresses.1 && other.addresses.0 <= self.addresses.1
    }
}

impl fmt::Display for TrafficSelector {
    /// The notation of the configuration: addresses, then protocol and ports where they are narrowed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = self.addresses;
        match prefix_length(first, last) {
            _ if first == last => write!(f, "{first}")?,
            Some(length) => write!(f, "{first}/{length}")?,
            None => write!(f, "{first}-{last}")?,
        }
        match self.protocol {
            0 => return Ok(()),
            1 => f.write_str(" icmp")?,
            6 => f.write_str(" tcp")?,
            17 => f.write_str(" udp")?,
            58 => f.write_str(" icmpv6")?,
            132 => f.write_str(" sctp")?,
            number => write!(f, " {number}")?,
        }
        match self.ports {
            (0, u16::MAX) => Ok(()),
            (first, last) if first == last => write!(f, " {first}"),
            (first, last) => write!(f, " {first}-{last}"),
        }
    }
}

/// Length of the prefix that covers exactly this range, if one does.
fn prefix_length(first: IpAddr, last: IpAddr) -> Option<u32> {
    let (first, last, width) = match (first, last) {
        (IpAddr::V4(first), IpAddr::V4(last)) => {
            (u128::from(first.to_bits()), u128::from(last.to_bits()), 32)
        }
        (IpAddr::V6(first), IpAddr::V6(last)) => (first.to_bits(), last.to_bits(), 128),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return None,
    };
    // A prefix is a range whose ends differ in their low bits only: all clear in one, all set in the other.
    let host = first ^ last;
    let is_prefix = host & host.wrapping_add(1) == 0 && first & host == 0;
    is_prefix.then(|| width - (u128::BITS - host.leading_zeros()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(first: &str, last: &str, protocol: u8, ports: (u16, u16)) -> std::string::String {
        let addresses = (first.parse().unwrap(), last.parse().unwrap());
        std::format!(
            "{}",
            TrafficSelector {
                protocol,
                ports,
                addresses
            }
        )
    }

    #[test]
    fn ranges_share_addresses_where_they_meet_and_never_across_families() {
        let range = |first: &str, last: &str| TrafficSelector {
            protocol: 0,
            ports: (0, u16::MAX),
            addresses: (first.parse().unwrap(), last.parse().unwrap()),
        };
        let one = range("10.1.0.0", "10.1.0.255");
        let all_v6 = range("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff");
        for (other, share) in [
            (one, true),
            (range("10.1.0.255", "10.2.0.0"), true),
            (range("10.0.0.0", "10.255.255.255"), true),
            (range("10.1.1.0", "10.1.1.0"), false),
            (all_v6, false),
        ] {
            assert_eq!(one.shares_addresses(&other), share, "{other}");
            assert_eq!(other.shares_addresses(&one), share, "{other}");
        }
    }

    #[test]
    fn selectors_are_shown_as_users_write_them() {
        let any = (0, u16::MAX);
        assert_eq!(shown("10.1.0.0", "10.1.0.255", 0, any), "10.1.0.0/24");
        assert_eq!(shown("0.0.0.0", "255.255.255.255", 0, any), "0.0.0.0/0");
        assert_eq!(
            shown("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 0, any),
            "::/0"
        );
        assert_eq!(
            shown("10.1.0.1", "10.1.0.1", 6, (443, 443)),
            "10.1.0.1 tcp 443"
        );
        assert_eq!(
            shown("10.1.0.1", "10.1.0.2", 17, (1, 9)),
            "10.1.0.1-10.1.0.2 udp 1-9"
        );
        assert_eq!(
            shown("2001:db8::", "2001:db8::ffff", 47, any),
            "2001:db8::/112 47"
        );
    }
}
