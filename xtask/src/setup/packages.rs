//! Debian packages: which are needed for what, which are missing, and how they are installed without a question.

use std::{fs, path::Path, process::Command};

use anyhow::Context;

use super::{Missing, Purpose, step};

/// A package that this project needs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Package {
    name: &'static str,
    why: &'static str,
    needed_for: Purpose,
}

const fn build(name: &'static str, why: &'static str) -> Package {
    Package {
        name,
        why,
        needed_for: Purpose::Build,
    }
}

const fn test(name: &'static str, why: &'static str) -> Package {
    Package {
        name,
        why,
        needed_for: Purpose::Test,
    }
}

const fn guest(name: &'static str, why: &'static str) -> Package {
    Package {
        name,
        why,
        needed_for: Purpose::Guest,
    }
}

/// All of them. The packaged Rust compiler is not here: it is unpacked and not installed, see [`super::toolchain`].
const PACKAGES: &[Package] = &[
    build(
        "build-essential",
        "compiles ring's C, and links bpf-linker with LLVM, which is C++",
    ),
    build(
        "llvm-22-dev",
        "bpf-linker uses the LLVM of the Rust compiler",
    ),
    build("libpolly-22-dev", "LLVM is linked with it"),
    build("zlib1g-dev", "LLVM is linked with it"),
    test(
        "mmdebstrap",
        "unpacks newer peers for `cargo xtask interop`",
    ),
    test("iproute2", "network namespaces of tests and demo"),
    test("ethtool", "checksum offload of their interfaces"),
    test("nftables", "NAT and firewalls in tests"),
    test(
        "charon-systemd",
        "strongSwan, the peer in interoperability tests",
    ),
    test("strongswan-swanctl", "its control"),
    test("libcharon-extra-plugins", "its userspace ESP"),
    test("libstrongswan-standard-plugins", "its elliptic curves"),
    test(
        "libstrongswan-extra-plugins",
        "its ChaCha20-Poly1305 and Curve25519",
    ),
    test("kmod", "the modules of a guest's packaged kernel"),
    test("xz-utils", "unpacking kernels of guests"),
    guest("flex", "building a guest's kernel"),
    guest("bison", "building a guest's kernel"),
    guest("bc", "building a guest's kernel"),
    guest("libelf-dev", "building a guest's kernel"),
    guest("libssl-dev", "building a guest's kernel"),
];

/// Packages that are missing.
pub(crate) fn missing(purpose: Purpose) -> anyhow::Result<Vec<&'static Package>> {
    let wanted = PACKAGES
        .iter()
        .filter(|package| package.needed_for <= purpose);
    if !has("dpkg-query") {
        eprintln!(
            "setup: no dpkg on this machine, so packages are not looked after; the equivalents of these are needed:"
        );
        for package in wanted {
            eprintln!("  {}: {}", package.name, package.why);
        }
        return Ok(Vec::new());
    }
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${db:Status-Status}\\n"])
        .output()
        .context("dpkg-query cannot be started")?;
    let installed = String::from_utf8_lossy(&output.stdout);
    Ok(wanted
        .filter(|package| !is_installed(&installed, package.name))
        .collect())
}

fn is_installed(listing: &str, name: &str) -> bool {
    listing.lines().any(|line| {
        line.split_once(' ')
            .is_some_and(|(package, status)| package == name && status == "installed")
    })
}

/// What is missing, as one item each, with the one command that installs all of them.
pub(crate) fn describe(packages: &[&Package]) -> Vec<Missing> {
    let mut items: Vec<_> = packages
        .iter()
        .map(|package| Missing {
            what: format!("package {}: {}", package.name, package.why),
            commands: Vec::new(),
        })
        .collect();
    let names: Vec<_> = packages.iter().map(|package| package.name).collect();
    if let Some(first) = items.first_mut() {
        first.commands = vec![
            "sudo apt-get update".to_owned(),
            format!(
                "sudo apt-get install --yes --no-install-recommends {}",
                names.join(" ")
            ),
        ];
    }
    items
}

