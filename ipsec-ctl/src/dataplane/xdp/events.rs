//! The way of events from the packet threads to the daemon: never waits, and drops what the daemon has no room for.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::mpsc;

use crate::dataplane::seam::Event;

/// Sends events to the daemon. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Events {
    queue: mpsc::Sender<Event>,
}

impl Events {
    /// A queue of so many events, and its reading end.
    pub fn channel(depth: usize) -> (Self, mpsc::Receiver<Event>) {
        let (queue, events) = mpsc::channel(depth);
        (Self { queue }, events)
    }

    /// Sends an event if there is room; tells whether there was.
    pub fn send(&self, event: Event) -> bool {
        self.queue.try_send(event).is_ok()
    }
}

/// Lets each key pass once in so many seconds, and remembers a bounded number of keys.
#[derive(Clone, Debug)]
pub struct RateLimit<K> {
    seconds: u64,
    most_keys: usize,
    last: Arc<Mutex<HashMap<K, u64>>>,
}

impl<K: Eq + Hash> RateLimit<K> {
    /// One per key in `seconds`; while `most_keys` keys are fresh, new ones do not pass.
    pub fn new(seconds: u64, most_keys: usize) -> Self {
        Self {
            seconds,
            most_keys,
            last: Arc::default(),
        }
    }

    /// Whether the key may pass at `now` (seconds of CLOCK_MONOTONIC).
    pub fn pass(&self, key: K, now: u64) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() >= self.most_keys {
            let seconds = self.seconds;
            last.retain(|_, then| now.saturating_sub(*then) < seconds);
            if last.len() >= self.most_keys {
                return false;
            }
        }
        match last.get_mut(&key) {
            Some(then) if now.saturating_sub(*then) < self.seconds => false,
            Some(then) => {
                *then = now;
                true
            }
            None => {
                last.insert(key, now);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_passes_once_in_its_time() {
        let limit = RateLimit::new(5, 2);
        assert!(limit.pass('a', 100));
        assert!(!limit.pass('a', 104));
        assert!(limit.pass('b', 104));
        assert!(!limit.pass('c', 104), "no room for another key");
        assert!(limit.pass('a', 105));
        assert!(limit.pass('c', 109), "b has become old");
    }
}
