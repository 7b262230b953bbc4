//! Generators that keep a worker busy, on a thread and a processor of their own.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use ipsec_ctl::dataplane::xdp::{
    af_xdp::{
        forward::{FRAMES_PER_SOCKET, Forwarder, Handler, Verdict},
        socket::{QueueId, open_all},
        umem::Umem,
    },
    program::Program,
};
use nix::sched::{CpuSet, sched_setaffinity};

/// The processor of all generators.
const PROCESSOR: usize = 0;

/// A running generator; dropping it stops it.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    fn spawn(mut send: impl FnMut() + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut processors = CpuSet::new();
            if processors.set(PROCESSOR).is_ok() {
                let _ = sched_setaffinity(nix::unistd::Pid::from_raw(0), &processors);
            }
            while !stopped.load(Ordering::Relaxed) {
                send();
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    /// Copies of one frame, as if received on an interface.
    pub(crate) fn flood(mut program: Program, ifindex: u32, frame: Vec<u8>) -> Self {
        Self::spawn(move || {
            if let Err(error) = program.flood(ifindex, &frame, 4096) {
                eprintln!("{error}");
            }
        })
    }

    /// Frames in turn, each once, sent by AF_XDP; nothing when they are used up.
    pub(crate) fn send_each(at: QueueId, frames: Vec<Vec<u8>>) -> anyhow::Result<Self> {
        let umem = Umem::new(2 * FRAMES_PER_SOCKET)?;
        let (sockets, _) = open_all(&umem, &[at])?;
        let mut forwarder = Forwarder::new(umem, sockets);
        let mut next = 0;
        Ok(Self::spawn(move || {
            for _ in 0..64 {
                if let Some(frame) = frames.get(next)
                    && forwarder.inject(0, frame)
                {
                    next += 1;
                }
            }
            forwarder.batch(&mut Sink);
        }))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Drops what a generator receives.
struct Sink;

impl Handler for Sink {
    fn begin(&mut self) {}

    fn handle(&mut self, _: usize, _: &mut [u8], _: Range<usize>) -> Verdict {
        Verdict::Done
    }

    fn send_failed(&mut self) {}
}
