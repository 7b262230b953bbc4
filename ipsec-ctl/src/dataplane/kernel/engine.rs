//! The engine as its neighbours know it: commands, events and counters in front of states, policies and interfaces.

mod card;
mod repair;
mod resume;
mod tunnel;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use ipsec_common::Spi;
use tokio::{
    sync::{Mutex, Notify},
    task::JoinHandle,
    time::sleep,
};

use self::tunnel::Tunnel;
use super::{
    algorithms::{algorithms, key_lengths},
    capabilities::{Capabilities, Incapable},
    encap::Sockets,
    policies::Receiving,
    transport,
};
use crate::{
    dataplane::{
        seam::{
            ChildId, Command, Direction, Event, Flow, KernelReason, Ledger, LifetimeKind, Mode,
            Offload, Outer, PathCounters, Rejected, SaFacts, SaId, SaSpec, SaStats, SelectorPair,
            Survey, TunnelFacts, TunnelId, TunnelSpec,
        },
        xdp::{engine::Lodge, slow::monotonic_seconds},
    },
    esp::{EspKeys, EspSuite, EspTransform},
    net::{
        netfilter,
        netlink::{Netlink, NetlinkError},
        watch,
        xfrm::{
            self, Encap, Limits, Notice, Policy, PortMask, Replay, State, StateId, StateStatus,
            Watch, Xfrm,
        },
    },
};

/// Numbers of our interfaces, states and policies, by which we know them again.
const FIRST_IF_ID: u32 = 0x4958_0000;
const LAST_IF_ID: u32 = 0x4958_fffe;
/// The number of the interface that a probe creates.
pub(super) const PROBE_IF_ID: u32 = 0x4958_ffff;
/// What policies name states by. Others begin at 1.
const FIRST_REQID: u32 = 0x4958_0000;
const LAST_REQID: u32 = 0x4fff_ffff;
/// The number of what belongs to no interface: tunnels in transport mode.
const NO_IF_ID: u32 = 0;
/// After a change the kernel often reports more of them: they are seen to together.
const SETTLE: Duration = Duration::from_millis(50);

/// Whether a number is one of ours.
fn is_ours(if_id: u32) -> bool {
    (FIRST_IF_ID..=LAST_IF_ID).contains(&if_id)
}

/// Whether a state is one of ours. Those without an interface are known by what policies name them by.
fn is_our_state(state: &StateStatus) -> bool {
    let reqids = FIRST_REQID..=LAST_REQID;
    is_ours(state.if_id) || (state.if_id == NO_IF_ID && reqids.contains(&state.reqid))
}

