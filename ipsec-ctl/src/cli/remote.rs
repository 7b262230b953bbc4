//! What the commands that ask a running daemon have in common: where it listens, and what to say when it does not.

use std::path::PathBuf;

use miette::{IntoDiagnostic, WrapErr, miette};

use crate::api::client::{Client, ClientError};

/// Where the daemon listens.
#[derive(Debug, clap::Args)]
pub(super) struct Remote {
    /// Control socket of the daemon, as `control_socket` in its configuration.
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/run/ipsec-xdp/default.sock"
    )]
    socket: PathBuf,
}

impl Remote {
    /// Runs one exchange with the daemon.
    pub(super) fn ask<T>(
        &self,
        exchange: impl AsyncFnOnce(Client) -> Result<T, ClientError>,
    ) -> miette::Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .into_diagnostic()
            .wrap_err("the client cannot start")?;
        runtime
            .block_on(exchange(Client::new(&self.socket)))
            .map_err(diagnosed)
    }
}

fn diagnosed(error: ClientError) -> miette::Report {
    let help = match &error {
        ClientError::Connect { cause, .. }
            if cause.kind() == std::io::ErrorKind::PermissionDenied =>
        {
            "the socket belongs to the daemon's user: become root".to_owned()
        }
        ClientError::Connect { .. } => {
            "start it with `ipsec-ctl run -c FILE`, or name its socket with --socket".to_owned()
        }
        ClientError::Refused(refused) => refused.remedy.clone(),
        ClientError::Status(_) | ClientError::Broken(_) => {
            "look into the daemon's log; client and daemon should be of one version".to_owned()
        }
        ClientError::Timeout => "look into the daemon's log, then try again".to_owned(),
    };
    miette!(help = help, "{error}")
}
