//! One link takes the place of another: what others have given it, its routes and its name.
//!
//! Routes are replaced one by one, each in one step, so that there is no moment in which a packet finds none.

use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt;
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressMessage, AddressScope},
    link::LinkAttribute,
    route::{RouteAttribute, RouteFlags, RouteMessage, RouteNextHopFlags, RouteProtocol},
};
use rtnetlink::LinkUnspec;

use super::netlink::{Netlink, NetlinkError};

/// An address that no host has (RFC 7600 section 4.8), for devices without any: whatever `rp_filter` is, the kernel takes packets only
/// on a way back to their source where there is none.
const STAND_IN: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 0, 8));

impl Netlink {
    /// Gives a link an address that stands in for its own.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn add_stand_in(&self, index: u32) -> Result<(), NetlinkError> {
        let mut request = self.handle.address().add(index, STAND_IN, 32).replace();
        // No packet of this host's own is to have it for its source.
        request.message_mut().header.scope = AddressScope::Host;
        let added = request.execute().await;
        added.map_err(|error| NetlinkError::new(format!("give link {index} an address"), &error))
    }

    /// Takes the address of [`Self::add_stand_in`] away, unless it is the only one of IPv4: with the last one all routes into the
    /// link would go (Linux, fib_inetaddr_event in net/ipv4/fib_frontend.c).
    ///
    /// # Errors
    ///
    /// The first step that failed; the others are done all the same.
    pub async fn remove_stand_in(&self, index: u32) -> Result<(), NetlinkError> {
        let mut addresses = self.addresses_of(index).await?.into_iter();
        let others = addresses
            .any(|message| message.header.family == AddressFamily::Inet && !is_stand_in(&message));
        if !others {
            return Ok(());
        }
        self.remove_addresses_that(index, is_stand_in).await
    }

    /// Gives a link the addresses of another, and the bridge or VRF that it is in.
    ///
    /// # Errors
    ///
    /// The first step that failed; the others are done all the same.
    pub async fn inherit_addresses(&self, from: u32, to: u32) -> Result<(), NetlinkError> {
        let mut first = self.inherit_controller(from, to).await;
        for mut message in self.addresses_of(from).await? {
            if is_stand_in(&message) {
                continue;
            }
            message.header.index = to;
            // A label begins with the link's name, and the time that is left is said anew.
            message
                .attributes
                .retain(|attribute| !matches!(attribute, AddressAttribute::Label(_)));
            let mut request = self
                .handle
                .address()
                .add(to, std::net::Ipv4Addr::UNSPECIFIED.into(), 32)
                .replace();
            *request.message_mut() = message;
            let added = request.execute().await;
            first = first.and(added.map_err(|error| {
                NetlinkError::new(format!("give an address of link {from} to {to}"), &error)
            }));
        }
        first
    }

    async fn inherit_controller(&self, from: u32, to: u32) -> Result<(), NetlinkError> {
        let Some(link) = self.link_message(from).await? else {
            return Ok(());
        };
        let controller = link
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::Controller(index) if *index != 0 => Some(*index),
                _ => None,
            });
        let Some(controller) = controller else {
            return Ok(());
        };
        let message = LinkUnspec::new_with_index(to)
            .controller(controller)
            .build();
        let set = self.handle.link().set(message).execute().await;
        set.map_err(|error| {
            NetlinkError::new(format!("put link {to} where link {from} is"), &error)
        })
    }

    /// Takes all addresses off a link but the one that stands in for them.
    ///
    /// # Errors
    ///
    /// The first step that failed; the others are done all the same.
    pub async fn remove_addresses(&self, index: u32) -> Result<(), NetlinkError> {
        self.remove_addresses_that(index, |message| !is_stand_in(message))
            .await
    }

    async fn remove_addresses_that(
        &self,
        index: u32,
        chosen: impl Fn(&AddressMessage) -> bool,
    ) -> Result<(), NetlinkError> {
        let mut first = Ok(());
        for message in self
            .addresses_of(index)
            .await?
            .into_iter()
            .filter(|message| chosen(message))
        {
            let removed = self.handle.address().del(message).execute().await;
            first = first.and(removed.map_err(|error| {
                NetlinkError::new(format!("take an address off link {index}"), &error)
            }));
        }
        first
    }

    async fn addresses_of(&self, index: u32) -> Result<Vec<AddressMessage>, NetlinkError> {
        let get = self.handle.address().get().set_link_index_filter(index);
        get.execute()
            .try_collect()
            .await
            .map_err(|error| NetlinkError::new(format!("list addresses of link {index}"), &error))
    }

    /// Lets all routes that lead into one link lead into another, in all tables, whoever made them. Those that the kernel
    /// makes of addresses come with these.
    ///
    /// # Errors
    ///
    /// The first step that failed; the others are done all the same.
    pub async fn inherit_routes(&self, from: u32, to: u32) -> Result<(), NetlinkError> {
        let mut moved: Vec<RouteMessage> = self
            .routes()
            .await?
            .into_iter()
            .filter(|route| route.header.protocol != RouteProtocol::Kernel)
            .filter_map(|route| redirected(route, from, to))
            .collect();
        // A gateway must be reachable by the new link before a route names it.
        moved.sort_by_key(has_gateway);
        let mut first = Ok(());
        for route in moved {
            let replaced = self.handle.route().add(route).replace().execute().await;
            first = first.and(replaced.map_err(|error| {
                NetlinkError::new(format!("lead a route of link {from} into {to}"), &error)
            }));
        }
        first
    }

    /// Gives a link another name. Before Linux 6.2 it has to be set down for that, which takes its routes away: then this
    /// returns true.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`], with nothing changed but perhaps the routes.
    pub async fn rename(&self, index: u32, name: &str) -> Result<bool, NetlinkError> {
        match self.set_name(index, name).await {
            Err(error) if error.is(libc::EBUSY) => {}
            other => return other.map(|()| false),
        }
        let down = LinkUnspec::new_with_index(index).down().build();
        let set = self.handle.link().set(down).execute().await;
        set.map_err(|error| NetlinkError::new(format!("set link {index} down"), &error))?;
        let named = self.set_name(index, name).await;
        self.set_up(index).await?;
        named.map(|()| true)
    }

    async fn set_name(&self, index: u32, name: &str) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index).name(name).build();
        let set = self.handle.link().set(message).execute().await;
        set.map_err(|error| NetlinkError::new(format!("call link {index} {name}"), &error))
    }
}

