//! The report: ratios first, in the terminal and as JSON.

use std::fmt::{self, Write as _};

use anyhow::Context;
use serde_json::{Value, json};

use super::{
    cores::{LOAD, WORK},
    slice::{Slice, median, quantile},
};

/// Of what forwarding and cryptography leave, at least this much.
const OF_THE_LIMIT: f64 = 0.80;
/// Many SAs cost at most this much more than one.
const OF_ONE: f64 = 0.95;
/// As many times strongSwan's IKE set-ups.
const SET_UPS: f64 = 2.0;
/// At most this part of strongSwan's memory for an IKE SA.
const OF_MEMORY: f64 = 0.25;

/// Everything that was measured.
#[derive(Debug)]
pub struct Report {
    /// Where.
    pub(super) machine: Machine,
    /// One worker against its limits.
    pub(super) workers: Vec<WorkerLine>,
    /// One SA against many.
    pub(super) many: Vec<Many>,
    /// One worker beside strongSwan.
    pub(super) rivals: Vec<RivalLine>,
    /// Round trips.
    pub(super) latency: Option<Latency>,
    /// IKE set-ups.
    pub(super) ike: Vec<IkeLine>,
    /// Memory of IKE SAs.
    pub(super) memory: Option<Memory>,
}

/// The machine and the roles of its processors.
#[derive(Debug)]
pub(super) struct Machine {
    processors: usize,
    model: String,
    kernel: String,
    pub(super) mode: String,
}

/// One suite, direction and size.
#[derive(Debug)]
pub(super) struct WorkerLine {
    pub(super) suite: &'static str,
    pub(super) direction: &'static str,
    pub(super) size: String,
    /// Forwarding alone.
    pub(super) plain: Vec<Slice>,
    /// Cryptography alone.
    pub(super) ring: Vec<Slice>,
    /// Both together, as measured.
    pub(super) ours: Vec<Slice>,
}

/// One SA and many, in turn.
#[derive(Debug)]
pub(super) struct Many {
    pub(super) direction: &'static str,
    pub(super) sas: u16,
    /// Of each round the slice with one SA and that with many.
    pub(super) rounds: Vec<(Slice, Slice)>,
}

/// A worker of ours and strongSwan's userspace ESP, in turn.
#[derive(Debug)]
pub(super) struct RivalLine {
    pub(super) direction: &'static str,
    pub(super) size: String,
    /// Times as many packets that we aim at.
    pub(super) goal: f64,
    /// Of each round ours and theirs.
    pub(super) rounds: Vec<(Slice, Slice)>,
}

/// IKE set-ups of one suite.
#[derive(Debug)]
pub(super) struct IkeLine {
    pub(super) suite: &'static str,
    /// Of each round ours and theirs; a "packet" is a set-up, the clock that of the responder.
    pub(super) rounds: Vec<(Slice, Slice)>,
}

/// Bytes that a responder keeps for an IKE SA.
#[derive(Debug)]
pub(super) struct Memory {
    /// So many of them were there.
    pub(super) sas: usize,
    pub(super) ours: f64,
    pub(super) theirs: f64,
}

/// Microseconds of round trips, in slices.
#[derive(Debug, Default)]
pub(super) struct Latency {
    /// Forwarded by two gateways without a tunnel.
    pub(super) plain: Vec<Vec<f64>>,
    /// Through a tunnel between two of ours.
    pub(super) ours: Vec<Vec<f64>>,
    /// Through a tunnel between strongSwan and ours.
    pub(super) theirs: Vec<Vec<f64>>,
}

impl Machine {
    /// This one.
    fn here() -> anyhow::Result<Self> {
        let cpus = std::fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
        let model = cpus
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown", |(_, model)| model);
        let kernel = nix::sys::utsname::uname()?;
        Ok(Self {
            processors: cpus
                .lines()
                .filter(|line| line.starts_with("processor"))
                .count(),
            model: model.to_owned(),
            kernel: kernel.release().to_string_lossy().into_owned(),
            mode: "veth".to_owned(),
        })
    }

    fn json(&self) -> Value {
        json!({
            "processors": self.processors, "model": self.model, "kernel": self.kernel, "mode": self.mode,
            "worker_processor": WORK, "load_processor": LOAD,
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} processors ({}), Linux {}, {}; the worker on processor {WORK}, load and its delivery on {LOAD}",
            self.processors, self.model, self.kernel, self.mode
        )
    }
}

/// What slices say by one of the two clocks.
struct Figures {
    ratio: f64,
    /// Half of all rounds lie between these.
    spread: (f64, f64),
    ours: f64,
    plain: f64,
    ring: f64,
}

impl WorkerLine {
    fn figures(&self, nanoseconds: impl Fn(&Slice) -> f64) -> Figures {
        // Of each round, what the limit's time is of ours: what happened to the machine then happened to both.
        let ratios: Vec<f64> = self
            .plain
            .iter()
            .zip(&self.ring)
            .zip(&self.ours)
            .map(|((plain, ring), ours)| {
                (nanoseconds(plain) + nanoseconds(ring)) / nanoseconds(ours)
            })
            .collect();
        let typical = |slices: &[Slice]| median(slices.iter().map(&nanoseconds));
        Figures {
            ratio: median(ratios.iter().copied()),
            spread: (
                quantile(ratios.iter().copied(), 0.25),
                quantile(ratios, 0.75),
            ),
            ours: typical(&self.ours),
            plain: typical(&self.plain),
            ring: typical(&self.ring),
        }
    }

