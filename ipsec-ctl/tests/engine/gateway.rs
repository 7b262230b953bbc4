//! An engine in a namespace, in a thread of its own, and what is installed in it by hand.

use std::{net::IpAddr, sync::mpsc, thread, time::Duration};

use ipsec_common::{Reason, Spi, TrafficSelector};
use ipsec_ctl::{
    dataplane::{
        routing::{RoutesMode, RoutingSpec},
        seam::{
            ChildId, ChildTrap, Command, Df, Direction, EngineChoice, EngineConfig, Event,
            FastPath, Lifetime, Mode, NicOffload, Outer, SaId, SaSpec, SelectorPair, TunnelId,
            TunnelSpec, UdpEncap,
        },
        xdp::engine::Engine,
    },
    esp::{EspKeys, EspSuite, Integrity},
};
use nix::sched::{CloneFlags, setns};
use tokio::sync::mpsc::Receiver;

use crate::net::{Net, eventually};

/// Work for the thread of a gateway, which stays in its namespace.
pub(crate) type Job =
    Box<dyn FnOnce(&tokio::runtime::Runtime, &Engine, &mut Receiver<Event>) + Send>;

/// An engine in a thread of its own.
pub(crate) struct Gateway {
    jobs: mpsc::Sender<Job>,
}

impl Gateway {
    pub(crate) fn start(net: &Net, which: &str) -> Self {
        let handle = net.handle(which);
        let instance = net.name(which);
        let (jobs, queue) = mpsc::channel::<Job>();
        thread::spawn(move || {
            setns(handle, CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let config = EngineConfig {
                program: String::new(),
                instance,
                mark: 0x1e5,
                ike_port: 500,
                nat_port: 4500,
                interfaces: None,
                workers: None,
                busy_poll: false,
            };
            let (engine, mut events) = runtime.block_on(Engine::start(config)).unwrap();
            loop {
                // The runtime drives the engine's own tasks while there is no job.
                match queue.try_recv() {
                    Ok(job) => job(&runtime, &engine, &mut events),
                    Err(mpsc::TryRecvError::Empty) => {
                        runtime
                            .block_on(async { tokio::time::sleep(Duration::from_millis(5)).await });
                    }
                    Err(mpsc::TryRecvError::Disconnected) => break,
                }
            }
            runtime.block_on(engine.stop());
        });
        let gateway = Self { jobs };
        gateway.run(|_, _, _| ()); // its sockets are open now
        gateway
    }

    pub(crate) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&tokio::runtime::Runtime, &Engine, &mut Receiver<Event>) -> T + Send + 'static,
    ) -> T {
        let (answer, answered) = mpsc::channel();
        let job: Job = Box::new(move |runtime, engine, events| {
            answer.send(work(runtime, engine, events)).unwrap();
        });
        self.jobs.send(job).unwrap();
        answered.recv().unwrap()
    }

    pub(crate) fn command(&self, command: Command) {
        self.run(move |runtime, engine, _| runtime.block_on(engine.command(command)).unwrap());
    }

    pub(crate) fn count(&self, reason: Reason) -> u64 {
        self.run(move |_, engine, _| {
            let counters = engine.counters();
            counters
                .into_iter()
                .find(|(name, _)| *name == reason)
                .unwrap()
                .1
        })
    }

    /// What was dropped, for the message of a failure.
    pub(crate) fn dropped(&self) -> Vec<(Reason, u64)> {
        self.run(|_, engine, _| {
            let counters = engine.counters().into_iter();
            counters.filter(|(_, count)| *count > 0).collect()
        })
    }

    /// The first event that fits, within five seconds.
    pub(crate) fn event<T: Send + 'static>(
        &self,
        pick: impl Fn(Event) -> Option<T> + Send + 'static,
    ) -> Option<T> {
        self.run(move |runtime, _, events| {
            runtime.block_on(async {
                let wait = async {
                    loop {
                        if let Some(found) = pick(events.recv().await?) {
                            return Some(found);
                        }
                    }
                };
                tokio::time::timeout(Duration::from_secs(30), wait)
                    .await
                    .ok()?
            })
        })
    }
}

