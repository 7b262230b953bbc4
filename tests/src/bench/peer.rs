//! Sites whose gateways are ours or strongSwan with its userspace ESP, and round trips between their hosts.

use super::{
    Effort,
    cores::{LOAD, WORK, stay_on, stay_on_first},
    latency,
    report::Latency,
    worker::SUITES,
};
use crate::{
    gateway::{Gateway, Tunnel},
    pair::PATIENCE,
    strongswan::{Connection, StrongSwan},
    topology::{Family, Options, Side, Topology},
};
use anyhow::Context;

const IKE: &str = "aes256gcm16-prfsha384-x25519";
pub(super) fn bed() -> anyhow::Result<Topology> {
    Topology::build(Options::default())
}

/// A gateway of ours at site B, encapsulating as strongSwan must, on the processor of the load.
pub(super) fn ours<'a>(
    topology: &'a Topology,
    side: Side,
    suite: &str,
    processor: usize,
) -> anyhow::Result<Gateway<'a>> {
    let tunnel = Tunnel::between_sites(side, Family::V4)
        .suite(IKE, suite)
        .with("nat = \"force\"")
        .with("fast_path = \"on\"");
    let tunnel = match side {
        Side::A => tunnel,
        Side::B => tunnel.respond(),
    };
    pinned(processor, || {
        Gateway::start(topology.gateway(side), &[tunnel])
    })
}

pub(super) fn theirs(topology: &Topology, suite: &str) -> anyhow::Result<StrongSwan> {
    pinned(WORK, || {
        let swan = StrongSwan::start(&topology.gateway_a)?;
        swan.load(&Connection::between_sites(Side::A, IKE, suite))?;
        Ok(swan)
    })
}

/// Starts a process that stays on one processor, as does whatever the thread starts that starts it.
pub(super) fn pinned<T: Send>(
    processor: usize,
    start: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            stay_on(processor)?;
            start()
        });
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("a thread panicked"))?
    })
}

/// Round trips of UDP between the hosts: through a tunnel between two gateways of ours, through one between strongSwan
/// and ours, and forwarded without any, in turn.
///
/// # Errors
///
/// A tunnel does not come up, or packets are lost.
pub(super) fn measure_latency(effort: &Effort) -> anyhow::Result<Latency> {
    let (suite, _) = SUITES[0];
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    stay_on_first(processors)?;
    let [plain, own, other] = [bed()?, bed()?, bed()?];
    let _far = ours(&own, Side::B, suite, LOAD)?;
    let near = ours(&own, Side::A, suite, WORK)?;
    near.wait_up("site", PATIENCE)?;
    let _their_far = ours(&other, Side::B, suite, LOAD)?;
    let swan = theirs(&other, suite)?;
    swan.initiate("net").with_context(|| swan.log(30))?;
    let mut latency = Latency::default();
    for round in 0..=effort.rounds {
        let plain = latency::round_trips(&plain, effort.pings)?;
        let ours = latency::round_trips(&own, effort.pings)?;
        let theirs = latency::round_trips(&other, effort.pings)?;
        if round > 0 {
            latency.plain.push(plain);
            latency.ours.push(ours);
            latency.theirs.push(theirs);
        }
    }
    Ok(latency)
}

/// A proof in seconds that round trips can be measured.
///
/// # Errors
///
/// They cannot.
pub(super) fn smoke() -> anyhow::Result<()> {
    let (suite, _) = SUITES[0];
    let topology = bed()?;
    let _far = ours(&topology, Side::B, suite, LOAD)?;
    let near = ours(&topology, Side::A, suite, WORK)?;
    near.wait_up("site", PATIENCE)?;
    latency::round_trips(&topology, Effort::smoke().pings).map(drop)
}