    fn is_below(&self) -> bool {
        self.figures(Slice::cpu_ns).ratio < OF_THE_LIMIT
    }

    fn json(&self) -> Value {
        let [cpu, wall] = [Slice::cpu_ns, Slice::wall_ns].map(|clock| self.figures(clock));
        json!({
            "suite": self.suite, "direction": self.direction, "size": self.size,
            "ratio": cpu.ratio, "quartiles": [cpu.spread.0, cpu.spread.1],
            "cpu_ns": { "worker": cpu.ours, "forwarding": cpu.plain, "ring": cpu.ring },
            "pps": 1e9 / cpu.ours, "limit_pps": 1e9 / (cpu.plain + cpu.ring),
            "wall_ratio": wall.ratio, "wall_pps": 1e9 / wall.ours,
        })
    }
}

impl fmt::Display for WorkerLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (cpu, wall) = (self.figures(Slice::cpu_ns), self.figures(Slice::wall_ns));
        write!(
            f,
            "{:4.2} ({:4.2}-{:4.2})  {:16} {:8} {:>6}  {:6.3} Mpps, {:4.0} ns = forwarding {:4.0} + ring {:4.0} + {:4.0}   wall: {:4.2}, {:6.3} Mpps{}",
            cpu.ratio,
            cpu.spread.0,
            cpu.spread.1,
            self.suite,
            self.direction,
            self.size,
            1e3 / cpu.ours,
            cpu.ours,
            cpu.plain,
            cpu.ring,
            cpu.ours - cpu.plain - cpu.ring,
            wall.ratio,
            1e3 / wall.ours,
            if self.is_below() { "   BELOW" } else { "" },
        )
    }
}

impl Many {
    fn ratio(&self) -> f64 {
        median(
            self.rounds
                .iter()
                .map(|(one, many)| one.cpu_ns() / many.cpu_ns()),
        )
    }

    fn json(&self) -> Value {
        json!({
            "direction": self.direction, "sas": self.sas, "ratio": self.ratio(),
            "one_cpu_ns": median(self.rounds.iter().map(|round| round.0.cpu_ns())),
            "many_cpu_ns": median(self.rounds.iter().map(|round| round.1.cpu_ns())),
        })
    }
}

impl fmt::Display for Many {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:4.2}  {:8} {} SAs {:4.0} ns a packet, one {:4.0} ns{}",
            self.ratio(),
            self.direction,
            self.sas,
            median(self.rounds.iter().map(|round| round.1.cpu_ns())),
            median(self.rounds.iter().map(|round| round.0.cpu_ns())),
            if self.ratio() < OF_ONE {
                "   BELOW"
            } else {
                ""
            },
        )
    }
}

/// How many times theirs ours does, the median over the rounds.
fn times(rounds: &[(Slice, Slice)], nanoseconds: impl Fn(&Slice) -> f64) -> f64 {
    median(
        rounds
            .iter()
            .map(|(ours, theirs)| nanoseconds(theirs) / nanoseconds(ours)),
    )
}

/// What ours and theirs take for one.
fn typical(rounds: &[(Slice, Slice)], nanoseconds: impl Fn(&Slice) -> f64) -> (f64, f64) {
    (
        median(rounds.iter().map(|round| nanoseconds(&round.0))),
        median(rounds.iter().map(|round| nanoseconds(&round.1))),
    )
}

impl IkeLine {
    fn json(&self) -> Value {
        let cpu = typical(&self.rounds, Slice::cpu_ns);
        json!({
            "suite": self.suite, "ratio": times(&self.rounds, Slice::cpu_ns),
            "set_ups_per_second": 1e9 / cpu.0, "strongswan_set_ups_per_second": 1e9 / cpu.1,
            "wall_ratio": times(&self.rounds, Slice::wall_ns),
        })
    }
}

impl fmt::Display for IkeLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ratio = times(&self.rounds, Slice::cpu_ns);
        let (ours, theirs) = typical(&self.rounds, Slice::cpu_ns);
        write!(
            f,
            "{ratio:4.2}  {:30} {:6.0} a second, strongSwan {:6.0}{}",
            self.suite,
            1e9 / ours,
            1e9 / theirs,
            if ratio < SET_UPS { "   BELOW" } else { "" },
        )
    }
}

impl Memory {
    fn json(&self) -> Value {
        json!({
            "ike_sas": self.sas, "ratio": self.ours / self.theirs,
            "bytes": self.ours, "strongswan_bytes": self.theirs,
        })
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ratio = self.ours / self.theirs;
        write!(
            f,
            "{ratio:4.2} of strongSwan's memory for an IKE SA (to reach: {OF_MEMORY:.2}): {:.1} KiB to {:.1} KiB, with {} of them{}",
            self.ours / 1024.0,
            self.theirs / 1024.0,
            self.sas,
            if ratio > OF_MEMORY { "   ABOVE" } else { "" },
        )
    }
}

