//! What the kernel would do with a packet: route, Ethernet device and neighbour, for those who forward in its place.

use std::{net::IpAddr, ops::ControlFlow};

use futures_util::StreamExt;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{InfoData, InfoVlan, LinkAttribute, LinkInfo},
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage,
        NeighbourState,
    },
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteType, RouteVia},
};
use rtnetlink::{MulticastGroup, RouteMessageBuilder};
use tokio::sync::mpsc::{self, error::TrySendError};

use super::{
    netlink::{Netlink, NetlinkError, unusable},
    watch,
};

/// A packet that a route is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// TOS byte or traffic class without its ECN bits.
    pub tos: u8,
    /// Where it comes from.
    pub origin: PacketOrigin,
}

/// Where a packet comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketOrigin {
    /// It was received on the device of this index.
    Received(u32),
    /// It is sent by this host, with this mark.
    Sent(u32),
}

/// What the kernel's routes say about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routed {
    /// It leaves through a device.
    Out {
        /// Index of the device.
        device: u32,
        /// The neighbour that takes it.
        neighbour: IpAddr,
        /// MTU of the route in bytes, if it has one of its own.
        mtu: Option<u32>,
    },
    /// It is for this host.
    Local,
    /// It goes nowhere, or to many.
    Nowhere,
}

/// The Ethernet device behind a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Egress {
    /// Index of the device that sends: the one below where the link is a VLAN.
    pub device: u32,
    /// MAC address of the link.
    pub mac: [u8; 6],
    /// VLAN id, where the link is a VLAN.
    pub vlan: Option<u16>,
    /// MTU of the link in bytes.
    pub mtu: u32,
}

/// A neighbour that the kernel has an entry for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its MAC address; none while it is unknown.
    pub mac: Option<[u8; 6]>,
    /// An operator entered it for good: the kernel never asks whether it is still there.
    pub permanent: bool,
    /// The kernel keeps asking whether it is still there, of itself.
    pub managed: bool,
}

/// A neighbour that changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeighbourChange {
    /// Index of the link.
    pub link: u32,
    /// Its address.
    pub address: IpAddr,
    /// Its MAC address; none where it has become unknown.
    pub mac: Option<[u8; 6]>,
}

impl Netlink {
    /// Asks the kernel's routes about a packet.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`] where the kernel cannot be asked; a packet that it would refuse goes [`Routed::Nowhere`].
    pub async fn route_packet(&self, packet: &Packet) -> Result<Routed, NetlinkError> {
        let full = if packet.destination.is_ipv4() {
            32
        } else {
            128
        };
        let mut builder = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(packet.destination, full)
            .and_then(|builder| builder.source_prefix(packet.source, full))
            .map_err(|error| unusable(&error))?
            .tos(packet.tos);
        builder = match packet.origin {
            PacketOrigin::Received(device) => builder.input_interface(device),
            PacketOrigin::Sent(mark) => builder.mark(mark),
        };
        let answers = self.handle.route().get(builder.build()).execute();
        let mut answers = std::pin::pin!(answers);
        match answers.next().await {
            Some(Ok(message)) => Ok(routed(packet.destination, &message)),
            // The errors of the kernel's lookup: no route, forwarding off, a source that cannot be there, prohibited.
            Some(Err(rtnetlink::Error::NetlinkError(_))) | None => Ok(Routed::Nowhere),
            Some(Err(error)) => Err(NetlinkError::new("ask the way of a packet", &error)),
        }
    }

