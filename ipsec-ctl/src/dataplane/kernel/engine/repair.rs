//! What others have removed is put back, and what a former life has left is taken away.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::{Everything, Inner, NO_IF_ID, is_our_state, is_ours, used};
use crate::{
    dataplane::seam::{Event, LifetimeKind, Rejected, SaId, TunnelId},
    net::{
        netfilter,
        xfrm::{Policy, StateId},
    },
};

impl Inner {
    /// The policies with a number that the kernel has.
    pub(super) fn policies_of(&self, if_id: u32) -> Result<BTreeSet<Policy>, Rejected> {
        let policies = self.xfrm.policies()?;
        Ok(policies
            .into_iter()
            .filter(|policy| policy.if_id == if_id)
            .collect())
    }

    /// Removes states with the number of a tunnel that are none of its SAs.
    pub(super) fn remove_strange_states(&self, all: &Everything, if_id: u32) {
        let Ok(states) = self.xfrm.states() else {
            return;
        };
        let known: HashSet<StateId> = all.sas.values().map(|sa| sa.state).collect();
        for state in states.iter().filter(|state| {
            is_our_state(state) && state.if_id == if_id && !known.contains(&state.id)
        }) {
            let _ = self.xfrm.remove_state(&state.id);
        }
    }

    /// Compares what the kernel has with what it should have.
    pub(super) async fn repair(&self) {
        let mut everything = self.state.lock().await;
        let all = &mut *everything;
        self.find_lost_states(all);
        self.restore_policies(all);
        self.restore_devices(all).await;
        clamp(all);
        if all.complete {
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
        let ids: Vec<TunnelId> = all.tunnels.keys().copied().collect();
        for id in ids {
            let tunnel = all.tunnels.get_mut(&id);
            let Some(tunnel) = tunnel.filter(|tunnel| tunnel.has_device()) else {
                continue;
            };
            let own = policies.iter().filter(|one| one.if_id == tunnel.if_id);
            let there: BTreeSet<Policy> = own.copied().collect();
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
    async fn restore_devices(&self, all: &mut Everything) {
        let (Ok(links), Ok(interfaces)) = (
            self.netlink.links().await,
            self.netlink.xfrm_interfaces().await,
        ) else {
            return tracing::warn!("links cannot be listed");
        };
        let ids: Vec<TunnelId> = all.tunnels.keys().copied().collect();
        for id in ids {
            let Some(tunnel) = all.tunnels.get(&id).filter(|tunnel| tunnel.has_device()) else {
                continue;
            };
            let there = interfaces
                .iter()
                .any(|one| one.index == tunnel.ifindex && one.if_id == tunnel.if_id);
            let up = links
                .iter()
                .any(|link| link.index == tunnel.ifindex && link.up);
            if there && up {
                continue;
            }
            let (device, if_id) = (tunnel.spec.device.clone(), tunnel.if_id);
            tracing::info!(tunnel = tunnel.spec.name, "the device was down or gone");
            if !there {
                if let Err(error) = self.netlink.add_xfrm_interface(&device, if_id).await {
                    tracing::warn!(%error, "the device of a tunnel cannot be created");
                    continue;
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
