//! Several SAs of one child: each packet goes out by the one that was negotiated for it.

use std::net::{IpAddr, Ipv4Addr};

use proptest::prelude::*;

use super::*;

/// What an SA is for: a remote range, one port or all of them, and the last byte of its peer's address.
#[derive(Clone, Copy, Debug)]
struct Line {
    remote: (Ipv4Addr, Ipv4Addr),
    port: Option<u16>,
    peer: u8,
}

fn line(first: [u8; 4], last: [u8; 4], peer: u8) -> Line {
    Line {
        remote: (first.into(), last.into()),
        port: None,
        peer,
    }
}

/// Gateway A, whose child reaches everything in 10.0.0.0/8.
fn hub() -> Gateway {
    let mut gateway = Gateway::with_room_for(1, 2, 600);
    let mut spec = tunnel_spec(1, 2);
    spec.children[0].selectors.remote =
        network_of(([10, 0, 0, 0].into(), [10, 255, 255, 255].into()), None);
    gateway.tunnel = gateway.tables.set_tunnel(&spec, 41, 1400);
    gateway
}

fn network_of(range: (Ipv4Addr, Ipv4Addr), port: Option<u16>) -> Vec<TrafficSelector> {
    vec![TrafficSelector {
        protocol: port.map_or(0, |_| 17),
        ports: port.map_or((0, u16::MAX), |port| (port, port)),
        addresses: (range.0.into(), range.1.into()),
    }]
}

fn install(gateway: &Gateway, id: u64, line: Line) {
    let mut spec = Gateway::spec(
        Direction::Outbound,
        GCM,
        outer(1, line.peer, false, false),
        false,
    );
    spec.id = SaId(id);
    spec.spi = Spi(u32::try_from(id).unwrap());
    spec.selectors.remote = network_of(line.remote, line.port);
    gateway.tables.install(&spec).unwrap();
}

/// The peer that a packet to an address and port goes to.
fn peer(gateway: &Gateway, to: Ipv4Addr, port: u16) -> Result<IpAddr, Reason> {
    let [high, low] = port.to_be_bytes();
    let packet = ipv4(
        [10, 1, 0, 9],
        to.octets(),
        17,
        &[0, 7, high, low, 0, 8, 0, 0],
    );
    match gateway.seal(&mut frame(&packet), Origin::Slow) {
        Outbound::Send(sealed) => Ok(sealed.outer.remote),
        Outbound::Drop(reason) => Err(reason),
        other => panic!("{other:?}"),
    }
}

fn at(peer: u8) -> Result<IpAddr, Reason> {
    Ok(Ipv4Addr::new(192, 0, 2, peer).into())
}

#[test]
fn two_pairs_of_one_child_each_get_their_own_packets() {
    let hub = hub();
    install(&hub, 1, line([10, 2, 0, 0], [10, 2, 0, 255], 2));
    install(&hub, 2, line([10, 3, 0, 0], [10, 3, 0, 255], 3));
    assert_eq!(peer(&hub, [10, 2, 0, 9].into(), 1), at(2));
    assert_eq!(peer(&hub, [10, 3, 0, 9].into(), 1), at(3));
    assert_eq!(
        peer(&hub, [10, 4, 0, 9].into(), 1),
        Err(Reason::OutboundSelectors)
    );
    assert!(hub.tables.remove(SaId(1)));
    assert_eq!(
        peer(&hub, [10, 2, 0, 9].into(), 1),
        Err(Reason::OutboundSelectors)
    );
    assert_eq!(peer(&hub, [10, 3, 0, 9].into(), 1), at(3));
}

#[test]
fn the_most_specific_selectors_take_a_packet_whichever_came_first() {
    let wide = line([10, 0, 0, 0], [10, 255, 255, 255], 2);
    let narrow = line([10, 3, 0, 0], [10, 3, 0, 255], 3);
    let web = Line {
        port: Some(443),
        ..line([10, 3, 0, 0], [10, 3, 0, 255], 4)
    };
    for order in [
        [wide, narrow, web],
        [web, narrow, wide],
        [narrow, web, wide],
    ] {
        let hub = hub();
        for (id, line) in (1..).zip(order) {
            install(&hub, id, line);
        }
        assert_eq!(peer(&hub, [10, 2, 0, 9].into(), 443), at(2));
        assert_eq!(peer(&hub, [10, 3, 0, 9].into(), 80), at(3));
        assert_eq!(peer(&hub, [10, 3, 0, 9].into(), 443), at(4));
    }
}

