//! What the endpoint and the data plane tell, and what the daemon makes of it: installs, removals, lines in the log.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{Duration, Instant},
};

use tracing::{debug, info, warn};

use super::{
    convert,
    gateway::Gateway,
    peers::all_ways,
    tunnels::{SaPair, Sends},
};
use crate::{
    dataplane::{
        seam::{self, Before, Direction, LifetimeKind, SaId, TunnelId},
        xdp::slow::monotonic_seconds,
    },
    ike::{
        config::{ChildName, PeerId},
        event::{ChildSaId, ChildUp, Command, DownReason, Event, Failure, IkeUp},
        negotiate::selectors,
        time::Time,
    },
};

/// Lines about failures within [`WINDOW`]; a flood must not fill the disk.
const MOST_LINES: u32 = 20;
const WINDOW: Duration = Duration::from_secs(10);

/// Limits the rate of lines that strangers can cause.
#[derive(Debug, Default)]
pub(super) struct LogLimit {
    window: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl LogLimit {
    /// Whether one more line may be written.
    fn allows(&mut self, now: Instant) -> bool {
        if self
            .window
            .is_none_or(|start| now.duration_since(start) >= WINDOW)
        {
            if self.suppressed > 0 {
                warn!("{} similar failures were not logged", self.suppressed);
            }
            *self = Self {
                window: Some(now),
                ..Self::default()
            };
        }
        self.lines += 1;
        let allowed = self.lines <= MOST_LINES;
        if !allowed {
            self.suppressed += 1;
        }
        allowed
    }
}

fn tunnel_of(peer: PeerId) -> TunnelId {
    TunnelId(peer.0)
}

impl Gateway {
    pub(super) fn name_of(&self, peer: PeerId) -> String {
        self.tunnels
            .get(tunnel_of(peer))
            .map_or_else(|| "?".to_owned(), |tunnel| tunnel.config.name.clone())
    }

    fn child_name(&self, peer: PeerId, child: ChildName) -> String {
        self.tunnels
            .get(tunnel_of(peer))
            .and_then(|tunnel| tunnel.config.children.get(usize::try_from(child.0).ok()?))
            .map_or_else(|| "?".to_owned(), |child| child.name.clone())
    }

    pub(super) async fn ike_event(&mut self, event: Event) {
        match event {
            Event::IkeUp(up) => self.ike_up(&up),
            Event::IkeRekeyed(up) => {
                self.paths.look_soon();
                info!(
                    tunnel = self.name_of(up.peer),
                    spi_i = %up.info.spi_i,
                    spi_r = %up.info.spi_r,
                    suite = %up.info.suite,
                    "IKE SA rekeyed by {}",
                    if up.info.initiator { "us" } else { "the peer" },
                );
            }
            Event::IkeDown { peer, reason, .. } => {
                self.look_up(tunnel_of(peer));
                let tunnel = self.name_of(peer);
                match reason {
                    DownReason::Replaced | DownReason::Rekeyed => {
                        debug!(tunnel, %reason, "IKE SA closed");
                    }
                    _ => info!(tunnel, %reason, "IKE SA closed"),
                }
            }
            Event::ChildUp(up) => self.child_up(*up).await,
            Event::Outbound(sa) => self.use_outbound(sa).await,
            Event::OutboundDown(sa) => self.stop_sending(sa).await,
            Event::ChildDown {
                peer,
                child,
                sa,
                reason,
            } => {
                let (tunnel, name) = (self.name_of(peer), self.child_name(peer, child));
                if let Some(pair) = self.tunnels.removed(tunnel_of(peer), sa) {
                    self.uninstall(&pair).await;
                    match reason {
                        DownReason::Replaced | DownReason::Rekeyed => {
                            debug!(tunnel, child = name, %reason, spi_in = %pair.spi_in, "child closed");
                        }
                        _ => info!(tunnel, child = name, %reason, "child down"),
                    }
                }
                self.set_carrier(tunnel_of(peer)).await;
            }
            Event::Moved(sa, outer) => self.moved(sa, outer).await,
            Event::Exhausted(peer) => self.look_up(tunnel_of(peer)),
            Event::Unreachable(ike) => self.unreachable(ike),
            Event::Failed(failure) => self.failed(&failure),
        }
    }

