//! Ethernet and VLAN headers before packets that leave, and checksums that a virtual interface left unfinished.

use super::next_hop::NextHop;

const TAG: [u8; 2] = [0x81, 0x00];
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];

/// Writes the Ethernet header, with its VLAN tag, before the IP packet at `network` in `frame`. Returns where it starts;
/// `None` where there is no room or no IP packet.
pub fn write_header(frame: &mut [u8], network: usize, hop: &NextHop) -> Option<usize> {
    let ethertype = match frame.get(network)? >> 4 {
        4 => IPV4,
        6 => IPV6,
        _ => return None,
    };
    let start = network.checked_sub(if hop.vlan.is_some() { 18 } else { 14 })?;
    let header = frame.get_mut(start..network)?;
    let (destination, rest) = header.split_first_chunk_mut::<6>()?;
    let (source, rest) = rest.split_first_chunk_mut::<6>()?;
    *destination = hop.destination;
    *source = hop.source;
    if let Some(vlan) = hop.vlan {
        rest.get_mut(0..2)?.copy_from_slice(&TAG);
        rest.get_mut(2..4)?.copy_from_slice(&vlan.to_be_bytes());
    }
    rest.last_chunk_mut::<2>()?.copy_from_slice(&ethertype);
    Some(start)
}

/// Completes the checksum of a TCP or UDP packet that holds only the sum of the pseudo-header, as a veth or tap hands it
/// on for a NIC to complete. Any other packet stays as it is.
///
/// A complete checksum that happens to equal that sum is right already, and completing it makes it the same again.
pub fn complete_checksum(packet: &mut [u8]) {
    let _ = try_complete(packet);
}

fn try_complete(packet: &mut [u8]) -> Option<()> {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    let (transport, end, protocol, addresses) = match packet.first()? >> 4 {
        4 => {
            let fragment = be16(packet, 6)? & 0x3fff != 0;
            let start = usize::from(packet.first()? & 0xf) * 4;
            let protocol = *packet.get(9)?;
            (!fragment).then_some((start, usize::from(be16(packet, 2)?), protocol, 12..20))?
        }
        6 => (
            40,
            40 + usize::from(be16(packet, 4)?),
            *packet.get(6)?,
            8..40,
        ),
        _ => return None,
    };
    let field = match protocol {
        TCP => 16,
        UDP => 6,
        _ => return None,
    };
    let addresses = sum(packet.get(addresses)?);
    let segment = packet.get_mut(transport..end)?;
    let length = u32::try_from(segment.len()).ok()?;
    let pseudo = fold(addresses + u64::from(protocol) + u64::from(length));
    if be16(segment, field)? != pseudo {
        return None;
    }
    // The field itself is part of the sum: it stands for the pseudo-header.
    let checksum = match !fold(sum(segment)) {
        // RFC 768: a computed zero is sent as all ones, because zero means none.
        0 if protocol == UDP => 0xffff,
        checksum => checksum,
    };
    segment
        .get_mut(field..field + 2)?
        .copy_from_slice(&checksum.to_be_bytes());
    Some(())
}

fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<2>();
    let words: u64 = words
        .iter()
        .map(|word| u64::from(u16::from_be_bytes(*word)))
        .sum();
    words + rest.first().map_or(0, |last| u64::from(*last) << 8)
}

#[expect(clippy::cast_possible_truncation, reason = "folded below 2^16")]
fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn be16(packet: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An IP packet of either family with a TCP or UDP header whose checksum is 0.
    fn packet(v6: bool, udp: bool, payload: &[u8]) -> (Vec<u8>, usize) {
        let header = if udp { 8 } else { 20 };
        let length = u16::try_from(header + payload.len()).unwrap();
        let protocol = if udp { 17 } else { 6 };
        let mut packet = if v6 {
            let mut ip = vec![0x60, 0, 0, 0];
            ip.extend(length.to_be_bytes());
            ip.extend([protocol, 64]);
            ip.extend([0x20; 32]);
            ip
        } else {
            let mut ip = vec![0x45, 0];
            ip.extend((length + 20).to_be_bytes());
            ip.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
            ip.extend([10, 0, 0, 1, 192, 168, 255, 2]);
            ip
        };
        let transport = packet.len();
        packet.resize(transport + header, 0);
        packet.extend(payload);
        (packet, transport + if udp { 6 } else { 16 })
    }

    fn pseudo(packet: &[u8], v6: bool) -> u16 {
        let (addresses, transport, protocol) = if v6 { (8..40, 40, 6) } else { (12..20, 20, 9) };
        let length = (packet.len() - transport) as u64;
        fold(sum(&packet[addresses]) + u64::from(packet[protocol]) + length)
    }

    fn verifies(packet: &[u8], v6: bool) -> bool {
        let transport = if v6 { 40 } else { 20 };
        fold(sum(&packet[transport..]) + u64::from(pseudo(packet, v6))) == 0xffff
    }

    proptest! {
        #[test]
        fn a_pseudo_header_sum_becomes_a_checksum_that_verifies(
            v6: bool, udp: bool, payload in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let (mut packet, field) = packet(v6, udp, &payload);
            let partial = pseudo(&packet, v6);
            packet[field..field + 2].copy_from_slice(&partial.to_be_bytes());
            complete_checksum(&mut packet);
            prop_assert!(verifies(&packet, v6));
            let complete = packet.clone();
            complete_checksum(&mut packet);
            prop_assert_eq!(packet, complete);
        }

        #[test]
        fn any_bytes_are_survived(mut bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            complete_checksum(&mut bytes);
        }
    }

    #[test]
    fn a_wrong_checksum_stays_wrong() {
        let (mut packet, field) = packet(false, false, b"payload");
        packet[field] ^= 0x55;
        let before = packet.clone();
        complete_checksum(&mut packet);
        assert_eq!(packet, before);
    }

    #[test]
    fn the_header_names_the_neighbour_the_vlan_and_the_protocol() {
        let mut hop = NextHop {
            ifindex: 1,
            source: [1; 6],
            destination: [2; 6],
            vlan: None,
            mtu: 1500,
        };
        let mut frame = [0x45; 64];
        assert_eq!(write_header(&mut frame, 40, &hop), Some(26));
        assert_eq!(
            frame[26..40],
            *b"\x02\x02\x02\x02\x02\x02\x01\x01\x01\x01\x01\x01\x08\x00"
        );
        hop.vlan = Some(100);
        frame[40] = 0x60;
        assert_eq!(write_header(&mut frame, 40, &hop), Some(22));
        assert_eq!(frame[34..40], *b"\x81\x00\x00\x64\x86\xdd");
        assert_eq!(write_header(&mut frame, 17, &hop), None);
    }
}
