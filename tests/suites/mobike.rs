//! Addresses that move under tunnels that are up, with numbered packets in them (MOBIKE, RFC 4555).

use std::{net::IpAddr, process::ExitCode};

use anyhow::{Context, ensure};
use ipsec_tests::{
    capture::Capture,
    cases,
    command::wait_for,
    gateway::{Gateway, Tunnel},
    pair::{self, Flows, PATIENCE, hosts_talk},
    strongswan::{Connection, StrongSwan},
    suite::{self, Need::*},
    topology::{Family, Options, Side, Topology},
    udp::FlowReport,
};

#[expect(
    clippy::print_stdout,
    reason = "the figures are for whoever runs the tests"
)]
fn tell(lost: [u64; 2]) {
    println!(
        "lost in a move: {} and {} packets of 1000 a second",
        lost[0], lost[1]
    );
}

fn main() -> ExitCode {
    suite::main(&cases![
        [] either_side_moves_under_traffic_and_keeps_its_sas,
        [] addresses_that_move_while_a_daemon_is_dead_are_followed_by_the_next_one,
        [Nftables] a_gateway_moves_behind_a_nat_and_out_again,
        [StrongSwan] we_move_and_strongswan_follows,
        [StrongSwan] strongswan_moves_and_we_follow,
    ])
}

const V4: Family = Family::V4;
const SUITE: (&str, &str) = ("aes256gcm16-prfsha384-x25519", "aes256gcm16");
/// Packets a second of each flow.
const RATE: u32 = 1000;
/// What a move may cost: half a second's packets on a busy machine. Left alone it is a tenth of that.
const MOST_LOST: u64 = 500;

/// The gateway of a side takes another address and gives up the one that it has.
fn renumber(topology: &Topology, side: Side) -> anyhow::Result<IpAddr> {
    topology.renumber(side, side.outside(V4), side.elsewhere())?;
    Ok(side.elsewhere())
}

/// Ends the flows and holds their losses against what `moves` may cost.
fn cut(flows: Flows, moves: u64) -> anyhow::Result<()> {
    let reports = flows.cut()?;
    let lost = |report: &FlowReport| report.sent - report.received;
    tell([lost(&reports[0]), lost(&reports[1])]);
    for report in reports {
        ensure!(lost(&report) <= moves * MOST_LOST, "{report}");
        ensure!(report.damaged + report.duplicated == 0, "{report}");
    }
    Ok(())
}

/// Waits until a gateway's SAs go between these addresses.
fn wait_at(gateway: &Gateway<'_>, ours: IpAddr, theirs: IpAddr) -> anyhow::Result<()> {
    gateway.wait("site", "elsewhere", PATIENCE, |tunnel| {
        let at = tunnel
            .ike
            .as_ref()
            .map(|ike| (ike.local.ip(), ike.remote.ip()));
        at == Some((ours, theirs))
    })?;
    Ok(())
}

/// What names the SAs of a gateway.
type Names = (String, u32);

fn sas(gateways: [&Gateway<'_>; 2]) -> anyhow::Result<[Names; 2]> {
    let [a, b] = gateways;
    Ok([a.spis("site")?, b.spis("site")?])
}

/// The SAs of both gateways are those that they were.
fn are_as_before(gateways: [&Gateway<'_>; 2], before: &[Names; 2]) -> anyhow::Result<()> {
    let now = sas(gateways)?;
    ensure!(now == *before, "other SAs: {before:?}, then {now:?}");
    Ok(())
}

/// Waits until packets get through again, both ways.
fn wait_traffic(topology: &Topology) -> anyhow::Result<()> {
    wait_for("packets after a move", PATIENCE, || {
        hosts_talk(topology, V4).map(Some)
    })
}

fn either_side_moves_under_traffic_and_keeps_its_sas() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = pair::start_default(&topology)?;
    ensure!(
        a.shown_status()?.contains("MOBIKE"),
        "{}",
        a.shown_status()?
    );
    let before = sas([&a, &b])?;
    let flows = Flows::at(&topology, RATE)?;
    let at_a = renumber(&topology, Side::A)?;
    wait_at(&a, at_a, Side::B.outside(V4))?;
    wait_at(&b, Side::B.outside(V4), at_a)?;
    wait_traffic(&topology)?;
    let at_b = renumber(&topology, Side::B)?;
    wait_at(&b, at_b, at_a)?;
    wait_at(&a, at_a, at_b)?;
    wait_traffic(&topology)?;
    cut(flows, 2).with_context(|| format!("{}\n{}", a.log(20), b.log(20)))?;
    are_as_before([&a, &b], &before)?;
    capture.stop().is_clean()
}

fn addresses_that_move_while_a_daemon_is_dead_are_followed_by_the_next_one() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (mut a, mut b) = pair::start_default(&topology)?;
    let before = sas([&a, &b])?;
    let [at_a, at_b] = [Side::A, Side::B].map(|side| side.outside(V4));
    // The one that moves is dead, and finds its address gone.
    a.kill()?;
    let moved = renumber(&topology, Side::A)?;
    a.run()?;
    wait_at(&a, moved, at_b)?;
    wait_at(&b, at_b, moved)?;
    wait_traffic(&topology).context("A moved while its daemon was dead")?;
    // It is just back, and may not have looked around yet.
    a.kill()?;
    a.run()?;
    topology.renumber(Side::A, moved, at_a)?;
    wait_at(&a, at_a, at_b)?;
    wait_at(&b, at_b, at_a)?;
    wait_traffic(&topology).context("A moved just after its daemon was back")?;
    // The other one is dead, and hears of it from the repeated request.
    b.kill()?;
    let moved = renumber(&topology, Side::A)?;
    wait_at(&a, moved, at_b)?;
    b.run()?;
    wait_at(&b, at_b, moved)?;
    wait_traffic(&topology).context("A moved while the daemon of B was dead")?;
    // So it is with the side that was called.
    b.kill()?;
    let other = renumber(&topology, Side::B)?;
    b.run()?;
    wait_at(&b, other, moved)?;
    wait_at(&a, moved, other)?;
    wait_traffic(&topology).context("B moved while its daemon was dead")?;
    are_as_before([&a, &b], &before)?;
    capture.stop().is_clean()
}

