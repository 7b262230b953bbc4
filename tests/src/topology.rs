//! Two sites with a gateway each, and the network between them.
//!
//! ```text
//!      host A ───── gateway A ───────────── router ───────────── gateway B ───── host B
//!          lan    lan       wan       to-a  │  to-b         wan       lan    lan
//!   10.1.0.10     10.1.0.1               .1   │   .1               10.2.0.1    10.2.0.10
//!   fd00:1::10    fd00:1::1                   │                   fd00:2::1    fd00:2::10
//!                      198.51.100.2           │to-x       203.0.113.2
//!                      2001:db8:a::2          │           2001:db8:b::2
//!                                          attacker
//!                                          192.0.2.66, 2001:db8:c::66
//! ```
//!
//! The router can hide gateway A behind its own address (NAT). It has routes to both LANs, so that whatever a gateway
//! lets out in the clear arrives, and is seen, instead of being lost by luck.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Context;
use serde_json::Value;

use crate::{
    netdevsim::Cards,
    netns::{Netns, Scope},
};

/// One of the two sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The left one, behind the NAT if there is one.
    A,
    /// The right one.
    B,
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Choices for [`Topology::build`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The router masquerades what comes from site A.
    pub nat: bool,
    /// Hosts leave checksums to their interface, as veth lets them.
    pub host_offload: bool,
    /// Between gateway A and the router are simulated network cards.
    pub cards: bool,
    /// LAN and WAN of the gateways are VLANs, on cables that carry tagged frames.
    pub vlan: bool,
}

/// The namespaces, cabled and addressed. All are removed on drop.
#[derive(Debug)]
pub struct Topology {
    /// Names of this topology; gateways name their instances after it.
    pub scope: Scope,
    /// Host at site A.
    pub host_a: Netns,
    /// Gateway of site A.
    pub gateway_a: Netns,
    /// Between the sites.
    pub router: Netns,
    /// Gateway of site B.
    pub gateway_b: Netns,
    /// Host at site B.
    pub host_b: Netns,
    /// Somebody else on the network between.
    pub attacker: Netns,
    /// The card of gateway A and the router's, if they are simulated.
    pub cards: Option<Cards>,
}

impl Side {
    /// The other side.
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// 1 or 2, as it stands in the addresses.
    fn number(self) -> u16 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }

    /// `a` or `b`, as it stands in names.
    pub fn letter(self) -> char {
        match self {
            Self::A => 'a',
            Self::B => 'b',
        }
    }

    fn lan(self, family: Family, host: u8) -> IpAddr {
        match family {
            Family::V4 => Ipv4Addr::new(10, self.number().to_be_bytes()[1], 0, host).into(),
            Family::V6 => {
                let host = if host == 10 { 0x10 } else { u16::from(host) };
                Ipv6Addr::new(0xfd00, self.number(), 0, 0, 0, 0, 0, host).into()
            }
        }
    }

    fn wan_net(self, family: Family, host: u8) -> IpAddr {
        match (family, self) {
            (Family::V4, Self::A) => Ipv4Addr::new(198, 51, 100, host).into(),
            (Family::V4, Self::B) => Ipv4Addr::new(203, 0, 113, host).into(),
            (Family::V6, _) => {
                let site = 9 + self.number();
                Ipv6Addr::new(0x2001, 0xdb8, site, 0, 0, 0, 0, u16::from(host)).into()
            }
        }
    }

    /// Address of the host.
    pub fn host(self, family: Family) -> IpAddr {
        self.lan(family, 10)
    }

    /// The gateway's address at the site.
    pub fn inside(self, family: Family) -> IpAddr {
        self.lan(family, 1)
    }

    /// The gateway's address on the network between, where its peer finds it (unless there is a NAT).
    pub fn outside(self, family: Family) -> IpAddr {
        self.wan_net(family, 2)
    }

    /// Another address that the gateway may have on the network between.
    pub fn elsewhere(self) -> IpAddr {
        self.wan_net(Family::V4, 77)
    }

    /// The router's address next to the gateway.
    pub fn router(self, family: Family) -> IpAddr {
        self.wan_net(family, 1)
    }

    /// The prefix of the site.
    pub fn prefix(self, family: Family) -> String {
        match family {
            Family::V4 => format!("10.{}.0.0/24", self.number()),
            Family::V6 => format!("fd00:{}::/64", self.number()),
        }
    }
}

/// The VLAN of all cables with [`Options::vlan`].
const VLAN: u16 = 5;

