//! The configured peers: which may be at an address, which are wanted up, and when one is tried again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::shared::Shared;
use crate::ike::{
    config::{
        ChildConfig, ChildName, NatPolicy, OnDead, PeerConfig, PeerId, Remote, Role, Unique, Way,
    },
    event::Event,
    time::Time,
};

/// First pause after an attempt that failed.
const FIRST_BACK_OFF: Duration = Duration::from_secs(1);
/// Longest pause after an attempt that failed.
const LONGEST_BACK_OFF: Duration = Duration::from_secs(60);

struct Peer {
    config: PeerConfig,
    /// Our address towards the peer while the peer is wanted up.
    wanted: Option<SocketAddr>,
    /// The operator took it down: what it starts is refused until it is wanted up again.
    held: bool,
    failures: u32,
    /// Which of its addresses the next attempt goes to.
    next_way: usize,
    /// Our address towards the peer while its addresses are tried one after the other.
    trying: Option<SocketAddr>,
    again_at: Option<Time>,
    /// Whether an IKE SA with it has been up before.
    met: bool,
    /// Children that wait for traffic or for the peer since the peer was found dead.
    dormant: BTreeSet<ChildName>,
}

impl Peer {
    /// Whether all its children wait for traffic or for the peer.
    fn sleeps(&self) -> bool {
        !self.dormant.is_empty() && self.dormant.len() >= self.config.children.len()
    }
}

/// All peers.
#[derive(Default)]
pub(super) struct Peers {
    by_id: BTreeMap<PeerId, Peer>,
    /// By configured address; none for those that may be anywhere.
    at: HashMap<Option<IpAddr>, BTreeSet<PeerId>>,
    attempts: BTreeSet<(Time, PeerId)>,
    /// Peers with IKE SAs that were restored before the peers are known again.
    pub(super) met_before: BTreeSet<PeerId>,
}

impl Peers {
    fn plan(&mut self, id: PeerId, at: Option<Time>) {
        if let Some(peer) = self.by_id.get_mut(&id) {
            if let Some(before) = peer.again_at {
                self.attempts.remove(&(before, id));
            }
            peer.again_at = at;
            self.attempts.extend(at.map(|at| (at, id)));
        }
    }

    fn leave_addresses(&mut self, id: PeerId) {
        let Some(peer) = self.by_id.get(&id) else {
            return;
        };
        for place in places(&peer.config.remote) {
            if let Some(same) = self.at.get_mut(&place) {
                same.remove(&id);
                if same.is_empty() {
                    self.at.remove(&place);
                }
            }
        }
    }
}

/// The keys of [`Peers::at`] under which a peer is found.
fn places(remote: &Remote) -> Vec<Option<IpAddr>> {
    if remote.ways().is_empty() {
        vec![None]
    } else {
        remote.addresses().map(Some).collect()
    }
}

impl Shared {
    /// Notes a peer; tells whether its addresses are others than before.
    pub(super) fn set_peer(&mut self, config: PeerConfig) -> bool {
        let id = config.id;
        let before = self.peer(id).map(|known| places(&known.remote));
        let moved = before.is_some_and(|before| before != places(&config.remote));
        if moved {
            self.peers.leave_addresses(id);
        }
        for place in places(&config.remote) {
            self.peers.at.entry(place).or_default().insert(id);
        }
        match self.peers.by_id.get_mut(&id) {
            Some(peer) => {
                peer.config = config;
                if moved {
                    peer.next_way = 0;
                }
            }
            None => {
                let met = self.peers.met_before.remove(&id);
                let peer = Peer {
                    config,
                    wanted: None,
                    held: false,
                    failures: 0,
                    next_way: 0,
                    trying: None,
                    again_at: None,
                    met,
                    dormant: BTreeSet::new(),
                };
                self.peers.by_id.insert(id, peer);
            }
        }
        moved
    }

    /// The way that the next attempt with a peer takes, and our address and port on it.
    pub(super) fn next_way(
        &mut self,
        id: PeerId,
        local: SocketAddr,
    ) -> Option<(SocketAddr, IpAddr)> {
        let peer = self.peers.by_id.get_mut(&id)?;
        peer.trying = Some(local);
        let Way {
            remote,
            local: ours,
        } = peer.config.remote.ways().get(peer.next_way).copied()?;
        let ours = ours.unwrap_or(local.ip());
        (ours.is_ipv4() == remote.is_ipv4())
            .then_some((SocketAddr::new(ours, local.port()), remote))
    }

