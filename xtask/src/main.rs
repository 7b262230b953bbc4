//! `cargo xtask`: everything one does with this project. This file only parses and dispatches.

mod bpf;
mod ci;
mod clean;
mod command;
mod demo;
mod proof;
mod setup;
mod test;
mod tidy;
mod vm;

use clap::Parser;

/// Builds and tests ipsec-xdp.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Install what building and testing need, and say why; done at once where nothing is missing
    Setup {
        /// Only list what is missing, as commands to paste
        #[arg(long)]
        no_install: bool,
        /// Also what `vm --build` needs
        #[arg(long)]
        guest: bool,
    },
    /// Build the binary with the XDP program in it, target/release/ipsec-ctl
    Build {
        /// For development: target/debug/ipsec-ctl
        #[arg(long)]
        debug: bool,
    },
    /// Run all tests and count them
    Test {
        /// Also those that take minutes
        #[arg(long)]
        full: bool,
        /// Only these groups: unit, simulation, namespaces, interop, guest; with --full, or by their names, also packaged-guest and qemu
        groups: Vec<String>,
    },
    /// Show two gateways and a tunnel with real traffic, and check what an eavesdropper sees
    Demo {
        /// Leave everything running, and tell how to play with it
        #[arg(long)]
        keep: bool,
        /// plain, nat, ipv6, any (selectors 0.0.0.0/0), many (1,000 tunnels) or many-kernel (the same on the kernel engine)
        #[arg(long, default_value = "plain")]
        scenario: String,
    },
    /// Try all that we and other IKE implementations have in common, in both roles, and write docs/interop.md
    Interop {
        /// Only rows whose name contains this; the page is then left alone
        #[arg(default_value = "")]
        rows: String,
    },
    /// Run two gateways under traffic, rekeying, loss, NAT rebinding and restarts, and check what must always hold
    Soak {
        /// How long
        #[arg(long, default_value_t = 10)]
        minutes: u32,
        /// What happens when follows from it; printed if not given
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Remove what tests and demos left: namespaces with their processes, and pins
    Clean {
        /// The build tools in target/tools as well
        #[arg(long)]
        tools: bool,
    },
    /// Run a command in a guest whose kernel has ESP, as root and without KVM; this machine's files are there, read-only
    Vm(vm::Options),
    /// Measure one worker beside the limits that it cannot pass and beside strongSwan, many SAs, latency, IKE set-ups
    Bench {
        /// Fewer and shorter slices: a look in a minute or two
        #[arg(long)]
        quick: bool,
        /// worker, many, strongswan, latency, ike: all of these if none is named; engines: the xdp and the kernel engine beside each other
        parts: Vec<String>,
    },
    /// Check what the compiler cannot: import directions, module descriptions, leftovers
    Tidy,
    /// Run what CI runs: formatting, tidy, lints, build, tests, demo
    Ci,
}

fn main() -> anyhow::Result<()> {
    match Task::parse() {
        Task::Setup { no_install, guest } => {
            let purpose = if guest {
                setup::Purpose::Guest
            } else {
                setup::Purpose::Test
            };
            setup::run(purpose, !no_install)
        }
        Task::Vm(options) => vm::run(&options),
        Task::Clean { tools } => clean::run(tools),
        Task::Build { debug: true } => command::build_debug(),
        Task::Build { debug: false } => command::build_release(),
        Task::Test { full, groups } => test::run(full, &groups),
        Task::Demo { keep, scenario } => demo::run(keep, &scenario),
        Task::Interop { rows } => proof::interop(&rows),
        Task::Soak { minutes, seed } => proof::soak(minutes, seed),
        Task::Bench { quick, parts } => command::bench(quick, &parts),
        Task::Tidy => tidy::run(),
        Task::Ci => ci::run(),
    }
}
