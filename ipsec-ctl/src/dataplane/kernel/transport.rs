//! Policies of a tunnel in transport mode: they belong to no interface, so they say for themselves which packets are
//! protected, which are blocked, and which are IKE's own.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::{
    policies::{ChildPlan, Plan},
    selectors::{Inexpressible, between},
};
use crate::{
    dataplane::seam::SelectorPair,
    net::xfrm::{Action, Mode, Policy, PolicyDirection, PortMask, Selector},
};

/// Our priorities, by which we know these policies again. What others set with smaller numbers comes first.
const FIRST: u32 = 0x4958_0000;
const FIRST_CHILD: u32 = FIRST + 0x1000;
const BACKSTOP: u32 = 0x4fff_ffff;

const ESP: u8 = 50;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// Neighbour solicitation and advertisement (RFC 4861 sections 4.3 and 4.4).
const NEIGHBOURS: [u16; 2] = [135, 136];

/// Whether a policy is one of these.
pub(super) fn is_ours(policy: &Policy) -> bool {
    policy.if_id == 0 && (FIRST..=BACKSTOP).contains(&policy.priority)
}

/// The policies of a tunnel with these configured selectors and children. The UDP ports are IKE's.
///
/// # Errors
///
/// [`Inexpressible`] for selectors that the kernel has no words for.
pub(super) fn plan(
    configured: &[&SelectorPair],
    children: &[ChildPlan<'_>],
    ports: [u16; 2],
) -> Result<BTreeSet<Policy>, Inexpressible> {
    let mut plan = Plan {
        if_id: 0,
        mode: Mode::Transport,
        first: FIRST_CHILD,
        last: BACKSTOP - 1,
        // Nothing that is for this host is forwarded.
        inward: &[PolicyDirection::In],
        policies: BTreeMap::new(),
    };
    for child in children {
        plan.child(child)?;
    }
    for pair in configured {
        let out = between(&pair.local, &pair.remote)?;
        let inward = between(&pair.remote, &pair.local)?;
        for selector in &out {
            exempt(&mut plan, selector.source, selector.destination, ports);
        }
        for (direction, selectors) in [(PolicyDirection::Out, out), (PolicyDirection::In, inward)] {
            for selector in selectors {
                plan.otherwise(policy(direction, selector, BACKSTOP, Action::Block));
            }
        }
    }
    Ok(plan.policies.into_values().collect())
}

/// What IPsec itself needs in the clear between us and the peer.
fn exempt(plan: &mut Plan, local: IpNet, remote: IpNet, ports: [u16; 2]) {
    let any = PortMask::default();
    let one = |port| PortMask {
        port,
        mask: u16::MAX,
    };
    let mut pass = |direction, protocol, (source, from), (destination, to)| {
        let selector = Selector {
            source,
            destination,
            protocol,
            source_port: from,
            destination_port: to,
        };
        plan.otherwise(policy(direction, selector, FIRST, Action::Pass));
    };
    // Protocol and our port; the peer's is what its NAT makes of it.
    let ike = ports.map(|port| (UDP, one(port)));
    for (protocol, port) in std::iter::once((ESP, any)).chain(ike) {
        pass(PolicyDirection::Out, protocol, (local, port), (remote, any));
        pass(PolicyDirection::In, protocol, (remote, any), (local, port));
    }
    if local.addr().is_ipv6() {
        for kind in NEIGHBOURS.map(one) {
            // The kernel has the type where source ports would be.
            pass(PolicyDirection::Out, ICMPV6, (local, kind), (remote, any));
            pass(PolicyDirection::In, ICMPV6, (remote, kind), (local, any));
        }
    }
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
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use ipsec_common::{Spi, TrafficSelector};

    use super::*;
    use crate::dataplane::{
        kernel::policies::{Receiving, Sending},
        seam::Outer,
    };

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));

    fn pair() -> SelectorPair {
        let host = |address| {
            vec![TrafficSelector {
                protocol: 0,
                ports: (0, u16::MAX),
                addresses: (address, address),
            }]
        };
        SelectorPair {
            local: host(HERE),
            remote: host(PEER),
        }
    }

    #[test]
    fn without_sas_all_is_blocked_but_what_brings_them_up() {
        let policies = plan(&[&pair()], &[], [500, 4500]).unwrap();
        let of = |action| policies.iter().filter(move |one| one.action == action);
        assert_eq!(of(Action::Block).count(), 2);
        // ESP and two ports, in both directions.
        assert_eq!(of(Action::Pass).count(), 6);
        for pass in of(Action::Pass) {
            assert!(of(Action::Block).all(|block| pass.priority < block.priority));
        }
        assert!(policies.iter().all(is_ours));
    }

    #[test]
    fn an_sa_takes_the_place_of_what_blocks() {
        let pair = pair();
        let outer = Outer {
            local: HERE,
            remote: PEER,
            encap: None,
        };
        let child = ChildPlan {
            number: 0,
            outbound: vec![Sending {
                spi: Spi(5),
                outer,
                reqid: 9,
                selectors: &pair,
                card: None,
            }],
            inbound: vec![Receiving {
                reqid: 9,
                selectors: &pair,
                card: None,
            }],
            trap: None,
        };
        let policies = plan(&[&pair], &[child], [500, 4500]).unwrap();
        assert!(policies.iter().all(|policy| policy.action != Action::Block));
        let templates: Vec<_> = policies
            .iter()
            .filter_map(|policy| match policy.action {
                Action::Protect(template) => Some((policy.direction, template)),
                Action::Block | Action::Pass => None,
            })
            .collect();
        assert_eq!(templates.len(), 2);
        for (direction, template) in templates {
            assert_ne!(direction, PolicyDirection::Forward);
            assert_eq!((template.mode, template.reqid), (Mode::Transport, 9));
        }
    }
}
