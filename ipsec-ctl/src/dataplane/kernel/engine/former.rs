//! What a former life has left in the kernel, listed once at the start: a device of a tunnel is taken over with its number and
//! its policies. With many tunnels, lists for each of them would take longer than all else.

use std::collections::{BTreeSet, HashMap};

use super::is_ours;
use crate::net::{
    netlink::{Netlink, NetlinkError},
    xfrm::{Policy, StateId, StateStatus, XfrmInterface},
};

/// What is left, by the numbers of ours that it has.
#[derive(Debug, Default)]
pub(super) struct Former {
    /// By name.
    interfaces: HashMap<String, XfrmInterface>,
    policies: HashMap<u32, BTreeSet<Policy>>,
    states: HashMap<u32, Vec<StateId>>,
    /// Numbers that a new interface cannot have.
    taken: BTreeSet<u32>,
}

impl Former {
    /// Lists the interfaces; policies and states are those that the kernel has.
    pub(super) async fn list(
        netlink: &Netlink,
        policies: &[Policy],
        states: &[StateStatus],
    ) -> Result<Self, NetlinkError> {
        let mut former = Self::default();
        for interface in netlink.xfrm_interfaces().await? {
            former.taken.insert(interface.if_id);
            former.interfaces.insert(interface.name.clone(), interface);
        }
        for policy in policies.iter().filter(|policy| is_ours(policy.if_id)) {
            let of_it = former.policies.entry(policy.if_id).or_default();
            of_it.insert(*policy);
        }
        for state in states.iter().filter(|state| is_ours(state.if_id)) {
            former.states.entry(state.if_id).or_default().push(state.id);
        }
        former.taken.extend(former.policies.keys());
        former.taken.extend(former.states.keys());
        Ok(former)
    }

    /// The number of a device that was ours, and its policies, if the link with this index is it.
    pub(super) fn take_over(
        &mut self,
        device: &str,
        index: u32,
    ) -> Option<(u32, BTreeSet<Policy>)> {
        let left = self.interfaces.remove(device)?;
        (left.index == index && is_ours(left.if_id)).then(|| {
            let policies = self.policies.remove(&left.if_id);
            (left.if_id, policies.unwrap_or_default())
        })
    }

    /// The states with a number.
    pub(super) fn take_states(&mut self, if_id: u32) -> Vec<StateId> {
        self.states.remove(&if_id).unwrap_or_default()
    }

    /// Whether anything has this number.
    pub(super) fn has(&self, if_id: u32) -> bool {
        self.taken.contains(&if_id)
    }
}
