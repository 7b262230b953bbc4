//! `ipsec-ctl`: the gateway's command line.

use clap::Parser;

fn main() -> miette::Result<()> {
    ipsec_ctl::cli::run(ipsec_ctl::cli::Cli::parse())
}
