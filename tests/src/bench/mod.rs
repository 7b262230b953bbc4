//! `cargo xtask bench`: how fast it is, beside the limits that it cannot pass.
//!
//! Everything is measured in one run on one machine. What is compared is measured in turn, in slices far shorter than a
//! second, and a figure is the median over the slices: so other programs disturb all sides alike. Rates are packets
//! for each second that the worker has a processor; what the clock on the wall says stands beside them.

mod bed;
mod cores;
mod engines;
pub(crate) mod generator;
mod ike;
mod ike_end;
mod latency;
mod packets;
mod peer;
mod report;
mod ring_alone;
mod rival;
mod slice;
mod worker;

use std::{thread, time::Duration};

use anyhow::{Context, anyhow};
use nix::sched::{CloneFlags, unshare};

pub use engines::compare;
pub use ike::{ANSWER, answer};
pub use report::Report;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Packets of a slice.
    pub packets: u64,
    /// Slices of each kind.
    pub rounds: usize,
    /// How long a slice of ring alone takes.
    pub ring: Duration,
    /// Round trips of a slice.
    pub pings: usize,
    /// IKE SAs that come up at each responder, in all rounds.
    pub set_ups: usize,
}

impl Effort {
    /// For figures to be relied on.
    pub fn full() -> Self {
        Self {
            packets: 32_768,
            rounds: 21,
            ring: Duration::from_millis(10),
            pings: 500,
            set_ups: 10_000,
        }
    }

    /// For a look, in a minute.
    pub fn quick() -> Self {
        Self {
            packets: 16_384,
            rounds: 5,
            ring: Duration::from_millis(4),
            pings: 200,
            set_ups: 1000,
        }
    }

    /// To see that it works.
    fn smoke() -> Self {
        Self {
            packets: 512,
            rounds: 1,
            ring: Duration::from_millis(1),
            pings: 20,
            set_ups: 20,
        }
    }
}

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// One worker against its limits.
    Worker,
    /// One SA against many.
    Many,
    /// Throughput beside strongSwan's userspace ESP.
    Rival,
    /// Round trips.
    Latency,
    /// IKE set-ups beside strongSwan.
    Ike,
}

impl Part {
    /// All of them, by name.
    pub const ALL: [(&str, Self); 5] = [
        ("worker", Self::Worker),
        ("many", Self::Many),
        ("strongswan", Self::Rival),
        ("latency", Self::Latency),
        ("ike", Self::Ike),
    ];
}

/// Measures these parts.
///
/// # Errors
///
/// A bed cannot be built, or packets are lost in it.
pub fn measure(effort: &Effort, parts: &[Part]) -> anyhow::Result<Report> {
    let effort = *effort;
    let mut report = Report::here()?;
    for part in parts {
        match part {
            Part::Worker => {
                tell("one worker against its limits");
                (report.machine.mode, report.workers) = apart(move || worker::measure(&effort))?;
            }
            Part::Many => {
                tell("one SA against many");
                report.many = apart(move || worker::measure_many(&effort))?;
            }
            Part::Rival => {
                tell("throughput beside strongSwan");
                report.rivals = apart(move || rival::measure(&effort))?;
            }
            Part::Latency => {
                tell("round trips");
                report.latency = Some(beside(move || peer::measure_latency(&effort))?);
            }
            Part::Ike => {
                tell("IKE set-ups beside strongSwan");
                let (lines, memory) = beside(move || ike::measure(&effort))?;
                (report.ike, report.memory) = (lines, Some(memory));
            }
        }
    }
    Ok(report)
}

/// A proof in seconds that the beds of the benchmarks work.
///
/// # Errors
///
/// They do not.
pub fn smoke() -> anyhow::Result<()> {
    apart(worker::smoke).context("one worker")?;
    apart(|| rival::measure(&Effort::smoke())).context("strongSwan beside a worker")?;
    beside(peer::smoke).context("two sites")
}

#[expect(clippy::print_stderr, reason = "progress, beside the report")]
fn tell(what: &str) {
    eprintln!("measuring {what}");
}

/// Runs in a thread with a network namespace of its own, and in a runtime all of whose threads are in it.
fn apart<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let thread = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).context("a network namespace")?;
        cores::stay_on(cores::LOAD)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let _inside = runtime.enter();
        work()
    });
    joined(thread)
}

/// Runs in a thread, so that what becomes of its affinity stays there.
fn beside<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    joined(thread::spawn(work))
}

fn joined<T>(thread: thread::JoinHandle<anyhow::Result<T>>) -> anyhow::Result<T> {
    thread
        .join()
        .map_err(|_| anyhow!("a thread of the benchmark panicked"))?
}
