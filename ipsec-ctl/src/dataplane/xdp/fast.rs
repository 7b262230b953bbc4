//! The fast path of an engine: on which interfaces the XDP program and the workers are, and what they carry.
//!
//! All of it may fail without harm: what has no fast path takes the slow one, and the ledger says why.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use ipsec_common::{
    Reason, Spi,
    classify::ike,
    maps::{Settings, TunnelEntry, VlanKey},
};

use super::{
    af_xdp::socket::CopyMode,
    fleet::{Fleet, FleetConfig, FleetError, FleetLink},
    gateway::{Port, Shared},
    offload::{Facts, decide, has_partial_checksums, is_offloaded, unsuitable},
    program::{AttachMode, Program, ProgramError},
    resolver::Resolver,
    sa::InboundSa,
    slow::SlowPath,
    table::Tunnel,
};
use crate::{
    dataplane::seam::{
        EngineConfig, FastPath, InterfaceStatus, Ledger, Offload, OffloadReason, SaId, TunnelId,
        XdpMode,
    },
    net::{netlink::Link, queues::receive_queues},
};

/// Packets of unknown SPIs that each CPU passes in a second, to be reported.
const UNKNOWN_SPI_PER_SECOND: u32 = 10;
/// Datagrams that one source sends to the IKE ports in a second before it has an IKE SA: many peers behind one NAT that all
/// begin at once, and more than one peer ever sends.
const IKE_PER_SOURCE: u32 = 50;
/// Those that a peer may send which is configured or has been up: it may begin with a thousand tunnels at once.
const IKE_PER_PEER: u32 = 2000;
/// Datagrams of strangers in a second in all, first ones and later ones each: what the daemon answers with a part of one
/// processor.
const IKE_PER_SECOND: u32 = 2000;

/// What is decided about tunnels and SAs, whether there is a fast path or not.
pub struct FastPaths {
    /// The program and the workers; `None` where the program could not be loaded.
    carrier: Option<Carrier>,
    foreign_netfilter: bool,
    tunnels: HashMap<TunnelId, Carried>,
    sas: HashMap<SaId, Decided>,
}

/// A tunnel that packets are carried for.
struct Carried {
    tunnel: Arc<Tunnel>,
    fast_path: FastPath,
    /// Whether the way back of its packets is looked at; so until it is known that there is no need.
    wary: bool,
}

/// An SA and what was decided about it last.
struct Decided {
    tunnel: TunnelId,
    /// Only inbound SAs are entered into the program's maps.
    inbound: Option<Arc<InboundSa>>,
    offload: Offload,
}

impl FastPaths {
    /// Over `carrier`, or without a fast path.
    pub fn new(carrier: Option<Carrier>) -> Self {
        Self {
            carrier,
            foreign_netfilter: false,
            tunnels: HashMap::new(),
            sas: HashMap::new(),
        }
    }

    /// Enters a tunnel, or notes that its setting has changed, and returns what has become of its SAs by that.
    pub fn set_tunnel(&mut self, tunnel: &Arc<Tunnel>, fast_path: FastPath) -> Vec<Ledger> {
        let carried = Carried {
            tunnel: Arc::clone(tunnel),
            fast_path,
            wary: true,
        };
        if let Some(old) = self.tunnels.insert(tunnel.id, carried)
            && old.tunnel.ifindex != tunnel.ifindex
            && let Some(carrier) = &mut self.carrier
        {
            carrier.program.remove_tunnel(old.tunnel.ifindex);
        }
        self.enter_tunnel(tunnel.id);
        let offload = self.decide(fast_path);
        self.reconsider(&HashMap::from([(tunnel.id, offload)]))
    }

    /// Enters a tunnel's MTU anew.
    pub fn enter_tunnel(&mut self, id: TunnelId) {
        let Some(carried) = self.tunnels.get(&id) else {
            return;
        };
        let offloaded = is_offloaded(self.decide(carried.fast_path));
        let entry = TunnelEntry {
            mtu: carried.tunnel.mtu().into(),
            offloaded: offloaded.into(),
            wary: carried.wary.into(),
        };
        let ifindex = carried.tunnel.ifindex;
        if let Some(carrier) = &mut self.carrier {
            complain(carrier.program.set_tunnel(ifindex, entry));
        }
    }

