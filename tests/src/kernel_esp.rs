//! What must hold of tunnels that the kernel's ESP carries, with a device or by policies alone: `lines` say which, in the tunnel's
//! configuration.

use std::time::Duration;

use anyhow::{Context, ensure};
use ipsec_ctl::api::model::State;

use crate::{
    capture::Capture,
    command::wait_for,
    gateway::Gateway,
    netns::Netns,
    pair::{PATIENCE, endless, ends, hosts_talk, start},
    ping::Ping,
    topology::{Family, Options, Side, Topology},
    udp::Flow,
};

const V4: Family = Family::V4;

/// The first packet brings up a tunnel on demand.
///
/// # Errors
///
/// What went wrong.
pub fn the_first_packet_brings_up_a_tunnel_on_demand(lines: &str) -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (a, b) = ends(V4);
    let _b = Gateway::start(&topology.gateway_b, &[b.with(lines)])?;
    let a = a.with("role = \"on-demand\"").with(lines);
    let a = Gateway::start(&topology.gateway_a, &[a])?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(a.tunnel("site")?.state != State::Up);
    Ping::to(Side::B.host(V4)).run(&topology.host_a)?;
    a.wait_up("site", PATIENCE)?;
    hosts_talk(&topology, V4)
}

/// Nothing is lost while SAs are replaced by volume.
///
/// # Errors
///
/// What went wrong.
pub fn nothing_is_lost_while_sas_are_replaced_by_volume(lines: &str) -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (mut a, b) = ends(V4);
    a.children[0]
        .lines
        .push("lifetime_packets = 2000".to_owned());
    let (a, _b) = start(&topology, a.with(lines), b.with(lines))?;
    let spi = || -> anyhow::Result<u32> {
        let tunnel = a.tunnel("site")?;
        Ok(tunnel.children[0].outbound.context("no SA")?.spi)
    };
    let first = spi()?;
    let flow = Flow {
        rate: Some(500),
        time: Duration::from_secs(12),
        ..Flow::to(Side::B.host(V4))
    };
    let report = flow.run(&topology.host_a, &topology.host_b)?;
    report.is_perfect()?;
    ensure!(spi()? != first, "the SA was not replaced");
    capture.stop().is_clean()?;
    // Replaced ones linger for what is still on its way.
    wait_for("replaced SAs to go", Duration::from_secs(40), || {
        let states = topology.gateway_a.ip("xfrm state count")?;
        Ok(states.contains("SAD count 2").then_some(()))
    })
}

/// A tunnel that B takes down goes down at A, too, and comes up again at both.
///
/// # Errors
///
/// It does not.
pub fn goes_down_and_comes_up(a: &Gateway<'_>, b: &Gateway<'_>) -> anyhow::Result<()> {
    b.down("site")?;
    a.wait("site", "down at the peer's wish", PATIENCE, |tunnel| {
        tunnel.state != State::Up
    })?;
    b.up("site")?;
    a.up("site")?;
    // Who answered is up first, and sends before the other has what it needs to receive.
    for gateway in [a, b] {
        gateway.wait_up("site", PATIENCE)?;
    }
    Ok(())
}

/// Pings until one is answered.
///
/// # Errors
///
/// None is.
pub fn heals(topology: &Topology, what: &str) -> anyhow::Result<()> {
    wait_for(what, PATIENCE, || {
        let ping = Ping::to(Side::B.host(V4)).count(2);
        let report = ping.run(&topology.host_a)?;
        Ok(report.all_answered().is_ok().then_some(()))
    })
}

/// The policy that leads into the tunnel is put back when others remove it, and when they change it. Without a device what
/// they make of it is theirs, and stays.
fn a_policy_is_put_back(gateway: &Netns, has_device: bool) -> anyhow::Result<()> {
    let selector = "src 10.1.0.0/24 dst 10.2.0.0/24 dir out";
    let list = || gateway.ip(&format!("xfrm policy list {selector} nosock"));
    let before = list()?;
    ensure!(before.contains("tmpl"), "{before}");
    let mut words = before
        .split_whitespace()
        .skip_while(|word| *word != "if_id");
    let number = words.nth(1).map(|number| format!("if_id {number}"));
    let number = number.unwrap_or_default();
    let mut changes = vec![format!("delete {selector} {number}")];
    if has_device {
        changes.push(format!("update {selector} action block {number}"));
    }
    for change in changes {
        gateway.ip(&format!("xfrm policy {change}"))?;
        wait_for(&format!("{change} to be undone"), PATIENCE, || {
            Ok((list()? == before).then_some(()))
        })?;
    }
    Ok(())
}

/// What others flush, change or remove is put back. A tunnel with a device loses that as well, and nothing is in the clear meanwhile.
///
/// # Errors
///
/// What went wrong.
pub fn what_others_flush_is_put_back(lines: &str, device: Option<&str>) -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = ends(V4);
    let (a, _b) = start(&topology, a.with(lines), b.with(lines))?;
    hosts_talk(&topology, V4)?;
    for what in ["policy flush", "state flush"] {
        topology.gateway_a.ip(&format!("xfrm {what}"))?;
        heals(&topology, &format!("the tunnel to heal from {what}"))?;
    }
    a_policy_is_put_back(&topology.gateway_a, device.is_some())?;
    if let Some(device) = device {
        topology.gateway_a.ip(&format!("link del {device}"))?;
        heals(&topology, "the tunnel to heal without its device")?;
    }
    ensure!(a.has_logged("somebody has"), "{}", a.log(40));
    if device.is_some() {
        hosts_talk(&topology, V4)?;
        return capture.stop().is_clean();
    }
    // The whole host has been without policies for a moment.
    drop(capture);
    let capture = Capture::start(&topology.router)?;
    hosts_talk(&topology, V4)?;
    capture.stop().is_clean()
}

/// Nothing is in the clear while daemon and data plane are killed and started again, and none of what the dead ones left stays.
///
/// # Errors
///
/// What went wrong.
pub fn nothing_is_in_the_clear_through_kill_and_restart(lines: &str) -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let (a, b) = ends(V4);
    let mut a = Gateway::prepare(&topology.gateway_a, "", &[a.with(lines)])?;
    let mut b = Gateway::prepare(&topology.gateway_b, "", &[b.with(lines)])?;
    for gateway in [&a, &b] {
        gateway.guard()?;
    }
    let flows = [
        endless(&topology, Side::A, V4)?,
        endless(&topology, Side::B, V4)?,
    ];
    for _ in 0..2 {
        b.run()?;
        a.run()?;
        a.wait_up("site", PATIENCE)?;
        for gateway in [&mut a, &mut b] {
            // What carries packets may be a process of its own.
            let _ = gateway.kill_data_plane();
            gateway.kill()?;
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    b.run()?;
    a.run()?;
    for gateway in [&a, &b] {
        gateway.wait_up("site", PATIENCE)?;
    }
    hosts_talk(&topology, V4)?;
    // What the dead ones left is gone.
    wait_for("leftovers to go", PATIENCE, || {
        let states = topology.gateway_a.ip("xfrm state count")?;
        Ok(states.contains("SAD count 2").then_some(()))
    })
    .with_context(|| topology.gateway_a.ip("xfrm state").unwrap_or_default())
    .with_context(|| a.log(30))?;
    for flow in flows {
        flow.cut()?;
    }
    capture.stop().is_clean()
}