fn is_our_policy(policy: &Policy) -> bool {
    is_ours(policy.if_id) || transport::is_ours(policy)
}

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The kernel lacks something.
    #[error(transparent)]
    Incapable(#[from] Incapable),
    /// A socket could not be opened.
    #[error("watch the kernel's IPsec: {0}")]
    Watch(#[source] io::Error),
}

/// A running engine.
pub struct Engine {
    inner: Arc<Inner>,
    keeper: JoinHandle<()>,
}

struct Inner {
    /// When it was started, in seconds of CLOCK_MONOTONIC.
    since: u64,
    xfrm: Xfrm,
    netlink: Netlink,
    lodge: Lodge,
    capabilities: Capabilities,
    state: Mutex<Everything>,
    /// Asks the keeper to compare what is there with what should be.
    dirty: Notify,
}

/// What commands change, one at a time.
#[derive(Default)]
struct Everything {
    /// Devices whose TCP is clamped, with their MTU, as the kernel was told last.
    clamped: BTreeMap<String, u16>,
    tunnels: BTreeMap<TunnelId, Tunnel>,
    sas: BTreeMap<SaId, Sa>,
    sockets: Sockets,
    next_reqid: u32,
    /// Numbers that interfaces had before we came.
    taken: Option<BTreeSet<u32>>,
    /// Whether all tunnels are known, so that what none of them has is a leftover.
    complete: bool,
}

impl Everything {
    /// A number that no state has had yet.
    fn new_reqid(&mut self) -> u32 {
        self.next_reqid += 1;
        FIRST_REQID + self.next_reqid
    }
}

/// An installed SA. Its keys are the kernel's alone.
#[derive(Debug)]
struct Sa {
    tunnel: TunnelId,
    child: ChildId,
    direction: Direction,
    spi: Spi,
    suite: EspSuite,
    outer: Outer,
    /// In an order that does not depend on the peer's.
    selectors: SelectorPair,
    /// What policies name its state by. SAs of one child have the same if they have the same selectors: what came in one of
    /// them is not taken for what another was negotiated for.
    reqid: u32,
    state: StateId,
    ledger: Ledger,
    /// Index of the interface whose card does all of its ESP, policies included.
    card: Option<u32>,
    /// Longest inner packet in bytes that the path takes in one piece.
    inner_mtu: Option<u16>,
}

impl Sa {
    /// Our address and port and the peer's, if ESP comes in UDP.
    fn pair(&self) -> Option<(SocketAddr, SocketAddr)> {
        let encap = self.outer.encap?;
        (self.direction == Direction::Inbound).then_some((
            SocketAddr::new(self.outer.local, encap.local_port),
            SocketAddr::new(self.outer.remote, encap.remote_port),
        ))
    }
}

impl Engine {
    /// Starts beside the engine that has sockets and routes, if the kernel can do what is needed.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub async fn start(lodge: Lodge) -> Result<Self, StartError> {
        let xfrm = Xfrm::open().map_err(|error| Incapable::Xfrm(error.to_string()))?;
        let netlink = Netlink::open().map_err(StartError::Watch)?;
        let capabilities = Capabilities::ask(&xfrm, &netlink).await?;
        let notices = Watch::start().map_err(StartError::Watch)?;
        let changes = watch::start().map_err(StartError::Watch)?;
        let inner = Arc::new(Inner {
            since: monotonic_seconds(),
            xfrm,
            netlink,
            lodge,
            capabilities,
            state: Mutex::default(),
            dirty: Notify::new(),
        });
        let keeper = tokio::spawn(keep(Arc::clone(&inner), notices, changes));
        Ok(Self { inner, keeper })
    }

    /// Whether the tunnel is this engine's.
    pub async fn has_tunnel(&self, id: TunnelId) -> bool {
        self.inner.state.lock().await.tunnels.contains_key(&id)
    }

    /// Whether the SA is this engine's.
    pub async fn has_sa(&self, id: SaId) -> bool {
        self.inner.state.lock().await.sas.contains_key(&id)
    }

    /// Creates a tunnel, or changes what differs from before; SAs stay.
    ///
    /// # Errors
    ///
    /// [`Rejected`].
    pub async fn set_tunnel(&self, spec: TunnelSpec, reason: KernelReason) -> Result<(), Rejected> {
        let mut everything = self.inner.state.lock().await;
        self.inner.set_tunnel(&mut everything, spec, reason).await
    }

    /// Does what the daemon asks of tunnels and SAs that are this engine's.
    ///
    /// # Errors
    ///
    /// [`Rejected`], with nothing changed.
    pub async fn command(&self, command: Command) -> Result<Option<Ledger>, Rejected> {
        let inner = &self.inner;
        let mut everything = inner.state.lock().await;
        match command {
            Command::SetTunnel(spec) => inner
                .set_tunnel(&mut everything, *spec, KernelReason::Configured)
                .await
                .map(|()| None),
            Command::Configured => {
                everything.complete = true;
                inner.dirty.notify_one();
                Ok(None)
            }
            Command::RemoveTunnel(id) => inner
                .remove_tunnel(&mut everything, id)
                .await
                .map(|()| None),
            Command::Install(spec) => inner.install(&mut everything, &spec).await.map(Some),
            Command::Resume(spec, before) => {
                inner.resume(&mut everything, &spec, before).await.map(Some)
            }
            Command::Remove(id) => inner.remove(&mut everything, id).map(|()| None),
            Command::MoveOuter(id, outer) => {
                inner.move_outer(&mut everything, id, outer).map(|()| None)
            }
            // IKE is the other engine's.
            Command::SendIke(_) => Ok(None),
            Command::SetCarrier(id, on) => {
                inner.set_carrier(&everything, id, on).await.map(|()| None)
            }
        }
    }

    /// Counters of all SAs, in the order of their ids.
    pub async fn sa_stats(&self) -> Vec<SaStats> {
        let everything = self.inner.state.lock().await;
        if everything.sas.is_empty() {
            return Vec::new();
        }
        let states = self.inner.xfrm.states().unwrap_or_default();
        let states: HashMap<StateId, _> = states.iter().map(|state| (state.id, state)).collect();
        let stats = everything.sas.iter().map(|(id, sa)| {
            let state = states.get(&sa.state);
            SaStats {
                sa: *id,
                fast: PathCounters::default(),
                slow: state.map_or(PathCounters::default(), |state| PathCounters {
                    packets: state.packets,
                    bytes: state.bytes,
                }),
                sequence: state.map_or(0, |state| match sa.direction {
                    Direction::Inbound => state.received,
                    Direction::Outbound => state.sent,
                }),
                replayed: state.map_or(0, |state| {
                    u64::from(state.replayed) + u64::from(state.too_old)
                }),
                forged: state.map_or(0, |state| state.forged.into()),
            }
        });
        stats.collect()
    }

    /// All tunnels and SAs.
    pub async fn survey(&self) -> Survey {
        let everything = self.inner.state.lock().await;
        Survey {
            tunnels: everything
                .tunnels
                .iter()
                .map(|(id, tunnel)| TunnelFacts {
                    id: *id,
                    device: tunnel.spec.device.clone(),
                    mtu: tunnel.mtu,
                })
                .collect(),
            sas: everything
                .sas
                .iter()
                .map(|(id, sa)| SaFacts {
                    id: *id,
                    tunnel: sa.tunnel,
                    child: sa.child,
                    direction: sa.direction,
                    spi: sa.spi,
                    ledger: Some(sa.ledger.clone()),
                })
                .collect(),
        }
    }

    /// Stops watching. States, policies, interfaces and routes stay, so that nothing protected leaves in the clear.
    pub fn stop(self) {
        self.keeper.abort();
    }
}

