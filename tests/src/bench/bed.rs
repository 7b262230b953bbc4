//! The bed of one worker: a gateway between two veth pairs, all in one network namespace.
//!
//!     lan1 ==== lan0 [gateway] wan0 ==== wan1
//!
//! Generators send out of lan1 and wan1. The worker, its program, tables and next hops are the product's; what is
//! measured beside it, forwarding without cryptography, is another verdict of the same loop on the same sockets.

use std::{
    ops::Range,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use ipsec_common::maps::{Settings, TunnelEntry};
use ipsec_ctl::{
    dataplane::{
        seam::Direction,
        xdp::{
            af_xdp::{
                forward::{FRAMES_PER_SOCKET, Forwarder, Handler, Verdict},
                socket::{CopyMode, QueueId, open_all},
                umem::Umem,
                worker::{Worker, WorkerConfig},
            },
            counters::Counters,
            events::Events,
            gateway::{Gateway, Port, Shared, SlowExit},
            inbound::InboundPipeline,
            next_hop::NextHops,
            outbound::{OutboundPipeline, Sealed},
            program::{AttachMode, Program, release},
            resolver::Resolver,
            slow::monotonic_seconds,
            table::{Tables, Tunnel},
            words::WordsArray,
        },
    },
    esp::EspSuite,
    net::{sysctl, tun::Tun},
};

use super::{
    cores::{CpuClock, WORK},
    generator::Generator,
    packets::{LOCAL, MTU, remote_network, sa, sa_id, spi, tunnel},
    slice::Slice,
};
use crate::command::line;

/// Packets that the generator is ahead of the worker: never so many that a ring overflows, enough that it never waits.
const AHEAD: u64 = 1200;
/// Frames of one test run.
const AT_ONCE: u32 = 128;
/// Packets before each measurement.
const WARM_UP: u64 = 2048;
/// Longest that a slice may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Times that a slice is tried.
const ATTEMPTS: u32 = 3;

/// The gateway with its worker.
pub(super) struct Bed {
    instance: String,
    program: Program,
    tables: Arc<Tables>,
    meter: Arc<Meter>,
    suites: Vec<EspSuite>,
    lan_far: u32,
    wan_far: u32,
    mode: CopyMode,
    attached: AttachMode,
    _worker: Worker,
    _resolver: Resolver,
    /// Routes into them lead nowhere without them.
    _tuns: Vec<Tun>,
}

/// What the worker tells, and is told.
#[derive(Debug, Default)]
struct Meter {
    /// Packets that came to it.
    handled: AtomicU64,
    /// Packets that did not leave.
    failed: AtomicU64,
    /// Its thread's id.
    thread: AtomicI32,
    /// Forwards as it is, without cryptography.
    plain: AtomicBool,
}

impl Bed {
    /// A tunnel with one SA each way for every suite, numbered from 0. The thread is in a namespace of its own, and in
    /// a runtime.
    ///
    /// # Errors
    ///
    /// Not root, or the kernel lacks something.
    pub(super) fn new(suites: Vec<EspSuite>) -> anyhow::Result<Self> {
        interfaces()?;
        let tuns = devices(suites.len())?;
        let instance = format!("bench-{}", std::process::id());
        let mut program = Program::load(&instance)?;
        let words = WordsArray::of_bpf_array(program.words()?, ipsec_common::maps::SA_SLOTS)?;
        let tables = Arc::new(Tables::new(words));
        program.set_settings(Settings {
            nat_port: 4500,
            ..Settings::default()
        })?;
        let (lan, wan) = (queue("lan0")?, queue("wan0")?);
        let mut attached = AttachMode::Native;
        for at in [lan, wan] {
            if let Ok(AttachMode::Generic) = program
                .attach(at.ifindex)
                .map_err(|reason| anyhow::anyhow!("XDP does not attach: {reason:?}"))
            {
                attached = AttachMode::Generic;
            }
        }
        let umem = Umem::new(2 * FRAMES_PER_SOCKET)?;
        let (sockets, mode) = open_all(&umem, &[lan, wan])?;
        for socket in &sockets {
            program.enter_socket(socket.at(), 1, socket.as_fd())?;
        }
        for (at, number) in [(lan, 1), (wan, 2)] {
            program.activate(at.ifindex, [2, 0, 0, 0, number, 0])?;
        }
        let resolver = Resolver::start(Arc::clone(&tables), 0)?;
        let meter = Arc::new(Meter::default());
        let config = WorkerConfig {
            name: "worker".into(),
            cpu: Some(WORK),
            busy_poll: false,
        };
        let handler = Metered {
            gateway: gateway(&tables, &resolver, &[lan, wan]),
            meter: Arc::clone(&meter),
            plain: false,
        };
        let worker = Worker::spawn(&config, Forwarder::new(umem, sockets), handler)?;
        let mut bed = Self {
            instance,
            program,
            tables,
            meter,
            suites,
            lan_far: queue("lan1")?.ifindex,
            wan_far: queue("wan1")?.ifindex,
            mode,
            attached,
            _worker: worker,
            _resolver: resolver,
            _tuns: tuns,
        };
        for number in bed.numbers() {
            let device = nix::net::if_::if_nametoindex(format!("tun{number}").as_str())?;
            bed.tables.set_tunnel(&tunnel(number, false), device, MTU);
            let entry = TunnelEntry {
                mtu: MTU.into(),
                offloaded: 1,
                wary: 0,
            };
            bed.program.set_tunnel(device, entry)?;
        }
        bed.renew(Direction::Outbound)?;
        bed.renew(Direction::Inbound)?;
        Ok(bed)
    }

    /// Numbers of the tunnels.
    pub(super) fn numbers(&self) -> Range<u16> {
        0..u16::try_from(self.suites.len()).unwrap_or(u16::MAX)
    }

    /// How XDP sits on the interfaces and how packets reach the worker.
    pub(super) fn mode(&self) -> String {
        let copies = match self.mode {
            CopyMode::ZeroCopy => "zero-copy",
            CopyMode::Copy => "copy mode",
        };
        format!("veth, {} XDP, AF_XDP in {copies}", self.attached.name())
    }

    /// A generator of inner packets for the tunnels.
    ///
    /// # Errors
    ///
    /// The kernel refuses its program.
    pub(super) fn lan_load(
        &self,
        packets: impl Iterator<Item = Vec<u8>>,
    ) -> anyhow::Result<Generator> {
        let frames: Vec<_> = packets.map(|packet| framed(1, &packet)).collect();
        Generator::new(self.lan_far, &frames)
    }

    /// A generator of outer packets from the peers.
    ///
    /// # Errors
    ///
    /// As for [`Self::lan_load`].
    pub(super) fn wan_load(
        &self,
        packets: impl Iterator<Item = Vec<u8>>,
    ) -> anyhow::Result<Generator> {
        let frames: Vec<_> = packets.map(|packet| framed(2, &packet)).collect();
        Generator::new(self.wan_far, &frames)
    }

    /// Forwards `packets` packets as they are.
    ///
    /// # Errors
    ///
    /// They did not all leave.
    pub(super) fn plain(&mut self, load: &mut Generator, packets: u64) -> anyhow::Result<Slice> {
        self.meter.plain.store(true, Ordering::Release);
        let slice = again(|| self.drive(load, packets));
        self.meter.plain.store(false, Ordering::Release);
        slice.context("forwarding")
    }

    /// Seals or opens `packets` packets. Each measurement has new SAs, so that what was sealed once is new again.
    ///
    /// # Errors
    ///
    /// They did not all get through.
    pub(super) fn tunnelled(
        &mut self,
        direction: Direction,
        load: &mut Generator,
        packets: u64,
    ) -> anyhow::Result<Slice> {
        let slice = again(|| {
            self.renew(direction)?;
            self.drive(load, packets)
        })
        .context(direction_name(direction))?;
        let carried: u64 = self
            .tables
            .stats()
            .iter()
            .filter(|stats| (stats.sa.0 % 2 == 1) == (direction == Direction::Inbound))
            .map(|stats| stats.fast.packets)
            .sum();
        ensure!(
            carried >= packets + WARM_UP,
            "{}: of {} packets only {carried} were carried",
            direction_name(direction),
            packets + WARM_UP
        );
        Ok(slice)
    }

    /// Puts new SAs in the place of those of one direction.
    fn renew(&mut self, direction: Direction) -> anyhow::Result<()> {
        for (number, suite) in self.numbers().zip(self.suites.clone()) {
            self.tables.remove(sa_id(number, direction));
            self.tables.install(&sa(number, suite, direction, false))?;
            if direction == Direction::Inbound {
                let sa = self.tables.inbound(spi(number), LOCAL.into());
                let slot = sa.context("an SA just installed")?.core.words.slot();
                self.program
                    .set_inbound(spi(number), LOCAL.into(), slot, true)?;
            }
        }
        Ok(())
    }

    fn drive(&mut self, load: &mut Generator, packets: u64) -> anyhow::Result<Slice> {
        load.start()?;
        let slice = self.measure(load, packets);
        load.stop()?;
        slice
    }

    /// Keeps the worker busy, and measures it over `packets` packets.
    fn measure(&mut self, load: &mut Generator, packets: u64) -> anyhow::Result<Slice> {
        let meter = Arc::clone(&self.meter);
        let (base, failed) = (
            meter.handled.load(Ordering::Acquire),
            meter.failed.load(Ordering::Acquire),
        );
        let (all, mut sent) = (WARM_UP + packets, 0);
        let end = Instant::now() + PATIENCE;
        let mut until = |goal: u64| -> anyhow::Result<u64> {
            loop {
                let done = meter.handled.load(Ordering::Acquire) - base;
                if done >= goal {
                    return Ok(done);
                }
                if sent < all && sent - done.min(sent) < AHEAD {
                    let count = u64::from(AT_ONCE).min(all - sent);
                    load.send(u32::try_from(count)?)?;
                    sent += count;
                } else if Instant::now() > end {
                    bail!("of {sent} packets {done} reached the worker");
                } else {
                    std::hint::spin_loop();
                }
            }
        };
        let first = until(WARM_UP)?;
        let clock = CpuClock::of_thread(meter.thread.load(Ordering::Acquire));
        let (wall, cpu) = (Instant::now(), clock.now()?);
        let last = until(all)?;
        let slice = Slice {
            packets: last - first,
            wall: wall.elapsed(),
            cpu: clock.now()? - cpu,
        };
        let lost = meter.failed.load(Ordering::Acquire) - failed;
        ensure!(lost == 0, "{lost} packets found no room in a ring");
        Ok(slice)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = release(&self.instance);
    }
}

/// Measures once more where the bed itself has lost packets: the links hold 256, and whoever takes them out shares the
/// generator's processor with the rest of the machine. What the worker loses it loses each time.
fn again(mut slice: impl FnMut() -> anyhow::Result<Slice>) -> anyhow::Result<Slice> {
    for _ in 1..ATTEMPTS {
        if let Ok(slice) = slice() {
            return Ok(slice);
        }
    }
    slice()
}

/// A direction in words.
pub(super) fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Outbound => "outbound",
        Direction::Inbound => "inbound",
    }
}

