//! `cargo xtask clean`: removes what tests and demos left on this machine, running ones included.

use std::{fs, path::Path, process::Command, thread, time::Duration};

use anyhow::Context;

use crate::{
    setup::{need_root, step, toolchain::tools},
    vm,
};

/// All namespaces and instances of tests and demos are named so.
const PREFIX: &str = "ipx-";
const NAMESPACES: &str = "/run/netns";
/// Gateways of tests keep their files here.
const MEMORY: &str = "/dev/shm";
const PINS: &str = "/sys/fs/bpf/ipsec-xdp";

pub(crate) fn run(with_tools: bool) -> anyhow::Result<()> {
    if [NAMESPACES, PINS]
        .iter()
        .any(|folder| !ours(folder).is_empty())
    {
        need_root("this removes network namespaces and pins")?;
    }
    for name in ours(NAMESPACES) {
        end_processes(&name)?;
        step(
            Command::new("ip").args(["netns", "del", &name]),
            "remove a namespace",
        )?;
    }
    for name in ours(MEMORY) {
        let folder = Path::new(MEMORY).join(name);
        eprintln!("removing {}", folder.display());
        fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    }
    for name in ours(PINS) {
        let folder = Path::new(PINS).join(name);
        eprintln!("removing {}", folder.display());
        fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    }
    vm::sweep();
    if with_tools && tools().exists() {
        eprintln!("removing {}", tools().display());
        fs::remove_dir_all(tools()).context("remove the build tools")?;
    }
    Ok(())
}

/// Entries of a folder that are named like ours.
fn ours(folder: &str) -> Vec<String> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(PREFIX))
        .collect()
}

/// Kills what runs in a namespace: it would keep the namespace alive.
fn end_processes(namespace: &str) -> anyhow::Result<()> {
    for _ in 0..20 {
        let output = Command::new("ip")
            .args(["netns", "pids", namespace])
            .output()
            .context("ip cannot be started")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let processes: Vec<_> = text.split_whitespace().collect();
        if processes.is_empty() {
            break;
        }
        // One that ended by itself meanwhile is no failure.
        let _ = Command::new("kill").arg("-KILL").args(processes).status();
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