impl Inner {
    async fn install(&self, all: &mut Everything, spec: &SaSpec) -> Result<Ledger, Rejected> {
        if all.sas.contains_key(&spec.id) {
            return Err(Rejected::Exists);
        }
        let selectors = in_order(&spec.selectors);
        let reqid = reqid(all, spec, &selectors);
        let tunnel = all.tunnels.get(&spec.tunnel);
        let tunnel = tunnel
            .filter(|tunnel| tunnel.has_child(spec.child))
            .ok_or(Rejected::UnknownTunnel)?;
        if tunnel.spec.mode == Mode::Transport && spec.outer.encap.is_some() {
            return Err(Rejected::by_kernel(
                "install an SA in transport mode",
                &"it does not go in UDP",
            ));
        }
        if let Some((_, reason)) = self
            .capabilities
            .lacking
            .iter()
            .find(|(suite, _)| *suite == spec.suite)
        {
            return Err(Rejected::by_kernel("use these algorithms", reason));
        }
        let mut state = state(spec, tunnel, reqid, self.lodge.mark(), &spec.keys)?;
        let wanted = tunnel.spec.offload;
        let mut sa = Sa {
            tunnel: spec.tunnel,
            child: spec.child,
            direction: spec.direction,
            spi: spec.spi,
            suite: spec.suite,
            outer: spec.outer,
            selectors,
            reqid,
            state: state.id(),
            ledger: Ledger {
                sa: spec.id,
                offload: Offload::Kernel(tunnel.reason),
                nic: None,
            },
            card: None,
            inner_mtu: None,
        };
        sa.inner_mtu = self.inner_mtu(&sa, spec).await;
        if let Some(pair) = sa.pair() {
            all.sockets
                .take(pair, &self.lodge)
                .map_err(|error| Rejected::by_kernel("open a socket for ESP in UDP", &error))?;
        }
        let (pair, direction) = (sa.pair(), sa.direction);
        let added = self.add_state(&mut state, direction, wanted, &spec.outer);
        match added.await {
            Ok(nic) => sa.ledger.nic = nic,
            Err(error) => {
                if let Some(pair) = pair {
                    all.sockets.leave(pair);
                }
                return Err(match error.errno {
                    Some(libc::EEXIST) => Rejected::Exists,
                    _ => error.into(),
                });
            }
        }
        let card = state.card.filter(|card| card.packet);
        sa.card = card.map(|card| card.device);
        if direction == Direction::Inbound {
            self.lodge.pass(spec.spi, spec.outer.local);
            self.lodge.know_peer(spec.outer.remote);
        }
        all.sas.insert(spec.id, sa);
        if direction == Direction::Outbound
            && let Some(tunnel) = all.tunnels.get_mut(&spec.tunnel)
        {
            tunnel.sends(spec.child, spec.id);
        }
        // The policies move the traffic, in one step.
        let applied = match self.apply(all, spec.tunnel) {
            Err(rejected) if card.is_some() => self
                .take_from_card(all, spec.id, &mut state, rejected.to_string())
                .and_then(|()| self.apply(all, spec.tunnel)),
            other => other,
        };
        if let Err(rejected) = applied {
            if let Some(tunnel) = all.tunnels.get_mut(&spec.tunnel) {
                tunnel.sends_no_more(spec.id);
            }
            self.forget(all, spec.id);
            let _ = self.apply(all, spec.tunnel);
            return Err(rejected);
        }
        if direction == Direction::Outbound {
            self.fit_mtu(all, spec.tunnel).await;
        }
        let sa = all.sas.get(&spec.id).ok_or(Rejected::UnknownSa)?;
        Ok(sa.ledger.clone())
    }

