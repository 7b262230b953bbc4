//! Links, addresses, routes and rules, asked for and changed over rtnetlink.

use std::net::IpAddr;

use futures_util::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use netlink_packet_route::{
    IpProtocol,
    address::AddressAttribute,
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteProtocol, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange},
};
use rtnetlink::{Handle, IpVersion, LinkUnspec, RouteMessageBuilder};

/// Origin of our routes and rules, by which we know them again (`ip route show proto 84`).
pub const ORIGIN: u8 = 84;

/// A step that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{step}: {reason}")]
pub struct NetlinkError {
    /// What was being done.
    pub step: String,
    /// What the kernel said.
    pub reason: String,
    /// Its errno, positive, if there was one.
    pub errno: Option<i32>,
}

impl NetlinkError {
    pub(super) fn new(step: impl Into<String>, error: &rtnetlink::Error) -> Self {
        let errno = match error {
            rtnetlink::Error::NetlinkError(message) => message.code.map(|code| -code.get()),
            _ => None,
        };
        Self {
            step: step.into(),
            reason: errno.map_or_else(
                || error.to_string(),
                |errno| std::io::Error::from_raw_os_error(errno).to_string(),
            ),
            errno,
        }
    }

    pub(super) fn is(&self, errno: i32) -> bool {
        self.errno == Some(errno)
    }
}

/// A link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// MAC address; empty where there is none.
    pub mac: Vec<u8>,
    /// Administratively up.
    pub up: bool,
    /// Kind, for instance `veth`; none for most physical ones.
    pub kind: Option<String>,
    /// Loopback.
    pub loopback: bool,
}

/// What becomes of packets to a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// They go out of a device, to a gateway or to whoever is there.
    Device(u32, Option<IpAddr>),
    /// They are dropped.
    Blackhole,
}

/// A route of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// Its prefix.
    pub prefix: IpNet,
    /// Its table.
    pub table: u32,
    /// Its metric; lower ones win.
    pub metric: u32,
    /// What becomes of the packets.
    pub target: Target,
    /// Source of local packets that have none.
    pub source: Option<IpAddr>,
}

/// A rule of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// Its place; lower ones are asked first.
    pub priority: u32,
    /// IPv6 rather than IPv4.
    pub v6: bool,
    /// Packets from there.
    pub from: Option<IpNet>,
    /// Packets to there.
    pub to: Option<IpNet>,
    /// Packets with this mark.
    pub mark: Option<u32>,
    /// Packets that this host sends itself, and the way back of those that arrive for it (`rp_filter`).
    pub local: bool,
    /// Packets of a service. The kernel looks for it in packets whose way back it checks only where there is such a rule that
    /// is not `local`.
    pub service: Option<Service>,
    /// The table that is asked.
    pub table: u32,
    /// Answers with a prefix of at most this length do not count.
    pub suppress: Option<u32>,
}

/// What a rule may be about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Service {
    /// From this UDP port.
    Udp(u16),
    /// ESP.
    Esp,
}

/// Which way the kernel would send a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Index of the device.
    pub device: u32,
    /// Gateway, if the destination is not on the link.
    pub gateway: Option<IpAddr>,
    /// Our address.
    pub source: Option<IpAddr>,
    /// Whether the destination is one of our own addresses.
    pub local: bool,
    /// MTU of the path, if it is known to be smaller than the device's.
    pub mtu: Option<u32>,
}

/// A connection to the kernel of the network namespace that it was opened in.
#[derive(Clone, Debug)]
pub struct Netlink {
    pub(super) handle: Handle,
}

