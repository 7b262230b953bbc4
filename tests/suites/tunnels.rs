//! Tunnels between two gateways of ours.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, ensure};
use ipsec_ctl::api::model::State;
use ipsec_tests::{
    branches,
    capture::Capture,
    cases,
    command::wait_for,
    gateway::{ChildSettings, Gateway, Tunnel},
    pair::{
        Flows, PATIENCE, conversation, ends, hosts_are_apart, hosts_talk, start, start_default,
    },
    ping::Ping,
    suite::{self, Need::*},
    tcp,
    topology::{Family, Options, Side, Topology},
    udp::Flow,
};

fn main() -> ExitCode {
    suite::main(&cases![
        [] a_tunnel_carries_pings_udp_and_tcp_both_ways,
        [] every_suite_carries_traffic,
        [] ipv6_travels_in_ipv6,
        [] one_child_carries_both_families_over_ipv4,
        [] the_responders_narrower_selectors_are_taken,
        [] two_children_carry_what_is_theirs,
        [] each_of_two_initiators_under_one_tunnel_gets_its_own_traffic,
        [] each_of_two_pairs_of_one_child_carries_what_it_was_narrowed_to,
        [] everything_goes_into_a_tunnel_beside_a_default_route,
        [] a_peer_from_anywhere_may_be_inside_of_what_its_tunnel_protects,
        [] a_wrong_key_is_named_at_the_verifier,
        [] no_common_proposal_is_told_with_both_policies,
        [] a_tunnel_taken_down_at_either_end_is_down_at_both_and_comes_up_again,
        [] a_peer_that_was_killed_and_restarted_is_found_again,
        [Nftables] a_nat_in_between_is_found_and_crossed,
        [] encapsulation_can_be_forced,
        [] the_first_packet_brings_up_a_tunnel_on_demand,
        [] partial_checksums_of_hosts_are_completed,
        [] a_packet_that_must_not_be_fragmented_is_answered_with_the_mtu,
        [] large_packets_arrive_in_fragments,
        [] rekeying_by_either_side_or_both_at_once_loses_no_packet,
    ])
}

const V4: Family = Family::V4;
const V6: Family = Family::V6;

fn each_of_two_initiators_under_one_tunnel_gets_its_own_traffic() -> anyhow::Result<()> {
    branches::each_of_two_initiators_gets_its_own("engine = \"xdp\"")
}

fn each_of_two_pairs_of_one_child_carries_what_it_was_narrowed_to() -> anyhow::Result<()> {
    branches::each_of_two_pairs_of_one_child_carries_its_own("engine = \"xdp\"")
}

fn child(name: &str, side: Side, local: &str, remote: &str) -> ChildSettings {
    let (local, remote) = match side {
        Side::A => (local, remote),
        Side::B => (remote, local),
    };
    ChildSettings {
        name: name.to_owned(),
        local: vec![local.to_owned()],
        remote: vec![remote.to_owned()],
        lines: Vec::new(),
    }
}

fn a_tunnel_carries_pings_udp_and_tcp_both_ways() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, _b) = start_default(&topology)?;
    let carried = conversation(&topology, V4)?;
    for from in [Side::A, Side::B] {
        let transfer = tcp::transfer(
            topology.host(from),
            topology.host(from.other()),
            from.other().host(V4),
            Duration::from_secs(2),
            u64::MAX,
        )?;
        ensure!(transfer.bytes > 1_000_000, "{transfer}");
    }
    let tunnel = a.tunnel("site")?;
    let outbound = tunnel.children[0]
        .outbound
        .context("no outbound SA in status")?;
    ensure!(
        outbound.fast.packets + outbound.slow.packets >= carried / 2,
        "{outbound:?}"
    );
    capture.stop().is_sealed(carried, false)
}

fn every_suite_carries_traffic() -> anyhow::Result<()> {
    for (ike, esp) in [
        ("aes256-sha512-ecp521", "aes256-sha512"),
        ("aes256gcm16-prfsha384-x25519", "aes256gcm16-esn"),
        ("chacha20poly1305-prfsha256-x25519", "chacha20poly1305"),
        ("aes128-sha256-modp2048", "aes128-sha256-esn"),
        ("aes192-sha384-ecp384", "aes192-sha384"),
        ("aes128gcm16-prfsha256-ecp256", "aes128gcm16"),
    ] {
        let topology = Topology::build(Options::default())?;
        let (a, b) = ends(V4);
        let _gateways = start(&topology, a.suite(ike, esp), b.suite(ike, esp))?;
        hosts_talk(&topology, V4).with_context(|| format!("{ike}, {esp}"))?;
    }
    Ok(())
}

