//! What XDP and AF_XDP carry, what they leave to the slow path, and that traffic goes on when the network around changes.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, ensure};
use aya::programs::loaded_programs;
use ipsec_ctl::{
    api::model::Direction,
    dataplane::{
        seam::{Offload, OffloadReason},
        xdp::af_xdp::{
            socket::{QueueId, open_all},
            umem::Umem,
        },
    },
};
use ipsec_tests::{
    capture::Capture,
    cases,
    command::wait_for,
    gateway::{Gateway, Tunnel},
    pair::{hosts_are_apart, hosts_talk, start, start_default},
    ping::Ping,
    suite::{
        self,
        Need::{FastPath, Nftables, Pace, StrongSwan},
        skipped,
    },
    tcp,
    topology::{Family, Options, Side, Topology},
    udp::Flow,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

fn main() -> ExitCode {
    suite::main(&cases![
        [FastPath] the_kernels_compiler_takes_the_program,
        [FastPath, Pace] bulk_traffic_takes_the_fast_path,
        [FastPath] where_nobody_has_mounted_the_bpf_file_system_the_daemon_does,
        [] nothing_is_lost_at_a_moderate_rate_for_ten_seconds,
        [] long nothing_is_lost_at_a_moderate_rate_for_a_minute,
        [StrongSwan, Pace] the_beds_of_the_benchmarks_carry_packets,
        [] a_tunnel_without_fast_path_says_so_and_carries_traffic,
        [Nftables] a_firewall_rule_that_drops_tunnel_traffic_does_drop_it,
        [FastPath, Pace] what_comes_while_a_worker_cannot_keep_up_is_counted,
        [] a_host_that_is_replaced_is_found_again,
        [FastPath] an_interface_whose_queue_was_taken_is_tried_again,
        [FastPath] where_the_driver_has_no_room_for_xdp_the_generic_kind_carries_packets,
        [Pace] a_large_transfer_arrives_whole_in_every_combination_of_families,
    ])
}

const V4: Family = Family::V4;

/// Waits until both directions are carried this way.
fn wait_offload(gateway: &Gateway<'_>, wanted: Offload) -> anyhow::Result<()> {
    wait_for(
        "both directions to be carried otherwise",
        Duration::from_secs(20),
        || {
            let shown = gateway
                .directions("site")?
                .map(|direction| direction.offload);
            ensure!(shown == [wanted, wanted], "{shown:?}");
            Ok(Some(()))
        },
    )
    .with_context(|| gateway.log(20))
}

fn the_kernels_compiler_takes_the_program() -> anyhow::Result<()> {
    /// 1 has every program compiled; 0 has them interpreted.
    const SETTING: &str = "/proc/sys/net/core/bpf_jit_enable";
    let setting = std::fs::read_to_string(SETTING).unwrap_or_default();
    if setting.trim() != "1" {
        return Err(skipped(&format!(
            "the kernel's BPF compiler is off: {SETTING} is `{}`",
            setting.trim()
        )));
    }
    let topology = Topology::build(Options::default())?;
    let _gateways = start_default(&topology)?;
    for interface in ["lan", "wan"] {
        let link = topology
            .gateway_a
            .exec(&format!("ip -j -d link show {interface}"))?;
        let link: Value = serde_json::from_str(&link)?;
        let id = link[0]["xdp"]["prog"]["id"].as_u64();
        let id = id.with_context(|| format!("no XDP program on {interface}: {link}"))?;
        let mut programs = loaded_programs().filter_map(Result::ok);
        let program = programs.find(|program| u64::from(program.id()) == id);
        let program = program.context("the kernel does not list the program")?;
        ensure!(
            program.size_jitted() > 0,
            "it is interpreted on {interface}: {program:?}"
        );
    }
    hosts_talk(&topology, V4)
}

fn bulk_traffic_takes_the_fast_path() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, b) = start_default(&topology)?;
    for from in [Side::A, Side::B] {
        let transfer = tcp::transfer(
            topology.host(from),
            topology.host(from.other()),
            from.other().host(V4),
            Duration::from_secs(3),
            u64::MAX,
        )?;
        ensure!(transfer.bytes > 10_000_000, "{transfer}");
    }
    for gateway in [&a, &b] {
        for direction in gateway.directions("site")? {
            let (fast, slow) = (direction.fast.packets, direction.slow.packets);
            ensure!(direction.offload == Offload::Full, "{direction:?}");
            ensure!(
                fast > 99 * slow,
                "{fast} packets took the fast path, {slow} the slow one"
            );
        }
    }
    Ok(())
}

