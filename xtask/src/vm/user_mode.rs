//! A guest in user-mode Linux: a kernel that runs as a process, whose files are this machine's.

use std::{path::Path, process::Command};

use super::Guest;

/// The kernel with everything that the guest needs, its output on descriptor 0; the first process is told `facts`.
pub(super) fn command(guest: &Guest, control: &Path, facts: &[(&str, String)]) -> Command {
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
    command
}
