//! A thousand tunnels between two gateways: how long they take to come up, and what memory they take.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use ipsec_ctl::api::model::{State, Status};

use crate::{
    command::slower,
    gateway::{ChildSettings, Gateway, Tunnel},
    ping::Ping,
    topology::{Family, Side, Topology},
};

/// How many.
pub const TUNNELS: u32 = 1000;

/// Longest that they may take.
const PATIENCE: Duration = Duration::from_secs(240);

/// Both gateways, all of whose tunnels are up.
#[derive(Debug)]
pub struct Many<'a> {
    topology: &'a Topology,
    a: Gateway<'a>,
    b: Gateway<'a>,
    /// Time from the start of gateway A until all were up.
    pub time: Duration,
    /// What the kernel's slabs have grown by, if it tells.
    slab_bytes: Option<u64>,
}

impl<'a> Many<'a> {
    /// Starts both gateways and waits until all tunnels are up; tells how many are whenever that changes.
    ///
    /// # Errors
    ///
    /// Not all came up.
    pub fn start(
        topology: &'a Topology,
        engine: &str,
        told: impl Fn(usize, Duration),
    ) -> anyhow::Result<Self> {
        let top = format!(
            "engine = \"{engine}\"\n[limits]\nhalf_open = 5000\nhalf_open_per_source = 5000\n"
        );
        let tunnels = |side| -> Vec<_> { (0..TUNNELS).map(|number| one(side, number)).collect() };
        let before = slab_bytes();
        let b = Gateway::start_with(&topology.gateway_b, &top, &tunnels(Side::B))?;
        let start = Instant::now();
        let a = Gateway::start_with(&topology.gateway_a, &top, &tunnels(Side::A))?;
        let mut last = 0;
        loop {
            let now = up(&a.status()?);
            if now != last {
                told(now, start.elapsed());
                last = now;
            }
            if now == usize::try_from(TUNNELS)? {
                break;
            }
            if start.elapsed() > PATIENCE * slower() {
                bail!(
                    "only {now} of {TUNNELS} tunnels came up; log of gateway A:\n{}",
                    a.log(30)
                );
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        let grown = before.zip(slab_bytes());
        Ok(Self {
            topology,
            a,
            b,
            time: start.elapsed(),
            slab_bytes: grown.map(|(before, after)| after.saturating_sub(before)),
        })
    }

    /// How long it took, in words.
    pub fn set_up(&self) -> String {
        let seconds = self.time.as_secs_f64();
        format!(
            "{TUNNELS} tunnels in {seconds:.1} s, start of the daemon included: {:.0} a second",
            f64::from(TUNNELS) / seconds
        )
    }

    /// Gives the hosts the addresses of one tunnel in a hundred and pings through each of these.
    ///
    /// # Errors
    ///
    /// A ping was not answered.
    pub fn pings(&self) -> anyhow::Result<String> {
        let numbers: Vec<u32> = (0..TUNNELS).step_by(100).collect();
        for number in &numbers {
            for side in [Side::A, Side::B] {
                let address = one(side, *number).children[0].local[0].clone();
                let host = self.topology.host(side);
                host.ip(&format!("addr add {address} dev lan"))?;
                let via = side.host(Family::V4);
                self.topology
                    .gateway(side)
                    .ip(&format!("route add {address} via {via}"))?;
            }
            let ends = one(Side::A, *number).children.remove(0);
            let [from, to] =
                [&ends.local[0], &ends.remote[0]].map(|text| text.trim_end_matches("/32"));
            Ping {
                from: Some(from.parse()?),
                ..Ping::to(to.parse()?)
            }
            .run(&self.topology.host_a)?
            .all_answered()
            .with_context(|| format!("tunnel {number}"))?;
        }
        Ok(format!("all answered in {} tunnels", numbers.len()))
    }

    /// What memory they take, in words.
    ///
    /// # Errors
    ///
    /// A gateway does not run.
    pub fn memory(&self) -> anyhow::Result<String> {
        let mut words = Vec::new();
        for (name, gateway) in [("A", &self.a), ("B", &self.b)] {
            let plane = gateway.data_plane().context("no data plane runs")?;
            words.push(format!(
                "{} MiB at {name} and {} MiB in its data plane",
                gateway.status()?.memory_bytes >> 20,
                resident_bytes(plane)? >> 20
            ));
        }
        words.extend(
            self.slab_bytes
                .map(|bytes| format!("{} MiB in the kernel's slabs for both", bytes >> 20)),
        );
        Ok(words.join(", "))
    }
}

fn up(status: &Status) -> usize {
    let tunnels = status.tunnels.iter();
    tunnels.filter(|tunnel| tunnel.state == State::Up).count()
}

/// The number of kB behind a word in a file of /proc, in bytes.
fn bytes_of(file: &str, word: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(file).with_context(|| file.to_owned())?;
    let line = text.lines().find_map(|line| line.strip_prefix(word));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    let kilobytes: u64 = number
        .with_context(|| format!("no {word} in {file}"))?
        .parse()?;
    Ok(kilobytes * 1024)
}

fn slab_bytes() -> Option<u64> {
    bytes_of("/proc/meminfo", "Slab:").ok()
}

fn resident_bytes(process: u32) -> anyhow::Result<u64> {
    bytes_of(&format!("/proc/{process}/status"), "VmRSS:")
}

/// Each tunnel has identities and addresses of its own.
fn one(side: Side, number: u32) -> Tunnel {
    let family = Family::V4;
    let letter = |side: Side| format!("{}{number}.example", side.letter());
    let address = |side: Side| {
        let base = if side == Side::A { 16 } else { 17 };
        format!("172.{base}.{}.{}/32", number / 250, number % 250 + 1)
    };
    let other = side.other();
    let mut tunnel = Tunnel::between_sites(side, family);
    tunnel.name = format!("t{number}");
    tunnel.local_id = letter(side);
    tunnel.remote_id = letter(other);
    tunnel.children = vec![ChildSettings {
        name: "net".to_owned(),
        local: vec![address(side)],
        remote: vec![address(other)],
        lines: Vec::new(),
    }];
    if side == Side::B {
        tunnel = tunnel.respond();
    }
    tunnel
}
