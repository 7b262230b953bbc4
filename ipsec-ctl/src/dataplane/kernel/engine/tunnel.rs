//! A tunnel of the engine: its xfrm interface, if it has one, and its policies.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Everything, FIRST_IF_ID, Inner, LAST_IF_ID, NO_IF_ID,
    doubts::Doubt,
    sa::{mode, received},
    used,
};
use crate::{
    dataplane::{
        device,
        kernel::{
            host::{self, Protected},
            policies::{ChildPlan, Sending, backstops, covers_ipv6, plan},
            selectors::Inexpressible,
        },
        routing::{Place, RoutesMode},
        seam::{
            ChildId, Df, Event, KernelReason, Offload, PoliciesReason, Rejected, SaId, TunnelId,
            TunnelSpec,
        },
        xdp::{outbound::LEAST_IPV6_MTU, path_mtu::MTU_WITHOUT_SA},
    },
    net::{netlink::Link, xfrm::Policy},
};

/// A tunnel.
#[derive(Debug)]
pub(super) struct Tunnel {
    pub(super) spec: TunnelSpec,
    /// Why it is here.
    pub(super) reason: KernelReason,
    /// Why it has no device, if it has none: policies of the whole host alone lead packets into it then.
    pub(super) alone: Option<PoliciesReason>,
    /// Whether its routes lead into its device.
    pub(super) place: Place,
    /// Number of its interface, states and policies.
    pub(super) if_id: u32,
    pub(super) ifindex: u32,
    pub(super) mtu: u16,
    /// What a packet that asks for an SA of a child names.
    reqids: BTreeMap<ChildId, u32>,
    /// The SAs that send, oldest first.
    outbound: BTreeMap<ChildId, Vec<SaId>>,
    /// What the kernel has for its interface.
    pub(super) policies: BTreeSet<Policy>,
}

impl Tunnel {
    pub(super) fn has_child(&self, child: ChildId) -> bool {
        self.reqids.contains_key(&child)
    }

    /// An SA of a child sends from now on what its selectors are for.
    pub(super) fn sends(&mut self, child: ChildId, sa: SaId) {
        self.outbound.entry(child).or_default().push(sa);
    }

    /// An SA sends no more; an older one with the same selectors does instead, if there is one.
    pub(super) fn sends_no_more(&mut self, sa: SaId) {
        self.outbound.retain(|_, sending| {
            sending.retain(|one| *one != sa);
            !sending.is_empty()
        });
    }

    pub(super) fn child_of(&self, reqid: u32) -> Option<ChildId> {
        let found = self.reqids.iter().find(|(_, one)| **one == reqid);
        found.map(|(child, _)| *child)
    }

    /// Whether a packet of a child is to ask for an SA.
    pub(super) fn waits_for_packets(&self, child: ChildId) -> bool {
        let mut children = self.spec.children.iter();
        children.any(|one| one.id == child && one.on_demand) && !self.outbound.contains_key(&child)
    }

    pub(super) fn has_device(&self) -> bool {
        self.alone.is_none()
    }

    /// What the ledger says of its SAs.
    pub(super) fn offload(&self) -> Offload {
        self.alone
            .map_or(Offload::Kernel(self.reason), Offload::Policies)
    }

    pub(super) fn clears_df(&self) -> bool {
        self.spec.df == Df::Clear
    }
}

/// A device, as the kernel's IPsec knows it.
struct Interface {
    if_id: u32,
    index: u32,
    policies: BTreeSet<Policy>,
}

impl Interface {
    /// That of a tunnel without a device.
    const NONE: Self = Self {
        if_id: NO_IF_ID,
        index: 0,
        policies: BTreeSet::new(),
    };
}

