//! The engine as its neighbours know it: commands, events and counters in front of states, policies and interfaces.

mod card;
mod doubts;
mod former;
mod notices;
mod place;
mod repair;
mod resume;
mod sa;
mod shared;
mod tunnel;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    sync::Arc,
};

use tokio::{sync::Mutex, task::JoinHandle};

use self::{
    doubts::{Doubt, Doubts},
    former::Former,
    sa::Sa,
    shared::Shared,
    tunnel::Tunnel,
};
use super::{
    capabilities::{Capabilities, Incapable},
    encap::Sockets,
    host,
};
use crate::{
    dataplane::{
        pace::Pace,
        routing::Place,
        seam::{
            Command, Direction, KernelReason, Ledger, PathCounters, Rejected, SaFacts, SaId,
            SaStats, Survey, TunnelFacts, TunnelId, TunnelSpec,
        },
        xdp::{engine::Lodge, slow::monotonic_seconds},
    },
    net::{
        netfilter,
        netlink::{Netlink, NetlinkError},
        watch,
        xfrm::{Policy, StateId, StateStatus, Watch, Xfrm},
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
/// The number of what belongs to no interface: that of tunnels without a device.
const NO_IF_ID: u32 = 0;
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
    is_ours(policy.if_id) || host::is_ours(policy)
}

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The kernel lacks something.
    #[error(transparent)]
    Incapable(#[from] Incapable),
    /// The sockets of IKE and ESP would meet the policies of the whole host.
    #[error("let IKE pass IPsec policies: {0}")]
    Sockets(#[source] io::Error),
    /// A socket could not be opened.
    #[error("watch the kernel's IPsec: {0}")]
    Watch(#[source] io::Error),
}

/// A running engine.
pub struct Engine {
    inner: Arc<Inner>,
    /// What listens to the kernel, and what repairs.
    keepers: [JoinHandle<()>; 2],
}

struct Inner {
    /// When it was started, in seconds of CLOCK_MONOTONIC.
    since: u64,
    xfrm: Xfrm,
    netlink: Netlink,
    lodge: Lodge,
    capabilities: Capabilities,
    state: Mutex<Everything>,
    /// What is to be compared with what should be.
    doubts: Doubts,
}

/// What commands change, one at a time.
#[derive(Default)]
struct Everything {
    /// Devices whose TCP is clamped, with their MTU, as the kernel was told last.
    clamped: BTreeMap<String, u16>,
    tunnels: BTreeMap<TunnelId, Tunnel>,
    /// The policies of tunnels without a device.
    shared: Shared,
    sas: BTreeMap<SaId, Sa>,
    sockets: Sockets,
    next_reqid: u32,
    /// What was there before we came.
    former: Former,
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
        // Before there are policies that IKE would meet.
        lodge.pass_policies().map_err(StartError::Sockets)?;
        let mut everything = Everything::default();
        let failed = |error| StartError::Watch(io::Error::other(error));
        let policies = xfrm.policies().map_err(failed)?;
        let states = xfrm.states().map_err(failed)?;
        everything.shared.note(&policies);
        let former = Former::list(&netlink, &policies, &states).await;
        everything.former = former.map_err(failed)?;
        let notices = Watch::start().map_err(StartError::Watch)?;
        let fallen = watch::fallen_links().map_err(StartError::Watch)?;
        let inner = Arc::new(Inner {
            since: monotonic_seconds(),
            xfrm,
            netlink,
            lodge,
            capabilities,
            state: Mutex::new(everything),
            doubts: Doubts::default(),
        });
        let keepers = [
            tokio::spawn(notices::listen(Arc::clone(&inner), notices, fallen)),
            tokio::spawn(repair(Arc::clone(&inner))),
        ];
        Ok(Self { inner, keepers })
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
    pub async fn set_tunnel(
        &self,
        spec: TunnelSpec,
        reason: KernelReason,
        place: Place,
    ) -> Result<(), Rejected> {
        let mut everything = self.inner.state.lock().await;
        self.inner
            .set_tunnel(&mut everything, spec, reason, place)
            .await
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
                .set_tunnel(
                    &mut everything,
                    *spec,
                    KernelReason::Configured,
                    Place::InUse,
                )
                .await
                .map(|()| None),
            Command::Configured => {
                everything.complete = true;
                inner.report_again(&everything);
                inner.doubts.raise(&[Doubt::Clamp, Doubt::Leftovers]);
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

    /// Whether a tunnel has no device here, or would have none.
    pub fn is_without_device(&self, spec: &TunnelSpec) -> bool {
        let capabilities = &self.inner.capabilities;
        let alone = capabilities.policies_alone(spec.mode, spec.policy_based);
        alone.is_some()
    }

    /// All SAs, and the tunnels whose devices are in use.
    pub async fn survey(&self) -> Survey {
        let everything = self.inner.state.lock().await;
        Survey {
            tunnels: everything
                .tunnels
                .iter()
                .filter(|(_, tunnel)| tunnel.place == Place::InUse)
                .map(|(id, tunnel)| TunnelFacts {
                    id: *id,
                    mtu: tunnel.has_device().then_some(tunnel.mtu),
                    policies: tunnel.alone,
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
        for keeper in self.keepers {
            keeper.abort();
        }
    }
}

/// Sees to what is in doubt, until the engine stops.
async fn repair(inner: Arc<Inner>) {
    let mut pace = Pace::new();
    loop {
        inner.doubts.wait().await;
        pace.turn().await;
        let doubts = inner.doubts.take();
        pace.look(inner.repair(&doubts)).await;
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

/// Blocks what tunnels without a device protect, for as long as there is no engine.
///
/// # Errors
///
/// What the kernel refused.
pub fn block(tunnels: &[TunnelSpec]) -> io::Result<()> {
    if tunnels.is_empty() {
        return Ok(());
    }
    let xfrm = Xfrm::open()?;
    let there = xfrm.policies().map_err(io::Error::other)?;
    let mut shared = Shared::default();
    shared.note(&there);
    for tunnel in tunnels {
        let mut wanted = tunnel::blocked(tunnel).map_err(io::Error::other)?;
        // Where an engine has left a policy that protects, its SA may go on.
        wanted.retain(|policy| !shared.is_protected(policy));
        let done = shared.want(tunnel.id, &wanted, &xfrm);
        done.map_err(io::Error::other)?;
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

/// The interfaces' numbers that are in use.
fn used(all: &Everything) -> BTreeSet<u32> {
    all.tunnels.values().map(|tunnel| tunnel.if_id).collect()
}
