//! Settings under /proc/sys, of the network namespace that the caller is in.

use std::{fs, io, path::PathBuf};

/// The file behind a setting such as `net.ipv4.conf.wan0.rp_filter`; names of interfaces may contain dots.
fn path(parts: &[&str]) -> PathBuf {
    let mut path = PathBuf::from("/proc/sys");
    path.extend(parts);
    path
}

/// Reads a setting.
///
/// # Errors
///
/// Those of the file system; `NotFound` where the kernel has no such setting.
pub fn get(parts: &[&str]) -> io::Result<String> {
    fs::read_to_string(path(parts)).map(|text| text.trim().to_owned())
}

/// Changes a setting.
///
/// # Errors
///
/// Those of the file system.
pub fn set(parts: &[&str], value: &str) -> io::Result<()> {
    fs::write(path(parts), value)
}
