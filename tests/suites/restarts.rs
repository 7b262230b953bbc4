//! What becomes of traffic when the daemon or the data plane dies or is restarted: SAs stay, and packets with them.

use std::{collections::BTreeSet, process::ExitCode, time::Duration};

use anyhow::{Context, ensure};
use ipsec_ctl::api::model::State;
use ipsec_tests::{
    capture::Capture,
    cases,
    command::wait_for,
    gateway::{Gateway, Tunnel},
    pair::{PATIENCE, hosts_are_apart, hosts_talk, start_default},
    suite,
    topology::{Family, Options, Side, Topology},
    udp::{Flow, Running},
};

fn main() -> ExitCode {
    suite::main(&cases![
        [] daemons_that_are_killed_come_back_to_their_sas_and_no_packet_is_lost,
        [] long daemons_that_are_killed_under_a_heavy_stream_lose_no_packet,
        [] a_daemon_that_leaves_its_tunnels_finds_them_again,
        [] a_rekeying_after_a_restart_goes_on_from_where_it_was,
        [] what_the_configuration_does_not_want_any_more_is_ended_by_the_next_daemon,
        [] a_journal_that_cannot_be_trusted_is_not_used,
        [] a_data_plane_that_is_killed_is_back_within_a_second_with_the_same_sas,
        [] a_daemon_that_stops_takes_its_data_plane_with_it,
    ])
}

const V4: Family = Family::V4;
/// What a data plane says that has no daemon any more.
const GONE: &str = "the daemon has gone; packets go on";
/// Packets a second of each flow.
const RATE: u32 = 1000;

/// Flows of numbered packets each way, until they are cut.
fn flows(topology: &Topology, rate: u32) -> anyhow::Result<[Running; 2]> {
    let start = |from: Side| {
        let flow = Flow {
            rate: Some(rate),
            time: Duration::from_secs(3600),
            ..Flow::to(from.other().host(V4))
        };
        flow.start(topology.host(from), topology.host(from.other()))
    };
    Ok([start(Side::A)?, start(Side::B)?])
}

/// All that tells one SA of a gateway from another: SPIs of IKE and of ESP.
fn sas(gateway: &Gateway<'_>) -> anyhow::Result<BTreeSet<String>> {
    let tunnel = gateway.tunnel("site")?;
    ensure!(tunnel.state == State::Up, "{:?}", tunnel.state);
    let ike = tunnel.ike.iter();
    let ike = ike.flat_map(|ike| [ike.initiator_spi.clone(), ike.responder_spi.clone()]);
    let children = tunnel.children.iter();
    let esp = children.flat_map(|child| [child.inbound, child.outbound]);
    let esp = esp.flatten().map(|sa| format!("{:08x}", sa.spi));
    let all: BTreeSet<String> = ike.chain(esp).collect();
    ensure!(all.len() == 4, "{all:?}");
    Ok(all)
}

fn daemons_that_are_killed_come_back_to_their_sas_and_no_packet_is_lost() -> anyhow::Result<()> {
    daemons_are_killed_at(RATE)
}

/// At a rate that takes a machine with nothing else to do.
fn daemons_that_are_killed_under_a_heavy_stream_lose_no_packet() -> anyhow::Result<()> {
    daemons_are_killed_at(20_000)
}

fn daemons_are_killed_at(rate: u32) -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (mut a, mut b) = start_default(&topology)?;
    // Next hops are known and paths settled, so that what is lost below is lost by the death of the daemons.
    hosts_talk(&topology, V4)?;
    let before = [sas(&a)?, sas(&b)?];
    let planes = [a.data_plane(), b.data_plane()];
    ensure!(planes.iter().all(Option::is_some), "{planes:?}");
    let capture = Capture::start(&topology.router)?;
    let flows = flows(&topology, rate)?;
    for gateway in [&mut a, &mut b] {
        gateway.kill()?;
        gateway.run()?;
    }
    // Both at once, too.
    a.kill()?;
    b.kill()?;
    std::thread::sleep(Duration::from_millis(500));
    a.run()?;
    b.run()?;
    for gateway in [&a, &b] {
        gateway.wait_up("site", PATIENCE)?;
    }
    for flow in flows {
        let report = flow.cut()?;
        report.is_perfect()?;
        ensure!(report.reordered == 0, "{report}");
    }
    ensure!([sas(&a)?, sas(&b)?] == before, "other SAs\n{}", a.log(40));
    ensure!(
        planes == [a.data_plane(), b.data_plane()],
        "they have been replaced"
    );
    capture.stop().is_clean()
}

