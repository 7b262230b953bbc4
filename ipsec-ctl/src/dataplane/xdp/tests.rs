//! The pipeline from end to end: what one gateway seals another one opens, and what it must refuse.

mod fast;
mod senders;

use std::{net::IpAddr, ops::Range, sync::Arc};

use ipsec_common::{Reason, Spi, TrafficSelector};
use tokio::sync::mpsc;

use super::{
    events::Events,
    inbound::{Arrival, Inbound, InboundPipeline},
    inner::{Inner, internet_checksum},
    outbound::{HEADROOM, Outbound, OutboundPipeline, TAILROOM},
    prefetch::{Hints, Places},
    sa::Origin,
    table::{Tables, Tunnel},
    words::WordsArray,
};
use crate::{
    dataplane::{
        routing::{RoutesMode, RoutingSpec},
        seam::{
            ChildId, ChildTrap, Df, Direction, EngineChoice, Event, FastPath, Lifetime,
            LifetimeKind, Mode, NicOffload, Outer, Rejected, SaId, SaSpec, SelectorPair, TunnelId,
            TunnelSpec, UdpEncap,
        },
    },
    esp::{EspKeys, EspSuite, Integrity},
};

const NO_LIMIT: Lifetime = Lifetime {
    soft_packets: u64::MAX,
    hard_packets: u64::MAX,
    soft_bytes: u64::MAX,
    hard_bytes: u64::MAX,
    expires: None,
};
const GCM: EspSuite = EspSuite::Aes256Gcm16;

/// One gateway: A has 10.1.0.0/24 and 2001:db8:1::/64, B the same with 2.
struct Gateway {
    tables: Arc<Tables>,
    tunnel: Arc<Tunnel>,
    outbound: OutboundPipeline,
    inbound: InboundPipeline,
    events: mpsc::Receiver<Event>,
}

fn network(number: u8) -> Vec<TrafficSelector> {
    let range = |first: String, last: String| TrafficSelector {
        protocol: 0,
        ports: (0, u16::MAX),
        addresses: (first.parse().unwrap(), last.parse().unwrap()),
    };
    vec![
        range(format!("10.{number}.0.0"), format!("10.{number}.0.255")),
        range(
            format!("2001:db8:{number}::"),
            format!("2001:db8:{number}::ffff"),
        ),
    ]
}

fn selectors(local: u8, remote: u8) -> SelectorPair {
    SelectorPair {
        local: network(local),
        remote: network(remote),
    }
}

fn tunnel_spec(local: u8, remote: u8) -> TunnelSpec {
    TunnelSpec {
        id: TunnelId(1),
        name: "office".into(),
        device: "office".into(),
        mtu: None,
        engine: EngineChoice::Xdp,
        fast_path: FastPath::Auto,
        offload: NicOffload::Off,
        mode: Mode::Tunnel,
        policy_based: false,
        df: Df::Copy,
        clamp_mss: true,
        copy_dscp: true,
        children: vec![ChildTrap {
            id: ChildId(0),
            name: "net".into(),
            selectors: selectors(local, remote),
            on_demand: true,
        }],
        routing: RoutingSpec {
            mode: RoutesMode::Manual,
            remote: vec![],
            local: vec![],
            peers: Vec::new(),
            anywhere: false,
            outer_local: None,
            addresses: vec![],
            bypass: vec![],
        },
    }
}

fn outer(local: u8, remote: u8, v6: bool, encap: bool) -> Outer {
    let address = |host: u8| -> IpAddr {
        if v6 {
            format!("2001:db8:ff::{host}").parse().unwrap()
        } else {
            format!("192.0.2.{host}").parse().unwrap()
        }
    };
    Outer {
        local: address(local),
        remote: address(remote),
        encap: encap.then_some(UdpEncap {
            local_port: 4500,
            remote_port: 4500,
        }),
    }
}

fn keys(suite: EspSuite) -> EspKeys {
    let (cipher, integrity) = match suite {
        EspSuite::Aes128Gcm16 => (20, 0),
        EspSuite::Aes256Gcm16 | EspSuite::ChaCha20Poly1305 => (36, 0),
        EspSuite::AesCbc {
            key_bytes,
            integrity,
        } => (
            usize::from(key_bytes),
            match integrity {
                Integrity::HmacSha256 => 32,
                Integrity::HmacSha384 => 48,
                Integrity::HmacSha512 => 64,
            },
        ),
    };
    EspKeys {
        cipher: vec![7; cipher].into(),
        integrity: vec![9; integrity].into(),
    }
}

