//! Short measurements, and what many of them say together.

use std::time::Duration;

/// What came of a short measurement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Slice {
    /// Packets done.
    pub(super) packets: u64,
    /// How long it took.
    pub(super) wall: Duration,
    /// How long the measured thread had a processor.
    pub(super) cpu: Duration,
}

impl Slice {
    /// Nanoseconds on the processor for each packet.
    pub(super) fn cpu_ns(&self) -> f64 {
        per_packet(self.cpu, self.packets)
    }

    /// Nanoseconds on the wall for each packet.
    pub(super) fn wall_ns(&self) -> f64 {
        per_packet(self.wall, self.packets)
    }

    /// The same packets without what `part` takes for as many.
    #[must_use]
    pub(super) fn without(&self, part: &Self) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let share = self.packets as f64 / part.packets.max(1) as f64;
        Self {
            packets: self.packets,
            wall: self.wall.saturating_sub(part.wall.mul_f64(share)),
            cpu: self.cpu.saturating_sub(part.cpu.mul_f64(share)),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn per_packet(time: Duration, packets: u64) -> f64 {
    time.as_secs_f64() * 1e9 / packets.max(1) as f64
}

/// The value in the middle; 0 of none.
pub(super) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    quantile(values, 0.5)
}

/// The value below which that share of all values is; 0 of none.
pub(super) fn quantile(values: impl IntoIterator<Item = f64>, share: f64) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "an index into a list that is in memory"
    )]
    let index = (values.len() as f64 * share) as usize;
    let last = values.len().saturating_sub(1);
    values.get(index.min(last)).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wild_slice_does_not_move_the_median() {
        assert_eq!(median([1.0, 900.0, 2.0]), 2.0);
        assert_eq!(median([]), 0.0);
        assert_eq!(quantile((0..100).map(f64::from), 0.99), 99.0);
    }

    #[test]
    fn a_part_is_taken_off_in_proportion() {
        let whole = Slice {
            packets: 200,
            wall: Duration::from_micros(100),
            cpu: Duration::from_micros(80),
        };
        let part = Slice {
            packets: 50,
            wall: Duration::from_micros(5),
            cpu: Duration::from_micros(5),
        };
        let rest = whole.without(&part);
        assert_eq!(rest.cpu, Duration::from_micros(60));
        assert!((rest.cpu_ns() - 300.0).abs() < 1e-6);
    }
}