    /// Removes an SA that may be gone already.
    fn remove(&self, all: &mut Everything, id: SaId) -> Result<(), Rejected> {
        let Some(tunnel) = all.sas.get(&id).map(|sa| sa.tunnel) else {
            return Ok(());
        };
        // First from the policies, so that no packet meets one whose SA is gone.
        if let Some(tunnel) = all.tunnels.get_mut(&tunnel) {
            tunnel.sends_no_more(id);
        }
        let state = self.forget_but_keep_the_state(all, id);
        let applied = self.apply(all, tunnel);
        if let Some(state) = state {
            self.xfrm.remove_state(&state)?;
        }
        applied
    }

    fn forget(&self, all: &mut Everything, id: SaId) {
        if let Some(state) = self.forget_but_keep_the_state(all, id)
            && let Err(error) = self.xfrm.remove_state(&state)
        {
            tracing::warn!(%error, "an IPsec state stays behind");
        }
    }

    fn forget_but_keep_the_state(&self, all: &mut Everything, id: SaId) -> Option<StateId> {
        let sa = all.sas.remove(&id)?;
        if let Some(pair) = sa.pair() {
            all.sockets.leave(pair);
        }
        if sa.direction == Direction::Inbound {
            self.lodge.pass_no_more(sa.spi, sa.outer.local);
        }
        Some(sa.state)
    }

    fn move_outer(&self, all: &mut Everything, id: SaId, outer: Outer) -> Result<(), Rejected> {
        let sa = all.sas.get(&id).ok_or(Rejected::UnknownSa)?;
        if sa.outer == outer {
            return Ok(());
        }
        if sa.outer.local != outer.local
            || sa.outer.encap.is_some() != outer.encap.is_some()
            || (sa.direction == Direction::Outbound && sa.outer.remote != outer.remote)
        {
            // The kernel cannot move a state between addresses, and a second one must not have its keys: with AES-GCM
            // a repeated number is a repeated nonce. A new SA takes the new addresses.
            self.lodge.send(Event::Lifetime {
                sa: id,
                kind: LifetimeKind::Soft,
            });
            return Ok(());
        }
        let old_pair = sa.pair();
        let tunnel = sa.tunnel;
        let Some(sa) = all.sas.get_mut(&id) else {
            return Err(Rejected::UnknownSa);
        };
        sa.outer = outer;
        if let Some(pair) = sa.pair() {
            all.sockets
                .take(pair, &self.lodge)
                .map_err(|error| Rejected::by_kernel("open a socket for ESP in UDP", &error))?;
        }
        if let Some(pair) = old_pair {
            all.sockets.leave(pair);
        }
        self.move_ports(all, id)?;
        self.apply(all, tunnel)
    }

