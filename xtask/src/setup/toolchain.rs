//! The compiler and the linker for the BPF target, under `target/tools`.
//!
//! Where rustup has rust-src its compiler builds core for the target. Elsewhere Debian's packaged compiler brings a ready
//! core. Its packages conflict with an installed Rust, so they are unpacked into `target/tools/rustc`, where nobody else
//! finds them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail, ensure};

use super::{
    Missing, is_root,
    packages::{dependency, has},
    step,
};
use crate::command::{prepare, workspace};

/// Packages of the compiler; the shared library of its driver has the version in its name.
const COMPILER_PACKAGES: [&str; 4] = [
    "rustc-web",
    "libstd-rust-web-dev",
    "libstd-rust-web-dev-bpf",
    "rust-web-clippy",
];
/// LLVM's major version, the same in compiler and linker.
const LLVM: &str = "22";
const LINKER_VERSION: &str = "0.12.0";

/// The Rust that compiles for BPF.
pub(crate) enum Compiler {
    /// rustup's, which builds core from rust-src.
    WithSource,
    /// The packaged one, unpacked here.
    Unpacked(PathBuf),
}

/// Folder of the build tools.
pub(crate) fn tools() -> PathBuf {
    workspace().join("target/tools")
}

/// The compiler for BPF, if there is one.
pub(crate) fn compiler() -> Option<Compiler> {
    if has_source() {
        return Some(Compiler::WithSource);
    }
    let folder = tools().join("rustc/usr");
    let works = [
        "bin/rustc",
        "bin/cargo-clippy",
        "lib/rustlib/bpfel-unknown-none/lib",
        "lib/rustlib/x86_64-unknown-linux-gnu/lib",
    ]
    .iter()
    .all(|file| folder.join(file).exists());
    (works && llvm_of(&folder).is_some_and(|llvm| llvm == LLVM))
        .then_some(Compiler::Unpacked(folder))
}

/// Folder of the unpacked compiler's shared library.
pub(crate) fn libraries(folder: &Path) -> PathBuf {
    folder.join("lib/x86_64-linux-gnu")
}

fn has_source() -> bool {
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output();
    let Ok(sysroot) = sysroot else { return false };
    let core = "lib/rustlib/src/rust/library/core/Cargo.toml";
    let sysroot = String::from_utf8_lossy(&sysroot.stdout).trim().to_owned();
    let same_llvm = Command::new("rustc")
        .arg("-vV")
        .output()
        .is_ok_and(|output| llvm_in(&output.stdout).as_deref() == Some(LLVM));
    same_llvm && Path::new(&sysroot).join(core).exists()
}

fn llvm_of(folder: &Path) -> Option<String> {
    let output = Command::new(folder.join("bin/rustc"))
        .arg("-vV")
        .env("LD_LIBRARY_PATH", libraries(folder))
        .output()
        .ok()?;
    llvm_in(&output.stdout)
}

/// Major version in the line `LLVM version: 22.1.8` of `rustc -vV`.
fn llvm_in(output: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(output);
    let version = text
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next().map(str::to_owned)
}

fn has_linker() -> bool {
    Command::new(tools().join("bin/bpf-linker"))
        .arg("--version")
        .output()
        .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(LINKER_VERSION))
}

/// What is missing of compiler and linker.
pub(crate) fn missing() -> Vec<Missing> {
    let mut missing = Vec::new();
    if compiler().is_none() {
        let mut commands = vec![
            "mkdir -p target/tools/download target/tools/rustc && cd target/tools/download"
                .to_owned(),
            format!(
                "apt-get download {} $(apt-cache depends libstd-rust-web-dev | grep -o 'libstd-rust-web-[0-9.]*$')",
                COMPILER_PACKAGES.join(" ")
            ),
        ];
        commands.push(
            "for package in *.deb; do dpkg -x $package ../rustc; done; cd ../../..".to_owned(),
        );
        missing.push(Missing {
            what: "a compiler with core for BPF, in target/tools/rustc: the XDP program is Rust"
                .to_owned(),
            commands,
        });
    }
    if !has_linker() {
        let environment: Vec<_> = linker_environment()
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        missing.push(Missing {
            what: format!("bpf-linker {LINKER_VERSION}, in target/tools/bin: links the XDP program, takes a minute to build"),
            commands: vec![format!(
                "{} cargo {}",
                environment.join(" "),
                linker_arguments(Path::new("target/tools")).join(" ")
            )],
        });
    }
    missing
}

