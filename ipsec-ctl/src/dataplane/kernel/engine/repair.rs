//! What others have removed is put back, and what a former life has left is taken away.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::{Everything, Inner, NO_IF_ID, doubts::Doubt, is_our_state, is_ours, used};
use crate::{
    dataplane::seam::{Event, LifetimeKind, SaId, TunnelId},
    net::{
        netfilter,
        xfrm::{Policy, StateId},
    },
};

impl Inner {
    /// Compares what the kernel has with what it should have, as far as that is in doubt.
    pub(super) async fn repair(&self, doubts: &BTreeSet<Doubt>) {
        if doubts.contains(&Doubt::Devices) {
            self.restore_devices().await;
        }
        let mut everything = self.state.lock().await;
        let all = &mut *everything;
        if doubts.contains(&Doubt::States) {
            self.find_lost_states(all);
        }
        if doubts.contains(&Doubt::Policies) {
            self.restore_policies(all);
        }
        if doubts.contains(&Doubt::Clamp) {
            clamp(all);
        }
        if doubts.contains(&Doubt::Leftovers) && all.complete {
            self.remove_leftovers(all).await;
        }
    }

    /// An SA whose state is gone is dead: its keys were the kernel's alone. The daemon negotiates a new one.
    fn find_lost_states(&self, all: &mut Everything) {
        let states = match self.xfrm.states() {
            Ok(states) => states,
            Err(error) => return tracing::warn!(%error, "IPsec states cannot be listed"),
        };
        let there: HashSet<StateId> = states.iter().map(|state| state.id).collect();
        let lost: Vec<SaId> = all
            .sas
            .iter()
            .filter(|(_, sa)| !there.contains(&sa.state))
            .map(|(id, _)| *id)
            .collect();
        if lost.is_empty() {
            return;
        }
        tracing::warn!(
            states = lost.len(),
            "somebody has removed IPsec states of ours: new ones are negotiated"
        );
        for sa in lost {
            if let Err(error) = self.remove(all, sa) {
                tracing::warn!(%error, "an SA cannot be removed");
            }
            self.lodge.send(Event::Lifetime {
                sa,
                kind: LifetimeKind::Hard,
            });
        }
    }

    pub(super) fn restore_policies(&self, all: &mut Everything) {
        let policies = match self.xfrm.policies() {
            Ok(policies) => policies,
            Err(error) => return tracing::warn!(%error, "IPsec policies cannot be listed"),
        };
        if !all.shared.note(&policies) {
            tracing::warn!("somebody has changed IPsec policies of ours: they are put back");
            if let Err(error) = all.shared.restore(&self.xfrm) {
                tracing::warn!(%error, "policies cannot be put back");
            }
        }
        let mut by_number: HashMap<u32, BTreeSet<Policy>> = HashMap::new();
        for policy in policies {
            by_number.entry(policy.if_id).or_default().insert(policy);
        }
        let ids: Vec<TunnelId> = all.tunnels.keys().copied().collect();
        for id in ids {
            let tunnel = all.tunnels.get_mut(&id);
            let Some(tunnel) = tunnel.filter(|tunnel| tunnel.has_device()) else {
                continue;
            };
            let there = by_number.remove(&tunnel.if_id).unwrap_or_default();
            if there == tunnel.policies {
                continue;
            }
            tracing::warn!(
                tunnel = tunnel.spec.name,
                "somebody has changed IPsec policies of ours: they are put back"
            );
            tunnel.policies = there;
            if let Err(error) = self.apply(all, id) {
                tracing::warn!(%error, "policies cannot be put back");
            }
        }
    }

