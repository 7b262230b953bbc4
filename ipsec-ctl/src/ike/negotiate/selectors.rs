//! Narrowing traffic selectors (RFC 7296 section 2.9).

use std::net::IpAddr;

use ipsec_common::TrafficSelector;

use crate::ike::config::ChildConfig;

/// More selectors than any honest peer needs on one side of a child.
const MOST: usize = 64;

/// What both selectors cover.
pub fn intersection(a: &TrafficSelector, b: &TrafficSelector) -> Option<TrafficSelector> {
    let protocol = match (a.protocol, b.protocol) {
        (0, other) | (other, 0) => other,
        (one, other) if one == other => one,
        _ => return None,
    };
    let addresses = (
        a.addresses.0.max(b.addresses.0),
        a.addresses.1.min(b.addresses.1),
    );
    if !same_family(a.addresses.0, b.addresses.0) || addresses.0 > addresses.1 {
        return None;
    }
    Some(TrafficSelector {
        protocol,
        ports: common_ports(a.ports, b.ports)?,
        addresses,
    })
}

// RFC 7296 section 3.13.1: OPAQUE, from 65535 down to 0, is inside "any port" and itself only.
fn common_ports(a: (u16, u16), b: (u16, u16)) -> Option<(u16, u16)> {
    const OPAQUE: (u16, u16) = (u16::MAX, 0);
    const ANY: (u16, u16) = (0, u16::MAX);
    match (a, b) {
        (OPAQUE, OPAQUE | ANY) | (ANY, OPAQUE) => Some(OPAQUE),
        (OPAQUE, _) | (_, OPAQUE) => None,
        _ => {
            let common = (a.0.max(b.0), a.1.min(b.1));
            (common.0 <= common.1).then_some(common)
        }
    }
}

fn same_family(a: IpAddr, b: IpAddr) -> bool {
    a.is_ipv4() == b.is_ipv4()
}

/// Whether `outer` covers all of `inner`.
pub fn covers(outer: &TrafficSelector, inner: &TrafficSelector) -> bool {
    intersection(outer, inner) == Some(*inner)
}

/// Whether each of `inner` is covered by one of `outer`.
pub fn all_covered(outer: &[TrafficSelector], inner: &[TrafficSelector]) -> bool {
    inner
        .iter()
        .all(|inner| outer.iter().any(|outer| covers(outer, inner)))
}

/// All that both lists cover, without what another entry covers already.
pub fn narrowed(ours: &[TrafficSelector], theirs: &[TrafficSelector]) -> Vec<TrafficSelector> {
    let mut common: Vec<TrafficSelector> = Vec::new();
    for candidate in theirs
        .iter()
        .flat_map(|theirs| ours.iter().filter_map(|ours| intersection(ours, theirs)))
    {
        if common.len() == MOST {
            break;
        }
        if !common.iter().any(|known| covers(known, &candidate)) {
            common.retain(|known| !covers(&candidate, known));
            common.push(candidate);
        }
    }
    common
}

/// The pairs of selectors, by their places in `asked`, that an answer has nothing of.
pub fn pairs_left(
    asked: (&[TrafficSelector], &[TrafficSelector]),
    agreed: (&[TrafficSelector], &[TrafficSelector]),
) -> Vec<(usize, usize)> {
    let meets = |selector: &TrafficSelector, side: &[TrafficSelector]| {
        side.iter()
            .any(|other| intersection(selector, other).is_some())
    };
    let mut left = Vec::new();
    for (l, local) in asked.0.iter().enumerate() {
        for (r, remote) in asked.1.iter().enumerate() {
            if !(meets(local, agreed.0) && meets(remote, agreed.1)) {
                left.push((l, r));
            }
        }
    }
    left
}

/// A child that fits an offer, and what is left of the selectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Narrowed<'a> {
    /// The configured child.
    pub child: &'a ChildConfig,
    /// Our side.
    pub local: Vec<TrafficSelector>,
    /// The peer's side.
    pub remote: Vec<TrafficSelector>,
}

/// The child that fits best what the peer wants: one that covers all of it, else one that covers the first selector of
/// either side, else the first that has anything in common.
// RFC 7296 section 2.9: the first selectors are what the initiator needs most, mostly the packet that made it ask, and a
// responder that allows them must not narrow them away.
pub fn choose<'a>(
    children: &'a [ChildConfig],
    local: &[TrafficSelector],
    remote: &[TrafficSelector],
) -> Option<Narrowed<'a>> {
    let whole = children
        .iter()
        .find(|child| all_covered(&child.local, local) && all_covered(&child.remote, remote));
    let first = local
        .first()
        .zip(remote.first())
        .and_then(|(local, remote)| {
            children.iter().find(|child| {
                all_covered(&child.local, &[*local]) && all_covered(&child.remote, &[*remote])
            })
        });
    let by_fit = whole.into_iter().chain(first).chain(children);
    by_fit.into_iter().find_map(|child| {
        let narrowed = Narrowed {
            child,
            local: narrowed(&child.local, local),
            remote: narrowed(&child.remote, remote),
        };
        (!narrowed.local.is_empty() && !narrowed.remote.is_empty()).then_some(narrowed)
    })
}

