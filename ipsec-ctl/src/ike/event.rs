//! What an endpoint is told and what it tells: plain values.

use std::net::{IpAddr, SocketAddr};

use ipsec_common::{Spi, TrafficSelector};
use serde::{Deserialize, Serialize};

use super::{
    Identity,
    config::{ChildName, PeerConfig, PeerId},
    crypto::{ChildSuite, IkeSuite, keys::ChildKey},
    message::IkeSpi,
    time::Time,
};

/// Names an IKE SA for as long as the endpoint lives; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct IkeSaId(pub u64);

/// Names a pair of ESP SAs for as long as the endpoint lives; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChildSaId(pub u64);

/// What the caller wants.
#[derive(Debug)]
pub enum Command {
    /// Adds a peer, or replaces what is known of it; SAs stay.
    SetPeer(Box<PeerConfig>),
    /// Forgets a peer, after a Delete for each of its IKE SAs.
    RemovePeer(PeerId),
    /// Starts an IKE SA if there is none. The address is ours towards the peer where the way to it names none.
    Up(PeerId, SocketAddr),
    /// Deletes the peer's IKE SAs, and neither starts nor accepts any until [`Command::Up`].
    Down(PeerId),
    /// Lets a peer that was taken down come up again when it starts.
    Allow(PeerId),
    /// Traffic asks for a child.
    Acquire {
        /// The peer.
        peer: PeerId,
        /// Its child.
        child: ChildName,
        /// Our address towards the peer.
        local: SocketAddr,
        /// The packet that asks for it, as selectors of our side and of the peer's.
        packet: Option<(TrafficSelector, TrafficSelector)>,
    },
    /// Rekeys what is up of a peer, before its time.
    Rekey(PeerId, Rekey),
    /// Packets that an SA pair has carried so far, which tells whether a silent peer is worth asking.
    Traffic {
        /// The pair.
        sa: ChildSaId,
        /// Authentic packets received.
        inbound: u64,
        /// Packets sent.
        outbound: u64,
    },
    /// An SA pair nears its limits by volume.
    Expiring(ChildSaId),
    /// An SA pair has reached its limits and carries nothing more.
    Expired(ChildSaId),
    /// An SA pair cannot go on, perhaps before the peer knows of it.
    Lost(ChildSaId),
    /// An authentic ESP packet of the pair came from another address or port.
    PeerMoved(ChildSaId, SocketAddr),
    /// Our addresses in all: those of the host that peers may be told of.
    Addresses(Vec<IpAddr>),
    /// An IKE SA goes on between other addresses, ours first. One whose peer cannot is replaced by a fresh one.
    MoveTo(IkeSaId, IpAddr, IpAddr),
    /// Deletes everything.
    Shutdown,
}

/// What is to be rekeyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rekey {
    /// The IKE SA.
    Ike,
    /// All children.
    Children,
}

/// What a caller should know or do.
#[derive(Debug, Serialize, Deserialize)]
pub enum Event {
    /// An IKE SA is authenticated.
    IkeUp(Box<IkeUp>),
    /// An IKE SA has taken the place of one with the same peer, and has inherited its children.
    IkeRekeyed(Box<IkeUp>),
    /// An IKE SA is gone, with all its children, each of which has had its own event.
    IkeDown {
        /// The peer.
        peer: PeerId,
        /// The IKE SA.
        ike: IkeSaId,
        /// Why.
        reason: DownReason,
    },
    /// The inbound SA of a pair is to be installed before anything more is transmitted.
    ChildUp(Box<ChildUp>),
    /// The outbound SA of a pair is to be installed and used: the peer can receive on it. Always after its
    /// [`Event::ChildUp`], mostly at once.
    Outbound(ChildSaId),
    /// The outbound SA of a pair is to be removed; another carries its traffic. The inbound SA stays for packets on
    /// their way, until [`Event::ChildDown`].
    OutboundDown(ChildSaId),
    /// A pair of ESP SAs is to be removed, or what is left of it.
    ChildDown {
        /// The peer.
        peer: PeerId,
        /// The configured child.
        child: ChildName,
        /// The pair.
        sa: ChildSaId,
        /// Why.
        reason: DownReason,
    },
    /// A pair of ESP SAs has new outer addresses.
    Moved(ChildSaId, OuterAddresses),
    /// All addresses of a peer have been tried in vain. The next attempt begins with the first again; what its names
    /// stand for may be looked up before.
    Exhausted(PeerId),
    /// Nothing comes back from the peer at its address in use; it has others, which may be tried with
    /// [`Command::MoveTo`].
    Unreachable(IkeSaId),
    /// Something failed, or was refused.
    Failed(Box<Failure>),
}

/// An authenticated IKE SA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IkeUp {
    /// The peer.
    pub peer: PeerId,
    /// The IKE SA.
    pub ike: IkeSaId,
    /// What `status` shows of it.
    pub info: IkeInfo,
}

