//! Packets that somebody on the network between sends in the clear to where only a tunnel should lead.

use std::{
    net::{IpAddr, UdpSocket},
    time::Duration,
};

use anyhow::{Context, ensure};

use crate::{
    gateway::{Gateway, Tunnel},
    netns::Netns,
    pair::{PATIENCE, hosts_talk, start},
    topology::{Family, Options, Side, Topology, attacker},
};

/// How many of them.
pub const PACKETS: u32 = 20;

/// Packets out of [`PACKETS`] that somebody on the network between gets through in the clear, pretending to be `from`.
///
/// # Errors
///
/// Sockets cannot be opened.
pub fn injected(
    topology: &Topology,
    from: IpAddr,
    into: &Netns,
    to: IpAddr,
) -> anyhow::Result<u32> {
    let receiver = into.run(|| Ok(UdpSocket::bind((to, 0))?))?;
    receiver.set_read_timeout(Some(Duration::from_millis(400)))?;
    let at = if from == attacker(Family::V4) || from == attacker(Family::V6) {
        "wan"
    } else {
        "lo"
    };
    // An IPv6 address must be good for a socket at once.
    let nodad = if from.is_ipv6() { "nodad" } else { "" };
    topology
        .attacker
        .ip(&format!("addr replace {from} dev {at} {nodad}"))?;
    let sender = topology.attacker.run(|| Ok(UdpSocket::bind((from, 0))?))?;
    for _ in 0..PACKETS {
        sender.send_to(b"in the clear", receiver.local_addr()?)?;
    }
    let mut arrived = 0;
    while arrived < PACKETS && receiver.recv(&mut [0; 64]).is_ok() {
        arrived += 1;
    }
    Ok(arrived)
}

/// All of them get through from an address to host A, or none.
///
/// # Errors
///
/// Others do.
pub fn through(topology: &Topology, from: IpAddr, all: bool) -> anyhow::Result<()> {
    let to = Side::A.host(if from.is_ipv4() {
        Family::V4
    } else {
        Family::V6
    });
    let arrived = injected(topology, from, &topology.host_a, to)?;
    let wanted = if all { PACKETS } else { 0 };
    ensure!(
        arrived == wanted,
        "{arrived} of {PACKETS} from {from} got through"
    );
    Ok(())
}

/// Plaintext that pretends to come out of a tunnel with these further lines is refused: while it is up, after the daemon was
/// killed, started again and stopped, and until the gateway is released.
///
/// # Errors
///
/// Something got through, or is not counted.
pub fn is_refused_whatever_becomes_of_the_daemon(
    lines: &str,
    family: Family,
) -> anyhow::Result<()> {
    let topology = Topology::build(Options::default())?;
    let (from, to) = (Side::B.host(family), Side::A.inside(family));
    let refused = |gateway: &Gateway<'_>, packets: u32| {
        let counted = gateway.counter("cleartext")?;
        ensure!(counted == u64::from(packets), "{:?}", gateway.counters()?);
        Ok(())
    };
    through(&topology, from, true).context("without a gateway")?;
    let (mut a, _b) = start(
        &topology,
        Tunnel::between_sites(Side::A, family).with(lines),
        Tunnel::between_sites(Side::B, family).with(lines).respond(),
    )?;
    through(&topology, from, false)?;
    let arrived = injected(&topology, from, &topology.gateway_a, to)?;
    ensure!(arrived == 0, "{arrived} reached the gateway itself");
    refused(&a, 2 * PACKETS)?;
    hosts_talk(&topology, family)?;
    a.kill()?;
    through(&topology, from, false).context("after kill -9")?;
    a.run()?;
    a.wait_up("site", PATIENCE)?;
    through(&topology, from, false).context("after the restart")?;
    refused(&a, 4 * PACKETS)?;
    hosts_talk(&topology, family)?;
    a.stop()?;
    through(&topology, from, false).context("after the end")?;
    a.release()?;
    through(&topology, from, true).context("after release")
}
