//! How often an engine compares everything with what should be: together after several changes, and with pauses.

use std::{future::Future, time::Duration};

use tokio::time::{Instant, sleep_until};

/// After a change the kernel often reports more of them: they are seen to together.
const SETTLE: Duration = Duration::from_millis(50);
/// With many tunnels a look at all of them takes long, and while they come up there is always a change. Nothing can be installed
/// meanwhile: so many times as long as it took there is no other look,
const IDLE_SHARE: u32 = 4;
/// but not longer than this.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// When the next look may begin.
#[derive(Debug)]
pub(super) struct Pace {
    not_before: Instant,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self {
            not_before: Instant::now(),
        }
    }

    /// Waits after a change until it is time to look.
    pub(super) async fn turn(&self) {
        sleep_until((Instant::now() + SETTLE).max(self.not_before)).await;
    }

    /// Looks, and has a pause follow.
    pub(super) async fn look(&mut self, look: impl Future<Output = ()>) {
        let start = Instant::now();
        look.await;
        self.not_before = Instant::now() + (start.elapsed() * IDLE_SHARE).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    /// Time from a change to the look that follows one which took so long.
    async fn wait_after(look: Duration) -> Duration {
        let mut pace = Pace::new();
        pace.look(sleep(look)).await;
        let change = Instant::now();
        pace.turn().await;
        change.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_look_is_followed_by_a_long_pause_with_an_end() {
        assert_eq!(wait_after(Duration::ZERO).await, SETTLE);
        let tenth = Duration::from_millis(100);
        assert_eq!(wait_after(tenth).await, tenth * IDLE_SHARE);
        assert_eq!(wait_after(Duration::from_secs(9)).await, LONGEST_PAUSE);
    }
}
