//! Suites that run in a guest: what they need, the kernels of few test machines have.

use std::{thread, time::Duration};

use anyhow::Context;

use super::Count;
use crate::vm::{self, Guest, Kernel, NoGuest};

/// Suites that run in guests of one kind.
pub(super) struct Group {
    pub(super) name: &'static str,
    /// It runs with `--full` only, or by its name.
    pub(super) long: bool,
    kernel: fn() -> anyhow::Result<Kernel>,
    suites: &'static [&'static str],
    /// The longest that a suite may take.
    limit: Duration,
    /// How many times slower than this machine the guest is.
    slower: u32,
}

/// Cheapest first.
pub(super) const GROUPS: &[Group] = &[
    Group {
        name: "guest",
        long: false,
        kernel: user_mode,
        suites: &[
            "oracle",
            "kernel_engine",
            "two_engines",
            "nic_offload",
            "transport_mode",
            "policies",
            "vlan",
        ],
        limit: Duration::from_secs(900),
        slower: 1,
    },
    // Without xfrm interfaces.
    Group {
        name: "packaged-guest",
        long: true,
        kernel: Kernel::packaged,
        suites: &["policies"],
        limit: Duration::from_secs(900),
        slower: 1,
    },
    // The kernel that machines boot, with what user-mode Linux lacks: a second processor and a compiler for BPF.
    Group {
        name: "qemu",
        long: true,
        kernel: Kernel::full,
        suites: &["fast_path"],
        limit: Duration::from_secs(3600),
        slower: 15,
    },
];

fn user_mode() -> anyhow::Result<Kernel> {
    Kernel::built().map_or_else(Kernel::packaged, Ok)
}

impl Group {
    /// Runs its suites, or tells why there is no guest.
    pub(super) fn run(&self, full: bool) -> anyhow::Result<(Count, bool)> {
        eprintln!("== {} tests ==", self.name);
        let kernel = match (self.kernel)() {
            Ok(kernel) => kernel,
            Err(error) => {
                let reason = format!("{}: there is no guest: {error:#}", self.name);
                return Ok((Count::one_skipped(reason), true));
            }
        };
        eprintln!("vm: {kernel}");
        let mut guest = Guest {
            kernel,
            memory: vm::MEMORY,
            limit: self.limit,
            environment: Vec::new(),
        };
        let mut tell = |name: &str, value: String| guest.environment.push((name.to_owned(), value));
        // What takes minutes elsewhere would take hours in a slow one.
        if full && self.slower == 1 {
            tell("IPSEC_TESTS_FULL", "1".to_owned());
        }
        if self.slower > 1 {
            tell("IPSEC_TESTS_SLOWER", self.slower.to_string());
        }
        let (mut all, mut good) = (Count::default(), true);
        for suite in self.suites {
            let program = vm::test_program("ipsec-tests", suite)?;
            let (count, status) = run_suite_in(&guest, &program).or_else(|error| {
                no_guest(error)?;
                eprintln!("vm: the suite starts again, once");
                run_suite_in(&guest, &program).or_else(|error| {
                    let skipped = format!("{suite}: {}", no_guest(error)?);
                    Ok::<_, anyhow::Error>((Count::one_skipped(skipped), 0))
                })
            })?;
            all.join(count);
            good &= status == 0;
        }
        Ok((all, good))
    }
}

/// Why a guest is no good; other errors are passed on.
fn no_guest(error: anyhow::Error) -> anyhow::Result<NoGuest> {
    let reason = error.downcast::<NoGuest>()?;
    eprintln!("vm: {reason}");
    Ok(reason)
}

/// Runs a test program in a guest, its output passed on as it comes; tells what it counted, and its status.
fn run_suite_in(guest: &Guest, program: &str) -> anyhow::Result<(Count, i32)> {
    let mut count = Count::default();
    let (output, writer) = std::io::pipe().context("a pipe")?;
    let arguments = [program.to_owned(), "--test-threads=1".to_owned()];
    let status = thread::scope(|scope| {
        let reader = scope.spawn(|| count.read(output));
        let status = guest.run_to(&arguments, writer.into());
        match reader.join() {
            Ok(read) => read.and(status),
            Err(cause) => std::panic::resume_unwind(cause),
        }
    })?;
    Ok((count, status))
}
