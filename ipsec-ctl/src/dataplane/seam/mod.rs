//! The protocol between the daemon and a data plane engine: commands in, answers and events out.
//!
//! Plain values that own their data, so that an engine can be driven by a test, recorded, or moved into a process of
//! its own. SAs and tunnels are named by numbers that the daemon chooses. Keys are redacted from every rendering.

mod command;
mod config;
mod event;
mod ledger;
mod request;
mod stats;

pub use command::{
    Before, ChildId, ChildTrap, Command, Df, Direction, EngineChoice, FastPath, IkeDatagram,
    Lifetime, Mode, NicOffload, Outer, SaId, SaSpec, SelectorPair, TunnelId, TunnelSpec, UdpEncap,
};
pub use config::EngineConfig;
pub use event::{Event, Flow, LifetimeKind};
pub use ledger::{
    KernelReason, Ledger, Nic, NicReason, Offload, OffloadReason, PoliciesReason, Rejected,
};
pub use request::{Reply, Request, SaFacts, Survey, TunnelFacts};
pub use stats::{InterfaceStatus, PathCounters, SaStats, XdpMode};
