//! Rekeying under traffic whose packets are numbered: none is lost, reordered or in the clear.

use std::{collections::BTreeSet, process::ExitCode, time::Duration};

use anyhow::{Context, ensure};
use ipsec_tests::{
    capture::Capture,
    cases,
    gateway::{Gateway, Tunnel},
    hops::Hops,
    pair::{self, PATIENCE},
    strongswan::{Connection, StrongSwan},
    suite::{self, Need::*},
    topology::{Family, Options, Side, Topology},
    udp::{Flow, FlowReport, Running},
};

fn main() -> ExitCode {
    suite::main(&cases![
        [] a_child_is_rekeyed_dozens_of_times_under_traffic_without_loss,
        [] long a_child_is_rekeyed_a_thousand_times_under_traffic_without_loss,
        [StrongSwan, Nftables] strongswan_and_we_rekey_the_same_child_and_we_lose_nothing,
        [StrongSwan, Nftables] long strongswan_and_we_rekey_the_same_child_for_ten_minutes,
    ])
}

const SUITE: (&str, &str) = ("aes256gcm16-prfsha384-x25519", "aes256gcm16");

/// A flow each way, until it is cut.
fn flows(topology: &Topology, rate: u32) -> anyhow::Result<[Running; 2]> {
    let start = |from: Side| {
        let flow = Flow {
            rate: Some(rate),
            time: Duration::from_secs(3600),
            ..Flow::to(from.other().host(Family::V4))
        };
        flow.start(topology.host(from), topology.host(from.other()))
    };
    Ok([start(Side::A)?, start(Side::B)?])
}

fn cut(flows: [Running; 2]) -> anyhow::Result<[FlowReport; 2]> {
    let [a, b] = flows;
    Ok([a.cut()?, b.cut()?])
}

/// Waits until a gateway has received on so many different SAs of its child.
fn wait_rekeys(gateway: &Gateway<'_>, count: usize, patience: Duration) -> anyhow::Result<()> {
    let mut seen = BTreeSet::new();
    let waited = ipsec_tests::command::wait_for("rekeys", patience, || {
        let tunnel = gateway.tunnel("site")?;
        seen.extend(tunnel.children[0].inbound.map(|inbound| inbound.spi));
        Ok((seen.len() > count).then_some(()))
    });
    waited.with_context(|| {
        format!(
            "{} rekeys seen\n{}",
            seen.len().saturating_sub(1),
            gateway.log(30)
        )
    })
}

fn a_child_is_rekeyed_dozens_of_times_under_traffic_without_loss() -> anyhow::Result<()> {
    ours_against_ours(24, 2000, Duration::from_secs(90))
}

fn a_child_is_rekeyed_a_thousand_times_under_traffic_without_loss() -> anyhow::Result<()> {
    ours_against_ours(1000, 4000, Duration::from_secs(1500))
}

/// An SA carries `rate` packets: about one second. Both ends count, and so ask at the same time now and then.
fn ours_against_ours(rekeys: usize, rate: u32, patience: Duration) -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let end = |side| {
        let mut tunnel = Tunnel::between_sites(side, Family::V4);
        tunnel.children[0]
            .lines
            .push(format!("lifetime_packets = {rate}"));
        tunnel
    };
    let capture = Capture::start(&topology.router)?;
    let (gateway, _other) = pair::start(&topology, end(Side::A), end(Side::B).respond())?;
    let flows = flows(&topology, rate)?;
    let rekeyed = wait_rekeys(&gateway, rekeys, patience);
    let reports = cut(flows)?;
    rekeyed.with_context(|| format!("{} and {}", reports[0], reports[1]))?;
    for report in reports {
        report.is_perfect()?;
        ensure!(report.reordered == 0, "{report}");
    }
    capture.stop().is_clean()
}

fn strongswan_and_we_rekey_the_same_child_and_we_lose_nothing() -> anyhow::Result<()> {
    against_strongswan(8, Duration::from_secs(60))
}

fn strongswan_and_we_rekey_the_same_child_for_ten_minutes() -> anyhow::Result<()> {
    against_strongswan(200, Duration::from_secs(600))
}

/// Both ends rekey the child every five seconds or so; what is lost is counted at each hop.
fn against_strongswan(rekeys: usize, patience: Duration) -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let swan = StrongSwan::start(&topology.gateway_b)?;
    let mut connection = Connection::between_sites(Side::B, SUITE.0, SUITE.1);
    connection.children[0].lines = ["rekey_time = 5s", "life_time = 60s", "rand_time = 0s"]
        .map(str::to_owned)
        .to_vec();
    swan.load(&connection)?;
    let mut tunnel = Tunnel::between_sites(Side::A, Family::V4)
        .suite(SUITE.0, SUITE.1)
        .with("nat = \"force\"");
    tunnel.children[0]
        .lines
        .push("lifetime_packets = 5500".to_owned());
    let capture = Capture::start(&topology.router)?;
    let gateway = Gateway::start(&topology.gateway_a, &[tunnel])?;
    gateway.wait_up("site", PATIENCE)?;
    let hops = Hops::count(&topology)?;
    let flows = flows(&topology, 1000)?;
    let rekeyed = wait_rekeys(&gateway, rekeys, patience);
    let [out, back] = cut(flows)?;
    let (sealed, offered) = (hops.towards(Side::B)?, hops.towards(Side::A)?);
    let account = format!(
        "to strongSwan: {out}, {sealed} sealed on the way; from strongSwan: {back}, {offered} sealed on the way"
    );
    rekeyed.with_context(|| format!("{account}\n{}", swan.log(20)))?;
    // What we are given, we seal; what strongSwan sealed, we deliver. The rest is lost in strongSwan.
    ensure!(sealed == out.sent && offered == back.received, "{account}");
    ensure!(
        out.refused + back.refused + out.damaged + back.damaged + back.duplicated == 0,
        "{account}"
    );
    capture.stop().is_clean()
}
