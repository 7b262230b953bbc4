//! The journal: what the daemon must know to come back to the same SAs, kept where only root on this boot can read it.
//!
//! A file of records, each of which is one step: the parts of the state that it has changed, whole. A step is there or it is
//! not: a record that is cut off at the end of the file is one that its daemon died over, before it did anything of it. When
//! the file has become long another one is written [beside](renewal) it, a piece with each step, and takes its place in one.
//!
//! It is written by the daemon's loop itself, for nothing may be sent before it is written, and on tmpfs only, where no write
//! waits for a device.
//!
//! What cannot be trusted is not used: a file of another format or another boot, one that others could have written, one that
//! is damaged. Then tunnels are negotiated anew.

mod record;
mod renewal;

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use serde::{Deserialize, Serialize};
use tracing::{error, warn};
use zeroize::Zeroizing;

use self::{
    record::{Records, replay},
    renewal::{Limits, Renewal},
};

use crate::{
    dataplane::seam::TunnelId,
    ike::{endpoint::Part, event::ChildSaId},
    wiped::Wiped,
};

/// Another one whenever what is saved gets another meaning. A value that only gets another field with a default does not.
const FORMAT: u32 = 2;
/// The longest file that is read.
const LONGEST: u64 = 1 << 30;
/// Time until a journal that could not be written is tried again.
const PAUSE: Duration = Duration::from_secs(10);

/// Names a part of the daemon's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Key {
    /// What the endpoint saves.
    Endpoint(Part),
    /// Numbers that are given out next.
    Names,
    /// A tunnel.
    Tunnel(TunnelId),
    /// A pair of SAs in the data plane.
    Pair(ChildSaId),
}

/// What has changed: contents, and none for what is gone.
pub(super) type Changes = Vec<(Key, Option<Wiped>)>;

/// All parts.
pub(super) type Contents = BTreeMap<Key, Zeroizing<Vec<u8>>>;

/// Whose journal it is: another one's is not used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    format: u32,
    boot: String,
    ports: (u16, u16),
}

/// Why a journal is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    /// The operating system refused.
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Others could have written it.
    #[error("others can write or read it")]
    Exposed,
    /// It is of another version or another boot, or has other ports.
    #[error("it is of another version or another boot, or the ports are others")]
    Foreign,
    /// A record in its middle is not as it was written.
    #[error("it is damaged at byte {0}")]
    Damaged(usize),
    /// What it holds makes no sense to this version.
    #[error("{0}")]
    Senseless(String),
}

/// The journal of one daemon.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    owner: Owner,
    state: State,
    limits: Limits,
}

#[derive(Debug)]
enum State {
    /// Nothing is written yet.
    New,
    /// It is kept.
    Kept {
        records: Records,
        /// The length from which on another one is to take its place.
        long: u64,
        /// That one, while it is being written.
        renewal: Option<Renewal>,
    },
    /// It could not be written, and there is none until then.
    Broken(Instant),
    /// There is nowhere to keep it.
    Nowhere,
}

impl Owner {
    /// The owner on this boot, with these ports.
    ///
    /// # Errors
    ///
    /// The kernel does not tell which boot this is.
    pub(super) fn here(ports: (u16, u16)) -> io::Result<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Ok(Self {
            format: FORMAT,
            boot: boot.trim().to_owned(),
            ports,
        })
    }
}

impl Journal {
    /// The journal at `path`, which is not touched yet. On a disk none is kept, for it holds keys.
    pub(super) fn at(path: PathBuf, owner: Owner) -> Self {
        let folder = path.parent().unwrap_or(Path::new("/"));
        let in_memory = statfs(folder).is_ok_and(|system| system.filesystem_type() == TMPFS_MAGIC);
        if !in_memory {
            warn!(
                folder = %folder.display(),
                "no journal: it would hold keys, and this is no tmpfs; a daemon that is started anew negotiates anew"
            );
        }
        let state = if in_memory {
            State::New
        } else {
            State::Nowhere
        };
        Self {
            path,
            owner,
            state,
            limits: Limits::USUAL,
        }
    }

