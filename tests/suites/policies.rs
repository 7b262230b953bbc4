//! Tunnels that policies of the whole host alone lead packets into: no device, no routes, and what no SA protects is blocked.

use std::{net::Ipv4Addr, process::ExitCode, time::Duration};

use anyhow::{Context, ensure};
use ipsec_ctl::{
    api::model::State,
    dataplane::seam::{KernelReason, Offload, PoliciesReason},
};
use ipsec_tests::{
    branches,
    capture::Capture,
    cases,
    command::wait_for,
    gateway::{Gateway, Tunnel},
    injection::{injected, through},
    kernel_esp::{self, goes_down_and_comes_up, heals},
    pair::{PATIENCE, conversation, ends, hosts_are_apart, hosts_talk, start, stop_and_release},
    ping::Ping,
    suite::{self, Need::*},
    tcp,
    topology::{Family, Options, Side, Topology},
};

fn main() -> ExitCode {
    suite::main(&cases![
        [KernelEsp] policies_alone_carry_a_tunnel_without_a_device_and_without_routes,
        [KernelEsp] long both_families_are_carried_and_the_other_end_sees_no_difference,
        [KernelEsp] the_lan_stays_as_it_is_where_everything_is_remote,
        [KernelEsp] of_two_tunnels_that_overlap_the_more_specific_one_has_the_packets_and_no_other,
        [KernelEsp] long each_of_several_initiators_and_pairs_under_one_child_gets_its_own_traffic,
        [KernelEsp] long esp_in_udp_and_the_ike_beside_it_pass_the_policies,
        [KernelEsp] long the_first_packet_brings_up_a_tunnel_on_demand,
        [KernelEsp] long nothing_is_lost_while_sas_are_replaced_by_volume,
        [KernelEsp] long what_others_flush_is_put_back,
        [KernelEsp] nothing_is_in_the_clear_through_kill_and_restart,
        [KernelEsp] long a_daemon_that_was_killed_leaves_packets_flowing_and_the_next_one_goes_on,
        [KernelEsp] what_no_sa_protects_is_blocked_from_guard_until_release_and_strangers_are_left_alone,
        [KernelEsp] long a_tunnel_that_another_programs_policy_is_in_the_way_of_is_refused,
        [NoXfrmInterfaces] the_kernels_esp_carries_by_policies_alone_where_there_are_no_xfrm_interfaces,
        [XfrmInterfaces] long a_reload_leads_from_a_device_to_policies_and_back,
        [KernelEsp] long a_tunnel_by_policies_alone_does_not_move_to_the_other_engine_but_by_reload,
    ])
}

const V4: Family = Family::V4;
const V6: Family = Family::V6;
const ALONE: &str = "engine = \"kernel\"\npolicy_based = true";

/// Both ends by policies alone; A starts.
fn both(family: Family) -> (Tunnel, Tunnel) {
    let (a, b) = ends(family);
    (a.with(ALONE), b.with(ALONE))
}

fn policies_alone_carry_a_tunnel_without_a_device_and_without_routes() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = both(V4);
    let (a, b) = start(&topology, a, b)?;
    let carried = conversation(&topology, V4)?;
    for from in [Side::A, Side::B] {
        let hosts = (topology.host(from), topology.host(from.other()));
        let to = from.other().host(V4);
        let transfer = tcp::transfer(hosts.0, hosts.1, to, Duration::from_secs(2), u64::MAX)?;
        ensure!(transfer.bytes > 1_000_000, "{transfer}");
    }
    for (gateway, netns) in [(&a, &topology.gateway_a), (&b, &topology.gateway_b)] {
        let links = netns.ip("-o link show")?;
        ensure!(!links.contains("site"), "{links}");
        let routes = netns.ip("route show table all proto 84")?;
        ensure!(routes.trim().is_empty(), "{routes}");
        let tunnel = gateway.tunnel("site")?;
        ensure!(tunnel.device == "none, policies alone (configured)");
        ensure!(tunnel.mtu.is_none(), "{:?}", tunnel.mtu);
        for direction in gateway.directions("site")? {
            ensure!(direction.offload == Offload::Policies(PoliciesReason::Configured));
            ensure!(direction.slow.packets > 0, "{direction:?}");
        }
        let shown = gateway.shown_status()?;
        ensure!(
            shown.contains("kernel ESP by policies alone (configured)"),
            "{shown}"
        );
    }
    capture.stop().is_sealed(carried, false)
}

