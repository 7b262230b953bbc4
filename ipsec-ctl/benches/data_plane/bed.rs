//! The test bed: one gateway between two veth pairs, and a worker that is measured.
//!
//!     lan1 ==== lan0 [gateway] wan0 ==== wan1

use std::{
    ops::Range,
    os::fd::AsFd,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use anyhow::{Context, ensure};
use ipsec_common::Spi;
use ipsec_ctl::{
    dataplane::{
        seam::Direction,
        xdp::{
            af_xdp::{
                forward::{FRAMES_PER_SOCKET, Forwarder, Handler, Verdict},
                socket::{QueueId, open_all},
                umem::Umem,
                worker::{Worker, WorkerConfig},
            },
            counters::Counters,
            events::Events,
            gateway::{Gateway, Port, Shared, SlowExit},
            inbound::InboundPipeline,
            next_hop::NextHops,
            outbound::{OutboundPipeline, Sealed},
            program::{Program, release},
            resolver::Resolver,
            slow::monotonic_seconds,
            table::{Tables, Tunnel},
            words::WordsArray,
        },
    },
    esp::EspSuite,
    net::{sysctl, tun::Tun},
};

use crate::{
    MEASURE, WARM_UP,
    load::Load,
    packets::{LOCAL, Sealer, outwards, sa, tunnel},
};

/// The processor of the worker.
const PROCESSOR: usize = 1;
const MTU: u16 = 1420;
/// Packets sealed beforehand for each second of an inbound measurement.
const SEALED_PER_SECOND: f64 = 700_000.0;

/// What a worker is measured at.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Job {
    /// Forwarding as it is.
    Plain,
    /// Sealing.
    Outbound(EspSuite),
    /// Opening.
    Inbound(EspSuite),
}

impl Job {
    pub(crate) fn direction(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Outbound(_) => "outbound",
            Self::Inbound(_) => "inbound",
        }
    }
}

/// Interfaces, the device of the tunnel, and the name of the program's pins.
pub(crate) struct Bed {
    instance: String,
    lan: QueueId,
    wan: QueueId,
    beyond: QueueId,
    device: u32,
    /// Routes into it lead nowhere without it.
    _tun: Tun,
}

impl Bed {
    pub(crate) fn new() -> anyhow::Result<Self> {
        for (pair, number) in [("lan", 1), ("wan", 2)] {
            ip(&format!(
                "link add {pair}0 address 02:00:00:00:0{number}:00 type veth peer name {pair}1 address 02:00:00:00:0{number}:01"
            ))?;
            ip(&format!("link set {pair}0 up"))?;
            ip(&format!("link set {pair}1 up"))?;
        }
        ip("address add 10.1.0.1/24 dev lan0")?;
        ip("address add 192.0.2.1/24 dev wan0")?;
        let tun = Tun::open("tun0")?;
        ip(&format!("link set tun0 mtu {MTU} up"))?;
        ip("route add 10.2.0.0/16 dev tun0")?;
        // Addresses of nobody: the stack at the far ends drops what it gets at once.
        ip("neighbour add 10.1.0.9 lladdr 02:00:00:00:01:09 dev lan0 nud permanent")?;
        ip("neighbour add 192.0.2.2 lladdr 02:00:00:00:02:09 dev wan0 nud permanent")?;
        sysctl::set(&["net", "ipv4", "ip_forward"], "1")?;
        let queue = |name: &str| -> anyhow::Result<QueueId> {
            let ifindex = nix::net::if_::if_nametoindex(name)?;
            Ok(QueueId { ifindex, queue: 0 })
        };
        Ok(Self {
            instance: format!("bench-{}", std::process::id()),
            lan: queue("lan0")?,
            wan: queue("wan0")?,
            beyond: queue("wan1")?,
            device: nix::net::if_::if_nametoindex("tun0")?,
            _tun: tun,
        })
    }

