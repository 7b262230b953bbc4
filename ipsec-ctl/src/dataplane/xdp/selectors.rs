//! Traffic selectors in the form that is matched against packets (RFC 4301 section 4.4.1).
//!
//! Negotiating and narrowing them is IKE's business.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipsec_common::TrafficSelector;

use super::prefetch::Places;
use crate::dataplane::seam::SelectorPair;

/// ICMP and ICMPv6 as IP protocols.
const ICMP: [u8; 2] = [1, 58];

/// What selectors look at in a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// IP protocol, behind all extension headers.
    pub protocol: u8,
    /// Source and destination port, host byte order; for ICMP type and code, twice. `None` where the packet shows
    /// none: other protocols, fragments but the first.
    pub ports: Option<(u16, u16)>,
}

impl Flow {
    /// Makes the two ports of an ICMP message of its type and code.
    // RFC 7296 section 3.13.1: the type is the high byte of the port, the code the low one.
    pub fn icmp_ports(icmp_type: u8, code: u8) -> (u16, u16) {
        let port = u16::from_be_bytes([icmp_type, code]);
        (port, port)
    }

    /// Whether the protocol has ports, or type and code, that selectors may look at.
    pub fn protocol_has_ports(protocol: u8) -> bool {
        const TCP: u8 = 6;
        const UDP: u8 = 17;
        const SCTP: u8 = 132;
        matches!(protocol, TCP | UDP | SCTP) || ICMP.contains(&protocol)
    }
}

/// Whether a packet matches selectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    /// It does.
    Yes,
    /// It does not.
    No,
    /// Its addresses and protocol do, but it shows no ports while the selectors name some.
    NeedsPorts,
}

/// Selectors of an SA or child, as ranges of integers. Equal ones match the same packets.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Selectors {
    local: Box<[Range]>,
    remote: Box<[Range]>,
}

/// A prefix, for packets to be looked up by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cover {
    /// IPv6, otherwise IPv4.
    pub v6: bool,
    /// Its length in bits.
    pub length: u8,
    /// What is left of an address behind the bits that the prefix does not fix.
    pub bits: u128,
}

impl Cover {
    /// The prefix of this length that an address lies in.
    pub fn new(address: IpAddr, length: u8) -> Self {
        let (v6, width, bits) = match address {
            IpAddr::V4(address) => (false, u32::BITS, u128::from(address.to_bits())),
            IpAddr::V6(address) => (true, u128::BITS, address.to_bits()),
        };
        let free = width.saturating_sub(length.into());
        Self {
            v6,
            length,
            bits: bits.checked_shr(free).unwrap_or(0),
        }
    }
}

impl Selectors {
    /// Prepares negotiated or configured selectors for matching.
    pub fn new(pair: &SelectorPair) -> Self {
        let ranges = |selectors: &[TrafficSelector]| {
            let mut ranges: Vec<_> = selectors.iter().map(Range::new).collect();
            ranges.sort_unstable();
            ranges.dedup();
            ranges.into()
        };
        Self {
            local: ranges(&pair.local),
            remote: ranges(&pair.remote),
        }
    }

    /// Matches a packet that we send: its source is on our side.
    pub fn match_outbound(&self, flow: &Flow) -> Match {
        let (source_port, destination_port) = flow.ports.unzip();
        both(
            any(&self.local, flow.source, flow.protocol, source_port),
            any(
                &self.remote,
                flow.destination,
                flow.protocol,
                destination_port,
            ),
        )
    }

    /// Matches a packet that the peer sent: its destination is on our side.
    pub fn match_inbound(&self, flow: &Flow) -> Match {
        let (source_port, destination_port) = flow.ports.unzip();
        both(
            any(&self.remote, flow.source, flow.protocol, source_port),
            any(
                &self.local,
                flow.destination,
                flow.protocol,
                destination_port,
            ),
        )
    }