fn both_families_are_carried_and_the_other_end_sees_no_difference() -> anyhow::Result<()> {
    for outside in [V4, V6] {
        let topology = Topology::build(Options::default())?;
        let capture = Capture::start(&topology.router)?;
        let (mut a, mut b) = ends(outside);
        for (tunnel, side) in [(&mut a, Side::A), (&mut b, Side::B)] {
            let child = &mut tunnel.children[0];
            child.local = [V4, V6].map(|family| side.prefix(family)).into();
            child.remote = [V4, V6].map(|family| side.other().prefix(family)).into();
        }
        let _gateways = start(&topology, a.with(ALONE), b.with("engine = \"xdp\""))?;
        for inside in [V4, V6] {
            hosts_talk(&topology, inside).with_context(|| format!("{inside:?} in {outside:?}"))?;
        }
        capture.stop().is_clean()?;
    }
    Ok(())
}

fn the_lan_stays_as_it_is_where_everything_is_remote() -> anyhow::Result<()> {
    for (family, everything) in [(V4, "0.0.0.0/0"), (V6, "::/0")] {
        let topology = Topology::build(Options::default())?;
        let capture = Capture::start(&topology.router)?;
        let (mut a, mut b) = ends(family);
        a.children[0].remote = vec![everything.to_owned()];
        b.children[0].local = vec![everything.to_owned()];
        let _gateways = start(&topology, a.with(ALONE), b.with(ALONE))?;
        hosts_talk(&topology, family)?;
        for side in [Side::A, Side::B] {
            // What they know of each other must not help them.
            topology.gateway(side).ip("neigh flush all")?;
            let ping = Ping::to(side.inside(family)).run(topology.host(side))?;
            ping.all_answered().context("from the LAN to its gateway")?;
        }
        capture.stop().is_clean()?;
    }
    Ok(())
}

/// What a third gateway has behind it, in the attacker's place.
const THIRD: (&str, Ipv4Addr) = ("10.4.0.0/24", Ipv4Addr::new(10, 4, 0, 1));

fn of_two_tunnels_that_overlap_the_more_specific_one_has_the_packets_and_no_other()
-> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let third = &topology.attacker;
    third.sysctl("net.ipv4.ip_forward", "1")?;
    third.ip(&format!("addr add {}/32 dev lo", THIRD.1))?;
    // What gateway B let out in the clear would arrive.
    let via = ipsec_tests::topology::attacker(V4);
    topology
        .router
        .ip(&format!("route add {} via {via}", THIRD.0))?;

    let (mut a, mut wide) = both(V4);
    a.children[0].local = vec!["10.0.0.0/8".to_owned()];
    wide.children[0].remote = vec!["10.0.0.0/8".to_owned()];
    let mut narrow = Tunnel::between_sites(Side::B, V4).respond().with(ALONE);
    narrow.name = "third".to_owned();
    narrow.peer = via.to_string();
    narrow.remote_id = "c.example".to_owned();
    narrow.children[0].remote = vec![THIRD.0.to_owned()];
    let mut at_third = Tunnel::between_sites(Side::A, V4);
    at_third.local_id = "c.example".to_owned();
    at_third.children[0].local = vec![THIRD.0.to_owned()];

    let b = Gateway::start(&topology.gateway_b, &[wide, narrow])?;
    let a = Gateway::start(&topology.gateway_a, &[a])?;
    a.wait_up("site", PATIENCE).with_context(|| b.log(40))?;
    let to_third = || Ping::to(THIRD.1.into()).run(&topology.host_b);
    to_third()?
        .none_answered()
        .context("before the tunnel that it is of is up")?;
    let sent = |tunnel: &str| {
        let outbound = b.tunnel(tunnel)?.children[0].outbound;
        Ok::<_, anyhow::Error>(outbound.map_or(0, |one| one.slow.packets))
    };
    ensure!(sent("site")? == 0, "the other tunnel had them");
    let c = Gateway::start(third, &[at_third])?;
    c.wait_up("site", PATIENCE).with_context(|| b.log(40))?;
    b.wait_up("third", PATIENCE)?;
    to_third()?.all_answered().with_context(|| b.log(40))?;
    Ping::to(Side::B.host(V4)).run(third)?.all_answered()?;
    ensure!(sent("site")? == 0, "the other tunnel had them");
    ensure!(sent("third")? > 0, "not through the tunnel");
    hosts_talk(&topology, V4)?;
    ensure!(sent("site")? > 0, "not through the tunnel");
    Ping::to(Side::B.inside(V4))
        .run(&topology.host_b)?
        .all_answered()
        .context("from the LAN to its gateway")?;
    // Without it the wide one does not step in.
    let before = sent("site")?;
    b.down("third")?;
    to_third()?.none_answered()?;
    ensure!(sent("site")? == before, "the other tunnel had them");
    hosts_talk(&topology, V4)?;
    capture.stop().is_clean()
}

