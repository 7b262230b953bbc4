//! What becomes of traffic when the daemon or the data plane dies or is restarted: SAs stay, and packets with them.

use std::{collections::BTreeSet, path::Path, process::ExitCode, time::Duration};

use anyhow::{Context, ensure};
use ipsec_ctl::api::model::State;
use ipsec_tests::{
    capture::Capture,
    cases,
    command::wait_for,
    gateway::{Gateway, Tunnel},
    hops::Hops,
    pair::{Flows, PATIENCE, hosts_are_apart, hosts_talk, start, start_default},
    strongswan::{Connection, StrongSwan},
    suite::{self, Need::*},
    topology::{Family, Options, Side, Topology},
};

fn main() -> ExitCode {
    suite::main(&cases![
        [] daemons_that_are_killed_come_back_to_their_sas_and_no_packet_is_lost,
        [] long daemons_that_are_killed_under_a_heavy_stream_lose_no_packet,
        [] a_daemon_that_leaves_its_tunnels_finds_them_again,
        [] a_rekeying_after_a_restart_goes_on_from_where_it_was,
        [] what_the_configuration_does_not_want_any_more_is_ended_by_the_next_daemon,
        [] a_journal_that_cannot_be_trusted_is_not_used,
        [] an_upgrade_replaces_the_data_plane_and_keeps_the_sas,
        [] an_upgrade_that_cannot_read_the_journal_negotiates_anew_and_leaks_nothing,
        [StrongSwan, Nftables] strongswan_notices_no_restart_of_our_daemon_in_either_role,
        [] a_data_plane_that_is_killed_is_back_within_a_second_with_the_same_sas,
        [] a_daemon_that_stops_takes_its_data_plane_with_it,
    ])
}