fn where_nobody_has_mounted_the_bpf_file_system_the_daemon_does() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (mut a, _b) = start_default(&topology)?;
    a.stop()?;
    a.release()?;
    a.without_bpf_file_system()?;
    a.run()?;
    a.wait_up("site", Duration::from_secs(40))?;
    wait_offload(&a, Offload::Full)?;
    hosts_talk(&topology, V4)
}

fn nothing_is_lost_at_a_moderate_rate_for_ten_seconds() -> anyhow::Result<()> {
    steady(Duration::from_secs(10))
}

fn nothing_is_lost_at_a_moderate_rate_for_a_minute() -> anyhow::Result<()> {
    steady(Duration::from_secs(60))
}

/// Flows both ways at once, without any loss, duplicate or damage, and nothing in the clear.
fn steady(time: Duration) -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let _gateways = start_default(&topology)?;
    let flow = |from: Side| {
        let to = from.other();
        let flow = Flow {
            rate: Some(2000),
            time,
            ..Flow::to(to.host(V4))
        };
        flow.start(topology.host(from), topology.host(to))
    };
    let (there, back) = (flow(Side::A)?, flow(Side::B)?);
    there.finish()?.is_perfect().context("from A to B")?;
    back.finish()?.is_perfect().context("from B to A")?;
    capture.stop().is_clean()
}

fn the_beds_of_the_benchmarks_carry_packets() -> anyhow::Result<()> {
    ipsec_tests::bench::smoke()
}

fn a_tunnel_without_fast_path_says_so_and_carries_traffic() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let off = "fast_path = \"off\"";
    let (a, b) = (
        Tunnel::between_sites(Side::A, V4).with(off),
        Tunnel::between_sites(Side::B, V4).respond().with(off),
    );
    let (a, _b) = start(&topology, a, b)?;
    hosts_talk(&topology, V4)?;
    for direction in a.directions("site")? {
        ensure!(direction.fast.packets == 0, "{direction:?}");
        ensure!(
            matches!(direction.offload, Offload::Declined(_)),
            "{direction:?}"
        );
    }
    Ok(())
}

fn a_firewall_rule_that_drops_tunnel_traffic_does_drop_it() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, _b) = start_default(&topology)?;
    hosts_talk(&topology, V4)?;
    let [
        _,
        Direction {
            offload: before, ..
        },
    ] = a.directions("site")?;
    for command in [
        "nft add table inet firewall",
        "nft add chain inet firewall forward { type filter hook forward priority 0 ; }",
        "nft add rule inet firewall forward ip daddr 10.2.0.0/24 drop",
    ] {
        topology.gateway_a.exec(command)?;
    }
    let given_up = Offload::Declined(OffloadReason::NetfilterRules);
    wait_offload(&a, given_up)?;
    hosts_are_apart(&topology, V4)?;
    topology.gateway_a.exec("nft delete table inet firewall")?;
    wait_offload(&a, before)?;
    hosts_talk(&topology, V4)?;
    capture.stop().is_clean()
}

fn what_comes_while_a_worker_cannot_keep_up_is_counted() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, _b) = start_default(&topology)?;
    hosts_talk(&topology, V4)?;
    let plane = a.data_plane().context("no data plane runs")?;
    let plane = Pid::from_raw(i32::try_from(plane)?);
    let flow = Flow {
        rate: Some(20_000),
        ..Flow::to(Side::B.host(V4))
    };
    let running = flow.start(&topology.host_a, &topology.host_b)?;
    kill(plane, Signal::SIGSTOP)?;
    // Several times what rings and frames hold.
    std::thread::sleep(Duration::from_secs(1));
    kill(plane, Signal::SIGCONT)?;
    let report = running.cut()?;
    let counted = a.counter("rx-ring-full")? + a.counter("rx-no-frame")?;
    ensure!(
        counted > 0 && counted <= report.lost(),
        "{counted} counted, {report}"
    );
    hosts_talk(&topology, V4)
}

