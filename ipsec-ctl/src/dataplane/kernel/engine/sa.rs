//! SAs of the engine: a state for each, which policies point at.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use ipsec_common::Spi;

use super::{Everything, Inner, tunnel::Tunnel};
use crate::{
    dataplane::{
        kernel::{
            algorithms::{algorithms, key_lengths},
            policies::Receiving,
        },
        seam::{
            ChildId, Direction, Event, Ledger, Lifetime, LifetimeKind, Mode, Nic, NicOffload,
            Offload, Outer, Rejected, SaId, SaSpec, SelectorPair, TunnelId,
        },
        xdp::slow::monotonic_seconds,
    },
    esp::{EspKeys, EspSuite, EspTransform},
    net::xfrm::{self, Encap, Limits, Replay, State, StateId},
};

/// An installed SA. Its keys are the kernel's alone.
#[derive(Debug)]
pub(super) struct Sa {
    pub(super) tunnel: TunnelId,
    pub(super) child: ChildId,
    pub(super) direction: Direction,
    pub(super) spi: Spi,
    pub(super) suite: EspSuite,
    pub(super) outer: Outer,
    /// In an order that does not depend on the peer's.
    pub(super) selectors: SelectorPair,
    /// What policies name its state by. SAs of one child have the same if they have the same selectors: what came in one of
    /// them is not taken for what another was negotiated for.
    pub(super) reqid: u32,
    pub(super) state: StateId,
    pub(super) ledger: Ledger,
    /// Index of the interface whose card does all of its ESP, policies included.
    pub(super) card: Option<u32>,
    /// Longest inner packet in bytes that the path takes in one piece.
    pub(super) inner_mtu: Option<u16>,
    pub(super) lifetime: Lifetime,
}

impl Sa {
    /// One that the kernel carries alone, as far as is known before its state is added.
    fn new(spec: &SaSpec, selectors: SelectorPair, state: &State, offload: Offload) -> Self {
        Self {
            tunnel: spec.tunnel,
            child: spec.child,
            direction: spec.direction,
            spi: spec.spi,
            suite: spec.suite,
            outer: spec.outer,
            selectors,
            reqid: state.reqid,
            state: state.id(),
            ledger: Ledger {
                sa: spec.id,
                offload,
                nic: None,
            },
            card: None,
            inner_mtu: None,
            lifetime: spec.lifetime,
        }
    }

    /// Our address and port and the peer's, if ESP comes in UDP.
    pub(super) fn pair(&self) -> Option<(SocketAddr, SocketAddr)> {
        let encap = self.outer.encap?;
        (self.direction == Direction::Inbound).then_some((
            SocketAddr::new(self.outer.local, encap.local_port),
            SocketAddr::new(self.outer.remote, encap.remote_port),
        ))
    }
}

impl Inner {
    /// Gives the kernel an SA, and has policies lead its traffic into it.
    pub(super) async fn install(
        &self,
        all: &mut Everything,
        spec: &SaSpec,
    ) -> Result<Ledger, Rejected> {
        if all.sas.contains_key(&spec.id) {
            return Err(Rejected::Exists);
        }
        let selectors = in_order(&spec.selectors);
        let reqid = reqid(all, spec, &selectors);
        let tunnel = all.tunnels.get(&spec.tunnel);
        let tunnel = tunnel
            .filter(|tunnel| tunnel.has_child(spec.child))
            .ok_or(Rejected::UnknownTunnel)?;
        self.can_carry(tunnel, spec)?;
        let mut state = state(spec, tunnel, reqid, self.lodge.mark(), &spec.keys)?;
        let mut sa = Sa::new(spec, selectors, &state, tunnel.offload());
        let wanted = tunnel.spec.offload;
        sa.inner_mtu = self.inner_mtu(&sa, spec).await;
        sa.ledger.nic = self.add_with_socket(all, &sa, &mut state, wanted).await?;
        let card = state.card.filter(|card| card.packet);
        sa.card = card.map(|card| card.device);
        self.enter(all, sa);
        self.lead_in(all, spec, &mut state)?;
        if spec.direction == Direction::Outbound {
            self.fit_mtu(all, spec.tunnel).await;
        }
        let sa = all.sas.get(&spec.id).ok_or(Rejected::UnknownSa)?;
        Ok(sa.ledger.clone())
    }

