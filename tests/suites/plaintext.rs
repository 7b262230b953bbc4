//! What should have come through a tunnel and comes in the clear is refused, whatever becomes of the daemon.

use std::{
    net::IpAddr,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use ipsec_tests::{
    cases,
    gateway::{Gateway, Tunnel},
    injection::{PACKETS, injected, is_refused_whatever_becomes_of_the_daemon, through},
    pair::{hosts_talk, start, start_default},
    suite::{self, Need::*},
    topology::{Family, Options, Side, Topology, attacker},
};

fn main() -> ExitCode {
    suite::main(&cases![
        [] plaintext_is_refused_before_and_after_the_daemon_was_killed_and_until_release,
        [] the_guard_alone_refuses_plaintext,
        [] the_guard_alone_refuses_what_route_based_tunnels_would_answer,
        [] a_forged_source_leads_into_no_tunnel_past_the_guard,
        [] a_bypassed_prefix_may_come_in_the_clear,
        [] a_tunnel_added_or_removed_by_reload_is_guarded_or_not,
        [] route_based_tunnels_refuse_what_they_would_answer_through_the_tunnel,
        [Nftables] a_firewall_that_is_loaded_anew_takes_the_guard_away_for_a_moment_only,
    ])
}

const V4: Family = Family::V4;
const V6: Family = Family::V6;

fn within(patience: Duration, mut test: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let end = Instant::now() + patience;
    loop {
        match test() {
            Err(_) if Instant::now() < end => {}
            other => return other,
        }
    }
}

fn plaintext_is_refused_before_and_after_the_daemon_was_killed_and_until_release()
-> anyhow::Result<()> {
    for family in [V4, V6] {
        is_refused_whatever_becomes_of_the_daemon("engine = \"auto\"", family)?;
    }
    Ok(())
}

fn the_guard_alone_refuses_plaintext() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let a = Gateway::prepare(
        &topology.gateway_a,
        "",
        &[Tunnel::between_sites(Side::A, V4)],
    )?;
    a.guard()?;
    through(&topology, Side::B.host(V4), false)?;
    through(&topology, Side::B.host(V6), true).context("nobody protects IPv6")?;
    through(&topology, attacker(V4), true).context("nobody protects this")?;
    a.release()?;
    through(&topology, Side::B.host(V4), true)
}

/// A tunnel whose plaintext the way back tells, of the site's prefixes or of everything.
fn route_based(side: Side, any: bool) -> Tunnel {
    let mut tunnel = Tunnel::between_sites(side, V4).with("routes = \"routed\"");
    if any {
        let child = &mut tunnel.children[0];
        child.local = vec!["0.0.0.0/0".to_owned()];
        child.remote = vec!["0.0.0.0/0".to_owned()];
    }
    tunnel
}

fn the_guard_alone_refuses_what_route_based_tunnels_would_answer() -> anyhow::Result<()> {
    for any in [false, true] {
        let topology = Topology::build(Options::default())?;
        let a = Gateway::prepare(&topology.gateway_a, "", &[route_based(Side::A, any)])?;
        a.guard()?;
        let (from, to) = (Side::B.host(V4), Side::A.inside(V4));
        through(&topology, from, false)?;
        let arrived = injected(&topology, from, &topology.gateway_a, to)?;
        ensure!(arrived == 0, "{arrived} reached the gateway itself");
        through(&topology, attacker(V4), !any)?;
        through(&topology, Side::B.host(V6), true).context("nobody protects IPv6")?;
        a.release()?;
        through(&topology, from, true)?;
    }
    Ok(())
}

fn a_forged_source_leads_into_no_tunnel_past_the_guard() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    // A network behind host B that the router takes for one behind gateway A, which sends it into the tunnel.
    let behind = IpAddr::from([10, 9, 0, 1]);
    topology
        .host_b
        .ip(&format!("addr add {behind}/32 dev lo"))?;
    for (netns, via) in [
        (&topology.router, Side::A.outside(V4)),
        (&topology.gateway_b, Side::B.host(V4)),
    ] {
        netns.ip(&format!("route add {behind}/32 via {via}"))?;
    }
    let (a, _b) = start(
        &topology,
        route_based(Side::A, true),
        route_based(Side::B, true).respond(),
    )?;
    hosts_talk(&topology, V4)?;
    let forged = [10, 2, 0, 77].into();
    let arrived = injected(&topology, forged, &topology.host_b, behind)?;
    ensure!(arrived == 0, "{arrived} went through the tunnel");
    ensure!(a.counter("cleartext")? >= u64::from(PACKETS));
    let interfaces = a.status()?.interfaces;
    if interfaces.iter().any(|one| one.fast_path.contains("XDP")) {
        ensure!(a.counter("slow-guard")? >= u64::from(PACKETS));
    }
    Ok(())
}

fn a_bypassed_prefix_may_come_in_the_clear() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, _b) = start(
        &topology,
        Tunnel::between_sites(Side::A, V4).with("bypass = [\"10.2.0.128/25\"]"),
        Tunnel::between_sites(Side::B, V4).respond(),
    )?;
    through(&topology, [10, 2, 0, 200].into(), true)?;
    through(&topology, [10, 2, 0, 100].into(), false)?;
    ensure!(a.counter("cleartext")? == u64::from(PACKETS));
    Ok(())
}

fn a_tunnel_added_or_removed_by_reload_is_guarded_or_not() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, _b) = start_default(&topology)?;
    let [v4, v6] = [V4, V6].map(|family| Tunnel::between_sites(Side::A, family));
    a.configure(
        "",
        &[Tunnel {
            name: "six".to_owned(),
            ..v6
        }],
    )?;
    a.reload()?;
    let patience = Duration::from_secs(5);
    within(patience, || through(&topology, Side::B.host(V4), true))?;
    within(patience, || through(&topology, Side::B.host(V6), false))?;
    a.configure("", &[v4])?;
    a.reload()?;
    within(patience, || through(&topology, Side::B.host(V4), false))?;
    within(patience, || through(&topology, Side::B.host(V6), true))
}

fn route_based_tunnels_refuse_what_they_would_answer_through_the_tunnel() -> anyhow::Result<()> {
    for any in [false, true] {
        let topology = Topology::build(Options::default())?;
        let (a, _b) = start(
            &topology,
            route_based(Side::A, any),
            route_based(Side::B, any).respond(),
        )?;
        through(&topology, Side::B.host(V4), false)?;
        // With 0.0.0.0/0 everything is answered through the tunnel, else only what comes from the other site.
        through(&topology, attacker(V4), !any)?;
        through(&topology, Side::B.host(V6), true)?;
        ensure!(a.counter("cleartext")? >= u64::from(PACKETS));
        hosts_talk(&topology, V4)?;
    }
    Ok(())
}

fn a_firewall_that_is_loaded_anew_takes_the_guard_away_for_a_moment_only() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, _b) = start_default(&topology)?;
    topology.gateway_a.exec("nft flush ruleset")?;
    within(Duration::from_secs(5), || {
        through(&topology, Side::B.host(V4), false)
    })?;
    ensure!(
        a.has_logged("somebody had removed the plaintext guard"),
        "{}",
        a.log(20)
    );
    Ok(())
}
