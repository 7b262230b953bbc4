//! A tunnel that is up goes from one engine to the other, and no packet is lost.
//!
//! The other engine gets the tunnel, with a device aside, and the daemon is told that the SAs near their end: it has every child
//! rekeyed, as it does at any end of a life, and what it installs from then on is the other engine's. So no key is ever in both. Routes
//! lead into the old device, and packets take the old SAs, whose removal waits, until each has a successor. Then the routes go
//! over, one by one and each in one step, those of others with ours; the devices swap names. What is still on its way in the old
//! inbound SAs is received by the old engine until the last of them is removed, and its device with it.

use std::collections::{BTreeMap, BTreeSet};

use super::Engines;
use crate::{
    dataplane::{
        routing::Place,
        seam::{
            Command, Direction, Event, KernelReason, LifetimeKind, Rejected, SaId, TunnelId,
            TunnelSpec,
        },
    },
    net::sysctl,
};

/// Where a tunnel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Home {
    Xdp,
    /// There for that reason.
    Kernel(KernelReason),
}

impl Home {
    pub(super) fn is_other(self, than: Self) -> bool {
        matches!(self, Self::Xdp) != matches!(than, Self::Xdp)
    }

    pub(super) fn other(self) -> Self {
        match self {
            Self::Xdp => Self::Kernel(KernelReason::Configured),
            Self::Kernel(_) => Self::Xdp,
        }
    }
}

/// All tunnels on their way.
#[derive(Debug, Default)]
pub(super) struct Moves(BTreeMap<TunnelId, Move>);

#[derive(Debug)]
struct Move {
    to: Home,
    /// The tunnel's device.
    device: String,
    /// Whether the routes lead into the new one.
    switched: bool,
    /// Outbound SAs of the old engine that nobody wants any more.
    held: BTreeSet<SaId>,
    /// How strictly the kernel looked at sources on the new device, to be set again.
    rp_filter: Option<String>,
    /// What the tunnel is to be once this is over, if that is with the engine that it comes from: half a move cannot be undone,
    /// for some children have their keys in the other engine already.
    then: Option<TunnelSpec>,
}

impl Moves {
    pub(super) fn has(&self, id: TunnelId) -> bool {
        self.0.contains_key(&id)
    }

    /// Where new SAs of a tunnel on its way belong.
    pub(super) fn home_of_new(&self, id: TunnelId) -> Option<Home> {
        self.0.get(&id).map(|one| one.to)
    }
}

/// Name of the device of a tunnel that is not in use yet.
fn before(id: TunnelId) -> String {
    format!("ipsecmv{:x}", id.0)
}

/// Name of the device of a tunnel that is in use no more.
fn after(id: TunnelId) -> String {
    format!("ipsecol{:x}", id.0)
}

/// Whether the kernel looks at the way back to a packet's source on every device, whatever is set for that one.
fn looks_at_ways_back() -> bool {
    sysctl::get(&["net", "ipv4", "conf", "all", "rp_filter"]).is_ok_and(|set| set != "0")
}

/// Lets packets arrive on a device though the way back to their source is another one; returns what was set before.
fn take_from_any_way(device: &str) -> Option<String> {
    const NOT_AT_ALL: &str = "0";
    const LOOSE: &str = "2";
    let setting = ["net", "ipv4", "conf", device, "rp_filter"];
    let before = sysctl::get(&setting).ok()?;
    // The greater of the device's and of that for all counts.
    let wanted = if looks_at_ways_back() {
        LOOSE
    } else {
        NOT_AT_ALL
    };
    sysctl::set(&setting, wanted).ok()?;
    Some(before)
}

impl Engines {
    /// Lets a tunnel that one engine carries go to the other.
    pub(super) async fn begin_move(
        &self,
        moves: &mut Moves,
        spec: TunnelSpec,
        to: Home,
    ) -> Result<(), Rejected> {
        let (id, device) = (spec.id, spec.device.clone());
        let kernel = self.kernel.get();
        if kernel.is_some_and(|kernel| kernel.is_without_device(&spec)) {
            return Err(Rejected::Immovable);
        }
        let old = self.device(to.other(), id).await.map(|(name, _)| name);
        if old.as_ref() != Some(&device) {
            // Its device is to be another one: nothing of it stays.
            self.remove_from(to.other(), id).await?;
            return self.put(to, spec, Place::InUse).await;
        }
        let lodge = self.xdp.lodge();
        let staged = TunnelSpec {
            device: before(id),
            ..spec
        };
        // Before anything can come out of it.
        lodge.expect_beside(id, vec![before(id), after(id)]).await;
        if let Err(rejected) = self.put(to, staged, Place::Aside).await {
            let _ = self.remove_from(to, id).await;
            lodge.expect_beside(id, Vec::new()).await;
            return Err(rejected);
        }
        // The old device takes what comes in late, the new one what comes in early. What the kernel has decrypted it takes anyway.
        if looks_at_ways_back()
            && let Some((_, tun)) = self.xdp.device(id).await
            && let Err(error) = self.netlink.add_stand_in(tun).await
        {
            tracing::warn!(%error, "packets on their way may be refused");
        }
        take_from_any_way(&device);
        let one = Move {
            to,
            device,
            switched: false,
            held: BTreeSet::new(),
            rp_filter: take_from_any_way(&before(id)),
            then: None,
        };
        self.ask_for_successors(id, &one).await;
        moves.0.insert(id, one);
        // Nothing is to follow on a move that has just begun.
        let _ = self.advance(moves, id).await;
        Ok(())
    }