const V4: Family = Family::V4;
/// What a data plane says that has no daemon any more.
const GONE: &str = "the daemon has gone; packets go on";
/// Packets a second of each flow.
const RATE: u32 = 1000;

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
    let flows = Flows::at(&topology, rate)?;
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
    for report in flows.cut()? {
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
    let flows = Flows::at(&topology, RATE)?;
    a.leave()?;
    a.run()?;
    a.wait_up("site", PATIENCE)?;
    flows.are_perfect()?;
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
        // What the operator was told holds, whoever died in the next moment.
        a.wait_up("site", PATIENCE)?;
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

/// What an upgrade does to a gateway: its daemon leaves the tunnels, another file takes its place and starts.
fn upgrade(
    gateway: &mut Gateway<'_>,
    meanwhile: impl FnOnce(&Gateway<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    gateway.leave()?;
    meanwhile(gateway)?;
    gateway.upgrade()?;
    gateway.run()
}

fn an_upgrade_replaces_the_data_plane_and_keeps_the_sas() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (mut a, b) = start_default(&topology)?;
    hosts_talk(&topology, V4)?;
    let before = sas(&a)?;
    let capture = Capture::start(&topology.router)?;
    let flows = Flows::at(&topology, RATE)?;
    let plane = a.data_plane().context("no data plane runs")?;
    upgrade(&mut a, |_| Ok(()))?;
    a.wait_up("site", PATIENCE)?;
    wait_for("the tunnel to carry again", PATIENCE, || {
        hosts_talk(&topology, V4).map(Some)
    })?;
    flows.lose_less_than(RATE)?;
    ensure!(sas(&a)? == before && sas(&b)? == before, "{}", a.log(40));
    ensure!(
        a.data_plane().is_some_and(|now| now != plane),
        "the data plane is of the old file"
    );
    capture.stop().is_clean()
}

/// Makes a journal look as if a version with another format had written it: its first record tells whose it is.
fn of_another_format(journal: &Path) -> anyhow::Result<()> {
    /// Where the first record begins, behind what tells a journal from other files, and the length of its head: the
    /// content's length, the same inverted, and half of a SHA-256.
    const RECORD: usize = 8;
    const HEAD: usize = 16;
    let mut bytes = std::fs::read(journal)?;
    let record = bytes.get_mut(RECORD..).context("a short journal")?;
    let (head, content) = record
        .split_at_mut_checked(HEAD)
        .context("a short journal")?;
    let length = u32::from_be_bytes(*head.first_chunk().context("no length")?);
    let content = &mut content[..usize::try_from(length)?];
    // MessagePack: the name of a field, and then its value, a small number.
    let name = memchr::memmem::find(content, b"format").context("no format")?;
    let format = &mut content[name + b"format".len()];
    ensure!(*format < 0x7f, "{format:02x}");
    *format += 1;
    let sum = ring::digest::digest(
        &ring::digest::SHA256,
        &[&0_u64.to_be_bytes(), &content[..]].concat(),
    );
    head[8..].copy_from_slice(&sum.as_ref()[..8]);
    Ok(std::fs::write(journal, bytes)?)
}

fn an_upgrade_that_cannot_read_the_journal_negotiates_anew_and_leaks_nothing() -> anyhow::Result<()>
{
    // The initiator calls at once; the responder is called when its peer has found out.
    for upgraded in [Side::A, Side::B] {
        let topology = Topology::build(Options::default())?;
        // With MOBIKE a silent peer is looked for at its LAN's IPv6 address, too, which a capture takes for a leak.
        let end = |side| {
            Tunnel::between_sites(side, V4)
                .with("mobike = false")
                .with("dpd = { interval = \"2s\", timeout = \"5s\" }")
        };
        let (mut a, mut b) = start(&topology, end(Side::A), end(Side::B).respond())?;
        let before = sas(&a)?;
        let capture = Capture::start(&topology.router)?;
        let flows = Flows::at(&topology, RATE)?;
        let gateway = match upgraded {
            Side::A => &mut a,
            Side::B => &mut b,
        };
        upgrade(gateway, |gateway| of_another_format(&gateway.journal()))?;
        ensure!(
            gateway.has_logged("tunnels are negotiated anew")
                && gateway.has_logged("it is of another version"),
            "{}",
            gateway.log(40)
        );
        wait_for("new SAs at both ends", PATIENCE, || {
            let (ours, theirs) = (sas(&a)?, sas(&b)?);
            Ok((ours == theirs && ours.is_disjoint(&before)).then_some(()))
        })
        .with_context(|| format!("A:\n{}\nB:\n{}", a.log(40), b.log(40)))?;
        wait_for("the tunnel to carry again", PATIENCE, || {
            hosts_talk(&topology, V4).map(Some)
        })?;
        for report in flows.cut()? {
            ensure!(report.duplicated + report.damaged == 0, "{report}");
        }
        capture.stop().is_clean()?;
    }
    Ok(())
}

fn strongswan_notices_no_restart_of_our_daemon_in_either_role() -> anyhow::Result<()> {
    const SUITE: (&str, &str) = ("aes256gcm16-prfsha384-x25519", "aes256gcm16");
    for we_initiate in [true, false] {
        let topology = Topology::build(Options::default())?;
        let swan = StrongSwan::start(&topology.gateway_b)?;
        // It asks whether we live whenever it has not heard of us for a second.
        swan.load(&Connection {
            dpd: 1,
            ..Connection::between_sites(Side::B, SUITE.0, SUITE.1)
        })?;
        let tunnel = Tunnel::between_sites(Side::A, V4)
            .suite(SUITE.0, SUITE.1)
            .with("nat = \"force\"");
        let tunnel = if we_initiate {
            tunnel
        } else {
            tunnel.respond()
        };
        let mut gateway = Gateway::start(&topology.gateway_a, &[tunnel])?;
        if !we_initiate {
            swan.initiate("net")?;
        }
        gateway.wait_up("site", PATIENCE)?;
        hosts_talk(&topology, V4)?;
        let before = sas(&gateway)?;
        let hops = Hops::count(&topology)?;
        let flows = Flows::at(&topology, RATE)?;
        for _ in 0..3 {
            gateway.kill()?;
            gateway.run()?;
            gateway.wait_up("site", PATIENCE)?;
        }
        let [out, back] = flows.cut()?;
        let (sealed, offered) = (hops.towards(Side::B)?, hops.towards(Side::A)?);
        ensure!(
            sealed == out.sent && offered == back.received && back.duplicated == 0,
            "to strongSwan: {out}, {sealed} sealed on the way; from strongSwan: {back}, {offered} sealed on the way"
        );
        ensure!(sas(&gateway)? == before, "{}", gateway.log(40));
        // What comes next in the IKE SA is asked and answered under the message IDs that come next.
        swan.rekey_child("net")?;
        swan.rekey_ike()?;
        gateway.rekey("site")?;
        wait_for("other SAs", PATIENCE, || {
            Ok(sas(&gateway)?.is_disjoint(&before).then_some(()))
        })
        .with_context(|| format!("{}\n{}", gateway.log(40), swan.log(40)))?;
        ensure!(
            swan.sas()?.matches("ESTABLISHED").count() == 1 && !swan.has_logged("retransmit 2"),
            "{}\n{}",
            swan.sas()?,
            swan.log(60)
        );
        hosts_talk(&topology, V4)?;
    }
    Ok(())
}

fn a_data_plane_that_is_killed_is_back_within_a_second_with_the_same_sas() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, b) = start_default(&topology)?;
    hosts_talk(&topology, V4)?;
    let before = sas(&a)?;
    let capture = Capture::start(&topology.router)?;
    let flows = Flows::at(&topology, RATE)?;
    let killed = a.data_plane().context("no data plane runs")?;
    a.kill_data_plane()?;
    wait_for("another data plane", PATIENCE, || {
        Ok(a.data_plane().filter(|pid| *pid != killed))
    })?;
    wait_for("the tunnel to carry again", PATIENCE, || {
        hosts_talk(&topology, V4).map(|()| Some(()))
    })
    .with_context(|| format!("A:\n{}\nB:\n{}", a.log(40), b.log(40)))?;
    flows.lose_less_than(RATE)?;
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
