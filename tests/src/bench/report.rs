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
/// Everything that was measured.
#[derive(Debug)]
pub struct Report {
    /// Where.
    pub(super) machine: Machine,
    /// One worker against its limits.
    pub(super) workers: Vec<WorkerLine>,
    /// One SA against many.
    pub(super) many: Vec<Many>,
    /// Round trips.
    pub(super) latency: Option<Latency>,
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
            latency: None,
        })
    }

    /// For a program.
    pub fn json(&self) -> Value {
        json!({
            "machine": self.machine.json(),
            "worker": self.workers.iter().map(WorkerLine::json).collect::<Vec<_>>(),
            "many": self.many.iter().map(Many::json).collect::<Vec<_>>(),
            "latency": self.latency.as_ref().map(Latency::json),
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
        if let Some(latency) = &self.latency {
            writeln!(
                text,
                "\nA round trip of one UDP packet between hosts behind two gateways\n{latency}"
            )?;
        }
        f.write_str(&text)
    }
}