    /// The longest prefixes that cover the remote ranges: a packet whose destination lies in none does not match.
    pub fn remote_covers(&self) -> impl Iterator<Item = Cover> {
        self.remote
            .iter()
            .filter_map(|range| range.addresses.cover())
    }

    /// How much they match besides the remote addresses, for comparison: protocols, then remote ports, our addresses and
    /// our ports.
    pub fn breadth(&self) -> (bool, u32, u128, u32) {
        let ports = |ranges: &[Range]| ranges.iter().map(Range::port_count).max().unwrap_or(0);
        let mut all = self.local.iter().chain(&self.remote);
        let local = self.local.iter().map(|range| range.addresses.count());
        (
            all.all(|range| range.protocol == 0),
            ports(&self.remote),
            local.fold(0, u128::saturating_add),
            ports(&self.local),
        )
    }

    /// Where their memory is.
    pub fn note_places(&self, places: &mut Places) {
        places.add(&*self.local);
        places.add(&*self.remote);
    }

    /// Whether an IPv6 packet can match.
    pub fn covers_ipv6(&self) -> bool {
        self.remote
            .iter()
            .any(|range| matches!(range.addresses, Addresses::V6(..)))
    }
}

fn both(first: Match, second: Match) -> Match {
    match (first, second) {
        (Match::No, _) | (_, Match::No) => Match::No,
        (Match::Yes, Match::Yes) => Match::Yes,
        (Match::NeedsPorts, _) | (_, Match::NeedsPorts) => Match::NeedsPorts,
    }
}

