//! `ipsec-ctl run` in a namespace: its configuration, its control socket, its log, and how it lives and dies.

use std::{
    fs::{self, File},
    io::Write,
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, anyhow, bail, ensure};
use ipsec_ctl::{
    api::{
        client::{Client, ClientError},
        model::{self, Counter, State, Status},
    },
    dataplane::probe::Finding,
    net::bpf_fs::MOUNT_POINT,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::from_str;
use tempfile::{TempDir, TempPath};

use crate::{
    command::{checked, run, tail, wait_for},
    netns::Netns,
    topology::{Family, Side},
};

/// Longest that a daemon may take to set its tunnels up: a thousand take long on a slow machine.
const START: Duration = Duration::from_secs(120);
/// The key of all tests.
pub const PSK: &str = "a key for tests only";

/// One tunnel of a configuration.
#[derive(Clone, Debug)]
pub struct Tunnel {
    /// Its name.
    pub name: String,
    /// The peer's address, or `any`.
    pub peer: String,
    /// Our identity.
    pub local_id: String,
    /// The peer's identity; empty where it may be any.
    pub remote_id: String,
    /// The pre-shared key.
    pub psk: String,
    /// Further lines of the tunnel: `role = "respond"`.
    pub lines: Vec<String>,
    /// Its children.
    pub children: Vec<ChildSettings>,
}

/// One child of a tunnel.
#[derive(Clone, Debug)]
pub struct ChildSettings {
    /// Its name.
    pub name: String,
    /// Our selectors.
    pub local: Vec<String>,
    /// The peer's selectors.
    pub remote: Vec<String>,
    /// Further lines: `esp = ["aes256gcm16"]`.
    pub lines: Vec<String>,
}

impl Tunnel {
    /// From one gateway of the topology to the other, with one child `net` between the two sites.
    pub fn between_sites(side: Side, family: Family) -> Self {
        let id = |side: Side| format!("{}.example", side.letter());
        let other = side.other();
        Self {
            name: "site".to_owned(),
            peer: other.outside(family).to_string(),
            local_id: id(side),
            remote_id: id(other),
            psk: PSK.to_owned(),
            lines: Vec::new(),
            children: vec![ChildSettings {
                name: "net".to_owned(),
                local: vec![side.prefix(family)],
                remote: vec![other.prefix(family)],
                lines: Vec::new(),
            }],
        }
    }

    /// With one more line.
    pub fn with(mut self, line: &str) -> Self {
        self.lines.push(line.to_owned());
        self
    }

    /// With one IKE and one ESP proposal.
    pub fn suite(mut self, ike: &str, esp: &str) -> Self {
        for child in &mut self.children {
            child.lines.push(format!("esp = [\"{esp}\"]"));
        }
        self.with(&format!("ike = [\"{ike}\"]"))
    }

    /// Waits for the peer instead of starting.
    pub fn respond(self) -> Self {
        self.with("role = \"respond\"")
    }

    /// Waits for the peer, which may call from anywhere.
    pub fn respond_to_any(mut self) -> Self {
        self.peer = "any".to_owned();
        self
    }

    fn render(&self) -> String {
        let mut text = format!(
            "[[tunnel]]\nname = \"{name}\"\npeer = \"{}\"\nlocal_id = \"{}\"\npsk_file = \"{name}.psk\"\n",
            self.peer,
            self.local_id,
            name = self.name
        );
        if !self.remote_id.is_empty() {
            text += &format!("remote_id = \"{}\"\n", self.remote_id);
        }
        for line in &self.lines {
            text += &format!("{line}\n");
        }
        for child in &self.children {
            text += &format!(
                "\n[[tunnel.child]]\nname = \"{}\"\nlocal = {:?}\nremote = {:?}\n",
                child.name, child.local, child.remote
            );
            for line in &child.lines {
                text += &format!("{line}\n");
            }
        }
        text
    }
}

/// A gateway: running or not, its files are there until it is dropped.
#[derive(Debug)]
pub struct Gateway<'a> {
    netns: &'a Netns,
    folder: TempDir,
    /// The file that runs, if it is not the program under test itself.
    program: Option<TempPath>,
    child: Option<Child>,
    kept: bool,
}

