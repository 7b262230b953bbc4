//! libreswan as a peer in a namespace: pluto in the foreground, with the ESP of the kernel, so that it needs one that has it.
//!
//! Its programs come from a folder of their own, which is read-only where they run (a guest): what they write goes to a
//! file system in memory.

use std::{
    fs::{self, File},
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::{
    command::{checked, output, tail, wait_for},
    connection::{ChildConnection, Connection},
    gateway::PSK,
    netns::Netns,
    release::Release,
};

/// Seconds for which it repeats a request, as many as a peer may need to come back in a test.
const RETRANSMITS: u32 = 12;

/// Its configuration: what holds for all, and one `conn` a child, for it knows no connections with several.
fn render(connection: &Connection, setup: &[String], folder: &Path) -> String {
    let mut text = format!(
        "config setup\n    nssdir={}\n    uniqueids=yes\n",
        folder.display()
    );
    text.extend(setup.iter().map(|line| format!("    {line}\n")));
    for child in &connection.children {
        text += &format!("\nconn {}\n", child.name);
        for (key, value) in settings(connection, child) {
            text += &format!("    {key}={value}\n");
        }
        for line in connection.lines.iter().chain(&child.lines) {
            text += &format!("    {line}\n");
        }
    }
    text
}

fn settings(connection: &Connection, child: &ChildConnection) -> Vec<(&'static str, String)> {
    let word = |yes| if yes { "yes" } else { "no" }.to_owned();
    let own = connection.local.map(|address| address.to_string());
    let mut settings = vec![
        ("left", own.unwrap_or_else(|| "%defaultroute".to_owned())),
        (
            "right",
            connection
                .remote
                .clone()
                .unwrap_or_else(|| "%any".to_owned()),
        ),
        ("leftid", identity(&connection.local_id)),
        ("rightid", identity(&connection.remote_id)),
        ("leftsubnet", child.local.clone()),
        ("rightsubnet", child.remote.clone()),
        ("leftupdown", "%disabled".to_owned()),
        ("authby", "secret".to_owned()),
        ("ikev2", "insist".to_owned()),
        ("ike", algorithms(&connection.ike)),
        ("esp", esp_algorithms(&child.esp)),
        ("pfs", word(child.esp != without_group(&child.esp))),
        ("mobike", word(connection.mobike)),
        ("fragmentation", word(connection.fragments)),
        ("initial-contact", word(connection.initial_contact)),
        ("retransmit-timeout", format!("{RETRANSMITS}s")),
        ("auto", "ignore".to_owned()),
    ];
    if connection.local.is_some_and(|address| address.is_ipv6()) {
        settings.push(("hostaddrfamily", "ipv6".to_owned()));
    }
    if connection.dpd > 0 {
        settings.push(("dpddelay", format!("{}", connection.dpd)));
        settings.push(("dpdtimeout", format!("{}", 3 * connection.dpd)));
        settings.push(("dpdaction", "clear".to_owned()));
    }
    settings
}

/// An identity of ours, as it writes them.
fn identity(ours: &str) -> String {
    match ours.strip_prefix("keyid:") {
        Some(text) => format!("@[{text}]"),
        None if ours.contains('@') || ours.parse::<IpAddr>().is_ok() => ours.to_owned(),
        None => format!("@{ours}"),
    }
}

/// Proposals of ours, comma-separated, as it writes them.
fn algorithms(proposals: &str) -> String {
    let theirs = |word: &str| match word {
        "aes128gcm16" => "aes_gcm128".to_owned(),
        "aes256gcm16" => "aes_gcm256".to_owned(),
        "chacha20poly1305" => "chacha20_poly1305".to_owned(),
        "sha256" | "prfsha256" => "sha2_256".to_owned(),
        "sha384" | "prfsha384" => "sha2_384".to_owned(),
        "sha512" | "prfsha512" => "sha2_512".to_owned(),
        "x25519" => "dh31".to_owned(),
        "ecp256" => "dh19".to_owned(),
        "ecp384" => "dh20".to_owned(),
        "ecp521" => "dh21".to_owned(),
        "modp2048" => "dh14".to_owned(),
        "modp3072" => "dh15".to_owned(),
        "modp4096" => "dh16".to_owned(),
        "modp6144" => "dh17".to_owned(),
        "modp8192" => "dh18".to_owned(),
        word => word.to_owned(),
    };
    let one = |proposal: &str| {
        let words: Vec<_> = proposal.split('-').map(theirs).collect();
        // Of one kind it has several behind a plus.
        words
            .join("-")
            .replace("-dh", "+dh")
            .replacen("+dh", "-dh", 1)
    };
    proposals.split(',').map(one).collect::<Vec<_>>().join(",")
}

/// ESP proposals of ours, whose group it wants behind a semicolon.
fn esp_algorithms(proposals: &str) -> String {
    algorithms(proposals).replace("-dh", ";dh")
}

/// A proposal of ours without its group.
fn without_group(proposal: &str) -> String {
    let is_group = |word: &&str| algorithms(word).starts_with("dh");
    let words = proposal.split('-').filter(|word| !is_group(word));
    words.collect::<Vec<_>>().join("-")
}

/// A running pluto; killed on drop.
#[derive(Debug)]
pub struct LibreSwan<'a> {
    release: Release,
    netns: &'a Netns,
    /// Further lines of `config setup`.
    setup: Vec<String>,
    folder: TempDir,
    child: Child,
}

