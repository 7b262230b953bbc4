//! The BPF file system, in which pins outlive the process that made them.

use std::{fs::File, path::Path};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

/// Where it belongs.
pub const MOUNT_POINT: &str = "/sys/fs/bpf";

/// Whether it is mounted where it belongs.
///
/// # Errors
///
/// Those of statfs(2); `ENOENT` from a kernel without BPF.
pub fn is_mounted() -> nix::Result<bool> {
    Ok(statfs(MOUNT_POINT)?.filesystem_type() == BPF_FS_MAGIC)
}

/// Mounts it where nobody has, as systemd does at boot. That takes CAP_SYS_ADMIN, which the data plane gives up.
///
/// # Errors
///
/// Those of statfs(2), flock(2) and mount(2).
pub fn ensure_mounted() -> nix::Result<()> {
    if is_mounted()? {
        return Ok(());
    }
    // Two gateways that start at once: the mount of the second would hide the pins of the first.
    let folder = File::open(Path::new(MOUNT_POINT))
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
    let _alone = Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    if is_mounted()? {
        return Ok(());
    }
    let nothing: Option<&str> = None;
    mount(
        Some("bpf"),
        MOUNT_POINT,
        Some("bpf"),
        MsFlags::empty(),
        nothing,
    )
}
