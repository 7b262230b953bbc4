//! One run of a guest: a command goes in, its output and status come out.

use std::{
    fs::{self, File},
    io,
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

use super::{Kernel, kernel::Kind, machine, user_mode};
use crate::command::workspace;

/// The first process of the guest.
const INIT: &str = include_str!("init.sh");

/// The file through which it gives signs of life.
const ALIVE: &str = "alive";
/// Without a sign of life for so long, a guest is frozen: it gives one every 5 s.
const FROZEN: Duration = Duration::from_secs(90);

/// The guest itself is no good, whatever the command did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoGuest {
    /// Its kernel stood still: no process of it ran any more.
    Frozen,
    /// Its kernel ended before there was a process: this machine cannot run it.
    Stillborn,
}

impl std::fmt::Display for NoGuest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Frozen => write!(
                f,
                "the guest's kernel stood still for {} s and was ended",
                FROZEN.as_secs()
            ),
            Self::Stillborn => write!(
                f,
                "the guest's kernel does not come up on this machine; its last words are above"
            ),
        }
    }
}

impl std::error::Error for NoGuest {}

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
    /// The guest did not start, or ended before the command did; [`NoGuest`] where that is its kernel's fault.
    pub(crate) fn run(&self, command: &[String]) -> anyhow::Result<i32> {
        let (mut output, writer) = io::pipe().context("a pipe")?;
        thread::scope(|scope| {
            let passed_on = scope.spawn(move || io::copy(&mut output, &mut io::stdout()));
            let status = self.run_to(command, writer.into());
            match passed_on.join() {
                Ok(copied) => copied.context("output of the guest").and(status),
                Err(cause) => std::panic::resume_unwind(cause),
            }
        })
    }

    /// As [`Self::run`], with the output going elsewhere.
    ///
    /// # Errors
    ///
    /// As [`Self::run`].
    pub(crate) fn run_to(&self, command: &[String], output: Stdio) -> anyhow::Result<i32> {
        let control = Control::create()?;
        let folder = control.0.as_path();
        fs::write(folder.join("init"), INIT)?;
        make_executable(&folder.join("init"))?;
        fs::write(folder.join("command"), self.script(command))?;
        let console = File::options()
            .create(true)
            .append(true)
            .open(folder.join("console"))?;
        let guest = self.start(folder, output, console)?;
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
            bail!(NoGuest::Frozen);
        }
        if !control.0.join(ALIVE).exists() {
            bail!(NoGuest::Stillborn);
        }
        match status.code() {
            Some(124 | 137) => bail!("the guest was ended after {} s", self.limit.as_secs()),
            _ => bail!("the guest ended before its command did ({status})"),
        }
    }

    /// Starts its kernel, which ends with the thread that started it.
    fn start(&self, control: &Path, output: Stdio, console: File) -> anyhow::Result<Child> {
        let (share, options, line) = match self.kernel.kind {
            Kind::Built | Kind::Packaged => ("hostfs", control.display().to_string(), "/dev/ttyS0"),
            Kind::Full => (
                "9p",
                "trans=virtio,version=9p2000.L,cache=none".to_owned(),
                "/dev/ttyS1",
            ),
        };
        // A kernel passes what it does not know on to the first process, as environment.
        let facts = [
            ("CONTROL", control.display().to_string()),
            ("CONTROL_TYPE", share.to_owned()),
            ("CONTROL_OPTIONS", options),
            ("OUTPUT", line.to_owned()),
            ("KERNEL", self.kernel.folder.display().to_string()),
            ("CHECKOUT", workspace().display().to_string()),
        ];
        let kernel = match self.kernel.kind {
            Kind::Built | Kind::Packaged => user_mode::command(self, control, &facts)?,
            Kind::Full => machine::command(self, control, &facts)?,
        };
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "TERM", "timeout", "--kill-after=5"])
            .arg(self.limit.as_secs().to_string())
            .arg(kernel.get_program())
            .args(kernel.get_args())
            .envs(
                kernel
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .stderr(console.try_clone()?);
        match self.kernel.kind {
            Kind::Built | Kind::Packaged => command.stdin(output).stdout(console),
            Kind::Full => command.stdin(Stdio::null()).stdout(output),
        };
        command
            .spawn()
            .context("the guest's kernel cannot be started")
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

/// Its name begins so, and goes on with the number of our process.
const CONTROL: &str = "ipsec-xdp-guest-";

/// Removes what runs left behind that were killed. Their guests ended with them.
pub(crate) fn sweep() {
    for entry in fs::read_dir(std::env::temp_dir())
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name();
        if name
            .to_str()
            .and_then(owner)
            .is_some_and(|owner| !Path::new("/proc").join(owner).exists())
        {
            // That of another user stays.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// The number of the process that a folder belongs to, by the folder's name.
fn owner(name: &str) -> Option<&str> {
    let owner = name.strip_prefix(CONTROL)?.split('-').next()?;
    owner
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then_some(owner)
}

impl Control {
    fn create() -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        sweep();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{CONTROL}{}-{number}", std::process::id());
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
            let tells = fs::read(self.0.join(ALIVE)).unwrap_or_default();
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

pub(super) fn make_executable(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_guests_tell_whose_they_are() {
        assert_eq!(owner("ipsec-xdp-guest-193-2"), Some("193"));
        assert_eq!(owner("ipsec-xdp-guest-193"), Some("193"));
        assert_eq!(owner("ipsec-xdp-guest-mine"), None);
        assert_eq!(owner("another"), None);
    }

    #[test]
    fn words_of_a_command_reach_the_guest_as_they_are() {
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's $HOME"), r"'it'\''s $HOME'");
    }
}