pub(crate) fn networks(number: u8) -> Vec<TrafficSelector> {
    let range = |first: String, last: String| TrafficSelector {
        protocol: 0,
        ports: (0, u16::MAX),
        addresses: (first.parse().unwrap(), last.parse().unwrap()),
    };
    vec![
        range(format!("10.{number}.0.0"), format!("10.{number}.0.255")),
        range(
            format!("2001:db8:{number}::"),
            format!("2001:db8:{number}::ffff:ffff:ffff:ffff"),
        ),
    ]
}

pub(crate) fn tunnel(local: u8, remote: u8) -> TunnelSpec {
    let prefixes = |number: u8| {
        vec![
            format!("10.{number}.0.0/24").parse().unwrap(),
            format!("2001:db8:{number}::/64").parse().unwrap(),
        ]
    };
    TunnelSpec {
        id: TunnelId(1),
        name: "office".into(),
        device: "office".into(),
        mtu: None,
        engine: EngineChoice::Xdp,
        fast_path: FastPath::Off,
        offload: NicOffload::Off,
        mode: Mode::Tunnel,
        policy_based: false,
        df: Df::Copy,
        clamp_mss: true,
        copy_dscp: true,
        children: vec![ChildTrap {
            id: ChildId(0),
            name: "net".into(),
            selectors: SelectorPair {
                local: networks(local),
                remote: networks(remote),
            },
            on_demand: true,
        }],
        routing: RoutingSpec {
            mode: RoutesMode::Selectors,
            remote: prefixes(remote),
            local: prefixes(local),
            peers: vec![outer_address(remote, false)],
            anywhere: false,
            outer_local: Some(outer_address(local, false)),
            addresses: vec![],
            bypass: vec![],
        },
    }
}

pub(crate) fn outer_address(host: u8, v6: bool) -> IpAddr {
    if v6 {
        format!("2001:db8:ff::{host}").parse().unwrap()
    } else {
        format!("192.0.2.{host}").parse().unwrap()
    }
}

/// An SA of one gateway. SPI and keys follow from the sending side's number.
pub(crate) fn sa_spec(
    direction: Direction,
    local: u8,
    remote: u8,
    v6: bool,
    encap: bool,
) -> SaSpec {
    let (id, sender) = match direction {
        Direction::Inbound => (SaId(1), remote),
        Direction::Outbound => (SaId(2), local),
    };
    SaSpec {
        id,
        tunnel: TunnelId(1),
        child: ChildId(0),
        direction,
        spi: Spi(0x1000 + u32::from(sender)),
        suite: EspSuite::AesCbc {
            key_bytes: 32,
            integrity: Integrity::HmacSha512,
        },
        keys: EspKeys {
            cipher: vec![sender; 32].into(),
            integrity: vec![sender; 64].into(),
        },
        esn: true,
        replay_window: 4096,
        outer: Outer {
            local: outer_address(local, v6),
            remote: outer_address(remote, v6),
            encap: encap.then_some(UdpEncap {
                local_port: 4500,
                remote_port: 4500,
            }),
        },
        selectors: SelectorPair {
            local: networks(local),
            remote: networks(remote),
        },
        lifetime: Lifetime {
            soft_packets: u64::MAX,
            hard_packets: u64::MAX,
            soft_bytes: u64::MAX,
            hard_bytes: u64::MAX,
            expires: None,
        },
    }
}

/// Installs both SAs of one gateway.
pub(crate) fn install(gateway: &Gateway, local: u8, remote: u8, v6: bool, encap: bool) {
    for direction in [Direction::Inbound, Direction::Outbound] {
        let spec = sa_spec(direction, local, remote, v6, encap);
        gateway.command(Command::Install(Box::new(spec)));
    }
    gateway.command(Command::SetCarrier(TunnelId(1), true));
}

/// Two gateways with their tunnel up.
pub(crate) fn gateways(net: &Net, v6: bool, encap: bool) -> (Gateway, Gateway) {
    let (a, b) = (Gateway::start(net, "ga"), Gateway::start(net, "gb"));
    a.command(Command::SetTunnel(Box::new(tunnel(1, 2))));
    b.command(Command::SetTunnel(Box::new(tunnel(2, 1))));
    install(&a, 1, 2, v6, encap);
    install(&b, 2, 1, v6, encap);
    eventually("routes appear", || {
        net.leads_into_tunnel("ga", "10.2.0.2") && net.leads_into_tunnel("gb", "10.1.0.2")
    });
    (a, b)
}
