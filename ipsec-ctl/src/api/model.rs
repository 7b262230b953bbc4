//! What goes over the control socket, and what `--json` prints. Times are in seconds, sizes in bytes.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::dataplane::seam::{Nic, Offload, PathCounters};

/// The state of the gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Its instance, as configured.
    pub instance: String,
    /// Age of the daemon.
    pub uptime_seconds: u64,
    /// Resident memory of the daemon.
    pub memory_bytes: u64,
    /// The interfaces, and how packets are taken from them.
    pub interfaces: Vec<Interface>,
    /// The tunnels in the order of the configuration.
    pub tunnels: Vec<Tunnel>,
}

/// One interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// How XDP and AF_XDP are attached, or why not, in words.
    pub fast_path: String,
}

/// State of a tunnel or child.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It carries traffic.
    Up,
    /// The exchanges are under way.
    Connecting,
    /// It waits for the peer, for a packet, or for the next attempt.
    Waiting,
    /// It was taken down by the operator.
    Down,
}

/// One tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tunnel {
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: State,
    /// Name of its device.
    pub device: String,
    /// MTU of its device, once known.
    pub mtu: Option<u16>,
    /// What happened to its device when it went to another engine last.
    #[serde(default)]
    pub device_changed: Option<DeviceChanged>,
    /// The peer as configured.
    pub peer: String,
    /// Its addresses as far as they are known, in the order in which they are tried.
    pub addresses: Vec<PeerAddress>,
    /// `initiate`, `on-demand` or `respond`.
    pub role: String,
    /// The last failure and its reason, until the tunnel is up.
    pub last_failure: Option<String>,
    /// `fast_path` as configured; with `on` netfilter and tc do not see its traffic.
    pub fast_path: crate::dataplane::seam::FastPath,
    /// Its IKE SA.
    pub ike: Option<IkeSa>,
    /// Its children in the order of the configuration.
    pub children: Vec<Child>,
}

/// A device that has another index than before: programs that know it by that have to look it up again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceChanged {
    /// The index before.
    pub from: u32,
    /// The index since.
    pub to: u32,
}

/// One address of a peer, or a name that is not resolved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerAddress {
    /// As configured.
    pub host: String,
    /// The address, if it is known.
    pub address: Option<IpAddr>,
    /// The tunnel's IKE SA is with this one.
    pub in_use: bool,
    /// Why the last attempt with it failed, if it did.
    pub failure: Option<String>,
}

/// The IKE SA of a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IkeSa {
    /// SPI of the original initiator, hexadecimal.
    pub initiator_spi: String,
    /// SPI of the original responder, hexadecimal.
    pub responder_spi: String,
    /// Whether we started it.
    pub initiator: bool,
    /// Algorithms.
    pub suite: String,
    /// Our outer address and port.
    pub local: SocketAddr,
    /// The peer's outer address and port.
    pub remote: SocketAddr,
    /// Our identity.
    pub local_id: String,
    /// The peer's identity.
    pub remote_id: String,
    /// What NAT detection found.
    pub nat: String,
    /// Its addresses can change while it is up (MOBIKE).
    pub mobike: bool,
    /// Its age.
    pub age_seconds: u64,
    /// Message ID of our next request.
    pub next_request: u32,
    /// Message ID that the peer's next request must have.
    pub expected_request: u32,
}

/// One configured child.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Child {
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: State,
    /// Our selectors, negotiated if up, else as configured.
    pub local: Vec<String>,
    /// The peer's selectors.
    pub remote: Vec<String>,
    /// Algorithms, once negotiated.
    pub suite: Option<String>,
    /// Age of its SAs.
    pub age_seconds: Option<u64>,
    /// ESP in UDP.
    pub encapsulated: bool,
    /// Traffic from the peer.
    pub inbound: Option<Direction>,
    /// Traffic to the peer.
    pub outbound: Option<Direction>,
    /// What the network card does for traffic from the peer, if it was asked.
    pub inbound_nic: Option<Nic>,
    /// What it does for traffic to the peer.
    pub outbound_nic: Option<Nic>,
}

/// One direction of a child's SAs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Direction {
    /// SPI as a number; shown in hexadecimal.
    pub spi: u32,
    /// How it is carried, and why not faster.
    pub offload: Offload,
    /// What AF_XDP workers carried.
    pub fast: PathCounters,
    /// What the slow path carried.
    pub slow: PathCounters,
    /// Highest sequence number.
    pub sequence: u64,
    /// Packets refused as replayed or too old.
    pub replayed: u64,
    /// Packets whose ICV was wrong.
    pub forged: u64,
}

/// One counter of packets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    /// Its name.
    pub name: String,
    /// What became of the packets: `dropped`, `slow`, `passed` or `fast`.
    pub kind: String,
    /// Packets since the maps were made.
    pub packets: u64,
    /// What the counter means.
    pub meaning: String,
}

/// What of a tunnel is to be rekeyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rekey {
    /// Its children.
    Children,
    /// Its IKE SA.
    Ike,
}

/// What was done, in words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// One line for each thing done.
    pub lines: Vec<String>,
}

/// Why a request was refused; nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
}
