//! All AF_XDP workers of an engine: which queues each one owns, and their start and end.
//!
//! A worker must be able to send on every interface, so there are at most as many as the interface with the fewest
//! queues has. When interfaces or queues change, the fleet is replaced as a whole; the slow path carries on meanwhile.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use ipsec_common::Reason;

use super::{
    af_xdp::{
        forward::{FRAMES_PER_SOCKET, Forwarder},
        socket::{CopyMode, Meter, OpenError, QueueId, Socket, Statistics, open_all},
        umem::Umem,
        worker::{Worker, WorkerConfig},
    },
    counters::Counters,
    gateway::{Gateway, Port, Shared, SlowExit},
    next_hop::NextHops,
    resolver::Resolver,
    slow::monotonic_seconds,
};

/// An interface that workers are to have sockets on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FleetLink {
    /// The interface.
    pub port: Port,
    /// Its receive queues.
    pub queues: u32,
}

/// How a fleet runs.
#[derive(Clone, Copy, Debug)]
pub struct FleetConfig {
    /// Workers, at most; as many as there are processors otherwise.
    pub workers: Option<u16>,
    /// Workers never sleep.
    pub busy_poll: bool,
}

/// The running workers. Dropping it stops them and frees the queues.
#[derive(Debug)]
pub struct Fleet {
    workers: Vec<Worker>,
    counters: Vec<Arc<Counters>>,
    meters: Vec<Meter>,
    mode: CopyMode,
}