impl<'a> LibreSwan<'a> {
    /// Starts pluto in a namespace, with further lines of `config setup`, and waits until it can be asked.
    ///
    /// # Errors
    ///
    /// It does not come up; the error has its log.
    pub fn start(release: &Release, netns: &'a Netns, setup: &[&str]) -> anyhow::Result<Self> {
        release.make_usable()?;
        let folder = release.folder("ipx-libreswan-")?;
        let setup = setup.iter().map(|line| (*line).to_owned()).collect();
        Self::start_in(release.clone(), netns, setup, folder)
    }

    fn start_in(
        release: Release,
        netns: &'a Netns,
        setup: Vec<String>,
        folder: TempDir,
    ) -> anyhow::Result<Self> {
        let (path, seen) = (folder.path(), release.seen(folder.path()));
        fs::write(path.join("ipsec.secrets"), format!(": PSK \"{PSK}\"\n"))?;
        if !path.join("ipsec.conf").exists() {
            // What the file does not say is as it was when pluto was built, whatever its options say.
            let mut text = format!("config setup\n    nssdir={}\n", seen.display());
            text.extend(setup.iter().map(|line| format!("    {line}\n")));
            fs::write(path.join("ipsec.conf"), text)?;
            let mut database = release.command("certutil")?;
            database.arg("-N").arg("-d");
            database.arg(format!("sql:{}", seen.display()));
            checked(database.arg("--empty-password"))?;
        }
        let output = File::create(path.join("log"))?;
        let child = release
            .command_in(netns, "pluto")?
            .args(["--nofork", "--stderrlog", "--rundir"])
            .arg(&seen)
            .arg("--nssdir")
            .arg(&seen)
            .arg("--config")
            .arg(seen.join("ipsec.conf"))
            .arg("--secretsfile")
            .arg(seen.join("ipsec.secrets"))
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("pluto cannot be started")?;
        let started = Self {
            release,
            netns,
            setup,
            folder,
            child,
        };
        wait_for("pluto", Duration::from_secs(20), || {
            Ok(started.has_logged("loading secrets").then_some(()))
        })
        .with_context(|| started.log(30))?;
        Ok(started)
    }

    /// Loads a connection in place of what was loaded before.
    ///
    /// # Errors
    ///
    /// What it said.
    pub fn load(&self, connection: &Connection) -> anyhow::Result<()> {
        let seen = self.release.seen(self.folder.path());
        let text = render(connection, &self.setup, &seen);
        fs::write(self.file("ipsec.conf"), text)?;
        for child in &connection.children {
            // In its namespace, whose routes tell its own address where none is given.
            let mut command = self.release.command_in(self.netns, "addconn")?;
            command.arg("--config").arg(seen.join("ipsec.conf"));
            command.arg("--ctlsocket").arg(seen.join("pluto.ctl"));
            said(command.arg(&child.name))?;
        }
        Ok(())
    }

    /// Brings a child up and waits for it.
    ///
    /// # Errors
    ///
    /// It does not come up; the error has what it said.
    pub fn initiate(&self, child: &str) -> anyhow::Result<()> {
        let answer = self.whack(&["--initiate", "--name", child])?;
        let up = answer.contains("established Child SA");
        ensure!(
            up,
            "libreswan: {}",
            answer.lines().last().unwrap_or_default()
        );
        Ok(())
    }

    /// Takes a child down, and its IKE SA with the last one, with a Delete to the peer.
    ///
    /// # Errors
    ///
    /// What it said.
    pub fn terminate(&self, child: &str) -> anyhow::Result<()> {
        self.whack(&["--terminate", "--name", child]).map(drop)
    }

