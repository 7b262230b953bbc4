//! `cargo xtask setup`: finds out what building and testing need, says what is missing and why, and installs it.
//!
//! Asks nothing, and is done in a second where nothing is missing. Build tools go under `target/tools`; the system's own
//! Rust is neither touched nor shadowed.

pub(crate) mod packages;
pub(crate) mod toolchain;

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use anyhow::{Context, bail};

/// What the machine is to be made fit for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Purpose {
    /// Building, the XDP program included.
    Build,
    /// Running tests and demo as well.
    Test,
    /// Building a guest's kernel as well.
    Guest,
}

/// One thing that is missing.
#[derive(Debug)]
pub(crate) struct Missing {
    /// What, and what for.
    pub(crate) what: String,
    /// Commands that a user can paste.
    pub(crate) commands: Vec<String>,
}

pub(crate) fn run(purpose: Purpose, install: bool) -> anyhow::Result<()> {
    for notice in notices(purpose) {
        eprintln!("setup: {notice}");
    }
    let absent = packages::missing(purpose)?;
    let missing: Vec<_> = packages::describe(&absent)
        .into_iter()
        .chain(toolchain::missing())
        .collect();
    if missing.is_empty() {
        eprintln!("setup: everything is there");
        return Ok(());
    }
    eprintln!("setup: missing on this machine:");
    for item in &missing {
        eprintln!("  {}", item.what);
    }
    if !install {
        list(&missing);
        bail!("{} thing(s) are missing", missing.len());
    }
    if !absent.is_empty() {
        if !is_root() {
            list(&packages::describe(&absent));
            bail!("packages are missing, and installing them needs root: see the commands above");
        }
        packages::install(&absent)?;
    }
    toolchain::install()?;
    let rest = toolchain::missing();
    if let Some(item) = rest.first() {
        bail!("still missing after installation: {}", item.what);
    }
    eprintln!("setup: done");
    Ok(())
}

fn list(missing: &[Missing]) {
    eprintln!("setup: these commands install it, from the top of the repository:");
    for command in missing.iter().flat_map(|item| &item.commands) {
        eprintln!("    {command}");
    }
}

/// What no package mends, and what follows from it.
fn notices(purpose: Purpose) -> Vec<String> {
    let mut notices = Vec::new();
    if purpose == Purpose::Build {
        return notices;
    }
    if !is_root() {
        notices.push(
            "not root: tests in network namespaces are skipped; run as root to have them"
                .to_owned(),
        );
    }
    if !Path::new("/sys/fs/bpf").exists() {
        notices.push(
            "this kernel has no BPF (CONFIG_BPF_SYSCALL): the fast path can't be tested here"
                .to_owned(),
        );
    }
    if let Ok(release) = fs::read_to_string("/proc/sys/kernel/osrelease")
        && kernel_version(&release).is_some_and(|version| version < OLDEST_KERNEL)
    {
        notices.push(format!(
            "Linux {} is too old for the fast path, which needs {}.{}: boot a newer kernel",
            release.trim(),
            OLDEST_KERNEL.0,
            OLDEST_KERNEL.1
        ));
    }
    if !Path::new("/dev/net/tun").exists() {
        notices.push(
            "there is no /dev/net/tun: `modprobe tun`, or allow the device in this container"
                .to_owned(),
        );
    }
    notices
}

/// Neighbours kept by the kernel (NTF_EXT_MANAGED) are the newest thing in use.
const OLDEST_KERNEL: (u32, u32) = (5, 16);

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

pub(super) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

/// Fails at once where something that needs root would fail only after minutes of building.
///
/// # Errors
///
/// Not root; the error says how to become it without losing this user's cargo.
pub(crate) fn need_root(what: &str) -> anyhow::Result<()> {
    if is_root() {
        return Ok(());
    }
    let command: Vec<_> = std::env::args().skip(1).collect();
    bail!(
        "{what} and needs root: sudo env \"PATH=$PATH\" \"HOME=$HOME\" cargo xtask {}",
        command.join(" ")
    )
}

/// Runs a command, shown before, and fails with what it was for.
pub(super) fn step(command: &mut std::process::Command, what: &str) -> anyhow::Result<()> {
    eprintln!("$ {}", crate::command::shown(command));
    let status = command.status().with_context(|| {
        format!(
            "{what}: {} cannot be started",
            command.get_program().display()
        )
    })?;
    anyhow::ensure!(status.success(), "{what} failed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions_are_compared_as_numbers() {
        assert_eq!(kernel_version("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(kernel_version("5.4-rc1"), Some((5, 4)));
        assert!(kernel_version("5.4.0") < Some(OLDEST_KERNEL));
        assert_eq!(kernel_version("unknown"), None);
    }
}
