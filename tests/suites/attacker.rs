//! Somebody on the network between the gateways replays, forges and floods; the tunnel and its traffic go on.

use std::{
    net::{IpAddr, Ipv4Addr},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use ipsec_tests::{
    attack::{Attacker, captured, damaged, esp, ike_message, noise, udp, with_initiator_spi},
    capture::{Capture, Kind, Report},
    cases, flood,
    gateway::{Gateway, Tunnel},
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
        [] a_flood_of_100_000_first_messages_a_second_touches_no_tunnel,
        [] long a_flood_of_100_000_first_messages_a_second_for_half_a_minute_touches_no_tunnel,
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
        thread::sleep(Duration::from_millis(200));
        let attacked = attack();
        thread::sleep(Duration::from_millis(200));
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
        thread::sleep(Duration::from_millis(500));
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
        thread::sleep(Duration::from_millis(500));
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
        thread::sleep(Duration::from_millis(500));
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
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    })?;
    let after = scene.b.status()?.memory_bytes;
    ensure!(
        after < before + (64 << 20),
        "memory went from {before} to {after} bytes"
    );
    // While it goes on, a peer that has lost its SAs gets in.
    let stop = AtomicBool::new(false);
    thread::scope(|threads| {
        threads.spawn(|| {
            for burst in packets.chunks(50).cycle().take(20_000) {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                scene.attacker.send_all(burst.iter().map(Vec::as_slice));
                thread::sleep(Duration::from_millis(20));
            }
        });
        let back = (|| {
            scene.a.kill()?;
            scene.a.run()?;
            scene.a.wait_up("site", PATIENCE * 2)
        })();
        stop.store(true, Ordering::Release);
        back
    })?;
    hosts_talk(&topology, V4)
}

fn a_flood_of_100_000_first_messages_a_second_touches_no_tunnel() -> anyhow::Result<()> {
    flooded(Duration::from_secs(3))
}

fn a_flood_of_100_000_first_messages_a_second_for_half_a_minute_touches_no_tunnel()
-> anyhow::Result<()> {
    flooded(Duration::from_secs(30))
}

/// Messages a second of the flood, as far as the machine sends them.
const FLOOD: u32 = 100_000;

/// A second tunnel between the gateways, which nobody brings up.
fn second(side: Side) -> Tunnel {
    let mut tunnel = Tunnel::between_sites(side, V4).respond();
    tunnel.name = "second".to_owned();
    for id in [&mut tunnel.local_id, &mut tunnel.remote_id] {
        *id = format!("second-{id}");
    }
    let (local, remote) = match side {
        Side::A => ("10.5.0.0/24", "10.6.0.0/24"),
        Side::B => ("10.6.0.0/24", "10.5.0.0/24"),
    };
    let child = &mut tunnel.children[0];
    child.local = vec![local.to_owned()];
    child.remote = vec![remote.to_owned()];
    tunnel
}

fn flooded(time: Duration) -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    // Without it a veth takes no frames of XDP.
    topology.router.exec("ethtool -K to-x gro on")?;
    let capture = Capture::start(&topology.router)?;
    let [site_a, site_b] = [Side::A, Side::B].map(|side| Tunnel::between_sites(side, V4));
    let b = Gateway::start(&topology.gateway_b, &[site_b.respond(), second(Side::B)])?;
    let a = Gateway::start(&topology.gateway_a, &[site_a, second(Side::A)])?;
    a.wait_up("site", PATIENCE)?;
    let scene = Scene {
        attacker: Attacker::new(&topology.attacker)?,
        seen: capture.stop(),
        a,
        b,
    };
    let interfaces = scene.b.status()?.interfaces;
    if interfaces.iter().all(|one| !one.fast_path.contains("XDP")) {
        return Err(suite::skipped("there is no XDP"));
    }
    let first = captured(&scene.seen, Kind::Ike, IpAddr::V4(B));
    let first = ike_message(first.first().context("no IKE message was captured")?)?;
    let frames = flood::frames(
        (&topology.attacker, "wan"),
        (&topology.router, "to-x"),
        B,
        first,
    )?;
    let pids = [scene.b.pid(), scene.b.data_plane()];
    let [daemon, data_plane] = pids.map(|pid| pid.context("gateway B does not run"));
    let (daemon, data_plane) = (daemon?, data_plane?);
    let used = || anyhow::Ok([flood::usage(daemon)?, flood::usage(data_plane)?]);
    let before = used()?;
    let stop = AtomicBool::new(false);
    let (sent, came_up) = thread::scope(|threads| -> anyhow::Result<_> {
        let flood = threads.spawn(|| flood::send(&topology.attacker, "wan", &frames, FLOOD, &stop));
        let mut came_up = Duration::ZERO;
        let flowed = scene.flow_while(&topology, || {
            thread::sleep(time / 2);
            let start = Instant::now();
            scene.a.up("second")?;
            scene.a.wait_up("second", Duration::from_secs(5))?;
            came_up = start.elapsed();
            thread::sleep(time / 2);
            stop.store(true, Ordering::Release);
            Ok(())
        });
        stop.store(true, Ordering::Release);
        let sent = match flood.join() {
            Ok(sent) => sent?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        flowed?;
        Ok((sent, came_up))
    })?;
    let after = used()?;
    let dropped = scene.dropped(&["ike-flood", "ike-source"])?;
    eprintln!(
        "  {:.0} messages a second for {:.1?}; {dropped} dropped by XDP; a new tunnel was up after {came_up:.1?}",
        sent.rate(),
        sent.time
    );
    for (name, (before, after)) in ["daemon", "data plane"]
        .into_iter()
        .zip(before.into_iter().zip(after))
    {
        eprintln!(
            "  {name}: {:.1?} of processor, {} MiB resident, {} before",
            after.processor - before.processor,
            after.memory >> 20,
            before.memory >> 20
        );
        ensure!(
            after.memory < before.memory + (64 << 20),
            "{name}: {after:?}"
        );
    }
    // The daemon heard of few of them: all that XDP did not drop.
    ensure!(dropped > sent.frames / 2, "{dropped} of {}", sent.frames);
    Ok(())
}