fn ipv6_travels_in_ipv6() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = ends(V6);
    let _gateways = start(&topology, a, b)?;
    hosts_talk(&topology, V6)?;
    capture.stop().is_clean()
}

fn one_child_carries_both_families_over_ipv4() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (mut a, mut b) = ends(V4);
    for (tunnel, side) in [(&mut a, Side::A), (&mut b, Side::B)] {
        tunnel.children[0].local.push(side.prefix(V6));
        tunnel.children[0].remote.push(side.other().prefix(V6));
    }
    let _gateways = start(&topology, a, b)?;
    hosts_talk(&topology, V4)?;
    hosts_talk(&topology, V6)
}

fn the_responders_narrower_selectors_are_taken() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, mut b) = ends(V4);
    b.children[0].local = vec!["10.2.0.0/28".to_owned()];
    let (a, _b) = start(&topology, a, b)?;
    let tunnel = a.tunnel("site")?;
    ensure!(
        tunnel.children[0].remote == ["10.2.0.0/28"],
        "{:?}",
        tunnel.children
    );
    hosts_talk(&topology, V4)?;
    topology.host_b.ip("addr add 10.2.0.99/24 dev lan")?;
    Ping::to([10, 2, 0, 99].into())
        .run(&topology.host_a)?
        .none_answered()
}

fn two_children_carry_what_is_theirs() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    topology.host_b.ip("addr add 10.2.0.200/24 dev lan")?;
    let (mut a, mut b) = ends(V4);
    for (tunnel, side) in [(&mut a, Side::A), (&mut b, Side::B)] {
        tunnel.children = vec![
            child("low", side, "10.1.0.0/24", "10.2.0.0/25"),
            child("high", side, "10.1.0.0/24", "10.2.0.128/25"),
        ];
    }
    let (a, _b) = start(&topology, a, b)?;
    for to in [[10, 2, 0, 10], [10, 2, 0, 200]] {
        Ping::to(to.into()).run(&topology.host_a)?.all_answered()?;
    }
    for child in a.tunnel("site")?.children {
        let outbound = child.outbound.context("no outbound SA")?;
        let packets = outbound.fast.packets + outbound.slow.packets;
        ensure!(packets == 10, "{}: {packets} packets", child.name);
    }
    Ok(())
}

fn everything_goes_into_a_tunnel_beside_a_default_route() -> anyhow::Result<()> {
    for rp_filter in ["0", "1", "2"] {
        let topology = Topology::build(Options::default())?;
        for gateway in [&topology.gateway_a, &topology.gateway_b] {
            gateway.sysctl("net.ipv4.conf.all.rp_filter", rp_filter)?;
        }
        let capture = Capture::start(&topology.router)?;
        let (mut a, mut b) = ends(V4);
        for (tunnel, side) in [(&mut a, Side::A), (&mut b, Side::B)] {
            tunnel.children = vec![child("all", side, "0.0.0.0/0", "0.0.0.0/0")];
        }
        let gateways = start(&topology, a, b)?;
        hosts_talk(&topology, V4).with_context(|| format!("rp_filter {rp_filter}"))?;
        // The second key exchange must not go into the tunnel either.
        gateways.0.down("site")?;
        gateways.0.up("site")?;
        gateways.0.wait_up("site", PATIENCE)?;
        hosts_talk(&topology, V4)?;
        capture.stop().is_clean()?;
    }
    Ok(())
}

/// Neither its IKE nor its ESP may be sent into its own tunnel, and nothing else to its address past it.
fn a_peer_from_anywhere_may_be_inside_of_what_its_tunnel_protects() -> anyhow::Result<()> {
    for protected in ["198.51.100.0/24", "0.0.0.0/0"] {
        let topology = Topology::build(Options::default())?;
        topology
            .gateway_b
            .sysctl("net.ipv4.conf.all.rp_filter", "1")?;
        let capture = Capture::start(&topology.router)?;
        let (a, mut b) = ends(V4);
        b.children[0].remote.push(protected.to_owned());
        let _gateways = start(&topology, a, b.respond_to_any()).with_context(|| protected)?;
        hosts_talk(&topology, V4)?;
        Ping::to(Side::A.outside(V4))
            .count(3)
            .run(&topology.host_b)?
            .none_answered()?;
        capture.stop().is_clean()?;
    }
    Ok(())
}

