//! The work of an AF_XDP worker, with the slow path as its oracle.

use std::sync::Mutex;

use ipsec_common::maps::{NOTE_BYTES, Note, Work};
use proptest::prelude::*;

use super::*;
use crate::dataplane::xdp::{
    af_xdp::{
        forward::{Handler, Verdict},
        umem::FRAME_BYTES,
    },
    counters::Counters,
    gateway::{Gateway as Worker, Port, Shared, SlowExit},
    inner::decrement_ttl,
    next_hop::{Generation, Key, NextHop, NextHops, Reply},
    outbound::Sealed,
};

/// Where a received frame starts.
const START: usize = 256;
const HOP: NextHop = NextHop {
    ifindex: 3,
    source: [2, 0, 0, 0, 0, 1],
    destination: [2, 0, 0, 0, 0, 2],
    vlan: None,
    mtu: 1500,
};

/// A way out and the bytes that took it.
type Noted = (&'static str, Vec<u8>);

/// What went out the slow way.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Vec<Noted>>>);

impl Recorder {
    fn note(&self, what: &'static str, bytes: &[u8]) {
        self.0.lock().unwrap().push((what, bytes.to_vec()));
    }

    fn only(&self) -> Noted {
        let noted = std::mem::take(&mut *self.0.lock().unwrap());
        assert_eq!(noted.len(), 1);
        noted.into_iter().next().unwrap()
    }
}

impl SlowExit for Recorder {
    fn deliver(&self, _: &Tunnel, packet: &[u8]) {
        self.note("deliver", packet);
    }

    fn send(&self, frame: &[u8], sealed: &Sealed) {
        self.note("send", &frame[sealed.packet.clone()]);
    }

    fn too_long(&self, _: &Tunnel, frame: &mut [u8], inner: Range<usize>, _: u64) {
        self.note("too-long", &frame[inner]);
    }
}

struct Fast {
    worker: Worker<Recorder>,
    slow: Recorder,
    counters: Arc<Counters>,
}

/// A worker of this gateway that knows the next hops of these packets.
fn worker(gateway: &Gateway, known: &[Key]) -> Fast {
    let (questions, mut asked) = mpsc::channel(16);
    let mut next_hops = NextHops::new(questions, Generation::default());
    for key in known {
        assert!(next_hops.lookup(key, 1).is_err());
        let question = asked.try_recv().unwrap();
        let reply = Reply {
            key: *key,
            generation: question.generation,
            answer: Ok(HOP),
        };
        question.reply.try_send(reply).unwrap();
    }
    let port = |ifindex| Port {
        ifindex,
        partial_checksums: false,
    };
    let (slow, counters) = (Recorder::default(), Arc::new(Counters::default()));
    let shared = Shared {
        tables: Arc::clone(&gateway.tables),
        outbound: gateway.outbound.clone(),
        inbound: gateway.inbound.clone(),
    };
    let worker = Worker::new(
        shared,
        vec![port(2), port(HOP.ifindex)],
        next_hops,
        slow.clone(),
        Arc::clone(&counters),
        || 1,
    );
    Fast {
        worker,
        slow,
        counters,
    }
}

impl Fast {
    /// Handles an IP packet as if the XDP program had sent it here. Returns what leaves with its Ethernet header.
    fn handle(&mut self, packet: &[u8], work: Work, esp: usize, device: u32) -> Option<Vec<u8>> {
        let mut frame = [0xee; FRAME_BYTES];
        let note = Note {
            magic: Note::MAGIC,
            work: work as u8,
            network: 14,
            esp: u8::try_from(esp).unwrap(),
            padding: 0,
            target: device,
            link: 2,
        };
        frame[START - NOTE_BYTES..START].copy_from_slice(&note.to_bytes());
        let network = START + 14;
        frame[network..network + packet.len()].copy_from_slice(packet);
        // Ethernet pads short frames.
        let end = (network + packet.len()).max(START + 60);
        self.worker.begin();
        match self.worker.handle(0, &mut frame, START..end) {
            Verdict::Send(port, range) => {
                assert_eq!(port, 1, "the port of the next hop");
                Some(frame[range].to_vec())
            }
            Verdict::Done => None,
        }
    }
}

fn key_out(outer: &Outer, tos: u8) -> Key {
    Key {
        device: None,
        source: outer.local,
        destination: outer.remote,
        tos: tos & 0xfc,
    }
}

fn key_in(gateway: &Gateway, packet: &[u8]) -> Key {
    let inner = Inner::parse(packet).unwrap();
    Key {
        device: Some(gateway.tunnel.ifindex),
        source: inner.flow.source,
        destination: inner.flow.destination,
        tos: inner.tos & 0xfc,
    }
}

/// What the kernel does to a packet that it forwards.
fn forwarded(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let inner = Inner::parse(&packet).unwrap();
    assert!(decrement_ttl(&mut packet, &inner));
    packet
}

/// Any packet from network 1 to network 2 that the fast path takes.
fn any_packet() -> impl Strategy<Value = Vec<u8>> {
    (
        any::<bool>(),
        prop::sample::select(vec![1_u8, 6, 17, 47, 132]),
        any::<u8>(),
        3..=255_u8,
        prop::collection::vec(any::<u8>(), 24..1200),
        any::<bool>(),
    )
        .prop_map(|(v6, protocol, tos, ttl, mut payload, syn)| {
            if protocol == 6 && syn {
                // A SYN with an MSS option, to be clamped.
                payload[12..14].copy_from_slice(&[6 << 4, 2]);
                payload[20..24].copy_from_slice(&[2, 4, 0x23, 0x28]);
            }
            ip_packet(v6, protocol, tos, ttl, &payload)
        })
}

fn ip_packet(v6: bool, protocol: u8, tos: u8, ttl: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap();
    let mut packet = if v6 {
        let mut ip = vec![0x60 | tos >> 4, tos << 4, 0, 0];
        ip.extend(length.to_be_bytes());
        ip.extend([protocol, ttl]);
        for number in [1, 2_u8] {
            let address: std::net::Ipv6Addr = format!("2001:db8:{number}::9").parse().unwrap();
            ip.extend(address.octets());
        }
        ip
    } else {
        let mut ip = vec![0x45, tos];
        ip.extend((length + 20).to_be_bytes());
        ip.extend([0x12, 0x34, 0, 0, ttl, protocol, 0, 0]);
        ip.extend([10, 1, 0, 9, 10, 2, 0, 9]);
        let checksum = internet_checksum(&[&ip]).to_be_bytes();
        ip[10..12].copy_from_slice(&checksum);
        ip
    };
    packet.extend(payload);
    packet
}

proptest! {
    #[test]
    fn fast_and_slow_path_seal_and_open_to_the_same_bytes(
        packets in prop::collection::vec(any_packet(), 1..8),
        suite in prop::sample::select(vec![GCM, EspSuite::Aes128Gcm16, EspSuite::ChaCha20Poly1305]),
        v6: bool, encap: bool, esn: bool,
    ) {
        let (slow_a, slow_b, outer) = pair(suite, v6, encap, esn);
        let (fast_a, fast_b, _) = pair(suite, v6, encap, esn);
        let keys_out: Vec<Key> = packets
            .iter()
            .map(|packet| key_out(&outer, Inner::parse(packet).unwrap().tos))
            .collect();
        let keys_in: Vec<Key> = packets.iter().map(|packet| key_in(&fast_b, packet)).collect();
        for (index, packet) in packets.iter().enumerate() {
            let mut frame = frame(&forwarded(packet));
            let sealed = sent(slow_a.seal(&mut frame, Origin::Slow));
            let expected = frame[sealed.clone()].to_vec();
            // One worker each, so that the sequence number runs on in the shared words.
            let mut fast = worker(&fast_a, &keys_out[index..=index]);
            let left = fast.handle(packet, Work::Outbound, 0, fast_a.tunnel.ifindex).unwrap();
            prop_assert_eq!(&left[14..], &expected[..]);

            let inner = delivered(slow_b.open(&mut frame, sealed, &outer), &frame);
            let expected = forwarded(&inner);
            let esp = 14 + if v6 { 40 } else { 20 } + if encap { 8 } else { 0 };
            let mut fast = worker(&fast_b, &keys_in[index..=index]);
            let left = fast.handle(&left[14..], Work::Inbound, esp, 0).unwrap();
            prop_assert_eq!(&left[14..], &expected[..]);
            prop_assert_eq!(&left[..12], b"\x02\x00\x00\x00\x00\x02\x02\x00\x00\x00\x00\x01");
        }
        let stats = |gateway: &Gateway| gateway.tables.stats()[0];
        prop_assert_eq!(stats(&fast_a).fast, stats(&slow_a).slow);
        prop_assert_eq!(stats(&fast_b).fast, stats(&slow_b).slow);
    }
}

#[test]
fn a_packet_without_next_hop_goes_on_the_slow_way_exactly_once() {
    let (a, b, _) = pair(GCM, false, false, false);
    let packet = ip_packet(false, 17, 0, 64, &[7; 100]);
    let mut fast = worker(&a, &[]);
    assert_eq!(
        fast.handle(&packet, Work::Outbound, 0, a.tunnel.ifindex),
        None
    );
    let (what, sealed) = fast.slow.only();
    assert_eq!(what, "send");
    assert_eq!(fast.counters.get(Reason::SlowNextHop), 1);

    let mut fast = worker(&b, &[]);
    assert_eq!(fast.handle(&sealed, Work::Inbound, 34, 0), None);
    let expected = forwarded(&packet);
    assert_eq!(
        fast.slow.only(),
        ("deliver", expected),
        "the kernel decrements the TTL"
    );
    assert_eq!(fast.counters.get(Reason::SlowNextHop), 1);
}

#[test]
fn what_the_kernel_routes_better_is_left_to_it() {
    let mut with_options = ip_packet(false, 17, 0, 64, &[7; 100]);
    with_options.splice(20..20, [1, 1, 1, 0]);
    with_options[0] = 0x46;
    with_options[3] += 4;
    let cases = [
        (ip_packet(false, 17, 0, 2, &[7; 100]), Reason::SlowTtl),
        (with_options, Reason::SlowOptions),
    ];
    for (packet, reason) in cases {
        let (a, b, _) = pair(GCM, false, false, false);
        let known = [key_in(&b, &packet)];
        let mut fast = worker(&a, &[]);
        fast.handle(&packet, Work::Outbound, 0, a.tunnel.ifindex);
        let (_, sealed) = fast.slow.only();
        let mut fast = worker(&b, &known);
        assert_eq!(fast.handle(&sealed, Work::Inbound, 34, 0), None);
        assert_eq!(fast.slow.only().0, "deliver");
        assert_eq!(fast.counters.get(reason), 1, "{reason:?}");
    }
}

#[test]
fn a_packet_longer_than_the_mtu_it_meets_is_left_to_the_kernel() {
    let (a, _, outer) = pair(GCM, false, false, false);
    let mut fast = worker(&a, &[key_out(&outer, 0)]);
    let packet = ip_packet(false, 17, 0, 64, &[7; 1400]);
    assert_eq!(
        fast.handle(&packet, Work::Outbound, 0, a.tunnel.ifindex),
        None
    );
    assert_eq!(fast.slow.only(), ("too-long", packet), "unchanged");
    assert_eq!(
        a.tables.stats()[0].sequence,
        0,
        "no sequence number is spent"
    );
}

#[test]
fn forged_replayed_and_unannounced_packets_are_dropped_and_counted() {
    let (a, b, outer) = pair(GCM, false, false, false);
    let packet = ip_packet(false, 17, 0, 64, &[7; 100]);
    let mut fast = worker(&a, &[key_out(&outer, 0)]);
    let sealed = fast
        .handle(&packet, Work::Outbound, 0, a.tunnel.ifindex)
        .unwrap()
        .split_off(14);
    let mut fast = worker(&b, &[key_in(&b, &packet)]);
    let mut forged = sealed.clone();
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(fast.handle(&forged, Work::Inbound, 34, 0), None);
    assert!(fast.handle(&sealed, Work::Inbound, 34, 0).is_some());
    assert_eq!(fast.handle(&sealed, Work::Inbound, 34, 0), None);
    // A frame that the program did not send.
    assert_eq!(
        fast.worker
            .handle(0, &mut [0; FRAME_BYTES], START..START + 100),
        Verdict::Done
    );
    for reason in [Reason::BadIcv, Reason::Replayed, Reason::Malformed] {
        assert_eq!(fast.counters.get(reason), 1, "{reason:?}");
    }
    assert!(fast.slow.0.lock().unwrap().is_empty());
}

proptest! {
    #[test]
    fn any_bytes_behind_a_note_are_survived(
        bytes in prop::collection::vec(any::<u8>(), 1..300), esp: u8, inbound: bool,
    ) {
        let (a, b, _) = pair(GCM, false, false, false);
        let (gateway, work) = if inbound { (b, Work::Inbound) } else { (a, Work::Outbound) };
        let mut fast = worker(&gateway, &[]);
        fast.handle(&bytes, work, esp.into(), gateway.tunnel.ifindex);
    }
}
