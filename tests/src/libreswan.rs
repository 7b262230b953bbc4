//! libreswan as a peer in a namespace: pluto in the foreground, with the ESP of the kernel, so that it needs one that has it.
//!
//! Its programs come from a folder of their own, which is read-only where they run (a guest): what they write goes to a
//! file system in memory.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use tempfile::TempDir;

use crate::{
    command::{checked, output, tail, wait_for},
    gateway::PSK,
    netns::Netns,
    release::Release,
    topology::{Family, Side},
};

/// A connection at site B. Algorithms are written as in our own configuration.
#[derive(Clone, Debug)]
pub struct Connection {
    /// IKE proposal.
    pub ike: String,
    /// ESP proposal; with a group, children made or rekeyed later have a key exchange of their own.
    pub esp: String,
    /// Its own address, or `%defaultroute` for the kernel's choice.
    pub own: String,
    /// Our address, or any.
    pub peer: String,
    /// Its children: name, its side, our side.
    pub children: Vec<[String; 3]>,
    /// Further lines: `narrowing=yes`.
    pub lines: Vec<String>,
}

impl Connection {
    /// To gateway A, with one child between the two sites.
    pub fn between_sites(ike: &str, esp: &str) -> Self {
        let prefix = |side: Side| side.prefix(Family::V4);
        Self {
            ike: ike.to_owned(),
            esp: esp.to_owned(),
            own: Side::B.outside(Family::V4).to_string(),
            peer: Side::A.outside(Family::V4).to_string(),
            children: vec![["net".to_owned(), prefix(Side::B), prefix(Side::A)]],
            lines: Vec::new(),
        }
    }

    fn render(&self, folder: &Path) -> String {
        let mut text = format!(
            "config setup\n    nssdir={}\n    uniqueids=yes\n",
            folder.display()
        );
        let pfs = if self.esp == without_group(&self.esp) {
            "no"
        } else {
            "yes"
        };
        for [name, local, remote] in &self.children {
            text += &format!(
                "\nconn {name}\n    left={}\n    right={}\n    leftid=@b.example\n    rightid=@a.example\n    \
                 leftsubnet={local}\n    rightsubnet={remote}\n    authby=secret\n    ikev2=insist\n    ike={}\n    esp={}\n    \
                 pfs={pfs}\n    leftupdown=%disabled\n    auto=ignore\n",
                self.own,
                self.peer,
                algorithms(&self.ike),
                esp_algorithms(&self.esp),
            );
            for line in &self.lines {
                text += &format!("    {line}\n");
            }
        }
        text
    }
}

/// A proposal of ours, as it writes them.
fn algorithms(proposal: &str) -> String {
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
    proposal
        .split('-')
        .map(theirs)
        .collect::<Vec<_>>()
        .join("-")
}

/// An ESP proposal of ours, whose group it wants behind a semicolon.
fn esp_algorithms(proposal: &str) -> String {
    algorithms(proposal).replace("-dh", ";dh")
}

/// A proposal of ours without its group.
fn without_group(proposal: &str) -> String {
    let is_group = |word: &&str| algorithms(word).starts_with("dh");
    let words = proposal.split('-').filter(|word| !is_group(word));
    words.collect::<Vec<_>>().join("-")
}

/// A running pluto; killed on drop.
#[derive(Debug)]
pub struct LibreSwan {
    release: Release,
    folder: TempDir,
    child: Child,
}

impl LibreSwan {
    /// Starts pluto in a namespace and waits until it can be asked.
    ///
    /// # Errors
    ///
    /// It does not come up; the error has its log.
    pub fn start(release: &Release, netns: &Netns) -> anyhow::Result<Self> {
        release.make_usable()?;
        let folder = release.folder("ipx-libreswan-")?;
        Self::start_in(release.clone(), netns, folder)
    }

    fn start_in(release: Release, netns: &Netns, folder: TempDir) -> anyhow::Result<Self> {
        let (path, seen) = (folder.path(), release.seen(folder.path()));
        fs::write(path.join("ipsec.secrets"), format!(": PSK \"{PSK}\"\n"))?;
        if !path.join("ipsec.conf").exists() {
            // What the file does not say is as it was when pluto was built, whatever its options say.
            let setup = format!("config setup\n    nssdir={}\n", seen.display());
            fs::write(path.join("ipsec.conf"), setup)?;
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
        fs::write(self.file("ipsec.conf"), connection.render(&seen))?;
        for [name, ..] in &connection.children {
            let mut command = self.release.command("addconn")?;
            command.arg("--config").arg(seen.join("ipsec.conf"));
            command.arg("--ctlsocket").arg(seen.join("pluto.ctl"));
            said(command.arg(name))?;
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

    /// Kills it as a crash would, nothing said to its peers, and starts it again with the same connection.
    ///
    /// # Errors
    ///
    /// It does not come back.
    pub fn crash_and_restart(
        mut self,
        netns: &Netns,
        connection: &Connection,
    ) -> anyhow::Result<Self> {
        self.child.kill()?;
        self.child.wait()?;
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir()?);
        let release = self.release.clone();
        drop(self);
        for file in ["pluto.ctl", "pluto.pid"] {
            let _ = fs::remove_file(folder.path().join(file));
        }
        netns.ip("xfrm state flush")?;
        netns.ip("xfrm policy flush")?;
        let again = Self::start_in(release, netns, folder)?;
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

impl Drop for LibreSwan {
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
        ] {
            assert_eq!(algorithms(ours), theirs);
        }
        assert_eq!(esp_algorithms("aes256gcm16-ecp384"), "aes_gcm256;dh20");
        assert_eq!(without_group("aes128-sha256-ecp384"), "aes128-sha256");
    }
}
