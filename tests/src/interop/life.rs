//! What becomes of tunnels that are up: addresses that move, SAs that are replaced and deleted, daemons that die and return.

use std::{fs, thread, time::Duration};

use anyhow::{Context, ensure};
use ipsec_ctl::api::model::State;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{Column, Kind, SUITE, peer::Peer, talk, topology};
use crate::{
    command::wait_for,
    gateway::Gateway,
    hops::Hops,
    pair::PATIENCE,
    ping::Ping,
    topology::{Family, Side, Topology},
    udp::{Flow, Running},
};

const V4: Family = Family::V4;
/// Long enough for a peer to be given up, with retransmissions.
const DEATH: Duration = Duration::from_secs(40);
/// Our liveness checks where they matter.
const DPD: &str = "dpd = { interval = \"2s\", timeout = \"6s\" }";
const PERIODIC_DPD: &str = "dpd = { mode = \"periodic\", interval = \"2s\", timeout = \"6s\" }";

/// The group of the IKE SA, and one that it did not use.
pub(super) const SAME_GROUP: &str = "x25519";
pub(super) const OTHER_GROUP: &str = "ecp384";

/// Packets of a flow at 200 a second that the peer may lose while it replaces an SA.
const MOST_LOST_BY_PEER: u64 = 10;

pub(super) fn moves(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, mut connection) = column.plan();
    connection.mobike = true;
    let tunnel = match column.kind {
        Kind::StrongSwan => tunnel,
        // Its answers hold no COOKIE2, so that it cannot show that it is where it claims to be.
        Kind::LibreSwan => tunnel.with("return_routability = false"),
    };
    // libreswan's peers move only if they may call from anywhere, and it moves only with an address that the kernel chooses.
    match (column.kind, column.we_initiate) {
        (Kind::StrongSwan, _) | (Kind::LibreSwan, false) => connection.local = None,
        (Kind::LibreSwan, true) => connection.remote = None,
    }
    let (gateway, peer) = column.up(&topology, (tunnel, &connection))?;
    let before = gateway.tunnel("site")?.ike.context("no IKE SA")?;
    ensure!(before.mobike, "MOBIKE was not agreed on");
    let side = if column.we_initiate { Side::A } else { Side::B };
    topology.renumber(side, side.outside(V4), side.elsewhere())?;
    let moved = gateway
        .wait("site", "elsewhere", PATIENCE, |tunnel| {
            let at = tunnel.ike.as_ref().map(|ike| (ike.local, ike.remote));
            // It may also take an IPv6 address that it was told of.
            at.is_some_and(|(ours, theirs)| ![ours.ip(), theirs.ip()].contains(&side.outside(V4)))
        })
        .with_context(|| peer.to_string())?;
    let ike = moved.ike.context("no IKE SA")?;
    ensure!(ike.initiator_spi == before.initiator_spi, "another IKE SA");
    wait_for("traffic", PATIENCE, || Ok(talk(&topology, V4).ok()))
}