impl Gateway {
    fn new(local: u8, remote: u8) -> Self {
        Self::with_room_for(local, remote, 8)
    }

    fn with_room_for(local: u8, remote: u8, sas: u32) -> Self {
        let (events, receiver) = Events::channel(16);
        let tables = Arc::new(Tables::new(WordsArray::anonymous(sas).unwrap()));
        let tunnel = tables.set_tunnel(&tunnel_spec(local, remote), 40 + u32::from(local), 1400);
        Self {
            outbound: OutboundPipeline::new(events.clone()),
            inbound: InboundPipeline::new(Arc::clone(&tables), events),
            tables,
            tunnel,
            events: receiver,
        }
    }

    fn spec(direction: Direction, suite: EspSuite, outer: Outer, esn: bool) -> SaSpec {
        let (local, remote) = match direction {
            Direction::Outbound => (1, 2),
            Direction::Inbound => (2, 1),
        };
        SaSpec {
            id: SaId(u64::from(local)),
            tunnel: TunnelId(1),
            child: ChildId(0),
            direction,
            spi: Spi(0x1234_5678),
            suite,
            keys: keys(suite),
            esn,
            replay_window: 4096,
            outer,
            selectors: selectors(local, remote),
            lifetime: NO_LIMIT,
        }
    }

    fn seal(&self, frame: &mut [u8], origin: Origin) -> Outbound {
        let inner = HEADROOM..frame.len() - TAILROOM;
        self.outbound.process(&self.tunnel, frame, inner, origin, 1)
    }

    fn open(&self, frame: &mut [u8], packet: Range<usize>, outer: &Outer) -> Inbound {
        let headers = if outer.local.is_ipv6() { 40 } else { 20 };
        let udp = if outer.encap.is_some() { 8 } else { 0 };
        let tos = if outer.local.is_ipv6() {
            frame[packet.start] << 4 | frame[packet.start + 1] >> 4
        } else {
            frame[packet.start + 1]
        };
        let arrival = Arrival {
            source: (outer.local, outer.encap.map_or(0, |encap| encap.local_port)).into(),
            destination: outer.remote,
            tos,
            slot: None,
        };
        let esp = packet.start + headers + udp..packet.end;
        self.inbound.process(frame, esp, &arrival, Origin::Slow, 1)
    }
}

/// A pair with one SA from A to B.
fn pair(suite: EspSuite, v6: bool, encap: bool, esn: bool) -> (Gateway, Gateway, Outer) {
    let (a, b) = (Gateway::new(1, 2), Gateway::new(2, 1));
    let there = outer(1, 2, v6, encap);
    a.tables
        .install(&Gateway::spec(Direction::Outbound, suite, there, esn))
        .unwrap();
    let back = outer(2, 1, v6, encap);
    b.tables
        .install(&Gateway::spec(Direction::Inbound, suite, back, esn))
        .unwrap();
    (a, b, there)
}

fn frame(packet: &[u8]) -> Vec<u8> {
    [&[0; HEADROOM], packet, &[0; TAILROOM]].concat()
}

fn ipv4(source: [u8; 4], destination: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut packet = vec![
        0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, protocol, 0, 0,
    ];
    packet.extend(source);
    packet.extend(destination);
    let checksum = internet_checksum(&[&packet]).to_be_bytes();
    packet[10..12].copy_from_slice(&checksum);
    packet.extend(payload);
    packet
}

fn ipv6(payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    let mut packet = vec![0x60, 0, 0, 0, length[0], length[1], 17, 64];
    packet.extend(
        "2001:db8:1::9"
            .parse::<std::net::Ipv6Addr>()
            .unwrap()
            .octets(),
    );
    packet.extend(
        "2001:db8:2::9"
            .parse::<std::net::Ipv6Addr>()
            .unwrap()
            .octets(),
    );
    packet.extend(payload);
    packet
}

fn ping() -> Vec<u8> {
    ipv4(
        [10, 1, 0, 9],
        [10, 2, 0, 9],
        1,
        &[8, 0, 0xf7, 0xff, 0, 0, 0, 0],
    )
}

fn sent(verdict: Outbound) -> Range<usize> {
    match verdict {
        Outbound::Send(sealed) => sealed.packet,
        other => panic!("not sent: {other:?}"),
    }
}

