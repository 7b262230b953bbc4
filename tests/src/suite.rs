//! The runner of a suite: tests with sentences for names, skipped with a reason where the machine lacks something.

use std::{
    process::ExitCode,
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

use ipsec_ctl::{dataplane::kernel::probe, esp::EspSuite, net::xfrm::Xfrm};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::{
    command::{find, run, slower},
    gateway::no_fast_path,
    netdevsim, netns,
    watchdog::watched,
};

/// Longest that a test may take, and one that runs with `--full` only: several times what it takes on a busy machine. What takes longer
/// hangs, and fails.
const LIMITS: [Duration; 2] = [Duration::from_secs(240), Duration::from_secs(3600)];
/// Begins the line that tells of a test that is tried twice.
const UNSTEADY: &str = "tried twice: ";
/// An interface that exists for a moment.
const PROBE: &str = "ipx-suite";

/// What a test needs of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Root, and iproute2.
    Namespaces,
    /// nftables, for the router's NAT and for firewalls.
    Nftables,
    /// What the plaintext guard asks of nf_tables: the guest's kernel if it was built.
    Guard,
    /// VLAN devices, which the guest has if it was built.
    Vlan,
    /// strongSwan with its userspace ESP.
    StrongSwan,
    /// A kernel with ESP, such as the guest's.
    KernelEsp,
    /// The same, with xfrm interfaces: the guest's if it was built.
    XfrmInterfaces,
    /// A kernel with ESP and without them: the packaged guest's.
    NoXfrmInterfaces,
    /// A processor that packet rates can be asked of, not one whose instructions are interpreted.
    Pace,
    /// What `ipsec-ctl probe` finds necessary for the fast path.
    FastPath,
    /// Simulated network cards: the guest's if it was built.
    Netdevsim,
}

impl Need {
    /// Why the machine does not have it; `None` if it has.
    pub fn missing(self) -> Option<String> {
        // Tests ask at once, and what one makes to find out would be in the way of another.
        static ASKING: Mutex<()> = Mutex::new(());
        let _asking = ASKING.lock().unwrap_or_else(PoisonError::into_inner);
        self.lacks()
    }

    fn lacks(self) -> Option<String> {
        let absent = |programs: &[&str], package: &str| {
            let missing = programs.iter().find(|program| find(program).is_none())?;
            Some(format!(
                "there is no `{missing}`: apt-get install {package}"
            ))
        };
        match self {
            Self::Namespaces if !nix::unistd::geteuid().is_root() => {
                Some("network namespaces need root".to_owned())
            }
            Self::Namespaces => absent(&["ip", "ethtool"], "iproute2 ethtool"),
            Self::Pace => (slower() > 1).then(|| "this machine is too slow for it".to_owned()),
            Self::Nftables => absent(&["nft"], "nftables"),
            Self::Guard => Self::Nftables.lacks().or_else(|| {
                let rule = format!(
                    "add table inet {PROBE}; \
                     add chain inet {PROBE} c {{ type filter hook prerouting priority 0; }}; \
                     add rule inet {PROBE} c fib saddr oif 0 drop"
                );
                // The kernel is asked, and nothing is changed.
                let asked = run("nft", &["--check", &rule]);
                asked.err().map(|_| {
                    "this kernel's nf_tables cannot ask for routes: `cargo xtask vm --build` makes a guest whose can"
                        .to_owned()
                })
            }),
            Self::KernelEsp => {
                let xfrm = Xfrm::open().map_err(|error| error.to_string());
                let esp = xfrm.and_then(|xfrm| probe::esp(&xfrm, EspSuite::Aes128Gcm16));
                esp.err().map(|reason| {
                    format!(
                        "this kernel has no ESP ({reason}): `cargo xtask vm` has a guest that does"
                    )
                })
            }
            Self::XfrmInterfaces => Self::KernelEsp.lacks().or_else(|| {
                let added = run("ip", &["link", "add", PROBE, "type", "xfrm", "if_id", "1"]);
                let _ = run("ip", &["link", "del", PROBE]);
                added.err().map(|_| {
                    "this kernel has no xfrm interfaces: `cargo xtask vm --build` makes a guest that does".to_owned()
                })
            }),
            Self::NoXfrmInterfaces => Self::KernelEsp.lacks().or_else(|| {
                let there = Self::XfrmInterfaces.lacks().is_none();
                there.then(|| {
                    "this kernel has xfrm interfaces: `cargo xtask vm --packaged` has a guest without"
                        .to_owned()
                })
            }),
            Self::Netdevsim => (!netdevsim::is_there()).then(|| {
                "this kernel has no netdevsim: `cargo xtask vm --build` makes a guest that does".to_owned()
            }),
            Self::Vlan => {
                let pair = ["link", "add", PROBE, "type", "veth"];
                let on_it = "link add link ipx-suite name ipx-suite.2 type vlan id 2";
                let on_it: Vec<&str> = on_it.split(' ').collect();
                let added = run("ip", &pair).and_then(|_| run("ip", &on_it));
                let _ = run("ip", &["link", "del", PROBE]);
                added.err().map(|_| {
                    "this kernel has no VLANs: `cargo xtask vm --build` makes a guest that does"
                        .to_owned()
                })
            }
            Self::FastPath => {
                static MISSING: OnceLock<Option<String>> = OnceLock::new();
                let look = || no_fast_path().unwrap_or_else(|error| Some(format!("{error:#}")));
                MISSING.get_or_init(look).clone()
            }
            Self::StrongSwan => absent(
                &["charon-systemd", "swanctl"],
                "charon-systemd strongswan-swanctl libcharon-extra-plugins libstrongswan-standard-plugins libstrongswan-extra-plugins",
            ),
        }
    }
}

