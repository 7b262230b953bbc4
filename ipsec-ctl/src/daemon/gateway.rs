//! The daemon's state and its loop.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::time::{ClockId, clock_gettime};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep, sleep_until},
};
use tracing::{error, info, warn};

use super::{
    convert,
    jobs::Pool,
    journal::{Journal, Owner},
    paths::Paths,
    peers::{Found, Lookups},
    reload::{Asker, Read, Reader},
    restore::{Left, Sorted},
    supervise::{PlaneError, Supervisor},
    tunnels::{Names, Tunnels},
};
use crate::{
    api::{Request, server::ServerError},
    config::{Config, Role, SysctlSetting},
    dataplane::{
        plane::Plane,
        seam::{self, IkeDatagram, TunnelId},
    },
    ike::{
        Endpoint,
        config::{EndpointConfig, PeerId},
        event::{ChildSaId, Command},
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
    pub(super) journal: Journal,
    /// While it does what the daemon before this one had begun: the pairs that it cannot do it for.
    pub(super) in_doubt: Option<BTreeSet<ChildSaId>>,
    found: mpsc::UnboundedReceiver<Found>,
    pub(super) reader: Reader,
    read: mpsc::UnboundedReceiver<Read>,
    pool: Pool<Job>,
    results: mpsc::UnboundedReceiver<JobResult>,
    pub(super) events: mpsc::Receiver<seam::Event>,
    pub(super) supervisor: Supervisor,
}

impl Gateway {
    /// Finds or starts the data plane and sets the tunnels up, with the SAs that they had under the daemon before this one if
    /// its journal tells. Nothing is negotiated before [`Self::run`].
    pub(super) async fn start(
        path: &Path,
        config: Config,
        supervisor: Supervisor,
    ) -> Result<Self, StartError> {
        let netlink = Netlink::open().map_err(StartError::Runtime)?;
        let ports = (config.ports.ike, config.ports.nat_traversal);
        let owner = Owner::here(ports).map_err(StartError::Runtime)?;
        let journal = Journal::at(super::journal(&config), owner);
        let limits = endpoint_config(&config);
        let left = Left::read(&journal, &limits, since_boot());
        // Without a journal nobody knows what the SAs of a data plane that runs are.
        let (engine, events) = supervisor.attach(left.is_none()).await?;
        let (endpoint, names, sorted) = match left {
            Some(left) => left.sort(&config.tunnels),
            None => {
                let random = Box::new(SystemRandom::new());
                let endpoint = Endpoint::new(limits, random);
                (endpoint, Names::default(), Sorted::nothing())
            }
        };
        let (pool, results) = Pool::start(Job::run, Job::is_slow).map_err(StartError::Runtime)?;
        let (reader, read) = Reader::new();
        let (lookups, found) = Lookups::new(netlink.clone(), config.mark);
        let paths = Paths::start(netlink, config.mark).map_err(StartError::Runtime)?;
        let mut gateway = Self {
            path: path.to_owned(),
            engine,
            endpoint,
            tunnels: Tunnels::named_after(names),
            journal,
            in_doubt: None,
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
        gateway.come_back(sorted).await?;
        Ok(gateway)
    }

    /// Time as the endpoint counts it.
    pub(super) fn now(&self) -> Time {
        since_boot()
    }

    /// The loop.
    pub(super) async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let (Ok(mut terminate), Ok(mut interrupt), Ok(mut hangup), Ok(mut leave)) = (
            signal(SignalKind::terminate()),
            signal(SignalKind::interrupt()),
            signal(SignalKind::hangup()),
            signal(SignalKind::user_defined1()),
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
                _ = leave.recv() => return self.leave().await,
            }
        }
        self.stop().await;
    }

    fn next_timeout(&self) -> Instant {
        let idle = Duration::from_secs(86_400);
        let until = self.endpoint.poll_timeout().map(|at| at - self.now());
        Instant::now() + until.unwrap_or(idle).min(idle)
    }

    /// Does everything that the endpoint wants done. What a peer or the data plane gets to see is written down before, so
    /// that whatever dies in between, nothing is used twice.
    pub(super) async fn drain(&mut self) {
        while self.endpoint.has_output() {
            self.save();
            let mut installs = false;
            while let Some(event) = self.endpoint.poll_event() {
                installs = true;
                self.ike_event(event).await;
            }
            if installs {
                self.save();
            }
            while let Some(transmit) = self.endpoint.poll_transmit() {
                let datagram = IkeDatagram {
                    local: transmit.local,
                    remote: transmit.remote,
                    bytes: transmit.bytes,
                };
                self.engine.send_ike(datagram).await;
            }
            while let Some(job) = self.endpoint.poll_job() {
                if !self.pool.submit(job) {
                    warn!("too many key exchanges at once; one was given up");
                }
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
                    .is_some_and(|pair| pair.ours.id == stats.sa);
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
        let id = self.tunnels.add(config);
        self.set_up(id).await
    }

    /// Sets a tunnel up in the data plane and tells the endpoint of it.
    pub(super) async fn set_up(&mut self, id: TunnelId) -> Result<(), seam::Rejected> {
        let Some(tunnel) = self.tunnels.get(id) else {
            return Ok(());
        };
        let starts = tunnel.raised || tunnel.config.role == Role::Initiate;
        let down = tunnel.down;
        let spec = convert::tunnel_spec(id, &tunnel.config, &tunnel.places, &tunnel.elsewhere);
        let peer = convert::peer_config(id, &tunnel.config, &tunnel.places);
        let set = || seam::Command::SetTunnel(Box::new(spec.clone()));
        let mut result = self.engine.command(set()).await;
        if matches!(result, Err(seam::Rejected::Immovable)) {
            // The data plane had it before this daemon, with an engine that it cannot leave while it is up: its SAs go there, and
            // are not among those that can go on.
            self.tell(seam::Command::RemoveTunnel(id)).await;
            result = self.engine.command(set()).await;
        }
        if let Err(rejected) = result {
            self.tunnels.remove(id);
            return Err(rejected);
        }
        self.set_carrier(id).await;
        let now = self.now();
        self.endpoint
            .handle_command(now, Command::SetPeer(Box::new(peer)));
        if down {
            self.endpoint
                .handle_command(now, Command::Down(PeerId(id.0)));
        } else if starts {
            self.bring_up(id);
        } else {
            self.look_up(id);
        }
        Ok(())
    }

    /// Ends without a word, for a daemon that comes after this one: packets go on, and so do the tunnels as soon as it is there.
    async fn leave(mut self) {
        info!("the gateway leaves its tunnels to the daemon that comes after it");
        self.drain().await;
        self.engine.detach().await;
        let _ = std::fs::remove_file(&self.config.control_socket);
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
        self.journal.discard();
        // While we are attached: a daemon that only goes away leaves packets to go on.
        if let Err(cause) = self.supervisor.end().await {
            warn!(%cause, "the data plane does not end");
        }
        self.engine.detach().await;
        let _ = std::fs::remove_file(&self.config.control_socket);
    }
}

fn endpoint_config(config: &Config) -> EndpointConfig {
    EndpointConfig {
        ike_port: config.ports.ike,
        nat_port: config.ports.nat_traversal,
        cookie_threshold: config.limits.cookie_threshold,
        half_open: config.limits.half_open,
        half_open_per_source: config.limits.half_open_per_source,
    }
}

/// Time as the endpoint counts it: since the machine was booted, so that the next daemon counts on.
fn since_boot() -> Time {
    // The clock is there on every Linux that this runs on.
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from);
    Time(now.unwrap_or_default())
}
