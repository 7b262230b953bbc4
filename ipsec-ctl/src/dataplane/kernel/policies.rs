//! Which policies a tunnel needs: a pure function of its children and of the SAs that they have.
//!
//! With an xfrm interface all belong to it, so that those of two tunnels cannot meet. What no child's selectors match
//! meets a policy that blocks: an xfrm interface without SAs lets nothing through in either direction. Those of tunnels without
//! one are put together in [`super::host`].

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use ipsec_common::{Spi, TrafficSelector};

use super::selectors::{Inexpressible, between};
use crate::{
    dataplane::seam::{Outer, SelectorPair},
    net::xfrm::{Action, Mode, Policy, PolicyDirection, PortMask, Selector, Template},
};

/// Children are asked in the order of the configuration, from here on.
const FIRST_CHILD: u32 = 0x1000;
/// Within a child the most specific selectors come first; so many degrees there are.
const DEGREES: u32 = (MOST_BITS + 1) * 4 * (MOST_BITS + 1);
/// Length of the longest prefix.
pub(super) const MOST_BITS: u32 = 128;
/// The backstop comes last.
const BACKSTOP: u32 = u32::MAX;

/// A child, as far as policies are concerned.
#[derive(Debug)]
pub struct ChildPlan<'a> {
    /// Its place in the configuration.
    pub number: u32,
    /// The SAs that send, newest first.
    pub outbound: Vec<Sending<'a>>,
    /// What is received, newest first.
    pub inbound: Vec<Receiving<'a>>,
    /// Where a packet is to ask for an SA while none sends: the configured selectors, the peer, and what is asked for.
    pub trap: Option<(&'a SelectorPair, IpAddr, u32)>,
}

/// An SA that sends.
#[derive(Debug)]
pub struct Sending<'a> {
    /// The peer's SPI.
    pub spi: Spi,
    /// Outer addresses.
    pub outer: Outer,
    /// What its state has.
    pub reqid: u32,
    /// What it was negotiated for.
    pub selectors: &'a SelectorPair,
    /// Index of the interface whose card does all of its ESP.
    pub card: Option<u32>,
}

/// SAs that receive, of the same selectors.
#[derive(Debug)]
pub struct Receiving<'a> {
    /// What their states have.
    pub reqid: u32,
    /// What they were negotiated for.
    pub selectors: &'a SelectorPair,
    /// Index of the interface whose card does all of their ESP.
    pub card: Option<u32>,
}

/// The policies of a tunnel with an xfrm interface.
///
/// # Errors
///
/// [`Inexpressible`] for selectors that the kernel has no words for.
pub fn plan(if_id: u32, children: &[ChildPlan<'_>]) -> Result<BTreeSet<Policy>, Inexpressible> {
    let mut plan = Plan {
        if_id,
        mode: Mode::Tunnel,
        priority,
        inward: &[PolicyDirection::In, PolicyDirection::Forward],
        policies: BTreeMap::new(),
    };
    for child in children {
        plan.child(child)?;
    }
    for policy in backstops(if_id) {
        plan.otherwise(policy);
    }
    Ok(plan.policies.into_values().collect())
}

/// Policies by what tells them apart in the kernel.
pub(super) struct Plan {
    pub(super) if_id: u32,
    pub(super) mode: Mode,
    /// When a policy of a child is asked.
    pub(super) priority: fn(u32, PolicyDirection, &Selector) -> u32,
    /// Where what was received is held against policies.
    pub(super) inward: &'static [PolicyDirection],
    pub(super) policies: BTreeMap<(PolicyDirection, Selector), Policy>,
}

impl Plan {
    /// What a child sends and receives.
    pub(super) fn child(&mut self, child: &ChildPlan<'_>) -> Result<(), Inexpressible> {
        let mode = self.mode;
        for sa in &child.outbound {
            self.add(
                PolicyDirection::Out,
                between(&sa.selectors.local, &sa.selectors.remote)?,
                child.number,
                |_| Template {
                    source: sa.outer.local,
                    destination: sa.outer.remote,
                    // This SA and no other: which of several takes the traffic is the daemon's to say.
                    spi: sa.spi.0,
                    reqid: sa.reqid,
                    mode,
                },
                sa.card,
            );
        }
        if let (true, Some((selectors, peer, reqid))) = (child.outbound.is_empty(), &child.trap) {
            self.add(
                PolicyDirection::Out,
                between(&selectors.local, &selectors.remote)?,
                child.number,
                |_| Template {
                    destination: *peer,
                    mode,
                    ..Template::anywhere(peer.is_ipv6(), *reqid)
                },
                None,
            );
        }
        for sas in &child.inbound {
            for &direction in self.inward {
                // RFC 4301 section 5.2: what came in an SA must be what the SA was negotiated for. The outer source
                // may have changed behind a NAT, and the ICV has vouched for the packet.
                self.add(
                    direction,
                    between(&sas.selectors.remote, &sas.selectors.local)?,
                    child.number,
                    |selector| Template {
                        mode,
                        ..Template::anywhere(selector.source.addr().is_ipv6(), sas.reqid)
                    },
                    sas.card.filter(|_| direction == PolicyDirection::In),
                );
            }
        }
        Ok(())
    }

    /// Of two children or SAs with the same selector the first one has it.
    fn add(
        &mut self,
        direction: PolicyDirection,
        selectors: Vec<Selector>,
        child: u32,
        template: impl Fn(&Selector) -> Template,
        card: Option<u32>,
    ) {
        for selector in selectors {
            self.policies
                .entry((direction, selector))
                .or_insert_with(|| Policy {
                    direction,
                    selector,
                    priority: (self.priority)(child, direction, &selector),
                    if_id: self.if_id,
                    action: Action::Protect(template(&selector)),
                    card,
                });
        }
    }

    /// What becomes of packets that no child has.
    pub(super) fn otherwise(&mut self, policy: Policy) {
        self.policies.entry(policy.key()).or_insert(policy);
    }
}

/// A side of the packets that a policy is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    pub(super) net: IpNet,
    pub(super) port: PortMask,
}