impl Netlink {
    /// Opens a connection, driven by a task of the current runtime.
    ///
    /// # Errors
    ///
    /// Those of the socket.
    pub fn open() -> std::io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// All links.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`], as for all that follow.
    pub async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        let failed = |error| NetlinkError::new("list links", &error);
        let messages: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(failed)?;
        Ok(messages.iter().map(link).collect())
    }

    /// The link of a name, if there is one.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn link(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let found = self
            .handle
            .link()
            .get()
            .match_name(name.to_owned())
            .execute()
            .try_next()
            .await
            .map_err(|error| NetlinkError::new(format!("look {name} up"), &error));
        match found {
            Ok(message) => Ok(message.as_ref().map(link)),
            Err(error) if error.is(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets a link up.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn set_up(&self, index: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index).up().build();
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(|error| NetlinkError::new(format!("set link {index} up"), &error))
    }

    /// Sets the MTU of a link.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn set_mtu(&self, index: u32, mtu: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index).mtu(mtu).build();
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(|error| NetlinkError::new(format!("set MTU {mtu} of link {index}"), &error))
    }

    /// All addresses, with the indices of their links.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn addresses(&self) -> Result<Vec<(u32, IpNet)>, NetlinkError> {
        let mut found = Vec::new();
        let mut messages = self.handle.address().get().execute();
        while let Some(message) = messages
            .try_next()
            .await
            .map_err(|error| NetlinkError::new("list addresses", &error))?
        {
            let of = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| {
                message.attributes.iter().find_map(wanted)
            };
            // On a point-to-point link the address is the peer's, and the local one is ours.
            let address = of(|attribute| match attribute {
                AddressAttribute::Local(address) => Some(*address),
                _ => None,
            })
            .or_else(|| {
                of(|attribute| match attribute {
                    AddressAttribute::Address(address) => Some(*address),
                    _ => None,
                })
            });
            if let Some(net) =
                address.and_then(|address| IpNet::new(address, message.header.prefix_len).ok())
            {
                found.push((message.header.index, net));
            }
        }
        Ok(found)
    }

    /// Adds an address to a link; it may be there already.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn add_address(&self, index: u32, address: IpNet) -> Result<(), NetlinkError> {
        self.handle
            .address()
            .add(index, address.addr(), address.prefix_len())
            .replace()
            .execute()
            .await
            .map_err(|error| NetlinkError::new(format!("add address {address}"), &error))
    }

    /// Adds a route; it may be there already.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn add_route(&self, route: &Route) -> Result<(), NetlinkError> {
        let step = format!("add route {} to table {}", route.prefix, route.table);
        let added = self
            .handle
            .route()
            .add(message_of(route)?)
            .execute()
            .await
            .map_err(|error| NetlinkError::new(step, &error));
        match added {
            Err(error) if error.is(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Removes a route; it may be gone already.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn remove_route(&self, route: &Route) -> Result<(), NetlinkError> {
        let step = format!("remove route {} from table {}", route.prefix, route.table);
        let removed = self
            .handle
            .route()
            .del(message_of(route)?)
            .execute()
            .await
            .map_err(|error| NetlinkError::new(step, &error));
        match removed {
            Err(error) if error.is(libc::ESRCH) || error.is(libc::ENODEV) => Ok(()),
            other => other,
        }
    }

    /// The routes that are ours, in all tables.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn our_routes(&self) -> Result<Vec<Route>, NetlinkError> {
        let routes = self.routes().await?;
        Ok(routes
            .iter()
            .filter(|route| route.header.protocol == RouteProtocol::from(ORIGIN))
            .filter_map(route_of)
            .collect())
    }

    /// The routes of a table that are not ours.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn other_routes(&self, table: u32) -> Result<Vec<Route>, NetlinkError> {
        let routes = self.routes().await?;
        Ok(routes
            .iter()
            .filter(|route| route.header.protocol != RouteProtocol::from(ORIGIN))
            .filter_map(route_of)
            .filter(|route| route.table == table)
            .collect())
    }

    pub(super) async fn routes(&self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let mut found = Vec::new();
        for message in [
            RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
            RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
        ] {
            let routes: Vec<RouteMessage> = self
                .handle
                .route()
                .get(message)
                .execute()
                .try_collect()
                .await
                .map_err(|error| NetlinkError::new("list routes", &error))?;
            found.extend(routes);
        }
        Ok(found)
    }

    /// Adds a rule; it may be there already.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn add_rule(&self, rule: &Rule) -> Result<(), NetlinkError> {
        let mut request = self
            .handle
            .rule()
            .add()
            .action(RuleAction::ToTable)
            .table_id(rule.table)
            .priority(rule.priority);
        *request.message_mut() = rule_message(rule);
        let added = request.execute().await.map_err(|error| {
            NetlinkError::new(format!("add rule with priority {}", rule.priority), &error)
        });
        match added {
            Err(error) if error.is(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Removes a rule; it may be gone already.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn remove_rule(&self, rule: &Rule) -> Result<(), NetlinkError> {
        let removed = self
            .handle
            .rule()
            .del(rule_message(rule))
            .execute()
            .await
            .map_err(|error| {
                NetlinkError::new(
                    format!("remove rule with priority {}", rule.priority),
                    &error,
                )
            });
        match removed {
            Err(error) if error.is(libc::ENOENT) => Ok(()),
            other => other,
        }
    }

    /// The rules that are ours.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn our_rules(&self) -> Result<Vec<Rule>, NetlinkError> {
        let mut ours = Vec::new();
        for version in [IpVersion::V4, IpVersion::V6] {
            let rules: Vec<RuleMessage> = self
                .handle
                .rule()
                .get(version)
                .execute()
                .try_collect()
                .await
                .map_err(|error| NetlinkError::new("list rules", &error))?;
            ours.extend(rules.iter().filter_map(rule_of));
        }
        Ok(ours)
    }

    /// Which way a packet of ours would go; none if nowhere.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn way(
        &self,
        destination: IpAddr,
        source: Option<IpAddr>,
        mark: Option<u32>,
    ) -> Result<Option<Way>, NetlinkError> {
        let full = if destination.is_ipv4() { 32 } else { 128 };
        let mut builder = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(destination, full)
            .map_err(|error| unusable(&error))?;
        if let Some(source) = source {
            builder = builder
                .source_prefix(source, full)
                .map_err(|error| unusable(&error))?;
        }
        if let Some(mark) = mark {
            builder = builder.mark(mark);
        }
        let answer = self
            .handle
            .route()
            .get(builder.build())
            .execute()
            .next()
            .await;
        match answer {
            None => Ok(None),
            Some(Ok(message)) => Ok(way_of(&message)),
            Some(Err(error)) => {
                let error =
                    NetlinkError::new(format!("look the route to {destination} up"), &error);
                // These are what blackhole, prohibit and unreachable routes answer, and an empty table.
                let nowhere = [
                    libc::ENETUNREACH,
                    libc::EHOSTUNREACH,
                    libc::EACCES,
                    libc::EINVAL,
                ];
                if nowhere.iter().any(|errno| error.is(*errno)) {
                    Ok(None)
                } else {
                    Err(error)
                }
            }
        }
    }
}

