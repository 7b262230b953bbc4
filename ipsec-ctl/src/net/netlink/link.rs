//! Links and their addresses.

use std::{future::ready, net::IpAddr};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily,
    address::AddressAttribute,
    link::{InfoKind, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage},
};
use rtnetlink::{LinkGetRequest, LinkUnspec};

use super::{Netlink, NetlinkError};

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

impl Netlink {
    /// All links.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`], as for all that follow.
    pub async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        self.list_links(|message| Some(link(message))).await
    }

    /// What is to be known of each link. Of many links the messages are long: their statistics are not asked for, and no
    /// more than one is held at a time.
    pub(in crate::net) async fn list_links<T>(
        &self,
        known: impl Fn(&LinkMessage) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        let links = self.handle.link().get();
        links
            .set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats])
            .execute()
            .try_filter_map(|message| ready(Ok(known(&message))))
            .try_collect()
            .await
            .map_err(|error| NetlinkError::new("list links", &error))
    }

    /// The link of a name, if there is one.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn link(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let get = self.handle.link().get().match_name(name.to_owned());
        let message = found(get, name).await?;
        Ok(message.as_ref().map(link))
    }

    /// The link of an index, if there is one.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn link_at(&self, index: u32) -> Result<Option<Link>, NetlinkError> {
        let message = self.link_message(index).await?;
        Ok(message.as_ref().map(link))
    }

    /// All that the kernel tells of the link of an index, if there is one.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub(in crate::net) async fn link_message(
        &self,
        index: u32,
    ) -> Result<Option<LinkMessage>, NetlinkError> {
        let get = self.handle.link().get().match_index(index);
        found(get, &format!("link {index}")).await
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
}

async fn found(get: LinkGetRequest, what: &str) -> Result<Option<LinkMessage>, NetlinkError> {
    match get.execute().try_next().await {
        Ok(message) => Ok(message),
        Err(error) => match NetlinkError::new(format!("look {what} up"), &error) {
            error if error.is(libc::ENODEV) => Ok(None),
            error => Err(error),
        },
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
