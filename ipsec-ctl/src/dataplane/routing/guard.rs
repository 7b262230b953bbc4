//! Which plaintext must not arrive: what the tunnels protect in the other direction, a pure function of the configuration.
//!
//! Where selectors tell the two sides apart, the addresses of a packet decide. Where they do not (a remote prefix of
//! length 0) or are not to (route-based tunnels), the way back to its source does.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

use super::{RoutesMode, RoutingSpec};
use crate::net::netfilter::guard::{Guard, Pair, Range};

/// A tunnel that may have something to guard.
#[derive(Clone, Copy, Debug)]
pub struct Guarded<'a> {
    /// Name of its device.
    pub device: &'a str,
    /// Whether the device is there: before, only backstops stand behind what it protects.
    pub is_there: bool,
    /// What it protects.
    pub spec: &'a RoutingSpec,
}

/// What must not arrive in the clear; `ports` are those of IKE and of ESP in UDP.
pub fn guard(tunnels: &[Guarded<'_>], ports: [u16; 2]) -> Guard {
    let by_route = tunnels.iter().filter(|tunnel| is_by_route(tunnel.spec));
    Guard {
        without_devices: by_route.clone().any(|tunnel| !tunnel.is_there),
        tunnels: tunnels
            .iter()
            .map(|tunnel| tunnel.device.to_owned())
            .collect(),
        routed: by_route.map(|tunnel| tunnel.device.to_owned()).collect(),
        v4: pairs(tunnels, false, v4),
        v6: pairs(tunnels, true, Ipv6Addr::from_bits),
        ports,
    }
}

/// What all tunnels protect of the addresses that packets may come from.
#[derive(Debug)]
pub struct Protected {
    v4: Vec<Span>,
    v6: Vec<Span>,
}

impl Protected {
    /// By these tunnels.
    pub fn by<'a>(tunnels: impl Iterator<Item = &'a RoutingSpec> + Clone) -> Self {
        let remote = tunnels
            .filter(|spec| spec.mode != RoutesMode::Manual)
            .flat_map(|spec| &spec.remote);
        Self {
            v4: spans(remote.clone(), false),
            v6: spans(remote, true),
        }
    }

    /// Whether a packet may go into a tunnel by its own selectors though another one, or the same, protects its source: the
    /// XDP program, whose packets the table does not see, then asks for the way back first.
    pub fn meets(&self, tunnel: &RoutingSpec) -> bool {
        [(false, &self.v4), (true, &self.v6)]
            .into_iter()
            .any(|(v6, protected)| {
                spans(&tunnel.local, v6).iter().any(|(first, last)| {
                    let at = protected.partition_point(|(_, end)| end < first);
                    protected.get(at).is_some_and(|(start, _)| start <= last)
                })
            })
    }
}

/// Whether the way back to a packet's source decides.
fn is_by_route(spec: &RoutingSpec) -> bool {
    match spec.mode {
        RoutesMode::Selectors => spec.remote.iter().any(|prefix| prefix.prefix_len() == 0),
        RoutesMode::Routed => true,
        RoutesMode::Manual => false,
    }
}

fn v4(number: u128) -> Ipv4Addr {
    u32::try_from(number).map_or(Ipv4Addr::BROADCAST, Ipv4Addr::from_bits)
}

/// First and last address as numbers.
type Span = (u128, u128);

fn spans<'a>(prefixes: impl IntoIterator<Item = &'a IpNet>, v6: bool) -> Vec<Span> {
    let number = |address| match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    };
    let spans = prefixes
        .into_iter()
        .filter(|prefix| prefix.addr().is_ipv6() == v6)
        .map(|prefix| (number(prefix.network()), number(prefix.broadcast())));
    merged(spans.collect())
}

/// The same addresses in as few spans as can be, in order.
fn merged(mut spans: Vec<Span>) -> Vec<Span> {
    spans.sort_unstable();
    let mut merged: Vec<Span> = Vec::new();
    for (first, last) in spans {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            Some(_) | None => merged.push((first, last)),
        }
    }
    merged
}

/// What of `spans` is not in `cut`; both in order and apart.
fn without(spans: &[Span], cut: &[Span]) -> Vec<Span> {
    let mut left = Vec::new();
    for &(first, last) in spans {
        let mut next = Some(first);
        for &(from, to) in cut
            .iter()
            .filter(|(from, to)| *from <= last && *to >= first)
        {
            if let Some(start) = next.filter(|start| *start < from) {
                left.push((start, from - 1));
            }
            next = to.checked_add(1);
        }
        if let Some(start) = next.filter(|start| *start <= last) {
            left.push((start, last));
        }
    }
    left
}

