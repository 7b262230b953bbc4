//! `ipsec-ctl run`, and what holds without it: `guard` and `release`.

use std::path::{Path, PathBuf};

use miette::{IntoDiagnostic, WrapErr, miette};

use super::print;
use crate::{
    config,
    daemon::{self, StartError},
    net::{
        bpf_fs,
        privileges::{self, Role},
    },
};

/// Where the configuration is.
#[derive(Debug, clap::Args)]
pub(super) struct File {
    /// The configuration file.
    #[arg(
        short = 'c',
        long = "config",
        value_name = "FILE",
        default_value = "/etc/ipsec-xdp/gateway.toml"
    )]
    file: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    #[command(flatten)]
    config: File,
    /// What is logged, in the syntax of RUST_LOG: `info`, `debug`, `ipsec_ctl::ike=trace`.
    #[arg(long, value_name = "FILTER", env = "RUST_LOG", default_value = "info")]
    log: String,
    /// Carry packets in this very process, so that they stop when it does.
    #[arg(long)]
    one_process: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct GuardOptions {
    #[command(flatten)]
    config: File,
}

pub(super) fn run(options: &Options) -> miette::Result<()> {
    let path = &options.config.file;
    // Before the configuration is read: what a later reload may not read must not be taken now.
    if nix::unistd::geteuid().is_root() {
        // The data plane may not any more, and tells what became of it when it needs the file system.
        let _ = bpf_fs::ensure_mounted();
        limit(if options.one_process {
            Role::Both
        } else {
            Role::Daemon
        })?;
    }
    let config = config::load(path)?;
    need_root(OWNS)?;
    daemon::run(path, config, &options.log, options.one_process).map_err(diagnosed)
}

pub(super) fn guard(options: &GuardOptions) -> miette::Result<()> {
    let config = config::load(&options.config.file)?;
    need_root(OWNS)?;
    refuse_beside_a_daemon(&config.control_socket)?;
    let lines = daemon::guard(&config)
        .into_diagnostic()
        .wrap_err("the backstops cannot be installed")?;
    print(&lines)
}

pub(super) fn release(options: &GuardOptions) -> miette::Result<()> {
    let config = config::load(&options.config.file)?;
    need_root(OWNS)?;
    refuse_beside_a_daemon(&config.control_socket)?;
    let lines = daemon::release(&config)
        .into_diagnostic()
        .wrap_err("not everything could be removed")?;
    print(&lines)
}

/// Keeps only the privileges of a role. To be called before any thread is started.
pub(super) fn limit(role: Role) -> miette::Result<()> {
    privileges::limit(role).map_err(|error| {
        miette!(
            help = "see what the container or service manager that started this has forbidden",
            "privileges cannot be given up: {error}"
        )
    })
}

/// Fails, unless root; `what` says what root is needed for.
pub(super) fn need_root(what: &str) -> miette::Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(miette!(
        help = "become root, for instance with sudo",
        "{what} needs root"
    ))
}

/// What a gateway needs root for.
const OWNS: &str = "making TUN devices, raw sockets and routes";

fn refuse_beside_a_daemon(socket: &Path) -> miette::Result<()> {
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        return Err(miette!(
            help = "stop the daemon first; while it runs it sees to all this itself",
            "a daemon answers on {}",
            socket.display()
        ));
    }
    Ok(())
}

fn diagnosed(error: StartError) -> miette::Report {
    let help = match &error {
        StartError::Log(_) => "write for instance --log info or --log ipsec_ctl::ike=debug",
        StartError::Runtime(_) => "see `ulimit -u` and `ulimit -n`",
        StartError::Control(_) => {
            "stop the other daemon, or give this one an `instance` or a `control_socket` of its own"
        }
        StartError::Engine(_) => {
            "stop whatever uses UDP 500 and 4500, such as strongSwan or libreswan; /dev/net/tun must be there"
        }
        StartError::Tunnel { .. } => {
            "another process may have the device; give the tunnel another `device`, or end that process"
        }
    };
    miette!(help = help, "{error}")
}
