//! What the daemon knows of each configured tunnel beyond its configuration.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    time::Instant,
};

use ipsec_common::{Spi, TrafficSelector};

use super::peers::{Place, all_ways};
use crate::{
    config::Tunnel,
    dataplane::seam::{Ledger, SaId, SaSpec, TunnelId},
    ike::{
        config::ChildName,
        crypto::ChildSuite,
        event::{ChildSaId, OuterAddresses},
        time::Time,
    },
};

/// A tunnel and its state.
#[derive(Debug)]
pub(super) struct TunnelState {
    /// Its configuration.
    pub(super) config: Tunnel,
    /// The operator took it down.
    pub(super) down: bool,
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
#[derive(Debug)]
pub(super) struct SaPair {
    /// The configured child.
    pub(super) child: ChildName,
    /// Id of the inbound SA in the data plane.
    pub(super) inbound: SaId,
    /// Id of the outbound SA in the data plane.
    pub(super) outbound: SaId,
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
#[derive(Debug)]
pub(super) enum Sends {
    /// It must not be used yet.
    NotYet(Box<SaSpec>),
    /// It is installed.
    Now,
    /// Another pair has taken its traffic; the inbound SA is there for what is still on its way.
    NoMore,
}

impl SaPair {
    /// Whether it carries traffic, or is about to.
    pub(super) fn is_in_force(&self) -> bool {
        match self.sends {
            Sends::NotYet(_) | Sends::Now => true,
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

/// All tunnels.
#[derive(Debug, Default)]
pub(super) struct Tunnels {
    by_id: BTreeMap<TunnelId, TunnelState>,
    owners: HashMap<SaId, (TunnelId, ChildSaId)>,
    ledger: HashMap<SaId, Ledger>,
    next_tunnel: u32,
    next_sa: u64,
}

impl Tunnels {
    /// Adds a tunnel.
    pub(super) fn add(&mut self, config: Tunnel) -> TunnelId {
        self.next_tunnel += 1;
        let id = TunnelId(self.next_tunnel);
        self.by_id.insert(
            id,
            TunnelState {
                config,
                down: false,
                pending: false,
                failure: None,
                places: Vec::new(),
                elsewhere: BTreeSet::new(),
                looked_up: Instant::now(),
                failed: BTreeMap::new(),
                mtu: None,
                pairs: BTreeMap::new(),
            },
        );
        id
    }

    pub(super) fn remove(&mut self, id: TunnelId) {
        if let Some(tunnel) = self.by_id.remove(&id) {
            for pair in tunnel.pairs.values() {
                self.forget(pair);
            }
        }
    }

    pub(super) fn get(&self, id: TunnelId) -> Option<&TunnelState> {
        self.by_id.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: TunnelId) -> Option<&mut TunnelState> {
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
        self.next_sa += 1;
        SaId(self.next_sa)
    }

    /// Notes an installed pair.
    pub(super) fn installed(&mut self, id: TunnelId, sa: ChildSaId, pair: SaPair) {
        if let Some(tunnel) = self.by_id.get_mut(&id) {
            self.owners.insert(pair.inbound, (id, sa));
            self.owners.insert(pair.outbound, (id, sa));
            tunnel.pairs.insert(sa, pair);
        }
    }

    /// A pair, and the tunnel that it belongs to.
    pub(super) fn pair_mut(&mut self, sa: ChildSaId) -> Option<(TunnelId, &mut SaPair)> {
        self.by_id
            .iter_mut()
            .find_map(|(id, tunnel)| Some((*id, tunnel.pairs.get_mut(&sa)?)))
    }

    /// Takes a pair out.
    pub(super) fn removed(&mut self, id: TunnelId, sa: ChildSaId) -> Option<SaPair> {
        let pair = self.by_id.get_mut(&id)?.pairs.remove(&sa)?;
        self.forget(&pair);
        Some(pair)
    }

    fn forget(&mut self, pair: &SaPair) {
        for sa in [pair.inbound, pair.outbound] {
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