/// SAs are replaced while packets flow, and none is lost. It is done by command, so that no lifetime ends meanwhile: whatever we
/// do not seal we have lost, however slow the machine is.
pub(super) fn replaced(
    column: &Column,
    replace: impl Fn(&Gateway<'_>, &Peer<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = column.plan();
    let (gateway, peer) = column.up(&topology, (tunnel, &connection))?;
    talk(&topology, V4)?;
    let before = gateway.spis("site")?;
    let (hops, flow) = (Hops::count(&topology)?, traffic(&topology)?);
    replace(&gateway, &peer)?;
    gateway
        .wait("site", "rekeyed", PATIENCE, |_| {
            gateway.spis("site").is_ok_and(|now| now != before)
        })
        .with_context(|| peer.to_string())?;
    settle(flow, &hops).with_context(|| format!("what we have dropped: {}", dropped(&gateway)))?;
    talk(&topology, V4)
}

/// Lets the traffic go on for a while after what has happened: then we must have sealed all of it, and the peer may have
/// dropped what came on an SA that it had just removed.
fn settle(flow: Running, hops: &Hops<'_>) -> anyhow::Result<()> {
    thread::sleep(Duration::from_secs(1));
    let report = flow.cut()?;
    let sealed = hops.towards(Side::B)?;
    ensure!(
        sealed >= report.sent && report.refused == 0 && report.damaged == 0,
        "we lost packets: {report}, {sealed} sealed"
    );
    ensure!(
        report.lost() <= MOST_LOST_BY_PEER,
        "the peer lost packets: {report}, {sealed} sealed"
    );
    Ok(())
}

/// Reasons for which a gateway has dropped packets.
fn dropped(gateway: &Gateway<'_>) -> String {
    let counters = gateway.counters().unwrap_or_default();
    let dropped = counters
        .iter()
        .filter(|counter| counter.kind == "dropped" && counter.packets > 0)
        .map(|counter| format!("{} {}", counter.packets, counter.name));
    dropped.collect::<Vec<_>>().join(", ")
}

/// A flow from site A to site B at a moderate rate, until it is cut.
fn traffic(topology: &Topology) -> anyhow::Result<Running> {
    let flow = Flow {
        rate: Some(200),
        time: Duration::from_secs(60),
        ..Flow::to(Side::B.host(V4))
    };
    flow.start(&topology.host_a, &topology.host_b)
}

/// The child is rekeyed with a key exchange. The first child has none of its own, so its group is used for the first time.
pub(super) fn pfs(
    column: &Column,
    group: &str,
    rekey: impl Fn(&Gateway<'_>, &Peer<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = column.plan_for(Side::A, (SUITE.0, &format!("{}-{group}", SUITE.1)));
    let (gateway, peer) = column.up(&topology, (tunnel, &connection))?;
    let before = gateway.spis("site")?;
    rekey(&gateway, &peer)?;
    gateway
        .wait("site", "rekeyed", PATIENCE, |_| {
            gateway.spis("site").is_ok_and(|now| now != before)
        })
        .with_context(|| peer.to_string())?;
    let suite = gateway.tunnel("site")?.children[0].suite.clone();
    ensure!(
        suite.as_ref().is_some_and(|suite| suite.ends_with(group)),
        "{suite:?}"
    );
    talk(&topology, V4)
}

pub(super) fn peer_deletes_child(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = column.plan();
    let (gateway, peer) = column.up(&topology, (tunnel, &connection))?;
    let before = gateway.spis("site")?;
    peer.terminate_child()?;
    // libreswan 5 makes another by itself.
    gateway.wait("site", "without that child", PATIENCE, |_| {
        gateway.spis("site").map_or(true, |now| now != before)
    })?;
    if !column.we_initiate && column.kind == Kind::StrongSwan {
        peer.initiate("net")?;
    } else if !column.we_initiate {
        let _ = peer.initiate("net");
    }
    // Where we start tunnels, we ask for the child again.
    gateway.wait_up("site", PATIENCE)?;
    talk(&topology, V4)
}

pub(super) fn peer_deletes(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = column.plan();
    let (gateway, peer) = column.up(&topology, (tunnel, &connection))?;
    peer.terminate()?;
    if !column.we_initiate {
        gateway.wait("site", "down", PATIENCE, |tunnel| tunnel.ike.is_none())?;
        peer.initiate("net")?;
    }
    gateway.wait_up("site", PATIENCE)?;
    talk(&topology, V4)
}

pub(super) fn we_delete(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = column.plan();
    let (gateway, peer) = column.up(&topology, (tunnel, &connection))?;
    gateway.down("site")?;
    no_ike_sas(&peer, PATIENCE)
}

pub(super) fn peer_freezes(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = column.plan();
    // ESP of the kernel goes on without its daemon, and would be a sign of life.
    let asks = match column.kind {
        Kind::StrongSwan => DPD,
        Kind::LibreSwan => PERIODIC_DPD,
    };
    let (gateway, peer) = column.up(&topology, (tunnel.with(asks), &connection))?;
    peer.freeze()?;
    if column.kind == Kind::StrongSwan {
        send_for_a_while(&topology)?;
    }
    let dead = gateway.wait("site", "given up", DEATH, |tunnel| {
        tunnel.state != State::Up
    });
    peer.thaw()?;
    dead?;
    if !column.we_initiate {
        // It has to find out that we gave it up; a new start is what its operator would do.
        let _ = peer.terminate();
        peer.initiate("net")?;
    }
    gateway.wait_up("site", DEATH)?;
    wait_for("traffic", PATIENCE, || Ok(talk(&topology, V4).ok()))
}

/// Pings for 15 s, whether they are answered or not.
fn send_for_a_while(topology: &Topology) -> anyhow::Result<()> {
    let pings = Ping::to(Side::B.host(V4))
        .count(75)
        .interval(Duration::from_millis(200));
    pings.run(&topology.host_a).map(drop)
}

/// Waits until the peer has forgotten us.
fn no_ike_sas(peer: &Peer<'_>, patience: Duration) -> anyhow::Result<()> {
    wait_for("the peer's IKE SAs to go", patience, || {
        Ok((peer.ike_sas()? == 0).then_some(()))
    })
    .with_context(|| peer.to_string())
}

pub(super) fn we_freeze(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, mut connection) = column.plan();
    connection.dpd = 2;
    let (gateway, peer) = column.up(&topology, (tunnel.with(DPD), &connection))?;
    let pid = Pid::from_raw(i32::try_from(gateway.pid().context("no daemon")?)?);
    kill(pid, Signal::SIGSTOP)?;
    let dead = no_ike_sas(&peer, DEATH);
    kill(pid, Signal::SIGCONT)?;
    dead?;
    if column.we_initiate {
        // What comes on the SAs that it has forgotten it drops; traffic makes us ask.
        send_for_a_while(&topology)?;
    } else {
        // One that revives by itself what was up is quicker.
        let _ = peer.initiate("net");
    }
    wait_for("a new IKE SA", DEATH, || {
        Ok((peer.ike_sas()? > 0).then_some(()))
    })?;
    gateway.wait_up("site", DEATH)?;
    wait_for("traffic", PATIENCE, || Ok(talk(&topology, V4).ok()))
}

pub(super) fn peer_returns(column: &Column, initial_contact: bool) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, mut connection) = column.plan();
    connection.initial_contact = initial_contact;
    let (gateway, peer) = column.up(&topology, (tunnel.with(DPD), &connection))?;
    let before = gateway.tunnel("site")?.ike.context("no IKE SA")?;
    let peer = peer.crash_and_restart(&connection)?;
    // Both may call now, and one tunnel must remain.
    peer.initiate("net")?;
    gateway.wait("site", "up anew", PATIENCE, |tunnel| {
        tunnel.state == State::Up
            && tunnel
                .ike
                .as_ref()
                .is_some_and(|ike| ike.initiator_spi != before.initiator_spi)
    })?;
    // One that does not say that it has lost its SAs has new ones, and traffic follows those before DPD says anything.
    wait_for("traffic", Duration::from_secs(8), || {
        Ok(talk(&topology, V4).ok())
    })
}

