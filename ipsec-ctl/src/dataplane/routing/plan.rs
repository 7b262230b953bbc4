//! Which routes and rules the tunnels need: a pure function of the configuration and of the kernel's addresses.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::{RoutesMode, RoutingSpec};
use crate::net::netlink::{Route, Rule, Service, Target};

/// The kernel's main table.
pub const MAIN: u32 = 254;
/// Our tables for prefixes of length 0 begin here, one for each tunnel.
const FIRST_TABLE: u32 = 0x4958_0000;
/// Our table of the ways past all tunnels, for our own packets to peers that may be anywhere.
const PAST_TUNNELS: u32 = FIRST_TABLE - 1;
/// Metric of routes into tunnels: better than what routing daemons install, worse than what an operator does by hand.
const TUNNEL_METRIC: u32 = 50;
/// Metric of backstops: the last resort.
const BACKSTOP_METRIC: u32 = 4_000_000_000;
/// Rules, in the order in which they are asked.
const TO_ANYWHERE: u32 = 5190;
const TO_PEER: u32 = 5200;
const OUR_MARK: u32 = 5210;
const SPECIFIC: u32 = 5220;
const TUNNELS: u32 = 5230;

/// A tunnel that wants routes.
#[derive(Clone, Debug)]
pub struct Wants<'a> {
    /// Number of its own table, distinct among the tunnels.
    pub number: u32,
    /// Index of its device; none before there is one, so that only the backstop is planned.
    pub device: Option<u32>,
    /// What it wants.
    pub spec: &'a RoutingSpec,
}

/// What the kernel has that the plan depends on.
#[derive(Clone, Debug, Default)]
pub struct Kernel {
    /// Addresses of this host.
    pub addresses: Vec<IpAddr>,
    /// Routes of the main table that are not ours.
    pub routes: Vec<Route>,
    /// Mark of our own packets.
    pub mark: u32,
    /// UDP ports of IKE and of ESP in UDP.
    pub ports: [u16; 2],
}

/// What the kernel should have of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Routes.
    pub routes: BTreeSet<Route>,
    /// Rules.
    pub rules: BTreeSet<Rule>,
    /// Peers that only a tunnel of ours leads to: nothing may be sent to them.
    pub unreachable: Vec<IpAddr>,
}

