//! What an engine tells the daemon unasked.

use std::net::{IpAddr, SocketAddr};

use ipsec_common::Spi;
use serde::{Deserialize, Serialize};

use super::{ChildId, IkeDatagram, Ledger, PoliciesReason, SaId, TunnelId};

/// An event. All but IKE datagrams are limited in rate by the engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// An IKE datagram arrived on one of the engine's sockets.
    Ike(IkeDatagram),
    /// A packet matched a child on demand that has no outbound SA.
    Acquire {
        /// The tunnel.
        tunnel: TunnelId,
        /// Its child.
        child: ChildId,
        /// The packet.
        flow: Flow,
    },
    /// A limit by volume was reached.
    Lifetime {
        /// The SA.
        sa: SaId,
        /// Which limit.
        kind: LifetimeKind,
    },
    /// ESP arrived that names no SA of ours (RFC 7296 section 1.5 lets us tell the peer).
    UnknownSpi {
        /// Its SPI.
        spi: Spi,
        /// Our address.
        local: IpAddr,
        /// Its source.
        remote: IpAddr,
    },
    /// An authenticated packet of this SA came from another address or port (RFC 7296 section 2.23).
    PeerMoved {
        /// The inbound SA.
        sa: SaId,
        /// Where it came from.
        remote: SocketAddr,
    },
    /// What carries an SA changed, for instance because firewall rules appeared.
    LedgerChanged(Ledger),
    /// The device MTU of a tunnel changed.
    MtuChanged {
        /// The tunnel.
        tunnel: TunnelId,
        /// The new MTU in bytes.
        mtu: u16,
    },
    /// A tunnel was set up without a device that by its settings would have one.
    PoliciesAlone {
        /// The tunnel.
        tunnel: TunnelId,
        /// Why.
        reason: PoliciesReason,
    },
    /// A tunnel has gone to another engine, and its name to a device with another index.
    DeviceChanged {
        /// The tunnel.
        tunnel: TunnelId,
        /// Index of the device before.
        from: u32,
        /// Index of the device that it has now.
        to: u32,
    },
    /// The FIB sends the tunnel's own peer into a tunnel device of ours: nothing is sent until that is mended.
    RecursiveRoute {
        /// The tunnel.
        tunnel: TunnelId,
        /// The peer's address.
        remote: IpAddr,
    },
}

/// The packet that asked for an SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// Inner source.
    pub source: IpAddr,
    /// Inner destination.
    pub destination: IpAddr,
    /// IP protocol.
    pub protocol: u8,
    /// Source port, or 0.
    pub source_port: u16,
    /// Destination port, or 0.
    pub destination_port: u16,
}

/// Which limit was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LifetimeKind {
    /// The SA should be replaced.
    Soft,
    /// The SA carries nothing more.
    Hard,
}
