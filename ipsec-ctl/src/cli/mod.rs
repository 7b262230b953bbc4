//! Commands and their rendering: data to stdout, words to stderr.
#![forbid(unsafe_code)]

mod check;
mod counters;
mod data_plane;
mod probe;
mod remote;
mod run;
mod status;
mod summary;
mod table;
mod tunnel;

use std::io::{self, Write};

use clap::{Parser, Subcommand};
use miette::{Context, IntoDiagnostic};

/// IPsec gateway for Linux.
#[derive(Debug, Parser)]
#[command(name = "ipsec-ctl", version, about)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the gateway in the foreground until SIGTERM; SIGHUP reads the configuration again.
    Run(run::Options),
    /// Carry packets for a daemon, and go on while there is none; `run` starts this process by itself.
    #[command(hide = true)]
    DataPlane(data_plane::Options),
    /// Block what the configuration protects, without a daemon; for a unit before the network comes up.
    Guard(run::GuardOptions),
    /// Remove what a daemon or `guard` has left: devices, routes, rules, the plaintext guard. Nothing is protected afterwards.
    Release(run::GuardOptions),
    /// Validate a configuration file and the key files it names; nothing is changed.
    Check(check::Options),
    /// Find out what this machine has for carrying tunnels fast, and what each missing thing costs; needs root, leaves nothing behind but a mounted BPF file system.
    Probe(probe::Options),
    /// Show tunnels, their traffic, and what carries it.
    Status(status::Options),
    /// Show how many packets were dropped or slowed, by reason.
    Counters(counters::Options),
    /// Bring a tunnel up.
    Up(tunnel::Options),
    /// Take a tunnel down until it is brought up again; what it protects stays blocked.
    Down(tunnel::Options),
    /// Rekey a tunnel's children, or its IKE SA, before their time, with all peers that it is up with; no packet is lost.
    Rekey(tunnel::RekeyOptions),
    /// Move a tunnel to another engine while it is up; no packet is lost.
    Move(tunnel::MoveOptions),
    /// Have the daemon read its configuration again; only what changed is touched.
    Reload(tunnel::ReloadOptions),
}

/// Runs the command that was given.
///
/// # Errors
///
/// A diagnostic for the user; the exit status is then not zero.
pub fn run(cli: Cli) -> miette::Result<()> {
    match cli.command {
        Command::Run(options) => run::run(&options),
        Command::DataPlane(options) => data_plane::run(&options),
        Command::Guard(options) => run::guard(&options),
        Command::Release(options) => run::release(&options),
        Command::Check(options) => check::run(&options),
        Command::Probe(options) => probe::run(&options),
        Command::Status(options) => status::run(&options),
        Command::Counters(options) => counters::run(&options),
        Command::Up(options) => tunnel::up(&options),
        Command::Down(options) => tunnel::down(&options),
        Command::Rekey(options) => tunnel::rekey(&options),
        Command::Move(options) => tunnel::move_to(&options),
        Command::Reload(options) => tunnel::reload(&options),
    }
}

/// Prints what the user asked for; a reader that has gone away, as in `status | head`, is no error.
fn print(text: &str) -> miette::Result<()> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result
            .into_diagnostic()
            .wrap_err("the result cannot be printed"),
    }
}