impl RivalLine {
    fn json(&self) -> Value {
        let (cpu, wall) = (
            typical(&self.rounds, Slice::cpu_ns),
            typical(&self.rounds, Slice::wall_ns),
        );
        json!({
            "direction": self.direction, "size": self.size, "goal": self.goal,
            "ratio": times(&self.rounds, Slice::cpu_ns), "pps": 1e9 / cpu.0, "strongswan_pps": 1e9 / cpu.1,
            "wall_ratio": times(&self.rounds, Slice::wall_ns), "wall_pps": 1e9 / wall.0, "strongswan_wall_pps": 1e9 / wall.1,
        })
    }
}

impl fmt::Display for RivalLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ratio = times(&self.rounds, Slice::cpu_ns);
        let (ours, theirs) = typical(&self.rounds, Slice::cpu_ns);
        write!(
            f,
            "{ratio:4.1} (to reach: {:.0})  {:8} {:>6}  {:6.3} Mpps, strongSwan {:6.3} Mpps   wall: {:4.1}{}",
            self.goal,
            self.direction,
            self.size,
            1e3 / ours,
            1e3 / theirs,
            times(&self.rounds, Slice::wall_ns),
            if ratio < self.goal { "   BELOW" } else { "" },
        )
    }
}

impl Latency {
    /// What each kind of way takes: the median over the slices of each slice's quantile.
    fn quantiles(&self, share: f64) -> [f64; 3] {
        [&self.plain, &self.ours, &self.theirs].map(|slices| {
            median(
                slices
                    .iter()
                    .map(|slice| quantile(slice.iter().copied(), share)),
            )
        })
    }

    fn json(&self) -> Value {
        let way = |share| {
            let [plain, ours, theirs] = self.quantiles(share);
            json!({
                "plain_us": plain, "ours_us": ours, "strongswan_us": theirs,
                "added_us": ours - plain, "added_with_strongswan_us": theirs - plain,
            })
        };
        json!({ "p50": way(0.5), "p99": way(0.99) })
    }
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
            let [plain, ours, theirs] = self.quantiles(share);
            writeln!(
                f,
                "  {name}  two of ours add {:5.1} us (forwarding {plain:5.1}, through the tunnel {ours:5.1}); strongSwan and ours add {:5.1} us",
                ours - plain,
                theirs - plain
            )?;
        }
        Ok(())
    }
}

impl Report {
    /// Nothing measured yet, on this machine.
    pub(super) fn here() -> anyhow::Result<Self> {
        Ok(Self {
            machine: Machine::here()?,
            workers: vec![],
            many: vec![],
            rivals: vec![],
            latency: None,
            ike: vec![],
            memory: None,
        })
    }

    /// For a program.
    pub fn json(&self) -> Value {
        json!({
            "machine": self.machine.json(),
            "worker": self.workers.iter().map(WorkerLine::json).collect::<Vec<_>>(),
            "many": self.many.iter().map(Many::json).collect::<Vec<_>>(),
            "strongswan": self.rivals.iter().map(RivalLine::json).collect::<Vec<_>>(),
            "latency": self.latency.as_ref().map(Latency::json),
            "ike": self.ike.iter().map(IkeLine::json).collect::<Vec<_>>(),
            "ike_memory": self.memory.as_ref().map(Memory::json),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = format!("{}\n", self.machine);
        if !self.workers.is_empty() {
            writeln!(
                text,
                "\nOne worker, of the limit 1 / (forwarding + ring alone); to reach: {OF_THE_LIMIT:.2}. Sizes are those of \
                 inner IP packets; IMIX is 7 x 64, 4 x 590, 1 x 1400 B. In brackets where half of the rounds lie."
            )?;
        }
        for line in &self.workers {
            writeln!(text, "  {line}")?;
        }
        if !self.many.is_empty() {
            writeln!(
                text,
                "\nMany SAs against one, aes256gcm16, 590 B; to reach: {OF_ONE:.2}"
            )?;
        }
        for line in &self.many {
            writeln!(text, "  {line}")?;
        }
        if !self.rivals.is_empty() {
            writeln!(
                text,
                "\nOne worker beside strongSwan's userspace ESP on one processor, aes256gcm16: how many times its packets"
            )?;
        }
        for line in &self.rivals {
            writeln!(text, "  {line}")?;
        }
        if let Some(latency) = &self.latency {
            writeln!(
                text,
                "\nA round trip of one UDP packet between hosts behind two gateways\n{latency}"
            )?;
        }
        if !self.ike.is_empty() {
            writeln!(
                text,
                "\nIKE set-ups answered by one processor, PSK, no child: how many times strongSwan's; to reach: {SET_UPS:.0}"
            )?;
        }
        for line in &self.ike {
            writeln!(text, "  {line}")?;
        }
        if let Some(memory) = &self.memory {
            writeln!(text, "  {memory}")?;
        }
        f.write_str(&text)
    }
}