fn interfaces() -> anyhow::Result<()> {
    for (pair, number) in [("lan", 1), ("wan", 2)] {
        line(&format!(
            "ip link add {pair}0 address 02:00:00:00:0{number}:00 type veth peer name {pair}1 address 02:00:00:00:0{number}:01"
        ))?;
        line(&format!("ip link set {pair}0 up"))?;
        line(&format!("ip link set {pair}1 up"))?;
    }
    line("ip address add 10.1.0.1/24 dev lan0")?;
    line("ip address add 192.0.2.1/24 dev wan0")?;
    // Addresses of nobody: the stack at the far ends drops what it gets at once.
    line("ip neighbour add 10.1.0.9 lladdr 02:00:00:00:01:09 dev lan0 nud permanent")?;
    line("ip neighbour add 192.0.2.2 lladdr 02:00:00:00:02:09 dev wan0 nud permanent")?;
    sysctl::set(&["net", "ipv4", "ip_forward"], "1")?;
    Ok(())
}

/// A TUN device with its route for every tunnel.
fn devices(count: usize) -> anyhow::Result<Vec<Tun>> {
    let mut tuns = Vec::with_capacity(count);
    let mut batch = String::new();
    for number in 0..u16::try_from(count)? {
        tuns.push(Tun::open(&format!("tun{number}"))?);
        batch += &format!("link set tun{number} mtu {MTU} up\n");
        batch += &format!("route add {} dev tun{number}\n", remote_network(number));
    }
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), batch)?;
    line(&format!("ip -batch {}", file.path().display()))?;
    Ok(tuns)
}