    /// Whether the kernel can do what an SA of a tunnel needs.
    fn can_carry(&self, tunnel: &Tunnel, spec: &SaSpec) -> Result<(), Rejected> {
        if tunnel.spec.mode == Mode::Transport && spec.outer.encap.is_some() {
            return Err(Rejected::by_kernel(
                "install an SA in transport mode",
                &"it does not go in UDP",
            ));
        }
        let mut lacking = self.capabilities.lacking.iter();
        match lacking.find(|(suite, _)| *suite == spec.suite) {
            Some((_, reason)) => Err(Rejected::by_kernel("use these algorithms", reason)),
            None => Ok(()),
        }
    }

    /// Adds the state of an SA, with a socket for what comes to it in UDP; tells what a card does of it.
    async fn add_with_socket(
        &self,
        all: &mut Everything,
        sa: &Sa,
        state: &mut State,
        wanted: NicOffload,
    ) -> Result<Option<Nic>, Rejected> {
        let pair = sa.pair();
        if let Some(pair) = pair {
            all.sockets
                .take(pair, &self.lodge)
                .map_err(|error| Rejected::by_kernel("open a socket for ESP in UDP", &error))?;
        }
        let added = self.add_state(state, sa.direction, wanted, &sa.outer);
        added.await.map_err(|error| {
            if let Some(pair) = pair {
                all.sockets.leave(pair);
            }
            match error.errno {
                Some(libc::EEXIST) => Rejected::Exists,
                _ => error.into(),
            }
        })
    }

    /// Notes an SA whose state the kernel has.
    fn enter(&self, all: &mut Everything, sa: Sa) {
        let (id, tunnel, child, direction) = (sa.ledger.sa, sa.tunnel, sa.child, sa.direction);
        if direction == Direction::Inbound {
            self.lodge.pass(sa.spi, sa.outer.local);
            self.lodge.know_peer(sa.outer.remote);
        }
        all.sas.insert(id, sa);
        if direction == Direction::Outbound
            && let Some(tunnel) = all.tunnels.get_mut(&tunnel)
        {
            tunnel.sends(child, id);
        }
    }

    /// Has policies move the traffic to a new SA, in one step. One that cannot have it is forgotten.
    fn lead_in(
        &self,
        all: &mut Everything,
        spec: &SaSpec,
        state: &mut State,
    ) -> Result<(), Rejected> {
        let is_on_card = state.card.is_some_and(|card| card.packet);
        let applied = match self.apply(all, spec.tunnel) {
            Err(rejected) if is_on_card => self
                .take_from_card(all, spec.id, state, rejected.to_string())
                .and_then(|()| self.apply(all, spec.tunnel)),
            other => other,
        };
        if applied.is_err() {
            if let Some(tunnel) = all.tunnels.get_mut(&spec.tunnel) {
                tunnel.sends_no_more(spec.id);
            }
            self.forget(all, spec.id);
            let _ = self.apply(all, spec.tunnel);
        }
        applied
    }

    /// Removes an SA that may be gone already.
    pub(super) fn remove(&self, all: &mut Everything, id: SaId) -> Result<(), Rejected> {
        let Some(tunnel) = all.sas.get(&id).map(|sa| sa.tunnel) else {
            return Ok(());
        };
        // First from the policies, so that no packet meets one whose SA is gone.
        if let Some(tunnel) = all.tunnels.get_mut(&tunnel) {
            tunnel.sends_no_more(id);
        }
        let state = self.forget_but_keep_the_state(all, id);
        let applied = self.apply(all, tunnel);
        if let Some(state) = state {
            self.xfrm.remove_state(&state)?;
        }
        applied
    }

