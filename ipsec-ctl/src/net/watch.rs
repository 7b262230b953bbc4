//! Notifications of the kernel about links, addresses, routes and rules.

use futures_util::StreamExt;
use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::MulticastGroup;
use tokio::sync::mpsc;

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
pub fn start() -> std::io::Result<mpsc::Receiver<Change>> {
    let (connection, _, mut messages) = rtnetlink::new_multicast_connection(&[
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Ipv4Rule,
        MulticastGroup::Ipv6Rule,
    ])?;
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(connection);
    tokio::spawn(async move {
        while let Some((message, _)) = messages.next().await {
            let NetlinkPayload::InnerMessage(inner) = message.payload else {
                continue;
            };
            let Some(change) = kind(&inner) else { continue };
            if let Err(mpsc::error::TrySendError::Closed(_)) = sender.try_send(change) {
                return;
            }
        }
    });
    Ok(receiver)
}

fn kind(message: &RouteNetlinkMessage) -> Option<Change> {
    match message {
        RouteNetlinkMessage::NewLink(_) | RouteNetlinkMessage::DelLink(_) => Some(Change::Link),
        RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => {
            Some(Change::Address)
        }
        RouteNetlinkMessage::NewRoute(_)
        | RouteNetlinkMessage::DelRoute(_)
        | RouteNetlinkMessage::NewRule(_)
        | RouteNetlinkMessage::DelRule(_) => Some(Change::Route),
        _ => None,
    }
}
