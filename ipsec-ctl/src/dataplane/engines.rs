//! The engines of this process behind one door: a command goes to the engine that has its tunnel or its SA, the answer to
//! a question is put together from those of all engines.
//!
//! Sockets, routes and the XDP program belong to the `xdp` engine, which is always there. The `kernel` engine is started
//! with the first tunnel that asks for it.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use ipsec_common::Reason;
use tokio::sync::{OnceCell, mpsc};

use super::{
    kernel,
    seam::{
        Command, Df, EngineChoice, EngineConfig, Event, KernelReason, Ledger, Mode, Rejected,
        Reply, Request, SaId, SaStats, Survey, TunnelId, TunnelSpec,
    },
    xdp::engine::{Engine, StartError},
};
use crate::net::netlink::Netlink;

/// All engines.
pub struct Engines {
    xdp: Engine,
    kernel: OnceCell<kernel::engine::Engine>,
    netlink: Netlink,
    /// When SAs end, whatever becomes of the daemon.
    deadlines: Mutex<HashMap<SaId, u64>>,
}

impl Engines {
    /// Starts them in the network namespace that the caller is in. Events come out of the receiver.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub async fn start(config: EngineConfig) -> Result<(Self, mpsc::Receiver<Event>), StartError> {
        let (xdp, events) = Engine::start(config).await?;
        let netlink = Netlink::open().map_err(|source| StartError {
            step: "open a netlink socket",
            source,
        })?;
        let engines = Self {
            xdp,
            kernel: OnceCell::new(),
            netlink,
            deadlines: Mutex::default(),
        };
        Ok((engines, events))
    }

    /// Answers a request.
    pub async fn ask(&self, request: Request) -> Reply {
        match request {
            Request::Command(command) => Reply::Done(self.command(command).await),
            Request::SaStats => Reply::SaStats(self.sa_stats().await),
            Request::Counters => Reply::Counters(self.counters()),
            Request::Interfaces => Reply::Interfaces(self.xdp.interfaces()),
            Request::Survey => Reply::Survey(self.survey().await),
        }
    }

    async fn command(&self, command: Command) -> Result<Option<Ledger>, Rejected> {
        match command {
            Command::SetTunnel(spec) => self.set_tunnel(*spec).await.map(|()| None),
            Command::Configured => {
                if let Some(kernel) = self.kernel.get() {
                    kernel.command(Command::Configured).await?;
                }
                self.xdp.command(Command::Configured).await
            }
            Command::RemoveTunnel(id) => {
                self.give(self.kernel_of(id).await, Command::RemoveTunnel(id))
                    .await
            }
            Command::Install(spec) => {
                let (id, tunnel, expires) = (spec.id, spec.tunnel, spec.lifetime.expires);
                self.put_in((id, tunnel, expires), Command::Install(spec))
                    .await
            }
            Command::Resume(spec, before) => {
                let (id, tunnel, expires) = (spec.id, spec.tunnel, spec.lifetime.expires);
                self.put_in((id, tunnel, expires), Command::Resume(spec, before))
                    .await
            }
            Command::SetCarrier(id, on) => {
                self.give(self.kernel_of(id).await, Command::SetCarrier(id, on))
                    .await
            }
            Command::Remove(id) => {
                self.deadlines().remove(&id);
                self.give(self.kernel_with(id).await, Command::Remove(id))
                    .await
            }
            Command::MoveOuter(id, outer) => {
                self.give(self.kernel_with(id).await, Command::MoveOuter(id, outer))
                    .await
            }
            Command::SendIke(datagram) => self.xdp.command(Command::SendIke(datagram)).await,
        }
    }

    /// Gives an SA to the engine that has its tunnel, and notes its end.
    async fn put_in(
        &self,
        (id, tunnel, expires): (SaId, TunnelId, Option<u64>),
        command: Command,
    ) -> Result<Option<Ledger>, Rejected> {
        let ledger = self.give(self.kernel_of(tunnel).await, command).await?;
        self.deadlines().extend(expires.map(|at| (id, at)));
        Ok(ledger)
    }

    /// Removes SAs whose time is over at `now` (seconds of CLOCK_MONOTONIC).
    pub async fn expire(&self, now: u64) {
        let due: Vec<SaId> = {
            let deadlines = self.deadlines();
            let over = deadlines.iter().filter(|(_, at)| **at <= now);
            over.map(|(id, _)| *id).collect()
        };
        for id in due {
            tracing::warn!(
                sa = id.0,
                "an SA has reached the end of its life and no daemon has replaced it"
            );
            // What cannot be removed is tried again.
            if self.command(Command::Remove(id)).await.is_err() {
                self.deadlines().insert(id, now);
            }
        }
    }

    fn deadlines(&self) -> MutexGuard<'_, HashMap<SaId, u64>> {
        self.deadlines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a command to the kernel engine if it concerns that one, else to the other.
    async fn give(
        &self,
        kernel: Option<&kernel::engine::Engine>,
        command: Command,
    ) -> Result<Option<Ledger>, Rejected> {
        match kernel {
            Some(kernel) => kernel.command(command).await,
            None => self.xdp.command(command).await,
        }
    }

    /// The kernel engine, if the tunnel is its.
    async fn kernel_of(&self, id: TunnelId) -> Option<&kernel::engine::Engine> {
        let kernel = self.kernel.get()?;
        kernel.has_tunnel(id).await.then_some(kernel)
    }

    /// The kernel engine, if the SA is its.
    async fn kernel_with(&self, id: SaId) -> Option<&kernel::engine::Engine> {
        let kernel = self.kernel.get()?;
        kernel.has_sa(id).await.then_some(kernel)
    }

    async fn set_tunnel(&self, spec: TunnelSpec) -> Result<(), Rejected> {
        let reason = match spec.engine {
            EngineChoice::Xdp => None,
            EngineChoice::Kernel => Some(KernelReason::Configured),
            EngineChoice::Auto => {
                let wants = !self.xdp.has_fast_path() && spec.df != Df::Set;
                wants.then_some(KernelReason::NoFastPath)
            }
        };
        let kernel = match reason {
            None => None,
            Some(reason) => match self.start_kernel().await {
                Ok(kernel) => Some((kernel, reason)),
                Err(error) if reason == KernelReason::Configured => {
                    return Err(Rejected::Kernel {
                        step: "engine = \"kernel\"".to_owned(),
                        reason: error.to_string(),
                    });
                }
                Err(error) => {
                    tracing::info!(%error, tunnel = spec.name, "no kernel engine: the slow path carries the tunnel");
                    None
                }
            },
        };
        match kernel {
            Some((kernel, reason)) => {
                // It may have been the other engine's before.
                match self.xdp.command(Command::RemoveTunnel(spec.id)).await {
                    Ok(_) | Err(Rejected::UnknownTunnel) => {}
                    Err(rejected) => return Err(rejected),
                }
                kernel.set_tunnel(spec, reason).await
            }
            None if spec.mode == Mode::Transport => Err(Rejected::Kernel {
                step: "mode = \"transport\"".to_owned(),
                reason: "only engine = \"kernel\" carries it".to_owned(),
            }),
            None => {
                if let Some(kernel) = self.kernel_of(spec.id).await {
                    kernel.command(Command::RemoveTunnel(spec.id)).await?;
                }
                kernel::engine::remove_device(&self.netlink, &spec.device).await?;
                self.xdp
                    .command(Command::SetTunnel(Box::new(spec)))
                    .await
                    .map(|_| ())
            }
        }
    }

    async fn start_kernel(&self) -> Result<&kernel::engine::Engine, kernel::engine::StartError> {
        self.kernel
            .get_or_try_init(|| kernel::engine::Engine::start(self.xdp.lodge()))
            .await
    }

    async fn sa_stats(&self) -> Vec<SaStats> {
        let mut stats = self.xdp.sa_stats();
        if let Some(kernel) = self.kernel.get() {
            stats.extend(kernel.sa_stats().await);
            stats.sort_by_key(|stats| stats.sa);
        }
        stats
    }

    /// Packets by reason. What the kernel has dropped is counted while it carries tunnels.
    fn counters(&self) -> Vec<(Reason, u64)> {
        let mut counters = self.xdp.counters();
        if self.kernel.initialized() {
            let kernel = kernel::counters::dropped();
            for (reason, count) in &mut counters {
                *count += kernel.get(reason).copied().unwrap_or_default();
            }
        }
        counters
    }

    async fn survey(&self) -> Survey {
        let mut survey = self.xdp.survey();
        if let Some(kernel) = self.kernel.get() {
            let more = kernel.survey().await;
            survey.tunnels.extend(more.tunnels);
            survey.tunnels.sort_by_key(|tunnel| tunnel.id);
            survey.sas.extend(more.sas);
            survey.sas.sort_by_key(|sa| sa.id);
        }
        survey
    }

    /// Stops the threads of all engines. Devices, routes and rules stay, so that nothing protected leaves in the clear.
    pub async fn stop(self) {
        if let Some(kernel) = self.kernel.into_inner() {
            kernel.stop();
        }
        self.xdp.stop().await;
    }
}