    pub(super) fn forget(&self, all: &mut Everything, id: SaId) {
        if let Some(state) = self.forget_but_keep_the_state(all, id)
            && let Err(error) = self.xfrm.remove_state(&state)
        {
            tracing::warn!(%error, "an IPsec state stays behind");
        }
    }

    fn forget_but_keep_the_state(&self, all: &mut Everything, id: SaId) -> Option<StateId> {
        let sa = all.sas.remove(&id)?;
        if let Some(pair) = sa.pair() {
            all.sockets.leave(pair);
        }
        if sa.direction == Direction::Inbound {
            self.lodge.pass_no_more(sa.spi, sa.outer.local);
        }
        Some(sa.state)
    }

    pub(super) fn move_outer(
        &self,
        all: &mut Everything,
        id: SaId,
        outer: Outer,
    ) -> Result<(), Rejected> {
        let sa = all.sas.get(&id).ok_or(Rejected::UnknownSa)?;
        if sa.outer == outer {
            return Ok(());
        }
        if sa.outer.local != outer.local
            || sa.outer.encap.is_some() != outer.encap.is_some()
            || (sa.direction == Direction::Outbound && sa.outer.remote != outer.remote)
        {
            // The kernel cannot move a state between addresses, and a second one must not have its keys: with AES-GCM
            // a repeated number is a repeated nonce. A new SA takes the new addresses.
            self.lodge.send(Event::Lifetime {
                sa: id,
                kind: LifetimeKind::Soft,
            });
            return Ok(());
        }
        let old_pair = sa.pair();
        let tunnel = sa.tunnel;
        let Some(sa) = all.sas.get_mut(&id) else {
            return Err(Rejected::UnknownSa);
        };
        sa.outer = outer;
        if let Some(pair) = sa.pair() {
            all.sockets
                .take(pair, &self.lodge)
                .map_err(|error| Rejected::by_kernel("open a socket for ESP in UDP", &error))?;
        }
        if let Some(pair) = old_pair {
            all.sockets.leave(pair);
        }
        self.move_ports(all, id)?;
        self.apply(all, tunnel)
    }

    /// Tells the kernel the new ports of a state.
    fn move_ports(&self, all: &Everything, id: SaId) -> Result<(), Rejected> {
        let sa = all.sas.get(&id).ok_or(Rejected::UnknownSa)?;
        let tunnel = all.tunnels.get(&sa.tunnel);
        let tunnel = tunnel.ok_or(Rejected::UnknownTunnel)?;
        // The state keeps its own keys; these only have the right lengths.
        let (cipher, integrity) = key_lengths(sa.suite);
        let keys = EspKeys {
            cipher: vec![0; cipher].into(),
            integrity: vec![0; integrity].into(),
        };
        let mut moved = State {
            source: sa.state.destination,
            destination: sa.state.destination,
            spi: sa.spi.0,
            mode: mode(tunnel.spec.mode),
            reqid: sa.reqid,
            if_id: tunnel.if_id,
            algorithms: algorithms(sa.suite, &keys).ok_or(Rejected::BadKeys)?,
            replay: Replay::default(),
            encap: encap(sa.direction, &sa.outer),
            output_mark: None,
            limits: Limits::NONE,
            copy_dscp: tunnel.spec.copy_dscp,
            clear_df: false,
            card: None,
        };
        match sa.direction {
            Direction::Inbound => moved.source = sa.outer.remote,
            Direction::Outbound => {
                moved.source = sa.outer.local;
                moved.output_mark = Some(self.lodge.mark());
            }
        }
        self.xfrm.update_state(&moved).map_err(Rejected::from)
    }

    /// How long an inner packet may be, as far as is known now.
    async fn inner_mtu(&self, sa: &Sa, spec: &SaSpec) -> Option<u16> {
        const UDP_HEADER: usize = 8;
        if sa.direction != Direction::Outbound {
            return None;
        }
        let path = self
            .netlink
            .path_mtu(sa.outer.remote, sa.outer.local, self.lodge.mark())
            .await
            .ok()
            .flatten()?;
        let ip_header = if sa.outer.remote.is_ipv6() { 40 } else { 20 };
        let udp = sa.outer.encap.map_or(0, |_| UDP_HEADER);
        let esp = usize::try_from(path)
            .ok()?
            .min(usize::from(u16::MAX))
            .checked_sub(ip_header + udp)?;
        let transform = EspTransform::new(spec.suite, &spec.keys, spec.esn).ok()?;
        u16::try_from(transform.max_payload(esp)).ok()
    }
}

