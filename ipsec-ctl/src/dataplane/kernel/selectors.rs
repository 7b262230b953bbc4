//! Traffic selectors as the kernel can match them: prefixes and masks instead of ranges.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};
use ipsec_common::TrafficSelector;

use crate::net::xfrm::{PortMask, Selector};

/// Most policies of one child and direction. Each packet may be held against all of them.
const MOST: usize = 256;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const ALL_PORTS: (u16, u16) = (0, u16::MAX);

/// Why selectors cannot be told to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Inexpressible {
    /// More than [`MOST`] prefixes and masks would be needed.
    #[error("they need more than {MOST} policies: use prefixes and single ports")]
    TooMany,
    /// RFC 4301 section 4.4.1.1: OPAQUE ports, and ICMP types and codes.
    #[error("they narrow ICMP or name OPAQUE ports, which the kernel cannot match as IKE means it")]
    Kind,
}

/// Selectors of all packets from one side to the other.
///
/// # Errors
///
/// [`Inexpressible`].
pub fn between(
    sources: &[TrafficSelector],
    destinations: &[TrafficSelector],
) -> Result<Vec<Selector>, Inexpressible> {
    let mut selectors = Vec::new();
    for source in sources {
        for destination in destinations {
            let Some(protocol) = common(source.protocol, destination.protocol) else {
                continue;
            };
            for source_net in prefixes(source.addresses) {
                for destination_net in prefixes(destination.addresses) {
                    if source_net.addr().is_ipv4() != destination_net.addr().is_ipv4() {
                        continue;
                    }
                    for source_port in masks(protocol, source.ports)? {
                        for destination_port in masks(protocol, destination.ports)? {
                            if selectors.len() == MOST {
                                return Err(Inexpressible::TooMany);
                            }
                            selectors.push(Selector {
                                source: source_net,
                                destination: destination_net,
                                protocol,
                                source_port,
                                destination_port,
                            });
                        }
                    }
                }
            }
        }
    }
    Ok(selectors)
}

/// The protocol that matches both; none if no packet does. 0 is any.
fn common(one: u8, other: u8) -> Option<u8> {
    match (one, other) {
        (0, protocol) | (protocol, 0) => Some(protocol),
        (one, other) => (one == other).then_some(one),
    }
}

/// The fewest prefixes that cover exactly the range.
fn prefixes((first, last): (IpAddr, IpAddr)) -> Vec<IpNet> {
    match (first, last) {
        (IpAddr::V4(first), IpAddr::V4(last)) => Ipv4Subnets::new(first, last, 0)
            .take(MOST + 1)
            .map(IpNet::V4)
            .collect(),
        (IpAddr::V6(first), IpAddr::V6(last)) => Ipv6Subnets::new(first, last, 0)
            .take(MOST + 1)
            .map(IpNet::V6)
            .collect(),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => Vec::new(),
    }
}

/// The fewest masks that cover exactly the range of ports.
fn masks(protocol: u8, ports: (u16, u16)) -> Result<Vec<PortMask>, Inexpressible> {
    if ports == ALL_PORTS {
        return Ok(vec![PortMask::default()]);
    }
    let (first, last) = ports;
    if matches!(protocol, 0 | ICMP | ICMPV6) || first > last {
        return Err(Inexpressible::Kind);
    }
    let (mut next, last) = (u32::from(first), u32::from(last));
    let mut masks = Vec::new();
    while next <= last {
        // The largest aligned block that begins here and ends in the range.
        let aligned = if next == 0 {
            u16::BITS
        } else {
            next.trailing_zeros()
        };
        let fits = (last - next + 1).ilog2();
        let block = 1 << aligned.min(fits);
        masks.push(PortMask {
            port: u16::try_from(next).unwrap_or(u16::MAX),
            mask: u16::try_from(0x1_0000 - block).unwrap_or_default(),
        });
        next += block;
    }
    Ok(masks)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn selector(first: &str, last: &str, protocol: u8, ports: (u16, u16)) -> TrafficSelector {
        TrafficSelector {
            protocol,
            ports,
            addresses: (first.parse().unwrap(), last.parse().unwrap()),
        }
    }

    fn nets(selectors: &[Selector]) -> Vec<(String, String)> {
        selectors
            .iter()
            .map(|one| (one.source.to_string(), one.destination.to_string()))
            .collect()
    }

    #[test]
    fn prefixes_stay_and_ranges_are_cut_into_prefixes() {
        let here = [selector("10.1.0.0", "10.1.0.255", 0, ALL_PORTS)];
        let there = [
            selector("10.2.0.1", "10.2.0.3", 0, ALL_PORTS),
            selector("2001:db8::", "2001:db8::ffff", 0, ALL_PORTS),
        ];
        let pair = |destination: &str| ("10.1.0.0/24".to_owned(), destination.to_owned());
        assert_eq!(
            nets(&between(&here, &there).unwrap()),
            [pair("10.2.0.1/32"), pair("10.2.0.2/31")]
        );
    }

    #[test]
    fn protocols_that_contradict_each_other_match_nothing() {
        let (tcp, udp) = (6, 17);
        let one = [selector("10.1.0.1", "10.1.0.1", tcp, ALL_PORTS)];
        let other = [selector("10.2.0.1", "10.2.0.1", udp, ALL_PORTS)];
        assert_eq!(between(&one, &other), Ok(Vec::new()));
        let any = [selector("10.2.0.1", "10.2.0.1", 0, ALL_PORTS)];
        assert_eq!(between(&one, &any).unwrap()[0].protocol, tcp);
    }

    #[test]
    fn what_the_kernel_would_match_otherwise_is_refused() {
        let any = [selector("0.0.0.0", "255.255.255.255", 0, ALL_PORTS)];
        let echo = [selector("10.2.0.1", "10.2.0.1", ICMP, (0x0800, 0x08ff))];
        let opaque = [selector("10.2.0.1", "10.2.0.1", 6, (u16::MAX, 0))];
        for narrowed in [echo, opaque] {
            assert_eq!(between(&any, &narrowed), Err(Inexpressible::Kind));
        }
        let scattered = [selector("0.0.0.1", "255.255.255.254", 6, (1, 65_534))];
        assert_eq!(between(&scattered, &scattered), Err(Inexpressible::TooMany));
    }

    proptest! {
        #[test]
        fn masks_cover_the_ports_of_the_range_and_no_other(ends: (u16, u16), port: u16) {
            let ports = (ends.0.min(ends.1), ends.0.max(ends.1));
            let covering = masks(6, ports)
                .unwrap()
                .iter()
                .filter(|one| port & one.mask == one.port)
                .count();
            let inside = (ports.0..=ports.1).contains(&port);
            prop_assert_eq!(covering, usize::from(inside));
        }
    }
}
