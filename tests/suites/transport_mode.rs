//! Transport mode between two hosts, which the kernel engine alone carries.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, ensure};
use ipsec_tests::{
    capture::Capture,
    cases,
    gateway::{Gateway, Tunnel},
    pair::{PATIENCE, start},
    ping::Ping,
    strongswan::{Connection, StrongSwan},
    suite::{self, Need::*},
    topology::{Family, Options, Side, Topology},
    udp::Flow,
};

fn main() -> ExitCode {
    suite::main(&cases![
        [XfrmInterfaces, StrongSwan] strongswan_agrees_to_transport_mode_in_both_roles,
        [XfrmInterfaces] what_no_sa_protects_is_blocked_before_and_after_the_daemon,
    ])
}

const IKE: &str = "aes256gcm16-prfsha384-x25519";
const ESP: &str = "aes256gcm16-esn";

/// A tunnel between the outer addresses of the gateways.
fn between_hosts(side: Side, family: Family) -> Tunnel {
    let mut tunnel = Tunnel::between_sites(side, family)
        .suite(IKE, ESP)
        .with("engine = \"kernel\"")
        .with("mode = \"transport\"");
    let child = &mut tunnel.children[0];
    child.local = vec![side.outside(family).to_string()];
    child.remote = vec![side.other().outside(family).to_string()];
    tunnel
}

fn gateways_talk(topology: &Topology, family: Family) -> anyhow::Result<()> {
    for from in [Side::A, Side::B] {
        let (here, there) = (topology.gateway(from), topology.gateway(from.other()));
        let address = from.other().outside(family);
        Ping::to(address).count(3).run(here)?.all_answered()?;
        let flow = Flow {
            time: Duration::from_millis(300),
            ..Flow::to(address)
        };
        flow.run(here, there)?.is_perfect()?;
    }
    Ok(())
}

fn gateways_are_apart(topology: &Topology, family: Family) -> anyhow::Result<()> {
    for from in [Side::A, Side::B] {
        let ping = Ping::to(from.other().outside(family)).count(2);
        let report = ping.run(topology.gateway(from))?;
        report
            .none_answered()
            .with_context(|| format!("from site {from:?}"))?;
    }
    Ok(())
}

fn strongswan_agrees_to_transport_mode_in_both_roles() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let swan = StrongSwan::start_with_kernel_esp(&topology.gateway_b)?;
    let mut connection = Connection::between_sites(Side::B, IKE, ESP);
    connection.lines = vec!["encap = no".to_owned()];
    let child = &mut connection.children[0];
    child.local = Side::B.outside(Family::V4).to_string();
    child.remote = Side::A.outside(Family::V4).to_string();
    child.lines = vec!["mode = transport".to_owned()];
    swan.load(&connection)?;
    for we_start in [true, false] {
        let capture = Capture::start(&topology.router)?;
        let tunnel = between_hosts(Side::A, Family::V4);
        let tunnel = if we_start { tunnel } else { tunnel.respond() };
        let gateway = Gateway::start(&topology.gateway_a, &[tunnel])?;
        if !we_start {
            swan.initiate("net")?;
        }
        gateway
            .wait_up("site", PATIENCE)
            .with_context(|| swan.log(40))?;
        let modes = swan.sas()?;
        ensure!(modes.contains("TRANSPORT"), "{modes}");
        gateways_talk(&topology, Family::V4).with_context(|| format!("we start: {we_start}"))?;
        gateway.rekey("site")?;
        gateways_talk(&topology, Family::V4).context("after rekeying")?;
        capture.stop().is_sealed(500, false)?;
        gateway.down("site")?;
        swan.wait_sas("it to forget the SAs", PATIENCE, |sas| !sas.contains("net"))?;
        drop(gateway);
        let policies = topology.gateway_a.ip("xfrm policy")?;
        ensure!(policies.contains("action block"), "{policies}");
    }
    Ok(())
}

fn what_no_sa_protects_is_blocked_before_and_after_the_daemon() -> anyhow::Result<()> {
    let family = Family::V6;
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let tunnel = |side| between_hosts(side, family);
    for (netns, side) in [
        (&topology.gateway_a, Side::A),
        (&topology.gateway_b, Side::B),
    ] {
        Gateway::prepare(netns, "", &[tunnel(side)])?.guard()?;
    }
    gateways_are_apart(&topology, family)?;
    let (mut a, mut b) = start(&topology, tunnel(Side::A), tunnel(Side::B).respond())?;
    gateways_talk(&topology, family)?;
    for gateway in [&mut a, &mut b] {
        ensure!(gateway.stop()?.success());
    }
    gateways_are_apart(&topology, family)?;
    capture.stop().is_clean()?;
    for gateway in [&a, &b] {
        gateway.release()?;
    }
    for netns in [&topology.gateway_a, &topology.gateway_b] {
        let left = netns.ip("xfrm policy")? + &netns.ip("xfrm state")?;
        ensure!(left.trim().is_empty(), "{left}");
    }
    gateways_talk(&topology, family)
}