    /// Packets a second that the worker gets done.
    pub(crate) async fn measure(&mut self, job: Job, size: usize) -> anyhow::Result<f64> {
        let mut program = Program::load(&self.instance)?;
        let (tables, shared) = self.tables(&program, job)?;
        program.set_settings(4500, 0)?;
        program.set_tunnel(self.device, MTU.into(), true)?;
        if let Job::Inbound(_) = job {
            let words = tables.inbound(Spi(0x0102_0304), LOCAL.into());
            let slot = words.context("the SA is installed")?.core.words.slot();
            program.set_inbound(Spi(0x0102_0304), LOCAL.into(), slot, true)?;
        }
        for at in [self.lan, self.wan] {
            ensure!(program.attach(at.ifindex).is_ok(), "XDP does not attach");
        }
        let umem = Umem::new(2 * FRAMES_PER_SOCKET)?;
        let (sockets, _) = open_all(&umem, &[self.lan, self.wan])?;
        for socket in &sockets {
            program.enter_socket(socket.at(), 1, socket.as_fd())?;
        }
        for (at, number) in [(self.lan, 1), (self.wan, 2)] {
            program.activate(at.ifindex, [2, 0, 0, 0, number, 0])?;
        }
        let config = WorkerConfig {
            name: "worker".into(),
            cpu: Some(PROCESSOR),
            busy_poll: false,
        };
        let forwarder = Forwarder::new(umem, sockets);
        let forwarded = Arc::new(AtomicU64::new(0));
        let worker = match job {
            Job::Plain => Worker::spawn(&config, forwarder, Plain(Arc::clone(&forwarded)))?,
            Job::Outbound(_) | Job::Inbound(_) => {
                Worker::spawn(&config, forwarder, self.gateway(shared)?)?
            }
        };
        let load = self.load(program, job, size)?;
        let done = || match job {
            Job::Plain => forwarded.load(Ordering::Relaxed),
            Job::Outbound(_) | Job::Inbound(_) => {
                tables.stats().first().map_or(0, |sa| sa.fast.packets)
            }
        };
        tokio::time::sleep(WARM_UP).await;
        let (before, start) = (done(), Instant::now());
        tokio::time::sleep(MEASURE).await;
        let (after, elapsed) = (done(), start.elapsed());
        drop(load);
        drop(worker);
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let packets = (after - before) as f64;
        Ok(packets / elapsed.as_secs_f64())
    }

    fn tables(&self, program: &Program, job: Job) -> anyhow::Result<(Arc<Tables>, Shared)> {
        let words = WordsArray::of_bpf_array(program.words()?, ipsec_common::maps::SA_SLOTS)?;
        let tables = Arc::new(Tables::new(words));
        tables.set_tunnel(&tunnel(false), self.device, MTU);
        match job {
            Job::Plain => {}
            Job::Outbound(suite) => tables.install(&sa(suite, Direction::Outbound, false))?,
            Job::Inbound(suite) => tables.install(&sa(suite, Direction::Inbound, false))?,
        }
        let (events, _) = Events::channel(16);
        let shared = Shared {
            tables: Arc::clone(&tables),
            outbound: OutboundPipeline::new(events.clone()),
            inbound: InboundPipeline::new(Arc::clone(&tables), events),
        };
        Ok((tables, shared))
    }

    fn gateway(&self, shared: Shared) -> anyhow::Result<Gateway<Nowhere>> {
        let resolver = Resolver::start(Arc::clone(&shared.tables), 0)?;
        let ports = [self.lan, self.wan]
            .iter()
            .map(|at| Port {
                ifindex: at.ifindex,
                partial_checksums: true,
            })
            .collect();
        let next_hops = NextHops::new(resolver.questions.clone(), resolver.generation.clone());
        Ok(Gateway::new(
            shared,
            ports,
            next_hops,
            Nowhere,
            Arc::new(Counters::default()),
            monotonic_seconds,
        ))
    }

    fn load(&self, program: Program, job: Job, size: usize) -> anyhow::Result<Load> {
        match job {
            Job::Plain | Job::Outbound(_) => {
                let frame = [ethernet(1), outwards(size)?].concat();
                Ok(Load::flood(program, self.lan.ifindex, frame))
            }
            Job::Inbound(suite) => {
                let mut sealer = Sealer::new(suite)?;
                let seconds = (WARM_UP + MEASURE).as_secs_f64() + 0.5;
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "some millions"
                )]
                let count = (SEALED_PER_SECOND * seconds) as usize;
                let frames = (0..count)
                    .map(|_| Ok([ethernet(2), sealer.next(size)?].concat()))
                    .collect::<anyhow::Result<_>>()?;
                Load::send_each(self.beyond, frames)
            }
        }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = release(&self.instance);
        for name in ["lan0", "wan0", "tun0"] {
            let _ = ip(&format!("link delete {name}"));
        }
    }
}

/// An Ethernet header to the gateway's end of a pair.
fn ethernet(pair: u8) -> Vec<u8> {
    [
        [2, 0, 0, 0, pair, 0],
        [2, 0, 0, 0, pair, 1],
        [8, 0, 0, 0, 0, 0],
    ]
    .concat()[..14]
        .to_vec()
}

fn ip(arguments: &str) -> anyhow::Result<()> {
    let status = Command::new("ip").args(arguments.split(' ')).status()?;
    ensure!(status.success(), "ip {arguments}");
    Ok(())
}

/// Sends everything out of the second socket.
struct Plain(Arc<AtomicU64>);

impl Handler for Plain {
    fn begin(&mut self) {}

    fn handle(&mut self, _: usize, _: &mut [u8], packet: Range<usize>) -> Verdict {
        self.0.fetch_add(1, Ordering::Relaxed);
        Verdict::Send(1, packet)
    }

    fn send_failed(&mut self) {}
}

/// The few packets before the next hop is known end here.
#[derive(Clone)]
struct Nowhere;

impl SlowExit for Nowhere {
    fn deliver(&self, _: &Tunnel, _: &[u8]) {}

    fn send(&self, _: &[u8], _: &Sealed) {}

    fn too_long(&self, _: &Tunnel, _: &mut [u8], _: Range<usize>, _: u64) {}
}