fn a_gateway_moves_behind_a_nat_and_out_again() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, b) = pair::start_default(&topology)?;
    let before = sas([&a, &b])?;
    // What comes from the other address is hidden behind the router.
    for command in [
        "nft add table inet nat",
        "nft add chain inet nat post { type nat hook postrouting priority 100 ; }",
        "nft add rule inet nat post ip saddr 198.51.100.77 oifname to-b masquerade",
    ] {
        topology.router.exec(command)?;
    }
    let hidden = renumber(&topology, Side::A)?;
    wait_at(&a, hidden, Side::B.outside(V4))?;
    wait_at(&b, Side::B.outside(V4), Side::B.router(V4))?;
    wait_traffic(&topology)?;
    ensure!(a.tunnel("site")?.children[0].encapsulated, "no ESP in UDP");
    let bare = IpAddr::from([198, 51, 100, 78]);
    topology.renumber(Side::A, hidden, bare)?;
    wait_at(&b, Side::B.outside(V4), bare)?;
    wait_traffic(&topology)?;
    ensure!(!a.tunnel("site")?.children[0].encapsulated, "ESP in UDP");
    are_as_before([&a, &b], &before)
}

fn theirs(side: Side) -> Connection {
    Connection {
        local: None,
        mobike: true,
        ..Connection::between_sites(side, SUITE.0, SUITE.1)
    }
}

/// Our end; strongSwan's userspace ESP needs encapsulation.
fn ours(side: Side) -> Tunnel {
    Tunnel::between_sites(side, V4)
        .suite(SUITE.0, SUITE.1)
        .with("nat = \"force\"")
}

fn we_move_and_strongswan_follows() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let swan = StrongSwan::start(&topology.gateway_b)?;
    swan.load(&theirs(Side::B))?;
    let gateway = Gateway::start(&topology.gateway_a, &[ours(Side::A)])?;
    gateway.wait_up("site", PATIENCE)?;
    let before = gateway.spis("site")?.0;
    let flows = Flows::at(&topology, RATE)?;
    let new = renumber(&topology, Side::A)?;
    wait_at(&gateway, new, Side::B.outside(V4))?;
    swan.wait_sas("our new address", PATIENCE, |sas| {
        sas.contains(&new.to_string())
    })?;
    wait_traffic(&topology).with_context(|| format!("{}\n{}", gateway.log(20), swan.log(40)))?;
    cut(flows, 1)?;
    // Its userspace ESP cannot move SAs, so it has the child rekeyed at its new address.
    ensure!(gateway.spis("site")?.0 == before, "the IKE SA is another");
    Ok(())
}

fn strongswan_moves_and_we_follow() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let gateway = Gateway::start(&topology.gateway_b, &[ours(Side::B).respond()])?;
    let swan = StrongSwan::start(&topology.gateway_a)?;
    swan.load(&theirs(Side::A))?;
    swan.initiate("net")?;
    gateway.wait_up("site", PATIENCE)?;
    let before = gateway.spis("site")?.0;
    renumber(&topology, Side::A)?;
    // We have told it of our IPv6 address, too, and it is quick to take that one.
    gateway
        .wait("site", "elsewhere", PATIENCE, |tunnel| {
            let remote = tunnel.ike.as_ref().map(|ike| ike.remote.ip());
            remote.is_some_and(|remote| remote != Side::A.outside(V4))
        })
        .with_context(|| format!("log of strongSwan:\n{}", swan.log(60)))?;
    wait_traffic(&topology).with_context(|| format!("{}\n{}", gateway.log(20), swan.log(40)))?;
    // Its userspace ESP cannot move SAs, so it has the child rekeyed at its new address.
    ensure!(gateway.spis("site")?.0 == before, "the IKE SA is another");
    Ok(())
}
