//! Which policy of the whole host a packet meets, by a model of how the kernel looks it up.

use std::net::IpAddr;

use ipsec_common::{Spi, TrafficSelector};
use proptest::prelude::*;

use super::*;
use crate::dataplane::{
    kernel::policies::{Receiving, Sending},
    routing::RoutesMode,
    seam::Outer,
};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
const OUTER: Outer = Outer {
    local: HERE,
    remote: PEER,
    encap: None,
};
const TCP: u8 = 6;

fn side(net: &str) -> Vec<TrafficSelector> {
    let net: IpNet = net.parse().unwrap();
    vec![TrafficSelector {
        protocol: 0,
        ports: (0, u16::MAX),
        addresses: (net.network(), net.broadcast()),
    }]
}

fn pair(local: &str, remote: &str) -> SelectorPair {
    SelectorPair {
        local: side(local),
        remote: side(remote),
    }
}

/// A tunnel between prefixes, with what it lets bypass, and an SA of this number if it is up.
struct Tunnel {
    selectors: SelectorPair,
    narrowed: SelectorPair,
    clear: Vec<IpNet>,
    sa: Option<u32>,
}

impl Tunnel {
    fn between(local: &str, remote: &str) -> Self {
        let nets = |text: &str| vec![text.parse().unwrap()];
        let routing = RoutingSpec {
            mode: RoutesMode::Selectors,
            remote: nets(remote),
            local: nets(local),
            peers: Vec::new(),
            anywhere: false,
            outer_local: None,
            addresses: Vec::new(),
            bypass: Vec::new(),
        };
        Self {
            selectors: pair(local, remote),
            narrowed: pair(local, remote),
            clear: clear(&routing),
            sa: None,
        }
    }

    fn up(self, sa: u32) -> Self {
        Self {
            sa: Some(sa),
            ..self
        }
    }

    fn narrowed_to(self, local: &str, remote: &str) -> Self {
        Self {
            narrowed: pair(local, remote),
            ..self
        }
    }

    fn bypassing(mut self, net: &str) -> Self {
        self.clear.push(net.parse().unwrap());
        self
    }

    fn policies(&self, mode: Mode) -> BTreeSet<Policy> {
        let child = self.sa.map(|number| ChildPlan {
            number: 0,
            outbound: vec![Sending {
                spi: Spi(number),
                outer: OUTER,
                reqid: number,
                selectors: &self.narrowed,
                card: None,
            }],
            inbound: vec![Receiving {
                reqid: number,
                selectors: &self.narrowed,
                card: None,
            }],
            trap: None,
        });
        let protected = Protected {
            mode,
            selectors: vec![&self.selectors],
            clear: self.clear.clone(),
        };
        plan(&protected, child.as_slice()).unwrap()
    }
}

#[derive(Clone, Copy)]
struct Packet {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    ports: (u16, u16),
}

fn packet(source: &str, destination: &str) -> Packet {
    Packet {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        protocol: TCP,
        ports: (40_000, 80),
    }
}

fn matches(selector: &Selector, packet: &Packet) -> bool {
    let port = |mask: PortMask, port: u16| port & mask.mask == mask.port & mask.mask;
    selector.source.contains(&packet.source)
        && selector.destination.contains(&packet.destination)
        && (selector.protocol == 0 || selector.protocol == packet.protocol)
        && port(selector.source_port, packet.ports.0)
        && port(selector.destination_port, packet.ports.1)
}

/// What becomes of a packet: the SA that it leaves in or must have come in.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Clear,
    Blocked,
    In(u32),
}

use Fate::{Blocked, Clear, In};

/// As the kernel does it: of the policies that match the one with the smallest number. Of several tunnels' for the same packets
/// there is the one that would be asked first.
fn fate(tunnels: &[&Tunnel], direction: PolicyDirection, packet: Packet) -> Fate {
    let policies = tunnels.iter().flat_map(|one| one.policies(Mode::Tunnel));
    let asked = policies
        .filter(|policy| policy.direction == direction && matches(&policy.selector, &packet));
    match asked.min_by_key(|policy| policy.priority) {
        None => Clear,
        Some(policy) => match policy.action {
            Action::Pass => Clear,
            Action::Block => Blocked,
            Action::Protect(template) => In(template.reqid),
        },
    }
}

const OUT: PolicyDirection = PolicyDirection::Out;
const INWARD: [PolicyDirection; 2] = [PolicyDirection::In, PolicyDirection::Forward];

