//! What the daemon knows of each configured tunnel beyond its configuration.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::IpAddr,
    ops::Bound,
    time::Instant,
};

use ipsec_common::{Spi, TrafficSelector};
use serde::{Deserialize, Serialize};

use super::{
    journal::{Changes, Key},
    peers::{Place, all_ways},
    reload,
};
use crate::{
    config::Tunnel,
    dataplane::seam::{Ledger, PoliciesReason, SaId, SaSpec, TunnelId},
    ike::{
        config::ChildName,
        crypto::ChildSuite,
        event::{ChildSaId, OuterAddresses},
        time::Time,
    },
    wiped::Wiped,
};

/// A tunnel and its state.
#[derive(Debug)]
pub(super) struct TunnelState {
    /// Its configuration.
    pub(super) config: Tunnel,
    /// The operator took it down.
    pub(super) down: bool,
    /// The operator brought it up, whatever its role.
    pub(super) raised: bool,
    /// It should be brought up as soon as there is a route to its peer.
    pub(super) pending: bool,
    /// The last failure, until it is up.
    pub(super) failure: Option<String>,
    /// Where its peer is, as far as that is known.
    pub(super) places: Vec<Place>,
    /// Where its peer has moved to since.
    pub(super) elsewhere: BTreeSet<IpAddr>,
    /// When its peer was looked up last.
    pub(super) looked_up: Instant,
    /// Why the last attempt with an address of the peer failed, if it did.
    pub(super) failed: BTreeMap<IpAddr, String>,
    /// MTU of its device.
    pub(super) mtu: Option<u16>,
    /// Why it has no device, if it has none.
    pub(super) policies: Option<PoliciesReason>,
    /// Index of its device before and after it went to another engine last.
    pub(super) device_changed: Option<(u32, u32)>,
    /// Pairs of SAs that are installed.
    pub(super) pairs: BTreeMap<ChildSaId, SaPair>,
}

impl TunnelState {
    /// Our address towards the peer: the first that is known.
    pub(super) fn local(&self) -> Option<IpAddr> {
        all_ways(&self.places).iter().find_map(|way| way.local)
    }
}

/// A pair of installed SAs.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SaPair {
    /// The configured child.
    pub(super) child: ChildName,
    /// The inbound SA, as the data plane has it.
    pub(super) ours: SaSpec,
    /// The outbound SA, as the data plane has it or will have it.
    pub(super) theirs: SaSpec,
    /// What has become of the outbound SA.
    pub(super) sends: Sends,
    /// Inbound SPI.
    pub(super) spi_in: Spi,
    /// Outbound SPI.
    pub(super) spi_out: Spi,
    /// Algorithms.
    pub(super) suite: ChildSuite,
    /// Our selectors.
    pub(super) local: Vec<TrafficSelector>,
    /// The peer's selectors.
    pub(super) remote: Vec<TrafficSelector>,
    /// Outer addresses.
    pub(super) outer: OuterAddresses,
    /// When it was installed.
    pub(super) since: Time,
}

/// What has become of the outbound SA of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Sends {
    /// It must not be used yet.
    NotYet,
    /// It is installed.
    Now,
    /// Another pair has taken its traffic; the inbound SA is there for what is still on its way.
    NoMore,
}

impl SaPair {
    /// The SAs that the data plane has of it, in the order in which it got them.
    pub(super) fn installed(&self) -> impl Iterator<Item = &SaSpec> {
        let theirs = match self.sends {
            Sends::Now => Some(&self.theirs),
            Sends::NotYet | Sends::NoMore => None,
        };
        [&self.ours].into_iter().chain(theirs)
    }

    /// Whether it carries traffic, or is about to.
    pub(super) fn is_in_force(&self) -> bool {
        match self.sends {
            Sends::NotYet | Sends::Now => true,
            Sends::NoMore => false,
        }
    }
}

impl TunnelState {
    /// Whether a child is up.
    pub(super) fn carries(&self) -> bool {
        self.pairs.values().any(SaPair::is_in_force)
    }
}

/// Names that are given out next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Names {
    tunnel: u32,
    sa: u64,
}

