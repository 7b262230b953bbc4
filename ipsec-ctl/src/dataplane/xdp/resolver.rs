//! Answers the workers' questions for next hops with what the kernel's FIB and neighbour tables say.
//!
//! A task of the runtime: it may wait for the kernel, which a worker must not. It also watches what its answers depend
//! on, and voids the workers' caches when that changes.

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use ipsec_common::Reason;
use tokio::{sync::mpsc, time::interval};

use super::{
    next_hop::{Answer, Generation, Key, NextHop, Question, Reply},
    table::Tables,
};
use crate::net::{
    forwarding::{NeighbourChange, Packet, PacketOrigin, Routed, watch_neighbours},
    netlink::{Netlink, NetlinkError},
    watch,
};

/// Questions that wait at most; a worker repeats one that found no room.
const QUEUE: usize = 4096;
/// How long a neighbour counts as in use after somebody asked for it.
const IN_USE: Duration = Duration::from_secs(60);
/// Neighbours in use that are remembered; changes of others do not void the caches.
const MOST_NEIGHBOURS: usize = 64 * 1024;

/// Where workers ask. Cheap to clone; the task ends with the last one.
#[derive(Clone, Debug)]
pub struct Resolver {
    /// The way to the task.
    pub questions: mpsc::Sender<Question>,
    /// What its changes count.
    pub generation: Generation,
}

impl Resolver {
    /// Starts the task, in the network namespace that the caller is in. Outer packets are routed with `mark`.
    ///
    /// # Errors
    ///
    /// Those of netlink sockets.
    pub fn start(tables: Arc<Tables>, mark: u32) -> io::Result<Self> {
        let (questions, asked) = mpsc::channel(QUEUE);
        let generation = Generation::default();
        let task = Task {
            netlink: Netlink::open()?,
            tables,
            mark,
            generation: generation.clone(),
            in_use: HashMap::new(),
        };
        tokio::spawn(task.run(asked, watch::start()?, watch_neighbours()?));
        Ok(Self {
            questions,
            generation,
        })
    }
}

struct Task {
    netlink: Netlink,
    tables: Arc<Tables>,
    mark: u32,
    generation: Generation,
    /// Neighbours that answers named, by link and address.
    in_use: HashMap<(u32, IpAddr), InUse>,
}

/// A neighbour that an answer named.
struct InUse {
    mac: Option<[u8; 6]>,
    asked: Instant,
    /// The kernel keeps it because we said so.
    ours: bool,
}

impl Task {
    async fn run(
        mut self,
        mut asked: mpsc::Receiver<Question>,
        mut changes: mpsc::Receiver<watch::Change>,
        mut neighbours: mpsc::Receiver<Option<NeighbourChange>>,
    ) {
        let mut sweep = interval(IN_USE);
        loop {
            tokio::select! {
                // Changes first: an answer must not be older than a change that was told before.
                biased;
                Some(_) = changes.recv() => self.generation.bump(),
                Some(change) = neighbours.recv() => self.note(change),
                _ = sweep.tick() => self.forget(IN_USE).await,
                question = asked.recv() => match question {
                    Some(question) => self.answer(question).await,
                    None => return self.forget(Duration::ZERO).await,
                },
            }
        }
    }

    async fn answer(&mut self, question: Question) {
        let Question {
            key,
            generation,
            reply,
        } = question;
        if reply.is_closed() || generation != self.generation.current() {
            return;
        }
        let answer = match self.resolve(&key).await {
            Ok(answer) => answer,
            Err(error) => {
                tracing::debug!(%error, destination = %key.destination, "a next hop cannot be found out");
                Err(Reason::SlowNextHop)
            }
        };
        // Where the worker's queue is full, it asks again.
        let _ = reply.try_send(Reply {
            key,
            generation,
            answer,
        });
    }

    async fn resolve(&mut self, key: &Key) -> Result<Answer, NetlinkError> {
        let packet = Packet {
            source: key.source,
            destination: key.destination,
            tos: key.tos,
            origin: match key.device {
                Some(device) => PacketOrigin::Received(device),
                None => PacketOrigin::Sent(self.mark),
            },
        };
        let (device, neighbour, mtu) = match self.netlink.route_packet(&packet).await? {
            Routed::Out {
                device,
                neighbour,
                mtu,
            } => (device, neighbour, mtu),
            Routed::Local => return Ok(Err(Reason::SlowLocal)),
            // The kernel drops it, or answers: nothing is dropped here.
            Routed::Nowhere => return Ok(Err(Reason::SlowNextHop)),
        };
        if self.tables.tunnel_of_device(device).is_some() {
            return Ok(Err(match key.device {
                Some(_) => Reason::SlowTunnel,
                None => Reason::RecursiveRoute,
            }));
        }
        let Some(egress) = self.netlink.egress(device).await? else {
            return Ok(Err(Reason::SlowPolicy));
        };
        let found = self.netlink.neighbour(device, neighbour).await?;
        let kept = found.is_some_and(|found| found.permanent || found.managed);
        if !kept {
            self.netlink.use_neighbour(device, neighbour, true).await?;
        }
        let mac = found.and_then(|found| found.mac);
        self.remember(device, neighbour, mac, !kept);
        Ok(mac.ok_or(Reason::SlowNextHop).map(|destination| NextHop {
            ifindex: egress.device,
            source: egress.mac,
            destination,
            vlan: egress.vlan,
            mtu: mtu.unwrap_or(egress.mtu).min(egress.mtu),
        }))
    }

    fn remember(&mut self, link: u32, address: IpAddr, mac: Option<[u8; 6]>, told: bool) {
        let known = self.in_use.get(&(link, address));
        if self.in_use.len() < MOST_NEIGHBOURS || known.is_some() {
            let used = InUse {
                mac,
                asked: Instant::now(),
                ours: told || known.is_some_and(|known| known.ours),
            };
            self.in_use.insert((link, address), used);
        } else {
            // Too many to watch: then nobody's answers are kept for long.
            self.generation.bump();
        }
    }

    /// Leaves neighbours that nobody has asked for in so long to the kernel.
    async fn forget(&mut self, unused: Duration) {
        let old = self
            .in_use
            .extract_if(|_, used| used.asked.elapsed() >= unused);
        for ((link, address), used) in old.collect::<Vec<_>>() {
            // The link may be gone, and an operator may have entered the neighbour for good since.
            if used.ours
                && let Ok(Some(found)) = self.netlink.neighbour(link, address).await
                && found.managed
                && !found.permanent
            {
                let _ = self.netlink.use_neighbour(link, address, false).await;
            }
        }
    }

    /// A neighbour changed. Most changes are of state only and concern nobody.
    fn note(&mut self, change: Option<NeighbourChange>) {
        let Some(change) = change else {
            return self.generation.bump();
        };
        let key = (change.link, change.address);
        let Some(used) = self.in_use.get_mut(&key) else {
            return;
        };
        if used.mac != change.mac {
            used.mac = change.mac;
            if used.asked.elapsed() < IN_USE {
                self.generation.bump();
            }
        }
    }
}
