//! What a data plane is asked, and what it answers: commands, and questions about what it has.

use ipsec_common::{Reason, Spi};
use serde::{Deserialize, Serialize};

use super::{
    ChildId, Command, Direction, InterfaceStatus, Ledger, PoliciesReason, Rejected, SaId, SaStats,
    TunnelId,
};

/// A request. Each has exactly one [`Reply`].
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Do something.
    Command(Command),
    /// Counters of all SAs.
    SaStats,
    /// Packets by reason.
    Counters,
    /// What is done on which interface.
    Interfaces,
    /// What is there: all tunnels and all SAs.
    Survey,
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To [`Request::Command`].
    Done(Result<Option<Ledger>, Rejected>),
    /// To [`Request::SaStats`], in the order of ids.
    SaStats(Vec<SaStats>),
    /// To [`Request::Counters`].
    Counters(Vec<(Reason, u64)>),
    /// To [`Request::Interfaces`].
    Interfaces(Vec<InterfaceStatus>),
    /// To [`Request::Survey`].
    Survey(Survey),
}

/// What a data plane has, for a daemon that comes back to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Survey {
    /// Its tunnels, in the order of ids.
    pub tunnels: Vec<TunnelFacts>,
    /// Its SAs, in the order of ids.
    pub sas: Vec<SaFacts>,
}

/// What a data plane knows of a tunnel that it was not told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelFacts {
    /// The tunnel.
    pub id: TunnelId,
    /// MTU of its device in bytes; none without a device.
    pub mtu: Option<u16>,
    /// Why it has no device, if it has none.
    pub policies: Option<PoliciesReason>,
}

/// An SA that a data plane has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaFacts {
    /// Its id.
    pub id: SaId,
    /// Its tunnel.
    pub tunnel: TunnelId,
    /// Its child.
    pub child: ChildId,
    /// Its direction.
    pub direction: Direction,
    /// Its SPI.
    pub spi: Spi,
    /// How it is carried.
    pub ledger: Option<Ledger>,
}