/// The program under test: `IPSEC_CTL`, or what cargo built beside the tests.
///
/// # Errors
///
/// There is none.
pub fn program() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("IPSEC_CTL") {
        return Ok(path.into());
    }
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let beside = std::env::current_exe()?
        .ancestors()
        .nth(2)
        .map(|folder| folder.join("ipsec-ctl"));
    beside
        .into_iter()
        .chain(["debug", "release"].map(|profile| target.join(profile).join("ipsec-ctl")))
        .find(|path| path.is_file())
        .context("there is no ipsec-ctl: cargo build -p ipsec-ctl")
}

/// Why the program under test finds no way to a fast path on this machine; `None` if it finds one, and so has to take it.
///
/// # Errors
///
/// It cannot look.
pub fn no_fast_path() -> anyhow::Result<Option<String>> {
    let shown = run(&program()?.display().to_string(), &["probe", "--json"])?;
    let findings: Vec<Finding> = from_str(&shown).context("probe --json")?;
    let of = |what: &str| {
        let found = findings.iter().find(|finding| finding.what == what);
        found.with_context(|| format!("`probe` tells nothing of {what}"))
    };
    for finding in [of("XDP program")?, of("AF_XDP")?] {
        if !finding.there {
            return Ok(Some(format!("{}: {}", finding.what, finding.found)));
        }
    }
    Ok(None)
}

impl<'a> Gateway<'a> {
    /// Writes the configuration and starts the daemon.
    ///
    /// # Errors
    ///
    /// It does not answer on its control socket; the error has its log.
    pub fn start(netns: &'a Netns, tunnels: &[Tunnel]) -> anyhow::Result<Self> {
        Self::start_with(netns, "", tunnels)
    }

    /// As [`Self::start`], with lines for the top of the configuration.
    ///
    /// # Errors
    ///
    /// As for [`Self::start`].
    pub fn start_with(netns: &'a Netns, top: &str, tunnels: &[Tunnel]) -> anyhow::Result<Self> {
        let mut gateway = Self::prepare(netns, top, tunnels)?;
        gateway.run()?;
        Ok(gateway)
    }

    /// Writes the configuration and starts nothing.
    ///
    /// # Errors
    ///
    /// The files cannot be written.
    pub fn prepare(netns: &'a Netns, top: &str, tunnels: &[Tunnel]) -> anyhow::Result<Self> {
        // A daemon keeps its journal beside its control socket, in memory only.
        let memory = Path::new("/dev/shm");
        let folders = if memory.is_dir() {
            memory.to_owned()
        } else {
            std::env::temp_dir()
        };
        let folder = tempfile::Builder::new()
            .prefix("ipx-gateway-")
            .tempdir_in(folders)?;
        let gateway = Self {
            netns,
            folder,
            program: None,
            child: None,
            kept: false,
        };
        gateway.configure(top, tunnels)?;
        Ok(gateway)
    }

    /// Writes another configuration; the daemon sees it at the next reload or start.
    ///
    /// # Errors
    ///
    /// The files cannot be written.
    pub fn configure(&self, top: &str, tunnels: &[Tunnel]) -> anyhow::Result<()> {
        let mut text = format!(
            "instance = \"{}\"\ncontrol_socket = \"{}\"\n{top}\n",
            self.netns.name(),
            self.file("control.sock").display()
        );
        for tunnel in tunnels {
            text += &format!("\n{}", tunnel.render());
            let key = self.file(&format!("{}.psk", tunnel.name));
            fs::write(&key, format!("{}\n", tunnel.psk))?;
            fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
        }
        fs::write(self.config(), text)?;
        Ok(())
    }

