//! Which processor does what, and how long a thread has been running on one.
//!
//! Time on the processor, unlike time on the wall, does not grow when other programs want the same processor.

use std::time::Duration;

use nix::{
    sched::{CpuSet, sched_setaffinity},
    time::{ClockId, clock_gettime},
    unistd::Pid,
};

/// The processor of generators, and of all that the kernel does to deliver what they send.
pub(super) const LOAD: usize = 0;
/// The processor of what is measured.
pub(super) const WORK: usize = 1;

/// Keeps this thread, and what it starts, on one processor.
///
/// # Errors
///
/// There is no such processor.
pub(super) fn stay_on(processor: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(processor)?;
    sched_setaffinity(Pid::from_raw(0), &set)?;
    Ok(())
}

/// Lets this thread run on the first processors, so many of them.
///
/// # Errors
///
/// The kernel refuses.
pub(super) fn stay_on_first(count: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    for processor in 0..count {
        set.set(processor)?;
    }
    sched_setaffinity(Pid::from_raw(0), &set)?;
    Ok(())
}

/// The time that a thread or process has spent on processors.
#[derive(Clone, Copy, Debug)]
pub(super) struct CpuClock(ClockId);

impl CpuClock {
    /// Of a thread of this process.
    pub(super) fn of_thread(id: i32) -> Self {
        // As clock_getcpuclockid(3) makes it: the id complemented, 4 for a thread, 2 for time that the scheduler counted.
        Self(ClockId::from_raw(!id << 3 | 4 | 2))
    }

    /// Of all threads of any process.
    pub(super) fn of_process(id: i32) -> Self {
        Self(ClockId::from_raw(!id << 3 | 2))
    }

    /// What it shows.
    ///
    /// # Errors
    ///
    /// The thread is gone.
    pub(super) fn now(self) -> anyhow::Result<Duration> {
        Ok(clock_gettime(self.0)?.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_of_a_busy_thread_runs_and_that_of_a_sleeping_one_stands() {
        let clock = CpuClock::of_thread(nix::unistd::gettid().as_raw());
        let start = clock.now().unwrap();
        while clock.now().unwrap() < start + Duration::from_millis(5) {
            std::hint::spin_loop();
        }
        let before = clock.now().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert!(clock.now().unwrap() - before < Duration::from_millis(25));
    }
}
