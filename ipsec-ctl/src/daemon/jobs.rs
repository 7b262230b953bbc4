//! A bounded pool of threads for slow cryptography, so that one peer's MODP group delays no other peer's packets.
//!
//! Jobs are quick or slow. One thread takes quick jobs only, so that these never wait for slow ones, however many there are;
//! the others take slow jobs first, so that quick ones never starve these.

use std::{
    collections::VecDeque,
    num::NonZero,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use tokio::sync::mpsc;

/// Jobs of a kind that wait at most; the endpoint's half-open limits keep the true number far below.
const QUEUE: usize = 32_768;

/// Threads that turn jobs into results; they end with the pool.
#[derive(Debug)]
pub(super) struct Pool<J> {
    shared: Arc<Shared<J>>,
    is_slow: fn(&J) -> bool,
}

#[derive(Debug)]
struct Shared<J> {
    queues: Mutex<Queues<J>>,
    changed: Condvar,
}

#[derive(Debug)]
struct Queues<J> {
    quick: VecDeque<J>,
    slow: VecDeque<J>,
    closed: bool,
}

impl<J: Send + 'static> Pool<J> {
    /// Starts as many threads as there are processors, at least two; results arrive at the receiver in any order.
    pub(super) fn start<R: Send + 'static>(
        work: impl Fn(J) -> R + Clone + Send + 'static,
        is_slow: fn(&J) -> bool,
    ) -> std::io::Result<(Self, mpsc::UnboundedReceiver<R>)> {
        let shared = Arc::new(Shared {
            queues: Mutex::new(Queues {
                quick: VecDeque::new(),
                slow: VecDeque::new(),
                closed: false,
            }),
            changed: Condvar::new(),
        });
        let pool = Self { shared, is_slow };
        // The number of results is bounded by the number of jobs.
        let (done, results) = mpsc::unbounded_channel();
        for number in
            0..thread::available_parallelism().map_or(2, |count| NonZero::get(count).max(2))
        {
            let (shared, done, work) = (Arc::clone(&pool.shared), done.clone(), work.clone());
            thread::Builder::new()
                .name(format!("crypto-{number}"))
                .spawn(move || {
                    while let Some(job) = shared.next(number > 0) {
                        if done.send(work(job)).is_err() {
                            return;
                        }
                    }
                })?;
        }
        Ok((pool, results))
    }

    /// Queues a job; false if the pool is overrun and the job is lost.
    #[must_use]
    pub(super) fn submit(&self, job: J) -> bool {
        let slow = (self.is_slow)(&job);
        let mut queues = self.shared.lock();
        let queue = if slow {
            &mut queues.slow
        } else {
            &mut queues.quick
        };
        if queue.len() >= QUEUE {
            return false;
        }
        queue.push_back(job);
        drop(queues);
        // All, for the one that wakes might not take slow jobs.
        self.shared.changed.notify_all();
        true
    }
}

impl<J> Shared<J> {
    fn lock(&self) -> MutexGuard<'_, Queues<J>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a job; none when the pool is gone.
    fn next(&self, takes_slow: bool) -> Option<J> {
        let mut queues = self.lock();
        loop {
            if queues.closed {
                return None;
            }
            let slow = takes_slow.then(|| queues.slow.pop_front()).flatten();
            if let Some(job) = slow.or_else(|| queues.quick.pop_front()) {
                return Some(job);
            }
            queues = self
                .changed
                .wait(queues)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<J> Drop for Pool<J> {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc as blocking;

    use super::*;

    #[tokio::test]
    async fn every_job_yields_its_result() {
        let (pool, mut results) =
            Pool::start(|number: u64| number * 2, |number| number % 3 == 0).unwrap();
        for number in 0..100 {
            assert!(pool.submit(number));
        }
        let mut sum = 0;
        for _ in 0..100 {
            sum += results.recv().await.unwrap();
        }
        assert_eq!(sum, 9900);
    }

    /// A job of the tests: it ends when the other end of its channel goes, or at once.
    struct Exchange(Option<blocking::Receiver<()>>);

    #[tokio::test]
    async fn key_exchanges_that_never_end_delay_no_quick_one() {
        let work = |exchange: Exchange| exchange.0.is_some_and(|stalls| stalls.recv().is_err());
        let (pool, mut results) = Pool::start(work, |exchange| exchange.0.is_some()).unwrap();
        let stalled: Vec<_> = (0..1000)
            .map(|_| {
                let (ends, stalls) = blocking::channel();
                assert!(pool.submit(Exchange(Some(stalls))));
                ends
            })
            .collect();
        for _ in 0..100 {
            assert!(pool.submit(Exchange(None)));
            assert_eq!(
                results.recv().await,
                Some(false),
                "only the quick one has ended"
            );
        }
        drop(stalled);
        for _ in 0..1000 {
            assert_eq!(results.recv().await, Some(true));
        }
    }
}