/// The same for a packet and for its answer, in every direction that they can meet.
fn both_ways(tunnels: &[&Tunnel], from: &str, to: &str, expected: &Fate) {
    assert_eq!(
        &fate(tunnels, OUT, packet(from, to)),
        expected,
        "{from} to {to}"
    );
    for direction in INWARD {
        assert_eq!(
            &fate(tunnels, direction, packet(to, from)),
            expected,
            "{direction:?}: {to} to {from}"
        );
    }
}

#[test]
fn all_directions_are_protected_or_blocked_and_nothing_else_is_touched() {
    let down = Tunnel::between("10.1.0.0/24", "10.2.0.0/24");
    assert_eq!(down.policies(Mode::Tunnel).len(), 3);
    assert!(down.policies(Mode::Tunnel).iter().all(is_ours));
    both_ways(&[&down], "10.1.0.9", "10.2.0.9", &Blocked);
    let up = down.up(7);
    assert_eq!(up.policies(Mode::Tunnel).len(), 3);
    both_ways(&[&up], "10.1.0.9", "10.2.0.9", &In(7));
    both_ways(&[&up], "10.1.0.9", "10.3.0.9", &Clear);
    both_ways(&[&up], "10.7.0.9", "10.2.0.9", &Clear);
    // The way that packets between the sites never go.
    assert_eq!(fate(&[&up], OUT, packet("10.2.0.9", "10.1.0.9")), Clear);
}

#[test]
fn of_two_tunnels_that_overlap_the_more_specific_one_has_the_packets_in_all_directions() {
    let wide = Tunnel::between("10.1.0.0/24", "10.0.0.0/8").up(1);
    let narrow = Tunnel::between("10.1.0.0/24", "10.2.0.0/16").up(2);
    for tunnels in [[&wide, &narrow], [&narrow, &wide]] {
        both_ways(&tunnels, "10.1.0.9", "10.2.0.9", &In(2));
        both_ways(&tunnels, "10.1.0.9", "10.3.0.9", &In(1));
    }
    // And what it has no SA for, nobody else has either.
    let narrow = Tunnel { sa: None, ..narrow };
    both_ways(&[&wide, &narrow], "10.1.0.9", "10.2.0.9", &Blocked);
    both_ways(&[&wide, &narrow], "10.1.0.9", "10.3.0.9", &In(1));
}

#[test]
fn what_was_narrowed_is_protected_and_the_rest_is_blocked() {
    let tunnel = Tunnel::between("10.1.0.0/24", "10.2.0.0/16");
    let tunnel = tunnel.narrowed_to("10.1.0.0/24", "10.2.7.0/24").up(3);
    both_ways(&[&tunnel], "10.1.0.9", "10.2.7.9", &In(3));
    both_ways(&[&tunnel], "10.1.0.9", "10.2.8.9", &Blocked);
}

#[test]
fn our_own_side_and_what_bypasses_stay_in_the_clear_though_everything_is_remote() {
    let everything = || Tunnel::between("10.1.0.0/24", "0.0.0.0/0").up(4);
    let tunnel = everything();
    both_ways(&[&tunnel], "10.1.0.9", "198.51.100.7", &In(4));
    both_ways(&[&tunnel], "10.1.0.9", "10.1.0.1", &Clear);
    assert_eq!(
        fate(&[&tunnel], OUT, packet("10.1.0.1", "224.0.0.5")),
        Clear
    );
    assert_eq!(
        fate(&[&tunnel], OUT, packet("10.1.0.1", "255.255.255.255")),
        Clear
    );
    let tunnel = everything().bypassing("10.9.0.0/16");
    both_ways(&[&tunnel], "10.1.0.9", "10.9.0.1", &Clear);
    // Whatever the peer has narrowed it to.
    let tunnel = everything().narrowed_to("10.1.0.0/24", "10.0.0.0/8");
    both_ways(&[&tunnel], "10.1.0.9", "10.1.0.1", &Clear);
    both_ways(&[&tunnel], "10.1.0.9", "10.2.0.1", &In(4));
    both_ways(&[&tunnel], "10.1.0.9", "198.51.100.7", &Blocked);
}

#[test]
fn what_bypasses_one_tunnel_is_still_another_ones() {
    let wide = Tunnel::between("10.1.0.0/24", "0.0.0.0/0").bypassing("10.9.0.0/16");
    for remote in ["10.9.0.0/16", "10.9.7.0/24", "10.0.0.0/8"] {
        let other = Tunnel::between("10.1.0.0/24", remote).up(5);
        both_ways(&[&wide, &other], "10.1.0.9", "10.9.7.1", &In(5));
    }
}