    /// Has the way back looked at for packets into these devices only.
    pub fn set_wary(&mut self, devices: &BTreeSet<u32>) {
        let mut changed = Vec::new();
        for (id, carried) in &mut self.tunnels {
            let wary = devices.contains(&carried.tunnel.ifindex);
            if std::mem::replace(&mut carried.wary, wary) != wary {
                changed.push(*id);
            }
        }
        for id in changed {
            self.enter_tunnel(id);
        }
    }

    /// Forgets a tunnel and its SAs. To be done while the tables still hold those: XDP must not know freed words.
    pub fn remove_tunnel(&mut self, id: TunnelId) {
        let sas = self.sas.iter().filter(|(_, sa)| sa.tunnel == id);
        for sa in sas.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.remove(sa);
        }
        if let (Some(carried), Some(carrier)) = (self.tunnels.remove(&id), &mut self.carrier) {
            carrier.program.remove_tunnel(carried.tunnel.ifindex);
        }
    }

    /// Enters an SA that was installed or moved, and decides about it.
    pub fn install(
        &mut self,
        id: SaId,
        tunnel: TunnelId,
        inbound: Option<Arc<InboundSa>>,
    ) -> Ledger {
        self.remove(id);
        let fast_path = self
            .tunnels
            .get(&tunnel)
            .map_or(FastPath::Off, |carried| carried.fast_path);
        let offload = self.decide(fast_path);
        if let (Some(sa), Some(carrier)) = (&inbound, &mut self.carrier) {
            carrier.enter(sa, offload);
        }
        let decided = Decided {
            tunnel,
            inbound,
            offload,
        };
        self.sas.insert(id, decided);
        Ledger {
            sa: id,
            offload,
            nic: None,
        }
    }

    /// Forgets an SA. To be done while the tables still hold it: XDP must not know freed words.
    pub fn remove(&mut self, id: SaId) {
        if let Some(decided) = self.sas.remove(&id)
            && let (Some(sa), Some(carrier)) = (decided.inbound, &mut self.carrier)
        {
            carrier.program.remove_inbound(sa.core.spi, sa.outer.local);
        }
    }

    /// Lets the ESP of an SA that is not ours pass to the kernel.
    pub fn pass(&mut self, spi: Spi, destination: IpAddr) {
        if let Some(carrier) = &mut self.carrier {
            // No words belong to it.
            let nowhere = u32::MAX;
            complain(
                carrier
                    .program
                    .set_inbound(spi, destination, nowhere, false),
            );
        }
    }

    /// Ends [`Self::pass`].
    pub fn pass_no_more(&mut self, spi: Spi, destination: IpAddr) {
        if let Some(carrier) = &mut self.carrier {
            carrier.program.remove_inbound(spi, destination);
        }
    }

    /// What was decided about an SA last.
    pub fn ledger(&self, id: SaId) -> Option<Ledger> {
        self.sas.get(&id).map(|decided| Ledger {
            sa: id,
            offload: decided.offload,
            nic: None,
        })
    }

    /// Takes in what interfaces and firewalls are like now, and returns what has become of SAs by that.
    pub fn refresh(&mut self, links: &[Link], foreign_netfilter: bool) -> Vec<Ledger> {
        let ours: Vec<u32> = self
            .tunnels
            .values()
            .map(|carried| carried.tunnel.ifindex)
            .collect();
        if let Some(carrier) = &mut self.carrier {
            carrier.set_links(links, &ours);
        }
        self.foreign_netfilter = foreign_netfilter;
        let decisions: HashMap<TunnelId, Offload> = self
            .tunnels
            .iter()
            .map(|(id, carried)| (*id, self.decide(carried.fast_path)))
            .collect();
        for id in decisions.keys() {
            self.enter_tunnel(*id);
        }
        self.reconsider(&decisions)
    }

    /// Applies decisions about tunnels to their SAs, and returns those that are new.
    fn reconsider(&mut self, decisions: &HashMap<TunnelId, Offload>) -> Vec<Ledger> {
        let mut changed = Vec::new();
        for (id, sa) in &mut self.sas {
            let Some(offload) = decisions.get(&sa.tunnel).copied() else {
                continue;
            };
            if sa.offload == offload {
                continue;
            }
            sa.offload = offload;
            if let (Some(inbound), Some(carrier)) = (&sa.inbound, &mut self.carrier) {
                carrier.enter(inbound, offload);
            }
            changed.push(Ledger {
                sa: *id,
                offload,
                nic: None,
            });
        }
        changed
    }

    fn decide(&self, fast_path: FastPath) -> Offload {
        let interfaces: Vec<_> = self
            .carrier
            .iter()
            .flat_map(|carrier| carrier.interfaces.values())
            .map(|interface| interface.reason)
            .collect();
        decide(&Facts {
            fast_path,
            foreign_netfilter: self.foreign_netfilter,
            no_xdp: self.carrier.is_none(),
            interfaces: &interfaces,
        })
    }

    /// Makes these the addresses and VLAN devices of this host.
    pub fn set_host(&mut self, addresses: &[IpAddr], vlans: &[(VlanKey, u32)]) {
        if let Some(carrier) = &mut self.carrier {
            complain(carrier.program.set_addresses(addresses));
            complain(carrier.program.set_vlans(vlans));
        }
    }

    /// Notes that IKE from an address may be a peer's: it does not compete with what strangers send.
    pub fn know_peer(&mut self, peer: IpAddr) {
        if let Some(carrier) = &mut self.carrier {
            complain(carrier.program.know_peer(peer));
        }
    }

    /// Notes whose answers an IKE message that we send is waiting for.
    pub fn know_ike(&mut self, message: &[u8]) {
        if let (Some(carrier), Some(spi)) = (&mut self.carrier, ike::own_spi(message)) {
            complain(carrier.program.know_ike(spi));
        }
    }

    /// Packets that the program and the workers counted.
    pub fn count(&self, reason: Reason) -> u64 {
        self.carrier
            .as_ref()
            .map_or(0, |carrier| carrier.count(reason))
    }

    /// What is done on which interface; `None` where the program could not be loaded.
    pub fn interfaces(&self) -> Option<Vec<InterfaceStatus>> {
        self.carrier.as_ref().map(Carrier::status)
    }
}