fn is_stand_in(message: &AddressMessage) -> bool {
    let local = AddressAttribute::Local(STAND_IN);
    message.attributes.contains(&local)
}

/// The route with one link in the place of another, if it leads into that one.
fn redirected(mut route: RouteMessage, from: u32, to: u32) -> Option<RouteMessage> {
    let mut changed = false;
    let next_hops = route.attributes.iter().any(|attribute| {
        // Of a next hop that is an object of its own the route's link is a mere echo.
        matches!(attribute, RouteAttribute::NhId(_))
    });
    if next_hops {
        return None;
    }
    for attribute in &mut route.attributes {
        match attribute {
            RouteAttribute::Oif(index) if *index == from => {
                *index = to;
                changed = true;
            }
            RouteAttribute::MultiPath(hops) => {
                for hop in hops {
                    // What the kernel has found out about the link is not for us to tell.
                    hop.flags &= RouteNextHopFlags::Onlink;
                    if hop.interface_index == from {
                        hop.interface_index = to;
                        changed = true;
                    }
                }
            }
            _ => {}
        }
    }
    route.header.flags &= RouteFlags::Onlink;
    if route.header.address_family == AddressFamily::Inet6 {
        route
            .attributes
            .retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
    }
    changed.then_some(route)
}

fn has_gateway(route: &RouteMessage) -> bool {
    route.attributes.iter().any(|attribute| {
        matches!(
            attribute,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_)
        )
    })
}
