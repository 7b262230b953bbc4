//! The engines of this process behind one door: a command goes to the engine that has its tunnel or its SA, the answer to
//! a question is put together from those of all engines.
//!
//! A tunnel is wholly with one engine, but while it [moves](moving) from one to the other.
//!
//! Sockets, routes and the XDP program belong to the `xdp` engine, which is always there. The `kernel` engine is started
//! with the first tunnel that asks for it.

mod moving;

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use ipsec_common::Reason;
use tokio::sync::{OnceCell, mpsc};

use self::moving::{Home, Moves};
use super::{
    kernel,
    routing::Place,
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
    /// Tunnels on their way from one engine to the other. Held while a command is done.
    moves: tokio::sync::Mutex<Moves>,
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
            moves: tokio::sync::Mutex::default(),
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
            // IKE waits for nothing.
            Command::SendIke(datagram) => self.xdp.command(Command::SendIke(datagram)).await,
            Command::Configured => {
                let moves = &*self.moves.lock().await;
                match self.kernel.get() {
                    Some(kernel) => drop(kernel.command(Command::Configured).await?),
                    None => self.remove_what_the_kernel_has().await,
                }
                let configured = self.xdp.command(Command::Configured).await;
                self.ask_again(moves).await;
                configured
            }
            Command::SetTunnel(spec) => {
                let moves = &mut *self.moves.lock().await;
                self.set_tunnel(moves, *spec).await.map(|()| None)
            }
            Command::RemoveTunnel(id) => {
                let moves = &mut *self.moves.lock().await;
                self.give_up_move(moves, id).await;
                self.give(self.kernel_of(id).await, Command::RemoveTunnel(id))
                    .await
            }
            Command::Install(spec) => {
                let moves = &mut *self.moves.lock().await;
                let home = moves.home_of_new(spec.tunnel);
                let (id, tunnel, expires) = (spec.id, spec.tunnel, spec.lifetime.expires);
                self.put_in(home, (id, tunnel, expires), Command::Install(spec))
                    .await
            }
            Command::Resume(spec, before) => {
                let moves = &mut *self.moves.lock().await;
                let home = match moves.home_of_new(spec.tunnel) {
                    Some(home) if self.has_sa(home.other(), spec.id).await => Some(home.other()),
                    home => home,
                };
                let (id, tunnel, expires) = (spec.id, spec.tunnel, spec.lifetime.expires);
                self.put_in(home, (id, tunnel, expires), Command::Resume(spec, before))
                    .await
            }
            Command::SetCarrier(id, on) => {
                let moves = &mut *self.moves.lock().await;
                if moves.has(id) {
                    self.xdp.command(Command::SetCarrier(id, on)).await?;
                }
                self.give(self.kernel_of(id).await, Command::SetCarrier(id, on))
                    .await
            }
            Command::Remove(id) => {
                let moves = &mut *self.moves.lock().await;
                self.remove(moves, id).await
            }
            Command::MoveOuter(id, outer) => {
                let _moves = self.moves.lock().await;
                self.give(self.kernel_with(id).await, Command::MoveOuter(id, outer))
                    .await
            }
        }
    }

    async fn remove(&self, moves: &mut Moves, id: SaId) -> Result<Option<Ledger>, Rejected> {
        self.deadlines().remove(&id);
        if self.is_held(moves, id).await {
            self.advance_all(moves).await;
            return Ok(None);
        }
        let removed = self
            .give(self.kernel_with(id).await, Command::Remove(id))
            .await;
        self.advance_all(moves).await;
        removed
    }

    /// Gives an SA to an engine, else to the one that has its tunnel, and notes its end.
    async fn put_in(
        &self,
        home: Option<Home>,
        (id, tunnel, expires): (SaId, TunnelId, Option<u64>),
        command: Command,
    ) -> Result<Option<Ledger>, Rejected> {
        let kernel = match home {
            Some(Home::Kernel(_)) => self.kernel.get(),
            Some(Home::Xdp) => None,
            None => self.kernel_of(tunnel).await,
        };
        let ledger = self.give(kernel, command).await?;
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

    /// Gives a tunnel to the engine that is to carry it. One that another carries moves there, as long as it is up without a gap.
    async fn set_tunnel(&self, moves: &mut Moves, spec: TunnelSpec) -> Result<(), Rejected> {
        let home = self.home_for(&spec).await?;
        if moves.has(spec.id) {
            return self.keep_up(moves, spec, home).await;
        }
        match self.home_of(spec.id).await {
            Some(before) if before.is_other(home) => self.begin_move(moves, spec, home).await,
            Some(_) | None => self.put(home, spec, Place::InUse).await,
        }
    }

    /// Where a tunnel is to be.
    async fn home_for(&self, spec: &TunnelSpec) -> Result<Home, Rejected> {
        let reason = match spec.engine {
            EngineChoice::Xdp => None,
            EngineChoice::Kernel => Some(KernelReason::Configured),
            EngineChoice::Auto => {
                let wants = !self.xdp.has_fast_path() && spec.df != Df::Set;
                wants.then_some(KernelReason::NoFastPath)
            }
        };
        let home = match reason {
            None => Home::Xdp,
            Some(reason) => match self.start_kernel().await {
                // Nobody has asked for policies alone, which need routes of the host's own.
                Ok(kernel)
                    if reason == KernelReason::NoFastPath && kernel.is_without_device(spec) =>
                {
                    tracing::info!(
                        tunnel = spec.name,
                        "the kernel has no xfrm interfaces: the slow path carries the tunnel"
                    );
                    Home::Xdp
                }
                Ok(_) => Home::Kernel(reason),
                Err(error) if reason == KernelReason::Configured => {
                    return Err(Rejected::Kernel {
                        step: "engine = \"kernel\"".to_owned(),
                        reason: error.to_string(),
                    });
                }
                Err(error) => {
                    tracing::info!(%error, tunnel = spec.name, "no kernel engine: the slow path carries the tunnel");
                    Home::Xdp
                }
            },
        };
        let only_kernel = [
            (spec.mode == Mode::Transport, "mode = \"transport\""),
            (spec.policy_based, "policy_based = true"),
        ];
        if home == Home::Xdp
            && let Some((_, step)) = only_kernel.iter().find(|(wanted, _)| *wanted)
        {
            return Err(Rejected::by_kernel(
                step,
                &"only engine = \"kernel\" carries it",
            ));
        }
        Ok(home)
    }

    /// Where a tunnel is, if it is anywhere.
    async fn home_of(&self, id: TunnelId) -> Option<Home> {
        if self.kernel_of(id).await.is_some() {
            return Some(Home::Kernel(KernelReason::Configured));
        }
        self.xdp.has_tunnel(id).await.then_some(Home::Xdp)
    }

    /// Gives a tunnel to an engine.
    async fn put(&self, home: Home, spec: TunnelSpec, place: Place) -> Result<(), Rejected> {
        match (home, place) {
            (Home::Kernel(reason), place) => {
                let kernel = self.kernel.get().ok_or(Rejected::UnknownTunnel)?;
                kernel.set_tunnel(spec, reason, place).await
            }
            (Home::Xdp, Place::Aside) => self.xdp.set_tunnel_aside(spec).await,
            (Home::Xdp, Place::InUse) => {
                // What an engine of a former life has left.
                kernel::engine::remove_device(&self.netlink, &spec.device).await?;
                let set = Command::SetTunnel(Box::new(spec));
                self.xdp.command(set).await.map(|_| ())
            }
        }
    }

    /// No tunnel is the kernel's, but one of a former life may have been: what is left of its policies must not be in the way.
    async fn remove_what_the_kernel_has(&self) {
        if let Err(error) = kernel::engine::release(&self.netlink).await {
            tracing::warn!(%error, "what a former life has left in the kernel stays");
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
        let mut survey = self.xdp.survey().await;
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
