//! Two gateways of ours with a tunnel between them, and the questions every test asks of it.

use std::time::Duration;

use anyhow::{Context, ensure};

use crate::{
    capture::Capture,
    gateway::{Gateway, Tunnel},
    ping::Ping,
    topology::{Family, Side, Topology},
    udp::{Flow, FlowReport, Running},
};

/// Longest that a tunnel may take to come up in a test.
pub const PATIENCE: Duration = Duration::from_secs(15);

/// Starts gateway B as responder and gateway A as initiator and waits until their tunnels are up.
///
/// # Errors
///
/// They do not come up; the error has status and log.
pub fn start<'a>(
    topology: &'a Topology,
    a: Tunnel,
    b: Tunnel,
) -> anyhow::Result<(Gateway<'a>, Gateway<'a>)> {
    let name = a.name.clone();
    let gateway_b = Gateway::start(&topology.gateway_b, &[b])?;
    let gateway_a = Gateway::start(&topology.gateway_a, &[a])?;
    gateway_a
        .wait_up(&name, PATIENCE)
        .with_context(|| format!("log of the other:\n{}", gateway_b.log(40)))?;
    gateway_b.wait_up(&name, PATIENCE)?;
    Ok((gateway_a, gateway_b))
}

/// Starts a tunnel between the two sites with the defaults of the configuration.
///
/// # Errors
///
/// As for [`start`].
pub fn start_default(topology: &Topology) -> anyhow::Result<(Gateway<'_>, Gateway<'_>)> {
    start(
        topology,
        Tunnel::between_sites(Side::A, Family::V4),
        Tunnel::between_sites(Side::B, Family::V4).respond(),
    )
}

/// Pings and UDP flows between the hosts, both ways, without any loss.
///
/// # Errors
///
/// What was lost.
pub fn hosts_talk(topology: &Topology, family: Family) -> anyhow::Result<()> {
    conversation(topology, family).map(drop)
}

/// As [`hosts_talk`]; tells how many packets went through the tunnel, which no machine is too busy to hold true.
///
/// # Errors
///
/// What was lost.
pub fn conversation(topology: &Topology, family: Family) -> anyhow::Result<u64> {
    let mut packets = 0;
    for from in [Side::A, Side::B] {
        let to = from.other();
        let way = || format!("from site {from:?} to site {to:?} by {family:?}");
        let (here, there) = (topology.host(from), topology.host(to));
        let address = to.host(family);
        let ping = Ping::to(address).run(here)?;
        ping.all_answered().with_context(way)?;
        let flow = Flow {
            time: Duration::from_secs(1),
            ..Flow::to(address)
        };
        let flow = flow.run(here, there)?;
        flow.is_perfect().with_context(way)?;
        packets += 2 * u64::from(ping.received) + flow.received;
    }
    Ok(packets)
}

/// Both ends of a tunnel between the sites; A starts.
pub fn ends(family: Family) -> (Tunnel, Tunnel) {
    (
        Tunnel::between_sites(Side::A, family),
        Tunnel::between_sites(Side::B, family).respond(),
    )
}

/// A flow in the background, long enough for any test; most of it is meant to get lost.
///
/// # Errors
///
/// Sockets cannot be opened.
pub fn endless(topology: &Topology, from: Side, family: Family) -> anyhow::Result<Running> {
    let flow = Flow {
        rate: Some(500),
        time: Duration::from_secs(120),
        ..Flow::to(from.other().host(family))
    };
    flow.start(topology.host(from), topology.host(from.other()))
}

/// Stops both gateways, which keeps the hosts apart, and releases what they have left, which lets them meet in the clear: so it was
/// the protection that kept them apart. The capture is of the network between.
///
/// # Errors
///
/// What was otherwise.
pub fn stop_and_release(
    topology: &Topology,
    capture: Capture,
    gateways: [&mut Gateway<'_>; 2],
) -> anyhow::Result<()> {
    let [a, b] = gateways;
    for gateway in [&mut *a, &mut *b] {
        let status = gateway.stop()?;
        ensure!(status.success(), "{status}");
    }
    hosts_are_apart(topology, Family::V4)?;
    capture.stop().is_clean()?;
    for gateway in [a, b] {
        gateway.release()?;
    }
    hosts_talk(topology, Family::V4)?;
    let devices = topology.gateway_a.ip("link show")?;
    ensure!(!devices.contains("site"), "{devices}");
    Ok(())
}

/// Numbered packets between the hosts, both ways, until they are cut.
#[derive(Debug)]
pub struct Flows([Running; 2]);

impl Flows {
    /// Starts them, a thousand packets a second each.
    ///
    /// # Errors
    ///
    /// Sockets cannot be opened.
    pub fn start(topology: &Topology) -> anyhow::Result<Self> {
        Self::at(topology, 1000)
    }

    /// Starts them at a rate in packets a second, for an hour at most.
    ///
    /// # Errors
    ///
    /// Sockets cannot be opened.
    pub fn at(topology: &Topology, rate: u32) -> anyhow::Result<Self> {
        let start = |from: Side| {
            let flow = Flow {
                rate: Some(rate),
                time: Duration::from_secs(3600),
                ..Flow::to(from.other().host(Family::V4))
            };
            flow.start(topology.host(from), topology.host(from.other()))
        };
        Ok(Self([start(Side::A)?, start(Side::B)?]))
    }

    /// Ends them: what became of the one from site A, and of the one from site B.
    ///
    /// # Errors
    ///
    /// A thread of theirs failed. Lost packets are no error.
    pub fn cut(self) -> anyhow::Result<[FlowReport; 2]> {
        let [out, back] = self.0;
        Ok([out.cut()?, back.cut()?])
    }

    /// Ends them; every packet has arrived, once and whole.
    ///
    /// # Errors
    ///
    /// What was lost.
    pub fn are_perfect(self) -> anyhow::Result<()> {
        for (from, report) in [Side::A, Side::B].into_iter().zip(self.cut()?) {
            report
                .is_perfect()
                .with_context(|| format!("from site {from:?}"))?;
        }
        Ok(())
    }

    /// Ends them; at a known rate the number of packets that are lost tells how long the gap was.
    ///
    /// # Errors
    ///
    /// One of them has lost so many, or some arrived twice.
    pub fn lose_less_than(self, most: u32) -> anyhow::Result<()> {
        for report in self.cut()? {
            ensure!(
                report.lost() < u64::from(most) && report.duplicated == 0,
                "{report}"
            );
        }
        Ok(())
    }
}

/// No ping between the hosts is answered, either way.
///
/// # Errors
///
/// Some were.
pub fn hosts_are_apart(topology: &Topology, family: Family) -> anyhow::Result<()> {
    for from in [Side::A, Side::B] {
        let ping = Ping::to(from.other().host(family)).count(5);
        ping.run(topology.host(from))?.none_answered()?;
    }
    Ok(())
}
