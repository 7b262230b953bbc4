//! Daemons and data planes that die at any moment and come back: both ends agree in the end, no key is used twice with one
//! number, no packet is accepted twice, and no message ID stands for two messages.
//!
//! A node saves, installs and transmits in the order in which the daemon does. It dies when its fuse has burnt down, which
//! each write, each act on the data plane and each datagram shortens. What it has saved and its data plane are still there
//! when it comes back; a data plane that dies leaves the words in which its SAs have counted, unless these are lost, too.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    panic,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    network::{Conditions, Flight, Network, Seeded},
    pair::{A, B, PEER, limits},
    upkeep::with_children,
};
use crate::ike::{
    Endpoint,
    config::{PeerConfig, Role},
    endpoint::Part,
    event::{ChildSaId, ChildUp, Command, Event, Rekey},
    job::JobResult,
    time::Time,
};
use crate::wiped::Wiped;

/// Seeds that are run unless the environment says otherwise.
const SEEDS: u64 = 100;

/// The daemon is dead.
struct Died;

type Alive<T = ()> = Result<T, Died>;
type Key = Vec<u8>;

/// Everything that must not happen, on either side.
#[derive(Default)]
struct Witness {
    sealed: Vec<(u32, Key, u64)>,
    used: BTreeSet<(Key, u64)>,
    accepted: BTreeSet<(Key, u64)>,
    messages: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Witness {
    fn seals(&mut self, spi: u32, key: &Key, number: u64) {
        assert!(
            self.used.insert((key.clone(), number)),
            "a key is used twice with one number"
        );
        self.sealed.push((spi, key.clone(), number));
    }

    /// What names an encrypted message names one message.
    fn sends(&mut self, bytes: &[u8]) {
        const ENCRYPTED: u8 = 46;
        const FRAGMENT: u8 = 53;
        if bytes.len() < 36 || ![ENCRYPTED, FRAGMENT].contains(&bytes[16]) {
            return;
        }
        let mut name = [&bytes[..16], &bytes[19..24]].concat();
        if bytes[16] == FRAGMENT {
            name.extend(&bytes[32..34]);
        }
        let first = self.messages.entry(name).or_insert_with(|| bytes.to_vec());
        assert_eq!(first, bytes, "one message ID for two messages");
    }
}

/// How far an SA has counted: its last number, or those that it has seen.
#[derive(Default)]
struct Words {
    last: u64,
    seen: BTreeSet<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Way {
    In,
    Out,
}

struct Sa {
    spi: u32,
    key: Key,
}

/// A data plane: what is installed, and the words that outlive its process.
#[derive(Default)]
struct Plane {
    sas: BTreeMap<(ChildSaId, Way), Sa>,
    words: BTreeMap<Key, Words>,
    /// When the words were made.
    since: Time,
}

impl Plane {
    fn sa(up: &ChildUp, way: Way) -> Sa {
        let (spi, key) = match way {
            Way::In => (up.spi_in, &up.key_in),
            Way::Out => (up.spi_out, &up.key_out),
        };
        Sa {
            spi: spi.0,
            key: key.encryption.bytes().to_vec(),
        }
    }

    fn install(&mut self, up: &ChildUp, way: Way) {
        let sa = Self::sa(up, way);
        assert!(
            self.words
                .insert(sa.key.clone(), Words::default())
                .is_none(),
            "an SA begins at 1 again"
        );
        self.sas.insert((up.sa, way), sa);
    }

    /// What was certainly installed, or perhaps.
    fn resume(&mut self, up: &ChildUp, way: Way, certainly: bool) -> bool {
        let sa = Self::sa(up, way);
        if self.words.contains_key(&sa.key) {
            self.sas.insert((up.sa, way), sa);
            return true;
        }
        let is_new = !certainly && self.since < up.since;
        if is_new {
            self.install(up, way);
        }
        is_new
    }

