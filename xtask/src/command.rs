//! Running cargo from the top of the workspace, each command shown before it runs.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};

use crate::{bpf, setup};

/// The top folder of the workspace.
pub(crate) fn workspace() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_owned()
}

/// Prepares a cargo command and shows it.
pub(crate) fn prepare(arguments: &[&str]) -> Command {
    eprintln!("$ cargo {}", arguments.join(" "));
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace()).args(arguments);
    command
}

/// Builds the binary that users install, with the XDP program in it.
pub(crate) fn build_release() -> anyhow::Result<()> {
    setup::run(true)?;
    bpf::build()?;
    cargo(&["build", "--release", "--package", "ipsec-ctl"])
}

/// Runs cargo.
pub(crate) fn cargo(arguments: &[&str]) -> anyhow::Result<()> {
    let status = prepare(arguments)
        .status()
        .context("cargo cannot be started")?;
    ensure!(status.success(), "cargo {} failed", arguments.join(" "));
    Ok(())
}
