//! Network namespaces: made, entered, and removed with everything that runs in them.
//!
//! Entered by `setns` alone: `ip netns exec` also makes a mount namespace, which hides `/sys/fs/bpf`.
#![expect(
    unsafe_code,
    reason = "a child process enters its namespace between fork and exec"
)]

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, anyhow};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::command::{line, run};

/// All names of this project's namespaces begin so.
const PREFIX: &str = "ipx-";
/// Where iproute2 keeps named namespaces.
const FOLDER: &str = "/run/netns";
/// Where the data plane keeps its pins, a folder for each instance.
const PINS: &str = "/sys/fs/bpf/ipsec-xdp";

/// A namespace; removed when dropped, with the processes in it.
#[derive(Debug)]
pub struct Netns {
    name: String,
    keep: bool,
}

/// Names of one topology: `ipx-PID-NUMBER`, or `ipx-TAG` for one that outlives the process.
#[derive(Clone, Debug)]
pub struct Scope {
    prefix: String,
}

impl Scope {
    /// Names that no other test of this or another process uses.
    pub fn of_this_test() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self {
            prefix: format!("{PREFIX}{}-{number}", std::process::id()),
        }
    }

    /// Names under a fixed tag, which is not a number: nothing but [`Scope::sweep`] removes what a process left.
    pub fn tagged(tag: &str) -> Self {
        Self {
            prefix: format!("{PREFIX}{tag}"),
        }
    }

    /// The full name of one namespace.
    pub fn name(&self, what: &str) -> String {
        format!("{}-{what}", self.prefix)
    }

    /// Removes every namespace and pin under these names.
    pub fn sweep(&self) {
        let prefix = format!("{}-", self.prefix);
        remove_all(|name| name.starts_with(&prefix));
    }
}

impl Netns {
    /// Makes a namespace with its loopback up.
    ///
    /// # Errors
    ///
    /// Not root, or the name is taken.
    pub fn create(name: &str) -> anyhow::Result<Self> {
        line(&format!("ip netns add {name}"))?;
        let netns = Self {
            name: name.to_owned(),
            keep: false,
        };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Leaves it behind on drop.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Runs `ip -n NAME ...`.
    ///
    /// # Errors
    ///
    /// What `ip` said.
    pub fn ip(&self, arguments: &str) -> anyhow::Result<String> {
        line(&format!("ip -n {} {arguments}", self.name))
    }

    /// Runs a program in it and returns its output.
    ///
    /// # Errors
    ///
    /// As for [`crate::command::run`].
    pub fn exec(&self, text: &str) -> anyhow::Result<String> {
        let mut words = text.split_whitespace();
        let mut command = self.command(words.next().context("an empty command")?)?;
        crate::command::checked(command.args(words))
    }

    /// A command that will run in it.
    ///
    /// # Errors
    ///
    /// The namespace is gone.
    pub fn command(&self, program: &str) -> anyhow::Result<Command> {
        let handle = self.open()?;
        let mut command = Command::new(program);
        let enter = move || setns(&handle, CloneFlags::CLONE_NEWNET).map_err(io::Error::from);
        // SAFETY: between fork and exec only the system call setns is made; it neither allocates nor locks.
        unsafe { command.pre_exec(enter) };
        Ok(command)
    }

    /// Runs a closure in a thread of its own inside; sockets it opens stay in the namespace wherever they are used.
    ///
    /// # Errors
    ///
    /// The namespace is gone, the closure failed or panicked.
    pub fn run<T: Send>(
        &self,
        work: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        let handle = self.open()?;
        thread::scope(|scope| {
            scope
                .spawn(move || {
                    setns(&handle, CloneFlags::CLONE_NEWNET).context("entering a namespace")?;
                    work()
                })
                .join()
                .map_err(|_| anyhow!("a thread in {} panicked", self.name))?
        })
    }

    /// Sets a sysctl of the namespace, dots or slashes between its parts.
    ///
    /// # Errors
    ///
    /// There is no such sysctl.
    pub fn sysctl(&self, key: &str, value: &str) -> anyhow::Result<()> {
        let path = PathBuf::from("/proc/sys").join(key.replace('.', "/"));
        self.run(|| fs::write(&path, value).with_context(|| format!("{key} = {value}")))
    }

    pub(crate) fn open(&self) -> anyhow::Result<File> {
        let path = PathBuf::from(FOLDER).join(&self.name);
        File::open(&path).with_context(|| path.display().to_string())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if !self.keep {
            remove(&self.name);
        }
    }
}

/// Removes what killed runs left: namespaces and pins named after a process that is gone.
pub fn sweep() {
    remove_all(|name| {
        let owner = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next())
            .and_then(|pid| pid.parse::<u32>().ok());
        owner.is_some_and(|pid| !PathBuf::from(format!("/proc/{pid}")).exists())
    });
}

fn remove_all(condemned: impl Fn(&str) -> bool) {
    let names: HashSet<String> = [FOLDER, PINS]
        .into_iter()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(PREFIX) && condemned(name))
        .collect();
    for name in names {
        remove(&name);
    }
}

/// Removes a namespace with its processes and the pins of the instance of the same name.
fn remove(name: &str) {
    // Failures are of no interest here: what is gone already need not be removed.
    for _ in 0..20 {
        let pids = run("ip", &["netns", "pids", name]).unwrap_or_default();
        let pids: Vec<i32> = pids
            .lines()
            .filter_map(|pid| pid.trim().parse().ok())
            .collect();
        if pids.is_empty() {
            break;
        }
        for pid in pids {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        thread::sleep(Duration::from_millis(20));
    }
    let _ = run("ip", &["netns", "del", name]);
    remove_pins(&PathBuf::from(PINS).join(name));
}

/// bpffs holds pins and folders; removing a pin drops the kernel's reference.
fn remove_pins(folder: &std::path::Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_pins(&entry.path());
        } else {
            let _ = fs::remove_file(entry.path());
        }
    }
    let _ = fs::remove_dir(folder);
}