/// Pairs of remote and local addresses, of which no two overlap though those of tunnels may.
fn pairs<A: Copy>(tunnels: &[Guarded<'_>], v6: bool, address: fn(u128) -> A) -> Vec<Pair<A>> {
    let range = |(first, last)| Range {
        first: address(first),
        last: address(last),
    };
    let mut locals: Vec<Vec<Span>> = Vec::new();
    // Where tunnels begin and cease to protect sources, by address.
    let mut edges: BTreeMap<u128, Vec<(usize, bool)>> = BTreeMap::new();
    for spec in tunnels.iter().map(|tunnel| tunnel.spec) {
        if spec.mode != RoutesMode::Selectors {
            continue;
        }
        let remote = spec.remote.iter().filter(|prefix| prefix.prefix_len() > 0);
        // Sources on our own side arrive from there, and those that are bypassed in the clear.
        let cut = spans(spec.local.iter().chain(&spec.bypass), v6);
        for (first, last) in without(&spans(remote, v6), &cut) {
            edges.entry(first).or_default().push((locals.len(), true));
            if let Some(next) = last.checked_add(1) {
                edges.entry(next).or_default().push((locals.len(), false));
            }
        }
        locals.push(spans(&spec.local, v6));
    }
    let mut pairs = Vec::new();
    let mut active = BTreeSet::new();
    let mut edges = edges.into_iter().peekable();
    while let Some((first, changes)) = edges.next() {
        for (tunnel, begins) in changes {
            if begins {
                active.insert(tunnel);
            } else {
                active.remove(&tunnel);
            }
        }
        let last = edges.peek().map_or(u128::MAX, |(next, _)| next - 1);
        let destinations = active
            .iter()
            .filter_map(|tunnel| locals.get(*tunnel))
            .flatten();
        for destination in merged(destinations.copied().collect()) {
            pairs.push(Pair {
                source: range((first, last)),
                destination: range(destination),
            });
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn spec(mode: RoutesMode, remote: &[&str], local: &[&str], bypass: &[&str]) -> RoutingSpec {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        RoutingSpec {
            mode,
            remote: nets(remote),
            local: nets(local),
            peers: Vec::new(),
            anywhere: false,
            outer_local: None,
            addresses: Vec::new(),
            bypass: nets(bypass),
        }
    }

    fn guard_of(specs: &[&RoutingSpec]) -> Guard {
        let tunnels: Vec<_> = specs
            .iter()
            .map(|spec| Guarded {
                device: "tunnel",
                is_there: true,
                spec,
            })
            .collect();
        guard(&tunnels, [500, 4500])
    }

    fn drops(guard: &Guard, from: &str, to: &str) -> bool {
        let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
        fn is_in<A: Copy + Into<IpAddr>>(range: &Range<A>, address: IpAddr) -> bool {
            (range.first.into()..=range.last.into()).contains(&address)
        }
        let hits = guard
            .v4
            .iter()
            .filter(|pair| is_in(&pair.source, from) && is_in(&pair.destination, to))
            .count()
            + guard
                .v6
                .iter()
                .filter(|pair| is_in(&pair.source, from) && is_in(&pair.destination, to))
                .count();
        assert!(hits < 2, "overlapping pairs");
        hits == 1
    }

    #[test]
    fn selectors_guard_the_way_from_remote_to_local() {
        let v4 = spec(
            RoutesMode::Selectors,
            &["10.2.0.0/24"],
            &["10.1.0.0/24"],
            &[],
        );
        let v6 = spec(
            RoutesMode::Selectors,
            &["2001:db8:2::/64"],
            &["2001:db8:1::/64"],
            &[],
        );
        let guard = guard_of(&[&v4, &v6]);
        assert!(guard.routed.is_empty());
        assert!(drops(&guard, "10.2.0.9", "10.1.0.255"));
        assert!(drops(&guard, "2001:db8:2::9", "2001:db8:1::"));
        assert!(!drops(&guard, "10.1.0.9", "10.2.0.9"));
        assert!(!drops(&guard, "10.2.1.9", "10.1.0.9"));
        assert!(!drops(&guard, "2001:db8:2::9", "2001:db8:2::9"));
    }

    #[test]
    fn what_is_bypassed_and_what_is_on_our_own_side_may_come() {
        let wide = spec(
            RoutesMode::Selectors,
            &["10.0.0.0/8"],
            &["10.1.0.0/24"],
            &["10.5.0.0/16"],
        );
        let guard = guard_of(&[&wide]);
        assert!(drops(&guard, "10.2.0.9", "10.1.0.9"));
        assert!(!drops(&guard, "10.5.0.9", "10.1.0.9"));
        assert!(!drops(&guard, "10.1.0.9", "10.1.0.1"));
        // Another tunnel protects what this one lets pass.
        let inner = spec(
            RoutesMode::Selectors,
            &["10.5.1.0/24"],
            &["10.1.0.0/24"],
            &[],
        );
        let guard = guard_of(&[&wide, &inner]);
        assert!(drops(&guard, "10.5.1.9", "10.1.0.9"));
        assert!(!drops(&guard, "10.5.2.9", "10.1.0.9"));
    }

    #[test]
    fn where_everything_is_remote_the_way_back_decides() {
        let any = spec(RoutesMode::Selectors, &["0.0.0.0/0"], &["0.0.0.0/0"], &[]);
        let routed = spec(RoutesMode::Routed, &["10.2.0.0/24"], &["10.1.0.0/24"], &[]);
        for spec in [any, routed] {
            let guard = guard_of(&[&spec]);
            assert_eq!(guard.routed.len(), 1);
            assert!(guard.v4.is_empty());
        }
        let manual = spec(RoutesMode::Manual, &["10.2.0.0/24"], &["10.1.0.0/24"], &[]);
        let guard = guard_of(&[&manual]);
        assert!(guard.is_empty());
        assert_eq!(guard.tunnels.len(), 1);
    }

    #[test]
    fn while_a_device_is_not_there_what_has_no_way_back_is_refused() {
        let without = |mode, is_there| {
            let spec = spec(mode, &["10.2.0.0/24"], &["10.1.0.0/24"], &[]);
            let tunnel = Guarded {
                device: "tunnel",
                is_there,
                spec: &spec,
            };
            guard(&[tunnel], [500, 4500]).without_devices
        };
        assert!(without(RoutesMode::Routed, false));
        assert!(!without(RoutesMode::Routed, true));
        assert!(
            !without(RoutesMode::Selectors, false),
            "the addresses decide"
        );
    }

    #[test]
    fn the_way_back_matters_where_a_tunnel_takes_sources_that_another_protects() {
        let one = spec(
            RoutesMode::Selectors,
            &["10.2.0.0/24"],
            &["10.1.0.0/24"],
            &[],
        );
        let other = spec(
            RoutesMode::Selectors,
            &["10.3.0.0/24"],
            &["10.1.0.0/24"],
            &[],
        );
        assert!(!Protected::by([&one, &other].into_iter()).meets(&one));
        let any = spec(RoutesMode::Selectors, &["0.0.0.0/0"], &["0.0.0.0/0"], &[]);
        assert!(Protected::by([&any].into_iter()).meets(&any));
        assert!(Protected::by([&any, &one].into_iter()).meets(&any));
        assert!(Protected::by([&any, &one].into_iter()).meets(&one));
        let hub = spec(
            RoutesMode::Selectors,
            &["10.2.0.0/24"],
            &["10.0.0.0/8"],
            &[],
        );
        assert!(Protected::by([&hub, &other].into_iter()).meets(&hub));
        let manual = spec(RoutesMode::Manual, &["0.0.0.0/0"], &["0.0.0.0/0"], &[]);
        assert!(
            !Protected::by([&manual].into_iter()).meets(&manual),
            "nothing is protected"
        );
        let v6 = spec(
            RoutesMode::Selectors,
            &["2001:db8::/32"],
            &["2001:db9::/32"],
            &[],
        );
        assert!(!Protected::by([&one, &v6].into_iter()).meets(&one));
    }

    fn prefix() -> impl Strategy<Value = IpNet> {
        (any::<u8>(), 25..=32_u8)
            .prop_map(|(last, length)| IpNet::new([10, 0, 0, last].into(), length).unwrap().trunc())
    }

    proptest! {
        #[test]
        fn pairs_never_overlap_and_hold_exactly_what_some_tunnel_protects(
            tunnels in vec((vec(prefix(), 1..4), vec(prefix(), 1..4), vec(prefix(), 0..3)), 1..6),
            packets in vec((any::<u8>(), any::<u8>()), 64),
        ) {
            let specs: Vec<RoutingSpec> = tunnels
                .into_iter()
                .map(|(remote, local, bypass)| RoutingSpec {
                    remote,
                    local,
                    bypass,
                    ..spec(RoutesMode::Selectors, &[], &[], &[])
                })
                .collect();
            let guard = guard_of(&specs.iter().collect::<Vec<_>>());
            for (from, to) in packets {
                let (from, to) = (IpAddr::from([10, 0, 0, from]), IpAddr::from([10, 0, 0, to]));
                let is_in = |nets: &[IpNet], address| nets.iter().any(|net| net.contains(&address));
                let protected = specs.iter().any(|spec| {
                    is_in(&spec.remote, from)
                        && !is_in(&spec.local, from)
                        && !is_in(&spec.bypass, from)
                        && is_in(&spec.local, to)
                });
                prop_assert_eq!(drops(&guard, &from.to_string(), &to.to_string()), protected);
            }
        }
    }
}
