//! A guest in user-mode Linux: a kernel that runs as a process, whose files are this machine's.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use super::Guest;
use crate::command::{cargo, workspace};

/// The longest extended state of a processor that this kernel passes on whole, in bytes: that of AVX-512.
const LONGEST_STATE: u32 = 2696;

/// The kernel with everything that the guest needs, its output on descriptor 0; the first process is told `facts`.
///
/// # Errors
///
/// What this machine's processor needs besides cannot be built.
pub(super) fn command(
    guest: &Guest,
    control: &Path,
    facts: &[(&str, String)],
) -> anyhow::Result<Command> {
    let folder = control.display();
    let mut command = Command::new(guest.kernel.program());
    command
        .arg(format!("mem={}M", guest.memory))
        // The root is this machine's, read-only.
        .args([
            "rootfstype=hostfs",
            "root=98:0",
            "rootflags=/",
            "ro",
            "quiet",
        ])
        .arg(format!("init={folder}/init"))
        .args(facts.iter().map(|(name, value)| format!("{name}={value}")))
        .arg(format!("uml_dir={folder}/"))
        // Its serial line is the output. It is the descriptor 0, for 1 and 2 get the kernel's own words.
        .args(["con=null", "con0=null,fd:1", "ssl=null", "ssl0=null,fd:0"])
        .env("TMPDIR", "/dev/shm"); // the guest's memory is a file, which must not be on a disk
    if state_length() > LONGEST_STATE {
        command.env("LD_PRELOAD", preload()?);
    }
    Ok(command)
}

/// Bytes of the extended state that the kernel of this machine keeps of each process (CPUID leaf 13).
fn state_length() -> u32 {
    #[cfg(target_arch = "x86_64")]
    let length = std::arch::x86_64::__cpuid_count(0xd, 0).ebx;
    #[cfg(not(target_arch = "x86_64"))]
    let length = 0;
    length
}

/// Builds what completes states that are longer, and tells where it is.
fn preload() -> anyhow::Result<PathBuf> {
    cargo(&["build", "--quiet", "--package", "guest-preload"])?;
    Ok(workspace().join("target/debug/libguest_preload.so"))
}