fn a_wrong_key_is_named_at_the_verifier() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (mut a, b) = ends(V4);
    "another key".clone_into(&mut a.psk);
    let gateway_b = Gateway::start(&topology.gateway_b, &[b])?;
    let gateway_a = Gateway::start(&topology.gateway_a, &[a])?;
    let failed = gateway_a.wait("site", "refused", PATIENCE, |tunnel| {
        tunnel.last_failure.is_some()
    })?;
    ensure!(failed.state != State::Up, "{failed:?}");
    ensure!(
        gateway_b.has_logged("wrong PSK for ID"),
        "{}",
        gateway_b.log(20)
    );
    hosts_are_apart(&topology, V4)
}

fn no_common_proposal_is_told_with_both_policies() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, b) = ends(V4);
    let gateway_b = Gateway::start(
        &topology.gateway_b,
        &[b.suite("aes256-sha512-ecp521", "aes256-sha512")],
    )?;
    let gateway_a = Gateway::start(
        &topology.gateway_a,
        &[a.suite("aes128gcm16-prfsha256-x25519", "aes128gcm16")],
    )?;
    let failed = gateway_a.wait("site", "refused", PATIENCE, |tunnel| {
        tunnel.last_failure.is_some()
    })?;
    ensure!(failed.state != State::Up, "{failed:?}");
    for text in ["aes256-sha512-ecp521", "aes128gcm16-prfsha256-x25519"] {
        ensure!(
            gateway_b.has_logged(text),
            "no {text} in\n{}",
            gateway_b.log(20)
        );
    }
    Ok(())
}

fn a_tunnel_taken_down_at_either_end_is_down_at_both_and_comes_up_again() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = start_default(&topology)?;
    a.down("site")?;
    b.wait("site", "down", PATIENCE, |tunnel| tunnel.state != State::Up)?;
    hosts_are_apart(&topology, V4).with_context(|| capture.report().summary())?;
    a.up("site")?;
    a.wait_up("site", PATIENCE)?;
    hosts_talk(&topology, V4)?;
    b.down("site")?;
    // The initiator tries again by itself, for ever; the responder refuses until it is told to come up.
    a.wait("site", "down", PATIENCE, |tunnel| tunnel.state != State::Up)?;
    hosts_are_apart(&topology, V4).with_context(|| capture.report().summary())?;
    b.up("site")?;
    a.wait_up("site", Duration::from_secs(40))?;
    b.wait_up("site", PATIENCE)?;
    hosts_talk(&topology, V4)?;
    capture.stop().is_clean()
}

fn a_peer_that_was_killed_and_restarted_is_found_again() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let dpd = "dpd = { interval = \"2s\", timeout = \"5s\" }";
    let (a, b) = ends(V4);
    let (mut a, mut b) = start(&topology, a.with(dpd), b.with(dpd))?;
    a.kill()?;
    a.run()?;
    a.wait_up("site", PATIENCE)?;
    hosts_talk(&topology, V4).context("after the initiator's death")?;
    b.kill()?;
    b.run()?;
    // Traffic makes the initiator ask whether its peer still lives.
    Ping::to(Side::B.host(V4))
        .count(60)
        .interval(Duration::from_millis(200))
        .run(&topology.host_a)?;
    b.wait_up("site", Duration::from_secs(30))?;
    a.wait_up("site", PATIENCE)?;
    hosts_talk(&topology, V4).context("after the responder's death")
}

fn a_nat_in_between_is_found_and_crossed() -> anyhow::Result<()> {
    let topology = Topology::build(Options {
        nat: true,
        ..Options::default()
    })?;
    let capture = Capture::start(&topology.router)?;
    let a = Tunnel::between_sites(Side::A, V4);
    let b = Tunnel::between_sites(Side::B, V4).respond_to_any();
    let (_a, b) = start(&topology, a, b)?;
    let carried = conversation(&topology, V4)?;
    let peer = b.tunnel("site")?.ike.context("no IKE SA")?.remote;
    ensure!(peer.ip() == Side::B.router(V4), "{peer}");
    capture.stop().is_sealed(carried, true)
}

fn encapsulation_can_be_forced() -> anyhow::Result<()> {
    for family in [V4, V6] {
        let topology = Topology::build(Options::default())?;
        let capture = Capture::start(&topology.router)?;
        let (a, b) = ends(family);
        let _gateways = start(&topology, a.with("nat = \"force\""), b)?;
        let carried = conversation(&topology, family)?;
        capture.stop().is_sealed(carried, true)?;
    }
    Ok(())
}

