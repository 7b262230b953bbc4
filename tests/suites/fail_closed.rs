//! Nothing that a tunnel protects leaves in the clear, whatever becomes of the daemon.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, ensure};
use ipsec_ctl::api::model::State;
use ipsec_tests::{
    capture::Capture,
    cases,
    gateway::{Gateway, Tunnel},
    pair::{PATIENCE, endless, ends, hosts_talk, start_default, stop_and_release},
    ping::Ping,
    suite,
    topology::{Family, Options, Side, Topology},
};

fn main() -> ExitCode {
    suite::main(&cases![
        [] nothing_is_in_the_clear_from_the_guard_through_start_kill_and_restart,
        [] the_guard_alone_lets_nothing_out,
        [] a_tunnel_that_never_came_up_lets_nothing_out,
        [] protection_outlives_a_stopped_daemon_until_release,
        [] a_tunnel_removed_by_reload_frees_its_prefixes_and_a_new_one_takes_them,
        [] a_device_that_was_set_down_is_repaired,
        [] what_is_not_protected_is_left_alone,
        [] both_processes_keep_only_the_privileges_they_need,
    ])
}

const V4: Family = Family::V4;
const V6: Family = Family::V6;

fn tunnel(side: Side) -> Tunnel {
    let tunnel = Tunnel::between_sites(side, V4);
    match side {
        Side::A => tunnel,
        Side::B => tunnel.respond(),
    }
}

fn nothing_is_in_the_clear_from_the_guard_through_start_kill_and_restart() -> anyhow::Result<()> {
    for family in [V4, V6] {
        let topology = Topology::build(Options::default())?;
        let capture = Capture::start(&topology.router)?;
        let (a, b) = ends(family);
        let mut gateway_a = Gateway::prepare(&topology.gateway_a, "", &[a])?;
        let mut gateway_b = Gateway::prepare(&topology.gateway_b, "", &[b])?;
        for gateway in [&gateway_a, &gateway_b] {
            gateway.guard()?;
        }
        let flows = [
            endless(&topology, Side::A, family)?,
            endless(&topology, Side::B, family)?,
        ];
        let clean = |when: &str| {
            capture
                .report()
                .is_clean()
                .with_context(|| format!("{when}, {family:?}"))
        };
        std::thread::sleep(Duration::from_millis(300));
        clean("under the guard")?;
        gateway_b.run()?;
        gateway_a.run()?;
        gateway_a.wait_up("site", PATIENCE)?;
        std::thread::sleep(Duration::from_secs(1));
        clean("after the start")?;
        gateway_a.kill()?;
        std::thread::sleep(Duration::from_secs(1));
        clean("after kill -9 of A")?;
        gateway_b.kill()?;
        std::thread::sleep(Duration::from_secs(1));
        clean("after kill -9 of both")?;
        gateway_b.run()?;
        gateway_a.run()?;
        gateway_a.wait_up("site", PATIENCE)?;
        std::thread::sleep(Duration::from_secs(1));
        clean("after the restart")?;
        hosts_talk(&topology, family)?;
        for flow in flows {
            let report = flow.cut()?;
            ensure!(report.received > 500, "{report}");
        }
        capture.stop().is_clean()?;
    }
    Ok(())
}

fn the_guard_alone_lets_nothing_out() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let gateway = Gateway::prepare(&topology.gateway_a, "", &[tunnel(Side::A)])?;
    gateway.guard()?;
    let capture = Capture::start(&topology.router)?;
    Ping::to(Side::B.host(V4))
        .run(&topology.host_a)?
        .none_answered()?;
    capture.stop().is_clean()?;
    gateway.release()?;
    Ping::to(Side::B.host(V4))
        .run(&topology.host_a)?
        .all_answered()
}

fn a_tunnel_that_never_came_up_lets_nothing_out() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let gateway = Gateway::start(&topology.gateway_a, &[tunnel(Side::A)])?;
    let capture = Capture::start(&topology.router)?;
    Ping::to(Side::B.host(V4))
        .count(50)
        .run(&topology.host_a)?
        .none_answered()?;
    ensure!(gateway.tunnel("site")?.state != State::Up);
    capture.stop().is_clean()
}

