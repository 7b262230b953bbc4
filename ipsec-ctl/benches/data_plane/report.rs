//! The report: ratios first, in the terminal and as JSON.

use std::fmt;

use serde_json::json;

/// The goal: of what forwarding and cryptography leave, this much.
const GOAL: f64 = 0.80;

/// One measurement with its limits, all in packets a second.
pub(crate) struct Line {
    pub(crate) suite: &'static str,
    pub(crate) direction: &'static str,
    /// Bytes of the inner packet.
    pub(crate) size: usize,
    /// Forwarding alone.
    pub(crate) plain: f64,
    /// Cryptography alone.
    pub(crate) ring: f64,
    /// Both together, as measured.
    pub(crate) rate: f64,
}

impl Line {
    /// What one processor could do that does nothing but forward and encrypt, one after the other.
    fn limit(&self) -> f64 {
        1.0 / (1.0 / self.plain + 1.0 / self.ring)
    }

    fn ratio(&self) -> f64 {
        self.rate / self.limit()
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:17} {:9} {:5} B  {:4.2} of the limit  {:6.3} of {:6.3} Mpps  (forwarding {:6.3}, cryptography {:6.3})",
            self.suite,
            self.direction,
            self.size,
            self.ratio(),
            self.rate / 1e6,
            self.limit() / 1e6,
            self.plain / 1e6,
            self.ring / 1e6,
        )
    }
}

pub(crate) fn print(lines: &[Line]) -> anyhow::Result<()> {
    println!("one worker, sizes of the inner IP packet, goal {GOAL:.2} of the limit");
    for line in lines {
        let mark = if line.ratio() < GOAL { "  below" } else { "" };
        println!("{line}{mark}");
    }
    let values: Vec<_> = lines
        .iter()
        .map(|line| {
            json!({
                "suite": line.suite, "direction": line.direction, "size": line.size,
                "ratio": line.ratio(), "pps": line.rate, "limit_pps": line.limit(),
                "forwarding_pps": line.plain, "cryptography_pps": line.ring,
            })
        })
        .collect();
    println!("{}", serde_json::to_string(&values)?);
    Ok(())
}