    /// Tells the kernel the new ports of a state.
    fn move_ports(&self, all: &Everything, id: SaId) -> Result<(), Rejected> {
        let sa = all.sas.get(&id).ok_or(Rejected::UnknownSa)?;
        let tunnel = all.tunnels.get(&sa.tunnel);
        let tunnel = tunnel.ok_or(Rejected::UnknownTunnel)?;
        // The state keeps its own keys; these only have the right lengths.
        let (cipher, integrity) = key_lengths(sa.suite);
        let keys = EspKeys {
            cipher: vec![0; cipher].into(),
            integrity: vec![0; integrity].into(),
        };
        let mut moved = State {
            source: sa.state.destination,
            destination: sa.state.destination,
            spi: sa.spi.0,
            mode: mode(tunnel.spec.mode),
            reqid: sa.reqid,
            if_id: tunnel.if_id,
            algorithms: algorithms(sa.suite, &keys).ok_or(Rejected::BadKeys)?,
            replay: Replay::default(),
            encap: encap(sa.direction, &sa.outer),
            output_mark: None,
            limits: Limits::NONE,
            copy_dscp: tunnel.spec.copy_dscp,
            clear_df: false,
            card: None,
        };
        match sa.direction {
            Direction::Inbound => moved.source = sa.outer.remote,
            Direction::Outbound => {
                moved.source = sa.outer.local;
                moved.output_mark = Some(self.lodge.mark());
            }
        }
        self.xfrm.update_state(&moved).map_err(Rejected::from)
    }

    /// How long an inner packet may be, as far as is known now.
    async fn inner_mtu(&self, sa: &Sa, spec: &SaSpec) -> Option<u16> {
        const UDP_HEADER: usize = 8;
        if sa.direction != Direction::Outbound {
            return None;
        }
        let path = self
            .netlink
            .path_mtu(sa.outer.remote, sa.outer.local, self.lodge.mark())
            .await
            .ok()
            .flatten()?;
        let ip_header = if sa.outer.remote.is_ipv6() { 40 } else { 20 };
        let udp = sa.outer.encap.map_or(0, |_| UDP_HEADER);
        let esp = usize::try_from(path)
            .ok()?
            .min(usize::from(u16::MAX))
            .checked_sub(ip_header + udp)?;
        let transform = EspTransform::new(spec.suite, &spec.keys, spec.esn).ok()?;
        u16::try_from(transform.max_payload(esp)).ok()
    }

    async fn notice(&self, notice: Notice) {
        let mut everything = self.state.lock().await;
        let all = &mut *everything;
        let sa_of = |all: &Everything, id: &StateId| {
            let found = all.sas.iter().find(|(_, sa)| sa.state == *id);
            found.map(|(id, _)| *id)
        };
        match notice {
            Notice::Acquire { reqid, packet } => {
                let child = all.tunnels.iter().find_map(|(id, tunnel)| {
                    let child = tunnel.child_of(reqid)?;
                    Some((*id, child))
                });
                let Some((tunnel, child)) = child else { return };
                // Others have removed the state of an SA, which is seen to elsewhere.
                if !all
                    .tunnels
                    .get(&tunnel)
                    .is_some_and(|tunnel| tunnel.waits_for_packets(child))
                {
                    return;
                }
                let port = |port: PortMask| if port.mask == 0 { 0 } else { port.port };
                self.lodge.send(Event::Acquire {
                    tunnel,
                    child,
                    flow: Flow {
                        source: packet.source.addr(),
                        destination: packet.destination.addr(),
                        protocol: packet.protocol,
                        source_port: port(packet.source_port),
                        destination_port: port(packet.destination_port),
                    },
                });
            }
            Notice::Expired { id, hard } => {
                let Some(sa) = sa_of(all, &id) else { return };
                if hard {
                    let _ = self.remove(all, sa);
                }
                let kind = if hard {
                    LifetimeKind::Hard
                } else {
                    LifetimeKind::Soft
                };
                self.lodge.send(Event::Lifetime { sa, kind });
            }
            Notice::Moved { id, source } => {
                if let Some(sa) = sa_of(all, &id) {
                    self.lodge.send(Event::PeerMoved { sa, remote: source });
                }
            }
            Notice::Removed => self.dirty.notify_one(),
            Notice::Overrun => {
                tracing::warn!(
                    "notifications of the kernel's IPsec were lost: all of it is looked at"
                );
                self.dirty.notify_one();
            }
        }
    }
}