/// Selectors as people read them.
pub fn describe(selectors: &[TrafficSelector]) -> String {
    selectors
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;

    fn any_selector() -> impl Strategy<Value = TrafficSelector> {
        let ports = prop_oneof![
            Just((0, u16::MAX)),
            Just((u16::MAX, 0)),
            (0..8u16, 0..8u16).prop_map(|(a, b)| (a.min(b), a.max(b))),
        ];
        (0..3u8, ports, 0..16u32, 0..16u32).prop_map(|(protocol, ports, a, b)| TrafficSelector {
            protocol,
            ports,
            addresses: (
                Ipv4Addr::from_bits(a.min(b)).into(),
                Ipv4Addr::from_bits(a.max(b)).into(),
            ),
        })
    }

    /// Whether a packet matches, written apart from the code above.
    fn matches(selector: &TrafficSelector, protocol: u8, port: u16, address: u32) -> bool {
        let address: IpAddr = Ipv4Addr::from_bits(address).into();
        (selector.protocol == 0 || selector.protocol == protocol)
            && selector.ports.0 <= port
            && port <= selector.ports.1
            && selector.addresses.0 <= address
            && address <= selector.addresses.1
    }

    proptest! {
        #[test]
        fn narrowing_keeps_exactly_what_both_sides_allow(
            ours in prop::collection::vec(any_selector(), 1..4),
            theirs in prop::collection::vec(any_selector(), 1..4),
            protocol in 1..3u8, port in 0..8u16, address in 0..16u32,
        ) {
            let hit = |list: &[TrafficSelector]| {
                list.iter().any(|selector| matches(selector, protocol, port, address))
            };
            prop_assert_eq!(hit(&narrowed(&ours, &theirs)), hit(&ours) && hit(&theirs));
        }

        #[test]
        fn narrowing_gives_a_subset_of_either_side(
            ours in prop::collection::vec(any_selector(), 1..4),
            theirs in prop::collection::vec(any_selector(), 1..4),
        ) {
            let common = narrowed(&ours, &theirs);
            prop_assert!(all_covered(&ours, &common));
            prop_assert!(all_covered(&theirs, &common));
        }
    }

    fn selector(text: &str) -> TrafficSelector {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        TrafficSelector {
            protocol: 0,
            ports: (0, u16::MAX),
            addresses: (first.parse().unwrap(), last.parse().unwrap()),
        }
    }

    #[test]
    fn a_child_that_covers_the_offer_wins_over_an_earlier_one_that_overlaps() {
        let child = |id, remote: &str| ChildConfig {
            id: crate::ike::config::ChildName(id),
            name: String::new(),
            local: vec![selector("10.1.0.0-10.1.0.255")],
            remote: vec![selector(remote)],
            proposals: Vec::new(),
            on_dead: crate::ike::config::OnDead::Restart,
            lifetime: std::time::Duration::ZERO,
            mode: crate::ike::config::Mode::Tunnel,
        };
        let children = [
            child(0, "10.2.0.0-10.2.0.9"),
            child(1, "10.2.0.0-10.2.0.255"),
        ];
        let chosen = choose(
            &children,
            &[selector("0.0.0.0-255.255.255.255")],
            &[selector("10.2.0.0-10.2.0.255")],
        );
        assert_eq!(
            chosen.unwrap().child.id.0,
            0,
            "neither covers the local side"
        );
        let chosen = choose(
            &children,
            &[selector("10.1.0.7")],
            &[selector("10.2.0.0-10.2.0.255")],
        )
        .unwrap();
        assert_eq!(chosen.child.id.0, 1);
        assert_eq!(chosen.local, [selector("10.1.0.7")]);
        // The first selectors are a packet, which the second child alone has room for.
        let chosen = choose(
            &children,
            &[selector("10.1.0.7"), selector("10.0.0.0-10.255.255.255")],
            &[selector("10.2.0.77"), selector("10.0.0.0-10.255.255.255")],
        )
        .unwrap();
        assert_eq!(chosen.child.id.0, 1);
        assert!(all_covered(&chosen.remote, &[selector("10.2.0.77")]));
        assert_eq!(
            choose(&children, &[selector("10.9.0.1")], &[selector("10.2.0.1")]),
            None
        );
        assert_eq!(
            choose(&children, &[selector("::1")], &[selector("10.2.0.1")]),
            None
        );
    }
}
