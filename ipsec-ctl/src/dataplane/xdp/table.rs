//! The tables that packets are looked up in: tunnels and inbound SAs.
//!
//! Readers take no lock. Writers replace small parts: one child's outbound SAs, one of many shards of inbound SAs. So an
//! install costs the same whether there are ten SAs or ten thousand.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasherDefault, Hash, Hasher},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU16, Ordering},
    },
};

use arc_swap::{ArcSwap, ArcSwapOption};
use ipsec_common::Spi;

use super::{
    outer::OuterTemplate,
    prefetch::Places,
    sa::{InboundSa, OutboundSa, SaCore},
    selectors::{Flow, Selectors},
    senders::Senders,
    waiting::Waiting,
    words::{NoSlot, Tag, WordsArray, WordsRef},
};
use crate::dataplane::seam::{
    Before, ChildId, Df, Direction, Outer, Rejected, SaId, SaSpec, SaStats, TunnelId, TunnelSpec,
};

/// Shards of the inbound table. SPIs are random, so their low bits spread well.
const SHARDS: usize = 256;

/// A tunnel as the pipeline sees it. Stays the same object when its settings change.
#[derive(Debug)]
pub struct Tunnel {
    /// Its id.
    pub id: TunnelId,
    /// Index of its TUN device.
    pub ifindex: u32,
    /// What the configuration says, replaced as a whole.
    pub settings: ArcSwap<Settings>,
    /// MTU of the device in bytes.
    mtu: AtomicU16,
    /// Longest inner packet in bytes whose outer packet the path takes in one piece.
    whole: AtomicU16,
    /// Whether only a tunnel of ours leads to its peer.
    recursive: AtomicBool,
    /// Whether the MSS of TCP SYNs is clamped. It is here and not in the settings, so that a packet that comes in need not look
    /// at those.
    clamp_mss: AtomicBool,
}

impl Tunnel {
    /// MTU of the device in bytes.
    pub fn mtu(&self) -> u16 {
        self.mtu.load(Ordering::Relaxed)
    }

    /// Notes a new MTU of the device; tells whether it is another one.
    pub fn set_mtu(&self, mtu: u16) -> bool {
        self.mtu.swap(mtu, Ordering::Relaxed) != mtu
    }

    /// Longest inner packet in bytes whose outer packet the path takes in one piece. The MTU is longer only where IPv6
    /// needs it to be.
    pub fn whole(&self) -> u16 {
        self.whole.load(Ordering::Relaxed)
    }

    /// Notes what the path takes in one piece.
    pub fn set_whole(&self, bytes: u16) {
        self.whole.store(bytes, Ordering::Relaxed);
    }

    /// Where the memory is that every packet needs that is routed into it.
    fn note_places(self: &Arc<Self>, places: &mut Places) {
        let settings = self.settings.load();
        places.add_shared(self);
        places.add_shared(&settings);
        for child in &settings.children {
            places.add(child);
            places.add_shared(&child.outbound);
            let senders = child.outbound.load();
            places.add_shared(&senders);
            senders.note_places(places);
        }
    }

    /// Whether the MSS of TCP SYNs is clamped.
    pub fn clamps_mss(&self) -> bool {
        self.clamp_mss.load(Ordering::Relaxed)
    }

    /// Whether only a tunnel of ours leads to its peer: then nothing is sent.
    pub fn is_recursive(&self) -> bool {
        self.recursive.load(Ordering::Relaxed)
    }

    /// Notes whether only a tunnel of ours leads to its peer; tells whether that is new.
    pub fn set_recursive(&self, recursive: bool) -> bool {
        self.recursive.swap(recursive, Ordering::Relaxed) != recursive
    }
}

/// What the configuration says about a tunnel, as far as packets are concerned.
#[derive(Debug)]
pub struct Settings {
    /// Name in logs.
    pub name: String,
    /// Fixed device MTU.
    pub fixed_mtu: Option<u16>,
    df: Df,
    copy_dscp: bool,
    /// Its children in the order of the configuration.
    pub children: Vec<Child>,
}