    /// Has the daemon rekey the children that are still with the old engine.
    async fn ask_for_successors(&self, id: TunnelId, one: &Move) {
        for (sa, direction) in self.sas_of(one.to.other(), id).await {
            if direction == Direction::Outbound && !one.held.contains(&sa) {
                let kind = LifetimeKind::Soft;
                self.xdp.lodge().send(Event::Lifetime { sa, kind });
            }
        }
    }

    /// Another daemon has come: the one before it may have died of hearing what it was asked for.
    pub(super) async fn ask_again(&self, moves: &Moves) {
        for (id, one) in &moves.0 {
            self.ask_for_successors(*id, one).await;
        }
    }

    /// A tunnel on its way has other settings: both engines go by them. If it is to be where it comes from, it goes back when it
    /// has arrived.
    pub(super) async fn keep_up(
        &self,
        moves: &mut Moves,
        spec: TunnelSpec,
        home: Home,
    ) -> Result<(), Rejected> {
        let one = moves.0.get_mut(&spec.id).ok_or(Rejected::UnknownTunnel)?;
        if one.device != spec.device {
            return Err(Rejected::by_kernel(
                "change the tunnel's device",
                &"it is on its way to the other engine still: try again in some seconds",
            ));
        }
        if one.to.is_other(home) {
            tracing::info!(
                tunnel = spec.name,
                "the tunnel goes back to the engine that it comes from when it has arrived"
            );
            one.then = Some(spec.clone());
        } else {
            one.to = home;
            one.then = None;
        }
        let (new, old) = if one.switched {
            (
                (one.device.clone(), Place::InUse),
                (after(spec.id), Place::Aside),
            )
        } else {
            (
                (before(spec.id), Place::Aside),
                (one.device.clone(), Place::InUse),
            )
        };
        let goes_back = one.then.is_some();
        for (home, (device, place)) in [(one.to, new), (one.to.other(), old)] {
            let spec = TunnelSpec {
                device,
                ..spec.clone()
            };
            let set = match (home, place) {
                // Not as one that is new there.
                (Home::Xdp, Place::InUse) => {
                    let set = Command::SetTunnel(Box::new(spec));
                    self.xdp.command(set).await.map(|_| ())
                }
                (home, place) => self.put(home, spec, place).await,
            };
            match set {
                // What it is to be at the end of the way back need not please the engine that it only passes.
                Err(error) if goes_back => {
                    tracing::debug!(%error, "settings wait for the way back")
                }
                set => set?,
            }
        }
        Ok(())
    }

    /// A tunnel is removed: if it was on its way, the half of it that is not in use goes first.
    pub(super) async fn give_up_move(&self, moves: &mut Moves, id: TunnelId) {
        if let Some(one) = moves.0.remove(&id) {
            let aside = if one.switched { one.to.other() } else { one.to };
            if let Err(error) = self.remove_from(aside, id).await {
                tracing::warn!(%error, "a tunnel's second device stays behind");
            }
        }
    }

    /// Whether an SA stays though it is to be removed: packets may take it until all of its tunnel have successors.
    pub(super) async fn is_held(&self, moves: &mut Moves, id: SaId) -> bool {
        for (tunnel, one) in &mut moves.0 {
            let old = self.sas_of(one.to.other(), *tunnel).await;
            if old.contains(&(id, Direction::Outbound)) {
                one.held.insert(id);
                return true;
            }
        }
        false
    }

    /// Does the next step for all tunnels on their way.
    pub(super) async fn advance_all(&self, moves: &mut Moves) {
        let ids: Vec<TunnelId> = moves.0.keys().copied().collect();
        for id in ids {
            let Some(spec) = self.advance(moves, id).await else {
                continue;
            };
            let name = spec.name.clone();
            let back = match self.home_for(&spec).await {
                Ok(home) => self.begin_move(moves, spec, home).await,
                Err(rejected) => Err(rejected),
            };
            if let Err(error) = back {
                tracing::warn!(tunnel = name, %error, "the tunnel does not go back to the engine that it comes from");
            }
        }
    }

    /// Does the next step for a tunnel on its way. If that was the last one, returns what the tunnel is to be then.
    async fn advance(&self, moves: &mut Moves, id: TunnelId) -> Option<TunnelSpec> {
        let one = moves.0.get_mut(&id)?;
        let old = self.sas_of(one.to.other(), id).await;
        let waits = |(sa, direction): &(SaId, Direction)| match direction {
            Direction::Outbound => !one.held.contains(sa),
            Direction::Inbound => false,
        };
        if !one.switched && !old.iter().any(waits) {
            one.switched = true;
            self.switch(one, id).await;
        }
        let receives = old
            .iter()
            .any(|(_, direction)| *direction == Direction::Inbound);
        if one.switched && !receives {
            return self.finish(moves, id).await;
        }
        None
    }

