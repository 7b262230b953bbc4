//! The configuration as the daemon uses it: every value parsed, defaulted and known to be usable.
//!
//! Two tunnels compare equal exactly if a reload has nothing to do for them.

use std::{fmt, net::IpAddr, path::PathBuf, time::Duration};

use ipnet::IpNet;
use ipsec_common::TrafficSelector;
use serde::{Deserialize, Serialize};

use super::{
    schema::{DpdMode, Nat, OnDead, SysctlSetting, Unique},
    secret::Secret,
};
use crate::{
    dataplane::{
        routing::RoutesMode,
        seam::{Df, EngineChoice, FastPath, Mode, NicOffload, SelectorPair},
    },
    ike::{
        Identity,
        crypto::{EspProposal, IkeProposal},
    },
};

/// A whole configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Names pins, so that several gateways can share a kernel.
    pub instance: String,
    /// Interfaces that XDP attaches to; all suitable ones if not given.
    pub interfaces: Option<Vec<String>>,
    /// Mark of all packets of our own, which keeps them out of the tunnels.
    pub mark: u32,
    /// What is done about sysctls.
    pub sysctl: SysctlSetting,
    /// Path of the control socket.
    pub control_socket: PathBuf,
    /// AF_XDP workers; as many as queues and processors allow if not given.
    pub workers: Option<u16>,
    /// Workers poll without sleeping.
    pub busy_poll: bool,
    /// UDP ports we listen on.
    pub ports: Ports,
    /// Limits that protect the responder.
    pub limits: Limits,
    /// The tunnels, in the order of the file.
    pub tunnels: Vec<Tunnel>,
}

/// UDP ports in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// IKE.
    pub ike: u16,
    /// IKE and ESP behind NAT.
    pub nat_traversal: u16,
}

/// Limits of the responder (RFC 7296 section 2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Half-open IKE SAs from which on a cookie is demanded.
    pub cookie_threshold: u32,
    /// Half-open IKE SAs in all.
    pub half_open: u32,
    /// Half-open IKE SAs from one address.
    pub half_open_per_source: u32,
}

/// One tunnel: an IKE peer and its children.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Its name.
    pub name: String,
    /// Where the peer is.
    pub peer: Peer,
    /// Our outer address; the kernel's choice for the peer if not given.
    pub local: Option<IpAddr>,
    /// Our identity; our outer address if not given.
    pub local_id: Option<Identity>,
    /// The peer's identity; its outer address if not given (any, for `peer = "any"`).
    pub remote_id: Option<Identity>,
    /// The pre-shared key.
    pub psk: Secret,
    /// Who starts it.
    pub role: Role,
    /// IKE proposals in order of preference.
    pub ike: Vec<IkeProposal>,
    /// UDP encapsulation.
    pub nat: Nat,
    /// Interval of NAT keep-alives.
    pub keepalive: Duration,
    /// Longest IP datagram of IKE in bytes before a message is split (RFC 7383); none to split none.
    pub fragment_size: Option<u16>,
    /// Addresses may change while the IKE SA is up, where the peer can, too (MOBIKE).
    pub mobike: bool,
    /// A peer that moves must show that it receives at its new address before ESP goes there.
    pub return_routability: bool,
    /// The IKE SA comes up without a child, where the peer can.
    pub childless: bool,
    /// Liveness checks.
    pub dpd: Dpd,
    /// Which of several IKE SAs with one identity stay.
    pub unique: Unique,
    /// Lifetime of the IKE SA.
    pub lifetime: Duration,
    /// It is replaced by a fresh one, with a new proof of identity, instead of being rekeyed.
    pub reauth: bool,
    /// Name of its device.
    pub device: String,
    /// Fixed device MTU in bytes.
    pub mtu: Option<u16>,
    /// What carries it.
    pub engine: EngineChoice,
    /// How its SAs carry packets.
    pub mode: Mode,
    /// Policies of the whole host alone lead packets into it.
    pub policy_based: bool,
    /// Whether XDP may carry it.
    pub fast_path: FastPath,
    /// What the network card does for it.
    pub offload: NicOffload,
    /// Outer DF bit.
    pub df: Df,
    /// Clamp the MSS of TCP.
    pub clamp_mss: bool,
    /// Copy DSCP outwards.
    pub copy_dscp: bool,
    /// Who installs routes.
    pub routes: RoutesMode,
    /// Addresses of the device.
    pub address: Vec<IpNet>,
    /// Prefixes exempt from protection.
    pub bypass: Vec<IpNet>,
    /// Its children, at least one.
    pub children: Vec<Child>,
}

impl Tunnel {
    /// Whether by its settings it has no device: policies of the whole host alone lead packets into it.
    pub fn is_without_device(&self) -> bool {
        self.policy_based || self.mode == Mode::Transport
    }
}

/// One child of a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Child {
    /// Its name.
    pub name: String,
    /// Our side.
    pub local: Vec<TrafficSelector>,
    /// The peer's side.
    pub remote: Vec<TrafficSelector>,
    /// ESP proposals in order of preference.
    pub esp: Vec<EspProposal>,
    /// What becomes of it when the peer is dead.
    pub on_dead: OnDead,
    /// Lifetime of its SAs.
    pub lifetime: Duration,
    /// Bytes of inner packets an SA may carry.
    pub lifetime_bytes: Option<u64>,
    /// Packets an SA may carry.
    pub lifetime_packets: Option<u64>,
    /// Anti-replay window in packets; 0 is off.
    pub replay_window: u32,
}

impl Child {
    /// Both sides of its traffic.
    pub fn selectors(&self) -> SelectorPair {
        SelectorPair {
            local: self.local.clone(),
            remote: self.remote.clone(),
        }
    }
}

/// Where the peer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// At one of these, the primary first; at least one.
    At(Vec<Host>),
    /// Anywhere: it starts, and is known by its identity.
    Any,
}

/// One place where a peer may be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Host {
    /// At this address.
    Address(IpAddr),
    /// At whatever the DNS says of this name.
    Name(String),
}

impl Peer {
    /// The places where it may be, none if it may be anywhere.
    pub fn hosts(&self) -> &[Host] {
        match self {
            Self::At(hosts) => hosts,
            Self::Any => &[],
        }
    }

    /// Its addresses, as far as they are written down.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.hosts().iter().filter_map(|host| match host {
            Host::Address(address) => Some(*address),
            Host::Name(_) => None,
        })
    }

    /// Whether it has a name that must be looked up.
    pub fn has_names(&self) -> bool {
        self.hosts()
            .iter()
            .any(|host| matches!(host, Host::Name(_)))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.hosts().is_empty() {
            return f.write_str("any");
        }
        for (number, host) in self.hosts().iter().enumerate() {
            let between = if number == 0 { "" } else { ", " };
            write!(f, "{between}{host}")?;
        }
        Ok(())
    }
}

/// Who starts a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// We do, at once and for ever.
    Initiate,
    /// We do, when a packet asks for it.
    OnDemand,
    /// The peer does.
    Respond,
}

/// Liveness checks (RFC 7296 section 2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dpd {
    /// Whether a silent peer is asked always, or only while we send to it.
    pub mode: DpdMode,
    /// Silence after which it is asked.
    pub interval: Duration,
    /// Time without an answer after which the peer is dead.
    pub timeout: Duration,
}
