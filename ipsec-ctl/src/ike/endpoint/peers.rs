//! The configured peers: which may be at an address, which are wanted up, and when one is tried again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::shared::Shared;
use crate::ike::{
    config::{ChildName, NatPolicy, PeerConfig, PeerId, Role},
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
    again_at: Option<Time>,
    /// Whether an IKE SA with it has been up before.
    met: bool,
}

/// All peers.
#[derive(Default)]
pub(super) struct Peers {
    by_id: BTreeMap<PeerId, Peer>,
    /// By configured address; none for those that may be anywhere.
    at: HashMap<Option<IpAddr>, BTreeSet<PeerId>>,
    attempts: BTreeSet<(Time, PeerId)>,
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

    fn leave_address(&mut self, id: PeerId) {
        let address = self.by_id.get(&id).map(|peer| peer.config.remote);
        if let Some(same) = address.and_then(|address| self.at.get_mut(&address)) {
            same.remove(&id);
        }
        self.at.retain(|_, same| !same.is_empty());
    }
}

impl Shared {
    pub(super) fn set_peer(&mut self, config: PeerConfig) {
        let (id, address) = (config.id, config.remote);
        if self.peer(id).is_some_and(|known| known.remote != address) {
            self.peers.leave_address(id);
        }
        self.peers.at.entry(address).or_default().insert(id);
        match self.peers.by_id.get_mut(&id) {
            Some(peer) => peer.config = config,
            None => {
                let peer = Peer {
                    config,
                    wanted: None,
                    held: false,
                    failures: 0,
                    again_at: None,
                    met: false,
                };
                self.peers.by_id.insert(id, peer);
            }
        }
    }

    pub(super) fn remove_peer(&mut self, peer: PeerId) {
        self.peers.plan(peer, None);
        self.peers.leave_address(peer);
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
            peer.failures = 0;
        }
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
            .is_some_and(|peer| peer.wanted.is_some())
    }

    pub(super) fn want_nothing(&mut self) {
        self.peers.attempts.clear();
        for peer in self.peers.by_id.values_mut() {
            peer.wanted = None;
            peer.again_at = None;
        }
    }

    pub(super) fn attempt_succeeded(&mut self, peer: PeerId) {
        self.peers.plan(peer, None);
        if let Some(peer) = self.peers.by_id.get_mut(&peer) {
            peer.failures = 0;
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

    /// Plans the next attempt of a peer that is wanted up.
    pub(super) fn try_again(&mut self, id: PeerId, now: Time, failed: bool) {
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
            let wanted = self.peers.by_id.get(&id).and_then(|peer| peer.wanted);
            due.extend(wanted.map(|local| (id, local)));
        }
        due
    }
}