/// The attacker's address.
pub fn attacker(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 0, 2, 66).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 0x66).into(),
    }
}

/// Whether an address belongs to one of the sites, and so must not appear outside a tunnel.
pub fn is_inside(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => matches!(v4.octets(), [10, 1 | 2, 0, _]),
        IpAddr::V6(v6) => matches!(v6.segments(), [0xfd00, 1 | 2, ..]),
    }
}

impl Topology {
    /// Builds it under names of its own.
    ///
    /// # Errors
    ///
    /// Not root, or the kernel lacks something.
    pub fn build(options: Options) -> anyhow::Result<Self> {
        Self::build_as(Scope::of_this_test(), options)
    }

    /// Builds it under the given names.
    ///
    /// # Errors
    ///
    /// As for [`Self::build`].
    pub fn build_as(scope: Scope, options: Options) -> anyhow::Result<Self> {
        let make = |what: &str| Netns::create(&scope.name(what));
        let mut topology = Self {
            host_a: make("host-a")?,
            gateway_a: make("gateway-a")?,
            router: make("router")?,
            gateway_b: make("gateway-b")?,
            host_b: make("host-b")?,
            attacker: make("attacker")?,
            cards: None,
            scope,
        };
        for netns in topology.all() {
            // Addresses must work at once, and nobody but us gives any.
            netns.sysctl("net.ipv6.conf.default.accept_dad", "0")?;
            netns.sysctl("net.ipv6.conf.default.accept_ra", "0")?;
        }
        for netns in [&topology.gateway_a, &topology.router, &topology.gateway_b] {
            netns.sysctl("net.ipv4.ip_forward", "1")?;
            netns.sysctl("net.ipv6.conf.all.forwarding", "1")?;
            netns.sysctl("net.ipv4.conf.all.rp_filter", "0")?;
            netns.sysctl("net.ipv4.conf.default.rp_filter", "0")?;
        }
        if options.cards {
            let ends = ((&topology.gateway_a, "wan"), (&topology.router, "to-a"));
            topology.cards = Some(Cards::cable(ends.0, ends.1).context("simulated cards")?);
        }
        for side in [Side::A, Side::B] {
            topology
                .cable_site(side, options)
                .context("building a site")?;
        }
        topology.cable_attacker().context("placing the attacker")?;
        if options.nat {
            topology.masquerade()?;
        }
        Ok(topology)
    }

    /// Every namespace.
    pub fn all(&self) -> [&Netns; 6] {
        [
            &self.host_a,
            &self.gateway_a,
            &self.router,
            &self.gateway_b,
            &self.host_b,
            &self.attacker,
        ]
    }

    /// Packets that its links have dropped so far, because whoever should take them had no time.
    ///
    /// # Errors
    ///
    /// Those of `ip`.
    pub fn overrun(&self) -> anyhow::Result<u64> {
        let mut dropped = 0;
        for netns in self.all() {
            let links: Value = serde_json::from_str(&netns.exec("ip -s -j link show type veth")?)?;
            for link in links.as_array().into_iter().flatten() {
                dropped += ["rx", "tx"]
                    .iter()
                    .filter_map(|way| link["stats64"][way]["dropped"].as_u64())
                    .sum::<u64>();
            }
        }
        Ok(dropped)
    }

    /// Leaves everything behind on drop.
    pub fn keep(&mut self) {
        for netns in [
            &mut self.host_a,
            &mut self.gateway_a,
            &mut self.router,
            &mut self.gateway_b,
            &mut self.host_b,
            &mut self.attacker,
        ] {
            netns.keep();
        }
    }

    /// The host of a side.
    pub fn host(&self, side: Side) -> &Netns {
        match side {
            Side::A => &self.host_a,
            Side::B => &self.host_b,
        }
    }

    /// The gateway of a side.
    pub fn gateway(&self, side: Side) -> &Netns {
        match side {
            Side::A => &self.gateway_a,
            Side::B => &self.gateway_b,
        }
    }

    /// Gives the gateway of a side another IPv4 address next to the router, in the place of the one that it has.
    ///
    /// # Errors
    ///
    /// ip's.
    pub fn renumber(&self, side: Side, old: IpAddr, new: IpAddr) -> anyhow::Result<()> {
        let gateway = self.gateway(side);
        // Otherwise the kernel takes all addresses of a subnet away with the first one.
        gateway.sysctl("net.ipv4.conf.wan.promote_secondaries", "1")?;
        gateway.ip(&format!("addr add {new}/24 dev wan"))?;
        gateway.ip(&format!("addr del {old}/24 dev wan"))?;
        let (router, prefix) = (side.router(Family::V4), side.prefix(Family::V4));
        gateway.ip(&format!("route replace default via {router}"))?;
        self.router
            .ip(&format!("route replace {prefix} via {new}"))?;
        Ok(())
    }