fn any(ranges: &[Range], address: IpAddr, protocol: u8, port: Option<u16>) -> Match {
    let mut best = Match::No;
    for range in ranges {
        match range.matches(address, protocol, port) {
            Match::Yes => return Match::Yes,
            Match::NeedsPorts => best = Match::NeedsPorts,
            Match::No => {}
        }
    }
    best
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Range {
    addresses: Addresses,
    protocol: u8,
    ports: (u16, u16),
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Addresses {
    V4(u32, u32),
    V6(u128, u128),
    /// Ends of two families, which no packet matches.
    None,
}

impl Addresses {
    /// The longest prefix with all of them in it.
    fn cover(&self) -> Option<Cover> {
        let (first, same): (IpAddr, u32) = match *self {
            Self::V4(first, last) => (
                Ipv4Addr::from_bits(first).into(),
                (first ^ last).leading_zeros(),
            ),
            Self::V6(first, last) => (
                Ipv6Addr::from_bits(first).into(),
                (first ^ last).leading_zeros(),
            ),
            Self::None => return None,
        };
        Some(Cover::new(first, u8::try_from(same).ok()?))
    }

    fn count(&self) -> u128 {
        match *self {
            Self::V4(first, last) => u128::from(last.saturating_sub(first)) + 1,
            Self::V6(first, last) => last.saturating_sub(first).saturating_add(1),
            Self::None => 0,
        }
    }
}

impl Range {
    fn new(selector: &TrafficSelector) -> Self {
        let addresses = match selector.addresses {
            (IpAddr::V4(first), IpAddr::V4(last)) => Addresses::V4(first.to_bits(), last.to_bits()),
            (IpAddr::V6(first), IpAddr::V6(last)) => Addresses::V6(first.to_bits(), last.to_bits()),
            _ => Addresses::None,
        };
        Self {
            addresses,
            protocol: selector.protocol,
            ports: selector.ports,
        }
    }

    fn port_count(&self) -> u32 {
        let (first, last) = self.ports;
        u32::from(last.saturating_sub(first)) + 1
    }

    fn matches(&self, address: IpAddr, protocol: u8, port: Option<u16>) -> Match {
        let inside = match (&self.addresses, address) {
            (Addresses::V4(first, last), IpAddr::V4(address)) => {
                (*first..=*last).contains(&address.to_bits())
            }
            (Addresses::V6(first, last), IpAddr::V6(address)) => {
                (*first..=*last).contains(&address.to_bits())
            }
            _ => false,
        };
        if !inside || (self.protocol != 0 && self.protocol != protocol) {
            return Match::No;
        }
        let (first, last) = self.ports;
        match port {
            // RFC 4301 section 4.4.1.1: ANY matches whatever the port is, and where there is none.
            _ if (first, last) == (0, u16::MAX) => Match::Yes,
            // RFC 4301 section 4.4.1.1: OPAQUE matches only where the port cannot be seen.
            Some(_) if first > last => Match::No,
            None if first > last => Match::Yes,
            Some(port) if (first..=last).contains(&port) => Match::Yes,
            Some(_) => Match::No,
            None if Flow::protocol_has_ports(protocol) => Match::NeedsPorts,
            None => Match::No,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(first: &str, last: &str, protocol: u8, ports: (u16, u16)) -> TrafficSelector {
        TrafficSelector {
            protocol,
            ports,
            addresses: (first.parse().unwrap(), last.parse().unwrap()),
        }
    }

    fn selectors(protocol: u8, remote_ports: (u16, u16)) -> Selectors {
        Selectors::new(&SelectorPair {
            local: vec![selector("10.1.0.0", "10.1.0.255", protocol, (0, u16::MAX))],
            remote: vec![
                selector("2001:db8::", "2001:db8::ff", 0, (0, u16::MAX)),
                selector("10.2.0.0", "10.2.0.255", protocol, remote_ports),
            ],
        })
    }

    fn flow(source: &str, destination: &str, protocol: u8, ports: Option<(u16, u16)>) -> Flow {
        Flow {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            protocol,
            ports,
        }
    }

    #[test]
    fn a_packet_matches_one_selector_of_each_side() {
        let any = selectors(0, (0, u16::MAX));
        let out = flow("10.1.0.7", "10.2.0.9", 47, None);
        assert_eq!(any.match_outbound(&out), Match::Yes);
        assert_eq!(any.match_inbound(&out), Match::No, "the wrong way round");
        let back = flow("10.2.0.9", "10.1.0.7", 47, None);
        assert_eq!(any.match_inbound(&back), Match::Yes);
        assert_eq!(any.match_outbound(&back), Match::No);
        let mixed = flow("10.1.0.7", "10.3.0.9", 47, None);
        assert_eq!(any.match_outbound(&mixed), Match::No);
        assert!(any.covers_ipv6());
    }

    #[test]
    fn ports_and_protocol_narrow_what_matches() {
        let web = selectors(6, (443, 443));
        let to =
            |protocol, ports| web.match_outbound(&flow("10.1.0.7", "10.2.0.9", protocol, ports));
        assert_eq!(to(6, Some((40000, 443))), Match::Yes);
        assert_eq!(to(6, Some((443, 80))), Match::No);
        assert_eq!(to(17, Some((40000, 443))), Match::No);
        assert_eq!(to(6, None), Match::NeedsPorts, "a fragment");
    }

    #[test]
    fn opaque_ports_match_only_packets_that_show_none() {
        let opaque = selectors(6, (u16::MAX, 0));
        let to = |ports| opaque.match_outbound(&flow("10.1.0.7", "10.2.0.9", 6, ports));
        assert_eq!(to(None), Match::Yes);
        assert_eq!(to(Some((1, 2))), Match::No);
    }

    #[test]
    fn icmp_type_and_code_stand_in_the_port() {
        let echo = selectors(1, (0x0800, 0x08ff));
        let to = |icmp_type, code| {
            let ports = Some(Flow::icmp_ports(icmp_type, code));
            echo.match_outbound(&flow("10.1.0.7", "10.2.0.9", 1, ports))
        };
        assert_eq!(to(8, 0), Match::Yes);
        assert_eq!(to(0, 0), Match::No);
    }
}