/// The state of an SA.
fn state(
    spec: &SaSpec,
    tunnel: &Tunnel,
    reqid: u32,
    mark: u32,
    keys: &EspKeys,
) -> Result<State, Rejected> {
    let (source, destination) = match spec.direction {
        Direction::Inbound => (spec.outer.remote, spec.outer.local),
        Direction::Outbound => (spec.outer.local, spec.outer.remote),
    };
    Ok(State {
        source,
        destination,
        spi: spec.spi.0,
        mode: mode(tunnel.spec.mode),
        reqid,
        if_id: tunnel.if_id,
        algorithms: algorithms(spec.suite, keys).ok_or(Rejected::BadKeys)?,
        replay: Replay {
            esn: spec.esn,
            window: spec.replay_window,
            ..Replay::default()
        },
        encap: encap(spec.direction, &spec.outer),
        // Keeps our own packets out of the tunnels.
        output_mark: (spec.direction == Direction::Outbound).then_some(mark),
        limits: Limits {
            soft_bytes: spec.lifetime.soft_bytes,
            hard_bytes: spec.lifetime.hard_bytes,
            soft_packets: spec.lifetime.soft_packets,
            hard_packets: spec.lifetime.hard_packets,
            // The daemon rekeys by time on its own, and early: only the end is the kernel's to keep.
            soft_seconds: 0,
            hard_seconds: spec
                .lifetime
                .expires
                .map_or(0, |at| at.saturating_sub(monotonic_seconds()).max(1)),
        },
        copy_dscp: tunnel.spec.copy_dscp,
        clear_df: tunnel.clears_df(),
        card: None,
    })
}

fn mode(mode: Mode) -> xfrm::Mode {
    match mode {
        Mode::Tunnel => xfrm::Mode::Tunnel,
        Mode::Transport => xfrm::Mode::Transport,
    }
}

/// Ports as they stand in the packets of a direction.
fn encap(direction: Direction, outer: &Outer) -> Option<Encap> {
    let encap = outer.encap?;
    Some(match direction {
        Direction::Inbound => Encap {
            source_port: encap.remote_port,
            destination_port: encap.local_port,
        },
        Direction::Outbound => Encap {
            source_port: encap.local_port,
            destination_port: encap.remote_port,
        },
    })
}

/// Follows the kernel's notifications until the engine stops.
async fn keep(
    inner: Arc<Inner>,
    mut notices: Watch,
    mut changes: tokio::sync::mpsc::Receiver<watch::Change>,
) {
    loop {
        tokio::select! {
            noticed = notices.next() => match noticed {
                Ok(noticed) => for notice in noticed {
                    inner.notice(notice).await;
                },
                Err(error) => {
                    tracing::error!(%error, "the kernel's IPsec is not watched any more");
                    return;
                }
            },
            change = changes.recv() => match change {
                Some(watch::Change::Link) => inner.dirty.notify_one(),
                Some(watch::Change::Address | watch::Change::Route) => {}
                None => {
                    tracing::error!("links are not watched any more");
                    return;
                }
            },
            () = inner.dirty.notified() => {
                sleep(SETTLE).await;
                inner.repair().await;
            }
        }
    }
}

