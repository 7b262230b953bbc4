//! What an endpoint knows before it meets a peer. The daemon makes these values of its configuration.

use std::{fmt, net::IpAddr, time::Duration};

use ipsec_common::TrafficSelector;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{
    Identity,
    crypto::{EspProposal, IkeProposal},
};

/// Names a configured peer; chosen by the caller and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PeerId(pub u32);

/// Names a configured child of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChildName(pub u32);

/// Settings of the whole endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointConfig {
    /// Our port for IKE, 500.
    pub ike_port: u16,
    /// Our port for IKE and ESP behind NAT, 4500.
    pub nat_port: u16,
    /// Half-open IKE SAs from which on a cookie is demanded (RFC 7296 section 2.6).
    pub cookie_threshold: u32,
    /// Half-open IKE SAs in all.
    pub half_open: u32,
    /// Half-open IKE SAs from one address.
    pub half_open_per_source: u32,
}

/// Who starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// We do, at once and for ever.
    Initiate,
    /// We do, when traffic asks for it.
    OnDemand,
    /// The peer does.
    Respond,
}

/// UDP encapsulation (RFC 3948).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NatPolicy {
    /// If NAT detection finds a NAT.
    Auto,
    /// Always.
    Force,
    /// Never; NAT detection is not sent either.
    Forbid,
}

/// When a silent peer is asked whether it lives (RFC 7296 section 2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DpdMode {
    /// Never.
    Off,
    /// While we send to it.
    OnDemand,
    /// Always.
    Periodic,
}

/// What becomes of a child when the peer is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnDead {
    /// It is started again at once.
    Restart,
    /// It is started again when traffic asks for it.
    Trap,
    /// It waits for the peer.
    Clear,
}

/// Which IKE SAs stay when one identity has several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unique {
    /// The newest.
    Replace,
    /// The oldest; others are refused.
    Keep,
    /// All.
    Never,
}

/// Where a peer is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Remote {
    /// Anywhere: it starts, and is known by its identity.
    Anywhere,
    /// At these addresses, the primary first. Empty as long as none of its names is resolved: then it may start from
    /// anywhere, but is not called.
    At(Vec<Way>),
}

/// One address of a peer, and how it is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// The peer's address.
    pub remote: IpAddr,
    /// Our address towards it, as far as it is known.
    pub local: Option<IpAddr>,
}

impl Remote {
    /// The ways to it, none if it may be anywhere.
    pub fn ways(&self) -> &[Way] {
        match self {
            Self::Anywhere => &[],
            Self::At(ways) => ways,
        }
    }

    /// Its addresses, none if it may be anywhere.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.ways().iter().map(|way| way.remote)
    }
}

impl From<IpAddr> for Remote {
    fn from(remote: IpAddr) -> Self {
        Self::At(vec![Way {
            remote,
            local: None,
        }])
    }
}

/// One peer.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerConfig {
    /// Its id.
    pub id: PeerId,
    /// Its name in messages for people.
    pub name: String,
    /// Where it is.
    pub remote: Remote,
    /// Our address; none for whatever the caller names when it starts.
    pub local: Option<IpAddr>,
    /// Our identity; our address if none.
    pub local_id: Option<Identity>,
    /// Its identity; one of its addresses if none, any for a peer that may be anywhere.
    pub remote_id: Option<Identity>,
    /// The pre-shared key.
    pub psk: Zeroizing<Vec<u8>>,
    /// Who starts.
    pub role: Role,
    /// Acceptable algorithms in order of preference.
    pub proposals: Vec<IkeProposal>,
    /// UDP encapsulation.
    pub nat: NatPolicy,
    /// Longest IP datagram in bytes before a message is split (RFC 7383); none to split none.
    pub fragment_size: Option<u16>,
    /// Interval of NAT keep-alives.
    pub keepalive: Duration,
    /// When a silent peer is asked whether it lives.
    pub dpd_mode: DpdMode,
    /// Silence after which it is asked.
    pub dpd_interval: Duration,
    /// Time after which an unanswered request means that the peer is dead.
    pub dpd_timeout: Duration,
    /// Addresses may change while the IKE SA is up, where the peer can, too (MOBIKE, RFC 4555).
    pub mobike: bool,
    /// A peer that moves must show that it receives at its new address before ESP goes there (RFC 4555 section 3.7).
    pub return_routability: bool,
    /// IKE_AUTH brings no child where the responder allows that (RFC 6023).
    pub childless: bool,
    /// Which of several IKE SAs with one identity stay.
    pub unique: Unique,
    /// Lifetime of the IKE SA.
    pub lifetime: Duration,
    /// An IKE SA near its end is replaced by a fresh one, with a new proof of identity, instead of being rekeyed.
    pub reauth: bool,
    /// Its children, the first of which comes with IKE_AUTH.
    pub children: Vec<ChildConfig>,
}

impl PeerConfig {
    /// Who we are to it at an address of ours.
    pub fn identity_at(&self, local: IpAddr) -> Identity {
        self.local_id.clone().unwrap_or_else(|| local.into())
    }
}

impl fmt::Debug for PeerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerConfig({}, {})", self.id.0, self.name)
    }
}

/// One child of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChildConfig {
    /// Its id within the peer.
    pub id: ChildName,
    /// Its name in messages for people.
    pub name: String,
    /// Our side.
    pub local: Vec<TrafficSelector>,
    /// The peer's side.
    pub remote: Vec<TrafficSelector>,
    /// Acceptable algorithms in order of preference.
    pub proposals: Vec<EspProposal>,
    /// What becomes of it when the peer is dead.
    pub on_dead: OnDead,
    /// Lifetime of its SAs.
    pub lifetime: Duration,
    /// Whether its packets travel inside others or as they are.
    pub mode: Mode,
}

/// How ESP carries a packet (RFC 4301 section 4.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// Whole, in another packet between the gateways.
    #[default]
    Tunnel,
    /// Its payload, between the two hosts that the packet is of.
    Transport,
}
