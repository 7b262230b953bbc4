//! Counters of drops and detours, by reason.

use std::sync::atomic::{AtomicU64, Ordering};

use ipsec_common::Reason;

/// One counter per reason. Give each busy thread its own and add them up when somebody asks.
#[derive(Debug)]
pub struct Counters(Box<[AtomicU64]>);

impl Default for Counters {
    fn default() -> Self {
        Self(Reason::ALL.iter().map(|_| AtomicU64::new(0)).collect())
    }
}

impl Counters {
    /// Counts one packet.
    pub fn count(&self, reason: Reason) {
        if let Some(counter) = self.0.get(reason as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Packets counted so far.
    pub fn get(&self, reason: Reason) -> u64 {
        self.0
            .get(reason as usize)
            .map_or(0, |counter| counter.load(Ordering::Relaxed))
    }
}