    /// Takes down the SAs of its one child and leaves the IKE SA up.
    ///
    /// # Errors
    ///
    /// It has none.
    pub fn terminate_child(&self) -> anyhow::Result<()> {
        let states = self.whack(&["--showstates"])?;
        let (child, _) = states
            .lines()
            .find(|line| line.contains("ESTABLISHED_CHILD_SA"))
            .and_then(|line| line.split_once('#')?.1.split_once(':'))
            .with_context(|| format!("no child: {states}"))?;
        self.whack(&["--deletestate", child]).map(drop)
    }

    /// Has it rekey a child.
    ///
    /// # Errors
    ///
    /// What it said.
    pub fn rekey_child(&self, child: &str) -> anyhow::Result<()> {
        // The name of the option has changed with release 5.
        self.whack(&["--rekey-child", "--name", child])
            .or_else(|_| self.whack(&["--rekey-ipsec", "--name", child]))
            .map(drop)
    }

    /// Has it rekey the IKE SA.
    ///
    /// # Errors
    ///
    /// What it said.
    pub fn rekey_ike(&self, child: &str) -> anyhow::Result<()> {
        self.whack(&["--rekey-ike", "--name", child]).map(drop)
    }

    /// Its IKE SAs that are up.
    ///
    /// # Errors
    ///
    /// What it said.
    pub fn ike_sas(&self) -> anyhow::Result<usize> {
        let states = self.whack(&["--showstates"])?;
        Ok(states.matches("ESTABLISHED_IKE_SA").count())
    }

    /// Its process.
    ///
    /// # Errors
    ///
    /// None that can happen.
    pub fn pid(&self) -> anyhow::Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.child.id())?))
    }

    /// Kills it as a crash would, nothing said to its peers, and starts it again with the same connection.
    ///
    /// # Errors
    ///
    /// It does not come back.
    pub fn crash_and_restart(mut self, connection: &Connection) -> anyhow::Result<Self> {
        self.child.kill()?;
        self.child.wait()?;
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir()?);
        let (release, netns) = (self.release.clone(), self.netns);
        let setup = std::mem::take(&mut self.setup);
        drop(self);
        for file in ["pluto.ctl", "pluto.pid"] {
            let _ = fs::remove_file(folder.path().join(file));
        }
        netns.ip("xfrm state flush")?;
        netns.ip("xfrm policy flush")?;
        let again = Self::start_in(release, netns, setup, folder)?;
        again.load(connection)?;
        Ok(again)
    }

    /// The end of its log.
    pub fn log(&self, lines: usize) -> String {
        tail(&self.file("log"), lines)
    }

    /// Whether its log has a line with this text.
    pub fn has_logged(&self, text: &str) -> bool {
        tail(&self.file("log"), usize::MAX).contains(text)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn whack(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let seen = self.release.seen(self.folder.path());
        let whack = self.release.command("whack")?;
        // It waits for as long as pluto tries.
        let mut command = Command::new("timeout");
        command.arg("15").arg(whack.get_program());
        command.args(whack.get_args()).arg("--rundir").arg(seen);
        said(command.args(arguments))
    }
}

/// What a command has said, on whichever output; its status tells little.
fn said(command: &mut Command) -> anyhow::Result<String> {
    let output = output(command)?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    let unknown = said.contains("unrecognized option") || said.contains("unknown option");
    ensure!(!unknown, "{said}");
    Ok(said)
}

impl Drop for LibreSwan<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proposals_are_written_as_libreswan_does() {
        for (ours, theirs) in [
            ("aes256gcm16-prfsha384-x25519", "aes_gcm256-sha2_384-dh31"),
            ("aes128-sha256-modp2048", "aes128-sha2_256-dh14"),
            ("chacha20poly1305", "chacha20_poly1305"),
            ("aes256-sha256-x25519-ecp256", "aes256-sha2_256-dh31+dh19"),
            (
                "aes256-sha256,aes128-sha256",
                "aes256-sha2_256,aes128-sha2_256",
            ),
        ] {
            assert_eq!(algorithms(ours), theirs);
        }
        assert_eq!(esp_algorithms("aes256gcm16-ecp384"), "aes_gcm256;dh20");
        assert_eq!(without_group("aes128-sha256-ecp384"), "aes128-sha256");
    }

    #[test]
    fn identities_are_written_as_libreswan_does() {
        for (ours, theirs) in [
            ("a.example", "@a.example"),
            ("2001:db8::1", "2001:db8::1"),
            ("a@example.org", "a@example.org"),
            ("keyid:left", "@[left]"),
        ] {
            assert_eq!(identity(ours), theirs);
        }
    }
}