fn protection_outlives_a_stopped_daemon_until_release() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (mut a, mut b) = start_default(&topology)?;
    hosts_talk(&topology, V4)?;
    stop_and_release(&topology, capture, [&mut a, &mut b])
}

fn a_tunnel_removed_by_reload_frees_its_prefixes_and_a_new_one_takes_them() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, b) = start_default(&topology)?;
    for gateway in [&a, &b] {
        gateway.configure("", &[])?;
        gateway.reload()?;
    }
    // What protects is there at once; what protects no more goes within moments.
    std::thread::sleep(Duration::from_secs(1));
    hosts_talk(&topology, V4).context("nothing protects the prefixes any more")?;
    let capture = Capture::start(&topology.router)?;
    for (gateway, side) in [(&b, Side::B), (&a, Side::A)] {
        gateway.configure(
            "",
            &[Tunnel {
                name: "again".to_owned(),
                ..tunnel(side)
            }],
        )?;
        gateway.reload()?;
    }
    a.wait_up("again", PATIENCE)?;
    hosts_talk(&topology, V4)?;
    capture.stop().is_clean()
}

fn a_device_that_was_set_down_is_repaired() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let _gateways = start_default(&topology)?;
    let flow = endless(&topology, Side::A, V4)?;
    topology.gateway_a.ip("link set site down")?;
    std::thread::sleep(Duration::from_millis(500));
    topology.gateway_a.ip("link set site up")?;
    std::thread::sleep(Duration::from_millis(500));
    hosts_talk(&topology, V4)?;
    flow.cut()?;
    capture.stop().is_clean()
}

fn what_is_not_protected_is_left_alone() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let _gateways = start_default(&topology)?;
    // The tunnel is IPv4's: IPv6 between the sites, and the gateways themselves, go as they always did.
    hosts_talk(&topology, V6)?;
    for family in [V4, V6] {
        Ping::to(Side::B.outside(family))
            .run(&topology.gateway_a)?
            .all_answered()?;
        Ping::to(Side::B.router(family))
            .run(&topology.gateway_a)?
            .all_answered()?;
    }
    Ok(())
}

fn both_processes_keep_only_the_privileges_they_need() -> anyhow::Result<()> {
    /// NET_BIND_SERVICE, NET_ADMIN, NET_RAW, IPC_LOCK, PERFMON, BPF, by their numbers in linux/capability.h.
    const CARRY: u64 = 1 << 10 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 38 | 1 << 39;
    /// DAC_READ_SEARCH, NET_ADMIN.
    const NEGOTIATE: u64 = 1 << 2 | 1 << 12;
    let topology = Topology::build(Options::default())?;
    let (a, _b) = start_default(&topology)?;
    hosts_talk(&topology, V4)?;
    let daemon = a.pid().context("the daemon runs")?;
    let data_plane = a.data_plane().context("the data plane runs")?;
    for (process, effective, permitted) in [
        (daemon, NEGOTIATE, CARRY | NEGOTIATE),
        (data_plane, CARRY, CARRY),
    ] {
        let tasks = std::fs::read_dir(format!("/proc/{process}/task"))?;
        for task in tasks {
            // A thread may have ended since.
            let Ok(status) = std::fs::read_to_string(task?.path().join("status")) else {
                continue;
            };
            let set = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                line.and_then(|value| u64::from_str_radix(value.trim(), 16).ok())
                    .with_context(|| format!("no {name} in {status}"))
            };
            ensure!(set("CapEff:")? == effective, "{status}");
            for (name, wanted) in [
                ("CapPrm:", permitted),
                ("CapBnd:", CARRY | NEGOTIATE),
                ("CapInh:", 0),
                ("CapAmb:", 0),
            ] {
                ensure!(set(name)? == wanted, "{name} {status}");
            }
            ensure!(set("NoNewPrivs:")? == 1, "{status}");
        }
    }
    Ok(())
}
