//! The engines beside each other: the same tunnel between the same hosts, carried by one and by the other, on a kernel that has ESP.

use std::{fmt::Write, time::Duration};

use crate::{
    gateway::Tunnel,
    pair::start,
    suite::Need,
    tcp,
    topology::{Family, Options, Side, Topology},
};

const IKE: &str = "aes256gcm16-prfsha384-x25519";
const SUITES: [&str; 2] = ["aes256gcm16", "chacha20poly1305"];
/// What carries the tunnel, and the lines that say so.
const ENGINES: [(&str, &[&str]); 3] = [
    ("kernel", &["engine = \"kernel\""]),
    ("xdp", &["engine = \"xdp\"", "fast_path = \"on\""]),
    (
        "xdp, slow path",
        &["engine = \"xdp\"", "fast_path = \"off\""],
    ),
];
/// Each is measured so often, in turn, so that what else the machine does hits all of them.
const ROUNDS: usize = 3;

/// Measures TCP through a tunnel for so long at a time; tells in words where the kernel has no ESP.
///
/// # Errors
///
/// A tunnel does not come up, or breaks.
pub fn compare(time: Duration) -> anyhow::Result<String> {
    if let Some(reason) = Need::XfrmInterfaces.missing() {
        return Ok(format!(
            "the engines cannot be compared here: {reason}, but what a guest measures says nothing about a machine"
        ));
    }
    let mut report = format!(
        "TCP between two hosts through two gateways, the median of {ROUNDS} runs of {} s each\n",
        time.as_secs_f32()
    );
    for suite in SUITES {
        let mut rates = [const { Vec::new() }; ENGINES.len()];
        for _ in 0..ROUNDS {
            for ((_, lines), rates) in ENGINES.iter().zip(&mut rates) {
                rates.push(rate(suite, lines, time)?);
            }
        }
        let medians = rates.map(|mut rates| {
            rates.sort_by(f64::total_cmp);
            rates.get(ROUNDS / 2).copied().unwrap_or_default()
        });
        writeln!(report, "\n{suite}")?;
        for ((name, _), median) in ENGINES.iter().zip(medians) {
            writeln!(
                report,
                "  {name:<16} {:>7.0} Mbit/s  {:>5.2} of the kernel's",
                median / 1e6,
                median / medians[0].max(1.0)
            )?;
        }
    }
    Ok(report)
}

/// Bits a second.
fn rate(suite: &str, lines: &[&str], time: Duration) -> anyhow::Result<f64> {
    let topology = Topology::build(Options::default())?;
    let tunnel = |side| {
        let tunnel = Tunnel::between_sites(side, Family::V4).suite(IKE, suite);
        lines.iter().fold(tunnel, |tunnel, line| tunnel.with(line))
    };
    let _gateways = start(&topology, tunnel(Side::A), tunnel(Side::B).respond())?;
    let (from, into) = (&topology.host_a, &topology.host_b);
    let transfer = tcp::transfer(from, into, Side::B.host(Family::V4), time, u64::MAX)?;
    Ok(transfer.bits_per_second())
}