/// The loaded program and the workers.
pub struct Carrier {
    program: Program,
    fleet: Option<Fleet>,
    config: FleetConfig,
    shared: Shared,
    resolver: Resolver,
    exit: Arc<SlowPath>,
    /// Names of the interfaces that may be used; all, if there are none.
    wanted: Option<Vec<String>>,
    interfaces: BTreeMap<u32, Interface>,
    /// What the workers of earlier fleets counted.
    past: HashMap<Reason, u64>,
    retry: Retry,
}

/// When an interface is tried again whose program or sockets were refused: what stood in the way may have gone without a
/// notification.
#[derive(Clone, Copy, Debug)]
struct Retry {
    due: Instant,
    pause: Duration,
}

impl Retry {
    const LONGEST_PAUSE: Duration = Duration::from_secs(300);

    /// Soon after an attempt, which failed at `now`.
    fn soon(now: Instant) -> Self {
        let pause = Duration::from_secs(1);
        Self {
            due: now + pause,
            pause,
        }
    }

    /// After one more attempt that failed.
    fn later(self, now: Instant) -> Self {
        let pause = (self.pause * 2).min(Self::LONGEST_PAUSE);
        Self {
            due: now + pause,
            pause,
        }
    }
}

/// An interface that is up and no tunnel of ours.
#[derive(Clone, Debug)]
struct Interface {
    name: String,
    mac: Vec<u8>,
    partial_checksums: bool,
    queues: u32,
    mode: Option<AttachMode>,
    /// Why it has no fast path, by what it is.
    unsuitable: Option<OffloadReason>,
    /// Why it has no fast path, whatever the cause.
    reason: Option<OffloadReason>,
}