/// What is saved of a tunnel.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedTunnel {
    /// Its name.
    pub(super) name: String,
    /// What its SAs were negotiated under.
    pub(super) terms: Vec<u8>,
    /// The operator took it down.
    pub(super) down: bool,
    /// The operator brought it up.
    #[serde(default)]
    pub(super) raised: bool,
    /// Where its peer was.
    pub(super) places: Vec<Place>,
    /// Where its peer was besides.
    pub(super) elsewhere: BTreeSet<IpAddr>,
}

/// What is saved of a pair of SAs.
#[derive(Debug, Serialize)]
struct SavedPair<'a> {
    tunnel: TunnelId,
    pair: &'a SaPair,
}

/// A pair of SAs that was saved.
#[derive(Debug, Deserialize)]
pub(super) struct RestoredPair {
    /// Its tunnel.
    pub(super) tunnel: TunnelId,
    /// What is known of it.
    pub(super) pair: SaPair,
}

/// All tunnels.
#[derive(Debug, Default)]
pub(super) struct Tunnels {
    by_id: BTreeMap<TunnelId, TunnelState>,
    owners: HashMap<SaId, (TunnelId, ChildSaId)>,
    /// The tunnels of pairs.
    homes: BTreeMap<ChildSaId, TunnelId>,
    ledger: HashMap<SaId, Ledger>,
    names: Names,
    /// What is not saved as it is now.
    changed: BTreeSet<Key>,
}

impl Tunnels {
    /// None yet; names are given out from these on.
    pub(super) fn named_after(names: Names) -> Self {
        Self {
            names,
            ..Self::default()
        }
    }

    /// Adds a tunnel.
    pub(super) fn add(&mut self, config: Tunnel) -> TunnelId {
        self.names.tunnel += 1;
        let id = TunnelId(self.names.tunnel);
        self.put_in(id, config);
        id
    }

    /// Adds a tunnel under the name that it has had.
    pub(super) fn put_in(&mut self, id: TunnelId, config: Tunnel) {
        self.changed.extend([Key::Names, Key::Tunnel(id)]);
        self.by_id.insert(
            id,
            TunnelState {
                config,
                down: false,
                raised: false,
                pending: false,
                failure: None,
                places: Vec::new(),
                elsewhere: BTreeSet::new(),
                looked_up: Instant::now(),
                failed: BTreeMap::new(),
                mtu: None,
                policies: None,
                device_changed: None,
                pairs: BTreeMap::new(),
            },
        );
    }

    /// What has changed since this was asked last.
    ///
    /// # Errors
    ///
    /// It cannot be written down.
    pub(super) fn changes(&mut self) -> io::Result<Changes> {
        let changed = std::mem::take(&mut self.changed);
        changed
            .into_iter()
            .map(|key| Ok((key, self.saved(key).transpose()?)))
            .collect()
    }

    /// All parts after a key, in their order.
    pub(super) fn parts_after(
        &self,
        after: Option<Key>,
    ) -> impl Iterator<Item = (Key, io::Result<Wiped>)> {
        use Bound::{Excluded, Unbounded};
        let (names, tunnels, pairs) = match after {
            None | Some(Key::Endpoint(_)) => (Some(Key::Names), Some(Unbounded), Unbounded),
            Some(Key::Names) => (None, Some(Unbounded), Unbounded),
            Some(Key::Tunnel(id)) => (None, Some(Excluded(id)), Unbounded),
            Some(Key::Pair(sa)) => (None, None, Excluded(sa)),
        };
        let tunnels = tunnels
            .into_iter()
            .flat_map(|after| self.by_id.range((after, Unbounded)))
            .map(|(id, _)| Key::Tunnel(*id));
        let pairs = self.homes.range((pairs, Unbounded));
        names
            .into_iter()
            .chain(tunnels)
            .chain(pairs.map(|(sa, _)| Key::Pair(*sa)))
            .filter_map(|key| Some((key, self.saved(key)?)))
    }

    fn saved(&self, key: Key) -> Option<io::Result<Wiped>> {
        match key {
            Key::Endpoint(_) => None,
            Key::Names => Some(Wiped::of(&self.names)),
            Key::Tunnel(id) => self.by_id.get(&id).map(|tunnel| {
                Wiped::of(&SavedTunnel {
                    name: tunnel.config.name.clone(),
                    terms: reload::terms(&tunnel.config),
                    down: tunnel.down,
                    raised: tunnel.raised,
                    places: tunnel.places.clone(),
                    elsewhere: tunnel.elsewhere.clone(),
                })
            }),
            Key::Pair(sa) => {
                let tunnel = *self.homes.get(&sa)?;
                let pair = self.by_id.get(&tunnel)?.pairs.get(&sa)?;
                Some(Wiped::of(&SavedPair { tunnel, pair }))
            }
        }
    }

