//! The kernels that a guest can run, each made once.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};

use super::{
    machine,
    packages::{cache, find, list_modules, unpack},
};
use crate::setup::step;

/// The distribution's package with the source of the kernel that is built.
const SOURCE: &str = "linux-source-6.12";
/// What the built kernel has beyond the defaults of user-mode Linux.
const OPTIONS: &str = include_str!("kernel.config");
/// The name of a kernel in its folder.
const PROGRAM: &str = "linux";

/// A kernel that a guest can run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// The folder with the kernel, and with its modules if it has any.
    pub(super) folder: PathBuf,
    pub(super) kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// User-mode Linux, built here.
    Built,
    /// User-mode Linux as the distribution has it.
    Packaged,
    /// The kernel that the distribution boots machines with.
    Full,
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
        unpack(|| Ok(vec![SOURCE.to_owned()]), &work)?;
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
        Self::once("packaged", Kind::Packaged, |folder| {
            unpack(|| Ok(vec!["user-mode-linux".to_owned()]), folder)?;
            fs::rename(folder.join("usr/bin/linux.uml"), folder.join(PROGRAM))?;
            list_modules(folder, &folder.join("usr/lib/uml/modules")).map(drop)
        })
    }

    /// The kernel that the distribution boots machines with, fetched and unpacked unless that has been done.
    ///
    /// # Errors
    ///
    /// The step that failed.
    pub(crate) fn full() -> anyhow::Result<Self> {
        Self::once("full", Kind::Full, |folder| {
            machine::prepare(folder, PROGRAM)
        })
    }

    /// What `prepare` makes in a folder of this name, now or earlier.
    fn once(
        name: &str,
        kind: Kind,
        prepare: impl FnOnce(&Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let folder = cache()?.join(name);
        let complete = folder.join("complete");
        if !complete.exists() {
            prepare(&folder)?;
            fs::write(complete, "")?;
        }
        Ok(Self { folder, kind })
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
            Kind::Full => write!(
                f,
                "the distribution's kernel in {}, under QEMU",
                self.folder.display()
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