#[test]
fn rekeying_one_pair_moves_its_packets_alone() {
    let hub = hub();
    install(&hub, 1, line([10, 2, 0, 0], [10, 2, 0, 255], 2));
    install(&hub, 2, line([10, 3, 0, 0], [10, 3, 0, 255], 3));
    install(&hub, 3, line([10, 2, 0, 0], [10, 2, 0, 255], 22));
    assert_eq!(peer(&hub, [10, 2, 0, 9].into(), 1), at(22));
    assert_eq!(peer(&hub, [10, 3, 0, 9].into(), 1), at(3));
    assert!(hub.tables.remove(SaId(1)));
    assert_eq!(peer(&hub, [10, 2, 0, 9].into(), 1), at(22));
    install(&hub, 4, line([10, 2, 0, 0], [10, 2, 0, 255], 23));
    assert!(hub.tables.remove(SaId(4)));
    assert_eq!(
        peer(&hub, [10, 2, 0, 9].into(), 1),
        at(22),
        "the older one steps in"
    );
}

#[test]
fn an_sa_that_moves_keeps_its_packets_and_so_do_the_others() {
    let hub = hub();
    install(&hub, 1, line([10, 2, 0, 0], [10, 2, 0, 255], 2));
    install(&hub, 2, line([10, 3, 0, 0], [10, 3, 0, 255], 3));
    hub.tables
        .move_outer(SaId(1), outer(1, 99, false, false))
        .unwrap();
    assert_eq!(peer(&hub, [10, 2, 0, 9].into(), 1), at(99));
    assert_eq!(peer(&hub, [10, 3, 0, 9].into(), 1), at(3));
}

#[test]
fn hundreds_of_peers_under_one_child_get_their_own_packets() {
    let hub = hub();
    let places = || (0..500_u16).map(|number| (number, number.to_be_bytes()));
    for (number, [high, low]) in places() {
        install(
            &hub,
            u64::from(number) + 1,
            line([10, 9, high, low], [10, 9, high, low], low),
        );
    }
    for (_, [high, low]) in places() {
        assert_eq!(peer(&hub, [10, 9, high, low].into(), 1), at(low));
    }
}

#[test]
fn settings_change_the_outer_headers_of_every_sa() {
    let hub = hub();
    install(&hub, 1, line([10, 2, 0, 0], [10, 2, 0, 255], 2));
    install(&hub, 2, line([10, 2, 0, 0], [10, 2, 0, 255], 3));
    let mut spec = tunnel_spec(1, 2);
    spec.df = Df::Set;
    hub.tables.set_tunnel(&spec, 41, 1400);
    assert!(hub.tables.remove(SaId(2)));
    let packet = ipv4([10, 1, 0, 9], [10, 2, 0, 9], 17, &[0; 8]);
    let mut frame = frame(&packet);
    let sealed = sent(hub.seal(&mut frame, Origin::Slow));
    assert_eq!(frame[sealed.start + 6], 0x40);
}

fn lines() -> impl Strategy<Value = Vec<Line>> {
    let line = (any::<u8>(), 24..=32_u32, any::<bool>(), any::<u8>()).prop_map(
        |(address, length, one_port, peer)| {
            let free = u32::MAX.checked_shr(length).unwrap_or(0);
            let first = Ipv4Addr::new(10, 2, 0, address).to_bits() & !free;
            Line {
                remote: (first.into(), (first | free).into()),
                port: one_port.then_some(443),
                peer,
            }
        },
    );
    proptest::collection::vec(line, 1..12)
}

proptest! {
    #[test]
    fn the_choice_is_the_narrowest_match_and_of_equal_ones_the_newest(lines in lines(), to: u8, port in prop_oneof![Just(80_u16), Just(443)]) {
        let hub = hub();
        for (id, line) in (1..).zip(&lines) {
            install(&hub, id, *line);
        }
        let to = Ipv4Addr::new(10, 2, 0, to);
        let expected = lines
            .iter()
            .rev()
            .filter(|line| (line.remote.0..=line.remote.1).contains(&to))
            .filter(|line| line.port.is_none_or(|own| own == port))
            // The first of the least, hence the newest.
            .min_by_key(|line| (line.remote.1.to_bits() - line.remote.0.to_bits(), line.port.is_none()));
        let expected = expected.map_or(Err(Reason::OutboundSelectors), |line| at(line.peer));
        prop_assert_eq!(peer(&hub, to, port), expected);
    }
}