    /// Sets devices up that are down, and creates those anew that are gone.
    async fn restore_devices(&self) {
        // A list of many links takes long: meanwhile SAs are installed, and tunnels come and go.
        let interfaces = match self.netlink.xfrm_interfaces().await {
            Ok(interfaces) => interfaces.into_iter(),
            Err(error) => return tracing::warn!(%error, "a tunnel whose device is down stays so"),
        };
        let up: HashSet<(u32, u32)> = interfaces
            .filter(|one| one.up)
            .map(|one| (one.index, one.if_id))
            .collect();
        let mut everything = self.state.lock().await;
        let all = &mut *everything;
        let doubtful = all.tunnels.iter().filter(|(_, tunnel)| {
            tunnel.has_device() && !up.contains(&(tunnel.ifindex, tunnel.if_id))
        });
        for id in doubtful.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.restore_device(all, id).await;
        }
    }

    /// Sees to a link that was down or gone, if it is a tunnel's.
    pub(super) async fn link_fell(&self, index: u32) {
        let mut everything = self.state.lock().await;
        let mut tunnels = everything.tunnels.iter();
        let of_it = tunnels.find(|(_, tunnel)| tunnel.has_device() && tunnel.ifindex == index);
        if let Some(id) = of_it.map(|(id, _)| *id) {
            self.restore_device(&mut everything, id).await;
        }
    }

    /// Sets a device up that is down, and creates it anew if it is gone.
    async fn restore_device(&self, all: &mut Everything, id: TunnelId) {
        let Some(tunnel) = all.tunnels.get(&id) else {
            return;
        };
        let (device, if_id) = (tunnel.spec.device.clone(), tunnel.if_id);
        let link = match self.netlink.link_at(tunnel.ifindex).await {
            Ok(link) => link,
            Err(error) => {
                return tracing::warn!(%error, "the device of a tunnel cannot be looked up");
            }
        };
        if link.as_ref().is_some_and(|link| link.up) {
            return;
        }
        tracing::info!(tunnel = tunnel.spec.name, "the device was down or gone");
        if link.is_none() {
            if let Err(error) = self.netlink.add_xfrm_interface(&device, if_id).await {
                return tracing::warn!(%error, "the device of a tunnel cannot be created");
            }
            if let (Ok(Some(link)), Some(tunnel)) =
                (self.netlink.link(&device).await, all.tunnels.get_mut(&id))
            {
                tunnel.ifindex = link.index;
            }
        }
        if let Err(error) = self.bring_up(all, id).await {
            tracing::warn!(%error, "the device of a tunnel cannot be set up");
        }
        self.fit_mtu(all, id).await;
    }

    /// Takes away what has a number of ours and belongs to no tunnel.
    async fn remove_leftovers(&self, all: &mut Everything) {
        let used = used(all);
        let stray = |if_id: u32| is_ours(if_id) && !used.contains(&if_id);
        let states: HashSet<StateId> = all.sas.values().map(|sa| sa.state).collect();
        for interface in self.netlink.xfrm_interfaces().await.unwrap_or_default() {
            if stray(interface.if_id)
                && let Err(error) = self.netlink.remove_link(interface.index).await
            {
                tracing::warn!(%error, "a leftover stays");
            }
        }
        // Policies first: a packet that meets one without its state makes the kernel ask for one.
        for policy in self.xfrm.policies().unwrap_or_default() {
            if stray(policy.if_id) {
                let _ = self.xfrm.remove_policy(&policy);
            }
        }
        if let Err(error) = all.shared.remove_leftovers(&self.xfrm) {
            tracing::warn!(%error, "a leftover stays");
        }
        for state in self.xfrm.states().unwrap_or_default() {
            let lost = state.if_id == NO_IF_ID && !states.contains(&state.id);
            if stray(state.if_id) || (lost && is_our_state(&state)) {
                let _ = self.xfrm.remove_state(&state.id);
            }
        }
    }
}

/// Has the kernel lower the MSS of TCP that is forwarded through devices.
pub(super) fn clamp(all: &mut Everything) {
    let wanted: BTreeMap<String, u16> = all
        .tunnels
        .values()
        .filter(|tunnel| tunnel.has_device() && tunnel.spec.clamp_mss)
        .map(|tunnel| (tunnel.spec.device.clone(), tunnel.mtu))
        .collect();
    if wanted == all.clamped {
        return;
    }
    if let Err(error) = netfilter::clamp::install(&wanted) {
        // TCP finds the MTU by ICMP then.
        tracing::warn!(%error, "the MSS of TCP is not lowered: that takes nf_tables");
    }
    all.clamped = wanted;
}