    /// Leads the routes into the new device, and gives it the name of the old one.
    async fn switch(&self, one: &Move, id: TunnelId) {
        let (Some((old_name, from)), Some((_, to))) = (
            self.device(one.to.other(), id).await,
            self.device(one.to, id).await,
        ) else {
            return tracing::error!("a tunnel on its way has lost a device");
        };
        let told = |what: &str, error: &dyn std::fmt::Display| {
            tracing::warn!(tunnel = old_name, "{what}: {error}");
        };
        if let Err(error) = self.netlink.inherit_addresses(from, to).await {
            told("not all addresses follow the tunnel", &error);
        }
        self.xdp.lodge().hand_over_routes(id, from, to).await;
        let renamed = match self.netlink.rename(from, &after(id)).await {
            Ok(_) => self.netlink.rename(to, &one.device).await,
            Err(error) => Err(error),
        };
        for (home, place, device) in [
            (one.to.other(), Place::Aside, after(id)),
            (one.to, Place::InUse, one.device.clone()),
        ] {
            if let Err(error) = self.put_at(home, id, place, &device).await {
                told("a device is not as it should be", &error);
            }
        }
        match renamed {
            Ok(false) => {}
            // It was down for a moment.
            Ok(true) => self.xdp.lodge().hand_over_routes(id, from, to).await,
            Err(error) => told(
                "the new device does not get the name of the old one",
                &error,
            ),
        }
        if let Err(error) = self.netlink.remove_addresses(from).await {
            told("addresses stay on the old device", &error);
        }
        self.xdp.lodge().send(Event::DeviceChanged {
            tunnel: id,
            from,
            to,
        });
    }

    /// Nothing comes out of the old device any more.
    async fn finish(&self, moves: &mut Moves, id: TunnelId) -> Option<TunnelSpec> {
        let one = moves.0.remove(&id)?;
        if let (Some((_, from)), Some((_, to))) = (
            self.device(one.to.other(), id).await,
            self.device(one.to, id).await,
        ) {
            // Somebody may have routed into it since.
            self.xdp.lodge().hand_over_routes(id, from, to).await;
        }
        if let Some((_, tun)) = self.xdp.device(id).await
            && let Err(error) = self.netlink.remove_stand_in(tun).await
        {
            tracing::warn!(%error, "an address of ours stays on a tunnel's device");
        }
        if let Err(error) = self.remove_from(one.to.other(), id).await {
            tracing::warn!(%error, "a tunnel's old device stays behind");
        }
        if let Some(before) = &one.rp_filter {
            let _ = sysctl::set(&["net", "ipv4", "conf", &one.device, "rp_filter"], before);
        }
        self.xdp.lodge().expect_beside(id, Vec::new()).await;
        one.then
    }

    /// The SAs that an engine has of a tunnel.
    async fn sas_of(&self, home: Home, id: TunnelId) -> Vec<(SaId, Direction)> {
        match (home, self.kernel.get()) {
            (Home::Xdp, _) => self.xdp.sas_of(id),
            (Home::Kernel(_), Some(kernel)) => kernel.sas_of(id).await,
            (Home::Kernel(_), None) => Vec::new(),
        }
    }

    /// Whether an engine has an SA.
    pub(super) async fn has_sa(&self, home: Home, id: SaId) -> bool {
        match (home, self.kernel.get()) {
            (Home::Xdp, _) => self.xdp.has_sa(id),
            (Home::Kernel(_), Some(kernel)) => kernel.has_sa(id).await,
            (Home::Kernel(_), None) => false,
        }
    }

    /// The device that an engine has for a tunnel: its name and its index.
    async fn device(&self, home: Home, id: TunnelId) -> Option<(String, u32)> {
        match home {
            Home::Xdp => self.xdp.device(id).await,
            Home::Kernel(_) => self.kernel.get()?.device(id).await,
        }
    }

    async fn put_at(
        &self,
        home: Home,
        id: TunnelId,
        place: Place,
        device: &str,
    ) -> Result<(), Rejected> {
        match (home, self.kernel.get()) {
            (Home::Xdp, _) => self.xdp.put_tunnel(id, place, device).await,
            (Home::Kernel(_), Some(kernel)) => kernel.put_tunnel(id, place, device).await,
            (Home::Kernel(_), None) => Err(Rejected::UnknownTunnel),
        }
    }

    async fn remove_from(&self, home: Home, id: TunnelId) -> Result<(), Rejected> {
        let remove = Command::RemoveTunnel(id);
        let removed = match (home, self.kernel.get()) {
            (Home::Xdp, _) => self.xdp.command(remove).await,
            (Home::Kernel(_), Some(kernel)) => kernel.command(remove).await,
            (Home::Kernel(_), None) => Ok(None),
        };
        match removed {
            Ok(_) | Err(Rejected::UnknownTunnel) => Ok(()),
            Err(rejected) => Err(rejected),
        }
    }
}
