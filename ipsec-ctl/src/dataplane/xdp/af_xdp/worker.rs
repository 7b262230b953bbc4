//! The thread of a worker: runs batches while there are packets and sleeps when there are none.
#![expect(
    unsafe_code,
    reason = "an eventfd and poll wake a thread that sleeps on AF_XDP sockets"
)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use nix::sched::{CpuSet, sched_setaffinity};

use super::forward::{Forwarder, Handler};

/// How a worker runs.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// Name of the thread, at most 15 bytes.
    pub name: String,
    /// The CPU it stays on.
    pub cpu: Option<usize>,
    /// Never sleeps: lowest latency for a whole CPU.
    pub busy_poll: bool,
}

/// A running worker. Dropping it stops it and waits for that, so that its queues are free afterwards.
#[derive(Debug)]
pub struct Worker {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Stop {
    requested: AtomicBool,
    event: OwnedFd,
}

impl Worker {
    /// Starts a worker.
    ///
    /// # Errors
    ///
    /// Where the kernel gives no eventfd or thread.
    pub fn spawn<H: Handler + Send + 'static>(
        config: &WorkerConfig,
        mut forwarder: Forwarder,
        mut handler: H,
    ) -> io::Result<Self> {
        let stop = Arc::new(Stop {
            requested: AtomicBool::new(false),
            event: eventfd()?,
        });
        let theirs = Arc::clone(&stop);
        let (cpu, busy_poll) = (config.cpu, config.busy_poll);
        let thread = thread::Builder::new()
            .name(config.name.clone())
            .spawn(move || {
                if let Some(cpu) = cpu
                    && let Err(error) = pin(cpu)
                {
                    tracing::warn!(cpu, %error, "worker runs unpinned");
                }
                run(&mut forwarder, &mut handler, &theirs, busy_poll);
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.requested.store(true, Ordering::Release);
        let one = 1_u64.to_ne_bytes();
        // A write fails only where the counter is full, and then it wakes just as well.
        let _ = nix::unistd::write(&self.stop.event, &one);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a worker had panicked");
        }
    }
}

fn run(forwarder: &mut Forwarder, handler: &mut impl Handler, stop: &Stop, busy_poll: bool) {
    let events = [libc::POLLIN];
    let mut waits: Vec<libc::pollfd> = forwarder
        .sockets()
        .iter()
        .map(|socket| socket.as_fd().as_raw_fd())
        .chain([stop.event.as_raw_fd()])
        .zip(events.into_iter().cycle())
        .map(|(fd, events)| libc::pollfd {
            fd,
            events,
            revents: 0,
        })
        .collect();
    while !stop.requested.load(Ordering::Acquire) {
        if forwarder.batch(handler) == 0 && !busy_poll {
            // Packets that the kernel would not take yet are offered again soon.
            let milliseconds = if forwarder.sending() { 1 } else { -1 };
            sleep(&mut waits, milliseconds);
        }
    }
}

fn sleep(waits: &mut [libc::pollfd], milliseconds: libc::c_int) {
    let count = libc::nfds_t::try_from(waits.len()).unwrap_or_default();
    // SAFETY: the array has that many elements, and its descriptors are open while the worker runs. Whatever woke us,
    // an error included, the next batch finds out.
    let _ = unsafe { libc::poll(waits.as_mut_ptr(), count, milliseconds) };
}

fn pin(cpu: usize) -> nix::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)
}

fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