fn gateway(tables: &Arc<Tables>, resolver: &Resolver, ports: &[QueueId]) -> Gateway<Nowhere> {
    let (events, _) = Events::channel(16);
    let shared = Shared {
        tables: Arc::clone(tables),
        outbound: OutboundPipeline::new(events.clone()),
        inbound: InboundPipeline::new(Arc::clone(tables), events),
    };
    let ports = ports
        .iter()
        .map(|at| Port {
            ifindex: at.ifindex,
            partial_checksums: true,
        })
        .collect();
    Gateway::new(
        shared,
        ports,
        NextHops::new(resolver.questions.clone(), resolver.generation.clone()),
        Nowhere,
        Arc::new(Counters::default()),
        monotonic_seconds,
    )
}

fn queue(name: &str) -> anyhow::Result<QueueId> {
    let ifindex = nix::net::if_::if_nametoindex(name)?;
    Ok(QueueId { ifindex, queue: 0 })
}

/// An IPv4 packet behind an Ethernet header to the gateway's end of a pair.
fn framed(pair: u8, packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, pair, 0, 2, 0, 0, 0, pair, 1, 8, 0];
    frame.extend(packet);
    frame
}

/// Counts what comes to a gateway, or forwards it past the gateway.
struct Metered {
    gateway: Gateway<Nowhere>,
    meter: Arc<Meter>,
    plain: bool,
}