fn delivered(verdict: Inbound, frame: &[u8]) -> Vec<u8> {
    match verdict {
        Inbound::Deliver { packet, .. } => frame[packet].to_vec(),
        other => panic!("not delivered: {other:?}"),
    }
}

fn dropped(verdict: &Inbound) -> Reason {
    match verdict {
        Inbound::Drop(reason) => *reason,
        other => panic!("not dropped: {other:?}"),
    }
}

#[test]
fn what_one_gateway_seals_the_other_opens() {
    let cbc = |key_bytes, integrity| EspSuite::AesCbc {
        key_bytes,
        integrity,
    };
    let suites = [
        EspSuite::Aes128Gcm16,
        GCM,
        EspSuite::ChaCha20Poly1305,
        cbc(16, Integrity::HmacSha256),
        cbc(24, Integrity::HmacSha384),
        cbc(32, Integrity::HmacSha512),
    ];
    let udp = [&[0, 7, 0, 8, 0, 100, 0, 0][..], &[1; 92]].concat();
    for suite in suites {
        for (v6, encap, esn) in [
            (false, false, false),
            (false, true, true),
            (true, false, true),
            (true, true, false),
        ] {
            let (a, b, outer) = pair(suite, v6, encap, esn);
            for inner in [ping(), ipv6(&udp)] {
                let mut frame = frame(&inner);
                let packet = sent(a.seal(&mut frame, Origin::Slow));
                assert_eq!(packet.len() % 4, 0);
                let opened = b.open(&mut frame, packet, &outer);
                assert_eq!(delivered(opened, &frame), inner, "{suite:?}");
            }
            let stats = b.tables.stats();
            assert_eq!(stats[0].slow.packets, 2);
            assert_eq!(stats[0].sequence, 2);
        }
    }
}

#[test]
fn a_replayed_packet_is_refused() {
    let (a, b, outer) = pair(GCM, false, false, false);
    let mut frame = frame(&ping());
    let packet = sent(a.seal(&mut frame, Origin::Slow));
    let mut copy = frame.clone();
    delivered(b.open(&mut frame, packet.clone(), &outer), &frame);
    assert_eq!(
        dropped(&b.open(&mut copy, packet, &outer)),
        Reason::Replayed
    );
    assert_eq!(b.tables.stats()[0].replayed, 1);
}

#[test]
fn a_forged_packet_is_refused_and_moves_no_window() {
    let (a, b, outer) = pair(GCM, false, false, false);
    let mut frame = frame(&ping());
    let packet = sent(a.seal(&mut frame, Origin::Slow));
    let mut forged = frame.clone();
    forged[packet.start + 20 + 5] ^= 1; // a sequence number far ahead
    assert_eq!(
        dropped(&b.open(&mut forged, packet.clone(), &outer)),
        Reason::BadIcv
    );
    assert_eq!(b.tables.stats()[0].forged, 1);
    delivered(b.open(&mut frame, packet, &outer), &frame);
}

#[test]
fn an_unknown_spi_is_dropped_and_reported_once_a_second() {
    let (a, mut b, outer) = pair(GCM, false, false, false);
    for _ in 0..2 {
        let mut frame = frame(&ping());
        let packet = sent(a.seal(&mut frame, Origin::Slow));
        frame[packet.start + 20] ^= 1;
        assert_eq!(
            dropped(&b.open(&mut frame, packet, &outer)),
            Reason::UnknownSpi
        );
    }
    assert!(matches!(
        b.events.try_recv(),
        Ok(Event::UnknownSpi {
            spi: Spi(0x1334_5678),
            ..
        })
    ));
    assert!(b.events.try_recv().is_err());
}

#[test]
fn packets_outside_the_selectors_pass_in_neither_direction() {
    let (a, b, outer) = pair(GCM, false, false, false);
    let stray = ipv4([10, 9, 0, 9], [10, 2, 0, 9], 1, &[8; 8]);
    let verdict = a.seal(&mut frame(&stray), Origin::Slow);
    assert_eq!(verdict, Outbound::Drop(Reason::OutboundSelectors));
    // A peer that sends it all the same has other ideas of the selectors than we do.
    let mut spec = Gateway::spec(Direction::Outbound, GCM, outer, false);
    spec.selectors = selectors(9, 2);
    a.tables.remove(spec.id);
    a.tables.install(&spec).unwrap();
    let mut frame = frame(&stray);
    let packet = sent(a.seal(&mut frame, Origin::Slow));
    assert_eq!(
        dropped(&b.open(&mut frame, packet, &outer)),
        Reason::InboundSelectors
    );
}