pub(super) fn unusable(error: &dyn std::fmt::Display) -> NetlinkError {
    NetlinkError {
        step: "describe a route".to_owned(),
        reason: error.to_string(),
        errno: None,
    }
}

fn link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mtu: 0,
        mac: Vec::new(),
        up: message.header.flags.contains(LinkFlags::Up),
        kind: None,
        loopback: message.header.flags.contains(LinkFlags::Loopback),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(mac) => link.mac.clone_from(mac),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind_name(kind)),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link
}

fn kind_name(kind: &InfoKind) -> String {
    kind.to_string()
}

fn message_of(route: &Route) -> Result<RouteMessage, NetlinkError> {
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(route.prefix.network(), route.prefix.prefix_len())
        .map_err(|error| unusable(&error))?
        .table_id(route.table)
        .protocol(RouteProtocol::from(ORIGIN))
        .priority(route.metric);
    match route.target {
        Target::Blackhole => builder = builder.kind(RouteType::BlackHole),
        Target::Device(index, gateway) => {
            builder = builder.kind(RouteType::Unicast).output_interface(index);
            if let Some(gateway) = gateway {
                builder = builder.gateway(gateway).map_err(|error| unusable(&error))?;
            } else if route.prefix.addr().is_ipv4() {
                builder = builder.scope(netlink_packet_route::route::RouteScope::Link);
            }
        }
    }
    if let Some(source) = route.source {
        builder = builder
            .pref_source(source)
            .map_err(|error| unusable(&error))?;
    }
    Ok(builder.build())
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn route_of(message: &RouteMessage) -> Option<Route> {
    use netlink_packet_route::AddressFamily;
    let any: IpAddr = match message.header.address_family {
        AddressFamily::Inet => std::net::Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let (mut destination, mut device, mut gateway) = (any, None, None);
    let (mut table, mut metric, mut source) = (u32::from(message.header.table), 0, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address)?,
            RouteAttribute::Oif(index) => device = Some(*index),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Priority(number) => metric = *number,
            RouteAttribute::PrefSource(address) => source = ip(address),
            _ => {}
        }
    }
    let target = match message.header.kind {
        RouteType::BlackHole => Target::Blackhole,
        RouteType::Unicast => Target::Device(device?, gateway),
        _ => return None,
    };
    Some(Route {
        prefix: IpNet::new(destination, message.header.destination_prefix_length).ok()?,
        table,
        metric,
        target,
        source,
    })
}

