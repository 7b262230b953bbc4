//! `cargo xtask vm`: a guest whose kernel has ESP, for machines whose own kernel lacks it.
//!
//! No guest needs KVM, a disk image or an installed kernel, and all see this machine's files read-only, so that programs
//! built here run in them as they are. Most are user-mode Linux, a kernel that runs as a process: either the packaged one,
//! there in seconds, or one built from the distribution's source with what the tests need. What that lacks (a second
//! processor, a BPF JIT, BTF) has the kernel that the distribution boots machines with, under QEMU and much slower.

mod guest;
mod kernel;
mod machine;
mod packages;
mod user_mode;

use std::{process::Command, time::Duration};

use anyhow::ensure;

pub(crate) use self::{
    guest::{Guest, NoGuest, sweep},
    kernel::Kernel,
};
use crate::setup::{self, Purpose};

/// What `cargo xtask vm` is asked for.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Build the kernel first, unless that has been done: 5 to 8 minutes on two cores and 3 GB in the cache folder
    #[arg(long)]
    build: bool,
    /// Use the packaged kernel even where one has been built
    #[arg(long, conflicts_with = "build")]
    packaged: bool,
    /// Use the kernel that the distribution boots machines with, under QEMU: two processors, a BPF JIT, BTF; much slower
    #[arg(long, conflicts_with_all = ["build", "packaged"])]
    qemu: bool,
    /// Memory of the guest in MiB
    #[arg(long, default_value_t = MEMORY)]
    memory: u32,
    /// End the guest after so many seconds
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// What to run in the guest; without it, what the guest has is shown
    #[arg(last = true)]
    command: Vec<String>,
}

/// Memory of a guest in MiB.
pub(crate) const MEMORY: u32 = 768;

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let kernel = if options.build {
        setup::run(Purpose::Guest, true)?;
        Kernel::build()?
    } else if options.qemu {
        setup::run(Purpose::Test, true)?;
        Kernel::full()?
    } else {
        setup::run(Purpose::Test, true)?;
        let built = Kernel::built().filter(|_| !options.packaged);
        built.map_or_else(Kernel::packaged, Ok)?
    };
    eprintln!("vm: {kernel}");
    let guest = Guest {
        kernel,
        memory: options.memory,
        limit: Duration::from_secs(options.seconds),
        environment: Vec::new(),
    };
    let show: Vec<String> = ["sh", "-c", SHOW].map(str::to_owned).into();
    let command = if options.command.is_empty() {
        &show
    } else {
        &options.command
    };
    match guest.run(command)? {
        0 => Ok(()),
        code => std::process::exit(code),
    }
}

/// What a look around in the guest tells.
const SHOW: &str = "uname -srm; nproc; ip xfrm state count; \
    ip link add probe type xfrm if_id 1 2>/dev/null && echo 'xfrm interfaces: yes' || echo 'xfrm interfaces: no'; \
    test -d /sys/bus/netdevsim && echo 'netdevsim: yes' || echo 'netdevsim: no'; \
    test \"$(cat /proc/sys/net/core/bpf_jit_enable 2>/dev/null)\" = 1 && echo 'BPF JIT: yes' || echo 'BPF JIT: no'; \
    test -e /sys/kernel/btf/vmlinux && echo 'BTF: yes' || echo 'BTF: no'";

/// Builds a test program here and gives its path, for the guest to run it.
pub(crate) fn test_program(package: &str, name: &str) -> anyhow::Result<String> {
    let arguments = [
        "test",
        "--package",
        package,
        "--test",
        name,
        "--no-run",
        "--message-format=json-render-diagnostics",
    ];
    let output = crate::command::prepare(&arguments)
        .stderr(std::process::Stdio::inherit())
        .output()?;
    ensure!(
        output.status.success(),
        "cargo {} failed",
        arguments.join(" ")
    );
    executable(&String::from_utf8_lossy(&output.stdout), name)
        .ok_or_else(|| anyhow::anyhow!("cargo did not tell where the test program {name} is"))
}

/// The path of a test program in cargo's messages, one JSON object a line.
fn executable(messages: &str, name: &str) -> Option<String> {
    let target = format!("\"name\":\"{name}\"");
    messages
        .lines()
        .filter(|line| line.contains("\"kind\":[\"test\"]") && line.contains(&target))
        .find_map(|line| {
            let (_, rest) = line.split_once("\"executable\":\"")?;
            Some(rest.split_once('"')?.0.to_owned())
        })
}

/// Output of a program, or why there is none.
fn output_of(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output()?;
    ensure!(
        output.status.success(),
        "{} failed: {}",
        crate::command::shown(command),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_program_is_found_among_cargos_messages() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"oracle"},"executable":null}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"oracle"},"executable":"/t/oracle-1"}"#,
            "\n",
        );
        assert_eq!(
            executable(messages, "oracle").as_deref(),
            Some("/t/oracle-1")
        );
        assert_eq!(executable(messages, "engine"), None);
    }
}