#[test]
fn the_ttl_is_decremented_by_us_on_the_fast_path_only() {
    let (a, b, outer) = pair(GCM, false, false, false);
    for (origin, ttl) in [(Origin::Slow, 64), (Origin::Fast, 63)] {
        let mut frame = frame(&ping());
        let packet = sent(a.seal(&mut frame, origin));
        let inner = delivered(b.open(&mut frame, packet, &outer), &frame);
        assert_eq!(inner[8], ttl);
        assert_eq!(internet_checksum(&[&inner[..20]]), 0);
    }
    let mut last = ping();
    last[8] = 1;
    assert_eq!(
        a.seal(&mut frame(&last), Origin::Fast),
        Outbound::Drop(Reason::TtlExpired)
    );
}

#[test]
fn congestion_marks_pass_both_ways_through_the_tunnel() {
    let (a, b, outer) = pair(GCM, false, false, false);
    let with_tos = |tos: u8| {
        let mut packet = ping();
        packet[1] = tos;
        packet[10..12].fill(0);
        let checksum = internet_checksum(&[&packet[..20]]).to_be_bytes();
        packet[10..12].copy_from_slice(&checksum);
        frame(&packet)
    };
    let mut capable = with_tos(0xb8 | 2);
    let packet = sent(a.seal(&mut capable, Origin::Slow));
    assert_eq!(capable[packet.start + 1], 0xb8 | 2, "DSCP and ECN copied");
    capable[packet.start + 1] |= 3; // congestion on the way
    let inner = delivered(b.open(&mut capable, packet, &outer), &capable);
    assert_eq!(inner[1], 0xb8 | 3);
    assert_eq!(internet_checksum(&[&inner[..20]]), 0);
    let mut incapable = with_tos(0);
    let packet = sent(a.seal(&mut incapable, Origin::Slow));
    incapable[packet.start + 1] |= 3;
    assert_eq!(
        dropped(&b.open(&mut incapable, packet, &outer)),
        Reason::EcnInvalid
    );
}

#[test]
fn the_mss_of_a_syn_is_lowered_to_the_tunnel_mtu() {
    let (a, b, outer) = pair(GCM, false, false, false);
    let mut tcp = vec![0; 24];
    tcp[12] = 0x60;
    tcp[13] = 0x02;
    tcp[20..24].copy_from_slice(&[2, 4, 0x05, 0xb4]); // 1460
    let checksum = internet_checksum(&[&tcp]).to_be_bytes();
    tcp[16..18].copy_from_slice(&checksum);
    let mut frame = frame(&ipv4([10, 1, 0, 9], [10, 2, 0, 9], 6, &tcp));
    let packet = sent(a.seal(&mut frame, Origin::Slow));
    let inner = delivered(b.open(&mut frame, packet, &outer), &frame);
    assert_eq!(inner[42..44], 1360_u16.to_be_bytes());
    assert_eq!(internet_checksum(&[&inner[20..]]), 0);
}

#[test]
fn a_packet_longer_than_the_tunnel_is_refused_or_fragmented() {
    let (a, ..) = pair(GCM, false, false, false);
    let mut long = ipv4([10, 1, 0, 9], [10, 2, 0, 9], 17, &[0; 1381]);
    assert_eq!(
        a.seal(&mut frame(&long), Origin::Slow),
        Outbound::Fragment(1400)
    );
    long[6] = 0x40;
    assert_eq!(
        a.seal(&mut frame(&long), Origin::Slow),
        Outbound::TooBig(1400)
    );
}

#[test]
fn an_sa_reports_its_soft_limit_once_and_stops_at_its_hard_limit() {
    let mut a = Gateway::new(1, 2);
    let outer = outer(1, 2, false, false);
    let mut spec = Gateway::spec(Direction::Outbound, GCM, outer, false);
    spec.lifetime.soft_packets = 2;
    spec.lifetime.hard_packets = 3;
    a.tables.install(&spec).unwrap();
    for _ in 0..3 {
        sent(a.seal(&mut frame(&ping()), Origin::Slow));
    }
    for _ in 0..2 {
        assert_eq!(
            a.seal(&mut frame(&ping()), Origin::Slow),
            Outbound::Drop(Reason::HardLimit)
        );
    }
    let kinds: Vec<_> = std::iter::from_fn(|| a.events.try_recv().ok()).collect();
    let lifetime = |kind| Event::Lifetime { sa: SaId(1), kind };
    assert_eq!(
        kinds,
        [lifetime(LifetimeKind::Soft), lifetime(LifetimeKind::Hard)]
    );
}

