//! strongSwan as a peer in a namespace: charon in the foreground, its userspace ESP, one vici socket each.
//!
//! Needs no ESP in the kernel. Its userspace ESP (kernel-libipsec) does tunnel mode only, always encapsulates in UDP
//! and knows no ESN, so our end must be told to encapsulate (`nat = "force"`) or find a NAT.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

pub use crate::connection::{ChildConnection, Connection};
use crate::{
    command::{output, tail, wait_for},
    netns::Netns,
    release::Release,
};

/// Plugins by need; the userspace ESP must come before the kernel's interface.
const PLUGINS: &str = "random nonce openssl aes sha1 sha2 hmac kdf gcm ccm ctr cmac chapoly gmp curve25519 drbg x509 \
    constraints pubkey pem pkcs1 pkcs8 kernel-libipsec kernel-netlink socket-default vici updown counters";
/// The plugin with the userspace ESP; without it the kernel's is used.
const USERSPACE_ESP: &str = "kernel-libipsec ";
/// Mark of charon's own packets, which keeps them out of its tunnel routes.
const MARK: &str = "0x42";

/// A running charon; killed on drop.
#[derive(Debug)]
pub struct StrongSwan {
    release: Release,
    folder: TempDir,
    child: Child,
}

fn render(connection: &Connection) -> String {
    // "never" is also what keeps it from saying INITIAL_CONTACT.
    let unique = if connection.initial_contact {
        ""
    } else {
        "    unique = never\n"
    };
    let any = || "%any".to_owned();
    let children: String = connection
        .children
        .iter()
        .map(|child| {
            format!(
                "      {} {{\n        local_ts = {}\n        remote_ts = {}\n        esp_proposals = {}\n        \
                 mode = tunnel\n        start_action = none\n        dpd_action = clear\n{}      }}\n",
                child.name,
                child.local,
                child.remote,
                child.esp,
                lines(&child.lines)
            )
        })
        .collect();
    format!(
        "connections {{\n  t {{\n    version = 2\n    local_addrs = {}\n    remote_addrs = {}\n    \
         proposals = {}\n    encap = yes\n    mobike = {}\n    fragmentation = {}\n    dpd_delay = {}s\n{}{}    \
         local {{\n      auth = psk\n      id = {}\n    }}\n    remote {{\n      auth = psk\n      id = {}\n    }}\n    \
         children {{\n{children}    }}\n  }}\n}}\n\
         secrets {{\n  ike-1 {{\n    id-1 = {}\n    id-2 = {}\n    secret = \"{}\"\n  }}\n}}\n",
        connection
            .local
            .map_or_else(any, |address| address.to_string()),
        connection.remote.clone().unwrap_or_else(any),
        connection.ike,
        if connection.mobike { "yes" } else { "no" },
        if connection.fragments { "yes" } else { "no" },
        connection.dpd,
        unique,
        lines(&connection.lines),
        connection.local_id,
        connection.remote_id,
        connection.local_id,
        connection.remote_id,
        connection.psk
    )
}

/// Lines of a section.
fn lines(lines: &[String]) -> String {
    lines.iter().map(|line| format!("    {line}\n")).collect()
}

impl StrongSwan {
    /// Starts charon in a namespace and waits until it can be asked.
    ///
    /// # Errors
    ///
    /// It does not come up; the error has its log.
    pub fn start(netns: &Netns) -> anyhow::Result<Self> {
        Self::start_release(&Release::installed(), netns, &[])
    }

    /// As [`Self::start`], of some release, with further lines for charon: `cookie_threshold = 1`.
    ///
    /// # Errors
    ///
    /// As for [`Self::start`].
    pub fn start_release(release: &Release, netns: &Netns, lines: &[&str]) -> anyhow::Result<Self> {
        let folder = release.folder("ipx-swan-")?;
        let seen = release.seen(folder.path());
        fs::write(
            folder.path().join("strongswan.conf"),
            settings(&seen, lines),
        )?;
        Self::start_in(release.clone(), netns, folder)
    }

    /// As [`Self::start`], writing no log and refusing nobody for being one of many: for measurements.
    ///
    /// # Errors
    ///
    /// As for [`Self::start`].
    pub fn start_silent(netns: &Netns) -> anyhow::Result<Self> {
        let release = Release::installed();
        let folder = release.folder("ipx-swan-")?;
        let lines = [
            "cookie_threshold = 0",
            "block_threshold = 0",
            "ikesa_table_size = 16384",
            "ikesa_table_segments = 16",
        ];
        let settings = settings(&release.seen(folder.path()), &lines)
            .replace("default = 1", "default = -1")
            .replace("ike = 2", "ike = -1")
            .replace("cfg = 2", "cfg = -1");
        fs::write(folder.path().join("strongswan.conf"), settings)?;
        Self::start_in(release, netns, folder)
    }