impl Interface {
    fn is_like(&self, other: &Self) -> bool {
        (&self.mac, self.queues, self.unsuitable) == (&other.mac, other.queues, other.unsuitable)
    }
}

impl Carrier {
    /// Over a program that is loaded and not attached anywhere yet.
    ///
    /// # Errors
    ///
    /// Those of writing its settings.
    pub fn new(
        mut program: Program,
        config: &EngineConfig,
        shared: Shared,
        resolver: Resolver,
        exit: Arc<SlowPath>,
    ) -> Result<Self, ProgramError> {
        program.set_settings(Settings {
            unknown_spi_per_second: UNKNOWN_SPI_PER_SECOND,
            nat_port: config.nat_port,
            ike_port: config.ike_port,
            ike_per_source: IKE_PER_SOURCE,
            ike_per_peer: IKE_PER_PEER,
            ike_per_second: IKE_PER_SECOND,
            padding: 0,
            seed: RandomState::new().hash_one(()),
        })?;
        Ok(Self {
            program,
            fleet: None,
            config: FleetConfig {
                workers: config.workers,
                busy_poll: config.busy_poll,
            },
            shared,
            resolver,
            exit,
            wanted: config.interfaces.clone(),
            interfaces: BTreeMap::new(),
            past: HashMap::new(),
            retry: Retry::soon(Instant::now()),
        })
    }

    /// Follows the links of the host. The fleet is replaced if those that matter have changed.
    fn set_links(&mut self, links: &[Link], ours: &[u32]) {
        let found = self.candidates(links, ours);
        let same = found.len() == self.interfaces.len()
            && found.iter().all(|(index, new)| {
                let old = self.interfaces.get(index);
                old.is_some_and(|old| old.is_like(new))
            });
        if same {
            return self.retry(Instant::now());
        }
        self.end_fleet();
        for index in self.program.attached() {
            if found
                .get(&index)
                .is_none_or(|link| link.unsuitable.is_some())
            {
                self.program.detach(index);
            }
        }
        self.interfaces = found;
        for (index, interface) in &mut self.interfaces {
            if interface.unsuitable.is_some() {
                continue;
            }
            match self.program.attach(*index) {
                Ok(mode) => interface.mode = Some(mode),
                Err(reason) => interface.reason = Some(reason),
            }
        }
        self.start_fleet();
        self.retry = Retry::soon(Instant::now());
    }

    /// Tries interfaces again that failed, with growing pauses. The others are disturbed only if that will succeed.
    fn retry(&mut self, now: Instant) {
        let failed = |link: &Interface| link.unsuitable.is_none() && link.reason.is_some();
        if now < self.retry.due || !self.interfaces.values().any(failed) {
            return;
        }
        self.retry = self.retry.later(now);
        let mut found = Vec::new();
        for (index, link) in self.interfaces.iter_mut().filter(|(_, link)| failed(link)) {
            if link.mode.is_none() {
                match self.program.attach(*index) {
                    Ok(mode) => link.mode = Some(mode),
                    Err(reason) => {
                        link.reason = Some(reason);
                        continue;
                    }
                }
                link.reason = Some(OffloadReason::NoAfXdp);
            }
            if Fleet::probe(fleet_link(*index, link)).is_ok() {
                found.push(*index);
            }
        }
        if found.is_empty() {
            return;
        }
        self.end_fleet();
        for index in found {
            if let Some(link) = self.interfaces.get_mut(&index) {
                link.reason = None;
            }
        }
        self.start_fleet();
    }

    fn candidates(&self, links: &[Link], ours: &[u32]) -> BTreeMap<u32, Interface> {
        links
            .iter()
            .filter(|link| link.up && !link.loopback && !ours.contains(&link.index))
            .filter(|link| !is_above_others(link))
            .filter(|link| {
                let wanted = self.wanted.as_ref();
                wanted.is_none_or(|names| names.contains(&link.name))
            })
            .map(|link| {
                let unsuitable = unsuitable(link);
                let interface = Interface {
                    name: link.name.clone(),
                    mac: link.mac.clone(),
                    partial_checksums: has_partial_checksums(link),
                    queues: receive_queues(&link.name).unwrap_or(1),
                    mode: None,
                    unsuitable,
                    reason: unsuitable,
                };
                (link.index, interface)
            })
            .collect()
    }

