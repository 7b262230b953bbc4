//! `cargo xtask`: everything one does with this project. This file only parses and dispatches.

mod bpf;
mod ci;
mod command;
mod demo;
mod setup;
mod test;
mod tidy;

use clap::Parser;

/// Builds and tests ipsec-xdp.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Install what building and testing need; nothing if it is all there
    Setup {
        /// Only list what is missing, as commands to paste
        #[arg(long)]
        no_install: bool,
    },
    /// Build the release binary, target/release/ipsec-ctl
    Build,
    /// Run all tests and count them
    Test {
        /// Also those that take minutes
        #[arg(long)]
        full: bool,
    },
    /// Show two gateways and a tunnel with real traffic, and check what an eavesdropper sees
    Demo {
        /// Leave everything running, and tell how to play with it
        #[arg(long)]
        keep: bool,
        /// plain, nat, ipv6, any (selectors 0.0.0.0/0) or many (1,000 tunnels)
        #[arg(long, default_value = "plain")]
        scenario: String,
    },
    /// Check what the compiler cannot: import directions, module descriptions, leftovers
    Tidy,
    /// Run what CI runs: formatting, tidy, lints, build, tests, demo
    Ci,
}

fn main() -> anyhow::Result<()> {
    match Task::parse() {
        Task::Setup { no_install } => setup::run(!no_install),
        Task::Build => command::build_release(),
        Task::Test { full } => test::run(full),
        Task::Demo { keep, scenario } => demo::run(keep, &scenario),
        Task::Tidy => tidy::run(),
        Task::Ci => ci::run(),
    }
}
