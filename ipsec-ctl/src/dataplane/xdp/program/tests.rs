//! Tests of the program on tables: a frame in, a verdict and a counter out. In namespaces of their own; they need root, and
//! the program built, and say so otherwise.

use std::{
    net::UdpSocket,
    process::Command,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use aya::{TestRun, TestRunOptions};
use ipsec_common::maps::SA_SLOTS;

use super::*;
use crate::dataplane::xdp::{
    af_xdp::{socket::open_all, umem::Umem},
    words::{Tag, WordsArray},
};
use crate::skip::skip;

#[test]
fn interfaces_get_elements_of_their_own_and_keep_them() {
    let mut regions = BTreeMap::new();
    assert_eq!(reserve(&mut regions, 7, 4), Some((0, 4)));
    assert_eq!(reserve(&mut regions, 9, 2), Some((4, 2)));
    assert_eq!(reserve(&mut regions, 7, 4), Some((0, 4)));
    assert_eq!(reserve(&mut regions, 7, 8), Some((6, 8)), "it grew");
    assert_eq!(reserve(&mut regions, 11, 3), Some((0, 3)), "in the gap");
    assert_eq!(reserve(&mut regions, 12, SOCKET_SLOTS), None);
}

#[test]
fn an_instance_is_named_like_a_folder() {
    assert!(folder("gateway-1").is_ok());
    for bad in ["", "..", "a/b", "a.b"] {
        assert!(folder(bad).is_err(), "{bad}");
    }
}

const PASS: u32 = 2;
const DROP: u32 = 1;
const REDIRECT: u32 = 4;
const HOST: &str = "10.1.0.1";
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const SPI: Spi = Spi(0x1234);
const VLAN: u16 = 5;

/// A gateway with the interface `in0`, on which `10.1.0.1` is, and the tunnel device `tun0`, to which `10.2.0.0/16` is routed.
struct Bed {
    program: Program,
    link: u32,
    instance: String,
}

impl Drop for Bed {
    fn drop(&mut self) {
        release(&self.instance).unwrap();
    }
}

/// Runs a test on a thread of its own in a fresh network namespace.
fn in_namespace(name: &str, test: impl FnOnce(Bed) + Send + 'static) {
    let instance = format!("ipx-{name}-{}", std::process::id());
    if !nix::unistd::geteuid().is_root() {
        return skip("a network namespace needs root");
    }
    let skipped = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        for command in [
            "link add in0 type veth peer name out0",
            "link set in0 address 02:00:00:00:00:07 up",
            "link set out0 up",
            "link set lo up",
            "address add 10.1.0.1/24 dev in0",
            "tuntap add tun0 mode tun",
            "link set tun0 mtu 1400 up",
            "route add 10.2.0.0/16 dev tun0",
            "route add 10.3.0.0/16 via 10.1.0.9",
            "-6 route add 2001:db8:2::/48 dev tun0",
        ] {
            ip(command);
        }
        for family in ["ipv4", "ipv6"] {
            std::fs::write(format!("/proc/sys/net/{family}/conf/all/forwarding"), "1").unwrap();
        }
        match Program::load(&instance) {
            Err(error @ ProgramError::NotBuilt) => Some(error),
            loaded => {
                let mut program = loaded.unwrap();
                let link = ifindex("in0");
                assert_eq!(program.attach(link), Ok(AttachMode::Native));
                test(Bed {
                    program,
                    link,
                    instance,
                });
                None
            }
        }
    });
    if let Some(reason) = skipped.join().unwrap() {
        skip(reason);
    }
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

fn ifindex(name: &str) -> u32 {
    // Any socket of this namespace answers for it.
    let _socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    nix::net::if_::if_nametoindex(name).unwrap()
}

impl Bed {
    /// Runs the program on one frame as if it came in on `in0`: the verdict and all reasons that were counted.
    fn run(&mut self, frame: &[u8]) -> (u32, Vec<Reason>) {
        let before: Vec<_> = self.counts();
        let verdict = self.verdict(frame);
        (verdict, self.counted_since(&before))
    }