/// Our daemon dies and its journal leads it back: no SA is another, no packet is lost, and the peer notices nothing.
pub(super) fn we_come_back(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = column.plan();
    let (mut gateway, peer) = column.up(&topology, (tunnel, &connection))?;
    talk(&topology, V4)?;
    let before = gateway.spis("site")?;
    let (hops, flow) = (Hops::count(&topology)?, traffic(&topology)?);
    gateway.kill()?;
    gateway.run()?;
    gateway.wait_up("site", PATIENCE)?;
    settle(flow, &hops)?;
    ensure!(gateway.spis("site")? == before, "other SAs\n{peer}");
    // Whoever has to ask next is answered.
    peer.rekey_child("net")?;
    gateway.wait("site", "rekeyed", PATIENCE, |_| {
        gateway.spis("site").is_ok_and(|now| now != before)
    })?;
    ensure!(peer.ike_sas()? == 1, "{peer}");
    talk(&topology, V4)
}

pub(super) fn we_return(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = column.plan();
    let (mut gateway, peer) = column.up(&topology, (tunnel, &connection))?;
    gateway.kill()?;
    fs::remove_file(gateway.journal())?;
    gateway.run()?;
    if !column.we_initiate {
        let _ = peer.terminate();
        peer.initiate("net")?;
    }
    gateway.wait_up("site", DEATH)?;
    // libreswan replaces the child, and keeps the old IKE SA until it asks whether we live.
    if column.kind == Kind::StrongSwan {
        wait_for("one IKE SA", PATIENCE, || {
            Ok((peer.ike_sas()? == 1).then_some(()))
        })
        .with_context(|| peer.to_string())?;
    }
    wait_for("traffic", PATIENCE, || Ok(talk(&topology, V4).ok()))
}
