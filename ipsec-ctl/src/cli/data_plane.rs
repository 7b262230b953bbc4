//! `ipsec-ctl data-plane`: the process that carries packets, started by `ipsec-ctl run`.

use std::path::PathBuf;

use miette::miette;

use super::run::limit;
use crate::{daemon, net::privileges::Role};

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Socket that the daemon finds it by.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// What is logged, in the syntax of RUST_LOG.
    #[arg(long, value_name = "FILTER", env = "RUST_LOG", default_value = "info")]
    log: String,
}

pub(super) fn run(options: &Options) -> miette::Result<()> {
    limit(Role::DataPlane)?;
    daemon::data_plane(&options.socket, &options.log).map_err(|error| {
        miette!(
            help = "`ipsec-ctl run` starts it by itself; there is one for each gateway",
            "{error}"
        )
    })
}
