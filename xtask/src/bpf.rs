//! Building the XDP program: for the bpf target, by a compiler of its own, into `target/bpf/ipsec-ebpf.o`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};

use crate::{
    command::workspace,
    setup::{compiler, tools},
};

const TARGET: &str = "bpfel-unknown-none";

/// A cargo command in the XDP program's own workspace.
fn cargo(arguments: &[&str]) -> anyhow::Result<Command> {
    let bin = tools().join("bin");
    let path = std::env::join_paths(std::iter::once(bin).chain(std::env::split_paths(
        &std::env::var_os("PATH").unwrap_or_default(),
    )))
    .context("PATH")?;
    eprintln!("$ cargo {} (ipsec-ebpf)", arguments.join(" "));
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(workspace().join("ipsec-ebpf"))
        .args(arguments)
        .args(["--target", TARGET, "--target-dir"])
        .arg(workspace().join("target/bpf"))
        .env("PATH", path)
        .env("RUSTC", compiler())
        // `core` for this target is used as it is; nothing unstable is needed beyond that.
        .env("RUSTC_BOOTSTRAP", "1")
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            "-Cdebuginfo=2\u{1f}-Clink-arg=--btf",
        )
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTFLAGS");
    Ok(command)
}

fn object() -> PathBuf {
    workspace().join("target/bpf/ipsec-ebpf.o")
}

/// Builds the program; the object is touched only if it has changed, so that nothing is rebuilt for no reason.
pub(crate) fn build() -> anyhow::Result<()> {
    let status = cargo(&["build", "--release", "--quiet"])?
        .status()
        .context("cargo cannot be started")?;
    ensure!(status.success(), "the XDP program could not be built");
    let built = workspace().join(format!("target/bpf/{TARGET}/release/ipsec-ebpf"));
    let fresh = fs::read(&built).with_context(|| built.display().to_string())?;
    if fs::read(object()).is_ok_and(|old| old == fresh) {
        return Ok(());
    }
    fs::write(object(), fresh).context("the XDP program's object")
}

/// Lints the program with the clippy of its own compiler, and checks its formatting.
pub(crate) fn lint() -> anyhow::Result<()> {
    let root = tools().join("rustc/usr");
    let driver: &Path = &root.join("bin/clippy-driver");
    let status = cargo(&["check", "--release", "--quiet"])?
        .env("RUSTC_WORKSPACE_WRAPPER", driver)
        .env("LD_LIBRARY_PATH", root.join("lib/x86_64-linux-gnu"))
        .env("SYSROOT", &root)
        .env(
            "CLIPPY_ARGS",
            "-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__",
        )
        .status()
        .context("clippy cannot be started")?;
    ensure!(status.success(), "clippy has complaints about ipsec-ebpf");
    let status = Command::new("cargo")
        .args(["fmt", "--check"])
        .current_dir(workspace().join("ipsec-ebpf"))
        .status()
        .context("cargo fmt")?;
    ensure!(
        status.success(),
        "ipsec-ebpf is not formatted: run cargo fmt there"
    );
    Ok(())
}
