//! States and policies of the kernel's IPsec (XFRM), changed and asked for over netlink.
//!
//! Values of our own in front of `netlink-packet-xfrm`, which has the messages; what it lacks (the kernel's words for a
//! refusal, dumps of policies, the lengths it takes for granted) is here.

mod connection;
mod interface;
mod policy;
mod state;
mod watch;

#[cfg(test)]
mod tests;

pub use connection::Xfrm;
pub use interface::XfrmInterface;
pub use policy::{Action, Policy, PolicyDirection, PortMask, Selector, Template, socket_pass};
pub use state::{Algorithms, Encap, Limits, Mode, OnCard, Replay, State, StateId, StateStatus};
pub use watch::{Notice, Watch};

use netlink_packet_core::ParseableParametrized;
use netlink_packet_xfrm::{
    XFRM_MSG_ACQUIRE, XFRM_MSG_DELPOLICY, XFRM_MSG_DELSA, XFRM_MSG_EXPIRE, XFRM_MSG_FLUSHSA,
    XFRM_MSG_MAPPING, XFRM_MSG_NEWPOLICY, XFRM_MSG_NEWSA, XFRM_MSG_UPDPOLICY,
    XFRM_USER_ACQUIRE_LEN, XFRM_USER_EXPIRE_LEN, XFRM_USER_MAPPING_LEN, XFRM_USER_POLICY_ID_LEN,
    XFRM_USER_POLICY_INFO_LEN, XFRM_USER_SA_ID_LEN, XFRM_USER_SA_INFO_LEN, XfrmMessage,
};

/// Bytes in front of a netlink message's body.
const HEADER: usize = 16;

/// Reads the body of a message that the kernel sends unasked or as an answer; none for one that is cut off, or of a type
/// that we do not listen to.
fn parse(kind: u16, body: &[u8]) -> Option<XfrmMessage> {
    // The parsers below take the fixed part of each message for granted.
    let least = match kind {
        XFRM_MSG_NEWSA => XFRM_USER_SA_INFO_LEN,
        XFRM_MSG_DELSA => XFRM_USER_SA_ID_LEN,
        XFRM_MSG_NEWPOLICY | XFRM_MSG_UPDPOLICY => XFRM_USER_POLICY_INFO_LEN,
        XFRM_MSG_DELPOLICY => XFRM_USER_POLICY_ID_LEN,
        XFRM_MSG_ACQUIRE => XFRM_USER_ACQUIRE_LEN,
        XFRM_MSG_EXPIRE => XFRM_USER_EXPIRE_LEN,
        XFRM_MSG_MAPPING => XFRM_USER_MAPPING_LEN,
        XFRM_MSG_FLUSHSA => 1,
        netlink_packet_xfrm::XFRM_MSG_FLUSHPOLICY => 0,
        _ => return None,
    };
    if body.len() < least {
        return None;
    }
    XfrmMessage::parse_with_param(body, kind).ok()
}

/// Type, flags and body of each message in what one read returned.
fn messages(bytes: &[u8]) -> impl Iterator<Item = (u16, u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let [l0, l1, l2, l3, k0, k1, f0, f1, ..] = *rest.first_chunk::<HEADER>()?;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
        let body = rest.get(HEADER..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((
            u16::from_ne_bytes([k0, k1]),
            u16::from_ne_bytes([f0, f1]),
            body,
        ))
    })
}