    /// Starts workers on all interfaces that carry the program; one that takes no sockets is left out.
    fn start_fleet(&mut self) {
        loop {
            let usable = self
                .interfaces
                .iter()
                .filter(|(_, link)| link.reason.is_none());
            let links: Vec<FleetLink> = usable
                .map(|(index, link)| fleet_link(*index, link))
                .collect();
            if links.is_empty() {
                return;
            }
            let (program, interfaces) = (&mut self.program, &self.interfaces);
            let started = Fleet::start(
                &links,
                self.config,
                &self.shared,
                &self.resolver,
                &self.exit,
                |at, socket| {
                    let queues = interfaces.get(&at.ifindex).map_or(0, |link| link.queues);
                    program.enter_socket(at, queues, socket)
                },
            );
            match started {
                Ok(fleet) => {
                    tracing::info!(workers = fleet.workers(), mode = ?fleet.mode(), "the fast path is up");
                    self.fleet = Some(fleet);
                    break;
                }
                Err(error) => {
                    tracing::warn!(%error, "AF_XDP");
                    let failed = match error {
                        FleetError::Socket(error) => Some(error.at.ifindex),
                        FleetError::Other { .. } => None,
                    };
                    for (index, link) in &mut self.interfaces {
                        if failed.is_none_or(|failed| failed == *index) && link.reason.is_none() {
                            link.reason = Some(OffloadReason::NoAfXdp);
                        }
                    }
                }
            }
        }
        for (index, link) in &self.interfaces {
            if link.reason.is_none()
                && let Ok(mac) = link.mac.as_slice().try_into()
            {
                complain(self.program.activate(*index, mac));
            }
        }
    }

    fn end_fleet(&mut self) {
        for index in self.interfaces.keys() {
            self.program.deactivate(*index);
        }
        if let Some(fleet) = self.fleet.take() {
            for &reason in Reason::ALL {
                *self.past.entry(reason).or_default() += fleet.count(reason);
            }
        }
    }

    fn enter(&mut self, sa: &InboundSa, offload: Offload) {
        complain(self.program.set_inbound(
            sa.core.spi,
            sa.outer.local,
            sa.core.words.slot(),
            is_offloaded(offload),
        ));
    }

    fn count(&self, reason: Reason) -> u64 {
        self.program.count(reason)
            + self.past.get(&reason).copied().unwrap_or_default()
            + self.fleet.as_ref().map_or(0, |fleet| fleet.count(reason))
    }

    fn status(&self) -> Vec<InterfaceStatus> {
        let mode = self.fleet.as_ref().map(Fleet::mode);
        self.interfaces
            .values()
            .map(|link| InterfaceStatus {
                name: link.name.clone(),
                xdp: link.mode.map(|mode| match mode {
                    AttachMode::Native => XdpMode::Native,
                    AttachMode::Generic => XdpMode::Generic,
                }),
                zero_copy: link.reason.is_none() && mode == Some(CopyMode::ZeroCopy),
                queues: if link.reason.is_none() {
                    link.queues
                } else {
                    0
                },
                reason: link.reason,
            })
            .collect()
    }
}

fn fleet_link(index: u32, link: &Interface) -> FleetLink {
    FleetLink {
        port: Port {
            ifindex: index,
            partial_checksums: link.partial_checksums,
        },
        queues: link.queues,
    }
}

/// Whether a link says nothing about the fast path: a VLAN is carried by the interface below it, and neither the TUN device
/// of somebody else nor an xfrm interface has Ethernet.
fn is_above_others(link: &Link) -> bool {
    match link.kind.as_deref() {
        Some("vlan" | "xfrm") => true,
        Some("tun") => link.mac.is_empty(),
        _ => false,
    }
}

/// A map that takes no entry costs speed, not correctness.
fn complain(result: Result<(), ProgramError>) {
    if let Err(error) = result {
        tracing::warn!(%error, "the XDP program's maps are incomplete");
    }
}
