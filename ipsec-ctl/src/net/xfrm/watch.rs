//! What the kernel's IPsec reports unasked.

use std::{io, net::SocketAddr};

use netlink_packet_xfrm::{
    XFRMNLGRP_ACQUIRE, XFRMNLGRP_EXPIRE, XFRMNLGRP_MAPPING, XFRMNLGRP_POLICY, XFRMNLGRP_SA,
    XfrmAttrs, XfrmMessage,
};
use netlink_sys::protocols::NETLINK_XFRM;
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr as NetlinkAddress, TokioSocket};
use zeroize::Zeroizing;

use super::{Policy, Selector, StateId, messages, parse, state::ip};

/// Receive buffer in bytes. Whatever does not fit is reported as [`Notice::Overrun`].
const BUFFER: usize = 1 << 20;

/// A notification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A packet matched a policy whose SA does not exist.
    Acquire {
        /// Of the policy's template.
        reqid: u32,
        /// The packet.
        packet: Selector,
    },
    /// A limit of a state was reached.
    Expired {
        /// The state.
        id: StateId,
        /// It is gone.
        hard: bool,
    },
    /// A packet of a state came from another address or port, and is authentic.
    Moved {
        /// The state.
        id: StateId,
        /// Where it came from.
        source: SocketAddr,
    },
    /// A state was removed, by us or by others.
    StateRemoved(StateId),
    /// All states were removed, by others.
    StatesFlushed,
    /// A policy was set, by us or by others.
    PolicySet(Policy),
    /// A policy was removed, by us or by others.
    PolicyRemoved(Policy),
    /// All policies were removed, by others.
    PoliciesFlushed,
    /// Notifications were lost: everything is to be asked for.
    Overrun,
}

/// Waits for notifications.
pub struct Watch {
    socket: TokioSocket,
}

impl Watch {
    /// Listens in the network namespace that the caller is in.
    ///
    /// # Errors
    ///
    /// Those of the socket.
    pub fn start() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_XFRM)?;
        let inner = socket.socket_mut();
        inner.bind(&NetlinkAddress::new(0, 0))?;
        inner.set_rx_buf_sz(libc::c_int::try_from(BUFFER).unwrap_or(libc::c_int::MAX))?;
        for group in [
            XFRMNLGRP_ACQUIRE,
            XFRMNLGRP_EXPIRE,
            XFRMNLGRP_SA,
            XFRMNLGRP_POLICY,
            XFRMNLGRP_MAPPING,
        ] {
            inner.add_membership(group)?;
        }
        Ok(Self { socket })
    }

    /// The next notifications, at least one.
    ///
    /// # Errors
    ///
    /// Those of recvmsg(2), but for an overrun.
    pub async fn next(&mut self) -> io::Result<Vec<Notice>> {
        loop {
            // A notification of a new state holds its keys.
            let bytes = match self.socket.recv_from_full().await {
                Ok((bytes, _)) => Zeroizing::new(bytes),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Ok(vec![Notice::Overrun]);
                }
                Err(error) => return Err(error),
            };
            let notices: Vec<_> = messages(&bytes)
                .filter_map(|(kind, _, body)| notice(parse(kind, body)?))
                .collect();
            if !notices.is_empty() {
                return Ok(notices);
            }
        }
    }
}

fn notice(mut message: XfrmMessage) -> Option<Notice> {
    let notice = match &message {
        XfrmMessage::Acquire(message) => {
            let template = message.nlas.iter().find_map(|attribute| match attribute {
                XfrmAttrs::Template(templates) => templates.first(),
                _ => None,
            })?;
            Some(Notice::Acquire {
                reqid: template.reqid,
                packet: Selector::of(&message.acquire.selector)?,
            })
        }
        XfrmMessage::Expire(message) => {
            let state = &message.expire.state;
            Some(Notice::Expired {
                id: StateId {
                    destination: ip(state.family, &state.id.daddr)?,
                    spi: state.id.spi,
                },
                hard: message.expire.hard != 0,
            })
        }
        XfrmMessage::Mapping(message) => {
            let map = &message.map;
            let source = ip(map.id.family, &map.new_saddr)?;
            Some(Notice::Moved {
                id: StateId {
                    destination: ip(map.id.family, &map.id.daddr)?,
                    spi: map.id.spi,
                },
                source: SocketAddr::new(source, map.new_sport),
            })
        }
        XfrmMessage::DeleteSa(message) => {
            let id = &message.user_sa_id;
            Some(Notice::StateRemoved(StateId {
                destination: ip(id.family, &id.daddr)?,
                spi: id.spi,
            }))
        }
        XfrmMessage::FlushSa(_) => Some(Notice::StatesFlushed),
        XfrmMessage::AddPolicy(_) | XfrmMessage::UpdatePolicy(_) => {
            Policy::of(&message).map(Notice::PolicySet)
        }
        XfrmMessage::DeletePolicy(message) => Policy::removed(message).map(Notice::PolicyRemoved),
        XfrmMessage::FlushPolicy(_) => Some(Notice::PoliciesFlushed),
        _ => None,
    };
    super::state::wipe(&mut message);
    notice
}