    fn counted_since(&self, before: &[u64]) -> Vec<Reason> {
        let counted = self.counts().into_iter().zip(before).zip(Reason::ALL);
        counted
            .filter(|((after, before), _)| after != *before)
            .map(|(_, reason)| *reason)
            .collect()
    }

    fn verdict(&mut self, frame: &[u8]) -> u32 {
        self.repeat(frame, 1).0
    }

    /// Runs the program on one frame so many times: the verdict, and the time of one.
    fn repeat(&mut self, frame: &[u8], times: u32) -> (u32, Duration) {
        // struct xdp_md of linux/bpf.h: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let length = u32::try_from(frame.len()).unwrap();
        let context = [0, length, 0, self.link, 0, 0]
            .map(u32::to_ne_bytes)
            .concat();
        let options = TestRunOptions {
            data_in: Some(frame),
            ctx_in: Some(&context),
            repeat: times,
            ..TestRunOptions::default()
        };
        let run = xdp(&mut self.program.ebpf)
            .unwrap()
            .test_run(options)
            .unwrap();
        (run.return_value, run.duration)
    }

    fn counts(&self) -> Vec<u64> {
        let all = Reason::ALL.iter();
        all.map(|reason| self.program.count(*reason)).collect()
    }

    fn check(&mut self, table: &[(&str, Vec<u8>, u32, Reason)]) {
        for (description, frame, verdict, reason) in table {
            assert_eq!(self.run(frame), (*verdict, vec![*reason]), "{description}");
        }
    }

    /// Fills the maps for one tunnel with one inbound SA.
    fn configure(&mut self) {
        let program = &mut self.program;
        program
            .set_settings(Settings {
                unknown_spi_per_second: 2,
                nat_port: 4500,
                ike_port: 500,
                ike_per_source: 4,
                ike_per_peer: 30,
                ike_per_second: 10,
                padding: 0,
                seed: 7,
            })
            .unwrap();
        program.set_addresses(&[HOST.parse().unwrap()]).unwrap();
        program
            .set_tunnel(ifindex("tun0"), tunnel(true, false))
            .unwrap();
        program
            .set_inbound(SPI, HOST.parse().unwrap(), 3, true)
            .unwrap();
    }
}

fn tunnel(offloaded: bool, wary: bool) -> TunnelEntry {
    TunnelEntry {
        mtu: 1400,
        offloaded: offloaded.into(),
        wary: wary.into(),
    }
}

fn tagged(vlan: Option<u16>, ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = [MAC, [2, 0, 0, 0, 0, 2]].concat();
    if let Some(vlan) = vlan {
        frame.extend([0x81, 0]);
        frame.extend(vlan.to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
    frame
}

fn v4(destination: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut packet = vec![
        0x45, 0, length[0], length[1], 0, 0, 0x40, 0, 64, protocol, 0, 0,
    ];
    packet.extend([10, 1, 0, 2]);
    packet.extend(destination.parse::<std::net::Ipv4Addr>().unwrap().octets());
    packet.extend(payload);
    packet
}

fn frame(destination: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    tagged(None, 0x0800, &v4(destination, protocol, payload))
}

fn v6_frame(destination: &str) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 8, 17, 64];
    for address in ["2001:db8:1::2", destination] {
        packet.extend(address.parse::<std::net::Ipv6Addr>().unwrap().octets());
    }
    packet.extend([0, 9, 0, 9, 0, 8, 0, 0]);
    tagged(None, 0x86dd, &packet)
}

fn esp(spi: u32) -> Vec<u8> {
    let mut payload = spi.to_be_bytes().to_vec();
    payload.extend([0, 0, 0, 1]);
    payload.extend([0; 32]);
    payload
}

fn udp(port: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).unwrap();
    let mut datagram = [4500, port, length, 0].map(u16::to_be_bytes).concat();
    datagram.extend(payload);
    datagram
}

