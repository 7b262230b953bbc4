//! The kernels that a guest can run, and where they are kept: outside the checkout, so that they are made once.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};

use super::output_of;
use crate::setup::step;

/// The distribution's package with the source of the kernel that is built.
const SOURCE: &str = "linux-source-6.12";
/// What the built kernel has beyond the defaults of user-mode Linux.
const OPTIONS: &str = include_str!("kernel.config");
/// The name of a kernel in its folder.
const PROGRAM: &str = "linux";

/// A kernel that can run as a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// The folder with the kernel, and with its modules if it has any.
    pub(super) folder: PathBuf,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Built,
    Packaged,
}

impl Kernel {
    /// The built kernel, if it is there and has today's options.
    pub(crate) fn built() -> Option<Self> {
        let folder = cache().ok()?.join("guest");
        let options = fs::read_to_string(folder.join("options")).ok()?;
        let current = options == OPTIONS && folder.join(PROGRAM).exists();
        current.then_some(Self {
            folder,
            kind: Kind::Built,
        })
    }

    /// Builds the kernel unless that has been done.
    ///
    /// # Errors
    ///
    /// The step that failed.
    pub(crate) fn build() -> anyhow::Result<Self> {
        if let Some(kernel) = Self::built() {
            return Ok(kernel);
        }
        let folder = cache()?.join("guest");
        let work = cache()?.join("guest-build");
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        unpack(SOURCE, &work)?;
        let archive = find(&work.join("usr/src"), "linux-source-", ".tar.xz")?;
        step(
            Command::new("tar")
                .args(["--extract", "--strip-components=1", "--file"])
                .arg(&archive)
                .arg("--directory")
                .arg(&work),
            "unpacking the kernel's source",
        )?;
        compile(&work)?;
        step(
            Command::new("strip")
                .args(["--strip-debug", "-o"])
                .arg(folder.join(PROGRAM))
                .arg(work.join(PROGRAM)),
            "stripping the kernel",
        )?;
        fs::write(folder.join("options"), OPTIONS)?;
        fs::remove_dir_all(&work)?;
        Self::built().context("the kernel was built and is not there")
    }

    /// Debian's user-mode Linux, fetched and unpacked unless that has been done.
    ///
    /// # Errors
    ///
    /// The step that failed, for instance where the distribution has no such package.
    pub(crate) fn packaged() -> anyhow::Result<Self> {
        let folder = cache()?.join("packaged");
        let kernel = Self {
            folder: folder.clone(),
            kind: Kind::Packaged,
        };
        if folder.join("complete").exists() {
            return Ok(kernel);
        }
        unpack("user-mode-linux", &folder)?;
        fs::rename(folder.join("usr/bin/linux.uml"), folder.join(PROGRAM))?;
        // Where `modprobe -d` looks for them.
        fs::create_dir_all(folder.join("lib"))?;
        fs::rename(
            folder.join("usr/lib/uml/modules"),
            folder.join("lib/modules"),
        )?;
        let modules = find(&folder.join("lib/modules"), "", "")?;
        let version = modules.file_name().unwrap_or_default();
        step(
            Command::new("/sbin/depmod")
                .arg("--basedir")
                .arg(&folder)
                .arg(version),
            "listing the modules of the kernel",
        )?;
        fs::write(folder.join("complete"), "")?;
        Ok(kernel)
    }

    pub(super) fn program(&self) -> PathBuf {
        self.folder.join(PROGRAM)
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Built => write!(f, "the built kernel in {}", self.folder.display()),
            Kind::Packaged => write!(
                f,
                "the packaged kernel, which has no xfrm interfaces, AF_XDP and netdevsim; `cargo xtask vm --build` builds one that does"
            ),
        }
    }
}

/// Configures and compiles the kernel in `work`.
fn compile(work: &Path) -> anyhow::Result<()> {
    let make = || {
        let mut make = Command::new("make");
        make.current_dir(work).args(["--silent", "ARCH=um"]);
        make
    };
    step(make().arg("defconfig"), "configuring the kernel")?;
    fs::write(work.join("guest.config"), OPTIONS)?;
    let merge = "scripts/kconfig/merge_config.sh";
    step(
        Command::new("sh")
            .current_dir(work)
            .args([merge, "-m", ".config", "guest.config"])
            .stdout(std::process::Stdio::null()),
        "configuring the kernel",
    )?;
    step(make().arg("olddefconfig"), "configuring the kernel")?;
    missing_options(&fs::read_to_string(work.join(".config"))?)?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    step(
        make().arg(format!("-j{jobs}")).arg(PROGRAM),
        "compiling the kernel",
    )
}

/// Fails if an option that was asked for was not granted.
fn missing_options(config: &str) -> anyhow::Result<()> {
    let granted = |option: &&str| config.lines().any(|line| line == *option);
    let missing: Vec<_> = OPTIONS
        .lines()
        .filter(|line| line.ends_with("=y"))
        .filter(|option| !granted(option))
        .collect();
    ensure!(
        missing.is_empty(),
        "this kernel cannot have {}",
        missing.join(", ")
    );
    Ok(())
}

/// Downloads a package and unpacks it into a new folder; nothing is installed.
fn unpack(package: &str, folder: &Path) -> anyhow::Result<()> {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    // Lists of packages that are weeks old name files that the mirrors no longer have.
    let download = || {
        output_of(
            Command::new("apt-get")
                .current_dir(folder)
                .args(["--quiet", "download", package]),
        )
    };
    if download().is_err() {
        step(
            Command::new("apt-get").args(["--quiet", "update"]),
            "apt-get update",
        )?;
        download().with_context(|| format!("the package {package} cannot be had"))?;
    }
    let file = find(folder, package, ".deb")?;
    step(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(&file)
            .arg(folder),
        "unpacking a package",
    )?;
    fs::remove_file(file)?;
    Ok(())
}

/// The one file of a folder that begins and ends like that.
fn find(folder: &Path, start: &str, end: &str) -> anyhow::Result<PathBuf> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(start) && name.ends_with(end) {
            return Ok(path);
        }
    }
    anyhow::bail!("there is no {start}..{end} in {}", folder.display())
}

/// Where kernels are kept.
fn cache() -> anyhow::Result<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set")?;
    Ok(base.join("ipsec-xdp"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_that_was_not_granted_is_named() {
        let all: String = OPTIONS.lines().map(|line| format!("{line}\n")).collect();
        assert!(missing_options(&all).is_ok());
        let without = all.replace("CONFIG_INET_ESP=y\n", "# CONFIG_INET_ESP is not set\n");
        let error = missing_options(&without).unwrap_err().to_string();
        assert_eq!(error, "this kernel cannot have CONFIG_INET_ESP=y");
    }
}