impl End {
    /// Bits of an address that are free.
    pub(super) fn free(self) -> u32 {
        MOST_BITS - u32::from(self.net.prefix_len())
    }
}

/// Our side of the packets, and the peer's.
pub(super) fn ends(direction: PolicyDirection, selector: &Selector) -> (End, End) {
    let source = End {
        net: selector.source,
        port: selector.source_port,
    };
    let destination = End {
        net: selector.destination,
        port: selector.destination_port,
    };
    match direction {
        PolicyDirection::Out => (source, destination),
        PolicyDirection::In | PolicyDirection::Forward => (destination, source),
    }
}

/// When the policy of a child is asked: those of earlier children first, of one child the most specific.
fn priority(child: u32, direction: PolicyDirection, selector: &Selector) -> u32 {
    let (local, remote) = ends(direction, selector);
    let any = u32::from(selector.protocol == 0) * 2 + u32::from(remote.port.mask == 0);
    let degree = (remote.free() * 4 + any) * (MOST_BITS + 1) + local.free();
    child
        .saturating_mul(DEGREES)
        .saturating_add(FIRST_CHILD + degree)
        .min(BACKSTOP - 1)
}

/// What blocks everything on an xfrm interface.
pub fn backstops(if_id: u32) -> Vec<Policy> {
    let directions = [
        PolicyDirection::Out,
        PolicyDirection::In,
        PolicyDirection::Forward,
    ];
    directions
        .into_iter()
        .flat_map(|direction| {
            [false, true].into_iter().map(move |v6| Policy {
                direction,
                selector: Selector::everything(v6),
                priority: BACKSTOP,
                if_id,
                action: Action::Block,
                card: None,
            })
        })
        .collect()
}