impl Inner {
    /// Creates a tunnel, or changes what differs from before; SAs stay.
    pub(super) async fn set_tunnel(
        &self,
        all: &mut Everything,
        spec: TunnelSpec,
        reason: KernelReason,
        place: Place,
    ) -> Result<(), Rejected> {
        let id = spec.id;
        let alone = self.judge_tunnel(all, &spec)?;
        if all.tunnels.get(&id).is_some_and(|old| old.alone != alone) {
            self.remove_tunnel(all, id).await?;
        }
        let old = all.tunnels.remove(&id);
        let interface = match alone {
            Some(_) => Ok(Interface::NONE),
            None => self.interface(all, &spec, old.as_ref()).await,
        };
        let interface = match interface {
            Ok(interface) => interface,
            Err(rejected) => {
                // It stays as it was.
                all.tunnels.extend(old.map(|old| (id, old)));
                return Err(rejected);
            }
        };
        let is_new = old.as_ref().is_none_or(|old| old.if_id != interface.if_id);
        let (mut reqids, outbound) = old
            .map(|old| (old.reqids, old.outbound))
            .unwrap_or_default();
        for child in &spec.children {
            reqids.entry(child.id).or_insert_with(|| all.new_reqid());
        }
        let tunnel = Tunnel {
            reason,
            alone,
            place,
            if_id: interface.if_id,
            ifindex: interface.index,
            mtu: spec.mtu.unwrap_or(MTU_WITHOUT_SA),
            reqids,
            outbound,
            policies: interface.policies,
            spec,
        };
        all.tunnels.insert(id, tunnel);
        self.apply(all, id)?;
        if let Some(reason) = alone.filter(|_| is_new) {
            // What a former life has left of the whole host's goes when all tunnels are known: nothing tells whose it was.
            self.lodge.send(Event::PoliciesAlone { tunnel: id, reason });
        } else if is_new {
            // Those of a former life: nobody knows any more which SAs they were. After the policies that named them, for a
            // packet that meets a policy without its state makes the kernel ask for one.
            for state in all.former.take_states(interface.if_id) {
                let _ = self.xfrm.remove_state(&state);
            }
        }
        self.bring_up(all, id).await?;
        self.fit_mtu(all, id).await;
        Ok(())
    }

    /// Why a tunnel gets no device, if it gets none. Refuses one that cannot be as it is configured.
    fn judge_tunnel(
        &self,
        all: &Everything,
        spec: &TunnelSpec,
    ) -> Result<Option<PoliciesReason>, Rejected> {
        if spec.df == Df::Set {
            return Err(Rejected::by_kernel(
                "set up the tunnel",
                &"the kernel cannot always set the don't-fragment bit: use df = \"copy\" or engine = \"xdp\"",
            ));
        }
        let alone = self
            .capabilities
            .policies_alone(spec.mode, spec.policy_based);
        if let Some(reason) = alone {
            can_do_without_device(spec, reason)?;
            let policies = blocked(spec).map_err(inexpressible(spec))?;
            if all.shared.is_taken(spec.id, &policies) {
                return Err(Rejected::by_kernel(
                    &format!("set up {} by policies alone", spec.name),
                    &"another tunnel without a device has the same selectors",
                ));
            }
        }
        Ok(alone)
    }

    /// The interface of a tunnel that has one: the same as before, unless its device has another name now.
    async fn interface(
        &self,
        all: &mut Everything,
        spec: &TunnelSpec,
        old: Option<&Tunnel>,
    ) -> Result<Interface, Rejected> {
        let (if_id, policies) = match old {
            Some(old) if old.spec.device == spec.device => (old.if_id, old.policies.clone()),
            Some(old) => {
                self.netlink.remove_link(old.ifindex).await?;
                let device = &spec.device;
                let namesake = self.netlink.link(device).await?;
                self.make_way(namesake).await?;
                // The number is the same, for SAs have it, too.
                self.netlink.add_xfrm_interface(device, old.if_id).await?;
                (old.if_id, old.policies.clone())
            }
            None => self.create(all, &spec.device).await?,
        };
        let link = self.netlink.link(&spec.device).await?;
        let gone = || Rejected::by_kernel("look the xfrm interface up", &"it is gone");
        Ok(Interface {
            if_id,
            index: link.ok_or_else(gone)?.index,
            policies,
        })
    }

    /// Removes a device that has the name of one that is to be created: an interface that is not known any more, or that of a
    /// tunnel that was the other engine's.
    async fn make_way(&self, namesake: Option<Link>) -> Result<(), Rejected> {
        if let Some(link) = namesake
            && matches!(link.kind.as_deref(), Some("xfrm" | "tun"))
        {
            self.netlink.remove_link(link.index).await?;
        }
        Ok(())
    }

