//! Several branches under one tunnel of gateway B, whose peer may be anywhere: gateway A, and another one in the
//! attacker's place.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use anyhow::Context;
use ipsec_ctl::api::model::State;

use crate::{
    capture::Capture,
    command::wait_for,
    gateway::{Gateway, Tunnel},
    netns::Netns,
    pair::{PATIENCE, hosts_talk},
    ping::Ping,
    topology::{Family, Options, Side, Topology},
};

/// Another network of site A, with an address of its host in it.
const SECOND: (&str, Ipv4Addr, Ipv4Addr) = (
    "10.3.0.0/24",
    Ipv4Addr::new(10, 3, 0, 10),
    Ipv4Addr::new(10, 3, 0, 1),
);
/// What the other branch has behind it, and its address there.
pub const OTHER: (&str, Ipv4Addr) = ("10.4.0.0/24", Ipv4Addr::new(10, 4, 0, 1));

/// Gateway B's tunnel for all branches, with one child for all their networks.
fn for_all(line: &str) -> Tunnel {
    let mut tunnel = Tunnel::between_sites(Side::B, Family::V4)
        .respond_to_any()
        .with(line);
    tunnel.remote_id.clear();
    for child in &mut tunnel.children {
        child.remote.extend([SECOND.0, OTHER.0].map(str::to_owned));
    }
    tunnel
}

/// The other branch, which calls from the attacker's place, with one more line.
///
/// # Errors
///
/// It does not start.
pub fn other_branch<'a>(topology: &'a Topology, line: &str) -> anyhow::Result<Gateway<'a>> {
    let netns = &topology.attacker;
    netns.sysctl("net.ipv4.ip_forward", "1")?;
    netns.ip(&format!("addr add {}/32 dev lo", OTHER.1))?;
    let mut tunnel = Tunnel::between_sites(Side::A, Family::V4).with(line);
    tunnel.local_id = "c.example".to_owned();
    for child in &mut tunnel.children {
        child.local = vec![OTHER.0.to_owned()];
    }
    Gateway::start(netns, &[tunnel])
}

/// Pings, after one more that finds neighbours, which takes long where the machine is slow.
fn talk(from: &Netns, to: IpAddr) -> anyhow::Result<()> {
    Ping::to(to).count(1).run(from)?;
    Ping::to(to).run(from)?.all_answered()
}

fn pings(topology: &Topology) -> anyhow::Result<()> {
    for (from, to) in [
        (&topology.host_b, OTHER.1.into()),
        (&topology.attacker, Side::B.host(Family::V4)),
    ] {
        talk(from, to)?;
    }
    Ok(())
}

/// Two gateways come in under one tunnel: each gets its own traffic, while either rekeys and when one has gone.
///
/// # Errors
///
/// What went wrong.
pub fn each_of_two_initiators_gets_its_own(line: &str) -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let b = Gateway::start(&topology.gateway_b, &[for_all(line)])?;
    let a = Gateway::start(
        &topology.gateway_a,
        &[Tunnel::between_sites(Side::A, Family::V4)],
    )?;
    a.wait_up("site", PATIENCE).with_context(|| b.log(40))?;
    let c = other_branch(&topology, "")?;
    c.wait_up("site", PATIENCE).with_context(|| b.log(40))?;
    let all_talk = |when: &str| {
        hosts_talk(&topology, Family::V4)
            .and_then(|()| pings(&topology))
            .with_context(|| format!("{when}\n{}", b.log(40)))
    };
    all_talk("with both branches up")?;
    for branch in [&a, &c] {
        branch.rekey("site")?;
    }
    all_talk("after both were rekeyed")?;
    c.down("site")?;
    wait_for("the other branch to be down", PATIENCE, || {
        Ok((c.tunnel("site")?.state != State::Up).then_some(()))
    })?;
    hosts_talk(&topology, Family::V4).context("when the newer branch has gone")?;
    Ping::to(OTHER.1.into())
        .run(&topology.host_b)?
        .none_answered()
        .context("from a branch that is down")?;
    capture.stop().is_clean()
}

/// A branch has two pairs of one child of gateway B: each carries what it was narrowed to.
///
/// # Errors
///
/// What went wrong.
pub fn each_of_two_pairs_of_one_child_carries_its_own(line: &str) -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    topology
        .host_a
        .ip(&format!("addr add {}/24 dev lan", SECOND.1))?;
    topology
        .gateway_a
        .ip(&format!("addr add {}/24 dev lan", SECOND.2))?;
    let mut tunnel = Tunnel::between_sites(Side::A, Family::V4);
    let mut second = tunnel.children[0].clone();
    second.name = "second".to_owned();
    second.local = vec![SECOND.0.to_owned()];
    tunnel.children.push(second);
    let b = Gateway::start(&topology.gateway_b, &[for_all(line)])?;
    let a = Gateway::start(&topology.gateway_a, &[tunnel])?;
    a.wait_up("site", PATIENCE).with_context(|| b.log(40))?;
    let both_up = || {
        let tunnel = a.tunnel("site")?;
        let mut children = tunnel.children.iter();
        Ok(children.all(|child| child.outbound.is_some()).then_some(()))
    };
    wait_for(
        "both children of the branch",
        Duration::from_secs(10),
        both_up,
    )?;
    let all_talk = |when: &str| {
        hosts_talk(&topology, Family::V4)?;
        talk(&topology.host_b, SECOND.1.into()).with_context(|| format!("{when}\n{}", b.log(40)))
    };
    all_talk("with both pairs up")?;
    a.rekey("site")?;
    all_talk("after both were rekeyed")?;
    capture.stop().is_clean()
}