    /// As if everything had changed.
    pub(super) fn everything_has_changed(&mut self) {
        self.changed.insert(Key::Names);
        for (id, tunnel) in &self.by_id {
            self.changed.insert(Key::Tunnel(*id));
            self.changed
                .extend(tunnel.pairs.keys().map(|sa| Key::Pair(*sa)));
        }
    }

    pub(super) fn remove(&mut self, id: TunnelId) {
        if let Some(tunnel) = self.by_id.remove(&id) {
            self.changed.insert(Key::Tunnel(id));
            self.changed
                .extend(tunnel.pairs.keys().map(|sa| Key::Pair(*sa)));
            for (sa, pair) in &tunnel.pairs {
                self.forget(*sa, pair);
            }
        }
    }

    pub(super) fn get(&self, id: TunnelId) -> Option<&TunnelState> {
        self.by_id.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: TunnelId) -> Option<&mut TunnelState> {
        self.changed.insert(Key::Tunnel(id));
        self.by_id.get_mut(&id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (TunnelId, &TunnelState)> {
        self.by_id.iter().map(|(id, tunnel)| (*id, tunnel))
    }

    pub(super) fn find(&self, name: &str) -> Option<TunnelId> {
        self.iter()
            .find(|(_, tunnel)| tunnel.config.name == name)
            .map(|(id, _)| id)
    }

    /// The tunnel that a stranger at this address would be the peer of, if there is just one that is not up.
    pub(super) fn waiting_at(&self, address: IpAddr) -> Option<TunnelId> {
        let mut called = self.iter().filter(|(_, tunnel)| {
            !tunnel.carries()
                && all_ways(&tunnel.places)
                    .iter()
                    .any(|way| way.remote == address)
        });
        match (called.next(), called.next()) {
            (Some((id, _)), None) => Some(id),
            _ => None,
        }
    }

    /// A name for an SA in the data plane.
    pub(super) fn new_sa(&mut self) -> SaId {
        self.names.sa += 1;
        self.changed.insert(Key::Names);
        SaId(self.names.sa)
    }

    /// Notes an installed pair.
    pub(super) fn installed(&mut self, id: TunnelId, sa: ChildSaId, pair: SaPair) {
        if let Some(tunnel) = self.by_id.get_mut(&id) {
            self.changed.insert(Key::Pair(sa));
            self.owners.insert(pair.ours.id, (id, sa));
            self.owners.insert(pair.theirs.id, (id, sa));
            self.homes.insert(sa, id);
            tunnel.pairs.insert(sa, pair);
        }
    }

    /// A pair, and the tunnel that it belongs to.
    pub(super) fn pair_mut(&mut self, sa: ChildSaId) -> Option<(TunnelId, &mut SaPair)> {
        let id = *self.homes.get(&sa)?;
        self.changed.insert(Key::Pair(sa));
        let pair = self.by_id.get_mut(&id)?.pairs.get_mut(&sa)?;
        Some((id, pair))
    }

    /// Takes a pair out.
    pub(super) fn removed(&mut self, id: TunnelId, sa: ChildSaId) -> Option<SaPair> {
        let pair = self.by_id.get_mut(&id)?.pairs.remove(&sa)?;
        self.changed.insert(Key::Pair(sa));
        self.forget(sa, &pair);
        Some(pair)
    }

    fn forget(&mut self, sa: ChildSaId, pair: &SaPair) {
        self.homes.remove(&sa);
        for sa in [pair.ours.id, pair.theirs.id] {
            self.owners.remove(&sa);
            self.ledger.remove(&sa);
        }
    }

    /// The pair that an SA of the data plane belongs to.
    pub(super) fn owner(&self, sa: SaId) -> Option<(TunnelId, ChildSaId)> {
        self.owners.get(&sa).copied()
    }

    /// Notes how an SA is carried.
    pub(super) fn note_ledger(&mut self, ledger: Ledger) {
        self.ledger.insert(ledger.sa, ledger);
    }

    /// How an SA is carried.
    pub(super) fn ledger(&self, sa: SaId) -> Option<&Ledger> {
        self.ledger.get(&sa)
    }
}