/// Installs what is missing.
pub(crate) fn install() -> anyhow::Result<()> {
    if compiler().is_none() {
        unpack_compiler()?;
    }
    if !has_linker() {
        build_linker()?;
    }
    Ok(())
}

fn unpack_compiler() -> anyhow::Result<()> {
    let advice = "or give rustup its own: `rustup component add rust-src`";
    ensure!(
        has("apt-get") && has("dpkg"),
        "no apt on this machine to fetch the compiler for BPF with; {advice}"
    );
    let download = tools().join("download");
    let target = tools().join("rustc");
    for folder in [&download, &target] {
        // It may hold half of an earlier attempt, or another version.
        let _ = fs::remove_dir_all(folder);
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let fetched = fetch(&download);
    if fetched.is_err() && is_root() {
        step(
            Command::new("apt-get").args(["--quiet", "update"]),
            "apt-get update",
        )?;
        fetch(&download).context(advice)?;
    } else {
        fetched.context(advice)?;
    }
    for entry in fs::read_dir(&download)? {
        let package = entry?.path();
        step(
            Command::new("dpkg").arg("-x").args([&package, &target]),
            "unpack the compiler",
        )?;
    }
    fs::remove_dir_all(&download).context("remove the downloaded packages")?;
    if compiler().is_none() {
        bail!(
            "the distribution's rustc-web has LLVM {} and not {LLVM}: `apt-get update`, {advice}",
            llvm_of(&target.join("usr")).unwrap_or_else(|| "unknown".to_owned())
        );
    }
    Ok(())
}

fn fetch(download: &Path) -> anyhow::Result<()> {
    // The compiler's shared library, such as `libstd-rust-web-1.96`.
    let driver = dependency("libstd-rust-web-dev", "libstd-rust-web-")?;
    let mut apt = Command::new("apt-get");
    apt.current_dir(download).arg("--quiet");
    if is_root() {
        // The unprivileged user that apt would use cannot write here.
        apt.args(["-o", "APT::Sandbox::User=root"]);
    }
    apt.arg("download").args(COMPILER_PACKAGES).arg(driver);
    step(&mut apt, "download the compiler for BPF")
}

fn linker_environment() -> [(&'static str, String); 3] {
    let llvm = format!("/usr/lib/llvm-{LLVM}");
    [
        ("LLVM_PREFIX", llvm.clone()),
        ("LLVM_SYS_221_PREFIX", llvm.clone()),
        ("LIBRARY_PATH", format!("{llvm}/lib")),
    ]
}

fn linker_arguments(tools: &Path) -> Vec<String> {
    let linker = format!("bpf-linker@{LINKER_VERSION}");
    let root = tools.display().to_string();
    let build = tools.join("build").display().to_string();
    let features = format!("llvm-{LLVM}");
    [
        "install",
        &linker,
        "--locked",
        "--no-default-features",
        "--features",
        &features,
        "--root",
        &root,
        "--target-dir",
        &build,
        "--force",
    ]
    .map(str::to_owned)
    .to_vec()
}

fn build_linker() -> anyhow::Result<()> {
    let arguments = linker_arguments(&tools());
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let status = prepare(&arguments)
        .envs(linker_environment())
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .status()
        .context("cargo cannot be started")?;
    ensure!(status.success(), "bpf-linker could not be built");
    // 100 MB that nobody needs again; the next step looks whether the linker is there.
    let _ = fs::remove_dir_all(tools().join("build"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_llvm_of_a_compiler_is_read_from_its_version() {
        let output = b"rustc 1.96.0\nhost: x86_64-unknown-linux-gnu\nLLVM version: 22.1.8\n";
        assert_eq!(llvm_in(output).as_deref(), Some("22"));
        assert_eq!(llvm_in(b"rustc 1.96.0\n"), None);
    }
}
