//! Counters of SAs, read at any time without a round trip to the workers.

use serde::{Deserialize, Serialize};

use super::{OffloadReason, SaId};

/// Packets and bytes of inner traffic that took one path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathCounters {
    /// Packets.
    pub packets: u64,
    /// Bytes of the inner packets, headers included.
    pub bytes: u64,
}

/// Counters of one SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaStats {
    /// The SA.
    pub sa: SaId,
    /// What AF_XDP workers carried.
    pub fast: PathCounters,
    /// What the slow path carried.
    pub slow: PathCounters,
    /// Highest sequence number sent, or received and authenticated.
    pub sequence: u64,
    /// Packets refused as replayed or too old.
    pub replayed: u64,
    /// Packets whose ICV was wrong.
    pub forged: u64,
}

/// What an engine does on one interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceStatus {
    /// Its name.
    pub name: String,
    /// How the XDP program is attached, if it is.
    pub xdp: Option<XdpMode>,
    /// Whether packets reach the workers without a copy.
    pub zero_copy: bool,
    /// Receive queues that have an AF_XDP socket.
    pub queues: u32,
    /// Why it has no fast path, if it has none.
    pub reason: Option<OffloadReason>,
}

/// Where an XDP program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum XdpMode {
    /// In the driver.
    Native,
    /// In the network stack, for drivers without XDP.
    Generic,
}
