//! Routes, and which one a packet would take.

use std::net::IpAddr;

use futures_util::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteProtocol, RouteType,
};
use rtnetlink::RouteMessageBuilder;

use super::{Netlink, NetlinkError, ORIGIN};

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

impl Netlink {
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

    pub(in crate::net) async fn routes(&self) -> Result<Vec<RouteMessage>, NetlinkError> {
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

pub(in crate::net) fn unusable(error: &dyn std::fmt::Display) -> NetlinkError {
    NetlinkError {
        step: "describe a route".to_owned(),
        reason: error.to_string(),
        errno: None,
    }
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