    fn remove(&mut self, id: ChildSaId, way: Way) {
        if let Some(sa) = self.sas.remove(&(id, way)) {
            self.words.remove(&sa.key);
        }
    }

    fn configured(&mut self) {
        let keys: BTreeSet<&Key> = self.sas.values().map(|sa| &sa.key).collect();
        self.words.retain(|key, _| keys.contains(key));
    }

    /// Sends a packet on the newest outbound SA.
    fn send(&mut self, witness: &mut Witness) -> Option<(u32, Key, u64)> {
        let (_, sa) = self.sas.iter().rfind(|((_, way), _)| *way == Way::Out)?;
        let words = self.words.get_mut(&sa.key).unwrap();
        words.last += 1;
        witness.seals(sa.spi, &sa.key, words.last);
        Some((sa.spi, sa.key.clone(), words.last))
    }

    /// Takes a packet, which may have come before.
    fn receive(&mut self, packet: &(u32, Key, u64), witness: &mut Witness) -> bool {
        let (spi, key, number) = packet;
        let mut inbound = self.sas.iter().filter(|((_, way), _)| *way == Way::In);
        if !inbound.any(|(_, sa)| (sa.spi, &sa.key) == (*spi, key)) {
            return false;
        }
        let is_new = self.words.get_mut(key).unwrap().seen.insert(*number);
        if is_new {
            let accepted = witness.accepted.insert((key.clone(), *number));
            assert!(accepted, "a packet is accepted twice");
        }
        is_new
    }
}

/// A pair as the daemon knows it.
#[derive(Clone, Serialize, Deserialize)]
struct Known {
    up: ChildUp,
    sends: bool,
}

/// What outlives a daemon.
#[derive(Default)]
struct Store {
    parts: BTreeMap<Part, Wiped>,
    pairs: BTreeMap<ChildSaId, Wiped>,
}

struct Node {
    address: IpAddr,
    config: PeerConfig,
    endpoint: Endpoint,
    pairs: BTreeMap<ChildSaId, Known>,
    changed: BTreeSet<ChildSaId>,
    in_doubt: Option<BTreeSet<ChildSaId>>,
    jobs: Vec<JobResult>,
    store: Store,
    plane: Plane,
    seed: u64,
    lives: u64,
    /// What it can still do before it dies; for ever if there is none.
    fuse: Option<u32>,
    /// The fuse of the daemon that comes after it.
    next_fuse: Option<u32>,
    deaths: u32,
}

impl Node {
    fn new(seed: u64, config: PeerConfig) -> Self {
        let address = if config.role == Role::Initiate { A } else { B };
        let mut node = Self {
            address,
            config,
            endpoint: Endpoint::new(limits(), Box::new(Seeded::new(seed, 50))),
            pairs: BTreeMap::new(),
            changed: BTreeSet::new(),
            in_doubt: None,
            jobs: Vec::new(),
            store: Store::default(),
            plane: Plane::default(),
            seed,
            lives: 0,
            fuse: None,
            next_fuse: None,
            deaths: 0,
        };
        node.configure(Time::default());
        node.bring_up(Time::default());
        node
    }

    fn configure(&mut self, now: Time) {
        let config = Box::new(self.config.clone());
        self.endpoint.handle_command(now, Command::SetPeer(config));
    }

    /// Comes later than anything else, for the peer's addresses are looked up first.
    fn bring_up(&mut self, now: Time) {
        if self.config.role == Role::Initiate {
            let local = SocketAddr::new(self.address, 500);
            self.endpoint.handle_command(now, Command::Up(PEER, local));
        }
    }