#[test]
fn a_limit_that_a_daemon_died_of_hearing_is_reported_to_the_next_one() {
    let mut a = Gateway::new(1, 2);
    let outer = outer(1, 2, false, false);
    let mut spec = Gateway::spec(Direction::Outbound, GCM, outer, false);
    spec.lifetime.soft_packets = 2;
    a.tables.install(&spec).unwrap();
    let told = |a: &mut Gateway| {
        for _ in 0..3 {
            sent(a.seal(&mut frame(&ping()), Origin::Slow));
        }
        std::iter::from_fn(|| a.events.try_recv().ok()).count()
    };
    assert_eq!((told(&mut a), told(&mut a)), (1, 0));
    assert!(a.tables.goes_on(&spec));
    assert_eq!((told(&mut a), told(&mut a)), (1, 0));
}

#[test]
fn no_sequence_number_is_used_past_the_last_one() {
    let (a, ..) = pair(GCM, false, false, false);
    let sa = a.tables.outbound_by_id(SaId(1)).unwrap();
    let last = u64::from(u32::MAX);
    sa.core
        .words
        .sequence
        .store(last - 1, std::sync::atomic::Ordering::Relaxed);
    sent(a.seal(&mut frame(&ping()), Origin::Slow));
    for _ in 0..2 {
        assert_eq!(
            a.seal(&mut frame(&ping()), Origin::Slow),
            Outbound::Drop(Reason::SequenceExhausted)
        );
    }
    assert_eq!(a.tables.stats()[0].sequence, last);
}

#[test]
fn a_packet_without_an_sa_asks_for_one() {
    let mut a = Gateway::new(1, 2);
    for _ in 0..2 {
        let verdict = a.seal(&mut frame(&ping()), Origin::Slow);
        assert_eq!(verdict, Outbound::Waits);
    }
    assert!(matches!(a.events.try_recv(), Ok(Event::Acquire { .. })));
    assert!(a.events.try_recv().is_err(), "once a second is enough");
}

#[test]
fn our_own_esp_is_not_sealed_again() {
    let (mut a, ..) = pair(GCM, false, false, false);
    let own = ipv4([192, 0, 2, 1], [192, 0, 2, 2], 50, &[1; 64]);
    for _ in 0..2 {
        let verdict = a.seal(&mut frame(&own), Origin::Slow);
        assert_eq!(verdict, Outbound::Drop(Reason::RecursiveRoute));
    }
    assert!(matches!(
        a.events.try_recv(),
        Ok(Event::RecursiveRoute { remote, .. }) if remote == IpAddr::from([192, 0, 2, 2])
    ));
    assert!(a.events.try_recv().is_err());
    assert!(a.tunnel.set_recursive(true));
    let verdict = a.seal(&mut frame(&ping()), Origin::Slow);
    assert_eq!(verdict, Outbound::Drop(Reason::RecursiveRoute));
}

#[test]
fn a_newer_sa_takes_over_and_the_older_one_steps_in_when_it_goes() {
    let (a, ..) = pair(GCM, false, false, false);
    let outer = outer(1, 2, false, false);
    let mut newer = Gateway::spec(Direction::Outbound, GCM, outer, false);
    assert_eq!(a.tables.install(&newer), Err(Rejected::Exists));
    newer.id = SaId(3);
    newer.spi = Spi(0xabcd);
    a.tables.install(&newer).unwrap();
    let spi_in_use = || {
        let mut frame = frame(&ping());
        let packet = sent(a.seal(&mut frame, Origin::Slow));
        u32::from_be_bytes(*frame[packet.start + 20..].first_chunk().unwrap())
    };
    assert_eq!(spi_in_use(), 0xabcd);
    // Changed settings leave the SAs where they are.
    let mut spec = tunnel_spec(1, 2);
    spec.df = Df::Set;
    a.tables.set_tunnel(&spec, a.tunnel.ifindex, 1400);
    assert_eq!(spi_in_use(), 0xabcd);
    assert!(a.tables.remove(SaId(3)));
    assert_eq!(spi_in_use(), 0x1234_5678);
    a.tables.remove_tunnel(TunnelId(1));
    assert!(a.tables.stats().is_empty());
    assert!(a.tables.tunnel(TunnelId(1)).is_none());
}

