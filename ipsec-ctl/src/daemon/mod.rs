//! Wiring: the IKE endpoint, the data plane, the control socket, timers and signals, in one task.
//!
//! One loop owns everything. Each turn takes one input, then drains the endpoint completely: events first, for an SA must
//! be installed before the peer can use it, then datagrams and jobs.
#![forbid(unsafe_code)]

mod convert;
mod events;
mod gateway;
mod guard;
mod jobs;
mod journal;
mod log;
mod paths;
mod peers;
mod reload;
mod report;
mod restore;
mod revive;
mod supervise;
mod tunnels;

use std::path::{Path, PathBuf};

use tokio::sync::mpsc;

pub use gateway::StartError;
pub use guard::{guard, release};
pub use supervise::{DataPlaneError, PlaneError, data_plane};

use crate::config::Config;

/// Where the state of the daemon is kept for the next one.
fn journal(config: &Config) -> PathBuf {
    config.control_socket.with_extension("journal")
}

/// Where the values of sysctls are kept that the daemon has changed.
fn originals(config: &Config) -> PathBuf {
    config.control_socket.with_extension("sysctls")
}

/// Runs the gateway until it is told to stop by SIGTERM or SIGINT.
///
/// # Errors
///
/// [`StartError`], with nothing left running.
pub fn run(path: &Path, config: Config, filter: &str, one_process: bool) -> Result<(), StartError> {
    let log = log::start(filter).map_err(StartError::Log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(StartError::Runtime)?;
    let result = runtime.block_on(async {
        tokio::spawn(log.tell_losses());
        let (requests, inbox) = mpsc::channel(64);
        let listener = crate::api::server::open(&config.control_socket)?;
        let supervisor = supervise::Supervisor::new(&config, filter, one_process);
        let gateway = gateway::Gateway::start(path, config, supervisor).await?;
        tokio::spawn(crate::api::server::serve(listener, requests));
        gateway.run(inbox).await;
        Ok(())
    });
    // A thread that waits for a dead name server must not hold the process.
    runtime.shutdown_background();
    result
}