    fn ike_up(&mut self, up: &IkeUp) {
        self.paths.look_soon();
        info!(
            tunnel = self.name_of(up.peer),
            peer = %up.info.remote,
            id = %up.info.remote_id,
            suite = %up.info.suite,
            nat = convert::nat_words(&up.info),
            "IKE SA established as {}",
            if up.info.initiator { "initiator" } else { "responder" },
        );
        if let Some(tunnel) = self.tunnels.get_mut(tunnel_of(up.peer)) {
            tunnel.failure = None;
            tunnel.failed.remove(&up.info.remote.ip());
        }
    }

    /// The second of CLOCK_MONOTONIC at a time of the endpoint.
    fn monotonic(&self, at: Time) -> u64 {
        monotonic_seconds().saturating_sub((self.now() - at).as_secs())
    }

    async fn child_up(&mut self, up: ChildUp) {
        let id = tunnel_of(up.peer);
        let (inbound, outbound) = (self.tunnels.new_sa(), self.tunnels.new_sa());
        let Some(config) = self.tunnels.get(id).and_then(|tunnel| {
            tunnel
                .config
                .children
                .get(usize::try_from(up.child.0).ok()?)
                .cloned()
        }) else {
            return;
        };
        let since = self.monotonic(up.since);
        let pairs = self.tunnels.get(id).map(|tunnel| &tunnel.pairs);
        let replaced = up.replaces.and_then(|old| pairs?.get(&old));
        let lasted = replaced.map(|old| up.since - old.since);
        let [ours, theirs] = [
            (inbound, Direction::Inbound),
            (outbound, Direction::Outbound),
        ]
        .map(|(sa, direction)| convert::sa_spec(id, &config, &up, sa, direction, (since, lasted)));
        let (tunnel, child) = (self.name_of(up.peer), config.name.clone());
        self.install((up.sa, since), ours.clone(), &tunnel, &child)
            .await;
        info!(
            tunnel,
            child,
            local = selectors::describe(&up.local),
            remote = selectors::describe(&up.remote),
            suite = %up.suite,
            spi_in = %up.spi_in,
            spi_out = %up.spi_out,
            udp = up.outer.encapsulated,
            "child {}",
            if up.replaces.is_some() { "rekeyed" } else { "up" },
        );
        let pair = SaPair {
            child: up.child,
            ours,
            theirs,
            spi_in: up.spi_in,
            spi_out: up.spi_out,
            suite: up.suite,
            local: up.local,
            remote: up.remote,
            outer: up.outer,
            since: up.since,
            sends: Sends::NotYet,
        };
        self.tunnels.installed(id, up.sa, pair);
        self.set_carrier(id).await;
    }

    /// Installs an SA of a pair that was negotiated at that second of CLOCK_MONOTONIC.
    async fn install(
        &mut self,
        (sa, since): (ChildSaId, u64),
        spec: seam::SaSpec,
        tunnel: &str,
        child: &str,
    ) {
        let command = match self.in_doubt {
            // The daemon before this one may have installed it, and the data plane used it.
            Some(_) => seam::Command::Resume(Box::new(spec), Before::InDoubt(since)),
            None => seam::Command::Install(Box::new(spec)),
        };
        match self.engine.command(command).await {
            Ok(Some(ledger)) => self.tunnels.note_ledger(ledger),
            Ok(None) => {}
            Err(cause) if self.in_doubt.is_some() => {
                debug!(tunnel, child, %cause, "what was begun cannot be ended");
                self.in_doubt.iter_mut().for_each(|lost| {
                    lost.insert(sa);
                });
            }
            Err(cause) => warn!(tunnel, child, %cause, "an SA could not be installed"),
        }
    }

