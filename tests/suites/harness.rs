//! The harness tests itself: with plain routing, and with strongSwan at both ends.

use std::{net::IpAddr, process::ExitCode, time::Duration};

use anyhow::{Context, ensure};
use ipsec_tests::{
    capture::Capture,
    cases, command,
    gateway::{self, Gateway, Tunnel},
    netns::{Netns, Scope},
    ping::Ping,
    strongswan::{Connection, StrongSwan},
    suite::{self, Need::*},
    tcp,
    topology::{Family, Options, Side, Topology},
    udp::Flow,
};

fn main() -> ExitCode {
    suite::main(&cases![
        [] the_configuration_of_a_gateway_is_valid,
        [] what_is_routed_in_the_clear_arrives_and_is_found_by_the_capture,
        [Nftables] behind_a_nat_the_gateway_appears_with_the_routers_address,
        [StrongSwan] two_strongswans_carry_pings_udp_and_tcp_and_nothing_is_in_the_clear,
        [StrongSwan, Nftables] two_strongswans_find_the_nat_between_them,
    ])
}

fn the_configuration_of_a_gateway_is_valid() -> anyhow::Result<()> {
    let netns = Netns::create(&Scope::of_this_test().name("gateway"))?;
    let tunnel = Tunnel::between_sites(Side::A, Family::V6)
        .suite("aes256-sha512-ecp521", "aes256-sha512")
        .respond_to_any();
    let gateway = Gateway::prepare(&netns, "", &[tunnel])?;
    command::checked(
        std::process::Command::new(gateway::program()?)
            .arg("check")
            .arg(gateway.config()),
    )?;
    Ok(())
}

fn what_is_routed_in_the_clear_arrives_and_is_found_by_the_capture() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let mut packets = 0;
    for family in [Family::V4, Family::V6] {
        let to = Side::B.host(family);
        Ping::to(to).run(&topology.host_a)?.all_answered()?;
        let flow = Flow::to(to).run(&topology.host_a, &topology.host_b)?;
        flow.is_perfect()?;
        packets += flow.sent + 20;
        let transfer = tcp::transfer(
            &topology.host_a,
            &topology.host_b,
            to,
            Duration::from_secs(5),
            10_000_000,
        )?;
        ensure!(transfer.bytes == 10_000_000, "{transfer}");
    }
    let report = capture.stop();
    ensure!(report.missed == 0, "the capture missed {}", report.missed);
    // Every packet is seen coming in and going out.
    ensure!(report.cleartext > 2 * packets, "{}", report.summary());
    ensure!(report.icmp == 40, "{}", report.summary());
    ensure!(report.sealed() == 0, "{}", report.summary());
    Ok(())
}

fn behind_a_nat_the_gateway_appears_with_the_routers_address() -> anyhow::Result<()> {
    let topology = Topology::build(Options {
        nat: true,
        ..Options::default()
    })?;
    let peer = topology
        .gateway_b
        .run(|| Ok(std::net::UdpSocket::bind("203.0.113.2:500")?))?;
    peer.set_read_timeout(Some(Duration::from_secs(2)))?;
    let socket = topology
        .gateway_a
        .run(|| Ok(std::net::UdpSocket::bind("198.51.100.2:500")?))?;
    socket.send_to(b"hello", "203.0.113.2:500")?;
    let (_, from) = peer.recv_from(&mut [0; 16])?;
    ensure!(from.ip() == IpAddr::from([203, 0, 113, 1]), "{from}");
    Ok(())
}

/// Starts strongSwan on both gateways and brings the tunnel up.
fn strongswans(topology: &Topology) -> anyhow::Result<[StrongSwan; 2]> {
    let (ike, esp) = ("aes256gcm16-prfsha384-x25519", "aes256gcm16");
    let a = StrongSwan::start(&topology.gateway_a)?;
    let b = StrongSwan::start(&topology.gateway_b)?;
    a.load(&Connection::between_sites(Side::A, ike, esp))?;
    b.load(&Connection {
        remote: None,
        ..Connection::between_sites(Side::B, ike, esp)
    })?;
    a.initiate("net").with_context(|| b.log(30))?;
    Ok([a, b])
}

fn two_strongswans_carry_pings_udp_and_tcp_and_nothing_is_in_the_clear() -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let capture = Capture::start(&topology.router)?;
    let [a, _b] = strongswans(&topology)?;
    ensure!(a.sas()?.contains("INSTALLED"), "{}", a.sas()?);
    let to = Side::B.host(Family::V4);
    Ping::to(to).run(&topology.host_a)?.all_answered()?;
    Flow::to(to)
        .run(&topology.host_a, &topology.host_b)?
        .is_perfect()?;
    let transfer = tcp::transfer(
        &topology.host_a,
        &topology.host_b,
        to,
        Duration::from_secs(2),
        u64::MAX,
    )?;
    ensure!(transfer.bytes > 1_000_000, "{transfer}");
    let report = capture.stop();
    report.is_sealed(2000, true)?;
    ensure!(report.ike >= 4, "{}", report.summary());
    Ok(())
}

fn two_strongswans_find_the_nat_between_them() -> anyhow::Result<()> {
    let topology = Topology::build(Options {
        nat: true,
        ..Options::default()
    })?;
    let capture = Capture::start(&topology.router)?;
    let [_a, b] = strongswans(&topology)?;
    ensure!(b.sas()?.contains("203.0.113.1"), "{}", b.sas()?);
    for (from, to) in [(Side::A, Side::B), (Side::B, Side::A)] {
        Ping::to(to.host(Family::V4))
            .run(topology.host(from))?
            .all_answered()?;
    }
    capture.stop().is_clean()
}
