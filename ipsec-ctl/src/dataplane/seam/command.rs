//! What the daemon asks of an engine.

use std::net::{IpAddr, SocketAddr};

use ipsec_common::{Spi, TrafficSelector};
use serde::{Deserialize, Serialize};

use crate::esp::{EspKeys, EspSuite};

/// Names a tunnel for as long as the daemon runs; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TunnelId(pub u32);

/// Names a configured child of a tunnel: its place in the configuration, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChildId(pub u32);

/// Names one SA in one direction for as long as the daemon runs; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SaId(pub u64);

/// A command. Every one is answered: `Ok(Ledger)` for an install, `Ok(None)` for the rest, or [`super::Rejected`].
#[derive(Debug, Serialize, Deserialize)]
pub enum Command {
    /// Creates the tunnel and its device, or changes what differs from before; SAs stay. If another engine is to carry it from now
    /// on, its SAs are reported to near their end, and what is installed after this command is the other engine's; the removal of
    /// outbound SAs then takes effect once all of the tunnel have been removed.
    SetTunnel(Box<TunnelSpec>),
    /// All tunnels of the configuration have been set: what a former life has left and none of them wants may go.
    Configured,
    /// Removes the tunnel with its SAs, device, routes and rules.
    RemoveTunnel(TunnelId),
    /// Installs an SA. An outbound one takes the packets that its selectors are for from the next one on, in one step. Of
    /// several of one child the one with the most specific selectors sends, and of equal ones the newest: the one before
    /// it stays installed, unused, until it is removed.
    Install(Box<SaSpec>),
    /// Installs an SA that may have been in use before, under another process: it goes on counting where that one has
    /// stopped. One that is still there stays as it is, but for its outer addresses. An SA of which nobody knows how
    /// far it has counted is refused with [`super::Rejected::Uncounted`]. Between [`Self::SetTunnel`] and
    /// [`Self::Configured`] only, which ends what was not resumed.
    Resume(Box<SaSpec>, Before),
    /// Removes an SA; unknown ids are not an error, for the engine may have dropped it at its hard limit.
    Remove(SaId),
    /// Moves an SA to other outer addresses (NAT rebinding, later MOBIKE).
    MoveOuter(SaId, Outer),
    /// Sends an IKE datagram from the engine's sockets.
    SendIke(IkeDatagram),
    /// Reports the carrier of the tunnel's device: on while a child is up or may come up on demand.
    SetCarrier(TunnelId, bool),
}

/// What is known of an SA that is resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Before {
    /// It was installed.
    Installed,
    /// It was negotiated at this second of CLOCK_MONOTONIC, and then perhaps installed and perhaps not.
    InDoubt(u64),
}

/// One configured tunnel, as the data plane sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelSpec {
    /// Its id.
    pub id: TunnelId,
    /// Its name in the configuration, for logs and `status`.
    pub name: String,
    /// Name of its device, at most 15 bytes.
    pub device: String,
    /// What is to carry it.
    pub engine: EngineChoice,
    /// Fixed device MTU in bytes, or computed from the SAs and the outer path.
    pub mtu: Option<u16>,
    /// Whether XDP and AF_XDP may carry it.
    pub fast_path: FastPath,
    /// How its SAs carry packets.
    pub mode: Mode,
    /// Policies of the whole host alone lead packets into it: it has no device and no routes.
    pub policy_based: bool,
    /// What of the kernel's ESP the network card is to do.
    pub offload: NicOffload,
    /// Don't-fragment bit of the outer IPv4 header.
    pub df: Df,
    /// Clamps the MSS of TCP SYNs in both directions to the device MTU.
    pub clamp_mss: bool,
    /// Copies the inner DSCP outwards (RFC 6040 and RFC 2983 uniform model); otherwise the outer DSCP is 0.
    pub copy_dscp: bool,
    /// Its configured children.
    pub children: Vec<ChildTrap>,
    /// Prefixes, policies and addresses that the engine installs for it.
    pub routing: crate::dataplane::routing::RoutingSpec,
}

/// A configured child: what may be asked for on demand, and what routes derive from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildTrap {
    /// Its id within the tunnel.
    pub id: ChildId,
    /// Its name in the configuration.
    pub name: String,
    /// Configured selectors.
    pub selectors: SelectorPair,
    /// A packet that matches while no SA is installed raises [`super::Event::Acquire`].
    pub on_demand: bool,
}

