//! Builds and lints the XDP program and the benchmarks' load generator, with the tools that `cargo xtask setup` put under `target/tools`.

use std::{fs, path::PathBuf, process::Command, time::SystemTime};

use anyhow::{Context, ensure};

use crate::{
    command::{prepare, shown, workspace},
    setup::toolchain::{Compiler, compiler, libraries, tools},
};

const TARGET: &str = "bpfel-unknown-none";
/// Line numbers for the verifier's log, and types for tools that show maps.
const FLAGS: [&str; 2] = ["-Cdebuginfo=2", "-Clink-arg=--btf"];

/// Builds the objects and leaves them where `ipsec-ctl/build.rs` and the benchmarks find them.
pub(crate) fn build() -> anyhow::Result<()> {
    run(&["build"], &[])?;
    let is_first = !workspace().join("target/bpf/ipsec-ebpf.o").exists();
    copy("ipsec-ebpf")?;
    copy("ipsec-generator")?;
    if is_first {
        // While there was no object, cargo was told to watch the build script alone.
        let script = workspace().join("ipsec-ctl/build.rs");
        fs::File::open(&script)
            .and_then(|file| file.set_modified(SystemTime::now()))
            .with_context(|| script.display().to_string())?;
    }
    Ok(())
}

fn copy(name: &str) -> anyhow::Result<()> {
    let folder = workspace().join("target/bpf");
    let built = folder.join(TARGET).join("release").join(name);
    let object = folder.join(format!("{name}.o"));
    let new = fs::read(&built).with_context(|| built.display().to_string())?;
    // Written only when it differs, or everything would be built again each time.
    if fs::read(&object).ok().as_deref() != Some(&new) {
        fs::write(&object, new).with_context(|| object.display().to_string())?;
    }
    Ok(())
}

/// Formatting and clippy, warnings being errors.
pub(crate) fn lint() -> anyhow::Result<()> {
    let status = prepare(&["fmt", "--manifest-path", "ipsec-ebpf/Cargo.toml", "--check"])
        .status()
        .context("cargo cannot be started")?;
    ensure!(status.success(), "ipsec-ebpf is not formatted");
    run(&["clippy"], &["--", "-D", "warnings"])
}

/// Runs cargo in `ipsec-ebpf` with the compiler for BPF.
fn run(task: &[&str], last: &[&str]) -> anyhow::Result<()> {
    let compiler = compiler().context("no compiler for BPF: run `cargo xtask setup`")?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = match &compiler {
        // clippy must be the compiler's own; it runs the cargo that CARGO names.
        Compiler::Unpacked(folder) if task == ["clippy"] => {
            let mut command = Command::new(folder.join("bin/cargo-clippy"));
            command.env("CARGO", &cargo).arg("clippy");
            command
        }
        _ => {
            let mut command = Command::new(&cargo);
            command.args(task);
            command
        }
    };
    match &compiler {
        Compiler::Unpacked(folder) => {
            command
                .env("RUSTC", folder.join("bin/rustc"))
                .env("LD_LIBRARY_PATH", libraries(folder));
        }
        Compiler::WithSource => {
            command.args(["-Z", "build-std=core"]);
        }
    }
    command
        .current_dir(workspace().join("ipsec-ebpf"))
        .args(["--release", "--locked", "--target", TARGET, "--target-dir"])
        .arg(workspace().join("target/bpf"))
        .args(last)
        // Neither compiler is a nightly, and the BPF target is one's business.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"))
        .env("PATH", search_path()?);
    eprintln!("$ {}", shown(&command));
    let status = command.status().context("cargo cannot be started")?;
    ensure!(
        status.success(),
        "the XDP program: {} failed",
        task.join(" ")
    );
    Ok(())
}

/// The search path, the tools' folder first, where rustc looks for bpf-linker.
fn search_path() -> anyhow::Result<std::ffi::OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::iter::once(tools().join("bin"))
        .chain(std::env::split_paths(&path))
        .collect();
    std::env::join_paths(folders).context("search path")
}