/// Removes an xfrm interface of ours, so that a device of another kind can have its name.
///
/// # Errors
///
/// [`Rejected`].
pub async fn remove_device(netlink: &Netlink, device: &str) -> Result<(), Rejected> {
    let link = netlink.link(device).await?;
    if link.is_none_or(|link| link.kind.as_deref() != Some("xfrm")) {
        return Ok(());
    }
    let interfaces = netlink.xfrm_interfaces().await?;
    for left in interfaces
        .iter()
        .filter(|one| one.name == device && is_ours(one.if_id))
    {
        netlink.remove_link(left.index).await?;
    }
    Ok(())
}

/// Blocks what a tunnel in transport mode protects, for as long as there is no engine.
///
/// # Errors
///
/// What the kernel refused.
pub fn block(spec: &TunnelSpec, ports: [u16; 2]) -> io::Result<()> {
    let xfrm = Xfrm::open()?;
    let there = xfrm.policies().map_err(io::Error::other)?;
    let selectors: Vec<_> = spec.children.iter().map(|child| &child.selectors).collect();
    let wanted = transport::plan(&selectors, &[], ports).map_err(io::Error::other)?;
    // What an engine has left protects as well.
    let is_there = |policy: &Policy| {
        let same = |one: &Policy| transport::is_ours(one) && one.key() == policy.key();
        there.iter().any(same)
    };
    for policy in wanted.iter().filter(|policy| !is_there(policy)) {
        xfrm.set_policy(policy).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Removes all that has a number of ours: interfaces, states and policies. Returns how many interfaces there were.
///
/// # Errors
///
/// The first step that failed.
pub async fn release(netlink: &Netlink) -> Result<usize, NetlinkError> {
    let mut interfaces = 0;
    for interface in netlink.xfrm_interfaces().await? {
        if is_ours(interface.if_id) {
            netlink.remove_link(interface.index).await?;
            interfaces += 1;
        }
    }
    match netfilter::clamp::install(&BTreeMap::new()) {
        Err(error) if error.kind() != io::ErrorKind::Unsupported => {
            tracing::debug!(%error, "there is no table that clamps");
        }
        Ok(()) | Err(_) => {}
    }
    // A kernel without XFRM has neither states nor policies.
    let Ok(xfrm) = Xfrm::open() else {
        return Ok(interfaces);
    };
    for state in xfrm.states()? {
        if is_our_state(&state) {
            xfrm.remove_state(&state.id)?;
        }
    }
    for policy in xfrm.policies()? {
        if is_our_policy(&policy) {
            xfrm.remove_policy(&policy)?;
        }
    }
    Ok(interfaces)
}

/// What policies name the state of a new SA by: the same as its pair's, and as those of older ones that it replaces.
fn reqid(all: &mut Everything, spec: &SaSpec, selectors: &SelectorPair) -> u32 {
    let same = all.sas.values().find(|sa| {
        (sa.tunnel, sa.child) == (spec.tunnel, spec.child) && sa.selectors == *selectors
    });
    same.map(|sa| sa.reqid).unwrap_or_else(|| all.new_reqid())
}

/// Selectors in an order of our own.
fn in_order(selectors: &SelectorPair) -> SelectorPair {
    let mut selectors = selectors.clone();
    selectors.local.sort_unstable();
    selectors.remote.sort_unstable();
    selectors
}

/// What the SAs of a child are to receive, those of the newest first.
fn received(sas: &BTreeMap<SaId, Sa>, tunnel: TunnelId, child: ChildId) -> Vec<Receiving<'_>> {
    let inbound = sas.values().rev().filter(|sa| {
        sa.tunnel == tunnel && sa.child == child && sa.direction == Direction::Inbound
    });
    let mut known = BTreeSet::new();
    inbound
        .filter(|sa| known.insert(sa.reqid))
        .map(|sa| Receiving {
            reqid: sa.reqid,
            selectors: &sa.selectors,
            card: sa.card,
        })
        .collect()
}

/// The interfaces' numbers that are in use.
fn used(all: &Everything) -> BTreeSet<u32> {
    all.tunnels.values().map(|tunnel| tunnel.if_id).collect()
}