/// What `status` shows of an IKE SA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IkeInfo {
    /// SPI of the initiator.
    pub spi_i: IkeSpi,
    /// SPI of the responder.
    pub spi_r: IkeSpi,
    /// Whether we started it.
    pub initiator: bool,
    /// Algorithms.
    pub suite: IkeSuite,
    /// Our address and port.
    pub local: SocketAddr,
    /// The peer's address and port.
    pub remote: SocketAddr,
    /// Our identity.
    pub local_id: Identity,
    /// The peer's identity.
    pub remote_id: Identity,
    /// NAT in front of us.
    pub nat_local: bool,
    /// NAT in front of the peer.
    pub nat_remote: bool,
    /// The addresses can change while it is up (MOBIKE, RFC 4555).
    pub mobike: bool,
    /// Which addresses are used is ours to decide: we have started it, or the one that it has taken the place of.
    pub leads: bool,
    /// The peer's addresses that may be used instead, the one in use first.
    pub ways_to_peer: Vec<IpAddr>,
    /// When it was authenticated.
    pub since: Time,
    /// Message ID of our next request.
    pub next_request: u32,
    /// Message ID that the peer's next request must have.
    pub expected_request: u32,
}

/// Outer addresses of a pair of ESP SAs. The ports count only with encapsulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OuterAddresses {
    /// Ours.
    pub local: SocketAddr,
    /// The peer's.
    pub remote: SocketAddr,
    /// ESP in UDP (RFC 3948).
    pub encapsulated: bool,
}

/// A pair of ESP SAs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChildUp {
    /// The peer.
    pub peer: PeerId,
    /// The configured child.
    pub child: ChildName,
    /// The pair.
    pub sa: ChildSaId,
    /// The IKE SA that it belongs to.
    pub ike: IkeSaId,
    /// The pair of the same IKE SA that it takes the place of, if it is a rekeying.
    pub replaces: Option<ChildSaId>,
    /// SPI of what the peer sends.
    pub spi_in: Spi,
    /// SPI of what we send.
    pub spi_out: Spi,
    /// Algorithms.
    pub suite: ChildSuite,
    /// Keys of what the peer sends.
    pub key_in: ChildKey,
    /// Keys of what we send.
    pub key_out: ChildKey,
    /// Our selectors, as negotiated.
    pub local: Vec<TrafficSelector>,
    /// The peer's selectors, as negotiated.
    pub remote: Vec<TrafficSelector>,
    /// Outer addresses.
    pub outer: OuterAddresses,
    /// When it was negotiated.
    pub since: Time,
}

/// Why an SA is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum DownReason {
    /// The operator asked for it.
    #[error("taken down by the operator")]
    Operator,
    /// The peer deleted it.
    #[error("deleted by the peer")]
    PeerDeleted,
    /// The peer has not answered.
    #[error("the peer does not answer any more")]
    Dead,
    /// The peer has started anew.
    #[error("the peer has started anew")]
    InitialContact,
    /// Another IKE SA with the same peer has taken its place.
    #[error("replaced by a newer IKE SA")]
    Replaced,
    /// It was rekeyed.
    #[error("rekeyed")]
    Rekeyed,
    /// It has reached the end of its life.
    #[error("the end of its lifetime was reached")]
    Expired,
    /// The peer broke the protocol.
    #[error("the peer broke the protocol")]
    Protocol,
}

/// What was being done when something failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Stage {
    /// IKE_SA_INIT.
    Init,
    /// IKE_AUTH.
    Auth,
    /// A child, within IKE_AUTH or by CREATE_CHILD_SA.
    Child,
    /// A change of addresses.
    Move,
}

/// A failure, for people and for counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{reason}{}", detail_of(.detail))]
pub struct Failure {
    /// The peer, if it is known.
    pub peer: Option<PeerId>,
    /// Its address.
    pub remote: SocketAddr,
    /// What was being done.
    pub stage: Stage,
    /// Why.
    pub reason: FailureReason,
    /// Offer, policy and nearest match, or whatever else helps.
    pub detail: String,
}

fn detail_of(detail: &str) -> String {
    if detail.is_empty() {
        String::new()
    } else {
        format!(": {detail}")
    }
}

/// Why something failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum FailureReason {
    /// No answer.
    #[error("the peer does not answer")]
    Timeout,
    /// The peer accepts none of our proposals, and the protocol does not let it say why.
    #[error("the peer accepts none of our proposals; its own log may say why")]
    PeerRefusedProposals,
    /// We accept none of the peer's proposals.
    #[error("none of the peer's proposals is acceptable here")]
    WeRefusedProposals,
    /// The peer refused our proof.
    #[error("the peer refused our PSK or identity")]
    PeerRefusedAuth,
    /// The peer's proof is wrong.
    #[error("authentication failed")]
    WeRefusedAuth,
    /// No tunnel is configured for this peer.
    #[error("no tunnel is configured for this peer")]
    UnknownPeer,
    /// The peer refused our selectors.
    #[error("the peer does not accept our traffic selectors")]
    PeerRefusedSelectors,
    /// We refused the peer's selectors.
    #[error("the peer's traffic selectors match no child")]
    WeRefusedSelectors,
    /// The peer wants one pair of selectors in each child.
    #[error("the peer takes only one pair of selectors in a child")]
    SinglePair,
    /// The peer takes no more SAs.
    #[error("the peer takes no further SAs")]
    NoAdditionalSas,
    /// The peer does not want to be reached from our new address.
    #[error("the peer does not accept our new address")]
    UnacceptableAddresses,
    /// Another error from the peer.
    #[error("the peer reported an error")]
    PeerError,
    /// A message lacks what its exchange needs, or holds what it must not.
    #[error("the peer's message is not valid")]
    BadMessage,
}

/// A datagram to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// Our address and port.
    pub local: SocketAddr,
    /// The peer's address and port.
    pub remote: SocketAddr,
    /// The message, without the non-ESP marker of RFC 3948, or the single byte of a NAT keep-alive.
    pub bytes: Vec<u8>,
}
