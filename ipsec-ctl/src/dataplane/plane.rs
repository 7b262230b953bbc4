//! The data plane as the daemon knows it, wherever its engines run.

use std::path::Path;

use ipsec_common::Reason;
use tokio::sync::mpsc;

use super::{
    engines::Engines,
    link::{ConnectError, Remote},
    seam::{
        Command, EngineConfig, Event, IkeDatagram, InterfaceStatus, Ledger, Rejected, Reply,
        Request, SaStats, Survey,
    },
    xdp::engine::StartError,
};

/// A data plane.
pub struct Plane {
    side: Side,
}

/// Where the engines are.
enum Side {
    /// In this process.
    Here(Box<Engines>),
    /// In a process of their own.
    There(Remote),
}

impl Plane {
    /// Starts engines in this process, in the network namespace that the caller is in. Events come out of the receiver.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub async fn start(config: EngineConfig) -> Result<(Self, mpsc::Receiver<Event>), StartError> {
        let (engines, events) = Engines::start(config).await?;
        let side = Side::Here(Box::new(engines));
        Ok((Self { side }, events))
    }

    /// Attaches to the engines of the process that listens on `path`. Events come out of the receiver, which ends when that
    /// process does.
    ///
    /// # Errors
    ///
    /// [`ConnectError`].
    pub async fn attach(
        path: &Path,
        config: &EngineConfig,
    ) -> Result<(Self, mpsc::Receiver<Event>), ConnectError> {
        let (remote, events) = Remote::attach(path, config).await?;
        let side = Side::There(remote);
        Ok((Self { side }, events))
    }

    /// Id of the process that the engines run in, if it is another one than this.
    pub fn process(&self) -> Option<u32> {
        match &self.side {
            Side::Here(_) => None,
            Side::There(remote) => Some(remote.process()),
        }
    }

    /// Sends an IKE datagram, after all commands before it were done. What is lost here is mended by retransmission, as is what is
    /// lost on the way.
    pub async fn send_ike(&self, datagram: IkeDatagram) {
        let request = Request::Command(Command::SendIke(datagram));
        match &self.side {
            Side::Here(engines) => drop(engines.ask(request).await),
            Side::There(remote) => remote.post(request).await,
        }
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
            Side::There(remote) => remote.ask(request).await,
        }
    }

    /// Stops engines of this process; those of another one go on. Devices, routes and rules stay, so that nothing protected
    /// leaves in the clear.
    pub async fn detach(self) {
        match self.side {
            Side::Here(engines) => engines.stop().await,
            Side::There(_) => {}
        }
    }
}