    fn burn(&mut self) -> Alive {
        match &mut self.fuse {
            Some(0) => Err(Died),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn save(&mut self) -> Alive {
        self.burn()?;
        for (part, content) in self.endpoint.changes().unwrap() {
            match content {
                Some(content) => self.store.parts.insert(part, content),
                None => self.store.parts.remove(&part),
            };
        }
        for sa in std::mem::take(&mut self.changed) {
            match self.pairs.get(&sa) {
                Some(pair) => self.store.pairs.insert(sa, Wiped::of(pair).unwrap()),
                None => self.store.pairs.remove(&sa),
            };
        }
        self.burn()
    }

    fn drain(&mut self, now: Time, network: &mut Network, witness: &mut Witness) -> Alive {
        while self.endpoint.has_output() {
            self.save()?;
            let mut installs = false;
            while let Some(event) = self.endpoint.poll_event() {
                installs = true;
                self.act(event)?;
            }
            if installs {
                self.save()?;
            }
            while let Some(transmit) = self.endpoint.poll_transmit() {
                self.burn()?;
                witness.sends(&transmit.bytes);
                network.send(now, transmit);
            }
            while let Some(job) = self.endpoint.poll_job() {
                self.jobs.push(job.run());
            }
        }
        Ok(())
    }

    fn install(&mut self, sa: ChildSaId, way: Way) {
        let up = &self.pairs[&sa].up;
        match &mut self.in_doubt {
            None => self.plane.install(up, way),
            Some(lost) => {
                if !self.plane.resume(up, way, false) {
                    lost.insert(sa);
                }
            }
        }
    }

    fn act(&mut self, event: Event) -> Alive {
        self.burn()?;
        if std::env::var_os("IPSEC_XDP_TRACE").is_some() {
            eprintln!("{} {event:?}", self.address);
        }
        match event {
            Event::ChildUp(up) => {
                let sa = up.sa;
                self.changed.insert(sa);
                let known = Known {
                    up: *up,
                    sends: false,
                };
                self.pairs.insert(sa, known);
                self.install(sa, Way::In);
            }
            Event::Outbound(sa) => {
                self.changed.insert(sa);
                if let Some(pair) = self.pairs.get_mut(&sa)
                    && !std::mem::replace(&mut pair.sends, true)
                {
                    self.install(sa, Way::Out);
                }
            }
            Event::OutboundDown(sa) => {
                self.changed.insert(sa);
                if let Some(pair) = self.pairs.get_mut(&sa) {
                    pair.sends = false;
                }
                self.plane.remove(sa, Way::Out);
            }
            Event::ChildDown { sa, .. } => {
                self.changed.insert(sa);
                self.pairs.remove(&sa);
                self.plane.remove(sa, Way::Out);
                self.plane.remove(sa, Way::In);
            }
            Event::IkeUp(_)
            | Event::IkeRekeyed(_)
            | Event::IkeDown { .. }
            | Event::Moved(..)
            | Event::Exhausted(_)
            | Event::Unreachable(_)
            | Event::Failed(_) => {}
        }
        self.burn()
    }

    /// Has the data plane go on with all SAs.
    fn resume_all(&mut self) -> BTreeSet<ChildSaId> {
        let mut lost = BTreeSet::new();
        for (sa, pair) in &self.pairs {
            let ways = [Way::In, Way::Out];
            for way in &ways[..1 + usize::from(pair.sends)] {
                if !self.plane.resume(&pair.up, *way, true) {
                    lost.insert(*sa);
                }
            }
        }
        lost
    }

    /// A daemon comes after one that died.
    fn come_back(&mut self, now: Time) -> Alive {
        self.lives += 1;
        self.jobs.clear();
        self.changed.clear();
        let random = Box::new(Seeded::new(
            self.seed,
            100 + 10 * self.lives + u64::from(self.address == A),
        ));
        let parts = self.store.parts.iter();
        let parts = parts.map(|(part, content)| (*part, content.bytes()));
        self.endpoint = if self.store.parts.is_empty() {
            Endpoint::new(limits(), random)
        } else {
            Endpoint::restore(limits(), random, now, parts).unwrap()
        };
        let pairs = self.store.pairs.iter();
        self.pairs = pairs
            .map(|(sa, pair)| (*sa, rmp_serde::from_slice(pair.bytes()).unwrap()))
            .collect();
        self.configure(now);
        self.in_doubt = Some(self.resume_all());
        while let Some(event) = self.endpoint.poll_event() {
            self.act(event)?;
        }
        let lost = self.in_doubt.take().unwrap();
        let known: BTreeSet<ChildSaId> = self.endpoint.pairs().collect();
        let ours: BTreeSet<ChildSaId> = self.pairs.keys().copied().collect();
        assert_eq!(
            known, ours,
            "the endpoint and the daemon know different pairs"
        );
        let pairs = &self.pairs;
        let stray: Vec<(ChildSaId, Way)> = self
            .plane
            .sas
            .keys()
            .filter(|(sa, way)| {
                !pairs
                    .get(sa)
                    .is_some_and(|pair| pair.sends || *way == Way::In)
            })
            .copied()
            .collect();
        for (sa, way) in stray {
            self.plane.remove(sa, way);
        }
        self.plane.configured();
        for sa in lost {
            self.endpoint.handle_command(now, Command::Lost(sa));
        }
        self.bring_up(now);
        Ok(())
    }

    /// Its data plane's process dies, and with it perhaps the words; the daemon starts another.
    fn lose_plane(&mut self, now: Time, words: bool) {
        self.plane.sas.clear();
        if words {
            self.plane.words.clear();
            self.plane.since = now;
        }
        let lost = self.resume_all();
        for sa in lost {
            self.endpoint.handle_command(now, Command::Lost(sa));
        }
        self.plane.configured();
    }

    fn tell(&mut self, now: Time, command: Command) {
        self.endpoint.handle_command(now, command);
    }
}

struct World {
    now: Time,
    network: Network,
    nodes: [Node; 2],
    witness: Witness,
    random: Seeded,
}

impl World {
    fn new(seed: u64, conditions: Conditions) -> Self {
        Self {
            now: Time::default(),
            network: Network::new(conditions, Seeded::new(seed, 0)),
            nodes: [
                Node::new(seed, with_children(B, Role::Initiate, 1)),
                Node::new(seed + 1, with_children(A, Role::Respond, 1)),
            ],
            witness: Witness::default(),
            random: Seeded::new(seed, 7),
        }
    }

    /// Lets a node do what there is to do; one that dies of it comes back, and may die of that.
    fn drain(&mut self, index: usize) {
        let (now, node) = (self.now, &mut self.nodes[index]);
        let mut alive = node.drain(now, &mut self.network, &mut self.witness);
        while alive.is_err() {
            node.deaths += 1;
            node.fuse = node.next_fuse.take();
            alive = node
                .come_back(now)
                .and_then(|()| node.drain(now, &mut self.network, &mut self.witness));
        }
    }

    fn deliver(&mut self, flight: &Flight) {
        for index in 0..2 {
            if self.nodes[index].address == flight.destination.ip() && flight.bytes != [0xff] {
                self.nodes[index].endpoint.handle_datagram(
                    self.now,
                    flight.destination,
                    flight.source,
                    &flight.bytes,
                );
                self.drain(index);
            }
        }
    }

    fn work(&mut self, index: usize) {
        self.drain(index);
        while !self.nodes[index].jobs.is_empty() {
            let result = self.nodes[index].jobs.remove(0);
            self.nodes[index].endpoint.handle_job(self.now, result);
            self.drain(index);
        }
        let due = self.nodes[index].endpoint.poll_timeout();
        if due.is_some_and(|at| at <= self.now) {
            self.nodes[index].endpoint.handle_timeout(self.now);
            self.drain(index);
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        for _ in 0..1_000_000 {
            self.work(0);
            self.work(1);
            while let Some(flight) = self.network.arrival(self.now) {
                self.deliver(&flight);
            }
            self.traffic();
            if self.nodes.iter().any(|node| !node.jobs.is_empty()) {
                continue;
            }
            let timers = self.nodes.iter().map(|node| node.endpoint.poll_timeout());
            let next = timers.chain([self.network.next_arrival()]).flatten().min();
            match next {
                Some(at) if at <= end => self.now = self.now.max(at),
                _ => {
                    self.now = end;
                    return;
                }
            }
        }
        panic!("the endpoints never come to rest");
    }

    /// A packet each way, and an old one once more.
    fn traffic(&mut self) -> [bool; 2] {
        [(0, 1), (1, 0)].map(|(from, to)| {
            let packet = self.nodes[from].plane.send(&mut self.witness);
            let arrived = packet
                .is_some_and(|packet| self.nodes[to].plane.receive(&packet, &mut self.witness));
            let old = self.witness.sealed.len() as u64;
            if old > 0 {
                let old = usize::try_from(self.random.below(old)).unwrap();
                let old = self.witness.sealed[old].clone();
                self.nodes[to].plane.receive(&old, &mut self.witness);
            }
            arrived
        })
    }

    fn assert_agreement(&mut self) {
        for node in &self.nodes {
            let in_force: Vec<_> = node.pairs.keys().collect();
            assert_eq!(in_force.len(), 1, "at {}: {in_force:?}", node.address);
            assert_eq!(node.plane.sas.len(), 2, "at {}", node.address);
            assert_eq!(node.endpoint.len(), 1, "at {}", node.address);
        }
        assert_eq!(self.traffic(), [true, true]);
    }

    fn end_well(&mut self) {
        self.network.conditions = Conditions::PERFECT;
        for node in &mut self.nodes {
            (node.fuse, node.next_fuse) = (None, None);
        }
        self.run(Duration::from_secs(400));
        self.assert_agreement();
    }
}

/// What one side does when all is well.
#[derive(Clone, Copy, Debug)]
enum Wish {
    RekeyChild,
    RekeyIke,
    DeleteChild,
}

fn wish(world: &mut World, index: usize, wish: Wish) {
    let now = world.now;
    let node = &mut world.nodes[index];
    match wish {
        Wish::RekeyChild => node.tell(now, Command::Rekey(PEER, Rekey::Children)),
        Wish::RekeyIke => node.tell(now, Command::Rekey(PEER, Rekey::Ike)),
        Wish::DeleteChild => {
            if let Some(sa) = node.pairs.keys().next_back().copied() {
                node.tell(now, Command::Lost(sa));
            }
        }
    }
}

/// What happens, and who dies of it after how many acts, and perhaps once more; tells whether anybody did.
fn dies(what: Option<(usize, Wish)>, who: usize, fuse: u32, again: Option<u32>) -> bool {
    let mut world = World::new(1, Conditions::PERFECT);
    if what.is_some() {
        world.run(Duration::from_secs(12));
        world.assert_agreement();
    }
    world.nodes[who].fuse = Some(fuse);
    world.nodes[who].next_fuse = again;
    if let Some((side, what)) = what {
        wish(&mut world, side, what);
    }
    world.run(Duration::from_secs(30));
    let died = world.nodes[who].deaths > 0;
    world.end_well();
    died
}

#[test]
fn wherever_a_daemon_dies_in_an_exchange_both_ends_agree_and_nothing_is_used_twice() {
    let mut whats = vec![None];
    for what in [Wish::RekeyChild, Wish::RekeyIke, Wish::DeleteChild] {
        whats.extend([Some((0, what)), Some((1, what))]);
    }
    for what in whats {
        for who in [0, 1] {
            for again in [None, Some(1), Some(3), Some(6)] {
                let least = everywhere(what, who, again);
                assert!(least > 5, "{what:?}: nobody has died");
            }
        }
    }
}

/// Runs what happens with every fuse that burns down; tells how many those are.
fn everywhere(what: Option<(usize, Wish)>, who: usize, again: Option<u32>) -> u32 {
    let mut fuse = 0;
    loop {
        let died = panic::catch_unwind(|| dies(what, who, fuse, again)).unwrap_or_else(|cause| {
            eprintln!("{what:?}: node {who} dies after {fuse} acts, and after {again:?}");
            panic::resume_unwind(cause);
        });
        if !died {
            return fuse;
        }
        fuse += 1;
    }
}

/// A long life with many deaths of every kind, on a bad network.
fn live(seed: u64) {
    let mut random = Seeded::new(seed, 8);
    let conditions = Conditions {
        loss: random.below(15),
        repetition: random.below(20),
        corruption: random.below(3),
        delay: Duration::from_millis(1 + random.below(500)),
        job: Duration::from_millis(1),
    };
    let mut world = World::new(seed, conditions);
    for _ in 0..30 {
        let side = usize::from(random.percent(50));
        match random.below(8) {
            0 | 1 => wish(&mut world, side, Wish::RekeyChild),
            2 => wish(&mut world, side, Wish::RekeyIke),
            3 => wish(&mut world, side, Wish::DeleteChild),
            4 => world.nodes[side].lose_plane(world.now, false),
            5 if random.percent(30) => world.nodes[side].lose_plane(world.now, true),
            _ => {
                let node = &mut world.nodes[side];
                node.fuse = Some(u32::try_from(random.below(40)).unwrap());
                node.next_fuse = random
                    .percent(30)
                    .then(|| u32::try_from(random.below(10)).unwrap());
            }
        }
        world.run(Duration::from_millis(random.below(8000)));
    }
    world.end_well();
}

#[test]
fn whatever_dies_and_when_both_ends_agree_in_the_end_and_nothing_is_used_twice() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().unwrap());
    if let Some(seed) = number("IPSEC_XDP_SEED") {
        return live(seed);
    }
    for seed in 0..number("IPSEC_XDP_SEEDS").unwrap_or(SEEDS) {
        if let Err(cause) = panic::catch_unwind(|| live(seed)) {
            eprintln!("seed {seed} failed; IPSEC_XDP_SEED={seed} runs it alone");
            panic::resume_unwind(cause);
        }
    }
}

#[test]
fn an_exchange_that_is_under_way_is_ended_by_the_daemon_that_comes_after() {
    let mut world = World::new(3, Conditions::PERFECT);
    world.run(Duration::from_secs(12));
    let before = world.nodes[0].pairs.clone();
    wish(&mut world, 0, Wish::RekeyChild);
    // It has sent its request, and dies before the response comes.
    world.drain(0);
    let result = world.nodes[0].jobs.remove(0);
    world.nodes[0].endpoint.handle_job(world.now, result);
    world.drain(0);
    assert_eq!(world.network.flights.len(), 1);
    assert!(world.nodes[0].come_back(world.now).is_ok());
    world.run(Duration::from_secs(30));
    world.assert_agreement();
    let after = &world.nodes[0].pairs;
    assert!(
        after.keys().all(|sa| !before.contains_key(sa)),
        "it was rekeyed"
    );
    assert_eq!(world.nodes[0].endpoint.established().count(), 1);
}

#[test]
fn what_a_data_plane_has_lost_with_the_daemon_is_made_anew_by_the_daemon_that_comes_after() {
    for who in [0, 1] {
        let mut world = World::new(4, Conditions::PERFECT);
        world.run(Duration::from_secs(12));
        let before: Vec<ChildSaId> = world.nodes[who].pairs.keys().copied().collect();
        let node = &mut world.nodes[who];
        node.plane.sas.clear();
        node.plane.words.clear();
        assert!(node.come_back(world.now).is_ok());
        world.run(Duration::from_secs(30));
        world.assert_agreement();
        let after = &world.nodes[who].pairs;
        assert!(before.iter().all(|sa| !after.contains_key(sa)));
    }
}