    /// As [`Self::start`], with the ESP of the kernel.
    ///
    /// # Errors
    ///
    /// As for [`Self::start`].
    pub fn start_with_kernel_esp(netns: &Netns) -> anyhow::Result<Self> {
        let release = Release::installed();
        let folder = release.folder("ipx-swan-")?;
        let settings = settings(&release.seen(folder.path()), &[]).replacen(USERSPACE_ESP, "", 1);
        fs::write(folder.path().join("strongswan.conf"), settings)?;
        Self::start_in(release, netns, folder)
    }

    fn start_in(release: Release, netns: &Netns, folder: TempDir) -> anyhow::Result<Self> {
        let path = folder.path();
        // swanctl wants its folders, empty or not.
        for name in [
            "x509", "x509ca", "private", "conf.d", "pubkey", "rsa", "ecdsa", "pkcs8",
        ] {
            fs::create_dir_all(path.join("swanctl").join(name))?;
        }
        let output = File::create(path.join("stdout"))?;
        let child = release
            .command_in(netns, "charon-systemd")?
            .env(
                "STRONGSWAN_CONF",
                release.seen(path).join("strongswan.conf"),
            )
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("charon cannot be started")?;
        let started = Self {
            release,
            folder,
            child,
        };
        let socket = started.file("vici.sock");
        wait_for("charon", Duration::from_secs(10), || {
            Ok(std::os::unix::net::UnixStream::connect(&socket)
                .is_ok()
                .then_some(()))
        })
        .with_context(|| started.log(30))?;
        Ok(started)
    }