    /// Creates the device, or takes over the one that a former life has left; returns its number and its policies.
    async fn create(
        &self,
        all: &mut Everything,
        device: &str,
    ) -> Result<(u32, BTreeSet<Policy>), Rejected> {
        let namesake = self.netlink.link(device).await?;
        if let Some(link) = &namesake
            && link.kind.as_deref() == Some("xfrm")
            && let Some(left) = all.former.take_over(device, link.index)
        {
            return Ok(left);
        }
        self.make_way(namesake).await?;
        let used = used(all);
        let if_id = (FIRST_IF_ID..=LAST_IF_ID)
            .find(|number| !used.contains(number) && !all.former.has(*number))
            .ok_or(Rejected::Full)?;
        // Before there is an interface that they are for.
        let policies: BTreeSet<Policy> = backstops(if_id).into_iter().collect();
        for policy in &policies {
            self.xfrm.set_policy(policy)?;
        }
        self.netlink.add_xfrm_interface(device, if_id).await?;
        Ok((if_id, policies))
    }

    /// Gives the device addresses and routes, and sets it up.
    pub(super) async fn bring_up(&self, all: &Everything, id: TunnelId) -> Result<(), Rejected> {
        let Some(tunnel) = all.tunnels.get(&id) else {
            return Err(Rejected::UnknownTunnel);
        };
        if !tunnel.has_device() {
            for peer in &tunnel.spec.routing.peers {
                self.lodge.know_peer(*peer);
            }
            return Ok(());
        }
        let (spec, index) = (&tunnel.spec, tunnel.ifindex);
        device::bring_up(&self.netlink, index, spec).await?;
        if tunnel.place == Place::Aside {
            return Ok(());
        }
        self.lodge
            .set_routes(id, &spec.device, index, &spec.routing)
            .await
    }

    /// Lets routing daemons see whether the tunnel is up. An xfrm interface has no carrier to take away; its operational
    /// state (RFC 2863 section 3.1.12) is what they look at.
    pub(super) async fn set_carrier(
        &self,
        all: &Everything,
        id: TunnelId,
        on: bool,
    ) -> Result<(), Rejected> {
        let tunnel = all.tunnels.get(&id).ok_or(Rejected::UnknownTunnel)?;
        if !tunnel.has_device() {
            return Ok(());
        }
        let set = self.netlink.set_operational(tunnel.ifindex, on);
        Ok(set.await?)
    }

