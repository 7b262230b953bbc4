//! The engine as the daemon knows it: commands, events and counters in front of tables, devices, routes and threads.

mod lodge;
mod place;

pub use lodge::Lodge;

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    sync::{Arc, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use ipsec_common::{
    Reason,
    maps::{SA_SLOTS, VlanKey},
};
use tokio::{
    sync::{Mutex, Notify, mpsc},
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};

use super::{
    events::Events,
    fast::{Carrier, FastPaths},
    gateway::Shared,
    inbound::InboundPipeline,
    outbound::OutboundPipeline,
    path_mtu::{MTU_WITHOUT_SA, PathMtus},
    program::{Program, ProgramError},
    resolver::Resolver,
    slow::{SlowPath, Threads, devices::Device, monotonic_seconds, sockets::Sockets},
    table::{Tables, Tunnel},
    words::WordsArray,
};
use crate::{
    dataplane::{
        device,
        pace::Pace,
        routing::{Place, Routing},
        seam::{
            Before, Command, Direction, EngineConfig, Event, InterfaceStatus, Ledger,
            OffloadReason, Outer, Rejected, SaFacts, SaId, SaSpec, SaStats, Survey, TunnelFacts,
            TunnelId, TunnelSpec,
        },
    },
    net::{
        netfilter,
        netlink::{Link, Netlink, NetlinkError},
        tun::Tun,
        watch,
    },
};

/// Events that wait for the daemon at most.
const EVENT_QUEUE: usize = 8192;
/// How often ageing and doubts about path MTUs are looked at.
const TICK: Duration = Duration::from_secs(1);

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub struct StartError {
    /// What was being done.
    pub step: &'static str,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// A running engine.
pub struct Engine {
    inner: Arc<Inner>,
    threads: Threads,
    keeper: JoinHandle<()>,
}

/// Names the step that has failed.
fn at(step: &'static str) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError { step, source }
}

/// Something that the fast path needs. Without it the slow path does all of the work.
fn for_fast_path<T>(made: Result<T, ProgramError>) -> Option<T> {
    made.inspect_err(|error| tracing::warn!(%error, "there will be no fast path; `ipsec-ctl probe` tells what is missing"))
        .ok()
}

/// Where SAs count: in an array of the program's, which outlives the process, if there is a program.
fn words(program: Option<&Program>) -> io::Result<Arc<WordsArray>> {
    match program {
        Some(program) => WordsArray::of_bpf_array(program.words()?, SA_SLOTS),
        None => WordsArray::anonymous(SA_SLOTS),
    }
}

/// The slow path, with the sockets of IKE and ESP.
fn slow_path(
    config: &EngineConfig,
    shared: &Shared,
    events: &Events,
) -> Result<Arc<SlowPath>, StartError> {
    let sockets = Sockets::open(config.ike_port, config.nat_port, config.mark)
        .map_err(at("open the sockets of IKE and ESP"))?;
    let slow = SlowPath::new(
        sockets,
        shared.outbound.clone(),
        shared.inbound.clone(),
        Arc::new(PathMtus::default()),
        Arc::clone(&shared.tables),
        events.clone(),
    );
    slow.map(Arc::new).map_err(at("prepare the slow path"))
}

struct Inner {
    config: EngineConfig,
    tables: Arc<Tables>,
    slow: Arc<SlowPath>,
    /// Never locked while a table is changed by others than the holder of `control`.
    fast: std::sync::Mutex<FastPaths>,
    events: Events,
    netlink: Netlink,
    control: Mutex<Control>,
    /// Links as of the last change, by index.
    links: RwLock<HashMap<u32, Link>>,
    /// Asks the keeper to bring routes in order.
    dirty: Notify,
}

/// What commands change, one at a time.
struct Control {
    tunnels: HashMap<TunnelId, Configured>,
    routing: Routing,
}

struct Configured {
    spec: TunnelSpec,
    tun: Arc<Tun>,
    tunnel: Arc<Tunnel>,
    place: Place,
}

impl Engine {
    /// Opens sockets in the network namespace that the caller is in, and starts the threads. Events come out of the
    /// receiver.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub async fn start(config: EngineConfig) -> Result<(Self, mpsc::Receiver<Event>), StartError> {
        let (events, receiver) = Events::channel(EVENT_QUEUE);
        let program = for_fast_path(Program::load(&config.instance));
        let words = words(program.as_ref()).map_err(at("map memory for SAs"))?;
        let tables = Arc::new(Tables::new(words));
        let shared = Shared {
            tables: Arc::clone(&tables),
            outbound: OutboundPipeline::new(events.clone()),
            inbound: InboundPipeline::new(Arc::clone(&tables), events.clone()),
        };
        let slow = slow_path(&config, &shared, &events)?;
        let resolver = Resolver::start(Arc::clone(&tables), config.mark)
            .map_err(at("open a netlink socket"))?;
        let carrier = program.and_then(|program| {
            let exit = Arc::clone(&slow);
            for_fast_path(Carrier::new(program, &config, shared, resolver, exit))
        });
        let netlink = Netlink::open().map_err(at("open a netlink socket"))?;
        let changes = watch::start().map_err(at("watch links and routes"))?;
        let inner = Arc::new(Inner {
            control: Mutex::new(Control {
                tunnels: HashMap::new(),
                routing: Routing::new(
                    netlink.clone(),
                    config.mark,
                    [config.ike_port, config.nat_port],
                ),
            }),
            config,
            tables,
            slow,
            fast: std::sync::Mutex::new(FastPaths::new(carrier)),
            events,
            netlink,
            links: RwLock::default(),
            dirty: Notify::new(),
        });
        if let Err(error) = inner.read_links().await {
            return Err(StartError {
                step: "list links",
                source: io::Error::other(error),
            });
        }
        let threads = inner.slow.start().map_err(at("start threads"))?;
        inner.refresh_fast_paths().await;
        let keeper = tokio::spawn(keep(Arc::clone(&inner), changes));
        let engine = Self {
            inner,
            threads,
            keeper,
        };
        Ok((engine, receiver))
    }

    /// Does what the daemon asks.
    ///
    /// # Errors
    ///
    /// [`Rejected`], with nothing changed.
    pub async fn command(&self, command: Command) -> Result<Option<Ledger>, Rejected> {
        let inner = &self.inner;
        match command {
            Command::SetTunnel(spec) => inner.set_tunnel(*spec, Place::InUse).await.map(|()| None),
            Command::Configured => {
                inner.tables.forget_what_is_left();
                let mut control = inner.control.lock().await;
                control.routing.complete();
                // At once: nothing may arrive past a tunnel that is there. The keeper sees to leftovers.
                control.routing.guard();
                inner.dirty.notify_one();
                Ok(None)
            }
            Command::RemoveTunnel(id) => inner.remove_tunnel(id).await.map(|()| None),
            Command::Install(spec) => inner.install(&spec, Tables::install).await.map(Some),
            Command::Resume(spec, before) => inner.resume(&spec, before).await.map(Some),
            Command::Remove(id) => {
                let tunnel = inner.tables.outbound_by_id(id).map(|sa| sa.core.tunnel);
                inner.fast().remove(id);
                inner.tables.remove(id);
                if let Some(tunnel) = tunnel.and_then(|tunnel| inner.tables.tunnel(tunnel)) {
                    inner.fit_mtu(&tunnel).await;
                }
                Ok(None)
            }
            Command::MoveOuter(id, outer) => inner.move_outer(id, outer).await.map(|()| None),
            Command::SendIke(datagram) => {
                // Before the answer can come.
                inner.fast().know_ike(&datagram.bytes);
                inner
                    .slow
                    .sockets
                    .send_ike(&datagram)
                    .map(|()| None)
                    .map_err(|error| Rejected::by_kernel("send an IKE message", &error))
            }
            Command::SetCarrier(id, on) => {
                let device = inner.slow.devices.get(id).ok_or(Rejected::UnknownTunnel)?;
                device
                    .tun
                    .set_carrier(on)
                    .map(|()| None)
                    .map_err(|error| Rejected::by_kernel("set the carrier", &error))
            }
        }
    }

    /// Counters of all SAs, in the order of their ids.
    pub fn sa_stats(&self) -> Vec<SaStats> {
        self.inner.tables.stats()
    }

    /// Packets by reason.
    pub fn counters(&self) -> Vec<(Reason, u64)> {
        Reason::ALL
            .iter()
            .map(|&reason| {
                let slow = self.inner.slow.counters.get(reason);
                let guard = if reason == Reason::Cleartext {
                    // A table that somebody has removed takes its count along.
                    netfilter::guard::dropped()
                        .ok()
                        .flatten()
                        .unwrap_or_default()
                } else {
                    0
                };
                (reason, slow + guard + self.inner.fast().count(reason))
            })
            .collect()
    }

    /// What is done on which interface.
    pub fn interfaces(&self) -> Vec<InterfaceStatus> {
        if let Some(interfaces) = self.inner.fast().interfaces() {
            return interfaces;
        }
        let wanted = self.inner.config.interfaces.as_ref();
        let links = self
            .inner
            .links
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let mut interfaces: Vec<_> = links
            .values()
            .filter(|link| !link.loopback && link.kind.as_deref() != Some("tun"))
            .filter(|link| wanted.is_none_or(|names| names.contains(&link.name)))
            .map(|link| InterfaceStatus {
                name: link.name.clone(),
                xdp: None,
                zero_copy: false,
                queues: 0,
                reason: Some(OffloadReason::NoXdp),
            })
            .collect();
        interfaces.sort_by(|one, other| one.name.cmp(&other.name));
        interfaces
    }

    /// All SAs, and the tunnels whose devices are in use.
    pub async fn survey(&self) -> Survey {
        let mut tunnels: Vec<TunnelFacts> = {
            let control = self.inner.control.lock().await;
            let configured = control.tunnels.values();
            let in_use = configured.filter(|one| one.place == Place::InUse);
            let facts = in_use.map(|one| TunnelFacts {
                id: one.spec.id,
                mtu: Some(one.tunnel.mtu()),
                policies: None,
            });
            facts.collect()
        };
        tunnels.sort_by_key(|tunnel| tunnel.id);
        let fast = self.inner.fast();
        Survey {
            tunnels,
            sas: self
                .inner
                .tables
                .cores()
                .iter()
                .map(|core| SaFacts {
                    id: core.id,
                    tunnel: core.tunnel,
                    child: core.child,
                    direction: core.direction,
                    spi: core.spi,
                    ledger: fast.ledger(core.id),
                })
                .collect(),
        }
    }

    /// Stops the threads. Devices, routes and rules stay, so that nothing protected leaves in the clear.
    pub async fn stop(self) {
        self.keeper.abort();
        let threads = self.threads;
        // They look up ten times a second.
        let _ = tokio::task::spawn_blocking(move || threads.stop()).await;
    }
}

impl Inner {
    async fn set_tunnel(&self, spec: TunnelSpec, place: Place) -> Result<(), Rejected> {
        let mut control = self.control.lock().await;
        let old = control.tunnels.get(&spec.id);
        // A daemon that comes back tells all of them.
        if old.is_some_and(|old| old.spec == spec && old.place == place) {
            return Ok(());
        }
        let tun = tun(old, &spec, place)?;
        let ifindex = self.bring_up(&spec).await?;
        let mtu = spec.mtu.unwrap_or(MTU_WITHOUT_SA);
        let tunnel = self.tables.set_tunnel(&spec, ifindex, mtu);
        let device = Device {
            tunnel: Arc::clone(&tunnel),
            tun: Arc::clone(&tun),
        };
        self.slow
            .devices
            .insert(device)
            .map_err(|error| Rejected::by_kernel("watch the TUN device", &error))?;
        if place == Place::InUse {
            control
                .routing
                .set(spec.id.0, &spec.device, Some(ifindex), &spec.routing);
            // At once: the first packet may come before the keeper does.
            control.routing.protect(spec.id.0).await?;
        }
        // Whatever it was before, the device gets the MTU that is computed for it.
        self.set_device_mtu(&tunnel, self.slow.path_mtus.device_mtu(&tunnel))
            .await;
        self.enter_fast_path(&spec, &tunnel);
        let id = spec.id;
        let configured = Configured {
            spec,
            tun,
            tunnel,
            place,
        };
        control.tunnels.insert(id, configured);
        self.dirty.notify_one();
        Ok(())
    }

    /// Sets the device of a tunnel up, with its addresses; tells its index.
    async fn bring_up(&self, spec: &TunnelSpec) -> Result<u32, Rejected> {
        let link = self
            .netlink
            .link(&spec.device)
            .await?
            .ok_or_else(|| Rejected::by_kernel("look the TUN device up", &"it is gone"))?;
        device::bring_up(&self.netlink, link.index, spec).await?;
        Ok(link.index)
    }

    fn enter_fast_path(&self, spec: &TunnelSpec, tunnel: &Arc<Tunnel>) {
        let changed = {
            let mut fast = self.fast();
            for peer in &spec.routing.peers {
                fast.know_peer(*peer);
            }
            fast.set_tunnel(tunnel, spec.fast_path)
        };
        self.report(changed);
    }

    async fn remove_tunnel(&self, id: TunnelId) -> Result<(), Rejected> {
        let mut control = self.control.lock().await;
        let configured = control.tunnels.remove(&id).ok_or(Rejected::UnknownTunnel)?;
        self.fast().remove_tunnel(id);
        self.tables.remove_tunnel(id);
        self.slow.devices.remove(id);
        if configured.place == Place::InUse {
            control.routing.remove(id.0);
        }
        self.dirty.notify_one();
        configured
            .tun
            .remove()
            .map_err(|error| Rejected::by_kernel("remove the TUN device", &error))
    }

    async fn move_outer(&self, id: SaId, outer: Outer) -> Result<(), Rejected> {
        self.tables.move_outer(id, outer)?;
        if let Some(sa) = self.tables.inbound_by_id(id) {
            self.fast().install(id, sa.core.tunnel, Some(sa));
        }
        if let Some(sa) = self.tables.outbound_by_id(id) {
            self.ask_path(&outer).await;
            if let Some(tunnel) = self.tables.tunnel(sa.core.tunnel) {
                self.fit_mtu(&tunnel).await;
            }
        }
        Ok(())
    }

    async fn resume(&self, spec: &SaSpec, before: Before) -> Result<Ledger, Rejected> {
        if !self.tables.goes_on(spec) {
            let resume =
                |tables: &Tables, spec: &SaSpec| tables.resume(spec, before, monotonic_seconds());
            return self.install(spec, resume).await;
        }
        self.move_outer(spec.id, spec.outer).await?;
        self.fast().ledger(spec.id).ok_or(Rejected::UnknownSa)
    }

    async fn install(
        &self,
        spec: &SaSpec,
        into: impl FnOnce(&Tables, &SaSpec) -> Result<(), Rejected>,
    ) -> Result<Ledger, Rejected> {
        if spec.direction == Direction::Outbound {
            self.ask_path(&spec.outer).await;
        }
        into(&self.tables, spec)?;
        if spec.direction == Direction::Outbound
            && let Some(tunnel) = self.tables.tunnel(spec.tunnel)
        {
            self.fit_mtu(&tunnel).await;
            self.slow.release(spec.tunnel);
        }
        let inbound = self.tables.inbound_by_id(spec.id);
        let mut fast = self.fast();
        fast.know_peer(spec.outer.remote);
        Ok(fast.install(spec.id, spec.tunnel, inbound))
    }

    fn fast(&self) -> MutexGuard<'_, FastPaths> {
        self.fast.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the fast path follow interfaces, addresses and firewalls.
    async fn refresh_fast_paths(&self) {
        let addresses = self.netlink.addresses().await.unwrap_or_default();
        let addresses: Vec<IpAddr> = addresses.iter().map(|(_, net)| net.addr()).collect();
        let links: Vec<Link> = {
            let links = self.links.read().unwrap_or_else(PoisonError::into_inner);
            links.values().cloned().collect()
        };
        let mut vlans = Vec::new();
        for link in links
            .iter()
            .filter(|link| link.kind.as_deref() == Some("vlan"))
        {
            if let Ok(Some(below)) = self.netlink.egress(link.index).await
                && let Some(outer) = below.vlan
            {
                let key = VlanKey {
                    link: below.device,
                    outer,
                    inner: 0,
                };
                vlans.push((key, link.index));
            }
        }
        let foreign_netfilter = netfilter::foreign_chains().unwrap_or_else(|error| {
            tracing::warn!(%error, "firewall rules cannot be listed: they are taken to exist");
            true
        });
        let changed = {
            let mut fast = self.fast();
            fast.set_host(&addresses, &vlans);
            fast.refresh(&links, foreign_netfilter)
        };
        self.report(changed);
    }

    fn report(&self, changed: Vec<Ledger>) {
        for ledger in changed {
            self.events.send(Event::LedgerChanged(ledger));
        }
    }

    /// Asks the kernel what the way to a peer takes, and whether it leads into a tunnel of ours.
    async fn ask_path(&self, outer: &Outer) {
        let way = self
            .netlink
            .way(outer.remote, Some(outer.local), Some(self.config.mark))
            .await;
        let Ok(Some(way)) = way else {
            return;
        };
        let link_mtu = {
            let links = self.links.read().unwrap_or_else(PoisonError::into_inner);
            links.get(&way.device).map(|link| link.mtu)
        };
        if let Some(mtu) = way.mtu.into_iter().chain(link_mtu).min() {
            let mtu = u16::try_from(mtu).unwrap_or(u16::MAX);
            self.slow.path_mtus.set_route(outer.remote, mtu);
        }
    }

    /// Gives the device of a tunnel the MTU that its SAs and their paths leave.
    async fn fit_mtu(&self, tunnel: &Tunnel) {
        let mtu = self.slow.path_mtus.device_mtu(tunnel);
        tunnel.set_whole(self.slow.path_mtus.whole_mtu(tunnel));
        if mtu != tunnel.mtu() {
            self.set_device_mtu(tunnel, mtu).await;
            self.events.send(Event::MtuChanged {
                tunnel: tunnel.id,
                mtu,
            });
        }
    }

    async fn set_device_mtu(&self, tunnel: &Tunnel, mtu: u16) {
        tunnel.set_mtu(mtu);
        if let Err(error) = self.netlink.set_mtu(tunnel.ifindex, mtu.into()).await {
            tracing::warn!(%error, mtu, "the MTU of a tunnel's device cannot be set");
        }
        self.fast().enter_tunnel(tunnel.id);
    }

    async fn read_links(&self) -> Result<(), NetlinkError> {
        let links = self.netlink.links().await?;
        *self.links.write().unwrap_or_else(PoisonError::into_inner) =
            links.into_iter().map(|link| (link.index, link)).collect();
        Ok(())
    }

    /// Brings devices, routes and path MTUs to what they should be.
    async fn repair(&self) {
        let mut control = self.control.lock().await;
        if let Err(error) = self.read_links().await {
            tracing::warn!(%error, "links cannot be listed");
            return;
        }
        for configured in control.tunnels.values() {
            let index = configured.tunnel.ifindex;
            let down = {
                let links = self.links.read().unwrap_or_else(PoisonError::into_inner);
                links.get(&index).is_some_and(|link| !link.up)
            };
            if down {
                // Its routes went with it: they are added again below.
                tracing::info!(tunnel = configured.spec.name, "the device was down");
                if let Err(error) = self.netlink.set_up(index).await {
                    tracing::warn!(%error, "the device of a tunnel cannot be set up");
                }
            }
        }
        if let Err(error) = control.routing.apply().await {
            tracing::warn!(%error, "routes are incomplete");
        }
        self.fast().set_wary(&control.routing.wary());
        let unreachable = control.routing.unreachable().to_vec();
        let tunnels: Vec<_> = control
            .tunnels
            .values()
            .map(|configured| {
                (
                    Arc::clone(&configured.tunnel),
                    configured.spec.routing.peers.clone(),
                )
            })
            .collect();
        drop(control);
        for (tunnel, peers) in &tunnels {
            let recursive = peers
                .iter()
                .copied()
                .find(|peer| unreachable.contains(peer));
            if tunnel.set_recursive(recursive.is_some())
                && let Some(remote) = recursive
            {
                self.events.send(Event::RecursiveRoute {
                    tunnel: tunnel.id,
                    remote,
                });
            }
        }
        let tunnels: Vec<_> = tunnels.into_iter().map(|(tunnel, _)| tunnel).collect();
        self.refresh_fast_paths().await;
        self.fit_all(&tunnels, |_| true).await;
    }

    /// Asks anew about the chosen peers of tunnels, about each once, and fits the MTUs.
    async fn fit_all(&self, tunnels: &[Arc<Tunnel>], choose: impl Fn(IpAddr) -> bool) {
        let mut outers = HashMap::new();
        for tunnel in tunnels {
            for child in &tunnel.settings.load().children {
                for sa in child.outbound.load().iter() {
                    let outer = sa.template.outer;
                    outers.insert((outer.local, outer.remote), outer);
                }
            }
        }
        for outer in outers.values().filter(|outer| choose(outer.remote)) {
            self.ask_path(outer).await;
        }
        for tunnel in tunnels {
            self.fit_mtu(tunnel).await;
        }
    }

    async fn tick(&self) {
        self.slow.expire_waiting();
        // A firewall that is loaded anew takes our table away with all others.
        self.control.lock().await.routing.keep_guard();
        // Neither firewalls nor changed numbers of queues are notified by all kernels.
        self.refresh_fast_paths().await;
        let aged = self.slow.path_mtus.age(monotonic_seconds());
        let doubted = self.slow.path_mtus.take_doubted();
        if aged || !doubted.is_empty() {
            self.fit_all(&self.tables.tunnels(), |remote| doubted.contains(&remote))
                .await;
        }
    }
}

/// The device of a tunnel: the same as before, unless it has another name now.
fn tun(old: Option<&Configured>, spec: &TunnelSpec, place: Place) -> Result<Arc<Tun>, Rejected> {
    if let Some(old) = old {
        if old.spec.device == spec.device {
            return Ok(Arc::clone(&old.tun));
        }
        let _ = old.tun.remove();
    }
    let opened = match place {
        Place::InUse => Tun::open(&spec.device),
        Place::Aside => Tun::open_fleeting(&spec.device),
    };
    let failed = |error| Rejected::by_kernel("open the TUN device", &error);
    opened.map(Arc::new).map_err(failed)
}

/// Follows the kernel's notifications until the engine stops.
async fn keep(inner: Arc<Inner>, mut changes: mpsc::Receiver<watch::Change>) {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut pace = Pace::new();
    loop {
        tokio::select! {
            change = changes.recv() => {
                if change.is_none() {
                    tracing::error!("the kernel's notifications have ended: routes are not watched any more");
                    return;
                }
            }
            () = inner.dirty.notified() => {}
            _ = ticks.tick() => {
                inner.tick().await;
                continue;
            }
        }
        pace.turn().await;
        while changes.try_recv().is_ok() {}
        pace.look(inner.repair()).await;
    }
}