/// The state of an SA.
fn state(
    spec: &SaSpec,
    tunnel: &Tunnel,
    reqid: u32,
    mark: u32,
    keys: &EspKeys,
) -> Result<State, Rejected> {
    let (source, destination) = match spec.direction {
        Direction::Inbound => (spec.outer.remote, spec.outer.local),
        Direction::Outbound => (spec.outer.local, spec.outer.remote),
    };
    Ok(State {
        source,
        destination,
        spi: spec.spi.0,
        mode: mode(tunnel.spec.mode),
        reqid,
        if_id: tunnel.if_id,
        algorithms: algorithms(spec.suite, keys).ok_or(Rejected::BadKeys)?,
        replay: Replay {
            esn: spec.esn,
            window: spec.replay_window,
            ..Replay::default()
        },
        encap: encap(spec.direction, &spec.outer),
        // Keeps our own packets out of the tunnels.
        output_mark: (spec.direction == Direction::Outbound).then_some(mark),
        limits: Limits {
            soft_bytes: spec.lifetime.soft_bytes,
            hard_bytes: spec.lifetime.hard_bytes,
            soft_packets: spec.lifetime.soft_packets,
            hard_packets: spec.lifetime.hard_packets,
            // The daemon rekeys by time on its own, and early: only the end is the kernel's to keep.
            soft_seconds: 0,
            hard_seconds: spec
                .lifetime
                .expires
                .map_or(0, |at| at.saturating_sub(monotonic_seconds()).max(1)),
        },
        copy_dscp: tunnel.spec.copy_dscp,
        clear_df: tunnel.clears_df(),
        card: None,
    })
}

pub(super) fn mode(mode: Mode) -> xfrm::Mode {
    match mode {
        Mode::Tunnel => xfrm::Mode::Tunnel,
        Mode::Transport => xfrm::Mode::Transport,
    }
}

/// Ports as they stand in the packets of a direction.
fn encap(direction: Direction, outer: &Outer) -> Option<Encap> {
    let encap = outer.encap?;
    Some(match direction {
        Direction::Inbound => Encap {
            source_port: encap.remote_port,
            destination_port: encap.local_port,
        },
        Direction::Outbound => Encap {
            source_port: encap.local_port,
            destination_port: encap.remote_port,
        },
    })
}

/// What policies name the state of a new SA by: the same as its pair's, and as those of older ones that it replaces.
fn reqid(all: &mut Everything, spec: &SaSpec, selectors: &SelectorPair) -> u32 {
    let same = all.sas.values().find(|sa| {
        (sa.tunnel, sa.child) == (spec.tunnel, spec.child) && sa.selectors == *selectors
    });
    same.map(|sa| sa.reqid).unwrap_or_else(|| all.new_reqid())
}

/// Selectors in an order of our own.
fn in_order(selectors: &SelectorPair) -> SelectorPair {
    let mut selectors = selectors.clone();
    selectors.local.sort_unstable();
    selectors.remote.sort_unstable();
    selectors
}

/// What the SAs of a child are to receive, those of the newest first.
pub(super) fn received(
    sas: &BTreeMap<SaId, Sa>,
    tunnel: TunnelId,
    child: ChildId,
) -> Vec<Receiving<'_>> {
    let inbound = sas.values().rev().filter(|sa| {
        sa.tunnel == tunnel && sa.child == child && sa.direction == Direction::Inbound
    });
    let mut known = BTreeSet::new();
    inbound
        .filter(|sa| known.insert(sa.reqid))
        .map(|sa| Receiving {
            reqid: sa.reqid,
            selectors: &sa.selectors,
            card: sa.card,
        })
        .collect()
}
