//! xfrm interfaces: devices whose packets meet the policies and states with their number (if_id) and no others.

use std::net::IpAddr;

use netlink_packet_route::link::{
    InfoData, InfoKind, InfoXfrm, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkMode, State,
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkXfrm};

use crate::net::netlink::{Netlink, NetlinkError};

/// An xfrm interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XfrmInterface {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// What its policies and states have.
    pub if_id: u32,
    /// Administratively up.
    pub up: bool,
}

impl Netlink {
    /// All xfrm interfaces, of us and of others.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn xfrm_interfaces(&self) -> Result<Vec<XfrmInterface>, NetlinkError> {
        self.list_links(interface).await
    }

    /// Creates an xfrm interface.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`]: `EOPNOTSUPP` where the kernel has none, `EEXIST` if the name or the number is taken.
    pub async fn add_xfrm_interface(&self, name: &str, if_id: u32) -> Result<(), NetlinkError> {
        let message = LinkMessageBuilder::<LinkXfrm>::new(name)
            .append_info_data(InfoXfrm::IfId(if_id))
            .build();
        self.handle
            .link()
            .add(message)
            .execute()
            .await
            .map_err(|error| NetlinkError::new(format!("create the xfrm interface {name}"), &error))
    }

    /// Removes a link; it may be gone already.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn remove_link(&self, index: u32) -> Result<(), NetlinkError> {
        let removed = self.handle.link().del(index).execute().await;
        match removed.map_err(|error| NetlinkError::new(format!("remove link {index}"), &error)) {
            Err(error) if error.errno == Some(libc::ENODEV) => Ok(()),
            other => other,
        }
    }

    /// Makes a link that is set up be operational or not (RFC 2863): the kernel tells programs that it runs, or that it does not.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn set_operational(&self, index: u32, on: bool) -> Result<(), NetlinkError> {
        let state = if on { State::Up } else { State::Dormant };
        let message = LinkUnspec::new_with_index(index)
            // Up to dormant by itself, and no further.
            .append_extra_attribute(LinkAttribute::Mode(LinkMode::Dormant))
            .append_extra_attribute(LinkAttribute::OperState(state))
            .build();
        let set = self.handle.link().set(message).execute().await;
        set.map_err(|error| NetlinkError::new(format!("set the state of link {index}"), &error))
    }

    /// MTU of the path to a peer in bytes, as far as routes and links tell; none if there is no route.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn path_mtu(
        &self,
        remote: IpAddr,
        local: IpAddr,
        mark: u32,
    ) -> Result<Option<u32>, NetlinkError> {
        let Some(way) = self.way(remote, Some(local), Some(mark)).await? else {
            return Ok(None);
        };
        let links = self.links().await?;
        let link = links.iter().find(|link| link.index == way.device);
        Ok(way.mtu.into_iter().chain(link.map(|link| link.mtu)).min())
    }
}

fn interface(message: &LinkMessage) -> Option<XfrmInterface> {
    let (mut name, mut xfrm, mut if_id) = (None, false, 0);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text.clone()),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => xfrm = *kind == InfoKind::Xfrm,
                        LinkInfo::Data(InfoData::Xfrm(data)) => {
                            if_id = data
                                .iter()
                                .find_map(|one| match one {
                                    InfoXfrm::IfId(number) => Some(*number),
                                    _ => None,
                                })
                                .unwrap_or_default();
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    xfrm.then_some(())?;
    Some(XfrmInterface {
        index: message.header.index,
        name: name?,
        if_id,
        up: message.header.flags.contains(LinkFlags::Up),
    })
}