/// Whether an IPv6 packet can match.
pub fn covers_ipv6(selectors: &SelectorPair) -> bool {
    let v6 = |selector: &TrafficSelector| selector.addresses.0.is_ipv6();
    selectors.remote.iter().any(v6)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn pair(local: &str, remote: &str) -> SelectorPair {
        let selectors = |net: &str| {
            let net: IpNet = net.parse().unwrap();
            vec![TrafficSelector {
                protocol: 0,
                ports: (0, u16::MAX),
                addresses: (net.network(), net.broadcast()),
            }]
        };
        SelectorPair {
            local: selectors(local),
            remote: selectors(remote),
        }
    }

    const OUTER: Outer = Outer {
        local: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
        remote: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2)),
        encap: None,
    };

    fn child(number: u32) -> ChildPlan<'static> {
        ChildPlan {
            number,
            outbound: Vec::new(),
            inbound: Vec::new(),
            trap: None,
        }
    }

    fn sends(spi: u32, selectors: &SelectorPair) -> Sending<'_> {
        Sending {
            spi: Spi(spi),
            outer: OUTER,
            reqid: 100,
            selectors,
            card: None,
        }
    }

    fn receives(reqid: u32, selectors: &SelectorPair) -> Receiving<'_> {
        Receiving {
            reqid,
            selectors,
            card: None,
        }
    }

    /// The SPIs of the out policies in the order in which they are asked; none where one blocks.
    fn spis(policies: &BTreeSet<Policy>) -> Vec<Option<u32>> {
        let out = of(policies, PolicyDirection::Out).into_iter();
        out.map(|policy| match policy.action {
            Action::Protect(template) => Some(template.spi),
            Action::Block | Action::Pass => None,
        })
        .collect()
    }

    fn of(policies: &BTreeSet<Policy>, direction: PolicyDirection) -> Vec<Policy> {
        let mut found: Vec<_> = policies
            .iter()
            .filter(|policy| policy.direction == direction)
            .copied()
            .collect();
        found.sort_by_key(|policy| policy.priority);
        found
    }

    #[test]
    fn a_tunnel_without_sas_blocks_everything() {
        let policies = plan(7, &[child(0)]).unwrap();
        assert_eq!(policies.len(), 6);
        assert!(policies.iter().all(|policy| policy.action == Action::Block
            && policy.if_id == 7
            && policy.priority == BACKSTOP));
    }

    #[test]
    fn traffic_takes_the_sa_that_sends_and_what_comes_must_have_come_in_the_childs() {
        let selectors = pair("10.1.0.0/24", "10.2.0.0/24");
        let policies = plan(
            7,
            &[ChildPlan {
                outbound: vec![sends(9, &selectors)],
                inbound: vec![receives(100, &selectors)],
                trap: Some((&selectors, OUTER.remote, 99)),
                ..child(0)
            }],
        )
        .unwrap();
        let out = of(&policies, PolicyDirection::Out);
        assert_eq!(
            out[0].action,
            Action::Protect(Template {
                source: OUTER.local,
                destination: OUTER.remote,
                spi: 9,
                reqid: 100,
                mode: Mode::Tunnel,
            })
        );
        assert_eq!(out[0].selector.destination, "10.2.0.0/24".parse().unwrap());
        for direction in [PolicyDirection::In, PolicyDirection::Forward] {
            let first = of(&policies, direction)[0];
            assert_eq!(
                first.action,
                Action::Protect(Template::anywhere(false, 100))
            );
            assert_eq!(first.selector.source, "10.2.0.0/24".parse().unwrap());
        }
    }

    #[test]
    fn a_child_on_demand_asks_for_an_sa() {
        let selectors = pair("10.1.0.0/24", "10.2.0.0/24");
        let policies = plan(
            7,
            &[ChildPlan {
                trap: Some((&selectors, OUTER.remote, 99)),
                ..child(0)
            }],
        )
        .unwrap();
        let Action::Protect(template) = of(&policies, PolicyDirection::Out)[0].action else {
            panic!("it blocks");
        };
        assert_eq!((template.destination, template.spi), (OUTER.remote, 0));
        assert_eq!(of(&policies, PolicyDirection::In).len(), 2);
    }

    #[test]
    fn of_two_children_with_one_selector_the_first_has_it_and_no_priorities_are_shared() {
        let wide = pair("0.0.0.0/0", "0.0.0.0/0");
        let narrow = pair("10.1.0.0/24", "10.2.0.0/24");
        let child = |number, selectors| ChildPlan {
            outbound: vec![sends(number, selectors)],
            ..child(number)
        };
        let policies = plan(7, &[child(0, &narrow), child(1, &wide), child(2, &narrow)]).unwrap();
        // The IPv4 backstop has the wide child's selector, which comes first.
        assert_eq!(spis(&policies), [Some(0), Some(1), None]);
    }

    #[test]
    fn of_the_sas_of_one_child_the_most_specific_is_asked_first_and_of_equal_ones_the_newest_alone()
    {
        let wide = pair("10.1.0.0/24", "10.0.0.0/8");
        let narrow = pair("10.1.0.0/24", "10.3.0.0/24");
        let other = pair("10.1.0.0/24", "10.2.0.0/24");
        let policies = plan(
            7,
            &[ChildPlan {
                outbound: vec![
                    sends(1, &wide),
                    sends(2, &other),
                    sends(3, &narrow),
                    sends(4, &other),
                ],
                ..child(0)
            }],
        )
        .unwrap();
        let mut narrow = spis(&policies);
        let last = narrow.split_off(2);
        narrow.sort_unstable();
        assert_eq!(narrow, [Some(2), Some(3)]);
        assert_eq!(last, [Some(1), None, None]);
    }

    #[test]
    fn what_comes_in_one_sa_is_not_taken_for_what_another_is_for() {
        let (one, other) = (
            pair("10.1.0.0/24", "10.2.0.0/24"),
            pair("10.1.0.0/24", "10.3.0.0/24"),
        );
        let policies = plan(
            7,
            &[ChildPlan {
                inbound: vec![receives(101, &one), receives(102, &other)],
                ..child(0)
            }],
        )
        .unwrap();
        for (net, reqid) in [("10.2.0.0/24", 101), ("10.3.0.0/24", 102)] {
            let found = of(&policies, PolicyDirection::Forward);
            let policy = found
                .iter()
                .find(|policy| policy.selector.source.to_string() == net);
            assert_eq!(
                policy.unwrap().action,
                Action::Protect(Template::anywhere(false, reqid))
            );
        }
    }
}