    /// Our address and port towards an address of a peer; what is known of it, or else what the caller has.
    pub(super) fn local_towards(
        &self,
        id: PeerId,
        remote: IpAddr,
        local: SocketAddr,
    ) -> SocketAddr {
        let ways = self.peer(id).map_or(&[][..], |peer| peer.remote.ways());
        let known = ways.iter().find(|way| way.remote == remote);
        let ours = known.and_then(|way| way.local).unwrap_or(local.ip());
        SocketAddr::new(ours, local.port())
    }

    pub(super) fn remove_peer(&mut self, peer: PeerId) {
        self.peers.plan(peer, None);
        self.peers.leave_addresses(peer);
        self.peers.by_id.remove(&peer);
    }

    pub(in crate::ike) fn peer(&self, peer: PeerId) -> Option<&PeerConfig> {
        self.peers.by_id.get(&peer).map(|peer| &peer.config)
    }

    pub(in crate::ike) fn role(&self, peer: PeerId) -> Option<Role> {
        self.peer(peer).map(|peer| peer.role)
    }

    /// Peers that may be at an address: those that are configured with it, then those that may be anywhere. Which of them
    /// it is, its identity tells in IKE_AUTH.
    pub(in crate::ike) fn peers_at(&self, address: IpAddr) -> impl Iterator<Item = &PeerConfig> {
        let at = &self.peers.at;
        [at.get(&Some(address)), at.get(&None)]
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|id| self.peer(*id))
    }

    pub(in crate::ike) fn nat_policy(&self, peer: Option<PeerId>) -> NatPolicy {
        peer.and_then(|peer| self.peer(peer))
            .map_or(NatPolicy::Auto, |peer| peer.nat)
    }

    /// Whether encapsulation is forced on whoever is at an address.
    pub(in crate::ike) fn forces_nat(&self, address: IpAddr) -> bool {
        let mut peers = self.peers_at(address).peekable();
        peers.peek().is_some() && peers.all(|peer| peer.nat == NatPolicy::Force)
    }

    pub(in crate::ike) fn child_lifetime(&self, peer: PeerId, child: ChildName) -> Duration {
        self.peer(peer)
            .and_then(|peer| peer.children.iter().find(|config| config.id == child))
            .map_or(Duration::from_secs(3600), |config| config.lifetime)
    }

    /// Whether the peer may think that we still have IKE SAs from a former life.
    pub(in crate::ike) fn is_first_contact(&self, peer: PeerId) -> bool {
        self.peers.by_id.get(&peer).is_some_and(|peer| !peer.met)
    }

    /// Wants a peer up, from our address, or not any more.
    pub(super) fn want(&mut self, peer: PeerId, local: Option<SocketAddr>) {
        self.peers.plan(peer, None);
        if let Some(peer) = self.peers.by_id.get_mut(&peer) {
            peer.wanted = local;
            peer.dormant.clear();
            peer.failures = 0;
            peer.next_way = 0;
            peer.trying = None;
        }
    }

    /// The peer is dead: some of its children are not started again by us, and if none is, neither is the tunnel.
    pub(super) fn peer_died(&mut self, id: PeerId) {
        let Some(peer) = self.peers.by_id.get_mut(&id) else {
            return;
        };
        let waits = |child: &&ChildConfig| child.on_dead != OnDead::Restart;
        peer.dormant = peer
            .config
            .children
            .iter()
            .filter(waits)
            .map(|child| child.id)
            .collect();
    }

    /// Whether a child waits for traffic or for the peer.
    pub(in crate::ike) fn is_dormant(&self, peer: PeerId, child: ChildName) -> bool {
        self.peers
            .by_id
            .get(&peer)
            .is_some_and(|peer| peer.dormant.contains(&child))
    }

    /// Traffic, or the peer, has asked for a child.
    pub(in crate::ike) fn wake(&mut self, peer: PeerId, child: ChildName) {
        if let Some(peer) = self.peers.by_id.get_mut(&peer) {
            peer.dormant.remove(&child);
        }
    }

    pub(super) fn unique(&self, peer: PeerId) -> Unique {
        self.peer(peer).map_or(Unique::Replace, |peer| peer.unique)
    }

    /// Holds a peer down, so that it cannot bring itself up either, or lets go.
    pub(super) fn hold(&mut self, peer: PeerId, held: bool) {
        if let Some(peer) = self.peers.by_id.get_mut(&peer) {
            peer.held = held;
        }
    }

    /// Whether a peer is held down.
    pub(in crate::ike) fn is_held(&self, peer: PeerId) -> bool {
        self.peers.by_id.get(&peer).is_some_and(|peer| peer.held)
    }

    /// Whether a peer is wanted up.
    pub(in crate::ike) fn wants(&self, peer: PeerId) -> bool {
        self.peers
            .by_id
            .get(&peer)
            .is_some_and(|peer| peer.wanted.is_some() && !peer.sleeps())
    }

    pub(super) fn want_nothing(&mut self) {
        self.peers.attempts.clear();
        for peer in self.peers.by_id.values_mut() {
            peer.wanted = None;
            peer.trying = None;
            peer.again_at = None;
        }
    }

    pub(super) fn attempt_succeeded(&mut self, peer: PeerId) {
        self.peers.plan(peer, None);
        if let Some(peer) = self.peers.by_id.get_mut(&peer) {
            peer.failures = 0;
            peer.next_way = 0;
            peer.trying = None;
            peer.met = true;
        }
    }

    /// The pause before the next attempt with a peer.
    pub(super) fn back_off(&mut self, peer: PeerId) -> Duration {
        let peer = self.peers.by_id.get(&peer);
        let failures = peer.map_or(0, |peer| peer.failures);
        self.pause(failures)
    }

    /// A pause that doubles with each failure.
    pub(in crate::ike) fn pause(&mut self, failures: u32) -> Duration {
        let pause = (FIRST_BACK_OFF * 2_u32.saturating_pow(failures.min(8))).min(LONGEST_BACK_OFF);
        pause + self.jitter(pause)
    }

    /// Plans the next attempt of a peer that is wanted up: after one that failed at once with the next address, and
    /// after the last address with a pause.
    pub(super) fn try_again(&mut self, id: PeerId, now: Time, failed: bool) {
        if let (true, Some(peer)) = (failed, self.peers.by_id.get_mut(&id)) {
            peer.next_way += 1;
            if peer.trying.is_some() && peer.next_way < peer.config.remote.ways().len() {
                return self.peers.plan(id, Some(now));
            }
            peer.next_way = 0;
            peer.trying = None;
            self.events.push_back(Event::Exhausted(id));
        }
        let pause = self.back_off(id);
        if failed && let Some(peer) = self.peers.by_id.get_mut(&id) {
            peer.failures = peer.failures.saturating_add(1);
        }
        if failed || self.wants(id) {
            self.peers.plan(id, Some(now + pause));
        }
    }

    /// Whether an attempt has failed so recently that traffic must not cause another.
    pub(super) fn is_backing_off(&self, peer: PeerId, now: Time) -> bool {
        self.peers
            .by_id
            .get(&peer)
            .and_then(|peer| peer.again_at)
            .is_some_and(|at| at > now)
    }

    /// Has a peer that is wanted up tried at once.
    pub(super) fn try_now(&mut self, peer: PeerId, now: Time) {
        if self.wants(peer) {
            self.peers.plan(peer, Some(now));
        }
    }

    pub(super) fn next_attempt(&self) -> Option<Time> {
        self.peers.attempts.first().map(|(at, _)| *at)
    }

    /// Peers whose next attempt is due, and our addresses towards them.
    pub(super) fn due_attempts(&mut self, now: Time) -> Vec<(PeerId, SocketAddr)> {
        let mut due = Vec::new();
        while let Some((at, id)) = self.peers.attempts.first().copied()
            && at <= now
        {
            self.peers.plan(id, None);
            let peer = self.peers.by_id.get(&id);
            let wanted = peer
                .filter(|peer| !peer.sleeps())
                .and_then(|peer| peer.wanted.or(peer.trying));
            due.extend(wanted.map(|local| (id, local)));
        }
        due
    }
}