fn a_daemon_that_leaves_its_tunnels_finds_them_again() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (mut a, b) = start_default(&topology)?;
    hosts_talk(&topology, V4)?;
    let before = sas(&a)?;
    let flows = flows(&topology, RATE)?;
    a.leave()?;
    a.run()?;
    a.wait_up("site", PATIENCE)?;
    for flow in flows {
        flow.cut()?.is_perfect()?;
    }
    ensure!(sas(&a)? == before && sas(&b)? == before, "{}", a.log(40));
    // A data plane of another version would be replaced now. It goes on where the one before it was.
    a.leave()?;
    a.kill_data_plane()?;
    a.run()?;
    a.wait_up("site", PATIENCE)?;
    hosts_talk(&topology, V4)?;
    ensure!(sas(&a)? == before && sas(&b)? == before, "{}", a.log(40));
    Ok(())
}

fn a_rekeying_after_a_restart_goes_on_from_where_it_was() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (mut a, mut b) = start_default(&topology)?;
    for round in 0..4 {
        let before = sas(&a)?;
        // In the middle of what it has just begun.
        a.rekey_ike("site")?;
        a.rekey("site")?;
        let dies = if round % 2 == 0 { &mut a } else { &mut b };
        dies.kill()?;
        dies.run()?;
        // Whether what was asked for a moment before its death was begun, nobody can tell.
        a.wait_up("site", PATIENCE)?;
        a.rekey_ike("site")?;
        a.rekey("site")?;
        wait_for("both ends to agree on other SAs", PATIENCE, || {
            let (ours, theirs) = (sas(&a)?, sas(&b)?);
            Ok((ours == theirs && ours.is_disjoint(&before)).then_some(()))
        })
        .with_context(|| format!("{round}\nA:\n{}\nB:\n{}", a.log(40), b.log(40)))?;
        hosts_talk(&topology, V4)?;
    }
    Ok(())
}

fn what_the_configuration_does_not_want_any_more_is_ended_by_the_next_daemon() -> anyhow::Result<()>
{
    let topology = Topology::build(Options::default())?;
    let (mut a, b) = start_default(&topology)?;
    let before = sas(&b)?;
    a.kill()?;
    let other = Tunnel::between_sites(Side::A, V4).suite("aes256-sha256-ecp384", "aes256-sha256");
    a.configure("", &[other])?;
    a.run()?;
    wait_for("the tunnel to be gone at the peer", PATIENCE, || {
        let tunnel = b.tunnel("site")?;
        let spi = tunnel.ike.map(|ike| ike.initiator_spi);
        Ok(spi.is_none_or(|spi| !before.contains(&spi)).then_some(()))
    })
    .with_context(|| a.log(40))
}

fn a_journal_that_cannot_be_trusted_is_not_used() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (mut a, _b) = start_default(&topology)?;
    let before = sas(&a)?;
    a.kill()?;
    let mut bytes = std::fs::read(a.journal())?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(a.journal(), bytes)?;
    a.run()?;
    a.wait_up("site", PATIENCE)?;
    hosts_talk(&topology, V4)?;
    ensure!(sas(&a)?.is_disjoint(&before), "{}", a.log(40));
    ensure!(a.has_logged("is not used"), "{}", a.log(40));
    a.stop()?;
    ensure!(!a.journal().exists(), "it outlives the daemon that stopped");
    Ok(())
}

fn a_data_plane_that_is_killed_is_back_within_a_second_with_the_same_sas() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, b) = start_default(&topology)?;
    hosts_talk(&topology, V4)?;
    let before = sas(&a)?;
    let capture = Capture::start(&topology.router)?;
    let flows = flows(&topology, RATE)?;
    let killed = a.data_plane().context("no data plane runs")?;
    a.kill_data_plane()?;
    wait_for("another data plane", PATIENCE, || {
        Ok(a.data_plane().filter(|pid| *pid != killed))
    })?;
    wait_for("the tunnel to carry again", PATIENCE, || {
        hosts_talk(&topology, V4).map(|()| Some(()))
    })
    .with_context(|| format!("A:\n{}\nB:\n{}", a.log(40), b.log(40)))?;
    for flow in flows {
        let report = flow.cut()?;
        // At a known rate the number of packets that are lost tells how long the gap was.
        ensure!(
            report.lost() < RATE.into() && report.duplicated == 0,
            "{report}"
        );
    }
    ensure!(sas(&a)? == before, "other SAs than before\n{}", a.log(40));
    capture.stop().is_clean()
}

fn a_daemon_that_stops_takes_its_data_plane_with_it() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (mut a, _b) = start_default(&topology)?;
    ensure!(a.data_plane().is_some(), "no data plane runs");
    a.stop()?;
    ensure!(a.data_plane().is_none(), "the data plane still runs");
    ensure!(a.has_logged("the data plane ends"), "{}", a.log(20));
    ensure!(!a.log(usize::MAX).contains(GONE), "{}", a.log(20));
    hosts_are_apart(&topology, V4)?;
    // A daemon that is killed leaves it behind; `release` ends it.
    a.run()?;
    a.kill()?;
    ensure!(
        a.data_plane().is_some(),
        "the data plane went with the daemon"
    );
    ensure!(a.has_logged(GONE), "{}", a.log(20));
    a.release()?;
    ensure!(a.data_plane().is_none(), "release leaves the data plane");
    Ok(())
}
