//! Commands and their rendering: data to stdout, words to stderr.
#![forbid(unsafe_code)]

mod check;

use clap::{Parser, Subcommand};

/// IPsec gateway for Linux.
#[derive(Debug, Parser)]
#[command(name = "ipsec-ctl", version, about)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Validate a configuration file and the key files it names; nothing is changed.
    Check(check::Options),
}

/// Runs the command that was given.
///
/// # Errors
///
/// A diagnostic for the user; the exit status is then not zero.
pub fn run(cli: Cli) -> miette::Result<()> {
    match cli.command {
        Command::Check(options) => check::run(&options),
    }
}
