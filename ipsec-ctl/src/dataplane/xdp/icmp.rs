//! Answers to packets that are too long for a tunnel and must not be fragmented.

use std::net::IpAddr;

use super::inner::{Inner, internet_checksum};

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// The ICMP or ICMPv6 message that tells the sender of `packet` to send no more than `mtu` bytes. None goes to fragments
/// but the first, to multicast, and to ICMP errors.
///
/// Its source is the packet's destination: the one address that is known to be routed into the tunnel, so that no
/// reverse path filter refuses what arrives on the device.
// RFC 1122 section 3.2.2 and RFC 4443 section 2.4: what must not be answered.
pub fn too_big(packet: &[u8], mtu: u16) -> Option<Vec<u8>> {
    let inner = Inner::parse(packet).ok()?;
    if inner.flow.source.is_multicast()
        || inner.flow.source.is_unspecified()
        || inner.flow.destination.is_multicast()
        || is_error(&inner)
    {
        return None;
    }
    match (inner.flow.destination, inner.flow.source) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            // RFC 1812 section 4.3.2.3: as much of the packet as fits into 576 bytes.
            let quote = packet.get(..packet.len().min(576 - 28))?;
            let mut message = vec![3, 4, 0, 0, 0, 0];
            message.extend(mtu.to_be_bytes());
            message.extend_from_slice(quote);
            let checksum = internet_checksum(&[&message]);
            message[2..4].copy_from_slice(&checksum.to_be_bytes());
            let length = u16::try_from(20 + message.len()).ok()?;
            let mut answer = vec![0x45, 0xc0];
            answer.extend(length.to_be_bytes());
            answer.extend([0, 0, 0x40, 0, 64, ICMP, 0, 0]);
            answer.extend(from.octets());
            answer.extend(to.octets());
            let checksum = internet_checksum(&[&answer]);
            answer[10..12].copy_from_slice(&checksum.to_be_bytes());
            answer.extend(message);
            Some(answer)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            // RFC 4443 section 3.2: as much of the packet as fits into the least MTU.
            let quote = packet.get(..packet.len().min(1280 - 48))?;
            let mut message = vec![2, 0, 0, 0, 0, 0];
            message.extend(mtu.to_be_bytes());
            message.extend_from_slice(quote);
            let length = u16::try_from(message.len()).ok()?.to_be_bytes();
            let addresses = [from.octets(), to.octets()].concat();
            let checksum = internet_checksum(&[&addresses, &length, &[0, ICMPV6], &message]);
            message[2..4].copy_from_slice(&checksum.to_be_bytes());
            let mut answer = vec![0x60, 0, 0, 0, length[0], length[1], ICMPV6, 64];
            answer.extend(addresses);
            answer.extend(message);
            Some(answer)
        }
        _ => None,
    }
}

fn is_error(inner: &Inner) -> bool {
    let icmp_type = inner.flow.ports.map(|(port, _)| port >> 8);
    match inner.flow.protocol {
        // Without its type nobody knows: a later fragment is not answered.
        ICMP => !matches!(icmp_type, Some(0 | 8 | 13..=18)),
        ICMPV6 => icmp_type.is_none_or(|icmp_type| icmp_type < 128),
        _ => inner.fragment && inner.flow.ports.is_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(protocol: u8, first: u8) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 3, 0xe8, 0, 1, 0x40, 0, 63, protocol, 0, 0];
        packet.extend([10, 1, 0, 9, 10, 2, 0, 9, first]);
        packet.resize(1000, 0);
        packet
    }

    #[test]
    fn the_sender_is_told_the_mtu() {
        let packet = v4(17, 0);
        let answer = too_big(&packet, 900).unwrap();
        assert_eq!(answer.len(), 576);
        assert_eq!(internet_checksum(&[&answer[..20]]), 0);
        assert_eq!(internet_checksum(&[&answer[20..]]), 0);
        assert_eq!(answer[12..20], [10, 2, 0, 9, 10, 1, 0, 9]);
        assert_eq!(answer[20..22], [3, 4]);
        assert_eq!(answer[26..28], 900_u16.to_be_bytes());
        assert_eq!(answer[28..], packet[..548]);
    }

    #[test]
    fn an_ipv6_sender_is_told_the_mtu() {
        let mut packet = vec![0x60, 0, 0, 0, 5, 0xdc, 17, 64];
        packet.extend(
            "2001:db8::1"
                .parse::<std::net::Ipv6Addr>()
                .unwrap()
                .octets(),
        );
        packet.extend(
            "2001:db8::2"
                .parse::<std::net::Ipv6Addr>()
                .unwrap()
                .octets(),
        );
        packet.resize(1540, 7);
        let answer = too_big(&packet, 1300).unwrap();
        assert_eq!(answer.len(), 1280);
        assert_eq!(answer[40..42], [2, 0]);
        assert_eq!(answer[44..48], 1300_u32.to_be_bytes());
        let length = 1240_u16.to_be_bytes();
        let sum = internet_checksum(&[&answer[8..40], &length, &[0, 58], &answer[40..]]);
        assert_eq!(sum, 0);
    }

    #[test]
    fn errors_are_not_answered_with_errors() {
        assert!(too_big(&v4(1, 3), 900).is_none(), "an ICMP error");
        assert!(too_big(&v4(1, 8), 900).is_some(), "an echo request");
        let mut fragment = v4(17, 0);
        fragment[7] = 4;
        assert!(too_big(&fragment, 900).is_none());
        let mut multicast = v4(17, 0);
        multicast[16] = 224;
        assert!(too_big(&multicast, 900).is_none());
    }
}