fn each_of_several_initiators_and_pairs_under_one_child_gets_its_own_traffic() -> anyhow::Result<()>
{
    branches::each_of_two_initiators_gets_its_own(ALONE)?;
    branches::each_of_two_pairs_of_one_child_carries_its_own(ALONE)
}

fn esp_in_udp_and_the_ike_beside_it_pass_the_policies() -> anyhow::Result<()> {
    for family in [V4, V6] {
        let topology = Topology::build(Options::default())?;
        let capture = Capture::start(&topology.router)?;
        let (a, b) = both(family);
        // What the policies are for covers the gateways themselves.
        let wan = Side::A.outside(family);
        let (mut a, mut b) = (a.with("nat = \"force\""), b);
        a.children[0].local.push(wan.to_string());
        b.children[0].remote.push(wan.to_string());
        let peer = Side::B.outside(family);
        a.children[0].remote.push(peer.to_string());
        b.children[0].local.push(peer.to_string());
        let (a, b) = start(&topology, a, b)?;
        let carried = conversation(&topology, family)?;
        goes_down_and_comes_up(&a, &b)?;
        heals_by(&topology, family)?;
        capture.stop().is_sealed(carried, true)?;
    }
    Ok(())
}

/// Pings until one is answered, and then all are.
fn heals_by(topology: &Topology, family: Family) -> anyhow::Result<()> {
    wait_for("the tunnel to carry again", PATIENCE, || {
        let ping = Ping::to(Side::B.host(family)).count(2);
        Ok(ping
            .run(&topology.host_a)?
            .all_answered()
            .is_ok()
            .then_some(()))
    })?;
    hosts_talk(topology, family)
}

fn the_first_packet_brings_up_a_tunnel_on_demand() -> anyhow::Result<()> {
    kernel_esp::the_first_packet_brings_up_a_tunnel_on_demand(ALONE)
}

fn nothing_is_lost_while_sas_are_replaced_by_volume() -> anyhow::Result<()> {
    kernel_esp::nothing_is_lost_while_sas_are_replaced_by_volume(ALONE)
}

fn what_others_flush_is_put_back() -> anyhow::Result<()> {
    // But for the moment in which there are no policies.
    kernel_esp::what_others_flush_is_put_back(ALONE, None)
}

fn nothing_is_in_the_clear_through_kill_and_restart() -> anyhow::Result<()> {
    kernel_esp::nothing_is_in_the_clear_through_kill_and_restart(ALONE)
}

fn a_daemon_that_was_killed_leaves_packets_flowing_and_the_next_one_goes_on() -> anyhow::Result<()>
{
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = both(V4);
    let (mut a, _b) = start(&topology, a, b)?;
    let before = a.spis("site")?;
    a.kill()?;
    hosts_talk(&topology, V4).context("without a daemon")?;
    a.run()?;
    let tunnel = a.wait_up("site", PATIENCE)?;
    ensure!(a.spis("site")? == before, "other SAs: {}", a.log(40));
    ensure!(
        tunnel.device.contains("policies alone"),
        "{}",
        tunnel.device
    );
    hosts_talk(&topology, V4)?;
    a.rekey("site")?;
    hosts_talk(&topology, V4)?;
    capture.stop().is_clean()
}