/// Local and remote selectors; a packet must match one of each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelectorPair {
    /// Our side.
    pub local: Vec<TrafficSelector>,
    /// The peer's side.
    pub remote: Vec<TrafficSelector>,
}

/// What is to carry a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// `xdp` where there is a fast path, else `kernel` where the kernel has what it takes.
    Auto,
    /// XDP and AF_XDP, and the slow path in this process.
    #[default]
    Xdp,
    /// The kernel's ESP.
    Kernel,
}

/// Whether a tunnel may take the fast path, which netfilter and tc do not see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FastPath {
    /// While no foreign netfilter rules would be bypassed.
    #[default]
    Auto,
    /// Always, netfilter and tc notwithstanding.
    On,
    /// Never: everything goes through the kernel and the slow path.
    Off,
}

/// How SAs carry packets (RFC 4301 section 4.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Whole, in another packet between the gateways.
    #[default]
    Tunnel,
    /// Their payload, between this host and the peer; there is no device.
    Transport,
}

/// What the network card is to do for a tunnel that the kernel carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NicOffload {
    /// Nothing.
    #[default]
    Off,
    /// The cryptography if it can.
    Auto,
    /// The cryptography; the ledger says so where it does not.
    Crypto,
    /// All of ESP; the ledger says so where it does not.
    Packet,
}

/// Don't-fragment bit of the outer IPv4 header (RFC 4301 section 8.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Df {
    /// As in the inner header; set for inner IPv6.
    #[default]
    Copy,
    /// Always set.
    Set,
    /// Never set.
    Clear,
}

/// Direction of an SA, seen from this gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The peer sends to us.
    Inbound,
    /// We send to the peer.
    Outbound,
}

/// Everything an engine needs to carry one SA in one direction.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SaSpec {
    /// Its id.
    pub id: SaId,
    /// The tunnel it belongs to.
    pub tunnel: TunnelId,
    /// The configured child it serves.
    pub child: ChildId,
    /// Its direction.
    pub direction: Direction,
    /// Its SPI: ours inbound, the peer's outbound.
    pub spi: Spi,
    /// Its algorithms.
    pub suite: EspSuite,
    /// Its keys, never rendered.
    pub keys: EspKeys,
    /// 64-bit sequence numbers (RFC 4303 section 2.2.1).
    pub esn: bool,
    /// Anti-replay window in packets, inbound; 0 accepts replays.
    pub replay_window: u32,
    /// Addresses and encapsulation of the outer packet.
    pub outer: Outer,
    /// Negotiated selectors.
    pub selectors: SelectorPair,
    /// Its limits.
    pub lifetime: Lifetime,
}

/// Outer addresses of an SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outer {
    /// Our address.
    pub local: IpAddr,
    /// The peer's address.
    pub remote: IpAddr,
    /// UDP encapsulation (RFC 3948), if negotiated.
    pub encap: Option<UdpEncap>,
}

/// Ports of ESP-in-UDP, in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UdpEncap {
    /// Our port, 4500 unless configured otherwise.
    pub local_port: u16,
    /// The peer's port, as its NAT shows it.
    pub remote_port: u16,
}

/// Limits of an SA. By volume `u64::MAX` is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lifetime {
    /// Packets after which [`super::LifetimeKind::Soft`] is reported.
    pub soft_packets: u64,
    /// Packets after which the SA carries nothing more.
    pub hard_packets: u64,
    /// Bytes of inner packets after which [`super::LifetimeKind::Soft`] is reported.
    pub soft_bytes: u64,
    /// Bytes of inner packets after which the SA carries nothing more.
    pub hard_bytes: u64,
    /// Second of CLOCK_MONOTONIC from which on the SA carries nothing more. The daemon goes first; this is for when there is none.
    pub expires: Option<u64>,
}

/// An IKE message with its addresses, without the non-ESP marker of RFC 3948.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IkeDatagram {
    /// Our address and port: 500, or 4500, where the marker is added and removed by the engine.
    pub local: SocketAddr,
    /// The peer's address and port.
    pub remote: SocketAddr,
    /// The message.
    pub bytes: Vec<u8>,
}
