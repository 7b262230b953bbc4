//! Cutting IP packets into fragments: inner ones that may be fragmented, and outer ones that must be.

use super::inner::internet_checksum;

const FRAGMENT_HEADER: u8 = 44;

/// Cuts an IPv4 packet into fragments of at most `mtu` bytes, in order. `None` if it must not or cannot be cut.
// RFC 791 section 3.2: fragments carry multiples of 8 bytes, all but the last one.
pub fn fragment_v4(packet: &[u8], mtu: usize) -> Option<Vec<Vec<u8>>> {
    let header_bytes = usize::from(packet.first()? & 0x0f) * 4;
    let (header, payload) = packet.split_at_checked(header_bytes.max(20))?;
    let field = u16::from_be_bytes([header[6], header[7]]);
    let (df, more, offset) = (field & 0x4000 != 0, field & 0x2000, field & 0x1fff);
    let room = mtu.checked_sub(header.len())? & !7;
    if df || room == 0 {
        return None;
    }
    let chunks = payload.chunks(room);
    let last = chunks.len().checked_sub(1)?;
    let mut fragments = Vec::with_capacity(chunks.len());
    for (number, chunk) in chunks.enumerate() {
        let mut fragment = header.to_vec();
        if number > 0 {
            blank_uncopied_options(fragment.get_mut(20..)?);
        }
        let here = offset.checked_add(u16::try_from(number * room / 8).ok()?)?;
        let flags = if number < last { 0x2000 } else { more };
        let length = u16::try_from(header.len() + chunk.len()).ok()?;
        fragment[2..4].copy_from_slice(&length.to_be_bytes());
        fragment[6..8].copy_from_slice(&(flags | here).to_be_bytes());
        fragment[10..12].fill(0);
        let checksum = internet_checksum(&[&fragment]);
        fragment[10..12].copy_from_slice(&checksum.to_be_bytes());
        fragment.extend_from_slice(chunk);
        fragments.push(fragment);
    }
    Some(fragments)
}

/// Turns options that belong into the first fragment only into padding.
// RFC 791 section 3.1: the high bit of an option's type says that all fragments carry it.
fn blank_uncopied_options(mut options: &mut [u8]) {
    const END: u8 = 0;
    const NOP: u8 = 1;
    while let Some(&kind) = options.first() {
        let bytes = match kind {
            END => return,
            NOP => 1,
            _ => usize::from(options.get(1).copied().unwrap_or_default()).max(2),
        };
        let Some((option, rest)) = options.split_at_mut_checked(bytes) else {
            return;
        };
        if kind & 0x80 == 0 {
            option.fill(NOP);
        }
        options = rest;
    }
}

/// Cuts an outer IPv6 packet without extension headers into fragments of at most `mtu` bytes, in order.
// RFC 8200 section 4.5: only the source may do this, which of an outer packet we are.
pub fn fragment_v6(packet: &[u8], mtu: usize, id: u32) -> Option<Vec<Vec<u8>>> {
    let (header, payload) = packet.split_first_chunk::<40>()?;
    let room = mtu.checked_sub(48)? & !7;
    if room == 0 {
        return None;
    }
    let chunks = payload.chunks(room);
    let last = chunks.len().checked_sub(1)?;
    let mut fragments = Vec::with_capacity(chunks.len());
    for (number, chunk) in chunks.enumerate() {
        let mut fragment = header.to_vec();
        let offset = u16::try_from(number * room).ok()?;
        let length = u16::try_from(8 + chunk.len()).ok()?;
        fragment[4..6].copy_from_slice(&length.to_be_bytes());
        fragment[6] = FRAGMENT_HEADER;
        fragment.extend([header[6], 0]);
        fragment.extend((offset | u16::from(number < last)).to_be_bytes());
        fragment.extend(id.to_be_bytes());
        fragment.extend_from_slice(chunk);
        fragments.push(fragment);
    }
    Some(fragments)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::xdp::inner::Inner;

    fn packet(options: &[u8], payload: usize) -> Vec<u8> {
        let header = u8::try_from(20 + options.len()).unwrap();
        let length = u16::try_from(usize::from(header) + payload).unwrap();
        let mut packet = vec![0x40 | (header / 4), 0];
        packet.extend(length.to_be_bytes());
        packet.extend([0, 7, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        packet.extend(options);
        packet.extend((0..payload).map(|byte| u8::try_from(byte % 251).unwrap()));
        packet
    }

    #[test]
    fn fragments_put_together_are_the_packet() {
        for (payload, mtu) in [(3000, 1400), (2760, 1400), (100, 28), (9, 1000)] {
            let whole = packet(&[], payload);
            let mut data = Vec::new();
            let fragments = fragment_v4(&whole, mtu).unwrap();
            for (number, fragment) in fragments.iter().enumerate() {
                assert!(fragment.len() <= mtu);
                assert_eq!(internet_checksum(&[&fragment[..20]]), 0);
                let field = u16::from_be_bytes([fragment[6], fragment[7]]);
                assert_eq!(usize::from(field & 0x1fff) * 8, data.len());
                assert_eq!(field & 0x2000 != 0, number + 1 < fragments.len());
                assert!(Inner::parse(fragment).is_ok());
                data.extend_from_slice(&fragment[20..]);
            }
            assert_eq!(data, whole[20..]);
        }
    }

    #[test]
    fn options_for_the_first_fragment_are_padding_in_the_others() {
        let options = [0x07, 4, 4, 0, 0x88, 4, 1, 2];
        let fragments = fragment_v4(&packet(&options, 100), 76).unwrap();
        assert_eq!(fragments[0][20..28], options);
        assert_eq!(fragments[1][20..28], [1, 1, 1, 1, 0x88, 4, 1, 2]);
    }

    #[test]
    fn a_packet_that_must_not_be_fragmented_is_not() {
        let mut whole = packet(&[], 100);
        whole[6] = 0x40;
        assert!(fragment_v4(&whole, 60).is_none());
        assert!(fragment_v4(&packet(&[], 100), 20).is_none());
    }

    #[test]
    fn outer_ipv6_fragments_carry_all_bytes_in_order() {
        let mut whole = vec![0x60, 0, 0, 0, 7, 208, 50, 64];
        whole.extend([1; 32]);
        whole.extend((0..2000).map(|byte| u8::try_from(byte % 251).unwrap()));
        let mut data = Vec::new();
        for fragment in fragment_v6(&whole, 1280, 9).unwrap() {
            assert!(fragment.len() <= 1280);
            assert_eq!((fragment[6], fragment[40]), (44, 50));
            let offset = u16::from_be_bytes([fragment[42], fragment[43]]) & !7;
            assert_eq!(usize::from(offset), data.len());
            data.extend_from_slice(&fragment[48..]);
        }
        assert_eq!(data, whole[40..]);
    }
}