/// Installs packages, without starting any service they hold.
pub(crate) fn install(packages: &[&Package]) -> anyhow::Result<()> {
    // Package lists that are weeks old name files that the mirrors no longer have.
    step(
        Command::new("apt-get").args(["--quiet", "update"]),
        "apt-get update",
    )?;
    let _quiet = NoServices::begin()?;
    step(
        Command::new("apt-get")
            .args(["--quiet", "--yes", "--no-install-recommends", "install"])
            .args(packages.iter().map(|package| package.name))
            .env("DEBIAN_FRONTEND", "noninteractive"),
        "apt-get install",
    )?;
    if packages
        .iter()
        .any(|package| package.name == "charon-systemd")
        && has("systemctl")
    {
        // Tests run a charon of their own in namespaces. One that starts at boot would take UDP 500 and 4500 here.
        // It fails in a container, where nothing would start it either.
        let _ = Command::new("systemctl")
            .args(["--quiet", "disable", "strongswan.service"])
            .status();
    }
    Ok(())
}

/// While it lives, packages that are installed start no services (Debian's policy-rc.d).
struct NoServices {
    ours: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl NoServices {
    fn begin() -> anyhow::Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        if Path::new(POLICY).exists() {
            return Ok(Self { ours: false });
        }
        fs::write(POLICY, "#!/bin/sh\nexit 101\n").context(POLICY)?;
        fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755)).context(POLICY)?;
        Ok(Self { ours: true })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(POLICY)
        {
            eprintln!("setup: remove {POLICY}, or no service starts when installed: {error}");
        }
    }
}

/// What a package depends on whose name begins like that: the kernel of today, the library of today.
pub(crate) fn dependency(package: &str, start: &str) -> anyhow::Result<String> {
    let output = Command::new("apt-cache")
        .args(["depends", package])
        .output()
        .context("apt-cache cannot be started")?;
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with(start))
        .map(str::to_owned)
        .with_context(|| format!("apt knows no package {package}"))
}

/// What installing a package would add to this machine, itself included.
pub(crate) fn additions(package: &str) -> anyhow::Result<Vec<String>> {
    let output = Command::new("apt-get")
        .args(["--simulate", "--no-install-recommends", "install", package])
        .env("LC_ALL", "C")
        .output()
        .context("apt-get cannot be started")?;
    anyhow::ensure!(
        output.status.success(),
        "apt cannot install {package}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(added(&String::from_utf8_lossy(&output.stdout)))
}

/// Packages in what a simulation prints: `Inst NAME (VERSION ..)`; what is replaced has its old version first.
fn added(simulation: &str) -> Vec<String> {
    let lines = simulation.lines();
    lines
        .filter_map(|line| line.strip_prefix("Inst ")?.split_once(" ("))
        .filter(|(name, _)| !name.contains(' '))
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// Whether a program is in the search path.
pub(crate) fn has(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|folder| folder.join(program).exists())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_installed_packages_count() {
        let listing =
            "build-essential installed\nnftables config-files\nllvm-22-dev-extra installed\n";
        assert!(is_installed(listing, "build-essential"));
        assert!(!is_installed(listing, "nftables"));
        assert!(!is_installed(listing, "llvm-22-dev"));
    }

    #[test]
    fn what_an_installation_would_add_is_read_from_its_simulation() {
        let simulation = "Remv qemu-utils [1:10]\nInst cpio (2.13 Debian:12.15 [amd64])\n\
            Inst libc6 [2.35] (2.36 Debian:12 [amd64])\nConf cpio (2.13 Debian:12.15 [amd64])\n";
        assert_eq!(added(simulation), ["cpio"]);
    }

    #[test]
    fn one_command_installs_all_packages() {
        let items = describe(&[&PACKAGES[0], &PACKAGES[1]]);
        assert_eq!(items.len(), 2);
        let commands: Vec<_> = items.iter().flat_map(|item| &item.commands).collect();
        assert_eq!(commands.len(), 2);
        assert!(commands[1].ends_with("build-essential llvm-22-dev"));
    }
}