fn changed(mut frame: Vec<u8>, at: usize, byte: u8) -> Vec<u8> {
    frame[at] = byte;
    frame
}

#[test]
fn until_an_interface_is_active_everything_passes() {
    in_namespace("inactive", |mut bed| {
        bed.configure();
        bed.check(&[
            ("ESP", frame(HOST, 50, &esp(SPI.0)), PASS, Reason::NotOurs),
            (
                "inner",
                frame("10.2.0.1", 17, &udp(9, &[])),
                PASS,
                Reason::NotOurs,
            ),
        ]);
    });
}

#[test]
fn without_a_socket_known_esp_is_dropped_and_inner_packets_go_the_slow_way() {
    in_namespace("nosocket", |mut bed| {
        bed.configure();
        let link = bed.link;
        bed.program.activate(link, MAC).unwrap();
        bed.check(&[
            ("ESP", frame(HOST, 50, &esp(SPI.0)), DROP, Reason::NoSocket),
            (
                "inner",
                frame("10.2.0.1", 17, &udp(9, &[])),
                PASS,
                Reason::SlowPolicy,
            ),
        ]);
    });
}

#[test]
fn packets_go_where_the_tables_and_the_fib_say() {
    in_namespace("table", |mut bed| {
        bed.configure();
        let link = bed.link;
        let umem = Umem::new(4096).unwrap();
        let queue = QueueId {
            ifindex: link,
            queue: 0,
        };
        let (sockets, _) = open_all(&umem, &[queue]).unwrap();
        bed.program
            .enter_socket(queue, 1, sockets[0].as_fd())
            .unwrap();
        bed.program.activate(link, MAC).unwrap();
        let own_esp = esp(SPI.0);
        let inner = frame("10.2.0.1", 17, &udp(9, &[0; 64]));
        bed.check(&[
            (
                "ESP of ours",
                frame(HOST, 50, &own_esp),
                REDIRECT,
                Reason::FastInbound,
            ),
            (
                "ESP of ours in UDP",
                frame(HOST, 17, &udp(4500, &own_esp)),
                REDIRECT,
                Reason::FastInbound,
            ),
            (
                "an ESP fragment",
                changed(frame(HOST, 50, &own_esp), 20, 0x20),
                PASS,
                Reason::NotOurs,
            ),
            (
                "ESP to another",
                frame("10.3.0.1", 50, &own_esp),
                PASS,
                Reason::NotOurs,
            ),
            (
                "IKE behind NAT",
                frame(HOST, 17, &udp(4500, &[0; 40])),
                PASS,
                Reason::NotOurs,
            ),
            (
                "a keep-alive",
                frame(HOST, 17, &udp(4500, &[0xff])),
                PASS,
                Reason::NotOurs,
            ),
            ("TCP to us", frame(HOST, 6, &[0; 20]), PASS, Reason::NotOurs),
            (
                "into the tunnel",
                inner.clone(),
                REDIRECT,
                Reason::FastOutbound,
            ),
            (
                "into the tunnel, IPv6",
                v6_frame("2001:db8:2::1"),
                REDIRECT,
                Reason::FastOutbound,
            ),
            (
                "ESP into the tunnel",
                frame("10.2.0.1", 50, &own_esp),
                REDIRECT,
                Reason::FastOutbound,
            ),
            (
                "past the tunnel",
                frame("10.3.0.1", 17, &udp(9, &[])),
                PASS,
                Reason::NotOurs,
            ),
            (
                "no route",
                frame("10.99.0.1", 17, &udp(9, &[])),
                PASS,
                Reason::NotOurs,
            ),
            (
                "the last hop",
                changed(inner.clone(), 22, 1),
                PASS,
                Reason::SlowTtl,
            ),
            (
                "a fragment",
                changed(inner.clone(), 20, 0x20),
                PASS,
                Reason::SlowFragment,
            ),
            (
                "options",
                changed(inner.clone(), 14, 0x46),
                PASS,
                Reason::SlowOptions,
            ),
            (
                "another's frame",
                changed(inner.clone(), 5, 9),
                PASS,
                Reason::NotOurs,
            ),
            (
                "as long as fits",
                frame("10.2.0.1", 17, &udp(9, &[0; 1372])),
                REDIRECT,
                Reason::FastOutbound,
            ),
            (
                "too long",
                frame("10.2.0.1", 17, &udp(9, &[0; 1373])),
                PASS,
                Reason::SlowTooLong,
            ),
            (
                "an unknown tag",
                tagged(Some(VLAN), 0x0800, &v4("10.2.0.1", 17, &udp(9, &[]))),
                PASS,
                Reason::NotOurs,
            ),
        ]);
        let key = VlanKey {
            link,
            outer: VLAN,
            inner: 0,
        };
        bed.program.set_vlans(&[(key, link)]).unwrap();
        bed.check(&[
            (
                "a known tag",
                tagged(Some(VLAN), 0x0800, &v4("10.2.0.1", 17, &udp(9, &[]))),
                REDIRECT,
                Reason::FastOutbound,
            ),
            (
                "ESP behind it",
                tagged(Some(VLAN), 0x0800, &v4(HOST, 50, &own_esp)),
                REDIRECT,
                Reason::FastInbound,
            ),
        ]);
        let device = ifindex("tun0");
        bed.program
            .set_tunnel(device, tunnel(false, false))
            .unwrap();
        bed.program
            .set_inbound(SPI, HOST.parse().unwrap(), 3, false)
            .unwrap();
        bed.check(&[
            ("not offloaded", inner, PASS, Reason::SlowPolicy),
            (
                "nor this way",
                frame(HOST, 50, &own_esp),
                PASS,
                Reason::SlowPolicy,
            ),
        ]);
    });
}

