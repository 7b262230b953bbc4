//! The engines of this process behind one door: a command goes to the engine that has its tunnel or its SA, the answer to
//! a question is put together from those of all engines.
//!
//! The sockets of IKE belong to the `xdp` engine, which is always there.

use tokio::sync::mpsc;

use super::{
    seam::{Command, EngineConfig, Event, Ledger, Rejected, Reply, Request},
    xdp::engine::{Engine, StartError},
};

/// All engines.
pub struct Engines {
    xdp: Engine,
}

impl Engines {
    /// Starts them in the network namespace that the caller is in. Events come out of the receiver.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub async fn start(config: EngineConfig) -> Result<(Self, mpsc::Receiver<Event>), StartError> {
        let (xdp, events) = Engine::start(config).await?;
        Ok((Self { xdp }, events))
    }

    /// Answers a request.
    pub async fn ask(&self, request: Request) -> Reply {
        match request {
            Request::Command(command) => Reply::Done(self.command(command).await),
            Request::SaStats => Reply::SaStats(self.xdp.sa_stats()),
            Request::Counters => Reply::Counters(self.xdp.counters()),
            Request::Interfaces => Reply::Interfaces(self.xdp.interfaces()),
            Request::Survey => Reply::Survey(self.xdp.survey()),
        }
    }

    async fn command(&self, command: Command) -> Result<Option<Ledger>, Rejected> {
        self.xdp.command(command).await
    }

    /// Stops the threads of all engines. Devices, routes and rules stay, so that nothing protected leaves in the clear.
    pub async fn stop(self) {
        self.xdp.stop().await;
    }
}
