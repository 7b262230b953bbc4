//! A bounded pool of threads for slow cryptography, so that one peer's MODP group delays no other peer's packets.

use std::{
    num::NonZero,
    sync::{Arc, Mutex, PoisonError, mpsc as blocking},
    thread,
};

use tokio::sync::mpsc;

/// Jobs that wait at most; the endpoint's half-open limits keep the true number far below.
const QUEUE: usize = 65_536;

/// Threads that turn jobs into results.
#[derive(Debug)]
pub(super) struct Pool<J> {
    queue: blocking::SyncSender<J>,
}

impl<J: Send + 'static> Pool<J> {
    /// Starts as many threads as there are processors; results arrive at the receiver in any order.
    pub(super) fn start<R: Send + 'static>(
        work: impl Fn(J) -> R + Clone + Send + 'static,
    ) -> std::io::Result<(Self, mpsc::UnboundedReceiver<R>)> {
        let (queue, jobs) = blocking::sync_channel::<J>(QUEUE);
        // The number of results is bounded by the number of jobs.
        let (done, results) = mpsc::unbounded_channel();
        let jobs = Arc::new(Mutex::new(jobs));
        for number in 0..thread::available_parallelism().map_or(1, NonZero::get) {
            let (jobs, done, work) = (Arc::clone(&jobs), done.clone(), work.clone());
            thread::Builder::new()
                .name(format!("crypto-{number}"))
                .spawn(move || {
                    loop {
                        let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
                        let Ok(job) = next else { return };
                        if done.send(work(job)).is_err() {
                            return;
                        }
                    }
                })?;
        }
        Ok((Self { queue }, results))
    }

    /// Queues a job; false if the pool is overrun and the job is lost.
    #[must_use]
    pub(super) fn submit(&self, job: J) -> bool {
        self.queue.try_send(job).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_job_yields_its_result() {
        let (pool, mut results) = Pool::start(|number: u64| number * 2).unwrap();
        for number in 0..100 {
            assert!(pool.submit(number));
        }
        let mut sum = 0;
        for _ in 0..100 {
            sum += results.recv().await.unwrap();
        }
        assert_eq!(sum, 9900);
    }
}