#[test]
fn a_peer_behind_a_nat_that_moved_is_reported_by_authentic_packets_only() {
    let (a, mut b, outer) = pair(GCM, false, true, false);
    let moved = Outer {
        encap: Some(UdpEncap {
            local_port: 1024,
            remote_port: 4500,
        }),
        ..outer
    };
    let mut frame = frame(&ping());
    let packet = sent(a.seal(&mut frame, Origin::Slow));
    let mut forged = frame.clone();
    forged[packet.end - 1] ^= 1;
    b.open(&mut forged, packet.clone(), &moved);
    assert!(b.events.try_recv().is_err());
    b.open(&mut frame, packet, &moved);
    assert!(matches!(
        b.events.try_recv(),
        Ok(Event::PeerMoved { sa: SaId(2), remote }) if remote.port() == 1024
    ));
}

#[test]
fn fragments_pass_unless_selectors_name_ports() {
    let (a, _, outer) = pair(GCM, false, false, false);
    let mut later = ipv4([10, 1, 0, 9], [10, 2, 0, 9], 17, &[0; 64]);
    later[7] = 9;
    sent(a.seal(&mut frame(&later), Origin::Slow));
    let mut spec = Gateway::spec(Direction::Outbound, GCM, outer, false);
    for selector in &mut spec.selectors.remote {
        selector.protocol = 17;
        selector.ports = (53, 53);
    }
    a.tables.remove(spec.id);
    a.tables.install(&spec).unwrap();
    assert_eq!(
        a.seal(&mut frame(&later), Origin::Slow),
        Outbound::Drop(Reason::FragmentPorts)
    );
}

#[test]
fn the_outer_df_bit_follows_the_setting() {
    for (df, inner_df, outer_df) in [
        (Df::Copy, 0x40, 0x40),
        (Df::Copy, 0, 0),
        (Df::Set, 0, 0x40),
        (Df::Clear, 0x40, 0),
    ] {
        let (a, ..) = pair(GCM, false, false, false);
        let mut spec = tunnel_spec(1, 2);
        spec.df = df;
        a.tables.set_tunnel(&spec, a.tunnel.ifindex, 1400);
        let mut inner = ping();
        inner[6] = inner_df;
        let mut frame = frame(&inner);
        let packet = sent(a.seal(&mut frame, Origin::Slow));
        assert_eq!(frame[packet.start + 6], outer_df, "{df:?}");
        assert_eq!(internet_checksum(&[&frame[packet.start..][..20]]), 0);
    }
}

#[test]
fn the_inner_mtu_of_the_usual_suite_is_1422() {
    let suite = EspSuite::AesCbc {
        key_bytes: 32,
        integrity: Integrity::HmacSha512,
    };
    let (a, ..) = pair(suite, false, false, false);
    let sa = a.tables.outbound_by_id(SaId(1)).unwrap();
    assert_eq!(sa.inner_mtu(1500), 1422);
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_parsed_or_refused(bytes: Vec<u8>) {
        if let Ok(inner) = Inner::parse(&bytes) {
            proptest::prop_assert!(inner.bytes <= bytes.len());
        }
    }

    #[test]
    fn any_bytes_are_sealed_or_refused(mut bytes: Vec<u8>, first in proptest::sample::select(vec![0x45_u8, 0x46, 0x60])) {
        if let Some(byte) = bytes.first_mut() {
            *byte = first;
        }
        let (a, b, outer) = pair(GCM, false, false, false);
        a.seal(&mut frame(&bytes), Origin::Fast);
        let mut arrived = frame(&bytes);
        let end = arrived.len();
        b.open(&mut arrived, 0..end, &outer);
    }
}

// Where many SAs are in use, their memory does not fit into the second level cache: each line that a packet needs of its SA
// costs time then.
#[test]
fn a_packet_needs_few_lines_of_memory_of_its_sa() {
    let (a, b, _) = pair(GCM, false, false, false);
    let lines = |note: &dyn Fn(&mut Places)| {
        let mut lines = 0;
        Hints::new(1).renew(0, 0, |places| {
            note(places);
            lines = places.lines();
        });
        lines
    };
    let outbound = lines(&|places| a.tables.note_outbound_places(a.tunnel.ifindex, places));
    let slot = b.tables.cores()[0].words.slot();
    let inbound = lines(&|places| b.tables.note_inbound_places(slot, places));
    assert!(outbound <= 35 && inbound <= 28, "{outbound} {inbound}");
}