#[test]
fn of_unknown_spis_a_few_a_second_pass() {
    in_namespace("unknown", |mut bed| {
        bed.configure();
        let link = bed.link;
        bed.program.activate(link, MAC).unwrap();
        let began = Instant::now();
        let verdicts: Vec<_> = (0..100)
            .map(|_| bed.run(&frame(HOST, 50, &esp(999))))
            .collect();
        let seconds = usize::try_from(began.elapsed().as_secs()).unwrap();
        assert!(
            verdicts
                .iter()
                .all(|(_, reasons)| *reasons == [Reason::UnknownSpi])
        );
        let passed = verdicts
            .iter()
            .filter(|(verdict, _)| *verdict == PASS)
            .count();
        // Two in each second on each CPU. So many seconds, and a part of one, touch two seconds more at most.
        let cpus = std::thread::available_parallelism().unwrap().get();
        let most = 2 * cpus * (seconds + 2);
        assert!((2..=most).contains(&passed), "{passed} of {most}");
    });
}

#[test]
fn what_should_have_come_out_of_a_tunnel_is_left_to_the_guard() {
    in_namespace("guard", |mut bed| {
        bed.configure();
        let link = bed.link;
        bed.program.activate(link, MAC).unwrap();
        ip("route add blackhole 10.4.0.0/16");
        let from = |source: [u8; 4]| {
            let mut frame = frame("10.2.0.1", 17, &udp(9, &[]));
            frame[26..30].copy_from_slice(&source);
            frame
        };
        let goes_on = Reason::SlowPolicy;
        let device = ifindex("tun0");
        bed.program.set_tunnel(device, tunnel(true, true)).unwrap();
        bed.check(&[
            ("from our side", from([10, 1, 0, 2]), PASS, goes_on),
            ("from elsewhere", from([10, 3, 0, 2]), PASS, goes_on),
            ("from nowhere", from([99, 0, 0, 2]), PASS, goes_on),
            (
                "from behind a tunnel",
                from([10, 2, 0, 7]),
                PASS,
                Reason::SlowGuard,
            ),
            (
                "from behind a backstop",
                from([10, 4, 0, 7]),
                PASS,
                Reason::SlowGuard,
            ),
        ]);
        bed.program.set_tunnel(device, tunnel(true, false)).unwrap();
        bed.check(&[("where nobody asks", from([10, 2, 0, 7]), PASS, goes_on)]);
    });
}

