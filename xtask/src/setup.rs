//! `cargo xtask setup`: what building and testing need beyond rustup's toolchain.
//!
//! Debian packages are installed as such; the compiler that brings a ready `core` for the bpf target is only unpacked
//! under `target/tools`, so that the system's own rustc stays what it is. Done twice, it has nothing to do.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail, ensure};

use crate::command::workspace;

/// A Debian package, and what it is for.
struct Package {
    name: &'static str,
    why: &'static str,
}

const PACKAGES: &[Package] = &[
    Package {
        name: "build-essential",
        why: "a C compiler and linker for ring",
    },
    Package {
        name: "llvm-22-dev",
        why: "bpf-linker is built on the LLVM of the compiler it links for",
    },
    Package {
        name: "libpolly-22-dev",
        why: "part of that LLVM",
    },
    Package {
        name: "iproute2",
        why: "tests build their networks with `ip`",
    },
    Package {
        name: "nftables",
        why: "tests of NAT and of firewalls",
    },
    Package {
        name: "charon-systemd",
        why: "strongSwan, the peer in the interoperability tests",
    },
    Package {
        name: "strongswan-swanctl",
        why: "drives strongSwan",
    },
    Package {
        name: "libcharon-extra-plugins",
        why: "strongSwan's ESP in userspace, and more algorithms",
    },
    Package {
        name: "libstrongswan-extra-plugins",
        why: "strongSwan's ChaCha20-Poly1305 and Curve25519",
    },
];

/// Unpacked, not installed: the compiler for the bpf target.
const COMPILER: &[&str] = &[
    "rustc-web",
    "libstd-rust-web-1.96",
    "libstd-rust-web-dev",
    "libstd-rust-web-dev-bpf",
    "rust-web-clippy",
];

/// Must match the LLVM of the compiler.
const LINKER: &str = "0.12.0";
const LLVM: &str = "/usr/lib/llvm-22";

/// Where the tools are.
pub(crate) fn tools() -> PathBuf {
    workspace().join("target/tools")
}

/// The compiler for the bpf target: a script named as clippy expects a compiler to be, and in no PATH.
pub(crate) fn compiler() -> PathBuf {
    tools().join("bpf/rustc")
}

/// Installs whatever is missing; with `install` false it only tells.
pub(crate) fn run(install: bool) -> anyhow::Result<()> {
    let missing = missing_packages()?;
    let compiler_missing = !compiler_works();
    let linker_missing = !linker_works();
    if missing.is_empty() && !compiler_missing && !linker_missing {
        eprintln!("setup: everything is there");
        return Ok(());
    }
    if !install {
        return tell(&missing, compiler_missing, linker_missing);
    }
    if !missing.is_empty() {
        install_packages(&missing)?;
    }
    if compiler_missing {
        unpack_compiler()?;
    }
    if linker_missing {
        build_linker()?;
    }
    Ok(())
}

fn tell(missing: &[&Package], compiler: bool, linker: bool) -> anyhow::Result<()> {
    eprintln!("missing; these commands mend it:\n");
    if !missing.is_empty() {
        for package in missing {
            eprintln!("  # {}: {}", package.name, package.why);
        }
        let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
        eprintln!("  sudo apt-get install {}", names.join(" "));
    }
    if compiler {
        eprintln!(
            "  # a compiler with `core` for the bpf target, unpacked and not installed\n  \
             mkdir -p {dir}/rustc && cd {dir} && apt-get download {} && for deb in *.deb; do dpkg -x $deb rustc; done",
            COMPILER.join(" "),
            dir = tools().display()
        );
    }
    if linker {
        eprintln!("  # bpf-linker\n  {}", linker_command().join(" "));
    }
    bail!("something is missing; `cargo xtask setup` installs it")
}

fn missing_packages() -> anyhow::Result<Vec<&'static Package>> {
    ensure!(
        program_exists("dpkg-query"),
        "this is no Debian: install by hand what `PACKAGES` in xtask/src/setup.rs lists"
    );
    Ok(PACKAGES
        .iter()
        .filter(|package| {
            !Command::new("dpkg-query")
                .args(["-W", "-f=${db:Status-Status}", package.name])
                .output()
                .is_ok_and(|output| output.stdout == b"installed")
        })
        .collect())
}

