//! Tests of the classification on frames built field by field.

use std::{vec, vec::Vec};

use proptest::prelude::*;

use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ESP: &[u8] = &[0, 0, 1, 2, 0, 0, 0, 9, 7, 7, 7, 7];

pub(super) fn ethernet(tags: &[(u16, u16)], ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = [MAC, [2, 0, 0, 0, 0, 2]].concat();
    for (kind, id) in tags {
        frame.extend(kind.to_be_bytes());
        frame.extend((0x2000 | id).to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
    frame
}

pub(super) fn v4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut packet = vec![
        0x45, 0, length[0], length[1], 0, 0, 0x40, 0, 64, protocol, 0, 0,
    ];
    packet.extend([10, 1, 0, 1, 192, 0, 2, 1]);
    packet.extend(payload);
    packet
}

fn v6(next_header: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    let mut packet = vec![0x60, 0, 0, 0, length[0], length[1], next_header, 64];
    for last in [1, 2] {
        packet.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
    }
    packet.extend(payload);
    packet
}

pub(super) fn udp(port: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).unwrap();
    let mut datagram = [9999, port, length, 0].map(u16::to_be_bytes).concat();
    datagram.extend(payload);
    datagram
}

fn outline(frame: &[u8]) -> Outline {
    Outline::of(frame).expect("an IP packet")
}

#[test]
fn esp_is_found_bare_and_in_udp_over_both_families_and_behind_tags() {
    let in_udp = udp(4500, ESP);
    let two_tags = [(0x88a8, 7), (0x8100, 8)];
    let cases = [
        (ethernet(&[], 0x0800, &v4(50, ESP)), 34),
        (ethernet(&[], 0x0800, &v4(17, &in_udp)), 42),
        (ethernet(&[], 0x86dd, &v6(50, ESP)), 54),
        (ethernet(&[(0x8100, 7)], 0x0800, &v4(50, ESP)), 38),
        (ethernet(&two_tags, 0x86dd, &v6(17, &in_udp)), 70),
    ];
    for (frame, offset) in cases {
        let found = outline(&frame).esp(frame.as_slice(), 4500);
        assert_eq!(found, Some(([0, 0, 1, 2], offset)));
    }
}

#[test]
fn ike_keep_alives_and_other_ports_are_no_esp() {
    for datagram in [
        udp(4500, &[0; 32]),
        udp(4500, &[0xff]),
        udp(500, ESP),
        udp(4500, &ESP[..4]),
    ] {
        // Ethernet pads short frames.
        let mut frame = ethernet(&[], 0x0800, &v4(17, &datagram));
        frame.resize(frame.len().max(60), 0xaa);
        assert_eq!(outline(&frame).esp(frame.as_slice(), 4500), None);
    }
}

#[test]
fn tags_are_told_by_their_ids() {
    let two_tags = [(0x88a8, 7), (0x8100, 8)];
    let frame = ethernet(&two_tags, 0x0800, &v4(6, &[0; 20]));
    assert_eq!(outline(&frame).vlan, (7, 8));
    assert_eq!(outline(&frame).network, 22);
    let frame = ethernet(&[(0x8100, 0)], 0x0800, &v4(6, &[0; 20]));
    assert_eq!(outline(&frame).vlan, (0, 0), "a priority tag only");
}

#[test]
fn addresses_and_ports_are_read_in_network_order() {
    let frame = ethernet(&[], 0x0800, &v4(17, &udp(53, &[1])));
    let outline = outline(&frame);
    let mapped = |text: &str| crate::maps::mapped(text.parse().unwrap());
    assert_eq!(outline.source, mapped("10.1.0.1"));
    assert_eq!(outline.destination, mapped("192.0.2.1"));
    let ports = outline.ports(frame.as_slice());
    assert_eq!(ports, (9999_u16.to_be_bytes(), 53_u16.to_be_bytes()));
}

#[test]
fn what_workers_do_not_carry_has_its_reason() {
    let plain = v4(17, &udp(53, &[1]));
    let altered = |at: usize, byte: u8| {
        let mut packet = plain.clone();
        packet[at] = byte;
        outline(&ethernet(&[], 0x0800, &packet)).slow()
    };
    assert_eq!(altered(6, 0x40), None, "do not fragment");
    assert_eq!(altered(6, 0x20), Some(Reason::SlowFragment), "the first");
    assert_eq!(altered(7, 1), Some(Reason::SlowFragment), "a later one");
    assert_eq!(altered(0, 0x46), Some(Reason::SlowOptions));
    assert_eq!(altered(8, 1), Some(Reason::SlowTtl));
    let of_v6 = |next| outline(&ethernet(&[], 0x86dd, &v6(next, &[0; 16]))).slow();
    assert_eq!(of_v6(6), None);
    assert_eq!(of_v6(44), Some(Reason::SlowFragment));
    assert_eq!(of_v6(60), Some(Reason::SlowOptions));
}

#[test]
fn multicast_link_local_and_contradictions_are_the_kernels_business() {
    let mut frame = ethernet(&[], 0x0800, &v4(6, &[0; 20]));
    frame[0] |= 1;
    let of = |ethertype, packet: &[u8]| Outline::of(ethernet(&[], ethertype, packet).as_slice());
    assert_eq!(Outline::of(frame.as_slice()), None, "a group of Ethernet");
    let mut group = v4(17, &[0; 20]);
    group[16] = 224;
    assert_eq!(of(0x0800, &group), None);
    let mut local = v6(17, &[0; 20]);
    local[24..26].copy_from_slice(&[0xfe, 0x80]);
    assert_eq!(of(0x86dd, &local), None);
    let mut long = v4(17, &[0; 20]);
    long[3] += 1;
    assert_eq!(of(0x0800, &long), None, "longer than its frame");
    assert_eq!(of(0x0806, &[0; 28]), None, "ARP");
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_panic_and_offsets_lie_inside(
        mut frame in proptest::collection::vec(any::<u8>(), 0..120),
        kind in prop_oneof![Just(0x0800_u16), Just(0x86dd), Just(0x8100), any::<u16>()],
        first in prop_oneof![Just(0x45_u8), Just(0x60), any::<u8>()],
    ) {
        if frame.len() > 14 {
            frame[12..14].copy_from_slice(&kind.to_be_bytes());
            frame[14] = first;
            frame[0] &= 0xfe;
        }
        if let Some(outline) = Outline::of(frame.as_slice()) {
            prop_assert!(outline.network + usize::from(outline.bytes) <= frame.len());
            prop_assert!(outline.transport < 256);
            if let Some((_, at)) = outline.esp(frame.as_slice(), 4500) {
                prop_assert!(at + 8 <= frame.len());
            }
        }
    }
}
