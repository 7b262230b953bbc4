//! Releases of a peer: the one that is installed, and others unpacked from other suites of the distribution.
//!
//! Unpacked ones live in a folder under `target/peers` and never touch the system's packages. Their programs run with
//! that folder as their root, so that they find their own libraries and plugins.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context;
use tempfile::TempDir;

use crate::{
    command::{find, line, output},
    netns::Netns,
};

/// The mirror that names whatever mirror is near.
const MIRROR: &str = "http://deb.debian.org/debian";
/// Signatures of the distribution, all releases.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where a peer's programs are.
#[derive(Clone, Debug, Default)]
pub struct Release {
    root: Option<PathBuf>,
}

impl Release {
    /// What the system has installed.
    pub fn installed() -> Self {
        Self::default()
    }

    /// Packages of a suite, unpacked once and kept.
    ///
    /// # Errors
    ///
    /// There is no mmdebstrap, or no way to the mirror.
    pub fn unpacked(suite: &str, packages: &[&str]) -> anyhow::Result<Self> {
        let peers = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers");
        fs::create_dir_all(&peers)?;
        let peers = peers.canonicalize()?;
        let root = peers.join(format!("{}-{suite}", packages[0]));
        if root.is_dir() {
            return Ok(Self { root: Some(root) });
        }
        let mmdebstrap = find("mmdebstrap").context("mmdebstrap is not installed")?;
        // A run that is killed must not leave half a root under the final name.
        let scratch = tempfile::Builder::new().prefix("new-").tempdir_in(&peers)?;
        let fresh = scratch.path().join("root");
        let made = output(
            Command::new(mmdebstrap)
                .args(["--quiet", "--mode=root", "--variant=extract"])
                .arg("--aptopt=Acquire::Check-Valid-Until \"false\"")
                .arg(format!("--keyring={KEYRING}"))
                .arg(format!("--include=base-files,{}", packages.join(",")))
                .arg(suite)
                .arg(&fresh)
                .arg(MIRROR),
        )?;
        anyhow::ensure!(
            made.status.success(),
            "mmdebstrap {suite}: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        fs::create_dir_all(fresh.join("dev/net"))?;
        line(&format!("mknod {}/dev/net/tun c 10 200", fresh.display()))?;
        fs::rename(&fresh, &root)?;
        Ok(Self { root: Some(root) })
    }

    /// Gives an unpacked peer what it needs besides its files: a place for temporary ones, where its root is read-only
    /// as in a guest, and /proc.
    ///
    /// # Errors
    ///
    /// mount's.
    pub fn make_usable(&self) -> anyhow::Result<()> {
        let Some(root) = &self.root else {
            return Ok(());
        };
        for folder in ["tmp", "run"] {
            let folder = root.join(folder);
            if tempfile::tempfile_in(&folder).is_err() {
                line(&format!("mount -t tmpfs new {}", folder.display()))?;
            }
        }
        let proc = root.join("proc");
        if !proc.join("self").exists() {
            line(&format!("mount -t proc proc {}", proc.display()))?;
        }
        Ok(())
    }

    /// A folder for a peer's files, which both it and we can reach.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn folder(&self, prefix: &str) -> anyhow::Result<TempDir> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(prefix);
        Ok(match &self.root {
            Some(root) => builder.tempdir_in(root.join("tmp"))?,
            None => builder.tempdir()?,
        })
    }

    /// A path as its programs see it.
    pub fn seen(&self, path: &Path) -> PathBuf {
        self.root
            .as_ref()
            .and_then(|root| path.strip_prefix(root).ok())
            .map_or_else(|| path.to_owned(), |rest| Path::new("/").join(rest))
    }

    /// A command of this release.
    ///
    /// # Errors
    ///
    /// It has no such program.
    pub fn command(&self, program: &str) -> anyhow::Result<Command> {
        let words = self.words(program)?;
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        Ok(command)
    }

    /// A command of this release that will run in a namespace.
    ///
    /// # Errors
    ///
    /// As for [`Self::command`].
    pub fn command_in(&self, netns: &Netns, program: &str) -> anyhow::Result<Command> {
        let words = self.words(program)?;
        let mut command = netns.command(&words[0])?;
        command.args(&words[1..]);
        Ok(command)
    }

    fn words(&self, program: &str) -> anyhow::Result<Vec<String>> {
        let Some(root) = &self.root else {
            let path = find(program).with_context(|| format!("{program} is not installed"))?;
            return Ok(vec![path.display().to_string()]);
        };
        let folder = ["usr/sbin", "usr/bin", "usr/libexec/ipsec"]
            .into_iter()
            .find(|folder| root.join(folder).join(program).is_file())
            .with_context(|| format!("{} has no {program}", root.display()))?;
        Ok(vec![
            "chroot".to_owned(),
            root.display().to_string(),
            format!("/{folder}/{program}"),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unpacked_peer_sees_its_root_as_the_top() {
        let release = Release {
            root: Some(PathBuf::from("/cache/peer")),
        };
        let seen = |path| release.seen(Path::new(path));
        assert_eq!(seen("/cache/peer/tmp/x"), Path::new("/tmp/x"));
        assert_eq!(seen("/elsewhere"), Path::new("/elsewhere"));
        let installed = Release::installed();
        assert_eq!(installed.seen(Path::new("/tmp/x")), Path::new("/tmp/x"));
    }
}
