//! The peer of a column, whichever implementation it is: what every one of them can be asked for.

use std::fmt;

use anyhow::bail;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    connection::Connection, libreswan::LibreSwan, netns::Netns, release::Release,
    strongswan::StrongSwan,
};

/// The implementations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// strongSwan with its userspace ESP.
    StrongSwan,
    /// libreswan with the kernel's ESP.
    LibreSwan,
}

/// One that runs.
#[derive(Debug)]
pub(super) enum Peer<'a> {
    StrongSwan(StrongSwan, &'a Netns),
    LibreSwan(LibreSwan<'a>),
}

impl<'a> Peer<'a> {
    /// Starts it, with further lines for the daemon's own settings.
    pub(super) fn start(
        kind: Kind,
        release: &Release,
        netns: &'a Netns,
        lines: &[&str],
    ) -> anyhow::Result<Self> {
        Ok(match kind {
            Kind::StrongSwan => {
                Self::StrongSwan(StrongSwan::start_release(release, netns, lines)?, netns)
            }
            Kind::LibreSwan => Self::LibreSwan(LibreSwan::start(release, netns, lines)?),
        })
    }

    /// Loads a connection in place of what was loaded before.
    pub(super) fn load(&self, connection: &Connection) -> anyhow::Result<()> {
        match self {
            Self::StrongSwan(swan, _) => swan.load(connection),
            Self::LibreSwan(swan) => swan.load(connection),
        }
    }

    /// Brings a child up and waits for it.
    pub(super) fn initiate(&self, child: &str) -> anyhow::Result<()> {
        match self {
            Self::StrongSwan(swan, _) => swan.initiate(child),
            Self::LibreSwan(swan) => swan.initiate(child),
        }
    }

    /// Takes the IKE SA down, whose only child is `net`.
    pub(super) fn terminate(&self) -> anyhow::Result<()> {
        match self {
            Self::StrongSwan(swan, _) => swan.terminate(),
            Self::LibreSwan(swan) => swan.terminate("net"),
        }
    }

    /// Takes the one child, `net`, down and leaves the IKE SA up.
    pub(super) fn terminate_child(&self) -> anyhow::Result<()> {
        match self {
            Self::StrongSwan(swan, _) => swan.terminate_child("net"),
            Self::LibreSwan(swan) => swan.terminate_child(),
        }
    }

    /// Has it rekey a child.
    pub(super) fn rekey_child(&self, child: &str) -> anyhow::Result<()> {
        match self {
            Self::StrongSwan(swan, _) => swan.rekey_child(child),
            Self::LibreSwan(swan) => swan.rekey_child(child),
        }
    }

    /// Has it rekey the IKE SA.
    pub(super) fn rekey_ike(&self) -> anyhow::Result<()> {
        match self {
            Self::StrongSwan(swan, _) => swan.rekey_ike(),
            Self::LibreSwan(swan) => swan.rekey_ike("net"),
        }
    }

    /// Has it reauthenticate.
    pub(super) fn reauthenticate(&self) -> anyhow::Result<()> {
        match self {
            Self::StrongSwan(swan, _) => swan.reauthenticate(),
            Self::LibreSwan(_) => bail!("libreswan has no command for it"),
        }
    }

    /// Its IKE SAs that are up.
    pub(super) fn ike_sas(&self) -> anyhow::Result<usize> {
        match self {
            Self::StrongSwan(swan, _) => Ok(swan.sas()?.matches("ESTABLISHED").count()),
            Self::LibreSwan(swan) => swan.ike_sas(),
        }
    }

    /// Stops the process where it is, as an overloaded machine would.
    pub(super) fn freeze(&self) -> anyhow::Result<()> {
        Ok(kill(self.pid()?, Signal::SIGSTOP)?)
    }

    /// Lets a frozen process go on.
    pub(super) fn thaw(&self) -> anyhow::Result<()> {
        Ok(kill(self.pid()?, Signal::SIGCONT)?)
    }

    fn pid(&self) -> anyhow::Result<Pid> {
        match self {
            Self::StrongSwan(swan, _) => swan.pid(),
            Self::LibreSwan(swan) => swan.pid(),
        }
    }

    /// Kills it as a crash would, nothing said to its peers, and starts it again with the same connection.
    pub(super) fn crash_and_restart(self, connection: &Connection) -> anyhow::Result<Self> {
        Ok(match self {
            Self::StrongSwan(swan, netns) => {
                Self::StrongSwan(swan.crash_and_restart(netns)?, netns)
            }
            Self::LibreSwan(swan) => Self::LibreSwan(swan.crash_and_restart(connection)?),
        })
    }

    /// The end of its log.
    pub(super) fn log(&self, lines: usize) -> String {
        match self {
            Self::StrongSwan(swan, _) => swan.log(lines),
            Self::LibreSwan(swan) => swan.log(lines),
        }
    }

    /// Whether its log has a line with this text.
    pub(super) fn has_logged(&self, text: &str) -> bool {
        match self {
            Self::StrongSwan(swan, _) => swan.has_logged(text),
            Self::LibreSwan(swan) => swan.has_logged(text),
        }
    }
}

impl fmt::Display for Peer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "log of the peer:\n{}", self.log(30))
    }
}
