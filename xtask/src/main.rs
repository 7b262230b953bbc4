//! `cargo xtask`: everything one does with this project. This file only parses and dispatches.

mod ci;
mod command;
mod test;
mod tidy;

use clap::Parser;

/// Builds and tests ipsec-xdp.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Build the release binary, target/release/ipsec-ctl
    Build,
    /// Run all tests and count them
    Test {
        /// Also those that take minutes
        #[arg(long)]
        full: bool,
    },
    /// Check what the compiler cannot: import directions, module descriptions, leftovers
    Tidy,
    /// Run what CI runs: formatting, lints, tidy, tests, build
    Ci,
}

fn main() -> anyhow::Result<()> {
    match Task::parse() {
        Task::Build => command::build_release(),
        Task::Test { full } => test::run(full),
        Task::Tidy => tidy::run(),
        Task::Ci => ci::run(),
    }
}
