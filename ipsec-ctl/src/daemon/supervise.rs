//! The data plane's process as the daemon sees to it: found, started, replaced, ended.
//!
//! It is no child that dies with the daemon: it has a session of its own, and a daemon that starts anew finds it by its
//! socket. Whoever is of another version or has other settings is replaced.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use tokio::{process::Command, sync::mpsc, time::sleep};
use tracing::{info, warn};

use crate::{
    config::Config,
    dataplane::{
        link::{self, ConnectError, ServeError},
        plane::Plane,
        seam::{EngineConfig, Event},
        xdp::engine,
    },
};

/// Time that a data plane has to open its socket.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no data plane.
#[derive(Debug, thiserror::Error)]
pub enum PlaneError {
    /// Engines of this process do not start.
    #[error(transparent)]
    Engine(#[from] engine::StartError),
    /// There is no connection to it.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Its process cannot be started.
    #[error("its process cannot be started: {0}")]
    Spawn(io::Error),
    /// The one before it does not end.
    #[error("the one before it does not end: {0}")]
    End(io::Error),
}

/// What tells the running file from one that an upgrade has put in its place.
fn program() -> String {
    std::fs::metadata("/proc/self/exe").map_or_else(
        |_| String::new(),
        |file| {
            let (seconds, nanoseconds) = (file.mtime(), file.mtime_nsec());
            format!(
                "{}:{}:{}:{seconds}.{nanoseconds}",
                file.dev(),
                file.ino(),
                file.len()
            )
        },
    )
}

/// Starts and finds data planes of one instance.
#[derive(Debug)]
pub(super) struct Supervisor {
    socket: PathBuf,
    engine: EngineConfig,
    log: String,
    inside: bool,
}

/// The socket of an instance's data plane.
pub(super) fn socket(config: &Config) -> PathBuf {
    config.control_socket.with_extension("data-plane")
}

impl Supervisor {
    /// For an instance. With `inside` the engines run in this process.
    pub(super) fn new(config: &Config, log: &str, inside: bool) -> Self {
        Self {
            socket: socket(config),
            engine: EngineConfig {
                program: program(),
                instance: config.instance.clone(),
                mark: config.mark,
                ike_port: config.ports.ike,
                nat_port: config.ports.nat_traversal,
                interfaces: config.interfaces.clone(),
                workers: config.workers,
                busy_poll: config.busy_poll,
            },
            log: log.to_owned(),
            inside,
        }
    }

    /// Attaches to the data plane, and starts one if there is none that fits. With `fresh` one that runs is not kept.
    ///
    /// # Errors
    ///
    /// [`PlaneError`].
    pub(super) async fn attach(
        &self,
        fresh: bool,
    ) -> Result<(Plane, mpsc::Receiver<Event>), PlaneError> {
        if fresh || self.inside {
            self.end().await?;
        }
        if self.inside {
            return Ok(Plane::start(self.engine.clone()).await?);
        }
        let begun = Instant::now();
        let mut spawned = false;
        loop {
            match Plane::attach(&self.socket, &self.engine).await {
                Ok(found) => return Ok(found),
                Err(ConnectError::Nobody) if begun.elapsed() < PATIENCE => {
                    if !spawned {
                        self.spawn()?;
                        spawned = true;
                    }
                    sleep(Duration::from_millis(5)).await;
                }
                Err(ConnectError::Different(process)) if begun.elapsed() < PATIENCE => {
                    info!(
                        process,
                        "the data plane is replaced, for it is of another version or has other settings"
                    );
                    self.end().await?;
                }
                Err(error @ ConnectError::Failed { .. }) => {
                    // It has nothing to do and would wait for somebody else.
                    self.end().await?;
                    return Err(error.into());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Ends the data plane, if one runs.
    pub(super) async fn end(&self) -> Result<bool, PlaneError> {
        link::end(&self.socket).await.map_err(PlaneError::End)
    }

    fn spawn(&self) -> Result<(), PlaneError> {
        // The running program, which an upgrade may have replaced in its folder meanwhile.
        Command::new("/proc/self/exe")
            .arg0("ipsec-ctl")
            .arg("data-plane")
            .arg("--socket")
            .arg(&self.socket)
            .arg("--log")
            .arg(&self.log)
            .stdin(Stdio::null())
            .spawn()
            .map(drop)
            .map_err(PlaneError::Spawn)
    }
}

/// Why a data plane's process ends at once.
#[derive(Debug, thiserror::Error)]
pub enum DataPlaneError {
    /// The log filter cannot be parsed.
    #[error("the log cannot be started: {0}")]
    Log(String),
    /// No threads.
    #[error("the runtime cannot be started: {0}")]
    Runtime(io::Error),
    /// Its socket cannot be opened.
    #[error(transparent)]
    Socket(#[from] crate::api::server::ServerError),
    /// It cannot serve.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

/// Runs the data plane's process until it is told to end.
///
/// # Errors
///
/// [`DataPlaneError`].
pub fn data_plane(socket: &Path, filter: &str) -> Result<(), DataPlaneError> {
    // What ends the daemon's session, a terminal that closes for instance, does not end this one. A leader is one already.
    let _ = nix::unistd::setsid();
    let log = super::log::start(filter).map_err(DataPlaneError::Log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(DataPlaneError::Runtime)?;
    runtime.block_on(async {
        tokio::spawn(log.tell_losses());
        let listener = crate::api::server::open(socket)?;
        let served = link::serve(listener).await;
        if let Err(error) = std::fs::remove_file(socket) {
            warn!(%error, "the data plane's socket stays");
        }
        Ok(served?)
    })
}
