//! Somebody on the network between the gateways replays, forges and floods; the tunnel and its traffic go on.

use std::{
    net::{IpAddr, Ipv4Addr},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, ensure};
use ipsec_tests::{
    attack::{Attacker, captured, damaged, esp, ike_message, noise, udp, with_initiator_spi},
    capture::{Capture, Kind, Report},
    cases,
    gateway::Gateway,
    pair::{PATIENCE, hosts_talk, start_default},
    suite,
    topology::{Family, Options, Side, Topology},
    udp::Flow,
};

fn main() -> ExitCode {
    suite::main(&cases![
        [] replayed_packets_are_refused,
        [] forged_packets_are_refused,
        [] unknown_spis_are_counted_and_answered_with_nothing,
        [] forged_and_replayed_ike_messages_change_nothing,
        [] a_flood_of_first_messages_keeps_no_peer_out,
    ])
}

const V4: Family = Family::V4;
const A: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const B: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);

/// A tunnel, its traffic, what was captured of both, and the attacker.
struct Scene<'a> {
    a: Gateway<'a>,
    b: Gateway<'a>,
    seen: Report,
    attacker: Attacker,
}

fn scene(topology: &Topology) -> anyhow::Result<Scene<'_>> {
    let capture = Capture::start(&topology.router)?;
    let (a, b) = start_default(topology)?;
    hosts_talk(topology, V4)?;
    Ok(Scene {
        a,
        b,
        seen: capture.stop(),
        attacker: Attacker::new(&topology.attacker)?,
    })
}

impl Scene<'_> {
    /// A flow from host A to host B while something happens: nothing of it may be lost, damaged or doubled.
    fn flow_while(
        &self,
        topology: &Topology,
        attack: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let flow = Flow {
            rate: Some(500),
            time: Duration::from_secs(60),
            ..Flow::to(Side::B.host(V4))
        };
        let running = flow.start(&topology.host_a, &topology.host_b)?;
        std::thread::sleep(Duration::from_millis(200));
        let attacked = attack();
        std::thread::sleep(Duration::from_millis(200));
        let report = running.cut()?;
        attacked?;
        report.is_perfect()?;
        self.a.wait_up("site", Duration::from_secs(1))?;
        self.b.wait_up("site", Duration::from_secs(1))?;
        hosts_talk(topology, V4)
    }

    /// Sum of the counters for packets dropped with these names at gateway B.
    fn dropped(&self, names: &[&str]) -> anyhow::Result<u64> {
        names.iter().map(|name| self.b.counter(name)).sum()
    }
}

fn replayed_packets_are_refused() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let scene = scene(&topology)?;
    let packets = captured(&scene.seen, Kind::Esp, IpAddr::V4(B));
    ensure!(packets.len() > 100, "{}", scene.seen.summary());
    scene.flow_while(&topology, || {
        let sent = scene.attacker.send_all(packets.iter().copied());
        ensure!(sent == u64::try_from(packets.len())?, "{sent}");
        std::thread::sleep(Duration::from_millis(500));
        let dropped = scene.dropped(&["replayed", "too-old"])?;
        ensure!(dropped >= sent, "{dropped} of {sent} replays were counted");
        Ok(())
    })
}

fn forged_packets_are_refused() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let scene = scene(&topology)?;
    let packets = captured(&scene.seen, Kind::Esp, IpAddr::V4(B));
    // A high sequence number must not move the window before the integrity check has passed.
    let forged: Vec<Vec<u8>> = packets
        .iter()
        .take(1000)
        .map(|packet| {
            let mut packet = damaged(packet);
            packet[24..28].copy_from_slice(&0x00ff_0000_u32.to_be_bytes());
            packet
        })
        .collect();
    scene.flow_while(&topology, || {
        let sent = scene.attacker.send_all(forged.iter().map(Vec::as_slice));
        std::thread::sleep(Duration::from_millis(500));
        let dropped = scene.dropped(&["bad-icv"])?;
        ensure!(
            dropped >= sent && sent == 1000,
            "{dropped} of {sent} forgeries were counted"
        );
        Ok(())
    })
}

fn unknown_spis_are_counted_and_answered_with_nothing() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let scene = scene(&topology)?;
    let capture = Capture::start(&topology.attacker)?;
    let from = Ipv4Addr::new(192, 0, 2, 66);
    scene.flow_while(&topology, || {
        let packets: Vec<_> = (0..2000)
            .map(|n| esp(from, B, 0x6666_0000 + n, n))
            .collect();
        let sent = scene.attacker.send_all(packets.iter().map(Vec::as_slice));
        std::thread::sleep(Duration::from_millis(500));
        let dropped = scene.dropped(&["unknown-spi"])?;
        ensure!(
            dropped >= sent && sent == 2000,
            "{dropped} of {sent} were counted"
        );
        Ok(())
    })?;
    let report = capture.stop();
    ensure!(report.icmp == 0 && report.ike < 50, "{}", report.summary());
    Ok(())
}

fn forged_and_replayed_ike_messages_change_nothing() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let scene = scene(&topology)?;
    scene.flow_while(&topology, || {
        for to in [A, B] {
            let messages = captured(&scene.seen, Kind::Ike, IpAddr::V4(to));
            ensure!(!messages.is_empty(), "{}", scene.seen.summary());
            for packet in messages {
                scene.attacker.send(packet)?;
                let source = if to == A { B } else { A };
                let message = ike_message(packet)?;
                for at in 0..message.len() {
                    let mut message = message.to_vec();
                    message[at] ^= 0x55;
                    scene
                        .attacker
                        .send(&udp((source, 500), (to, 500), &message)?)?;
                }
                scene.attacker.send(&udp(
                    (source, 500),
                    (to, 500),
                    &message[..message.len() / 2],
                )?)?;
            }
            for seed in 0..500 {
                let length = usize::try_from(seed)? * 2;
                let noise = noise(seed, length);
                scene.attacker.send(&udp((A, 500), (to, 500), &noise)?)?;
                scene.attacker.send(&udp((A, 4500), (to, 4500), &noise)?)?;
            }
        }
        Ok(())
    })
}

fn a_flood_of_first_messages_keeps_no_peer_out() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let mut scene = scene(&topology)?;
    let first = captured(&scene.seen, Kind::Ike, IpAddr::V4(B));
    let first = ike_message(first.first().context("no IKE message was captured")?)?;
    let before = scene.b.status()?.memory_bytes;
    let packets: Vec<_> = (0..20_000_u32)
        .map(|number| {
            let [_, _, high, low] = number.to_be_bytes();
            let message = with_initiator_spi(first, number.into());
            udp((Ipv4Addr::new(192, 0, high, low), 500), (B, 500), &message)
        })
        .collect::<Result<_, _>>()?;
    scene.flow_while(&topology, || {
        for burst in packets.chunks(100) {
            scene.attacker.send_all(burst.iter().map(Vec::as_slice));
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    })?;
    let after = scene.b.status()?.memory_bytes;
    ensure!(
        after < before + (64 << 20),
        "memory went from {before} to {after} bytes"
    );
    // While it goes on, a peer that has lost its SAs gets in.
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            for burst in packets.chunks(50).cycle().take(20_000) {
                if stop.load(std::sync::atomic::Ordering::Acquire) {
                    return;
                }
                scene.attacker.send_all(burst.iter().map(Vec::as_slice));
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let back = (|| {
            scene.a.kill()?;
            scene.a.run()?;
            scene.a.wait_up("site", PATIENCE * 2)
        })();
        stop.store(true, std::sync::atomic::Ordering::Release);
        back
    })?;
    hosts_talk(&topology, V4)
}