fn the_first_packet_brings_up_a_tunnel_on_demand() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, b) = ends(V4);
    let _b = Gateway::start(&topology.gateway_b, &[b])?;
    let a = Gateway::start(&topology.gateway_a, &[a.with("role = \"on-demand\"")])?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(a.tunnel("site")?.state != State::Up);
    // Not even that packet is lost: it waits for the SA.
    Ping::to(Side::B.host(V4))
        .run(&topology.host_a)?
        .all_answered()
        .with_context(|| a.log(20))?;
    a.wait_up("site", PATIENCE)?;
    hosts_talk(&topology, V4)
}

fn partial_checksums_of_hosts_are_completed() -> anyhow::Result<()> {
    let topology = Topology::build(Options {
        host_offload: true,
        ..Options::default()
    })?;
    let _gateways = start_default(&topology)?;
    hosts_talk(&topology, V4)?;
    let transfer = tcp::transfer(
        &topology.host_a,
        &topology.host_b,
        Side::B.host(V4),
        Duration::from_secs(2),
        u64::MAX,
    )?;
    ensure!(transfer.bytes > 1_000_000, "{transfer}");
    Ok(())
}

fn a_packet_that_must_not_be_fragmented_is_answered_with_the_mtu() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, b) = ends(V4);
    let suite = ("aes256-sha512-ecp521", "aes256-sha512");
    let (a, _b) = start(
        &topology,
        a.suite(suite.0, suite.1),
        b.suite(suite.0, suite.1),
    )?;
    let mtu = a.tunnel("site")?.mtu;
    ensure!(mtu == Some(1422), "{mtu:?}");
    let large = Flow {
        rate: Some(20),
        size: 1422 - 28 + 1,
        ..Flow::to(Side::B.host(V4))
    };
    // The kernel of the host sets DF, hears of the MTU, and refuses or fragments from then on.
    large.run(&topology.host_a, &topology.host_b)?;
    let cached = topology
        .host_a
        .ip(&format!("route get {}", Side::B.host(V4)))?;
    ensure!(cached.contains("mtu 1422"), "{cached}");
    Ok(())
}

fn large_packets_arrive_in_fragments() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    // Without path MTU discovery the hosts leave DF clear.
    for host in [&topology.host_a, &topology.host_b] {
        host.sysctl("net.ipv4.ip_no_pmtu_disc", "1")?;
    }
    let _gateways = start_default(&topology)?;
    for size in [1460, 4000] {
        let flow = Flow {
            rate: Some(200),
            size,
            ..Flow::to(Side::B.host(V4))
        };
        let report = flow.run(&topology.host_a, &topology.host_b)?;
        report
            .is_perfect()
            .with_context(|| format!("{size} bytes"))?;
    }
    Ok(())
}

fn rekeying_by_either_side_or_both_at_once_loses_no_packet() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = ends(V4);
    let suite = ("aes256gcm16-prfsha256-x25519", "aes256gcm16-x25519");
    let (a, b) = start(
        &topology,
        a.suite(suite.0, suite.1),
        b.suite(suite.0, suite.1),
    )?;
    let child = |gateway: &Gateway| -> anyhow::Result<(u32, u32)> {
        let tunnel = gateway.tunnel("site")?;
        let child = &tunnel.children[0];
        let (inbound, outbound) = (child.inbound, child.outbound);
        Ok((
            inbound.context("no inbound SA")?.spi,
            outbound.map_or(0, |direction| direction.spi),
        ))
    };
    let ike = |gateway: &Gateway| -> anyhow::Result<String> {
        let ike = gateway.tunnel("site")?.ike;
        Ok(ike.context("no IKE SA")?.initiator_spi)
    };
    let flows = Flows::start(&topology)?;
    for round in 0..8 {
        let (child_before, ike_before) = (child(&a)?, ike(&a)?);
        let rekeys_ike = round % 4 == 3;
        match round % 4 {
            0 => drop(a.rekey("site")?),
            1 => drop(b.rekey("site")?),
            2 => drop((a.rekey("site")?, b.rekey("site")?)),
            _ => drop((a.rekey_ike("site")?, b.rekey_ike("site")?)),
        }
        wait_for("both sides to use what is new", PATIENCE, || {
            let ((in_a, out_a), (in_b, out_b)) = (child(&a)?, child(&b)?);
            let agreed = in_a == out_b && in_b == out_a && ike(&a)? == ike(&b)?;
            let is_new = if rekeys_ike {
                ike(&a)? != ike_before
            } else {
                in_a != child_before.0
            };
            Ok((agreed && is_new).then_some(()))
        })
        .with_context(|| format!("round {round}\n{}\n{}", a.log(30), b.log(30)))?;
    }
    flows.are_perfect()?;
    ensure!(!a.has_logged("child down") && !b.has_logged("child down"));
    capture.stop().is_clean()
}