fn what_no_sa_protects_is_blocked_from_guard_until_release_and_strangers_are_left_alone()
-> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let foreign = "src 172.16.0.0/16 dst 172.17.0.0/16 dir out action block";
    topology
        .gateway_a
        .ip(&format!("xfrm policy add {foreign}"))?;
    let (a, b) = both(V4);
    for (netns, tunnel) in [(&topology.gateway_a, &a), (&topology.gateway_b, &b)] {
        Gateway::prepare(netns, "", std::slice::from_ref(tunnel))?.guard()?;
    }
    hosts_are_apart(&topology, V4).context("with the guard alone")?;
    let (mut a, mut b) = start(&topology, a, b)?;
    hosts_talk(&topology, V4)?;
    capture.stop().is_clean()?;
    through(&topology, Side::B.host(V4), false).context("what pretends to come through it")?;
    let inside = injected(
        &topology,
        Side::B.host(V4),
        &topology.gateway_a,
        Side::A.inside(V4),
    )?;
    ensure!(inside == 0, "{inside} reached the gateway itself");
    let refused = a.counter("inbound-selectors")?;
    ensure!(refused >= 40, "{refused}");
    a.down("site")?;
    b.wait("site", "down", PATIENCE, |tunnel| tunnel.state != State::Up)?;
    let capture = Capture::start(&topology.router)?;
    hosts_are_apart(&topology, V4).context("when it is down")?;
    capture.stop().is_clean()?;
    through(&topology, Side::B.host(V4), false).context("when it is down")?;
    a.up("site")?;
    for gateway in [&a, &b] {
        gateway.wait_up("site", PATIENCE)?;
    }
    let capture = Capture::start(&topology.router)?;
    heals(&topology, "the tunnel to carry again")?;
    stop_and_release(&topology, capture, [&mut a, &mut b])?;
    let left = topology.gateway_a.ip("xfrm policy")? + &topology.gateway_a.ip("xfrm state")?;
    ensure!(
        left.contains("172.16.0.0/16") && left.matches("src").count() == 1,
        "{left}"
    );
    Ok(())
}

fn a_tunnel_that_another_programs_policy_is_in_the_way_of_is_refused() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, _) = both(V4);
    let (here, there) = (Side::A.prefix(V4), Side::B.prefix(V4));
    let foreign = format!("src {here} dst {there} dir out action block priority 77");
    topology
        .gateway_a
        .ip(&format!("xfrm policy add {foreign}"))?;
    let gateway = Gateway::start(&topology.gateway_a, &[])?;
    gateway.configure("", &[a])?;
    let told = gateway.reload()?;
    ensure!(told.contains("another program has set one"), "{told}");
    let policies = topology.gateway_a.ip("xfrm policy")?;
    ensure!(policies.contains("priority 77"), "{policies}");
    Ok(())
}

