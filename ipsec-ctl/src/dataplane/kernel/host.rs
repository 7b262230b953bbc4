//! Policies of tunnels without a device: they belong to no interface but to the whole host, and those of all such tunnels meet.
//!
//! So they say for themselves which packets are protected, which are blocked, and which stay in the clear. The most specific
//! one is asked first, whichever tunnel it is of, so that none hides another: a policy whose packets are some of another's
//! has the smaller priority. IKE's own packets are no matter of theirs, for its sockets have policies of their own.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{
    policies::{ChildPlan, End, MOST_BITS, Plan, ends},
    selectors::{Inexpressible, between},
};
use crate::{
    dataplane::{routing::RoutingSpec, seam::SelectorPair},
    net::xfrm::{Action, Mode, Policy, PolicyDirection, PortMask, Selector},
};

/// Our priorities, by which we know these policies again. What others set with smaller numbers comes first.
const FIRST: u32 = 0x4958_0000;
const LAST: u32 = 0x4fff_ffff;
const FIRST_RANK: u32 = FIRST + 0x1000;
/// What a policy of one rank can do: let pass what is an exception of the others, protect, and block what has no SA.
const ACTIONS: u32 = 3;
/// Lengths that a prefix can have, and masks of ports.
const LENGTHS: u32 = MOST_BITS + 1;
const MASKS: u32 = u16::BITS + 1;

const _: () = assert!(FIRST_RANK + LENGTHS * 2 * MASKS * LENGTHS * MASKS * ACTIONS < LAST);

const ICMPV6: u8 = 58;
/// Neighbour solicitation and advertisement (RFC 4861 sections 4.3 and 4.4).
const NEIGHBOURS: [u16; 2] = [135, 136];

/// Whether a policy is one of these.
pub(super) fn is_ours(policy: &Policy) -> bool {
    policy.if_id == 0 && (FIRST..=LAST).contains(&policy.priority)
}

/// What a tunnel protects.
#[derive(Debug)]
pub(super) struct Protected<'a> {
    pub(super) mode: Mode,
    /// The configured selectors of its children.
    pub(super) selectors: Vec<&'a SelectorPair>,
    /// What stays in the clear though a remote selector covers it.
    pub(super) clear: Vec<IpNet>,
}

/// What of a tunnel's remote addresses is not the peer's: our own side, what the operator lets bypass, and what never leaves
/// its link.
pub(super) fn clear(routing: &RoutingSpec) -> Vec<IpNet> {
    let link: [IpNet; 4] = [
        Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 24).into(),
        Ipv4Net::new_assert(Ipv4Addr::BROADCAST, 32).into(),
        Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10).into(),
        Ipv6Net::new_assert(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0), 16).into(),
    ];
    let own = routing.local.iter().chain(&routing.bypass);
    own.copied().chain(link).collect()
}

/// Whether nothing tells our side of a child from the peer's: both have a prefix in common.
///
/// # Errors
///
/// [`Inexpressible`].
pub fn is_ambiguous(selectors: &SelectorPair) -> Result<bool, Inexpressible> {
    let pairs = between(&selectors.local, &selectors.remote)?;
    Ok(pairs.iter().any(|pair| pair.source == pair.destination))
}

/// The policies of a tunnel with these children.
///
/// # Errors
///
/// [`Inexpressible`] for selectors that the kernel has no words for.
pub(super) fn plan(
    protected: &Protected<'_>,
    children: &[ChildPlan<'_>],
) -> Result<BTreeSet<Policy>, Inexpressible> {
    let mut plan = Plan {
        if_id: 0,
        mode: protected.mode,
        priority: |_, direction, selector| rank(direction, selector) + 1,
        inward: match protected.mode {
            Mode::Tunnel => &[PolicyDirection::In, PolicyDirection::Forward],
            // Nothing that is for this host is forwarded.
            Mode::Transport => &[PolicyDirection::In],
        },
        policies: BTreeMap::new(),
    };
    for child in children {
        plan.child(child)?;
    }
    for pair in &protected.selectors {
        block(&mut plan, pair)?;
    }
    for policy in exceptions(&plan, &protected.clear) {
        plan.otherwise(policy);
    }
    Ok(plan.policies.into_values().collect())
}

/// Blocks what no SA protects, at the rank that an SA with all of the selectors has: a less specific tunnel does not get it.
fn block(plan: &mut Plan, pair: &SelectorPair) -> Result<(), Inexpressible> {
    let inward = plan.inward.iter().copied();
    for direction in inward.chain([PolicyDirection::Out]) {
        let selectors = match direction {
            PolicyDirection::Out => between(&pair.local, &pair.remote)?,
            PolicyDirection::In | PolicyDirection::Forward => between(&pair.remote, &pair.local)?,
        };
        for selector in selectors {
            let priority = rank(direction, &selector) + 2;
            plan.otherwise(policy(direction, selector, priority, Action::Block));
            if plan.mode == Mode::Transport && selector.source.addr().is_ipv6() {
                find_neighbours(plan, direction, selector);
            }
        }
    }
    Ok(())
}

/// Two hosts on one link find each other in the clear.
fn find_neighbours(plan: &mut Plan, direction: PolicyDirection, selector: Selector) {
    for kind in NEIGHBOURS {
        let selector = Selector {
            protocol: ICMPV6,
            // The kernel has the type where source ports would be.
            source_port: PortMask {
                port: kind,
                mask: u16::MAX,
            },
            destination_port: PortMask::default(),
            ..selector
        };
        plan.otherwise(policy(direction, selector, FIRST, Action::Pass));
    }
}

/// What passes in the clear of the packets that policies of one tunnel are for: each is asked just before the policy that it is an
/// exception of, and after all that are more specific than that one, for those may be another tunnel's.
fn exceptions(plan: &Plan, clear: &[IpNet]) -> Vec<Policy> {
    let mut exceptions = Vec::new();
    for (direction, selector) in plan.policies.keys() {
        let (_, remote) = ends(*direction, selector);
        let inside = |net: &&IpNet| remote.net.contains(*net) && remote.net != **net;
        for net in clear.iter().filter(inside) {
            let narrower = match direction {
                PolicyDirection::Out => Selector {
                    destination: *net,
                    ..*selector
                },
                PolicyDirection::In | PolicyDirection::Forward => Selector {
                    source: *net,
                    ..*selector
                },
            };
            let priority = rank(*direction, selector);
            exceptions.push(policy(*direction, narrower, priority, Action::Pass));
        }
    }
    // Of two that are for the same packets the earlier one.
    exceptions.sort_by_key(|policy| policy.priority);
    exceptions
}

/// When policies for these packets are asked: the fewer remote addresses, then protocols and remote ports, then local addresses
/// and ports, the earlier. Packets that are some of others come before them, and no two of one rank have a packet in common.
fn rank(direction: PolicyDirection, selector: &Selector) -> u32 {
    let ports = |end: End| end.port.mask.count_zeros();
    let (local, remote) = ends(direction, selector);
    let rank = remote.free() * 2 + u32::from(selector.protocol == 0);
    let rank = rank * MASKS + ports(remote);
    let rank = (rank * LENGTHS + local.free()) * MASKS + ports(local);
    FIRST_RANK + rank * ACTIONS
}

fn policy(direction: PolicyDirection, selector: Selector, priority: u32, action: Action) -> Policy {
    Policy {
        direction,
        selector,
        priority,
        if_id: 0,
        action,
        card: None,
    }
}

#[cfg(test)]
mod tests;