/// Why a fleet could not start.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// A queue takes no socket: without its interface the others may do.
    #[error(transparent)]
    Socket(#[from] OpenError),
    /// Anything else.
    #[error("{step}: {source}")]
    Other {
        /// What was being done.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl Fleet {
    /// Opens a socket on every queue of every interface, shows each to `register`, and starts the workers.
    ///
    /// # Errors
    ///
    /// [`FleetError`].
    pub fn start<S: SlowExit + Clone + 'static>(
        links: &[FleetLink],
        config: FleetConfig,
        shared: &Shared,
        resolver: &Resolver,
        exit: &S,
        mut register: impl FnMut(QueueId, BorrowedFd<'_>) -> io::Result<()>,
    ) -> Result<Self, FleetError> {
        let failed = |step| move |source| FleetError::Other { step, source };
        let processors = processors();
        let most = config.workers.map_or(processors.len(), usize::from);
        let mut outfits = Vec::new();
        for share in shares(links, most) {
            outfits.push(Outfit::new(share)?);
        }
        for socket in outfits.iter().flat_map(|outfit| &outfit.sockets) {
            register(socket.at(), socket.as_fd()).map_err(failed("enter a socket"))?;
        }
        let mut fleet = Self {
            workers: Vec::new(),
            counters: Vec::new(),
            meters: outfits
                .iter()
                .flat_map(|outfit| &outfit.sockets)
                .map(Socket::meter)
                .collect::<io::Result<_>>()
                .map_err(failed("watch a socket"))?,
            // Of all workers the worst, for that is what an operator needs to know.
            mode: if outfits
                .iter()
                .all(|outfit| outfit.mode == CopyMode::ZeroCopy)
            {
                CopyMode::ZeroCopy
            } else {
                CopyMode::Copy
            },
        };
        for (number, outfit) in outfits.into_iter().enumerate() {
            let counters = Arc::new(Counters::default());
            let next_hops = NextHops::new(resolver.questions.clone(), resolver.generation.clone());
            let gateway = Gateway::new(
                shared.clone(),
                outfit.ports,
                next_hops,
                exit.clone(),
                Arc::clone(&counters),
                monotonic_seconds,
            );
            let config = WorkerConfig {
                name: format!("worker-{number}"),
                cpu: pick(&processors, number),
                busy_poll: config.busy_poll,
            };
            let forwarder = Forwarder::new(outfit.umem, outfit.sockets);
            let worker =
                Worker::spawn(&config, forwarder, gateway).map_err(failed("start a thread"))?;
            fleet.workers.push(worker);
            fleet.counters.push(counters);
        }
        Ok(fleet)
    }

    /// Whether every queue of an interface would take a socket. None is kept.
    ///
    /// # Errors
    ///
    /// [`FleetError`].
    pub fn probe(link: FleetLink) -> Result<(), FleetError> {
        for share in shares(&[link], 1) {
            Outfit::new(share)?;
        }
        Ok(())
    }

    /// Packets that workers, or the kernel on the way to them, counted for this reason.
    pub fn count(&self, reason: Reason) -> u64 {
        if reason == Reason::RxRingFull {
            return self.lost(|statistics| statistics.rx_ring_full);
        }
        if reason == Reason::RxNoFrame {
            return self.lost(|statistics| statistics.rx_dropped);
        }
        let counters = self.counters.iter();
        counters.map(|counters| counters.get(reason)).sum()
    }

    fn lost(&self, of: fn(Statistics) -> u64) -> u64 {
        let statistics = self
            .meters
            .iter()
            .filter_map(|meter| meter.statistics().ok());
        statistics.map(of).sum()
    }

    /// How packets reach the workers.
    pub fn mode(&self) -> CopyMode {
        self.mode
    }

    /// Number of workers.
    pub fn workers(&self) -> usize {
        self.workers.len()
    }
}

/// The queues of one worker.
type Share = Vec<(Port, QueueId)>;

/// Deals the queues out to at most `most` workers, each of which gets one of every interface at least.
fn shares(links: &[FleetLink], most: usize) -> Vec<Share> {
    let fewest = links.iter().map(|link| link.queues).min().unwrap_or(0);
    let workers = usize::try_from(fewest)
        .unwrap_or(usize::MAX)
        .min(most.max(1));
    let mut shares = vec![Share::new(); workers];
    for link in links {
        // The worker of a queue is found by going round.
        for (queue, share) in (0..link.queues).zip((0..workers).cycle()) {
            let at = QueueId {
                ifindex: link.port.ifindex,
                queue,
            };
            if let Some(share) = shares.get_mut(share) {
                share.push((link.port, at));
            }
        }
    }
    shares
}

/// What a worker needs before it can start.
struct Outfit {
    umem: Umem,
    ports: Vec<Port>,
    sockets: Vec<Socket>,
    mode: CopyMode,
}

impl Outfit {
    fn new(share: Share) -> Result<Self, FleetError> {
        let (ports, queues): (Vec<_>, Vec<_>) = share.into_iter().unzip();
        let frames = u32::try_from(queues.len())
            .unwrap_or(u32::MAX)
            .saturating_mul(FRAMES_PER_SOCKET);
        let umem = Umem::new(frames).map_err(|source| FleetError::Other {
            step: "map packet memory",
            source,
        })?;
        let (sockets, mode) = open_all(&umem, &queues)?;
        Ok(Self {
            umem,
            ports,
            sockets,
            mode,
        })
    }
}

/// The processors that we may run on.
fn processors() -> Vec<usize> {
    let allowed = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap_or_default();
    (0..nix::sched::CpuSet::count())
        .filter(|processor| allowed.is_set(*processor).unwrap_or(false))
        .collect()
}

/// The processor of a worker. Several gateways on one host must not all begin with the same one.
fn pick(processors: &[usize], worker: usize) -> Option<usize> {
    let first = usize::try_from(std::process::id()).unwrap_or_default();
    let count = processors.len().max(1);
    processors.get((first + worker) % count).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(ifindex: u32, queues: u32) -> FleetLink {
        FleetLink {
            port: Port {
                ifindex,
                partial_checksums: false,
            },
            queues,
        }
    }

    fn queues(share: &Share) -> Vec<(u32, u32)> {
        share.iter().map(|(_, at)| (at.ifindex, at.queue)).collect()
    }

    #[test]
    fn every_worker_gets_a_queue_of_every_interface_and_every_queue_a_worker() {
        let shares = shares(&[link(1, 4), link(2, 2)], 8);
        let shares: Vec<_> = shares.iter().map(queues).collect();
        assert_eq!(
            shares,
            [vec![(1, 0), (1, 2), (2, 0)], vec![(1, 1), (1, 3), (2, 1)]]
        );
    }

    #[test]
    fn there_are_no_more_workers_than_asked_for() {
        assert_eq!(shares(&[link(1, 4), link(2, 4)], 1).len(), 1);
        assert_eq!(shares(&[link(1, 4)], 3).len(), 3);
        assert!(shares(&[], 3).is_empty());
    }
}
