//! Two sites under load, with any gateway at site A: what comes out of it, and what it takes for that.
//!
//! The far side of the measured gateway is a cable whose packets nobody takes: its neighbour has an address of nobody,
//! so that the price of a receiver is not measured.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, ensure};
use ipsec_ctl::dataplane::seam::Direction;
use serde_json::Value;

use super::{
    cores::{CpuClock, LOAD, stay_on},
    generator::Generator,
    packets::{Size, udp},
    slice::Slice,
};
use crate::{
    netns::Netns,
    topology::{Family, Side, Topology},
};

/// A MAC address of nobody.
const NOBODY: &str = "02:00:00:00:00:09";
/// How long the load runs before each measurement.
const WARM_UP: Duration = Duration::from_millis(60);
/// How long nothing may come out before a gateway counts as drained.
const QUIET: Duration = Duration::from_millis(30);
/// Longest that a gateway may take to drain.
const MOST_BACKLOG: Duration = Duration::from_secs(10);
/// Frames of one test run.
const AT_ONCE: u32 = 64;

/// How much is offered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Offer {
    /// All that the generator can.
    Everything,
    /// So many packets a second.
    Rate(f64),
}

/// Two sites and the process that carries the packets of gateway A, by its id.
pub(super) struct Sites<'a> {
    pub(super) topology: &'a Topology,
    pub(super) daemon: u32,
}

impl Sites<'_> {
    /// Measures gateway A for `time`.
    ///
    /// # Errors
    ///
    /// Nothing comes out, or it never ends.
    pub(super) fn measure(
        &self,
        direction: Direction,
        size: Size,
        offer: Offer,
        time: Duration,
    ) -> anyhow::Result<Slice> {
        let topology = self.topology;
        let (from, side, counted, port) = match direction {
            Direction::Outbound => (&topology.host_a, Side::A, &topology.router, "to-a"),
            Direction::Inbound => (&topology.host_b, Side::B, &topology.host_a, "lan"),
        };
        let frames = frames(topology, side, size)?;
        let egress = link(from, "lan")?.0;
        let mut counter = Counter::open(counted, port)?;
        let clock = CpuClock::of_process(i32::try_from(self.daemon)?);
        let stop = AtomicBool::new(false);
        let _sink = Sink::behind(topology, direction)?;
        let slice = thread::scope(|scope| {
            let load = scope.spawn(|| {
                from.run(|| {
                    stay_on(LOAD)?;
                    let mut load = Generator::new(egress, &frames)?;
                    load.start()?;
                    send(&mut load, offer, &stop)?;
                    load.stop()
                })
            });
            let measured = measured(&mut counter, clock, time);
            stop.store(true, Ordering::Release);
            load.join().map_err(|_| anyhow!("the load panicked"))??;
            measured
        })?;
        ensure!(slice.packets > 0, "nothing comes out of the gateway");
        counter.wait_quiet()?;
        Ok(slice)
    }
}

fn measured(counter: &mut Counter, clock: CpuClock, time: Duration) -> anyhow::Result<Slice> {
    thread::sleep(WARM_UP);
    let (first, wall, cpu) = (counter.read()?, Instant::now(), clock.now()?);
    thread::sleep(time);
    Ok(Slice {
        packets: counter.read()? - first,
        wall: wall.elapsed(),
        cpu: clock.now()? - cpu,
    })
}

fn send(load: &mut Generator, offer: Offer, stop: &AtomicBool) -> anyhow::Result<()> {
    let start = Instant::now();
    let mut sent = 0;
    while !stop.load(Ordering::Acquire) {
        let due = match offer {
            Offer::Everything => true,
            Offer::Rate(rate) => f64::from(sent) < start.elapsed().as_secs_f64() * rate,
        };
        if due {
            load.send(AT_ONCE)?;
            sent += AT_ONCE;
        } else {
            // Leaves the processor to what delivers the packets.
            thread::yield_now();
        }
    }
    Ok(())
}

/// Frames that the host of a site sends to the other's through its gateway.
fn frames(topology: &Topology, side: Side, size: Size) -> anyhow::Result<Vec<Vec<u8>>> {
    let to = link(topology.gateway(side), "lan")?.1;
    let from = link(topology.host(side), "lan")?.1;
    let (std::net::IpAddr::V4(source), std::net::IpAddr::V4(destination)) =
        (side.host(Family::V4), side.other().host(Family::V4))
    else {
        return Err(anyhow!("not IPv4"));
    };
    size.pattern()
        .iter()
        .map(|bytes| {
            let packet = udp(source.octets(), destination.octets(), *bytes)?;
            Ok([to.as_slice(), &from, &[8, 0], &packet].concat())
        })
        .collect()
}

/// Index and MAC address of an interface.
fn link(netns: &Netns, name: &str) -> anyhow::Result<(u32, [u8; 6])> {
    let shown: Value = serde_json::from_str(&netns.ip(&format!("-j link show {name}"))?)?;
    let field = |key: &str| shown.get(0).and_then(|link| link.get(key)).context("ip -j");
    let index = field("ifindex")?.as_u64().context("ifindex")?;
    let mut mac = [0; 6];
    let text = field("address")?.as_str().context("address")?;
    for (byte, digits) in mac.iter_mut().zip(text.split(':')) {
        *byte = u8::from_str_radix(digits, 16)?;
    }
    Ok((u32::try_from(index)?, mac))
}

/// While it lives, what gateway A sends on goes to nobody.
struct Sink<'a> {
    gateway: &'a Netns,
    neighbour: String,
}

impl<'a> Sink<'a> {
    fn behind(topology: &'a Topology, direction: Direction) -> anyhow::Result<Self> {
        let neighbour = match direction {
            Direction::Outbound => format!("{} dev wan", Side::A.router(Family::V4)),
            Direction::Inbound => format!("{} dev lan", Side::A.host(Family::V4)),
        };
        let gateway = &topology.gateway_a;
        gateway.ip(&format!(
            "neigh replace {neighbour} lladdr {NOBODY} nud permanent"
        ))?;
        Ok(Self { gateway, neighbour })
    }
}

impl Drop for Sink<'_> {
    fn drop(&mut self) {
        let _ = self.gateway.ip(&format!("neigh del {}", self.neighbour));
    }
}

/// Packets that an interface received.
struct Counter {
    file: File,
    interface: String,
}

impl Counter {
    fn open(netns: &Netns, interface: &str) -> anyhow::Result<Self> {
        Ok(Self {
            // Shows the namespace that it was opened in, whoever reads it.
            file: netns.run(|| Ok(File::open("/proc/thread-self/net/dev")?))?,
            interface: format!("{interface}:"),
        })
    }

    fn read(&mut self) -> anyhow::Result<u64> {
        let mut text = String::new();
        self.file.seek(SeekFrom::Start(0))?;
        self.file.read_to_string(&mut text)?;
        text.lines()
            .filter_map(|line| line.trim_start().strip_prefix(&self.interface))
            .find_map(|counters| counters.split_whitespace().nth(1)?.parse().ok())
            .with_context(|| format!("no counters of {}", self.interface))
    }

    /// Waits until a gateway has worked off what it had queued.
    fn wait_quiet(&mut self) -> anyhow::Result<()> {
        let end = Instant::now() + MOST_BACKLOG;
        let mut last = self.read()?;
        loop {
            thread::sleep(QUIET);
            let now = self.read()?;
            if now == last {
                return Ok(());
            }
            ensure!(Instant::now() < end, "a gateway does not drain");
            last = now;
        }
    }
}