    fn cable_site(&self, side: Side, options: Options) -> anyhow::Result<()> {
        let (host, gateway) = (self.host(side), self.gateway(side));
        let port = format!("to-{}", side.letter());
        let connect = if options.vlan { trunk } else { cable };
        connect((host, "lan"), (gateway, "lan"))?;
        if self.cards.is_none() || side == Side::B {
            connect((gateway, "wan"), (&self.router, &port))?;
        }
        if !options.host_offload {
            host.exec("ethtool -K lan tx off")?;
        }
        for (family, inside, outside) in [(Family::V4, 24, 24), (Family::V6, 64, 64)] {
            address(host, "lan", side.host(family), inside)?;
            address(gateway, "lan", side.inside(family), inside)?;
            address(gateway, "wan", side.outside(family), outside)?;
            address(&self.router, &port, side.router(family), outside)?;
            route(host, "default", side.inside(family))?;
            route(gateway, "default", side.router(family))?;
            route(&self.router, &side.prefix(family), side.outside(family))?;
        }
        Ok(())
    }

    fn cable_attacker(&self) -> anyhow::Result<()> {
        cable((&self.attacker, "wan"), (&self.router, "to-x"))?;
        for (family, gateway, length) in [
            (Family::V4, IpAddr::from([192, 0, 2, 1]), 24),
            (
                Family::V6,
                IpAddr::from([0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 1]),
                64,
            ),
        ] {
            address(&self.router, "to-x", gateway, length)?;
            address(&self.attacker, "wan", attacker(family), length)?;
            route(&self.attacker, "default", gateway)?;
        }
        Ok(())
    }

    fn masquerade(&self) -> anyhow::Result<()> {
        for command in [
            "nft add table inet nat",
            "nft add chain inet nat post { type nat hook postrouting priority 100 ; }",
            "nft add rule inet nat post iifname to-a oifname to-b masquerade",
        ] {
            self.router.exec(command).context("NAT in the router")?;
        }
        Ok(())
    }
}

fn cable(left: (&Netns, &str), right: (&Netns, &str)) -> anyhow::Result<()> {
    crate::command::line(&format!(
        "ip link add {} netns {} type veth peer name {} netns {}",
        left.1,
        left.0.name(),
        right.1,
        right.0.name()
    ))?;
    for (netns, interface) in [left, right] {
        netns.ip(&format!("link set {interface} up"))?;
    }
    Ok(())
}

/// A cable between `NAME-trunk` interfaces, over which the named ones are a VLAN.
fn trunk(left: (&Netns, &str), right: (&Netns, &str)) -> anyhow::Result<()> {
    let [below_left, below_right] = [left.1, right.1].map(|name| format!("{name}-trunk"));
    cable((left.0, &below_left), (right.0, &below_right))?;
    for ((netns, interface), below) in [(left, below_left), (right, below_right)] {
        // Tags stand in the frames, where XDP sees them.
        netns.exec(&format!("ethtool -K {below} txvlan off"))?;
        netns.ip(&format!(
            "link add link {below} name {interface} type vlan id {VLAN}"
        ))?;
        netns.ip(&format!("link set {interface} up"))?;
    }
    Ok(())
}

fn address(netns: &Netns, interface: &str, address: IpAddr, length: u8) -> anyhow::Result<()> {
    let nodad = if address.is_ipv6() { "nodad" } else { "" };
    netns.ip(&format!(
        "addr add {address}/{length} dev {interface} {nodad}"
    ))?;
    Ok(())
}

fn route(netns: &Netns, to: &str, via: IpAddr) -> anyhow::Result<()> {
    let family = if via.is_ipv6() { "-6" } else { "-4" };
    netns.ip(&format!("{family} route add {to} via {via}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_inside_and_gateways_are_outside() {
        for family in [Family::V4, Family::V6] {
            for side in [Side::A, Side::B] {
                assert!(is_inside(side.host(family)));
                assert!(is_inside(side.inside(family)));
                assert!(!is_inside(side.outside(family)));
                assert!(!is_inside(side.router(family)));
            }
            assert!(!is_inside(attacker(family)));
        }
    }
}