    /// Starts the daemon and waits until it can be asked.
    ///
    /// # Errors
    ///
    /// As for [`Self::start`].
    pub fn run(&mut self) -> anyhow::Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.file("log"))?;
        self.run_with_log(log)
    }

    /// As [`Self::run`], with a log of one's own: a file or a pipe.
    ///
    /// # Errors
    ///
    /// As for [`Self::start`].
    pub fn run_with_log(&mut self, log: impl Into<OwnedFd>) -> anyhow::Result<()> {
        let log = log.into();
        let program = match &self.program {
            Some(path) => path.to_path_buf(),
            None => program()?,
        };
        let child = self
            .netns
            .command(&program.display().to_string())?
            .arg("run")
            .arg("-c")
            .arg(self.config())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("ipsec-ctl cannot be started")?;
        self.child = Some(child);
        wait_for("ipsec-ctl run to answer", START, || {
            if let Some(status) = self
                .child
                .as_mut()
                .map(Child::try_wait)
                .transpose()?
                .flatten()
            {
                return Ok(Some(Err(anyhow!("ipsec-ctl ended: {status}"))));
            }
            self.status().map(|_| Some(Ok(())))
        })
        .and_then(|result| result)
        .with_context(|| format!("log of {}:\n{}", self.netns.name(), self.log(40)))
    }

    /// The state of everything.
    ///
    /// # Errors
    ///
    /// The daemon does not answer.
    pub fn status(&self) -> anyhow::Result<Status> {
        from_str(&self.ask(&["status", "--json"])?).context("status --json")
    }

    /// What `ipsec-ctl status` shows to people.
    ///
    /// # Errors
    ///
    /// The daemon does not answer.
    pub fn shown_status(&self) -> anyhow::Result<String> {
        self.ask(&["status"])
    }

    /// Counters by reason.
    ///
    /// # Errors
    ///
    /// The daemon does not answer.
    pub fn counters(&self) -> anyhow::Result<Vec<Counter>> {
        from_str(&self.ask(&["counters", "--json"])?).context("counters --json")
    }

    /// One counter.
    ///
    /// # Errors
    ///
    /// There is none of that name.
    pub fn counter(&self, name: &str) -> anyhow::Result<u64> {
        let counters = self.counters()?;
        let counter = counters.iter().find(|counter| counter.name == name);
        Ok(counter
            .with_context(|| format!("no counter {name}"))?
            .packets)
    }

    /// State of one tunnel.
    ///
    /// # Errors
    ///
    /// There is no such tunnel.
    pub fn tunnel(&self, name: &str) -> anyhow::Result<model::Tunnel> {
        let status = self.status()?;
        let tunnel = status
            .tunnels
            .into_iter()
            .find(|tunnel| tunnel.name == name);
        tunnel.with_context(|| format!("no tunnel {name}"))
    }

    /// Both SAs of a tunnel's first child: inbound and outbound.
    ///
    /// # Errors
    ///
    /// One is missing.
    pub fn directions(&self, tunnel: &str) -> anyhow::Result<[model::Direction; 2]> {
        let tunnel = self.tunnel(tunnel)?;
        let child = tunnel.children.first().context("no child")?;
        Ok([
            child.inbound.context("no inbound SA")?,
            child.outbound.context("no outbound SA")?,
        ])
    }

    /// SPIs of a tunnel's IKE SA and of what its first child receives on: others after a rekeying.
    ///
    /// # Errors
    ///
    /// It is not up.
    pub fn spis(&self, tunnel: &str) -> anyhow::Result<(String, u32)> {
        let tunnel = self.tunnel(tunnel)?;
        let child = tunnel.children.first().context("no child")?;
        let inbound = child.inbound.context("no inbound SA")?.spi;
        Ok((tunnel.ike.context("no IKE SA")?.initiator_spi, inbound))
    }

    /// Brings a tunnel up.
    ///
    /// # Errors
    ///
    /// What the daemon said.
    pub fn up(&self, tunnel: &str) -> anyhow::Result<String> {
        self.ask(&["up", tunnel])
    }

    /// Takes a tunnel down.
    ///
    /// # Errors
    ///
    /// What the daemon said.
    pub fn down(&self, tunnel: &str) -> anyhow::Result<String> {
        self.ask(&["down", tunnel])
    }

    /// Rekeys a tunnel's children.
    ///
    /// # Errors
    ///
    /// What the daemon said.
    pub fn rekey(&self, tunnel: &str) -> anyhow::Result<String> {
        self.ask(&["rekey", tunnel])
    }

    /// Rekeys a tunnel's IKE SA.
    ///
    /// # Errors
    ///
    /// What the daemon said.
    pub fn rekey_ike(&self, tunnel: &str) -> anyhow::Result<String> {
        self.ask(&["rekey", "--ike", tunnel])
    }

    /// Has another engine carry a tunnel.
    ///
    /// # Errors
    ///
    /// What the daemon said.
    pub fn move_to(&self, tunnel: &str, engine: &str) -> anyhow::Result<String> {
        self.ask(&["move", tunnel, engine])
    }

    /// Has the configuration read again.
    ///
    /// # Errors
    ///
    /// What the daemon said.
    pub fn reload(&self) -> anyhow::Result<String> {
        self.ask(&["reload"])
    }

    /// Waits until a tunnel and all its children are up.
    ///
    /// # Errors
    ///
    /// They are not within `patience`; the error has status and log.
    pub fn wait_up(&self, tunnel: &str, patience: Duration) -> anyhow::Result<model::Tunnel> {
        self.wait(tunnel, "up", patience, |tunnel| {
            tunnel.state == State::Up
                && tunnel.children.iter().all(|child| child.state == State::Up)
        })
    }

    /// Waits until a tunnel is in a wanted state.
    ///
    /// # Errors
    ///
    /// It is not within `patience`; the error has status and log.
    pub fn wait(
        &self,
        tunnel: &str,
        what: &str,
        patience: Duration,
        wanted: impl Fn(&model::Tunnel) -> bool,
    ) -> anyhow::Result<model::Tunnel> {
        let what = format!("tunnel {tunnel} of {} to be {what}", self.netns.name());
        wait_for(&what, patience, || {
            let state = self.tunnel(tunnel)?;
            if wanted(&state) {
                return Ok(Some(state));
            }
            bail!(
                "{:?}, {}",
                state.state,
                state.last_failure.unwrap_or_default()
            )
        })
        .with_context(|| format!("log of {}:\n{}", self.netns.name(), self.log(40)))
    }

    /// Kills the daemon as a crash would.
    ///
    /// # Errors
    ///
    /// It was not running.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        let mut child = self.child.take().context("the daemon is not running")?;
        child.kill()?;
        let status = child.wait()?;
        ensure!(
            status.signal() == Some(9),
            "the daemon had ended before: {status}"
        );
        Ok(())
    }

    /// Process id of its data plane, which is a process of its own.
    pub fn data_plane(&self) -> Option<u32> {
        let socket = self.socket().with_extension("data-plane");
        let socket = socket.to_str()?.as_bytes();
        fs::read_dir("/proc").ok()?.find_map(|entry| {
            let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let mut words = line.split(|byte| *byte == 0);
            (words.any(|word| word == b"data-plane") && words.any(|word| word == socket))
                .then_some(pid)
        })
    }

    /// Kills the data plane as a crash would.
    ///
    /// # Errors
    ///
    /// It was not running.
    pub fn kill_data_plane(&self) -> anyhow::Result<()> {
        let pid = self.data_plane().context("no data plane runs")?;
        kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
        Ok(())
    }

    /// Ends the daemon with SIGTERM, as a service manager does.
    ///
    /// # Errors
    ///
    /// It was not running, or does not end.
    pub fn stop(&mut self) -> anyhow::Result<ExitStatus> {
        self.end(Signal::SIGTERM)
    }

    /// Ends the daemon with SIGUSR1, so that it leaves its tunnels to the next one.
    ///
    /// # Errors
    ///
    /// It was not running, or does not end.
    pub fn leave(&mut self) -> anyhow::Result<ExitStatus> {
        self.end(Signal::SIGUSR1)
    }

    fn end(&mut self, signal: Signal) -> anyhow::Result<ExitStatus> {
        let mut child = self.child.take().context("the daemon is not running")?;
        kill(Pid::from_raw(i32::try_from(child.id())?), signal)?;
        let ended = wait_for("ipsec-ctl to end", Duration::from_secs(10), || {
            Ok(child.try_wait()?)
        });
        if ended.is_err() {
            child.kill()?;
            child.wait()?;
        }
        ended
    }

    /// Puts another file in the place of the one that runs, as an upgrade does; the next start runs it.
    ///
    /// # Errors
    ///
    /// It cannot be copied.
    pub fn upgrade(&mut self) -> anyhow::Result<()> {
        let path = tempfile::NamedTempFile::new()?.into_temp_path();
        fs::copy(program()?, &path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        self.program = Some(path);
        Ok(())
    }

    /// The next start finds no BPF file system mounted, as on a machine whose init does not see to it.
    ///
    /// # Errors
    ///
    /// The file that does so cannot be written.
    pub fn without_bpf_file_system(&mut self) -> anyhow::Result<()> {
        let mut file = tempfile::NamedTempFile::new()?;
        write!(
            file,
            "#!/bin/sh\nexec unshare --mount sh -c 'umount {MOUNT_POINT}; exec \"$0\" \"$@\"' {} \"$@\"\n",
            program()?.display()
        )?;
        let path = file.into_temp_path();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        self.program = Some(path);
        Ok(())
    }

    /// Runs `ipsec-ctl guard`: protection without a daemon.
    ///
    /// # Errors
    ///
    /// What it said.
    pub fn guard(&self) -> anyhow::Result<String> {
        self.with_config("guard")
    }

    /// Runs `ipsec-ctl release`: removes what persists.
    ///
    /// # Errors
    ///
    /// What it said.
    pub fn release(&self) -> anyhow::Result<String> {
        self.with_config("release")
    }

    /// The end of its log.
    pub fn log(&self, lines: usize) -> String {
        tail(&self.file("log"), lines)
    }

    /// Whether its log has this text, which a thread of its own may write a moment later.
    pub fn has_logged(&self, text: &str) -> bool {
        wait_for("a line of the log", Duration::from_secs(2), || {
            Ok(self.log(usize::MAX).contains(text).then_some(()))
        })
        .is_ok()
    }

    /// Process id of the running daemon.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Path of its configuration.
    pub fn config(&self) -> PathBuf {
        self.file("gateway.toml")
    }

    /// Path of its control socket.
    pub fn socket(&self) -> PathBuf {
        self.file("control.sock")
    }

    /// Path of its log.
    pub fn log_path(&self) -> PathBuf {
        self.file("log")
    }

    /// Leaves the daemon running and its files in place.
    pub fn keep(mut self) {
        self.child = None;
        self.kept = true;
        self.folder.disable_cleanup(true);
    }

    /// Path of the journal of its daemon.
    pub fn journal(&self) -> PathBuf {
        self.socket().with_extension("journal")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Asks the daemon without a process of `ipsec-ctl`, where a test asks often.
    ///
    /// # Errors
    ///
    /// The daemon does not answer, or refuses.
    pub fn asked<T>(
        &self,
        exchange: impl AsyncFnOnce(Client) -> Result<T, ClientError>,
    ) -> anyhow::Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        Ok(runtime.block_on(exchange(Client::new(&self.socket())))?)
    }

    fn ask(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = self.netns.command(&program()?.display().to_string())?;
        command.args(arguments).arg("--socket").arg(self.socket());
        checked(&mut command)
    }

    fn with_config(&self, what: &str) -> anyhow::Result<String> {
        let mut command = self.netns.command(&program()?.display().to_string())?;
        command.arg(what).arg("-c").arg(self.config());
        checked(&mut command)
    }
}

impl Drop for Gateway<'_> {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        // A gateway that is kept has a folder that stays, and so has what carries its packets.
        if !self.kept {
            let _ = self.kill_data_plane();
        }
    }
}