fn a_host_that_is_replaced_is_found_again() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let _gateways = start_default(&topology)?;
    // The kernel believes in a neighbour for up to 45 s and then asks for 8 more; here it is to doubt sooner.
    for (key, value) in [
        ("base_reachable_time_ms", "3000"),
        ("delay_first_probe_time", "1"),
    ] {
        topology
            .gateway_b
            .sysctl(&format!("net.ipv4.neigh.lan.{key}"), value)?;
    }
    hosts_talk(&topology, V4)?;
    // Another interface card, and nobody is told; the host itself stays silent.
    topology.host_b.ip("link set lan arp off")?;
    topology
        .host_b
        .ip("link set lan address 02:00:00:00:00:99")?;
    topology.host_b.ip("link set lan arp on")?;
    let ping = Ping::to(Side::B.host(V4))
        .count(200)
        .interval(Duration::from_millis(200));
    let report = ping.run(&topology.host_a)?;
    ensure!(report.received > 0, "not found within 40 s: {report}");
    hosts_talk(&topology, V4)
}

fn a_large_transfer_arrives_whole_in_every_combination_of_families() -> anyhow::Result<()> {
    for outer in [V4, Family::V6] {
        let topology = Topology::build(Options {
            host_offload: true,
            ..Options::default()
        })?;
        let mut ends = [Side::A, Side::B].map(|side| {
            let mut tunnel = Tunnel::between_sites(side, outer);
            let families = [V4, Family::V6];
            tunnel.children[0].local = families.map(|family| side.prefix(family)).to_vec();
            tunnel.children[0].remote = families.map(|family| side.other().prefix(family)).to_vec();
            tunnel
        });
        ends[1].lines.push("role = \"respond\"".to_owned());
        let [a, b] = ends;
        let _gateways = start(&topology, a, b)?;
        for inner in [V4, Family::V6] {
            let to = Side::B.host(inner);
            let (from, into) = (&topology.host_a, &topology.host_b);
            let transfer = tcp::transfer(from, into, to, Duration::from_secs(20), 20_000_000)
                .with_context(|| format!("{inner:?} in {outer:?}"))?;
            ensure!(
                transfer.bytes == 20_000_000,
                "{inner:?} in {outer:?}: {transfer}"
            );
        }
    }
    Ok(())
}

/// A queue that another process has, and gives up without a word.
fn an_interface_whose_queue_was_taken_is_tried_again() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let taken = topology.gateway_a.run(|| {
        let ifindex = nix::net::if_::if_nametoindex("wan")?;
        let umem = Umem::new(64)?;
        let queues = [QueueId { ifindex, queue: 0 }];
        Ok(open_all(&umem, &queues).map(|(sockets, _)| (umem, sockets)))
    })?;
    let taken = taken.context("AF_XDP")?;
    let (a, _b) = start_default(&topology)?;
    let [_, outbound] = a.directions("site")?;
    ensure!(
        outbound.offload == Offload::Partial(OffloadReason::NoAfXdp),
        "{outbound:?}"
    );
    hosts_talk(&topology, V4)?;
    drop(taken);
    wait_offload(&a, Offload::Full)?;
    hosts_talk(&topology, V4)
}

/// With this MTU veth refuses XDP of its own, and what it receives still fits into a frame of AF_XDP.
const TOO_LONG_FOR_NATIVE: u16 = 3600;

fn where_the_driver_has_no_room_for_xdp_the_generic_kind_carries_packets() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    for (netns, interfaces) in [
        (&topology.host_a, &["lan"][..]),
        (&topology.gateway_a, &["lan", "wan"]),
        (&topology.router, &["to-a", "to-b"]),
        (&topology.gateway_b, &["lan", "wan"]),
        (&topology.host_b, &["lan"]),
    ] {
        for interface in interfaces {
            netns.ip(&format!("link set {interface} mtu {TOO_LONG_FOR_NATIVE}"))?;
        }
    }
    let (a, b) = start_default(&topology)?;
    for gateway in [&a, &b] {
        let interfaces = gateway.status()?.interfaces;
        let mut shown = interfaces.iter().map(|interface| &interface.fast_path);
        ensure!(
            interfaces.len() == 2 && shown.all(|shown| shown.contains("generic XDP")),
            "{interfaces:?}"
        );
    }
    hosts_talk(&topology, V4)?;
    for gateway in [&a, &b] {
        for direction in gateway.directions("site")? {
            let (fast, slow) = (direction.fast.packets, direction.slow.packets);
            ensure!(fast > 20 * slow, "{fast} fast, {slow} slow");
        }
    }
    Ok(())
}