fn way_of(message: &RouteMessage) -> Option<Way> {
    let mut way = Way {
        device: 0,
        gateway: None,
        source: None,
        local: message.header.kind == RouteType::Local,
        mtu: None,
    };
    if !matches!(message.header.kind, RouteType::Unicast | RouteType::Local) {
        return None;
    }
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => way.device = *index,
            RouteAttribute::Gateway(address) => way.gateway = ip(address),
            RouteAttribute::PrefSource(address) => way.source = ip(address),
            RouteAttribute::Metrics(metrics) => {
                way.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Some(way)
}

/// Where packets that this host sends itself come in, in the words of rules.
const LOOPBACK: &str = "lo";

fn rule_message(rule: &Rule) -> RuleMessage {
    use netlink_packet_route::AddressFamily;
    let mut message = RuleMessage::default();
    message.header.family = if rule.v6 {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    };
    message.header.action = RuleAction::ToTable;
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.priority));
    attributes.push(RuleAttribute::Table(rule.table));
    attributes.push(RuleAttribute::Protocol(RouteProtocol::from(ORIGIN)));
    if let Some(mark) = rule.mark {
        attributes.push(RuleAttribute::FwMark(mark));
    }
    if rule.local {
        // A check of the way back asks as if the packet were the answer.
        attributes.push(RuleAttribute::Iifname(LOOPBACK.to_owned()));
    }
    if let Some(service) = rule.service {
        match service {
            Service::Udp(port) => attributes.extend([
                RuleAttribute::IpProtocol(IpProtocol::Udp),
                RuleAttribute::SourcePortRange(RulePortRange {
                    start: port,
                    end: port,
                }),
            ]),
            Service::Esp => attributes.push(RuleAttribute::IpProtocol(IpProtocol::Esp)),
        }
    }
    if let Some(length) = rule.suppress {
        attributes.push(RuleAttribute::SuppressPrefixLen(length));
    }
    if let Some(from) = rule.from {
        attributes.push(RuleAttribute::Source(from.network()));
        message.header.src_len = from.prefix_len();
    }
    if let Some(to) = rule.to {
        attributes.push(RuleAttribute::Destination(to.network()));
        message.header.dst_len = to.prefix_len();
    }
    message
}

fn rule_of(message: &RuleMessage) -> Option<Rule> {
    use netlink_packet_route::AddressFamily;
    let mut rule = Rule {
        priority: 0,
        v6: message.header.family == AddressFamily::Inet6,
        from: None,
        to: None,
        mark: None,
        local: false,
        service: None,
        table: u32::from(message.header.table),
        suppress: None,
    };
    let mut ours = false;
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(number) => rule.priority = *number,
            RuleAttribute::Table(number) => rule.table = *number,
            RuleAttribute::FwMark(mark) => rule.mark = Some(*mark),
            RuleAttribute::Iifname(name) => rule.local = name == LOOPBACK,
            RuleAttribute::IpProtocol(IpProtocol::Esp) => rule.service = Some(Service::Esp),
            RuleAttribute::SourcePortRange(range) => rule.service = Some(Service::Udp(range.start)),
            RuleAttribute::SuppressPrefixLen(length) if *length != u32::MAX => {
                rule.suppress = Some(*length);
            }
            RuleAttribute::Source(address) => {
                rule.from = IpNet::new(*address, message.header.src_len).ok();
            }
            RuleAttribute::Destination(address) => {
                rule.to = IpNet::new(*address, message.header.dst_len).ok();
            }
            RuleAttribute::Protocol(protocol) => ours = *protocol == RouteProtocol::from(ORIGIN),
            _ => {}
        }
    }
    ours.then_some(rule)
}