/// Plans for all tunnels at once, for what one protects may be where another's peer is.
pub fn plan(tunnels: &[Wants<'_>], kernel: &Kernel) -> Plan {
    let mut plan = Plan::default();
    for tunnel in tunnels {
        if tunnel.spec.mode == RoutesMode::Manual {
            continue;
        }
        for prefix in &tunnel.spec.remote {
            plan.protect(tunnel, *prefix, kernel);
        }
        for bypass in &tunnel.spec.bypass {
            plan.bypass(*bypass, kernel);
        }
    }
    let peers: BTreeSet<&IpAddr> = tunnels
        .iter()
        .flat_map(|tunnel| &tunnel.spec.peers)
        .collect();
    let protected = plan.protected();
    for peer in peers {
        plan.reach(*peer, &protected, kernel);
    }
    for v6 in [false, true] {
        plan.pass_tunnels(tunnels, kernel, v6);
    }
    plan
}

/// A rule of a family for all packets.
fn rule(v6: bool, priority: u32, table: u32) -> Rule {
    Rule {
        priority,
        v6,
        from: None,
        to: None,
        mark: None,
        local: false,
        service: None,
        table,
        suppress: None,
    }
}

/// Rules for what a tunnel's peer, which may be anywhere, sends here and is sent from here. A check of the way back
/// (`rp_filter`, of IPv4 alone) knows no mark, but it knows ports and protocols.
fn services(spec: &RoutingSpec, ports: [u16; 2], rule: Rule) -> impl Iterator<Item = Rule> {
    const WHOLE: u32 = 32;
    let from = spec.outer_local.filter(IpAddr::is_ipv4).map(IpNet::from);
    let [ike, nat] = ports;
    let services = [Service::Udp(ike), Service::Udp(nat), Service::Esp];
    let rules = services.into_iter().map(move |service| Rule {
        from,
        local: true,
        service: Some(service),
        ..rule
    });
    // Decides nothing, and has the kernel look for ports where it checks the way back.
    let look = Rule {
        service: Some(Service::Esp),
        suppress: Some(WHOLE),
        ..rule
    };
    rules.chain([look]).filter(|rule| !rule.v6)
}

impl Plan {
    /// The route of a prefix and the backstop behind it.
    fn protect(&mut self, tunnel: &Wants<'_>, prefix: IpNet, kernel: &Kernel) {
        // A default route in the main table would compete with the host's own, whichever metric it has: either our IKE
        // goes into the tunnel, or plaintext goes past it.
        let table = if prefix.prefix_len() == 0 {
            self.divert(tunnel, prefix, kernel);
            FIRST_TABLE + tunnel.number
        } else {
            MAIN
        };
        self.routes.insert(Route {
            prefix,
            table,
            metric: BACKSTOP_METRIC,
            target: Target::Blackhole,
            source: None,
        });
        if let Some(device) = tunnel.device {
            self.routes.insert(Route {
                prefix,
                table,
                metric: TUNNEL_METRIC,
                target: Target::Device(device, None),
                source: source(tunnel.spec, prefix, kernel),
            });
        }
    }

    /// The rules that lead everything but our own packets and more specific routes into the tunnel's own table.
    fn divert(&mut self, tunnel: &Wants<'_>, prefix: IpNet, kernel: &Kernel) {
        let v6 = prefix.addr().is_ipv6();
        let rule = |priority, table| rule(v6, priority, table);
        // Also asked when the kernel checks the way back to the source of the peer's packets (rp_filter).
        for peer in tunnel.spec.peers.iter().filter(|peer| peer.is_ipv6() == v6) {
            self.rules.insert(Rule {
                from: tunnel.spec.outer_local.map(IpNet::from),
                to: Some(IpNet::from(*peer)),
                ..rule(TO_PEER, MAIN)
            });
        }
        if tunnel.spec.anywhere {
            let rules = services(tunnel.spec, kernel.ports, rule(TO_PEER, MAIN));
            self.rules.extend(rules);
        }
        self.rules.insert(Rule {
            mark: Some(kernel.mark),
            ..rule(OUR_MARK, MAIN)
        });
        self.rules.insert(Rule {
            suppress: Some(0),
            ..rule(SPECIFIC, MAIN)
        });
        let table = FIRST_TABLE + tunnel.number;
        let locals: Vec<&IpNet> = tunnel
            .spec
            .local
            .iter()
            .filter(|local| local.addr().is_ipv6() == v6)
            .collect();
        for local in locals {
            self.rules.insert(Rule {
                from: (local.prefix_len() > 0).then_some(*local),
                ..rule(TUNNELS, table)
            });
        }
    }

    /// A bypassed prefix goes the way it would go without us.
    fn bypass(&mut self, prefix: IpNet, kernel: &Kernel) {
        if let Some(other) = best(IpNet::from(prefix.network()), &kernel.routes) {
            self.routes.insert(Route {
                prefix,
                table: MAIN,
                metric: TUNNEL_METRIC,
                target: other.target,
                source: other.source,
            });
        }
    }

    /// What routes of the main table lead elsewhere than without us.
    fn protected(&self) -> Prefixes {
        let routes = self.routes.iter().filter(|route| route.table == MAIN);
        Prefixes::new(routes.map(|route| route.prefix))
    }

    /// A peer inside a protected prefix of the main table is reached by the best next hop that is not ours.
    fn reach(&mut self, peer: IpAddr, protected: &Prefixes, kernel: &Kernel) {
        if !protected.contain(peer) {
            return;
        }
        match best(IpNet::from(peer), &kernel.routes) {
            Some(other) => {
                self.routes.insert(Route {
                    prefix: IpNet::from(peer),
                    table: MAIN,
                    metric: TUNNEL_METRIC,
                    target: other.target,
                    source: other.source,
                });
            }
            None => self.unreachable.push(peer),
        }
    }

    /// Where peers may be anywhere, inside of what tunnels protect too, our own packets go as they would go without us. No
    /// route to such a peer is added for everybody: where it is only its datagrams tell, which anybody on the way can have
    /// sent from elsewhere, and plaintext to that address would go in the clear.
    fn pass_tunnels(&mut self, tunnels: &[Wants<'_>], kernel: &Kernel, v6: bool) {
        let protected: Vec<IpNet> = self
            .routes
            .iter()
            .filter(|route| route.table == MAIN && route.target == Target::Blackhole)
            .map(|route| route.prefix)
            .filter(|prefix| prefix.addr().is_ipv6() == v6)
            .collect();
        let mut anywhere = tunnels
            .iter()
            .filter(|tunnel| tunnel.spec.anywhere)
            .peekable();
        if protected.is_empty() || anywhere.peek().is_none() {
            return;
        }
        let within = kernel.routes.iter().map(|route| route.prefix);
        let within = within.filter(|prefix| protected.iter().any(|outer| outer.contains(prefix)));
        for prefix in protected.iter().copied().chain(within) {
            if let Some(other) = best(prefix, &kernel.routes) {
                self.routes.insert(Route {
                    prefix,
                    table: PAST_TUNNELS,
                    metric: TUNNEL_METRIC,
                    target: other.target,
                    source: other.source,
                });
            }
        }
        let rule = rule(v6, TO_ANYWHERE, PAST_TUNNELS);
        self.rules.insert(Rule {
            mark: Some(kernel.mark),
            ..rule
        });
        for tunnel in anywhere {
            self.rules.extend(services(tunnel.spec, kernel.ports, rule));
        }
    }
}

/// Prefixes, of which there may be thousands, while there are few lengths.
struct Prefixes {
    all: BTreeSet<IpNet>,
    lengths: BTreeSet<u8>,
}

impl Prefixes {
    fn new(prefixes: impl Iterator<Item = IpNet>) -> Self {
        let all: BTreeSet<IpNet> = prefixes.map(|prefix| prefix.trunc()).collect();
        let lengths = all.iter().map(IpNet::prefix_len).collect();
        Self { all, lengths }
    }

    /// Whether an address is in one of them.
    fn contain(&self, address: IpAddr) -> bool {
        let mut around = self.lengths.iter();
        around.any(|length| {
            IpNet::new(address, *length).is_ok_and(|net| self.all.contains(&net.trunc()))
        })
    }
}

/// The route that the kernel would take without us: the longest prefix, then the lowest metric.
fn best(destination: IpNet, routes: &[Route]) -> Option<&Route> {
    routes
        .iter()
        .filter(|route| route.prefix.contains(&destination))
        .min_by_key(|route| (u8::MAX - route.prefix.prefix_len(), route.metric))
        .filter(|route| route.target != Target::Blackhole)
}

/// Our address inside the local selectors: what local packets must come from to match a selector at all.
fn source(spec: &RoutingSpec, prefix: IpNet, kernel: &Kernel) -> Option<IpAddr> {
    let v6 = prefix.addr().is_ipv6();
    let inside = |address: &&IpAddr| {
        address.is_ipv6() == v6
            && !address.is_loopback()
            && spec.local.iter().any(|local| local.contains(*address))
    };
    let own = spec.addresses.iter().map(IpNet::addr);
    own.clone()
        .find(|address| inside(&address))
        .or_else(|| {
            kernel
                .addresses
                .iter()
                // With 0.0.0.0/0 every address is inside, and the outer one is the worst choice of all.
                .filter(|address| Some(**address) != spec.outer_local)
                .find(inside)
                .copied()
        })
        .filter(|_| spec.local.iter().all(|local| local.prefix_len() > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(remote: &[&str], local: &[&str], peer: &str) -> RoutingSpec {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        RoutingSpec {
            mode: RoutesMode::Selectors,
            remote: nets(remote),
            local: nets(local),
            peers: vec![peer.parse().unwrap()],
            anywhere: false,
            outer_local: Some("192.0.2.1".parse().unwrap()),
            addresses: Vec::new(),
            bypass: Vec::new(),
        }
    }

    fn wants(spec: &RoutingSpec) -> Wants<'_> {
        Wants {
            number: 3,
            device: Some(9),
            spec,
        }
    }

    fn kernel() -> Kernel {
        Kernel {
            addresses: vec!["192.0.2.1".parse().unwrap(), "10.1.0.1".parse().unwrap()],
            routes: vec![Route {
                prefix: "0.0.0.0/0".parse().unwrap(),
                table: MAIN,
                metric: 0,
                target: Target::Device(2, Some("192.0.2.254".parse().unwrap())),
                source: None,
            }],
            mark: 0x4958,
            ports: [500, 4500],
        }
    }

    fn find<'a>(plan: &'a Plan, prefix: &str, target: Target) -> Option<&'a Route> {
        plan.routes
            .iter()
            .find(|route| route.prefix.to_string() == prefix && route.target == target)
    }

    #[test]
    fn a_prefix_has_its_route_and_a_backstop_behind_it() {
        let spec = spec(&["10.2.0.0/24"], &["10.1.0.0/24"], "203.0.113.9");
        let plan = plan(&[wants(&spec)], &kernel());
        let route = find(&plan, "10.2.0.0/24", Target::Device(9, None)).unwrap();
        let backstop = find(&plan, "10.2.0.0/24", Target::Blackhole).unwrap();
        assert!(route.metric < backstop.metric);
        assert_eq!(route.source, Some("10.1.0.1".parse().unwrap()));
        assert!(plan.rules.is_empty());
        assert_eq!(plan.routes.len(), 2);
    }

    #[test]
    fn without_a_device_only_the_backstop_stands() {
        let spec = spec(&["10.2.0.0/24"], &["10.1.0.0/24"], "203.0.113.9");
        let mut tunnel = wants(&spec);
        tunnel.device = None;
        let plan = plan(&[tunnel], &kernel());
        assert_eq!(plan.routes.len(), 1);
        assert!(find(&plan, "10.2.0.0/24", Target::Blackhole).is_some());
    }

    #[test]
    fn a_default_prefix_never_enters_the_main_table_and_our_own_packets_never_the_tunnel() {
        let spec = spec(&["0.0.0.0/0"], &["0.0.0.0/0"], "203.0.113.9");
        let plan = plan(&[wants(&spec)], &kernel());
        assert!(
            plan.routes
                .iter()
                .all(|route| route.table == FIRST_TABLE + 3)
        );
        let order: Vec<(u32, u32)> = plan
            .rules
            .iter()
            .map(|rule| (rule.priority, rule.table))
            .collect();
        assert_eq!(
            order,
            [
                (TO_PEER, MAIN),
                (OUR_MARK, MAIN),
                (SPECIFIC, MAIN),
                (TUNNELS, FIRST_TABLE + 3)
            ]
        );
        assert!(plan.rules.iter().any(|rule| rule.mark == Some(0x4958)));
        assert!(plan.rules.iter().any(|rule| rule.suppress == Some(0)));
    }

    #[test]
    fn a_peer_inside_a_protected_prefix_is_reached_past_the_tunnel() {
        let spec = spec(&["203.0.113.0/24"], &["10.1.0.0/24"], "203.0.113.9");
        let plan = plan(&[wants(&spec)], &kernel());
        let past = Target::Device(2, Some("192.0.2.254".parse().unwrap()));
        assert!(find(&plan, "203.0.113.9/32", past).is_some());
        assert!(plan.unreachable.is_empty());

        let nowhere = Kernel {
            routes: Vec::new(),
            ..kernel()
        };
        let plan = super::plan(&[wants(&spec)], &nowhere);
        assert_eq!(plan.unreachable, ["203.0.113.9".parse::<IpAddr>().unwrap()]);
    }

    /// The tunnel of peers that may be anywhere.
    fn anywhere(remote: &[&str]) -> RoutingSpec {
        RoutingSpec {
            peers: Vec::new(),
            anywhere: true,
            ..spec(remote, &["10.1.0.0/24"], "203.0.113.9")
        }
    }

    #[test]
    fn our_own_packets_alone_pass_the_tunnels_to_peers_that_may_be_anywhere() {
        let spec = anywhere(&["10.2.0.0/16"]);
        let mut kernel = kernel();
        let inside = Route {
            prefix: "10.2.7.0/24".parse().unwrap(),
            target: Target::Device(3, None),
            ..kernel.routes[0]
        };
        kernel.routes.push(inside);
        let plan = plan(&[wants(&spec)], &kernel);
        let past: Vec<_> = plan
            .routes
            .iter()
            .filter(|route| route.table == PAST_TUNNELS)
            .map(|route| (route.prefix.to_string(), route.target))
            .collect();
        let gateway = Target::Device(2, Some("192.0.2.254".parse().unwrap()));
        assert_eq!(
            past,
            [
                ("10.2.0.0/16".to_owned(), gateway),
                ("10.2.7.0/24".to_owned(), inside.target)
            ]
        );
        let main = plan.routes.iter().filter(|route| route.table == MAIN);
        assert_eq!(main.count(), 2, "the tunnel's route and its backstop");
        assert_eq!(plan.rules.len(), 5);
        for rule in &plan.rules {
            assert_eq!((rule.priority, rule.table), (TO_ANYWHERE, PAST_TUNNELS));
            assert!(rule.mark.is_some() || rule.local || rule.suppress == Some(32));
        }
    }

    #[test]
    fn the_way_back_to_peers_that_may_be_anywhere_is_not_the_tunnel_for_everything() {
        let plan = plan(&[wants(&anywhere(&["0.0.0.0/0"]))], &kernel());
        let services = plan.rules.iter().filter(|rule| rule.service.is_some());
        assert!(
            services
                .clone()
                .all(|rule| (rule.priority, rule.table) == (TO_PEER, MAIN))
        );
        assert_eq!(services.count(), 4);
        assert!(
            plan.routes
                .iter()
                .all(|route| route.table == FIRST_TABLE + 3)
        );
    }

    #[test]
    fn a_bypassed_prefix_goes_the_way_it_would_go_without_us() {
        let mut spec = spec(&["10.0.0.0/8"], &["172.16.0.0/24"], "203.0.113.9");
        spec.bypass = vec!["10.5.0.0/16".parse().unwrap()];
        let plan = plan(&[wants(&spec)], &kernel());
        let past = Target::Device(2, Some("192.0.2.254".parse().unwrap()));
        assert!(find(&plan, "10.5.0.0/16", past).is_some());
    }

    #[test]
    fn a_routing_daemon_is_left_alone() {
        let mut spec = spec(&["10.2.0.0/24"], &["10.1.0.0/24"], "203.0.113.9");
        spec.mode = RoutesMode::Manual;
        assert_eq!(plan(&[wants(&spec)], &kernel()), Plan::default());
    }
}