    /// What the daemon before this one has left, if there is anything.
    ///
    /// # Errors
    ///
    /// [`Unusable`].
    pub(super) fn read(&self) -> Result<Option<Contents>, Unusable> {
        match self.state {
            State::Nowhere => return Ok(None),
            State::New | State::Kept { .. } | State::Broken(_) => {}
        }
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_CLOEXEC)
            .open(&self.path);
        let mut file = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let found = file.metadata()?;
        let ours = found.uid() == nix::unistd::geteuid().as_raw();
        if !ours || !found.is_file() || found.mode() & 0o077 != 0 || found.len() > LONGEST {
            return Err(Unusable::Exposed);
        }
        let mut bytes = Zeroizing::new(Vec::with_capacity(
            usize::try_from(found.len()).unwrap_or_default() + 1,
        ));
        file.read_to_end(&mut bytes)?;
        replay(&bytes, &self.owner).map(Some)
    }

    /// Whether all parts are wanted and not only what has changed.
    pub(super) fn wants_everything(&self) -> bool {
        match &self.state {
            State::New => true,
            State::Broken(until) => *until <= Instant::now(),
            State::Kept { .. } | State::Nowhere => false,
        }
    }

    /// Whether anything is kept, or will be.
    pub(super) fn is_kept(&self) -> bool {
        !matches!(self.state, State::Nowhere)
    }

    /// Keeps what has changed; all parts if [`Self::wants_everything`] was true. If that fails there is no journal any more, and
    /// never one that tells of less than has happened.
    pub(super) fn save(&mut self, changes: &Changes) {
        let everything = self.wants_everything();
        let saved = match &mut self.state {
            State::Nowhere => return,
            State::Broken(_) if !everything => return,
            State::Kept {
                records, renewal, ..
            } => {
                let followed = renewal
                    .as_mut()
                    .map_or(Ok(()), |renewal| renewal.follow(changes));
                let saved = records.append(changes);
                if let Err(error) = followed {
                    self.grow_on(&error);
                }
                saved
            }
            State::New | State::Broken(_) => self.begin(changes),
        };
        if let Err(error) = saved {
            error!(%error, path = %self.path.display(), "the journal cannot be written: if the daemon dies now, tunnels are negotiated anew");
            self.discard();
            self.state = State::Broken(Instant::now() + PAUSE);
        }
    }

    fn begin(&mut self, everything: &Changes) -> io::Result<()> {
        let mut records = Records::begin(create(&beside(&self.path))?, &self.owner)?;
        records.append(everything)?;
        self.put_in_place(records)
    }

    /// Has a file that was written beside the journal take its place.
    fn put_in_place(&mut self, records: Records) -> io::Result<()> {
        fs::rename(beside(&self.path), &self.path)?;
        self.state = State::Kept {
            long: self.limits.long(records.bytes),
            records,
            renewal: None,
        };
        Ok(())
    }

    /// Nothing is to be come back to.
    pub(super) fn discard(&mut self) {
        if let State::Kept { records, .. } = &self.state
            && let Err(error) = records.file.set_len(0)
        {
            warn!(%error, "the journal cannot be emptied");
        }
        discard(&self.path);
        if self.is_kept() {
            self.state = State::New;
        }
    }
}

/// Where a file is written before it takes a journal's place.
fn beside(path: &Path) -> PathBuf {
    path.with_extension("journal-new")
}

/// An empty file that only root can read.
fn create(path: &Path) -> io::Result<File> {
    remove(path)?;
    OpenOptions::new()
        .append(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Removes a journal, and what was to take its place.
pub(super) fn discard(path: &Path) {
    for path in [path, &beside(path)] {
        if let Err(error) = remove(path) {
            warn!(%error, path = %path.display(), "the journal cannot be removed");
        }
    }
}

#[cfg(test)]
mod tests;