/// In docs/performance.md: `cargo test -p ipsec-ctl --lib the_look_at_the_way_back -- --nocapture`.
#[test]
fn the_look_at_the_way_back_costs_no_more_than_one_into_the_fib() {
    in_namespace("wary", |mut bed| {
        bed.configure();
        let link = bed.link;
        bed.program.activate(link, MAC).unwrap();
        let device = ifindex("tun0");
        let mut frame = frame("10.2.0.1", 17, &udp(9, &[]));
        frame[26..30].copy_from_slice(&[10, 1, 0, 2]);
        // In turn, and the best of each: whatever else the machine does only adds to it.
        let mut best = [Duration::MAX; 2];
        let mut rounds = 0;
        while rounds < 20 || rounds < 500 && best[1] >= 3 * best[0] {
            rounds += 1;
            for (wary, best) in [false, true].into_iter().zip(&mut best) {
                let entry = tunnel(true, wary);
                bed.program.set_tunnel(device, entry).unwrap();
                let (verdict, time) = bed.repeat(&frame, 10_000);
                assert_eq!(verdict, PASS);
                *best = time.min(*best);
            }
        }
        let [without, with] = best;
        println!("without the look at the way back {without:?} a packet, with it {with:?}");
        assert!(with > without && with < 3 * without, "{best:?}");
    });
}

/// An IKE message to port 500: its SPIs, the initiator's flag, and from where it comes.
fn ike(source: [u8; 4], initiator: u64, responder: u64) -> Vec<u8> {
    let mut message = [initiator, responder].map(u64::to_be_bytes).concat();
    message.extend([33, 0x20, 34, 0x08, 0, 0, 0, 0, 0, 0, 0, 28]);
    let mut frame = frame(HOST, 17, &udp(500, &message));
    frame[26..30].copy_from_slice(&source);
    frame
}

