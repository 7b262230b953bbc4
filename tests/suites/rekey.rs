//! Rekeying under traffic whose packets are numbered: none is lost, reordered or in the clear.

use std::{
    collections::BTreeSet,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use ipsec_ctl::api::model::Rekey;
use ipsec_tests::{
    capture::Capture,
    cases,
    command::wait_for,
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
        [] ike_sas_and_children_are_rekeyed_at_the_same_time_without_loss,
        [] long a_child_is_rekeyed_a_thousand_times_and_the_ike_sa_a_hundred_times_without_loss,
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
    let waited = wait_for("rekeys", patience, || {
        let tunnel = gateway.tunnel("site")?;
        seen.extend(tunnel.children[0].inbound.map(|inbound| inbound.spi));
        Ok((seen.len() > count).then_some(()))
    });
    waited.with_context(|| format!("{} rekeys seen", seen.len().saturating_sub(1)))
}

fn a_child_is_rekeyed_dozens_of_times_under_traffic_without_loss() -> anyhow::Result<()> {
    // An SA carries about one second's packets. Both ends count, and so ask at the same time now and then.
    ours_against_ours(2000, Some(2000), |a, _| {
        wait_rekeys(a, 24, Duration::from_secs(90))
    })
}

fn ike_sas_and_children_are_rekeyed_at_the_same_time_without_loss() -> anyhow::Result<()> {
    ours_against_ours(2000, None, |a, b| rekey_both(a, b, 12, 2))
}

fn a_child_is_rekeyed_a_thousand_times_and_the_ike_sa_a_hundred_times_without_loss()
-> anyhow::Result<()> {
    ours_against_ours(long_rate()?, None, |a, b| rekey_both(a, b, 1000, 10))
}

/// Packets a second each way in the long forms; a busy machine may not carry as many as a quiet one.
fn long_rate() -> anyhow::Result<u32> {
    std::env::var("IPSEC_TESTS_RATE").map_or(Ok(20_000), |rate| {
        rate.parse()
            .context("IPSEC_TESTS_RATE is a number of packets a second")
    })
}

/// Two gateways with `rate` packets a second each way, and what is done to them meanwhile.
fn ours_against_ours(
    rate: u32,
    lifetime_packets: Option<u32>,
    rekeying: impl FnOnce(&Gateway<'_>, &Gateway<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let end = |side| {
        let mut tunnel = Tunnel::between_sites(side, Family::V4);
        let limit = lifetime_packets.map(|packets| format!("lifetime_packets = {packets}"));
        tunnel.children[0].lines.extend(limit);
        tunnel
    };
    let capture = Capture::start(&topology.router)?;
    let (a, b) = pair::start(&topology, end(Side::A), end(Side::B).respond())?;
    let flows = flows(&topology, rate)?;
    let rekeyed = rekeying(&a, &b);
    let reports = cut(flows)?;
    let overrun = topology.overrun()?;
    let account = format!(
        "{rate} packets/s each way: {} and {}; the links of the test bed dropped {overrun}",
        reports[0], reports[1]
    );
    eprintln!("{account}");
    // A link of the test bed holds 256 packets: on a machine that stands still for long it drops, and counts what it drops.
    let lost: u64 = reports.iter().map(FlowReport::lost).sum();
    let perfect = lost <= overrun
        && reports.iter().all(|report| {
            report.sent > 0
                && report.refused + report.duplicated + report.reordered + report.damaged == 0
        });
    rekeyed
        .and_then(|()| {
            ensure!(perfect, "packets were lost or reordered");
            Ok(())
        })
        .with_context(|| format!("{account}\nA\n{}\nB\n{}", told(&a), told(&b)))?;
    capture.stop().is_clean()
}

/// What a gateway has counted and logged.
fn told(gateway: &Gateway<'_>) -> String {
    let counters: String = gateway
        .counters()
        .into_iter()
        .flatten()
        .filter(|counter| counter.packets > 0)
        .map(|counter| format!("{} {} {}\n", counter.packets, counter.kind, counter.name))
        .collect();
    counters + &gateway.log(80)
}

/// The SPIs of the IKE SA and of the child of two gateways that agree on them.
fn spis(a: &Gateway<'_>, b: &Gateway<'_>) -> anyhow::Result<((String, String), (u32, u32))> {
    let [a, b] = [a, b].map(|gateway| -> anyhow::Result<_> {
        let tunnel = gateway.asked(async |client| client.status().await)?.tunnels;
        let tunnel = tunnel.into_iter().next().context("no tunnel")?;
        let ike = tunnel.ike.context("no IKE SA")?;
        let child = tunnel.children.first().context("no child")?;
        let inbound = child.inbound.context("nothing is received")?.spi;
        let outbound = child.outbound.context("nothing is sent")?.spi;
        Ok(((ike.initiator_spi, ike.responder_spi), (inbound, outbound)))
    });
    let ((ike, child), (other, (inbound, outbound))) = (a?, b?);
    ensure!(
        ike == other && child == (outbound, inbound),
        "not yet agreed"
    );
    Ok((ike, child))
}

/// Has the child rekeyed so many times, and at each `every`th time the IKE SA with it: by A, by B, and by both, in turn.
fn rekey_both(a: &Gateway<'_>, b: &Gateway<'_>, times: usize, every: usize) -> anyhow::Result<()> {
    for turn in 1..=times {
        let before = wait_for("an agreement", PATIENCE, || spis(a, b).map(Some))?;
        let askers: &[&Gateway<'_>] = match turn % 3 {
            0 => &[a],
            1 => &[b],
            _ => &[a, b],
        };
        let both = turn % every == 0;
        for gateway in askers {
            gateway.asked(async |client| client.rekey("site", Rekey::Children).await)?;
            if both {
                gateway.asked(async |client| client.rekey("site", Rekey::Ike).await)?;
            }
        }
        wait_for("new SAs", PATIENCE, || {
            let now = spis(a, b)?;
            Ok((now.1 != before.1 && (now.0 != before.0 || !both)).then_some(()))
        })
        .with_context(|| format!("rekeying {turn}"))?;
    }
    Ok(())
}

fn strongswan_and_we_rekey_the_same_child_and_we_lose_nothing() -> anyhow::Result<()> {
    against_strongswan(Duration::from_secs(25))
}

fn strongswan_and_we_rekey_the_same_child_for_ten_minutes() -> anyhow::Result<()> {
    against_strongswan(Duration::from_secs(600))
}

/// Both ends rekey the child every five seconds or so and the IKE SA every twenty; what is lost is counted at each hop.
fn against_strongswan(time: Duration) -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let swan = StrongSwan::start(&topology.gateway_b)?;
    let mut connection = Connection::between_sites(Side::B, SUITE.0, SUITE.1);
    connection.children[0].lines = ["rekey_time = 5s", "life_time = 60s", "rand_time = 0s"]
        .map(str::to_owned)
        .to_vec();
    connection.lines = ["rekey_time = 20s", "over_time = 60s", "rand_time = 0s"]
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
    let rekeyed = watch_rekeys(&gateway, time);
    let [out, back] = cut(flows)?;
    let (sealed, offered) = (hops.towards(Side::B)?, hops.towards(Side::A)?);
    let account = format!(
        "to strongSwan: {out}, {sealed} sealed on the way; from strongSwan: {back}, {offered} sealed on the way"
    );
    let (children, ike) = rekeyed.with_context(|| format!("{account}\n{}", swan.log(20)))?;
    eprintln!("{children} children and {ike} IKE SAs rekeyed; {account}");
    let seconds = usize::try_from(time.as_secs())?;
    ensure!(
        children * 10 >= seconds && ike * 30 >= seconds - 5,
        "{children} children and {ike} IKE SAs were rekeyed\n{}",
        gateway.log(30)
    );
    // What we are given, we seal; what strongSwan sealed, we deliver. The rest is lost in strongSwan.
    ensure!(sealed == out.sent && offered == back.received, "{account}");
    ensure!(
        out.refused + back.refused + out.damaged + back.damaged + back.duplicated == 0,
        "{account}"
    );
    capture.stop().is_clean()
}

/// Counts the rekeyings of the child and of the IKE SA for a while, and begins one of the IKE SA every twenty seconds.
fn watch_rekeys(gateway: &Gateway<'_>, time: Duration) -> anyhow::Result<(usize, usize)> {
    let (mut children, mut ike) = (BTreeSet::new(), BTreeSet::new());
    let (begun, mut asked) = (Instant::now(), Instant::now());
    while begun.elapsed() < time {
        let tunnel = gateway.tunnel("site")?;
        children.extend(tunnel.children[0].inbound.map(|inbound| inbound.spi));
        ike.extend(tunnel.ike.map(|ike| (ike.initiator_spi, ike.responder_spi)));
        if asked.elapsed() >= Duration::from_secs(20) {
            gateway.rekey_ike("site")?;
            asked = Instant::now();
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok((
        children.len().saturating_sub(1),
        ike.len().saturating_sub(1),
    ))
}