    pub(super) async fn remove_tunnel(
        &self,
        all: &mut Everything,
        id: TunnelId,
    ) -> Result<(), Rejected> {
        if !all.tunnels.contains_key(&id) {
            return Err(Rejected::UnknownTunnel);
        }
        let sas = all.sas.iter().filter(|(_, sa)| sa.tunnel == id);
        for sa in sas.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.forget(all, sa);
        }
        let Some(tunnel) = all.tunnels.remove(&id) else {
            return Err(Rejected::UnknownTunnel);
        };
        let removed = if tunnel.has_device() {
            if tunnel.place == Place::InUse {
                self.lodge.remove_routes(id).await;
            }
            self.netlink.remove_link(tunnel.ifindex).await
        } else {
            all.shared.want(id, &BTreeSet::new(), &self.xfrm)?;
            Ok(())
        };
        for policy in &tunnel.policies {
            self.xfrm.remove_policy(policy)?;
        }
        self.doubts.raise(&[Doubt::Clamp, Doubt::Leftovers]);
        removed.map_err(Rejected::from)
    }

    /// Gives the kernel the policies that a tunnel should have now: new ones first, so that there is no gap.
    pub(super) fn apply(&self, all: &mut Everything, id: TunnelId) -> Result<(), Rejected> {
        let Some(tunnel) = all.tunnels.get(&id) else {
            return Ok(());
        };
        let children: Vec<_> = tunnel
            .spec
            .children
            .iter()
            .map(|child| {
                // A trap needs some address; the SAs that it leads to have their own.
                let peer = tunnel.spec.routing.peers.first().copied();
                let trap = tunnel.reqids.get(&child.id).copied();
                let sending = tunnel.outbound.get(&child.id).into_iter().flatten();
                ChildPlan {
                    number: child.id.0,
                    outbound: sending
                        .rev()
                        .filter_map(|sa| all.sas.get(sa))
                        .map(|sa| Sending {
                            spi: sa.spi,
                            outer: sa.outer,
                            reqid: sa.reqid,
                            selectors: &sa.selectors,
                            card: sa.card,
                        })
                        .collect(),
                    inbound: received(&all.sas, id, child.id),
                    trap: peer
                        .zip(trap)
                        .filter(|_| child.on_demand)
                        .map(|(peer, reqid)| (&child.selectors, peer, reqid)),
                }
            })
            .collect();
        let planned = if tunnel.has_device() {
            plan(tunnel.if_id, &children)
        } else {
            host::plan(&protected(&tunnel.spec), &children)
        };
        let wanted = planned.map_err(inexpressible(&tunnel.spec))?;
        if !tunnel.has_device() {
            return all.shared.want(id, &wanted, &self.xfrm);
        }
        let Some(tunnel) = all.tunnels.get_mut(&id) else {
            return Ok(());
        };
        for policy in wanted.difference(&tunnel.policies) {
            self.xfrm.set_policy(policy)?;
        }
        let replaced = |old: &Policy| {
            let mut wanted = wanted.iter();
            wanted.any(|new| new.key() == old.key())
        };
        for policy in tunnel.policies.difference(&wanted) {
            if !replaced(policy) {
                self.xfrm.remove_policy(policy)?;
            }
        }
        tunnel.policies = wanted;
        Ok(())
    }

    /// Gives the device the MTU that its SAs and their paths leave.
    pub(super) async fn fit_mtu(&self, all: &mut Everything, id: TunnelId) {
        let Some(tunnel) = all.tunnels.get_mut(&id).filter(|one| one.has_device()) else {
            return;
        };
        let sending = tunnel.outbound.values().flatten();
        let sending = sending.filter_map(|sa| all.sas.get(sa));
        let (mut least, mut v6) = (None::<u16>, false);
        for sa in sending {
            least = least.into_iter().chain(sa.inner_mtu).min();
            v6 |= covers_ipv6(&sa.selectors);
        }
        let computed = least.map_or(MTU_WITHOUT_SA, |least| {
            // RFC 8200 section 5: IPv6 needs so much of every link; the kernel fragments outside.
            if v6 { least.max(LEAST_IPV6_MTU) } else { least }
        });
        let mtu = tunnel.spec.mtu.unwrap_or(computed);
        if let Err(error) = self.netlink.set_mtu(tunnel.ifindex, mtu.into()).await {
            tracing::warn!(%error, mtu, "the MTU of a tunnel's device cannot be set");
        }
        let clamps = tunnel.spec.clamp_mss;
        if mtu != tunnel.mtu {
            tunnel.mtu = mtu;
            self.lodge.send(Event::MtuChanged { tunnel: id, mtu });
        }
        let device = &tunnel.spec.device;
        if clamps != (all.clamped.get(device) == Some(&mtu)) {
            self.doubts.raise(&[Doubt::Clamp]);
        }
    }
}

fn inexpressible(spec: &TunnelSpec) -> impl Fn(Inexpressible) -> Rejected {
    let step = format!("describe the selectors of {}", spec.name);
    move |error| Rejected::by_kernel(&step, &error)
}

/// What policies of the whole host protect for a tunnel.
fn protected(spec: &TunnelSpec) -> Protected<'_> {
    Protected {
        mode: mode(spec.mode),
        selectors: spec.children.iter().map(|child| &child.selectors).collect(),
        clear: host::clear(&spec.routing),
    }
}

/// The policies of a tunnel without a device while it has no SAs.
pub(super) fn blocked(spec: &TunnelSpec) -> Result<BTreeSet<Policy>, Inexpressible> {
    host::plan(&protected(spec), &[])
}

/// The configuration is checked for what it says; that the kernel lacks xfrm interfaces it cannot know.
fn can_do_without_device(spec: &TunnelSpec, reason: PoliciesReason) -> Result<(), Rejected> {
    let refused = |why: &str| {
        let step = format!("set up {} by policies alone ({})", spec.name, reason.name());
        Err(Rejected::by_kernel(&step, &why))
    };
    if !spec.routing.addresses.is_empty() {
        return refused("`address` needs a device");
    }
    if reason != PoliciesReason::TransportMode && spec.routing.mode != RoutesMode::Selectors {
        return refused("its routes need a device");
    }
    for child in &spec.children {
        if host::is_ambiguous(&child.selectors).map_err(inexpressible(spec))? {
            return refused(
                "a child has the same selectors on both sides, so nothing tells the sides apart without a device",
            );
        }
    }
    Ok(())
}