    /// The peer can receive on a pair, whose outbound SA takes the traffic from here on.
    async fn use_outbound(&mut self, sa: ChildSaId) {
        let spec = self.tunnels.pair_mut(sa).and_then(|(id, pair)| {
            match std::mem::replace(&mut pair.sends, Sends::Now) {
                Sends::NotYet => Some((id, pair.child, pair.since, pair.theirs.clone())),
                Sends::Now | Sends::NoMore => None,
            }
        });
        if let Some((id, child, since, spec)) = spec {
            let peer = PeerId(id.0);
            let (tunnel, child) = (self.name_of(peer), self.child_name(peer, child));
            let since = self.monotonic(since);
            self.install((sa, since), spec, &tunnel, &child).await;
        }
    }

    /// Another pair has taken the traffic of this one, whose inbound SA stays for what is still on its way.
    async fn stop_sending(&mut self, sa: ChildSaId) {
        let Some((_, pair)) = self.tunnels.pair_mut(sa) else {
            return;
        };
        pair.sends = Sends::NoMore;
        let outbound = pair.theirs.id;
        self.remove(outbound).await;
    }

    async fn uninstall(&self, pair: &SaPair) {
        self.remove(pair.theirs.id).await;
        self.remove(pair.ours.id).await;
    }

    async fn remove(&self, sa: SaId) {
        if let Err(cause) = self.engine.command(seam::Command::Remove(sa)).await {
            warn!(%cause, "an SA could not be removed");
        }
    }

    /// The carrier of the device follows the tunnel; one that comes up on demand must take packets to know of any.
    pub(super) async fn set_carrier(&self, id: TunnelId) {
        let Some(tunnel) = self.tunnels.get(id) else {
            return;
        };
        let mut children = tunnel.config.children.iter();
        let trapped = children.any(|child| convert::is_on_demand(&tunnel.config, child));
        let on = tunnel.carries() || (trapped && !tunnel.down);
        let _ = self.engine.command(seam::Command::SetCarrier(id, on)).await;
    }

    async fn moved(&mut self, sa: ChildSaId, outer: crate::ike::event::OuterAddresses) {
        let Some((id, pair)) = self.tunnels.pair_mut(sa) else {
            return;
        };
        pair.outer = outer;
        pair.ours.outer = convert::outer(&outer);
        pair.theirs.outer = convert::outer(&outer);
        let installed: Vec<SaId> = pair.installed().map(|spec| spec.id).collect();
        let tunnel = self.name_of(PeerId(id.0));
        info!(tunnel, local = %outer.local, peer = %outer.remote, udp = outer.encapsulated, "an SA pair has other addresses");
        self.note_where_peers_are(id).await;
        for sa in installed {
            let command = seam::Command::MoveOuter(sa, convert::outer(&outer));
            if let Err(cause) = self.engine.command(command).await {
                warn!(tunnel, %cause, "an SA could not be moved");
            }
        }
    }

    /// The data plane knows the peer's addresses, those that it has moved to, too: its packets must not go into tunnels.
    async fn note_where_peers_are(&mut self, id: TunnelId) {
        let Some(tunnel) = self.tunnels.get_mut(id) else {
            return;
        };
        let elsewhere: BTreeSet<IpAddr> = tunnel
            .pairs
            .values()
            .map(|pair| pair.outer.remote.ip())
            .collect();
        if tunnel.elsewhere == elsewhere {
            return;
        }
        tunnel.elsewhere = elsewhere;
        self.set_tunnel(id).await;
    }

