//! strongSwan's userspace ESP under a load that saturates it, in turn with a worker of ours.
//!
//! charon is the gateway of site A, on the processor where our worker is measured; ours is the gateway of site B, and
//! seals what charon opens. The load comes from the host behind the one or the other, and what comes out is counted at
//! the next interface. As with our worker, time counts that charon spends on a processor, in all its threads, and not
//! what the kernel spends elsewhere on bringing packets to it.

use std::{
    fs::File,
    io::{Read, Seek},
    net::{IpAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use ipsec_ctl::{dataplane::seam::Direction, esp::EspSuite};

use super::{
    Effort,
    bed::{Bed, direction_name},
    cores::CpuClock,
    generator::Generator,
    packets::{PORTS, Size, udp},
    peer::{bed, ours, theirs},
    report::RivalLine,
    slice::Slice,
    worker::{inbound_load, outbound_load},
};
use crate::{
    netns::Netns,
    strongswan::StrongSwan,
    topology::{Family, Side, Topology},
};

/// Sizes, and times as many packets that we aim at.
const GOALS: [(usize, f64); 3] = [(64, 10.0), (590, 10.0), (1400, 6.0)];
/// Packets that the generator is ahead of charon: what a socket's buffer holds of the longest.
const AHEAD: u64 = 64;
const AT_ONCE: u32 = 16;
/// After so long without a packet, what is under way is lost.
const LOST: Duration = Duration::from_millis(50);
/// Longest that a slice may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// One slice of charon has so many times fewer packets than one of ours.
const FEWER: u64 = 16;

/// One direction through charon.
struct Way<'a> {
    /// Where the load comes from.
    sender: &'a Netns,
    load: Generator,
    /// Packets that came out.
    counter: Counter,
}

/// Measures each size and direction in turn. The thread is in a namespace of its own, and in a runtime.
///
/// # Errors
///
/// A bed cannot be built, or nothing comes through it.
pub(super) fn measure(effort: &Effort) -> anyhow::Result<Vec<RivalLine>> {
    let suite = ("aes256gcm16", EspSuite::Aes256Gcm16);
    let topology = bed()?;
    // Frames that a program redirects into a veth are taken at its other end only by one that does GRO or has XDP.
    topology.gateway_a.exec("ethtool -K lan gro on")?;
    let _silence = [Side::A, Side::B].map(|side| silence(&topology, side));
    let _far = ours(&topology, Side::B, suite.0, super::cores::LOAD)?;
    let swan = theirs(&topology, suite.0)?;
    swan.initiate("net").with_context(|| swan.log(30))?;
    let mut worker = Bed::new(vec![suite.1])?;
    let mut lines = Vec::new();
    for (bytes, goal) in GOALS {
        let size = Size::Fixed(bytes);
        for direction in [Direction::Outbound, Direction::Inbound] {
            let mut load = match direction {
                Direction::Outbound => outbound_load(&worker, 0, size)?,
                Direction::Inbound => inbound_load(&worker, 0..1, suite.1, size, effort.packets)?,
            };
            let mut way = Way::new(&topology, direction, bytes)?;
            let mut rounds = Vec::new();
            for round in 0..=effort.rounds {
                let ours = worker.tunnelled(direction, &mut load, effort.packets)?;
                let theirs = way.drive(&swan, effort.packets / FEWER).with_context(|| {
                    format!("strongSwan, {}, {bytes} B", direction_name(direction))
                })?;
                if round > 0 {
                    rounds.push((ours, theirs));
                }
            }
            lines.push(RivalLine {
                direction: direction_name(direction),
                size: size.name(),
                goal,
                rounds,
            });
        }
    }
    Ok(lines)
}

/// A socket that takes what arrives at a host and reads none of it, so that the host does not answer.
fn silence(topology: &Topology, side: Side) -> anyhow::Result<UdpSocket> {
    let address = (side.host(Family::V4), PORTS.1);
    topology
        .host(side)
        .run(move || Ok(UdpSocket::bind(address)?))
}

impl<'a> Way<'a> {
    fn new(topology: &'a Topology, direction: Direction, bytes: usize) -> anyhow::Result<Self> {
        let (from, exit, interface) = match direction {
            Direction::Outbound => (Side::A, &topology.router, "to-a"),
            Direction::Inbound => (Side::B, &topology.host_a, "lan"),
        };
        let octets = |side: Side| match side.host(Family::V4) {
            IpAddr::V4(address) => Ok(address.octets()),
            IpAddr::V6(address) => bail!("{address} is not IPv4"),
        };
        let sender = topology.host(from);
        let mut frame = Vec::new();
        frame.extend(mac(topology.gateway(from), "lan")?);
        frame.extend(mac(sender, "lan")?);
        frame.extend([8, 0]);
        frame.extend(udp(octets(from)?, octets(from.other())?, bytes)?);
        let load = sender.run(|| {
            let egress = nix::net::if_::if_nametoindex("lan")?;
            Generator::new(egress, &[frame])
        })?;
        Ok(Self {
            sender,
            load,
            counter: Counter::new(exit, interface)?,
        })
    }

    fn drive(&mut self, swan: &StrongSwan, packets: u64) -> anyhow::Result<Slice> {
        let clock = CpuClock::of_process(swan.pid()?.as_raw());
        let Self {
            sender,
            load,
            counter,
        } = self;
        sender.run(|| {
            load.start()?;
            let slice = saturate(load, counter, clock, packets);
            load.stop()?;
            slice
        })
    }
}

/// Keeps so many packets under way that charon never waits, until `packets` have come out after as many that warm up.
fn saturate(
    load: &mut Generator,
    counter: &mut Counter,
    clock: CpuClock,
    packets: u64,
) -> anyhow::Result<Slice> {
    let start = Instant::now();
    let base = counter.read()?;
    let (mut sent, mut lost, mut progress) = (0, 0, (0, start));
    let mut first = None;
    loop {
        let done = counter.read()?.saturating_sub(base);
        let now = Instant::now();
        match first {
            None if done >= packets => first = Some((done, now, clock.now()?)),
            Some((before, wall, cpu)) if done >= before + packets => {
                return Ok(Slice {
                    packets: done - before,
                    wall: now - wall,
                    cpu: clock.now()? - cpu,
                });
            }
            None | Some(_) => {}
        }
        if now - start > PATIENCE {
            bail!("of {sent} packets {done} came out");
        }
        if done > progress.0 {
            progress = (done, now);
        } else if now - progress.1 > LOST {
            lost = sent - done.min(sent);
            progress.1 = now;
        }
        if sent.saturating_sub(done + lost) < AHEAD {
            load.send(AT_ONCE)?;
            sent += u64::from(AT_ONCE);
        }
    }
}

/// The packets that an interface has received.
struct Counter {
    /// The table of its namespace, from wherever it is read.
    table: File,
    interface: String,
}

impl Counter {
    fn new(netns: &Netns, interface: &str) -> anyhow::Result<Self> {
        Ok(Self {
            table: netns.run(|| Ok(File::open("/proc/thread-self/net/dev")?))?,
            interface: format!("{interface}:"),
        })
    }

    fn read(&mut self) -> anyhow::Result<u64> {
        let mut text = String::new();
        self.table.rewind()?;
        self.table.read_to_string(&mut text)?;
        let line = text
            .lines()
            .find_map(|line| line.trim_start().strip_prefix(&self.interface));
        let packets = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(packets.context("an interface's counters")?.parse()?)
    }
}

fn mac(netns: &Netns, interface: &str) -> anyhow::Result<Vec<u8>> {
    let links: serde_json::Value =
        serde_json::from_str(&netns.ip(&format!("-j link show {interface}"))?)?;
    let text = links[0]["address"].as_str().context("a MAC address")?;
    text.split(':')
        .map(|part| Ok(u8::from_str_radix(part, 16)?))
        .collect()
}