    /// Kills it as a crash would, nothing said to its peers, and starts it again with the same connections.
    ///
    /// # Errors
    ///
    /// It does not come back.
    pub fn crash_and_restart(mut self, netns: &Netns) -> anyhow::Result<Self> {
        self.child.kill()?;
        self.child.wait()?;
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir()?);
        let release = self.release.clone();
        drop(self);
        let _ = fs::remove_file(folder.path().join("vici.sock"));
        // What the userspace ESP leaves behind in its namespace would be in the way of the next one.
        let _ = netns.ip("link del ipsec0");
        let again = Self::start_in(release, netns, folder)?;
        again.swanctl(&["--load-all", "--clear"])?;
        Ok(again)
    }

    /// Loads a connection in place of what was loaded before.
    ///
    /// # Errors
    ///
    /// swanctl's.
    pub fn load(&self, connection: &Connection) -> anyhow::Result<()> {
        fs::write(self.file("swanctl/swanctl.conf"), render(connection))?;
        self.swanctl(&["--load-all", "--clear"])?;
        Ok(())
    }

    /// Brings a child up and waits for it.
    ///
    /// # Errors
    ///
    /// It does not come up within ten seconds; the error has what charon said.
    pub fn initiate(&self, child: &str) -> anyhow::Result<()> {
        self.swanctl(&["--initiate", "--child", child, "--timeout", "10"])?;
        Ok(())
    }

    /// Takes the IKE SA down with a Delete to the peer.
    ///
    /// # Errors
    ///
    /// swanctl's.
    pub fn terminate(&self) -> anyhow::Result<()> {
        self.swanctl(&["--terminate", "--ike", "t", "--timeout", "10"])?;
        Ok(())
    }

    /// Takes one child down with a Delete to the peer.
    ///
    /// # Errors
    ///
    /// swanctl's.
    pub fn terminate_child(&self, child: &str) -> anyhow::Result<()> {
        self.swanctl(&["--terminate", "--child", child, "--timeout", "10"])?;
        Ok(())
    }

    /// Has it rekey a child in place.
    ///
    /// # Errors
    ///
    /// swanctl's.
    pub fn rekey_child(&self, child: &str) -> anyhow::Result<()> {
        self.swanctl(&["--rekey", "--child", child])?;
        Ok(())
    }

    /// Has it rekey the IKE SA.
    ///
    /// # Errors
    ///
    /// swanctl's.
    pub fn rekey_ike(&self) -> anyhow::Result<()> {
        self.swanctl(&["--rekey", "--ike", "t"])?;
        Ok(())
    }

    /// Has it reauthenticate: a new IKE SA in place of the old one.
    ///
    /// # Errors
    ///
    /// swanctl's.
    pub fn reauthenticate(&self) -> anyhow::Result<()> {
        self.swanctl(&["--rekey", "--ike", "t", "--reauth"])?;
        Ok(())
    }

    /// Stops the process where it is, as an overloaded machine would.
    ///
    /// # Errors
    ///
    /// It has ended.
    pub fn freeze(&self) -> anyhow::Result<()> {
        Ok(kill(self.pid()?, Signal::SIGSTOP)?)
    }

    /// Lets a frozen process go on.
    ///
    /// # Errors
    ///
    /// It has ended.
    pub fn thaw(&self) -> anyhow::Result<()> {
        Ok(kill(self.pid()?, Signal::SIGCONT)?)
    }

    /// Its process.
    ///
    /// # Errors
    ///
    /// None that can happen.
    pub fn pid(&self) -> anyhow::Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.child.id())?))
    }

    /// Its SAs, as swanctl lists them.
    ///
    /// # Errors
    ///
    /// swanctl's.
    pub fn sas(&self) -> anyhow::Result<String> {
        self.swanctl(&["--list-sas"])
    }

    /// Waits until its list of SAs is as wanted.
    ///
    /// # Errors
    ///
    /// It is not within `patience`; the error has the list.
    pub fn wait_sas(
        &self,
        what: &str,
        patience: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> anyhow::Result<String> {
        let mut last = String::new();
        wait_for(what, patience, || {
            last = self.sas()?;
            Ok(wanted(&last).then(|| last.clone()))
        })
        .with_context(|| format!("SAs of strongSwan:\n{}", self.sas().unwrap_or_default()))
    }

    /// The end of its log.
    pub fn log(&self, lines: usize) -> String {
        format!(
            "{}\n{}",
            tail(&self.file("stdout"), lines),
            tail(&self.file("charon.log"), lines)
        )
    }

    /// Whether its log has a line with this text.
    pub fn has_logged(&self, text: &str) -> bool {
        tail(&self.file("charon.log"), usize::MAX).contains(text)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn swanctl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let folder = self.release.seen(self.folder.path());
        let output = output(
            self.release
                .command("swanctl")?
                .args(arguments)
                .arg("--uri")
                .arg(format!("unix://{}", folder.join("vici.sock").display()))
                .env("STRONGSWAN_CONF", folder.join("strongswan.conf"))
                .env("SWANCTL_DIR", folder.join("swanctl")),
        )?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        // What went wrong is its last line; its paths are of no interest.
        let last = said.lines().last().unwrap_or_default();
        let asked = arguments.join(" ");
        ensure!(output.status.success(), "swanctl {asked}: {last}\n{said}");
        Ok(said)
    }
}

impl Drop for StrongSwan {
    fn drop(&mut self) {
        let Ok(pid) = self.pid() else {
            return;
        };
        // It says goodbye to its peers on SIGTERM; one that hangs is killed.
        let _ = kill(pid, Signal::SIGTERM);
        let gone = wait_for("charon to stop", Duration::from_secs(3), || {
            Ok(self.child.try_wait()?.map(drop))
        });
        if gone.is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn settings(folder: &Path, further: &[&str]) -> String {
    let folder = folder.display();
    let further: String = further.iter().map(|line| format!("  {line}\n")).collect();
    format!(
        "charon-systemd {{
  load = {PLUGINS}
  load_modular = no
  threads = 16
  fragment_size = 576
  retransmit_tries = 3
  retransmit_timeout = 1.0
  make_before_break = yes
{further}  journal {{
    default = -1
  }}
  filelog {{
    main {{
      path = {folder}/charon.log
      time_format = %H:%M:%S
      flush_line = yes
      ike_name = yes
      default = 1
      ike = 2
      cfg = 2
    }}
  }}
  plugins {{
    vici {{
      socket = unix://{folder}/vici.sock
    }}
    kernel-libipsec {{
      load = yes
      allow_peer_ts = yes
    }}
    kernel-netlink {{
      load = yes
      fwmark = !{MARK}
    }}
    socket-default {{
      fwmark = {MARK}
    }}
  }}
}}
swanctl {{
  load = pem pkcs1 pkcs8 pubkey x509 openssl random sha1 sha2 aes hmac constraints nonce gmp
}}
"
    )
}
