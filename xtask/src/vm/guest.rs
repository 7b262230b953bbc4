//! One run of a guest: a command goes in, its output and status come out.

use std::{
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::Kernel;
use crate::command::workspace;

/// The first process of the guest.
const INIT: &str = include_str!("init.sh");

/// Without a sign of life for so long, a guest is frozen: it gives one every 5 s.
const FROZEN: Duration = Duration::from_secs(90);

/// The guest's kernel stood still: no process of it ran any more. Whatever the command did, it is not what hangs.
#[derive(Debug)]
pub(crate) struct Frozen;

impl std::fmt::Display for Frozen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "the guest's kernel stood still for {} s and was ended",
            FROZEN.as_secs()
        )
    }
}

impl std::error::Error for Frozen {}

/// A guest that is about to run.
#[derive(Debug)]
pub(crate) struct Guest {
    /// Its kernel.
    pub(crate) kernel: Kernel,
    /// Its memory in MiB.
    pub(crate) memory: u32,
    /// When it is ended.
    pub(crate) limit: Duration,
    /// Variables of the command's environment, beside PATH and HOME.
    pub(crate) environment: Vec<(String, String)>,
}

impl Guest {
    /// Runs a command as root in the guest, its output passed on as it comes, and returns its status.
    ///
    /// # Errors
    ///
    /// The guest did not start, or ended before the command did; [`Frozen`] if its kernel stood still.
    pub(crate) fn run(&self, command: &[String]) -> anyhow::Result<i32> {
        self.run_to(
            command,
            Stdio::from(std::io::stdout().as_fd().try_clone_to_owned()?),
        )
    }

    /// As [`Self::run`], with the output going elsewhere.
    ///
    /// # Errors
    ///
    /// As [`Self::run`].
    pub(crate) fn run_to(&self, command: &[String], output: Stdio) -> anyhow::Result<i32> {
        let control = Control::create()?;
        let folder = control.0.display().to_string();
        fs::write(control.0.join("init"), INIT)?;
        make_executable(&control.0.join("init"))?;
        fs::write(control.0.join("command"), self.script(command))?;
        let console = fs::File::create(control.0.join("console"))?;
        let guest = Command::new("timeout")
            .arg("--kill-after=5")
            .arg(self.limit.as_secs().to_string())
            .arg(self.kernel.program())
            .arg(format!("mem={}M", self.memory))
            // The root is this machine's, read-only.
            .args([
                "rootfstype=hostfs",
                "root=98:0",
                "rootflags=/",
                "ro",
                "quiet",
            ])
            .arg(format!("init={folder}/init"))
            .arg(format!("CONTROL={folder}"))
            .arg(format!("KERNEL={}", self.kernel.folder.display()))
            .arg(format!("CHECKOUT={}", workspace().display()))
            .arg(format!("uml_dir={folder}/"))
            // Its serial line is the output. It is the descriptor 0, for 1 and 2 get the kernel's own words.
            .args(["con=null", "con0=null,fd:1", "ssl=null", "ssl0=null,fd:0"])
            .env("TMPDIR", "/dev/shm") // the guest's memory is a file, which must not be on a disk
            .stdin(output)
            .stdout(console.try_clone()?)
            .stderr(console)
            .spawn()
            .context("the guest's kernel cannot be started")?;
        let (status, frozen) = control.watch(guest)?;
        if let Ok(code) = fs::read_to_string(control.0.join("status")) {
            return code.trim().parse().context("status of the guest's command");
        }
        let console = fs::read_to_string(control.0.join("console")).unwrap_or_default();
        let last: Vec<_> = console.lines().rev().take(20).collect();
        for line in last.iter().rev() {
            eprintln!("vm: {line}");
        }
        if frozen {
            bail!(Frozen);
        }
        match status.code() {
            Some(124 | 137) => bail!("the guest was ended after {} s", self.limit.as_secs()),
            _ => bail!("the guest ended before its command did ({status})"),
        }
    }

    /// The command as a script, with its environment.
    fn script(&self, command: &[String]) -> String {
        let inherited = ["PATH", "HOME"]
            .into_iter()
            .filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?)));
        let exports: String = inherited
            .chain(self.environment.iter().cloned())
            .map(|(name, value)| format!("export {name}={}\n", quote(&value)))
            .collect();
        let words: Vec<_> = command.iter().map(|word| quote(word)).collect();
        format!(
            "{exports}cd {}\nexec {}\n",
            quote(&workspace().display().to_string()),
            words.join(" ")
        )
    }
}

/// A word as the shell takes it literally.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The folder through which this side and the guest exchange files.
struct Control(PathBuf);

impl Control {
    fn create() -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ipsec-xdp-guest-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }

    /// Waits for the end of a guest and ends it if it is frozen; tells its status, and whether it was frozen.
    fn watch(&self, mut guest: Child) -> anyhow::Result<(ExitStatus, bool)> {
        let (mut told, mut since, mut frozen) = (Vec::new(), Instant::now(), false);
        loop {
            if let Some(status) = guest.try_wait()? {
                return Ok((status, frozen));
            }
            let tells = fs::read(self.0.join("alive")).unwrap_or_default();
            if tells != told {
                (told, since) = (tells, Instant::now());
            }
            if !frozen && since.elapsed() > FROZEN {
                frozen = true;
                // The child is `timeout`, which passes the signal on.
                kill(Pid::from_raw(guest.id().try_into()?), Signal::SIGTERM)?;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("vm: {} stays behind: {error}", self.0.display());
        }
    }
}

fn make_executable(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_command_reach_the_guest_as_they_are() {
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's $HOME"), r"'it'\''s $HOME'");
    }
}