/// How many pass of frames that come within one second, and what was counted beside those that are none of ours.
fn admitted(bed: &mut Bed, frames: &[Vec<u8>]) -> (usize, Vec<Reason>) {
    let second = || {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
        now.unwrap().tv_sec()
    };
    // A busy machine may need more than what is left of a second: then the next one is tried.
    for _ in 0..60 {
        let old = second();
        while second() == old {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let (begun, before) = (second(), bed.counts());
        let passed = frames.iter().filter(|frame| bed.verdict(frame) == PASS);
        let passed = passed.count();
        if second() == begun {
            let mut reasons = bed.counted_since(&before);
            reasons.retain(|reason| *reason != Reason::NotOurs);
            return (passed, reasons);
        }
    }
    panic!("no second is long enough for {} frames", frames.len());
}

#[test]
fn ike_of_strangers_is_limited_by_source_and_in_all_and_that_of_known_sas_and_peers_is_not() {
    in_namespace("ike", |mut bed| {
        bed.configure();
        let link = bed.link;
        bed.program.activate(link, MAC).unwrap();
        let many = |of: &dyn Fn(u8) -> Vec<u8>| (0..60).map(of).collect::<Vec<_>>();
        let one_source = many(&|n| ike([192, 0, 2, 1], n.into(), 0));
        assert_eq!(
            admitted(&mut bed, &one_source),
            (4, vec![Reason::IkeSource])
        );
        let all_sources = many(&|n| ike([192, 0, 2, n], n.into(), 0));
        assert_eq!(
            admitted(&mut bed, &all_sources),
            (10, vec![Reason::IkeFlood])
        );
        // What claims to be of an IKE SA does not compete with what begins one.
        let claimed = many(&|n| ike([192, 0, 2, n], 1, n.into()));
        let both: Vec<_> = claimed.into_iter().skip(1).chain(all_sources).collect();
        assert_eq!(admitted(&mut bed, &both), (20, vec![Reason::IkeFlood]));

        bed.program.know_ike(77_u64.to_be_bytes()).unwrap();
        bed.program.know_peer("192.0.2.9".parse().unwrap()).unwrap();
        let of_an_sa = many(&|_| ike([192, 0, 2, 1], 1, 77));
        assert_eq!(admitted(&mut bed, &of_an_sa), (60, vec![]));
        let mut of_a_peer = many(&|n| ike([192, 0, 2, 100 + n], n.into(), 0));
        of_a_peer.extend(many(&|n| ike([192, 0, 2, 9], n.into(), 0)));
        assert_eq!(
            admitted(&mut bed, &of_a_peer),
            (40, vec![Reason::IkeSource, Reason::IkeFlood])
        );
        // To others it is routed like anything else.
        let mut past_us = one_source[0].clone();
        past_us[30..34].copy_from_slice(&[10, 3, 0, 1]);
        assert_eq!(admitted(&mut bed, &vec![past_us; 60]), (60, vec![]));
    });
}

#[test]
fn an_sa_past_its_hard_limit_is_dropped_with_nobody_awake() {
    in_namespace("hard", |mut bed| {
        bed.configure();
        let link = bed.link;
        bed.program.activate(link, MAC).unwrap();
        let array = WordsArray::of_bpf_array(bed.program.words().unwrap(), SA_SLOTS).unwrap();
        let words = array.allocate(Tag::some(1)).unwrap();
        bed.program
            .set_inbound(SPI, HOST.parse().unwrap(), words.slot(), true)
            .unwrap();
        words.hard_packets.store(10, Ordering::Relaxed);
        words.hard_bytes.store(u64::MAX, Ordering::Relaxed);
        words.fast_packets.store(6, Ordering::Relaxed);
        words.slow_packets.store(3, Ordering::Relaxed);
        let known = || frame(HOST, 50, &esp(SPI.0));
        bed.check(&[("before", known(), DROP, Reason::NoSocket)]);
        words.slow_packets.store(4, Ordering::Relaxed);
        bed.check(&[("past it", known(), DROP, Reason::HardLimit)]);
    });
}

#[test]
fn the_next_process_takes_over_attachments_and_counters() {
    in_namespace("again", |mut bed| {
        bed.configure();
        let link = bed.link;
        bed.program.activate(link, MAC).unwrap();
        bed.run(&frame(HOST, 50, &esp(SPI.0)));
        assert_eq!(bed.program.count(Reason::NoSocket), 1);
        // A process that dies removes nothing.
        bed.program = Program::load(&bed.instance).unwrap();
        assert_eq!(bed.program.attached(), [link]);
        assert_eq!(bed.program.attach(link), Ok(AttachMode::Native));
        assert_eq!(bed.program.count(Reason::NoSocket), 1);
        bed.check(&[(
            "SAs are forgotten",
            frame(HOST, 50, &esp(SPI.0)),
            PASS,
            Reason::NotOurs,
        )]);
        bed.program.detach(link);
        assert!(bed.program.attached().is_empty());
    });
}

#[test]
fn after_a_release_the_interface_is_free_for_others() {
    in_namespace("release", |mut bed| {
        release(&bed.instance).unwrap();
        let other = format!("{}-b", bed.instance);
        // What is still held open by the process that released it ends with that process.
        bed.program = Program::load(&other).unwrap();
        bed.instance = other;
        assert_eq!(bed.program.attach(bed.link), Ok(AttachMode::Native));
    });
}

#[test]
fn a_foreign_program_is_left_alone_and_named() {
    in_namespace("foreign", |bed| {
        let mut other = Program::load(&format!("{}-b", bed.instance)).unwrap();
        let refused = other.attach(bed.link);
        release(&format!("{}-b", bed.instance)).unwrap();
        assert_eq!(refused, Err(OffloadReason::ForeignXdpProgram));
    });
}