    /// The Ethernet device that packets of a link leave through; none where it is no Ethernet.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn egress(&self, link: u32) -> Result<Option<Egress>, NetlinkError> {
        let Some(message) = self.link_message(link).await? else {
            return Ok(None);
        };
        let (mut mac, mut vlan, mut below, mut mtu) = (None, None, None, 0);
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::Address(bytes) => mac = bytes.as_slice().try_into().ok(),
                LinkAttribute::Mtu(bytes) => mtu = *bytes,
                LinkAttribute::Link(index) => below = Some(*index),
                LinkAttribute::LinkInfo(infos) => vlan = infos.iter().find_map(vlan_id),
                _ => {}
            }
        }
        Ok(mac.map(|mac| Egress {
            // Only for a VLAN is the link below the one that sends; for a veth it is the peer.
            device: below.filter(|_| vlan.is_some()).unwrap_or(link),
            mac,
            vlan,
            mtu,
        }))
    }

    /// A neighbour; none while the kernel has no entry for it.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn neighbour(
        &self,
        link: u32,
        address: IpAddr,
    ) -> Result<Option<Neighbour>, NetlinkError> {
        let message = neighbour_message(link, address, NeighbourFlags::empty());
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNeighbour(message));
        request.header.flags = NLM_F_REQUEST;
        match self.ask(request, "look a neighbour up").await {
            Ok(Some(RouteNetlinkMessage::NewNeighbour(message))) => Ok(Some(Neighbour {
                mac: usable_mac(&message),
                permanent: message.header.state == NeighbourState::Permanent,
                managed: message.attributes.iter().any(|attribute| {
                    matches!(attribute, NeighbourAttribute::ExtFlags(flags)
                            if flags.contains(NeighbourExtFlags::Managed))
                }),
            })),
            Ok(_) => Ok(None),
            Err(error) if error.errno == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Tells the kernel that a neighbour is in use, so that it finds out whether it is still there. Traffic that
    /// bypasses the kernel does not tell it. Not for permanent ones: the kernel would forget that they are.
    ///
    /// With `managed` the kernel keeps finding out, until it is told without; before Linux 5.16 it has to be told again.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn use_neighbour(
        &self,
        link: u32,
        address: IpAddr,
        managed: bool,
    ) -> Result<(), NetlinkError> {
        let mut message = neighbour_message(link, address, NeighbourFlags::Use);
        if managed {
            let flags = NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed);
            message.attributes.push(flags);
        }
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewNeighbour(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        self.ask(request, "use a neighbour").await.map(|_| ())
    }

    async fn ask(
        &self,
        request: NetlinkMessage<RouteNetlinkMessage>,
        step: &str,
    ) -> Result<Option<RouteNetlinkMessage>, NetlinkError> {
        let mut handle = self.handle.clone();
        let answer = handle
            .request(request)
            .map_err(|error| NetlinkError::new(step, &error))?
            .next()
            .await;
        match answer.map(|answer| answer.payload) {
            Some(NetlinkPayload::InnerMessage(message)) => Ok(Some(message)),
            Some(NetlinkPayload::Error(error)) if error.code.is_some() => Err(NetlinkError::new(
                step,
                &rtnetlink::Error::NetlinkError(error),
            )),
            _ => Ok(None),
        }
    }
}

/// Watches the neighbours of the network namespace that the caller is in, until the receiver is dropped. `None` stands
/// for changes that were lost.
///
/// # Errors
///
/// Those of the socket.
pub fn watch_neighbours() -> std::io::Result<mpsc::Receiver<Option<NeighbourChange>>> {
    /// Changes that wait at most; then some are lost, which is told.
    const QUEUE: usize = 1024;
    let (sender, receiver) = mpsc::channel(QUEUE);
    let mut lost = false;
    watch::follow(&[MulticastGroup::Neigh], move |payload| {
        let change = match payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(message)) => {
                change(&message, usable_mac(&message))
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelNeighbour(message)) => {
                change(&message, None)
            }
            // The socket's buffer ran over.
            NetlinkPayload::Overrun(_) => {
                lost = true;
                None
            }
            _ => None,
        };
        if lost && sender.try_send(None).is_ok() {
            lost = false;
        }
        match change.map(|change| sender.try_send(Some(change))) {
            Some(Err(TrySendError::Closed(_))) => return ControlFlow::Break(()),
            Some(Err(TrySendError::Full(_))) => lost = true,
            Some(Ok(())) | None => {}
        }
        ControlFlow::Continue(())
    })?;
    Ok(receiver)
}

fn routed(destination: IpAddr, message: &RouteMessage) -> Routed {
    match message.header.kind {
        RouteType::Unicast => {}
        RouteType::Local => return Routed::Local,
        _ => return Routed::Nowhere,
    }
    let (mut out, mut neighbour, mut mtu) = (None, destination, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => out = Some(*index),
            RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => neighbour = (*gateway).into(),
            RouteAttribute::Gateway(RouteAddress::Inet6(gateway)) => neighbour = (*gateway).into(),
            RouteAttribute::Via(RouteVia::Inet(gateway)) => neighbour = (*gateway).into(),
            RouteAttribute::Via(RouteVia::Inet6(gateway)) => neighbour = (*gateway).into(),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    out.map_or(Routed::Nowhere, |device| Routed::Out {
        device,
        neighbour,
        mtu,
    })
}

fn vlan_id(info: &LinkInfo) -> Option<u16> {
    match info {
        LinkInfo::Data(InfoData::Vlan(values)) => values.iter().find_map(|value| match value {
            InfoVlan::Id(id) => Some(*id),
            _ => None,
        }),
        _ => None,
    }
}

fn neighbour_message(link: u32, address: IpAddr, flags: NeighbourFlags) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.ifindex = link;
    message.header.flags = flags;
    message
        .attributes
        .push(NeighbourAttribute::Destination(address.into()));
    message
}

fn change(message: &NeighbourMessage, mac: Option<[u8; 6]>) -> Option<NeighbourChange> {
    let address = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                Some((*address).into())
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                Some((*address).into())
            }
            _ => None,
        })?;
    Some(NeighbourChange {
        link: message.header.ifindex,
        address,
        mac,
    })
}

fn usable_mac(message: &NeighbourMessage) -> Option<[u8; 6]> {
    let known = matches!(
        message.header.state,
        NeighbourState::Reachable
            | NeighbourState::Stale
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Permanent
    );
    message
        .attributes
        .iter()
        .filter(|_| known)
        .find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(mac) => mac.as_slice().try_into().ok(),
            _ => None,
        })
}

#[cfg(test)]
mod tests;
