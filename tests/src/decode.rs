//! What kind of packet a captured frame is: no more than a test has to tell apart.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Kinds of packets on the network between the gateways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// ARP or IPv6 neighbour discovery, and what else hosts say among themselves (MLD).
    Neighbour,
    /// ICMP and ICMPv6.
    Icmp,
    /// ESP, IP protocol 50.
    Esp,
    /// ESP in UDP.
    EspInUdp,
    /// IKE on port 500, or behind the non-ESP marker on port 4500.
    Ike,
    /// A NAT keep-alive.
    Keepalive,
    /// A fragment other than the first.
    Fragment,
    /// Anything else.
    Other,
}

/// A decoded frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Decoded {
    /// What it is.
    pub(crate) kind: Kind,
    /// IP source and destination, if it is an IP packet.
    pub(crate) addresses: Option<(IpAddr, IpAddr)>,
    /// Where the IP header starts.
    pub(crate) network: usize,
    /// Where what the IP header carries starts.
    pub(crate) transport: usize,
}

/// Decodes an Ethernet frame, which may be truncated.
pub(crate) fn decode(frame: &[u8]) -> Decoded {
    let mut at = 12;
    let mut ether_type = word(frame, at);
    while matches!(ether_type, Some(0x8100 | 0x88a8)) {
        at += 4;
        ether_type = word(frame, at);
    }
    let network = at + 2;
    let other = Decoded {
        kind: Kind::Other,
        addresses: None,
        network,
        transport: network,
    };
    match ether_type {
        Some(0x0800) => decode_v4(frame, network).unwrap_or(other),
        Some(0x86dd) => decode_v6(frame, network).unwrap_or(other),
        Some(0x0806) => Decoded {
            kind: Kind::Neighbour,
            ..other
        },
        _ => other,
    }
}

fn decode_v4(frame: &[u8], network: usize) -> Option<Decoded> {
    let header = frame.get(network..network + 20)?;
    let length = usize::from(header[0] & 0x0f) * 4;
    let transport = network + length;
    let address = |at: usize| {
        Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]).into()
    };
    let later_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0;
    let kind = if later_fragment {
        Kind::Fragment
    } else {
        upper(frame, transport, header[9])
    };
    Some(Decoded {
        kind,
        addresses: Some((address(12), address(16))),
        network,
        transport,
    })
}

fn decode_v6(frame: &[u8], network: usize) -> Option<Decoded> {
    let header = frame.get(network..network + 40)?;
    let address = |at: usize| {
        let mut octets = [0; 16];
        octets.copy_from_slice(&header[at..at + 16]);
        IpAddr::from(Ipv6Addr::from(octets))
    };
    let mut next = header[6];
    let mut transport = network + 40;
    let mut later_fragment = false;
    // Hop-by-hop options, routing, fragment, destination options.
    while matches!(next, 0 | 43 | 44 | 60) {
        let extension = frame.get(transport..transport + 8)?;
        let length = if next == 44 {
            later_fragment = u16::from_be_bytes([extension[2], extension[3]]) & !7 != 0;
            8
        } else {
            8 + usize::from(extension[1]) * 8
        };
        next = extension[0];
        transport += length;
    }
    let kind = if later_fragment {
        Kind::Fragment
    } else {
        upper(frame, transport, next)
    };
    Some(Decoded {
        kind,
        addresses: Some((address(8), address(24))),
        network,
        transport,
    })
}

/// Kind by IP protocol.
fn upper(frame: &[u8], transport: usize, protocol: u8) -> Kind {
    match protocol {
        1 => Kind::Icmp,
        // Echo, errors, and the rest: MLD and neighbour discovery.
        58 => match frame.get(transport) {
            Some(1..=4 | 128 | 129) => Kind::Icmp,
            _ => Kind::Neighbour,
        },
        50 => Kind::Esp,
        17 => udp(frame, transport),
        _ => Kind::Other,
    }
}

fn udp(frame: &[u8], transport: usize) -> Kind {
    let (Some(source), Some(destination)) = (word(frame, transport), word(frame, transport + 2))
    else {
        return Kind::Other;
    };
    let payload = frame.get(transport + 8..).unwrap_or_default();
    if source == 4500 || destination == 4500 {
        match payload {
            [0xff] => Kind::Keepalive,
            [0, 0, 0, 0, ..] => Kind::Ike,
            _ => Kind::EspInUdp,
        }
    } else if source == 500 || destination == 500 {
        Kind::Ike
    } else {
        Kind::Other
    }
}

fn word(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An Ethernet frame of IPv4 from 10.1.0.10 to 10.2.0.10.
    fn ipv4(protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0]);
        frame.extend([10, 1, 0, 10, 10, 2, 0, 10]);
        frame.extend(payload);
        frame
    }

    #[test]
    fn kinds_are_told_apart() {
        let udp = |source: u16, destination: u16, payload: &[u8]| {
            let mut packet = source.to_be_bytes().to_vec();
            packet.extend(destination.to_be_bytes());
            packet.extend([0; 4]);
            packet.extend(payload);
            decode(&ipv4(17, &packet)).kind
        };
        assert_eq!(decode(&ipv4(50, &[1; 40])).kind, Kind::Esp);
        assert_eq!(decode(&ipv4(1, &[8])).kind, Kind::Icmp);
        assert_eq!(udp(500, 500, &[1; 28]), Kind::Ike);
        assert_eq!(udp(4500, 61000, &[0; 32]), Kind::Ike);
        assert_eq!(udp(61000, 4500, &[0xff]), Kind::Keepalive);
        assert_eq!(udp(61000, 4500, &[0xc0; 40]), Kind::EspInUdp);
        assert_eq!(udp(53, 53, &[0; 12]), Kind::Other);
    }

    #[test]
    fn addresses_are_found_behind_a_vlan_tag() {
        let mut frame = ipv4(6, &[0; 20]);
        frame.splice(12..12, [0x81, 0x00, 0x00, 0x07]);
        let decoded = decode(&frame);
        assert_eq!(
            decoded.addresses,
            Some((IpAddr::from([10, 1, 0, 10]), IpAddr::from([10, 2, 0, 10])))
        );
        assert_eq!((decoded.network, decoded.transport), (18, 38));
    }

    #[test]
    fn truncated_frames_are_other() {
        let frame = ipv4(50, &[]);
        for length in 0..34 {
            assert_eq!(decode(&frame[..length]).kind, Kind::Other);
        }
    }
}