    fn failed(&mut self, failure: &Failure) {
        // Who fails to authenticate has no name; the address tells whose failure the operator should look at.
        let id = failure
            .peer
            .map(tunnel_of)
            .or_else(|| self.tunnels.waiting_at(failure.remote.ip()));
        let tunnel = id.map_or_else(|| "-".to_owned(), |id| self.name_of(PeerId(id.0)));
        if let Some(state) = id.and_then(|id| self.tunnels.get_mut(id)) {
            state.failure = Some(failure.to_string());
            let address = failure.remote.ip();
            let called = all_ways(&state.places);
            if called.iter().any(|way| way.remote == address) {
                state.failed.insert(address, failure.to_string());
            }
        }
        if self.failures.allows(Instant::now()) {
            warn!(tunnel, peer = %failure.remote, "{failure}");
        }
    }

    pub(super) async fn engine_event(&mut self, event: seam::Event) {
        let now = self.now();
        match event {
            seam::Event::Ike(datagram) => {
                self.endpoint
                    .handle_datagram(now, datagram.local, datagram.remote, &datagram.bytes)
            }
            seam::Event::Acquire {
                tunnel,
                child,
                flow,
            } => {
                let state = self.tunnels.get(tunnel).filter(|state| !state.down);
                let Some(state) = state else { return };
                // A packet that comes before the way is known starts nothing; the next one does.
                let Some(local) = state.local() else {
                    return self.look_up(tunnel);
                };
                let local = (local, self.config.ports.ike).into();
                info!(
                    tunnel = self.name_of(PeerId(tunnel.0)),
                    "a packet from {} to {} asks for the tunnel", flow.source, flow.destination
                );
                let acquire = Command::Acquire {
                    peer: PeerId(tunnel.0),
                    child: ChildName(child.0),
                    local,
                    packet: Some(convert::packet(&flow)),
                };
                self.endpoint.handle_command(now, acquire);
            }
            seam::Event::Lifetime { sa, kind } => {
                if let Some((_, child)) = self.tunnels.owner(sa) {
                    let command = match kind {
                        LifetimeKind::Soft => Command::Expiring(child),
                        LifetimeKind::Hard => Command::Expired(child),
                    };
                    self.endpoint.handle_command(now, command);
                }
            }
            seam::Event::PeerMoved { sa, remote } => {
                if let Some((_, child)) = self.tunnels.owner(sa) {
                    self.endpoint
                        .handle_command(now, Command::PeerMoved(child, remote));
                }
            }
            seam::Event::UnknownSpi { spi, local, remote } => {
                debug!(%spi, %local, %remote, "ESP that names no SA");
            }
            seam::Event::LedgerChanged(ledger) => {
                self.tunnels.note_ledger(ledger);
            }
            seam::Event::MtuChanged { tunnel, mtu } => {
                if let Some(state) = self.tunnels.get_mut(tunnel) {
                    debug!(tunnel = state.config.name, mtu, "device MTU");
                    state.mtu = Some(mtu);
                }
            }
            seam::Event::PoliciesAlone { tunnel, reason } => {
                info!(
                    tunnel = self.name_of(PeerId(tunnel.0)),
                    reason = reason.name(),
                    "the tunnel has no device: policies of the whole host alone lead packets into it, and no routes are made for it"
                );
                if let Some(state) = self.tunnels.get_mut(tunnel) {
                    state.policies = Some(reason);
                }
            }
            seam::Event::DeviceChanged { tunnel, from, to } => {
                info!(
                    tunnel = self.name_of(PeerId(tunnel.0)),
                    from, to, "the tunnel is with the other engine: its device has another index"
                );
                if let Some(state) = self.tunnels.get_mut(tunnel) {
                    state.device_changed = Some((from, to));
                }
            }
            seam::Event::RecursiveRoute { tunnel, remote } => {
                let name = self.name_of(PeerId(tunnel.0));
                if let Some(state) = self.tunnels.get_mut(tunnel) {
                    state.failure = Some(format!(
                        "recursive route: {remote} is routed into a tunnel of ours"
                    ));
                }
                warn!(tunnel = name, peer = %remote, "recursive route: the peer is routed into a tunnel of ours; nothing is sent");
            }
        }
    }
}