fn install_packages(missing: &[&Package]) -> anyhow::Result<()> {
    ensure!(
        is_root()?,
        "installing packages needs root; `cargo xtask setup --no-install` lists the commands to run with sudo"
    );
    for package in missing {
        eprintln!("setup: {} ({})", package.name, package.why);
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    let install = |names: &[&str]| {
        Command::new("apt-get")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["install", "-y", "-q", "--no-install-recommends"])
            .args(names)
            .stdout(std::process::Stdio::null())
            .status()
            .context("apt-get")
    };
    if install(&names)?.success() {
        return Ok(());
    }
    eprintln!("setup: apt's lists may be old; they are read again");
    let updated = Command::new("apt-get")
        .args(["update", "-q"])
        .stdout(std::process::Stdio::null())
        .status()
        .context("apt-get")?;
    ensure!(updated.success(), "apt-get update failed");
    ensure!(install(&names)?.success(), "apt-get install failed");
    Ok(())
}

fn compiler_works() -> bool {
    Command::new(compiler())
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
}

/// Unpacks the compiler and puts a script before it that finds its libraries.
fn unpack_compiler() -> anyhow::Result<()> {
    eprintln!("setup: a compiler with `core` for the bpf target, unpacked under target/tools");
    let downloads = tools().join("packages");
    let unpacked = tools().join("rustc");
    fs::create_dir_all(&downloads)?;
    fs::create_dir_all(&unpacked)?;
    // apt's own user must be able to write there, or it warns; as root it falls back by itself.
    let got = || -> anyhow::Result<bool> {
        Ok(Command::new("apt-get")
            .arg("download")
            .args(COMPILER)
            .current_dir(&downloads)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .context("apt-get")?
            .success())
    };
    if !got()? {
        run_quietly(Command::new("apt-get").args(["update", "-q"]))?;
        ensure!(got()?, "apt-get download {} failed", COMPILER.join(" "));
    }
    for entry in fs::read_dir(&downloads)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run_quietly(Command::new("dpkg").arg("-x").arg(&path).arg(&unpacked))?;
        }
    }
    fs::remove_dir_all(&downloads)?;
    let script = format!(
        "#!/bin/sh\nLD_LIBRARY_PATH={root}/lib/x86_64-linux-gnu exec {root}/bin/rustc \"$@\"\n",
        root = unpacked.join("usr").display()
    );
    write_program(&compiler(), &script)?;
    ensure!(
        compiler_works(),
        "the unpacked compiler does not run: {}",
        compiler().display()
    );
    Ok(())
}

fn write_program(path: &Path, text: &str) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn linker_works() -> bool {
    Command::new(tools().join("bin/bpf-linker"))
        .arg("--version")
        .output()
        .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(LINKER))
}

fn linker_command() -> Vec<String> {
    [
        &format!("LLVM_PREFIX={LLVM}"),
        &format!("LLVM_SYS_221_PREFIX={LLVM}"),
        &format!("LIBRARY_PATH={LLVM}/lib"),
        "cargo install --locked --no-default-features --features llvm-22",
        &format!("--root {} bpf-linker@{LINKER}", tools().display()),
    ]
    .map(str::to_owned)
    .to_vec()
}

fn build_linker() -> anyhow::Result<()> {
    eprintln!("setup: bpf-linker {LINKER} (about two minutes)");
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["install", "--quiet", "--locked", "--no-default-features"])
        .args(["--features", "llvm-22", "--root"])
        .arg(tools())
        .arg(format!("bpf-linker@{LINKER}"))
        .env("CARGO_TARGET_DIR", tools().join("build"))
        .env("LLVM_PREFIX", LLVM)
        .env("LLVM_SYS_221_PREFIX", LLVM)
        .env("LIBRARY_PATH", format!("{LLVM}/lib"))
        // These name the target folder of this project, which is not this program's.
        .env_remove("RUSTC")
        .env_remove("RUSTFLAGS")
        .status()
        .context("cargo install bpf-linker")?;
    ensure!(status.success(), "bpf-linker could not be built");
    fs::remove_dir_all(tools().join("build"))?;
    Ok(())
}

fn run_quietly(command: &mut Command) -> anyhow::Result<()> {
    let output = command
        .output()
        .context("a set-up step cannot be started")?;
    ensure!(
        output.status.success(),
        "a set-up step failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn program_exists(name: &str) -> bool {
    Command::new(name)
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
}

fn is_root() -> anyhow::Result<bool> {
    let output = Command::new("id").arg("-u").output().context("id")?;
    Ok(output.stdout.trim_ascii() == b"0")
}
