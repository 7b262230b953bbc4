//! The daemon's state and its loop.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep, sleep_until},
};
use tracing::{error, info, warn};

use super::{
    convert,
    jobs::Pool,
    paths::Paths,
    peers::{Found, Lookups},
    reload::{Asker, Read, Reader},
    supervise::{PlaneError, Supervisor},
    tunnels::Tunnels,
};
use crate::{
    api::{Request, server::ServerError},
    config::{Config, Role, SysctlSetting},
    dataplane::{
        plane::Plane,
        seam::{self, IkeDatagram},
    },
    ike::{
        Endpoint,
        config::EndpointConfig,
        event::Command,
        job::{Job, JobResult},
        rng::SystemRandom,
        time::Time,
    },
    net::{netlink::Netlink, preflight},
};

/// How often the daemon looks at counters, and at tunnels whose peers had no route.
const TICK: Duration = Duration::from_secs(1);
/// How long a daemon that stops waits for its peers to confirm.
const FAREWELL: Duration = Duration::from_millis(800);

/// Why the gateway does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The log filter cannot be parsed.
    #[error("the log cannot be started: {0}")]
    Log(String),
    /// No threads.
    #[error("the runtime cannot be started: {0}")]
    Runtime(io::Error),
    /// The control socket cannot be opened.
    #[error(transparent)]
    Control(#[from] ServerError),
    /// The data plane cannot be started.
    #[error("the data plane cannot be started: {0}")]
    Engine(#[from] PlaneError),
    /// A tunnel cannot be set up.
    #[error("tunnel {name} cannot be set up: {cause}")]
    Tunnel {
        /// Its name.
        name: String,
        /// Why.
        cause: seam::Rejected,
    },
}

/// Everything that the daemon has.
pub(super) struct Gateway {
    pub(super) path: PathBuf,
    pub(super) config: Config,
    pub(super) engine: Plane,
    pub(super) endpoint: Endpoint,
    pub(super) tunnels: Tunnels,
    pub(super) started: Instant,
    pub(super) failures: super::events::LogLimit,
    pub(super) lookups: Lookups,
    pub(super) paths: Paths,
    found: mpsc::UnboundedReceiver<Found>,
    pub(super) reader: Reader,
    read: mpsc::UnboundedReceiver<Read>,
    pool: Pool<Job>,
    results: mpsc::UnboundedReceiver<JobResult>,
    pub(super) events: mpsc::Receiver<seam::Event>,
    pub(super) supervisor: Supervisor,
}

impl Gateway {
    /// Starts the data plane and sets the tunnels up. Nothing is negotiated before [`Self::run`].
    pub(super) async fn start(
        path: &Path,
        config: Config,
        supervisor: Supervisor,
    ) -> Result<Self, StartError> {
        let netlink = Netlink::open().map_err(StartError::Runtime)?;
        let (engine, events) = supervisor.attach(true).await?;
        let (pool, results) = Pool::start(Job::run, Job::is_slow).map_err(StartError::Runtime)?;
        let (reader, read) = Reader::new();
        let (lookups, found) = Lookups::new(netlink.clone(), config.mark);
        let paths = Paths::start(netlink, config.mark).map_err(StartError::Runtime)?;
        let endpoint = Endpoint::new(
            EndpointConfig {
                ike_port: config.ports.ike,
                nat_port: config.ports.nat_traversal,
                cookie_threshold: config.limits.cookie_threshold,
                half_open: config.limits.half_open,
                half_open_per_source: config.limits.half_open_per_source,
            },
            Box::new(SystemRandom::new()),
        );
        let mut gateway = Self {
            path: path.to_owned(),
            engine,
            endpoint,
            tunnels: Tunnels::default(),
            started: Instant::now(),
            failures: super::events::LogLimit::default(),
            lookups,
            paths,
            found,
            reader,
            read,
            pool,
            results,
            events,
            supervisor,
            config,
        };
        for tunnel in gateway.config.tunnels.clone() {
            let name = tunnel.name.clone();
            gateway
                .add_tunnel(tunnel)
                .await
                .map_err(|cause| StartError::Tunnel { name, cause })?;
        }
        let _ = gateway.engine.command(seam::Command::Configured).await;
        Ok(gateway)
    }

    /// Time as the endpoint counts it.
    pub(super) fn now(&self) -> Time {
        Time(self.started.elapsed())
    }

    /// The loop.
    pub(super) async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let (Ok(mut terminate), Ok(mut interrupt), Ok(mut hangup)) = (
            signal(SignalKind::terminate()),
            signal(SignalKind::interrupt()),
            signal(SignalKind::hangup()),
        ) else {
            return error!("signals cannot be caught");
        };
        if self.config.sysctl == SysctlSetting::Manage {
            match preflight::manage(&super::originals(&self.config), true) {
                Ok(changed) => changed.iter().for_each(|line| info!("sysctl {line}")),
                Err(cause) => warn!(%cause, "sysctls cannot be set"),
            }
        }
        for finding in preflight::findings(false) {
            if let Some(remedy) = finding.remedy {
                warn!("{} is {}; {remedy}", finding.what, finding.found);
            }
        }
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        info!(
            tunnels = self.config.tunnels.len(),
            instance = self.config.instance,
            "the gateway runs"
        );
        loop {
            self.drain().await;
            let due = self.next_timeout();
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(event) => self.engine_event(event).await,
                    None => self.revive().await,
                },
                Some(result) = self.results.recv() => {
                    let now = self.now();
                    self.endpoint.handle_job(now, result);
                }
                Some(found) = self.found.recv() => self.found(found).await,
                step = self.paths.next() => self.path_step(step),
                Some(read) = self.read.recv() => self.reloaded(read).await,
                Some(request) = requests.recv() => self.request(request).await,
                () = sleep_until(due.into()) => {
                    let now = self.now();
                    self.endpoint.handle_timeout(now);
                }
                _ = tick.tick() => self.tick().await,
                _ = hangup.recv() => self.reload(Asker::Signal),
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
            }
        }
        self.stop().await;
    }

    fn next_timeout(&self) -> Instant {
        let idle = self.started + Duration::from_secs(365 * 86_400);
        self.endpoint
            .poll_timeout()
            .and_then(|time| self.started.checked_add(time.0))
            .unwrap_or(idle)
    }

    /// Does everything that the endpoint wants done.
    pub(super) async fn drain(&mut self) {
        loop {
            if let Some(event) = self.endpoint.poll_event() {
                self.ike_event(event).await;
            } else if let Some(transmit) = self.endpoint.poll_transmit() {
                let datagram = IkeDatagram {
                    local: transmit.local,
                    remote: transmit.remote,
                    bytes: transmit.bytes,
                };
                self.engine.send_ike(datagram).await;
            } else if let Some(job) = self.endpoint.poll_job() {
                if !self.pool.submit(job) {
                    warn!("too many key exchanges at once; one was given up");
                }
            } else {
                return;
            }
        }
    }

    async fn tick(&mut self) {
        self.hint_traffic().await;
        self.look_up_what_is_old();
    }

    /// Tells the endpoint what the SAs have carried, which is how it knows that a peer lives.
    async fn hint_traffic(&mut self) {
        let now = self.now();
        let mut moved = std::collections::BTreeMap::new();
        for stats in self.engine.sa_stats().await {
            let packets = stats.fast.packets.saturating_add(stats.slow.packets);
            if let Some((tunnel, sa)) = self.tunnels.owner(stats.sa) {
                let inbound = self
                    .tunnels
                    .get(tunnel)
                    .and_then(|tunnel| tunnel.pairs.get(&sa))
                    .is_some_and(|pair| pair.inbound == stats.sa);
                let entry: &mut (u64, u64) = moved.entry(sa).or_default();
                if inbound {
                    entry.0 = packets;
                } else {
                    entry.1 = packets;
                }
            }
        }
        for (sa, (inbound, outbound)) in moved {
            self.endpoint.handle_command(
                now,
                Command::Traffic {
                    sa,
                    inbound,
                    outbound,
                },
            );
        }
    }

    /// Adds a tunnel to the data plane and to the endpoint, and starts it if it is ours to start.
    pub(super) async fn add_tunnel(
        &mut self,
        config: crate::config::Tunnel,
    ) -> Result<(), seam::Rejected> {
        let starts = config.role == Role::Initiate;
        let on_demand = config.role == Role::OnDemand;
        let id = self.tunnels.add(config.clone());
        let spec = convert::tunnel_spec(id, &config, &[], &BTreeSet::new());
        if let Err(rejected) = self
            .engine
            .command(seam::Command::SetTunnel(Box::new(spec)))
            .await
        {
            self.tunnels.remove(id);
            return Err(rejected);
        }
        let _ = self
            .engine
            .command(seam::Command::SetCarrier(id, on_demand))
            .await;
        let now = self.now();
        self.endpoint.handle_command(
            now,
            Command::SetPeer(Box::new(convert::peer_config(id, &config, &[]))),
        );
        if starts {
            self.bring_up(id);
        } else {
            self.look_up(id);
        }
        Ok(())
    }

    /// Says farewell to the peers. Devices, routes and backstops stay: what is protected stays closed.
    async fn stop(mut self) {
        info!(
            "the gateway stops; what it protects stays blocked until it runs again or `ipsec-ctl release`"
        );
        let now = self.now();
        self.endpoint.handle_command(now, Command::Shutdown);
        self.drain().await;
        let end = sleep(FAREWELL);
        tokio::pin!(end);
        while !self.endpoint.is_empty() {
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(event) => self.engine_event(event).await,
                    None => break,
                },
                () = &mut end => break,
            }
            self.drain().await;
        }
        self.engine.detach().await;
        if let Err(cause) = self.supervisor.end().await {
            warn!(%cause, "the data plane does not end");
        }
        let _ = std::fs::remove_file(&self.config.control_socket);
    }
}