fn the_kernels_esp_carries_by_policies_alone_where_there_are_no_xfrm_interfaces()
-> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, b) = ends(V4);
    // Blocks by routes, for it does not look at the kernel.
    let guard = Gateway::prepare(
        &topology.gateway_a,
        "",
        &[a.clone().with("engine = \"kernel\"")],
    )?;
    guard.guard()?;
    hosts_are_apart(&topology, V4).context("with the guard alone")?;
    let capture = Capture::start(&topology.router)?;
    let (mut gateway, other) = start(&topology, a.clone().with("engine = \"kernel\""), b)?;
    let carried = Offload::Policies(PoliciesReason::NoXfrmInterfaces);
    is_carried(&gateway, carried)?;
    let shown = gateway.shown_status()?;
    ensure!(
        shown.contains("none, policies alone (no-xfrm-interfaces)"),
        "{shown}"
    );
    hosts_talk(&topology, V4)?;
    let refused = gateway.move_to("site", "xdp").err().context("it moved")?;
    ensure!(
        refused.to_string().contains("policies alone"),
        "{refused:#}"
    );
    hosts_talk(&topology, V4)?;
    gateway.kill()?;
    gateway.run()?;
    let tunnel = gateway.wait_up("site", PATIENCE)?;
    ensure!(tunnel.device.contains("no-xfrm"), "{}", tunnel.device);
    // Neither do the next daemon's wishes lead it over, so that one starts it anew.
    gateway.kill()?;
    gateway.configure("", &[a.clone().with("engine = \"xdp\"")])?;
    gateway.run()?;
    gateway.wait_up("site", PATIENCE)?;
    heals(&topology, "the tunnel to carry again")?;
    ensure!(is_carried(&gateway, carried).is_err(), "by policies");
    // A reload may take it to the other engine and back, with a gap.
    for (line, is_policies) in [
        ("engine = \"kernel\"", true),
        ("engine = \"xdp\"", false),
        ("engine = \"kernel\"", true),
    ] {
        gateway.configure("", &[a.clone().with(line)])?;
        let told = gateway.reload()?;
        ensure!(told.contains("site changed"), "{told}");
        gateway
            .wait_up("site", PATIENCE)
            .with_context(|| other.log(40))?;
        heals(&topology, "the tunnel to carry again")?;
        ensure!(is_carried(&gateway, carried).is_ok() == is_policies);
    }
    // Nobody has asked for policies.
    gateway.configure("", &[a.with("engine = \"auto\"")])?;
    gateway.reload()?;
    gateway.wait_up("site", PATIENCE)?;
    heals(&topology, "the tunnel to carry again")?;
    ensure!(is_carried(&gateway, carried).is_err(), "by policies");
    let route = topology.gateway_a.ip("route show proto 84")?;
    ensure!(route.contains("site"), "{route}");
    capture.stop().is_clean()
}

fn is_carried(gateway: &Gateway<'_>, offload: Offload) -> anyhow::Result<()> {
    gateway.wait_up("site", PATIENCE)?;
    for direction in gateway.directions("site")? {
        ensure!(direction.offload == offload, "{direction:?}");
    }
    Ok(())
}

fn a_reload_leads_from_a_device_to_policies_and_back() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = ends(V4);
    let (gateway, other) = start(&topology, a.clone().with("engine = \"kernel\""), b)?;
    hosts_talk(&topology, V4)?;
    let configured = Offload::Kernel(KernelReason::Configured);
    for (line, offload, device) in [
        (ALONE, Offload::Policies(PoliciesReason::Configured), false),
        ("engine = \"kernel\"", configured, true),
    ] {
        gateway.configure("", &[a.clone().with(line)])?;
        gateway.reload()?;
        is_carried(&gateway, offload)
            .with_context(|| format!("{}\n{}", gateway.log(40), other.log(40)))?;
        heals(&topology, "the tunnel to carry again")?;
        hosts_talk(&topology, V4)?;
        let links = topology.gateway_a.ip("-o link show")?;
        ensure!(links.contains("site") == device, "{links}");
        let policies = topology.gateway_a.ip("xfrm policy")?;
        ensure!(policies.contains("if_id") == device, "{policies}");
    }
    capture.stop().is_clean()
}

fn a_tunnel_by_policies_alone_does_not_move_to_the_other_engine_but_by_reload() -> anyhow::Result<()>
{
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = ends(V4);
    let (gateway, other) = start(&topology, a.clone().with(ALONE), b)?;
    hosts_talk(&topology, V4)?;
    let refused = gateway.move_to("site", "xdp");
    let refused = refused.err().context("it moved")?.to_string();
    ensure!(refused.contains("only engine = \"kernel\""), "{refused}");
    is_carried(&gateway, Offload::Policies(PoliciesReason::Configured))?;
    hosts_talk(&topology, V4)?;
    gateway.configure("", &[a])?;
    gateway.reload()?;
    gateway
        .wait_up("site", PATIENCE)
        .with_context(|| other.log(40))?;
    heals(&topology, "the tunnel to carry again")?;
    hosts_talk(&topology, V4)?;
    let policies = topology.gateway_a.ip("xfrm policy")?;
    ensure!(!policies.contains(&Side::B.prefix(V4)), "{policies}");
    capture.stop().is_clean()
}