#[test]
fn neighbours_are_found_in_the_clear_where_everything_is_remote() {
    let tunnel = Tunnel::between("2001:db8:1::/48", "::/0").up(6);
    for destination in ["ff02::1:ff00:1", "fe80::1", "2001:db8:1::7"] {
        let sent = packet("2001:db8:1::1", destination);
        assert_eq!(fate(&[&tunnel], OUT, sent), Clear, "{destination}");
    }
    both_ways(&[&tunnel], "2001:db8:1::1", "2001:db8:2::1", &In(6));
    both_ways(&[&tunnel], "2001:db8:1::1", "ff05::2", &In(6));
}

#[test]
fn only_sides_that_are_the_same_cannot_be_told_apart() {
    for (local, remote, same) in [
        ("0.0.0.0/0", "0.0.0.0/0", true),
        ("10.0.0.0/8", "10.0.0.0/8", true),
        ("10.1.0.0/24", "0.0.0.0/0", false),
        ("0.0.0.0/0", "10.1.0.0/24", false),
    ] {
        assert_eq!(
            is_ambiguous(&pair(local, remote)),
            Ok(same),
            "{local} {remote}"
        );
    }
}

#[test]
fn in_transport_mode_two_hosts_are_protected_and_find_each_other() {
    let hosts = Tunnel::between("2001:db8::1/128", "2001:db8::2/128");
    let policies = hosts.policies(Mode::Transport);
    let of = |action| policies.iter().filter(move |one| one.action == action);
    assert_eq!(of(Action::Block).count(), 2);
    // Solicitations and advertisements, in both directions.
    assert_eq!(of(Action::Pass).count(), 4);
    for pass in of(Action::Pass) {
        assert!(of(Action::Block).all(|block| pass.priority < block.priority));
    }
    let policies = hosts.up(9).policies(Mode::Transport);
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

fn any_net() -> impl Strategy<Value = IpNet> {
    // Few addresses, so that many overlap.
    (0_u32..4, 0_u8..=4).prop_map(|(bits, length)| {
        let address = Ipv4Addr::from_bits(bits << 30);
        let net = Ipv4Net::new(address, length).unwrap();
        net.trunc().into()
    })
}

fn any_mask() -> impl Strategy<Value = PortMask> {
    (0_u16..4, 0_u32..=2).prop_map(|(bits, length)| {
        let mask = u16::try_from(0xffff_0000_u32 >> length & 0xffff).unwrap();
        PortMask {
            port: (bits << 14) & mask,
            mask,
        }
    })
}

fn any_selector() -> impl Strategy<Value = Selector> {
    (any_net(), any_net(), 0_u8..3, any_mask(), any_mask()).prop_map(
        |(source, destination, protocol, source_port, destination_port)| Selector {
            source,
            destination,
            protocol,
            source_port,
            destination_port,
        },
    )
}

fn is_inside(inner: &Selector, outer: &Selector) -> bool {
    let port = |inner: PortMask, outer: PortMask| {
        inner.mask & outer.mask == outer.mask && inner.port & outer.mask == outer.port
    };
    outer.source.contains(&inner.source)
        && outer.destination.contains(&inner.destination)
        && (outer.protocol == 0 || outer.protocol == inner.protocol)
        && port(inner.source_port, outer.source_port)
        && port(inner.destination_port, outer.destination_port)
}

proptest! {
    #[test]
    fn what_is_inside_is_asked_first_and_no_two_of_one_rank_meet(
        one in any_selector(), other in any_selector(), source in any::<u32>(), destination in any::<u32>(),
        protocol in 0_u8..3, ports in any::<(u16, u16)>(),
    ) {
        for direction in [OUT, INWARD[0], INWARD[1]] {
            let (first, second) = (rank(direction, &one), rank(direction, &other));
            if one != other && is_inside(&one, &other) {
                prop_assert!(first < second);
            }
            let packet = Packet {
                source: Ipv4Addr::from_bits(source).into(),
                destination: Ipv4Addr::from_bits(destination).into(),
                protocol,
                ports,
            };
            if one != other && first == second {
                prop_assert!(!matches(&one, &packet) || !matches(&other, &packet));
            }
        }
    }

    #[test]
    fn a_packet_and_its_answer_meet_policies_of_one_tunnel(one in any_selector(), other in any_selector()) {
        let back = |selector: &Selector| Selector {
            source: selector.destination,
            destination: selector.source,
            source_port: selector.destination_port,
            destination_port: selector.source_port,
            protocol: selector.protocol,
        };
        for direction in INWARD {
            prop_assert_eq!(
                rank(OUT, &one) < rank(OUT, &other),
                rank(direction, &back(&one)) < rank(direction, &back(&other))
            );
        }
    }
}
