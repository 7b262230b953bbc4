//! A node of the simulation that may die: a daemon, its data plane, and what outlives either.
//!
//! A node saves, installs and transmits in the order in which the daemon does. It dies when its fuse has burnt down, which
//! each write, each act on the data plane and each datagram shortens. What it has saved and its data plane are still there
//! when it comes back; a data plane that dies leaves the words in which its SAs have counted, unless these are lost, too.
//! What must never happen, on either side, a [`Witness`] sees.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};

use super::{
    network::{Network, Seeded},
    pair::{A, B, PEER, limits},
};
use crate::ike::{
    Endpoint,
    config::{PeerConfig, Role},
    endpoint::Part,
    event::{ChildSaId, ChildUp, Command, Event},
    job::JobResult,
    time::Time,
};
use crate::wiped::Wiped;

/// The daemon is dead.
pub(super) struct Died;

pub(super) type Alive<T = ()> = Result<T, Died>;
type Key = Vec<u8>;

/// Everything that must not happen, on either side.
#[derive(Default)]
pub(super) struct Witness {
    pub(super) sealed: Vec<(u32, Key, u64)>,
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
pub(super) struct Words {
    last: u64,
    seen: BTreeSet<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Way {
    In,
    Out,
}

pub(super) struct Sa {
    spi: u32,
    key: Key,
}

/// A data plane: what is installed, and the words that outlive its process.
#[derive(Default)]
pub(super) struct Plane {
    pub(super) sas: BTreeMap<(ChildSaId, Way), Sa>,
    pub(super) words: BTreeMap<Key, Words>,
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
    pub(super) fn send(&mut self, witness: &mut Witness) -> Option<(u32, Key, u64)> {
        let (_, sa) = self.sas.iter().rfind(|((_, way), _)| *way == Way::Out)?;
        let words = self.words.get_mut(&sa.key).unwrap();
        words.last += 1;
        witness.seals(sa.spi, &sa.key, words.last);
        Some((sa.spi, sa.key.clone(), words.last))
    }

    /// Takes a packet, which may have come before.
    pub(super) fn receive(&mut self, packet: &(u32, Key, u64), witness: &mut Witness) -> bool {
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
pub(super) struct Known {
    up: ChildUp,
    sends: bool,
}

/// What outlives a daemon.
#[derive(Default)]
struct Store {
    parts: BTreeMap<Part, Wiped>,
    pairs: BTreeMap<ChildSaId, Wiped>,
}

pub(super) struct Node {
    pub(super) address: IpAddr,
    config: PeerConfig,
    pub(super) endpoint: Endpoint,
    pub(super) pairs: BTreeMap<ChildSaId, Known>,
    changed: BTreeSet<ChildSaId>,
    in_doubt: Option<BTreeSet<ChildSaId>>,
    pub(super) jobs: Vec<JobResult>,
    store: Store,
    pub(super) plane: Plane,
    seed: u64,
    lives: u64,
    /// What it can still do before it dies; for ever if there is none.
    pub(super) fuse: Option<u32>,
    /// The fuse of the daemon that comes after it.
    pub(super) next_fuse: Option<u32>,
    pub(super) deaths: u32,
}

impl Node {
    pub(super) fn new(seed: u64, config: PeerConfig) -> Self {
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

    pub(super) fn save(&mut self) -> Alive {
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

    pub(super) fn drain(
        &mut self,
        now: Time,
        network: &mut Network,
        witness: &mut Witness,
    ) -> Alive {
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
    pub(super) fn come_back(&mut self, now: Time) -> Alive {
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
    pub(super) fn lose_plane(&mut self, now: Time, words: bool) {
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

    pub(super) fn tell(&mut self, now: Time, command: Command) {
        self.endpoint.handle_command(now, command);
    }
}