/// What a test returns when it finds only while it runs that the machine lacks something.
#[derive(Debug)]
struct Skipped(String);

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skipped {}

/// Ends a test as skipped, for a reason.
pub fn skipped(reason: &str) -> anyhow::Error {
    anyhow::Error::new(Skipped(reason.to_owned()))
}

/// One test.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Its name: a sentence in words joined by underscores.
    pub name: &'static str,
    /// What it needs besides [`Need::Namespaces`].
    pub needs: &'static [Need],
    /// It runs with `--full` only, because it takes minutes.
    pub long: bool,
    /// The test itself.
    pub body: fn() -> anyhow::Result<()>,
}

/// A list of [`Case`]s out of functions: `cases![[Need::StrongSwan] a_function, ..]`, or `long a_function`.
#[macro_export]
macro_rules! cases {
    ($([$($need:expr),*] $($function:ident)+),* $(,)?) => {
        [$($crate::cases!(@one [$($need),*] $($function)+)),*]
    };
    (@one [$($need:expr),*] long $function:ident) => {
        $crate::suite::Case { name: stringify!($function), needs: &[$($need),*], long: true, body: $function }
    };
    (@one [$($need:expr),*] $function:ident) => {
        $crate::suite::Case { name: stringify!($function), needs: &[$($need),*], long: false, body: $function }
    };
}

/// Runs the cases as the command line says, two at a time unless it says otherwise.
pub fn main(cases: &[Case]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(2);
    if !arguments.list {
        netns::sweep();
    }
    let full = std::env::var_os("IPSEC_TESTS_FULL").is_some();
    let trials = cases.iter().map(|case| trial(*case, full)).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(case: Case, full: bool) -> Trial {
    Trial::ignorable_test(case.name, move || {
        let missing = std::iter::once(Need::Namespaces)
            .chain(case.needs.iter().copied())
            .find_map(Need::missing)
            .or_else(|| (case.long && !full).then(|| "takes minutes: run with --full".to_owned()));
        match missing {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => match attempt(case).or_else(|error| once_more(case, error)) {
                Ok(()) => Ok(Completion::Completed),
                Err(error) => match error.downcast_ref::<Skipped>() {
                    Some(Skipped(reason)) => Ok(Completion::ignored_with(reason)),
                    None => Err(Failed::from(format!("{error:#}"))),
                },
            },
        }
    })
}

fn attempt(case: Case) -> anyhow::Result<()> {
    let limit = LIMITS[usize::from(case.long)] * slower();
    watched(case.name, limit, case.body)
}

/// Tries a test again that has failed: real peers and a real kernel share two processors with whatever else the machine
/// does, and a verdict must not hang on that. What happened the first time is told, and `cargo xtask test` counts it.
#[expect(
    clippy::print_stdout,
    reason = "`cargo xtask test` counts the line among those of the runner"
)]
fn once_more(case: Case, first: anyhow::Error) -> anyhow::Result<()> {
    if case.long || first.is::<Skipped>() {
        return Err(first);
    }
    // The runner may have begun a line.
    println!("\n{UNSTEADY}{}", case.name);
    eprintln!("{} failed, and is tried once more: {first:#}", case.name);
    attempt(case)
}
