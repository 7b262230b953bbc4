//! Debian packages whose files a guest uses: fetched and unpacked outside the checkout, once, and never installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context;

use super::output_of;
use crate::setup::step;

/// Downloads packages and unpacks them into a new folder; nothing is installed.
///
/// Names are asked for again after an update of the lists of packages: what a package depends on may have another one then.
pub(super) fn unpack(
    names: impl Fn() -> anyhow::Result<Vec<String>>,
    folder: &Path,
) -> anyhow::Result<()> {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let download = || {
        let names = names()?;
        output_of(
            Command::new("apt-get")
                .current_dir(folder)
                .args(["--quiet", "download"])
                .args(&names),
        )
        .with_context(|| format!("{} cannot be had", names.join(", ")))
    };
    // Lists of packages that are weeks old name files that the mirrors no longer have.
    if download().is_err() {
        step(
            Command::new("apt-get").args(["--quiet", "update"]),
            "apt-get update",
        )?;
        download()?;
    }
    while let Ok(file) = find(folder, "", ".deb") {
        output_of(
            Command::new("dpkg-deb")
                .arg("--extract")
                .arg(&file)
                .arg(folder),
        )?;
        fs::remove_file(file)?;
    }
    Ok(())
}

/// Has modules of an unpacked package listed where `modprobe --dirname` looks for them; tells their kernel's version.
pub(super) fn list_modules(folder: &Path, unpacked: &Path) -> anyhow::Result<String> {
    let expected = folder.join("lib/modules");
    if unpacked != expected {
        fs::create_dir_all(folder.join("lib"))?;
        fs::rename(unpacked, &expected)?;
    }
    let modules = find(&expected, "", "")?;
    let version = modules.file_name().unwrap_or_default();
    step(
        Command::new("/sbin/depmod")
            .arg("--basedir")
            .arg(folder)
            .arg(version),
        "listing the modules of the kernel",
    )?;
    Ok(version.to_string_lossy().into_owned())
}

/// An entry of a folder that begins and ends like that.
pub(super) fn find(folder: &Path, start: &str, end: &str) -> anyhow::Result<PathBuf> {
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
pub(super) fn cache() -> anyhow::Result<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set")?;
    Ok(base.join("ipsec-xdp"))
}
