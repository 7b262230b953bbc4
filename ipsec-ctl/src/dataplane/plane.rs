//! The data plane as the daemon knows it, wherever its engines run.

use ipsec_common::Reason;
use tokio::sync::mpsc;

pub use super::xdp::engine::{EngineConfig, StartError};
use super::{
    engines::Engines,
    seam::{Command, Event, InterfaceStatus, Ledger, Rejected, Reply, Request, SaStats, Survey},
};

/// A data plane.
pub struct Plane {
    side: Side,
}

/// Where the engines are.
enum Side {
    /// In this process.
    Here(Engines),
}

impl Plane {
    /// Starts engines in this process, in the network namespace that the caller is in. Events come out of the receiver.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub async fn start(config: EngineConfig) -> Result<(Self, mpsc::Receiver<Event>), StartError> {
        let (engines, events) = Engines::start(config).await?;
        let side = Side::Here(engines);
        Ok((Self { side }, events))
    }

    /// Has a command done.
    ///
    /// # Errors
    ///
    /// [`Rejected`], with nothing changed.
    pub async fn command(&self, command: Command) -> Result<Option<Ledger>, Rejected> {
        match self.ask(Request::Command(command)).await {
            Some(Reply::Done(result)) => result,
            _ => Err(Rejected::Stopped),
        }
    }

    /// Counters of all SAs, in the order of their ids; empty if the data plane has gone.
    pub async fn sa_stats(&self) -> Vec<SaStats> {
        match self.ask(Request::SaStats).await {
            Some(Reply::SaStats(stats)) => stats,
            _ => Vec::new(),
        }
    }

    /// Packets by reason; empty if the data plane has gone.
    pub async fn counters(&self) -> Vec<(Reason, u64)> {
        match self.ask(Request::Counters).await {
            Some(Reply::Counters(counters)) => counters,
            _ => Vec::new(),
        }
    }

    /// What is done on which interface; empty if the data plane has gone.
    pub async fn interfaces(&self) -> Vec<InterfaceStatus> {
        match self.ask(Request::Interfaces).await {
            Some(Reply::Interfaces(interfaces)) => interfaces,
            _ => Vec::new(),
        }
    }

    /// What the data plane has; nothing if it has gone.
    pub async fn survey(&self) -> Survey {
        match self.ask(Request::Survey).await {
            Some(Reply::Survey(survey)) => survey,
            _ => Survey::default(),
        }
    }

    async fn ask(&self, request: Request) -> Option<Reply> {
        match &self.side {
            Side::Here(engines) => Some(engines.ask(request).await),
        }
    }

    /// Stops the data plane. Devices, routes and rules stay, so that nothing protected leaves in the clear.
    pub async fn stop(self) {
        match self.side {
            Side::Here(engines) => engines.stop().await,
        }
    }
}
