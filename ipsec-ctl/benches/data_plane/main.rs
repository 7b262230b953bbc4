//! How fast one AF_XDP worker is, beside the limits it cannot pass: forwarding without cryptography, and cryptography
//! alone (`cargo xtask bench`).
//!
//! Everything is measured in one run on one machine, in a network namespace of its own: two veth pairs, one worker
//! pinned to a processor, the load and all that the kernel does to deliver it on another. Sizes are those of the inner
//! IP packet. Outbound and plain load are live frames of BPF_PROG_TEST_RUN; inbound load is sealed beforehand, every
//! packet with a sequence number of its own, with replay protection on, and sent by an AF_XDP generator.
#![expect(
    clippy::print_stdout,
    reason = "the report is what this program is for"
)]

mod bed;
mod load;
mod packets;
mod report;

use std::time::{Duration, Instant};

use ipsec_ctl::esp::EspSuite;

use crate::{
    bed::{Bed, Job},
    packets::{SIZES, Sealer},
    report::{Line, print},
};

/// How long each rate is measured.
const MEASURE: Duration = Duration::from_millis(1500);
/// How long the load runs before.
const WARM_UP: Duration = Duration::from_millis(300);

const SUITES: [(&str, EspSuite); 3] = [
    ("aes256gcm16", EspSuite::Aes256Gcm16),
    ("aes128gcm16", EspSuite::Aes128Gcm16),
    ("chacha20poly1305", EspSuite::ChaCha20Poly1305),
];

fn main() -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: benchmarks need root for network namespaces and XDP");
        return Ok(());
    }
    // Before any thread starts, so that all are in it.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let lines = runtime.block_on(measure_all())?;
    print(&lines)
}

async fn measure_all() -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for size in SIZES {
        let mut bed = Bed::new()?;
        let plain = bed.measure(Job::Plain, size).await?;
        drop(bed);
        for (name, suite) in SUITES {
            let ring = ring_alone(suite, size)?;
            for job in [Job::Outbound(suite), Job::Inbound(suite)] {
                let mut bed = Bed::new()?;
                let rate = bed.measure(job, size).await?;
                let line = Line {
                    suite: name,
                    direction: job.direction(),
                    size,
                    plain,
                    ring,
                    rate,
                };
                eprintln!("{line}");
                lines.push(line);
            }
        }
    }
    Ok(lines)
}

/// Packets a second that the cryptography of one direction makes on one processor, with nothing around it.
fn ring_alone(suite: EspSuite, size: usize) -> anyhow::Result<f64> {
    let mut sealer = Sealer::new(suite)?;
    let start = Instant::now();
    let mut packets = 0_u32;
    while start.elapsed() < Duration::from_millis(300) {
        for _ in 0..256 {
            sealer.transform_alone(size)?;
        }
        packets += 256;
    }
    Ok(f64::from(packets) / start.elapsed().as_secs_f64())
}
