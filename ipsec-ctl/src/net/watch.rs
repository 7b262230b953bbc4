//! Notifications of the kernel about links, addresses, routes and rules.

use std::{io, ops::ControlFlow};

use futures_util::StreamExt;
use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::{RouteNetlinkMessage, link::LinkFlags};
use rtnetlink::MulticastGroup;
use tokio::sync::mpsc::{self, error::TrySendError};

/// What has changed. The details are asked for: by the time a notification is read they may have changed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    /// A link.
    Link,
    /// An address.
    Address,
    /// A route or a rule.
    Route,
}

/// Notifications that wait at most; more are as good as none, since all details are asked for anyway.
const QUEUE: usize = 64;

/// Watches the network namespace that the caller is in, until the receiver is dropped.
///
/// # Errors
///
/// Those of the socket.
pub fn start() -> io::Result<mpsc::Receiver<Change>> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Ipv4Rule,
        MulticastGroup::Ipv6Rule,
    ];
    let (sender, receiver) = mpsc::channel(QUEUE);
    follow(&groups, move |payload| {
        for change in changes(&payload) {
            if let Err(TrySendError::Closed(_)) = sender.try_send(*change) {
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    })?;
    Ok(receiver)
}

/// Passes on what the kernel tells of these groups in the network namespace that the caller is in, until `tell` breaks off.
///
/// # Errors
///
/// Those of the socket.
pub(super) fn follow(
    groups: &[MulticastGroup],
    mut tell: impl FnMut(NetlinkPayload<RouteNetlinkMessage>) -> ControlFlow<()> + Send + 'static,
) -> io::Result<()> {
    let (connection, _, mut messages) = rtnetlink::new_multicast_connection(groups)?;
    tokio::spawn(connection);
    tokio::spawn(async move {
        while let Some((message, _)) = messages.next().await {
            if tell(message.payload).is_break() {
                return;
            }
        }
    });
    Ok(())
}

fn changes(payload: &NetlinkPayload<RouteNetlinkMessage>) -> &'static [Change] {
    let message = match payload {
        NetlinkPayload::InnerMessage(message) => message,
        // What was lost may have been any of them.
        NetlinkPayload::Overrun(_) => return &[Change::Link, Change::Address, Change::Route],
        _ => return &[],
    };
    match message {
        RouteNetlinkMessage::NewLink(_) | RouteNetlinkMessage::DelLink(_) => &[Change::Link],
        RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => {
            &[Change::Address]
        }
        RouteNetlinkMessage::NewRoute(_)
        | RouteNetlinkMessage::DelRoute(_)
        | RouteNetlinkMessage::NewRule(_)
        | RouteNetlinkMessage::DelRule(_) => &[Change::Route],
        _ => &[],
    }
}

/// What tells that a link does not carry packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallen {
    /// The link with this index is down or gone, or was when it was told.
    Link(u32),
    /// Notifications were lost: any link may be.
    Any,
}

/// Watches the links of the network namespace that the caller is in for those that are down or gone, until the receiver is
/// dropped. Of a thousand links that come up one after the other nobody needs to list all again and again.
///
/// # Errors
///
/// Those of the socket.
pub fn fallen_links() -> io::Result<mpsc::UnboundedReceiver<Fallen>> {
    let (sender, receiver) = mpsc::unbounded_channel();
    follow(&[MulticastGroup::Link], move |payload| {
        match fallen(&payload).map(|fallen| sender.send(fallen)) {
            Some(Err(_)) => ControlFlow::Break(()),
            Some(Ok(())) | None => ControlFlow::Continue(()),
        }
    })?;
    Ok(receiver)
}

fn fallen(payload: &NetlinkPayload<RouteNetlinkMessage>) -> Option<Fallen> {
    match payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
            let up = link.header.flags.contains(LinkFlags::Up);
            (!up).then_some(Fallen::Link(link.header.index))
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) => {
            Some(Fallen::Link(link.header.index))
        }
        NetlinkPayload::Overrun(_) => Some(Fallen::Any),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_lost_may_have_been_anything() {
        let overrun = NetlinkPayload::Overrun(Vec::new());
        assert_eq!(changes(&overrun).len(), 3);
        assert_eq!(fallen(&overrun), Some(Fallen::Any));
    }
}
