//! Running cargo from the top of the workspace, each command shown before it runs.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};

use crate::{
    bpf,
    setup::{self, Purpose},
};

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
    // `cargo run` has told xtask its own package. Build scripts that ask, such as ring's, would run again after every
    // change between `cargo xtask` and plain cargo, and nearly everything would be compiled again.
    for (name, _) in std::env::vars_os() {
        let is_ours = ["CARGO_PKG_", "CARGO_MANIFEST_"]
            .iter()
            .any(|prefix| name.to_string_lossy().starts_with(prefix));
        if is_ours {
            command.env_remove(name);
        }
    }
    command
}

/// A command as one would type it.
pub(crate) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}

/// Builds the binary that users install, the XDP program in it.
pub(crate) fn build_release() -> anyhow::Result<()> {
    build(&["build", "--release", "--package", "ipsec-ctl"])
}

/// Builds the same without optimisation, quicker.
pub(crate) fn build_debug() -> anyhow::Result<()> {
    build(&["build", "--package", "ipsec-ctl"])
}

fn build(arguments: &[&str]) -> anyhow::Result<()> {
    setup::run(Purpose::Build, true)?;
    bpf::build()?;
    cargo(arguments)
}

/// Measures data plane and IKE, beside strongSwan.
pub(crate) fn bench(quick: bool, parts: &[String]) -> anyhow::Result<()> {
    setup::need_root("the benchmark makes network namespaces")?;
    setup::run(Purpose::Test, true)?;
    build_release()?;
    cargo(&[
        "build",
        "--release",
        "--package",
        "ipsec-tests",
        "--bin",
        "bench",
    ])?;
    let target = workspace().join("target");
    let mut bench = Command::new(target.join("release/bench"));
    bench.arg("--json").arg(target.join("bench.json"));
    if quick {
        bench.arg("--quick");
    }
    let status = bench
        .args(parts)
        .status()
        .context("the benchmark cannot be started")?;
    ensure!(status.success(), "the benchmark broke off");
    Ok(())
}

/// Runs cargo.
pub(crate) fn cargo(arguments: &[&str]) -> anyhow::Result<()> {
    let status = prepare(arguments)
        .status()
        .context("cargo cannot be started")?;
    ensure!(status.success(), "cargo {} failed", arguments.join(" "));
    Ok(())
}