impl Handler for Metered {
    fn begin(&mut self) {
        self.plain = self.meter.plain.load(Ordering::Acquire);
        if self.meter.thread.load(Ordering::Relaxed) == 0 {
            let id = nix::unistd::gettid().as_raw();
            self.meter.thread.store(id, Ordering::Release);
        }
        if !self.plain {
            self.gateway.begin();
        }
    }

    fn announce(&mut self, frame: &[u8], packet: &Range<usize>) {
        if !self.plain {
            self.gateway.announce(frame, packet);
        }
    }

    fn prepare(&mut self, frame: &[u8], packet: &Range<usize>) {
        if !self.plain {
            self.gateway.prepare(frame, packet);
        }
    }

    fn handle(&mut self, socket: usize, frame: &mut [u8], packet: Range<usize>) -> Verdict {
        // Nobody else writes it, so it need not be an atomic addition, which would cost what is to be measured.
        let handled = self.meter.handled.load(Ordering::Relaxed) + 1;
        let verdict = if self.plain {
            Verdict::Send(1 - socket, packet)
        } else {
            self.gateway.handle(socket, frame, packet)
        };
        self.meter.handled.store(handled, Ordering::Release);
        verdict
    }

    fn send_failed(&mut self) {
        self.meter.failed.fetch_add(1, Ordering::Relaxed);
        self.gateway.send_failed();
    }
}

/// The few packets before the next hop is known end here.
#[derive(Clone)]
struct Nowhere;

impl SlowExit for Nowhere {
    fn deliver(&self, _: &Tunnel, _: &[u8]) {}

    fn send(&self, _: &[u8], _: &Sealed) {}

    fn too_long(&self, _: &Tunnel, _: &mut [u8], _: Range<usize>, _: u64) {}
}