/// A configured child and the SAs that it sends with.
#[derive(Debug)]
pub struct Child {
    /// Its id.
    pub id: ChildId,
    /// Its configured selectors.
    pub selectors: Selectors,
    /// A packet without an SA asks for one.
    pub on_demand: bool,
    /// The SAs that take its packets.
    pub outbound: Arc<ArcSwap<Senders>>,
    /// Packets that wait for one.
    pub waiting: Arc<Waiting>,
}

type Shard = ArcSwap<Inbound>;
type Inbound = HashMap<InboundKey, Arc<InboundSa>, BuildHasherDefault<NumberHasher>>;

/// What ESP says about its SA. Hashed by the SPI alone: we choose it, at random, and nobody else adds entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct InboundKey {
    spi: Spi,
    destination: IpAddr,
}

impl Hash for InboundKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u32(self.spi.0);
    }
}

/// Spreads the bits of one number that nobody outside chooses: an SPI of ours, the index of an interface.
#[derive(Default)]
struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32((*byte).into());
        }
    }

    fn write_u32(&mut self, number: u32) {
        // Fibonacci hashing: 2^64 over the golden ratio.
        self.0 = (self.0 ^ u64::from(number)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

#[derive(Debug, Default)]
struct Tunnels {
    by_id: HashMap<TunnelId, Arc<Tunnel>>,
    by_device: HashMap<u32, Arc<Tunnel>, BuildHasherDefault<NumberHasher>>,
}

/// The tables of one engine.
pub struct Tables {
    tunnels: ArcSwap<Tunnels>,
    inbound: Box<[Shard]>,
    /// The same SAs, by the slots of their words.
    by_slot: Box<[ArcSwapOption<InboundSa>]>,
    words: Arc<WordsArray>,
    registry: Mutex<Registry>,
    /// Inbound SAs of another engine.
    passed: ArcSwap<HashSet<(Spi, IpAddr)>>,
}

/// What only commands look at.
#[derive(Default)]
struct Registry {
    sas: HashMap<SaId, Installed>,
    /// The outbound SAs of a child, oldest first.
    outbound: HashMap<(TunnelId, ChildId), Vec<SaId>>,
}

enum Installed {
    Outbound(Arc<OutboundSa>),
    Inbound(Arc<InboundSa>),
}

impl Installed {
    fn core(&self) -> &Arc<SaCore> {
        match self {
            Self::Outbound(sa) => &sa.core,
            Self::Inbound(sa) => &sa.core,
        }
    }
}

impl Registry {
    /// The outbound SAs of a child.
    fn senders(&self, tunnel: TunnelId, child: ChildId) -> Arc<Senders> {
        let ids = self.outbound.get(&(tunnel, child)).into_iter().flatten();
        let sas = ids.filter_map(|id| match self.sas.get(id) {
            Some(Installed::Outbound(sa)) => Some(Arc::clone(sa)),
            Some(Installed::Inbound(_)) | None => None,
        });
        Arc::new(Senders::new(sas.collect()))
    }

    /// Gives the outbound SAs of a tunnel the outer headers that its settings want.
    fn dress(&mut self, tunnel: TunnelId, settings: &Settings) {
        for installed in self.sas.values_mut() {
            if let Installed::Outbound(sa) = installed
                && sa.core.tunnel == tunnel
            {
                *sa = Arc::new(OutboundSa {
                    core: Arc::clone(&sa.core),
                    template: settings.template(sa.template.outer),
                });
            }
        }
    }
}

impl Tables {
    /// Empty tables whose SAs take their words from `words`.
    pub fn new(words: Arc<WordsArray>) -> Self {
        Self {
            tunnels: ArcSwap::default(),
            inbound: (0..SHARDS).map(|_| Shard::default()).collect(),
            by_slot: (0..words.slots())
                .map(|_| ArcSwapOption::default())
                .collect(),
            words,
            registry: Mutex::default(),
            passed: ArcSwap::default(),
        }
    }

    /// Notes that an inbound SA is another engine's.
    pub fn pass(&self, spi: Spi, destination: IpAddr) {
        self.passed.rcu(|passed| {
            let mut passed = HashSet::clone(passed);
            passed.insert((spi, destination));
            passed
        });
    }

    /// Ends [`Self::pass`].
    pub fn pass_no_more(&self, spi: Spi, destination: IpAddr) {
        self.passed.rcu(|passed| {
            let mut passed = HashSet::clone(passed);
            passed.remove(&(spi, destination));
            passed
        });
    }

    /// SPIs of the inbound SAs that are another engine's.
    pub fn passed(&self) -> Vec<u32> {
        self.passed.load().iter().map(|(spi, _)| spi.0).collect()
    }

    /// Whether an inbound SA is another engine's.
    pub fn passes(&self, spi: Spi, destination: IpAddr) -> bool {
        self.passed.load().contains(&(spi, destination))
    }

    /// The tunnel of that id.
    pub fn tunnel(&self, id: TunnelId) -> Option<Arc<Tunnel>> {
        self.tunnels.load().by_id.get(&id).cloned()
    }

    /// The tunnel whose TUN device has that index.
    pub fn tunnel_of_device(&self, ifindex: u32) -> Option<Arc<Tunnel>> {
        self.tunnels.load().by_device.get(&ifindex).cloned()
    }

    /// All tunnels.
    pub fn tunnels(&self) -> Vec<Arc<Tunnel>> {
        self.tunnels.load().by_id.values().cloned().collect()
    }

    /// The inbound SA that ESP with this SPI to this address of ours belongs to.
    pub fn inbound(&self, spi: Spi, destination: IpAddr) -> Option<Arc<InboundSa>> {
        self.shard(spi)
            .load()
            .get(&InboundKey { spi, destination })
            .cloned()
    }

    /// As [`Self::inbound`], where `slot` is probably that of the SA's words: without a search, if it is.
    pub fn inbound_at(&self, slot: u32, spi: Spi, destination: IpAddr) -> Option<Arc<InboundSa>> {
        let place = self.by_slot.get(slot as usize).map(ArcSwapOption::load);
        match place.as_deref() {
            Some(Some(sa)) if sa.core.spi == spi && sa.outer.local == destination => {
                Some(Arc::clone(sa))
            }
            _ => self.inbound(spi, destination),
        }
    }

    /// Where the memory is that every packet needs that is routed into the tunnel over that device.
    pub fn note_outbound_places(&self, ifindex: u32, places: &mut Places) {
        if let Some(tunnel) = self.tunnels.load().by_device.get(&ifindex) {
            places.add(tunnel);
            tunnel.note_places(places);
        }
    }

    /// Where the memory is that every packet needs of the inbound SA whose words have that slot.
    pub fn note_inbound_places(&self, slot: u32, places: &mut Places) {
        if let Some(place) = self.by_slot.get(slot as usize) {
            places.add(place);
            if let Some(sa) = &*place.load() {
                sa.note_places(places);
            }
        }
    }

    /// The SA of that id, if it is an outbound one.
    pub fn outbound_by_id(&self, id: SaId) -> Option<Arc<OutboundSa>> {
        match self.registry().sas.get(&id) {
            Some(Installed::Outbound(sa)) => Some(Arc::clone(sa)),
            _ => None,
        }
    }

    /// The SA of that id, if it is an inbound one.
    pub fn inbound_by_id(&self, id: SaId) -> Option<Arc<InboundSa>> {
        match self.registry().sas.get(&id) {
            Some(Installed::Inbound(sa)) => Some(Arc::clone(sa)),
            _ => None,
        }
    }

    /// The outbound SA with this SPI to this peer, for errors about packets that we sent.
    pub fn outbound_by_spi(&self, spi: Spi, remote: IpAddr) -> Option<Arc<OutboundSa>> {
        self.registry().sas.values().find_map(|sa| match sa {
            Installed::Outbound(sa) if sa.core.spi == spi && sa.template.outer.remote == remote => {
                Some(Arc::clone(sa))
            }
            _ => None,
        })
    }

    /// Whether what one of these SAs receives in UDP comes from there.
    pub fn has_peer_at(&self, local: IpAddr, remote: SocketAddr) -> bool {
        let is_there = |outer: &Outer| {
            let port = outer.encap.map(|encap| encap.remote_port);
            (outer.local, outer.remote, port) == (local, remote.ip(), Some(remote.port()))
        };
        self.registry().sas.values().any(|sa| match sa {
            Installed::Inbound(sa) => is_there(&sa.outer),
            Installed::Outbound(_) => false,
        })
    }

    /// All SAs, in the order of their ids.
    pub fn cores(&self) -> Vec<Arc<SaCore>> {
        let mut cores: Vec<_> = self
            .registry()
            .sas
            .values()
            .map(|sa| Arc::clone(sa.core()))
            .collect();
        cores.sort_by_key(|core| core.id);
        cores
    }

    /// Counters of all SAs, in the order of their ids.
    pub fn stats(&self) -> Vec<SaStats> {
        self.cores().iter().map(|core| core.stats()).collect()
    }

    /// Creates a tunnel over the device, or changes its settings; its SAs stay with the children that stay.
    pub fn set_tunnel(&self, spec: &TunnelSpec, ifindex: u32, mtu: u16) -> Arc<Tunnel> {
        let mut registry = self.registry();
        let existing = self.tunnel(spec.id).filter(|old| old.ifindex == ifindex);
        let old = existing.as_ref().map(|tunnel| tunnel.settings.load_full());
        let settings = Arc::new(settings(spec, old.as_deref()));
        let tunnel = match existing {
            Some(tunnel) => {
                tunnel.settings.store(Arc::clone(&settings));
                tunnel
            }
            None => Arc::new(Tunnel {
                id: spec.id,
                ifindex,
                settings: ArcSwap::new(Arc::clone(&settings)),
                mtu: AtomicU16::new(mtu),
                whole: AtomicU16::new(u16::MAX),
                recursive: AtomicBool::new(false),
                clamp_mss: AtomicBool::new(true),
            }),
        };
        tunnel.clamp_mss.store(spec.clamp_mss, Ordering::Relaxed);
        self.change_tunnels(|tunnels| {
            if let Some(old) = tunnels.by_id.insert(spec.id, Arc::clone(&tunnel)) {
                tunnels.by_device.remove(&old.ifindex);
            }
            tunnels.by_device.insert(ifindex, Arc::clone(&tunnel));
        });
        // Children that are gone take their SAs with them.
        let gone: Vec<SaId> = registry
            .sas
            .values()
            .map(Installed::core)
            .filter(|core| core.tunnel == spec.id)
            .filter(|core| !settings.children.iter().any(|child| child.id == core.child))
            .map(|core| core.id)
            .collect();
        for id in gone {
            self.remove_from(&mut registry, id);
        }
        registry.dress(spec.id, &settings);
        for child in &settings.children {
            child.outbound.store(registry.senders(spec.id, child.id));
        }
        tunnel
    }

    /// Removes a tunnel and its SAs; tells which ones those were.
    pub fn remove_tunnel(&self, id: TunnelId) -> Vec<SaId> {
        let mut registry = self.registry();
        let sas: Vec<SaId> = registry
            .sas
            .values()
            .map(Installed::core)
            .filter(|core| core.tunnel == id)
            .map(|core| core.id)
            .collect();
        for &sa in &sas {
            self.remove_from(&mut registry, sa);
        }
        self.change_tunnels(|tunnels| {
            if let Some(tunnel) = tunnels.by_id.remove(&id) {
                tunnels.by_device.remove(&tunnel.ifindex);
            }
        });
        sas
    }

    /// Whether this very SA is installed: that id with those keys. If so it goes on for a daemon that comes after one that died,
    /// perhaps with the report of a limit that it had not acted on: limits are reported again.
    pub fn goes_on(&self, spec: &SaSpec) -> bool {
        let registry = self.registry();
        let core = registry.sas.get(&spec.id).map(Installed::core);
        let core = core.filter(|core| core.words.tag() == Tag::of(spec));
        core.inspect(|core| core.report_again()).is_some()
    }

    /// SAs that were to be resumed have been: the others that an earlier process has left are not any more.
    pub fn forget_what_is_left(&self) {
        self.words.forget_what_is_left();
    }

    /// Installs an SA; an outbound one takes the packets that its selectors are for from now on.
    pub fn install(&self, spec: &SaSpec) -> Result<(), Rejected> {
        self.install_on(spec, |tag| self.words.allocate(tag))
    }

    /// As [`Self::install`], for an SA that goes on counting where an earlier process has stopped. At `now` (seconds of
    /// CLOCK_MONOTONIC).
    pub fn resume(&self, spec: &SaSpec, before: Before, now: u64) -> Result<(), Rejected> {
        let is_over = spec.lifetime.expires.is_some_and(|at| at <= now);
        self.install_on(spec, |tag| match (self.words.resume(tag), before) {
            // All that have been in use since have a slot, until they end.
            (Err(NoSlot::Unknown), Before::InDoubt(at))
                if self.words.since() + 1 < at && !is_over =>
            {
                self.words.allocate(tag)
            }
            (resumed, Before::InDoubt(_) | Before::Installed) => resumed,
        })
    }

    fn install_on(
        &self,
        spec: &SaSpec,
        words: impl FnOnce(Tag) -> Result<WordsRef, NoSlot>,
    ) -> Result<(), Rejected> {
        let mut registry = self.registry();
        let tunnel = self.tunnel(spec.tunnel).ok_or(Rejected::UnknownTunnel)?;
        let key = InboundKey {
            spi: spec.spi,
            destination: spec.outer.local,
        };
        if registry.sas.contains_key(&spec.id)
            || (spec.direction == Direction::Inbound
                && self.inbound(key.spi, key.destination).is_some())
        {
            return Err(Rejected::Exists);
        }
        let words = words(Tag::of(spec)).map_err(|error| match error {
            NoSlot::Full => Rejected::Full,
            NoSlot::Used | NoSlot::Unknown => Rejected::Uncounted,
        })?;
        let core = Arc::new(SaCore::new(spec, words)?);
        match spec.direction {
            Direction::Inbound => {
                let sa = Arc::new(InboundSa::new(core, tunnel, spec.outer));
                self.set_slot(&sa.core, Some(&sa));
                self.change_shard(spec.spi, |shard| {
                    shard.insert(key, Arc::clone(&sa));
                });
                registry.sas.insert(spec.id, Installed::Inbound(sa));
            }
            Direction::Outbound => {
                let settings = tunnel.settings.load();
                let child = settings
                    .children
                    .iter()
                    .find(|child| child.id == spec.child)
                    .ok_or(Rejected::UnknownTunnel)?;
                let sa = Arc::new(OutboundSa {
                    core,
                    template: settings.template(spec.outer),
                });
                registry.sas.insert(spec.id, Installed::Outbound(sa));
                registry
                    .outbound
                    .entry((spec.tunnel, spec.child))
                    .or_default()
                    .push(spec.id);
                child
                    .outbound
                    .store(registry.senders(spec.tunnel, spec.child));
            }
        }
        Ok(())
    }

    /// Removes an SA; tells whether it was there.
    pub fn remove(&self, id: SaId) -> bool {
        self.remove_from(&mut self.registry(), id)
    }

    /// Moves an SA to other outer addresses; counters, keys and replay window stay.
    pub fn move_outer(&self, id: SaId, outer: Outer) -> Result<(), Rejected> {
        let mut registry = self.registry();
        match registry.sas.get(&id).ok_or(Rejected::UnknownSa)? {
            Installed::Outbound(old) => {
                let moved = Arc::new(OutboundSa {
                    core: Arc::clone(&old.core),
                    template: OuterTemplate {
                        outer,
                        ..old.template
                    },
                });
                registry
                    .sas
                    .insert(id, Installed::Outbound(Arc::clone(&moved)));
                self.let_send(&registry, &moved.core);
            }
            Installed::Inbound(old) => {
                let (spi, from) = (old.core.spi, old.outer.local);
                if from != outer.local && self.inbound(spi, outer.local).is_some() {
                    return Err(Rejected::Exists);
                }
                let moved = Arc::new(InboundSa::new(
                    Arc::clone(&old.core),
                    Arc::clone(&old.tunnel),
                    outer,
                ));
                self.set_slot(&moved.core, Some(&moved));
                self.change_shard(spi, |shard| {
                    shard.remove(&InboundKey {
                        spi,
                        destination: from,
                    });
                    let destination = outer.local;
                    shard.insert(InboundKey { spi, destination }, Arc::clone(&moved));
                });
                registry.sas.insert(id, Installed::Inbound(moved));
            }
        }
        Ok(())
    }

    fn remove_from(&self, registry: &mut Registry, id: SaId) -> bool {
        match registry.sas.remove(&id) {
            None => false,
            Some(Installed::Inbound(sa)) => {
                sa.core.words.retire();
                let key = InboundKey {
                    spi: sa.core.spi,
                    destination: sa.outer.local,
                };
                self.set_slot(&sa.core, None);
                self.change_shard(key.spi, |shard| {
                    shard.remove(&key);
                });
                true
            }
            Some(Installed::Outbound(sa)) => {
                sa.core.words.retire();
                let name = (sa.core.tunnel, sa.core.child);
                let others = registry.outbound.entry(name).or_default();
                others.retain(|&other| other != id);
                if others.is_empty() {
                    registry.outbound.remove(&name);
                }
                // An older one with the same selectors takes over: of two that a collision made, either may be the one to go.
                self.let_send(registry, &sa.core);
                true
            }
        }
    }

    /// Lets the SAs that an SA's child has now send, in one step.
    fn let_send(&self, registry: &Registry, core: &SaCore) {
        let Some(tunnel) = self.tunnel(core.tunnel) else {
            return;
        };
        let settings = tunnel.settings.load();
        let mut children = settings.children.iter();
        if let Some(child) = children.find(|child| child.id == core.child) {
            let senders = registry.senders(core.tunnel, core.child);
            child.outbound.store(senders);
        }
    }

    fn change_tunnels(&self, change: impl FnOnce(&mut Tunnels)) {
        let old = self.tunnels.load();
        let mut tunnels = Tunnels {
            by_id: old.by_id.clone(),
            by_device: old.by_device.clone(),
        };
        change(&mut tunnels);
        self.tunnels.store(Arc::new(tunnels));
    }

    fn change_shard(&self, spi: Spi, change: impl FnOnce(&mut Inbound)) {
        let shard = self.shard(spi);
        let mut sas = Inbound::clone(&shard.load());
        change(&mut sas);
        shard.store(Arc::new(sas));
    }

    fn set_slot(&self, core: &SaCore, sa: Option<&Arc<InboundSa>>) {
        if let Some(place) = self.by_slot.get(core.words.slot() as usize) {
            place.store(sa.cloned());
        }
    }

    fn shard(&self, spi: Spi) -> &Shard {
        &self.inbound[spi.0 as usize % SHARDS]
    }

    /// Taken by whoever changes anything, so that writers never overlap.
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Settings {
    /// Whether a packet that was routed into the tunnel is one that we sent to the tunnel's own peer.
    pub fn is_own_esp(&self, flow: &Flow) -> bool {
        const ESP: u8 = 50;
        const UDP: u8 = 17;
        let port = match (flow.protocol, flow.ports) {
            (ESP, _) => None,
            (UDP, Some((source_port, _))) => Some(source_port),
            _ => return false,
        };
        let ends = (flow.source, flow.destination, port);
        self.children
            .iter()
            .any(|child| child.outbound.load().send_between(&ends))
    }

    fn template(&self, outer: Outer) -> OuterTemplate {
        OuterTemplate {
            outer,
            df: self.df,
            copy_dscp: self.copy_dscp,
        }
    }
}

fn settings(spec: &TunnelSpec, old: Option<&Settings>) -> Settings {
    let kept = |id: ChildId| {
        let child = old?.children.iter().find(|child| child.id == id)?;
        Some((Arc::clone(&child.outbound), Arc::clone(&child.waiting)))
    };
    Settings {
        name: spec.name.clone(),
        fixed_mtu: spec.mtu,
        df: spec.df,
        copy_dscp: spec.copy_dscp,
        children: spec
            .children
            .iter()
            .map(|trap| {
                let (outbound, waiting) = kept(trap.id).unwrap_or_default();
                Child {
                    id: trap.id,
                    selectors: Selectors::new(&trap.selectors),
                    on_demand: trap.on_demand,
                    outbound,
                    waiting,
                }
            })
            .collect(),
    }
}
