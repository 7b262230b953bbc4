//! The journal: what the daemon must know to come back to the same SAs, kept where only root on this boot can read it.
//!
//! A file of records, each of which is one step: the parts of the state that it has changed, whole. A step is there or it is
//! not: a record that is cut off at the end of the file is one that its daemon died over, before it did anything of it. When
//! the file has become long it is written anew, beside the old one, and takes its place in one step.
//!
//! What cannot be trusted is not used: a file of another format or another boot, one that others could have written, one that
//! is damaged. Then tunnels are negotiated anew.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use ring::digest;
use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};
use zeroize::Zeroizing;

use crate::{
    dataplane::seam::TunnelId,
    ike::{endpoint::Part, event::ChildSaId},
    wiped::Wiped,
};

/// What the file begins with.
const MAGIC: [u8; 8] = *b"ipsec-xj";
/// Another one whenever what is saved gets another meaning. A value that only gets another field with a default does not.
const FORMAT: u32 = 2;
/// Bytes that a file may grow by before it is written anew, however small it was.
const LEAST_GROWTH: u64 = 1 << 20;
/// The longest file that is read.
const LONGEST: u64 = 1 << 30;
/// Bytes of a record before its content: length, the same inverted, and checksum.
const HEAD: usize = 16;
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
}

#[derive(Debug)]
enum State {
    /// Nothing is written yet.
    New,
    /// It is kept.
    Kept {
        file: File,
        /// Number of the next record.
        number: u64,
        bytes: u64,
        /// Bytes that it had when it was written anew.
        at_first: u64,
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
        Self { path, owner, state }
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
            State::Kept {
                bytes, at_first, ..
            } => *bytes > 2 * at_first + LEAST_GROWTH,
            State::Nowhere => false,
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
                file,
                number,
                bytes,
                ..
            } if !everything => append(file, number, changes).map(|more| *bytes += more),
            State::New | State::Broken(_) | State::Kept { .. } => self.write_anew(changes),
        };
        if let Err(error) = saved {
            error!(%error, path = %self.path.display(), "the journal cannot be written: if the daemon dies now, tunnels are negotiated anew");
            self.discard();
            self.state = State::Broken(Instant::now() + PAUSE);
        }
    }

    fn write_anew(&mut self, changes: &Changes) -> io::Result<()> {
        let beside = self.path.with_extension("journal-new");
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(&MAGIC)?;
        let mut number = 0;
        let mut bytes = MAGIC.len() as u64;
        bytes += append_value(&mut file, &mut number, &self.owner)?;
        bytes += append(&mut file, &mut number, changes)?;
        fs::rename(&beside, &self.path)?;
        self.state = State::Kept {
            file,
            number,
            bytes,
            at_first: bytes,
        };
        Ok(())
    }

    /// Nothing is to be come back to.
    pub(super) fn discard(&mut self) {
        if let State::Kept { file, .. } = &self.state
            && let Err(error) = file.set_len(0)
        {
            warn!(%error, "the journal cannot be emptied");
        }
        discard(&self.path);
        if self.is_kept() {
            self.state = State::New;
        }
    }
}

/// Removes a journal.
pub(super) fn discard(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            warn!(%error, path = %path.display(), "the journal cannot be removed");
        }
        _ => {}
    }
}

fn append(file: &mut File, number: &mut u64, changes: &Changes) -> io::Result<u64> {
    let parts: Vec<(Key, Option<&serde_bytes::Bytes>)> = changes
        .iter()
        .map(|(key, part)| (*key, part.as_ref().map(|part| part.bytes().into())))
        .collect();
    append_value(file, number, &parts)
}

fn append_value<T: Serialize>(file: &mut File, number: &mut u64, value: &T) -> io::Result<u64> {
    let mut record = Wiped::new();
    record.extend(&[0; HEAD]);
    record.append(value)?;
    let content = record.bytes().get(HEAD..).unwrap_or_default();
    let sum = checksum(*number, content);
    let length = u32::try_from(content.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let head = [&length.to_be_bytes()[..], &(!length).to_be_bytes(), &sum].concat();
    for (to, from) in record.bytes_mut().iter_mut().zip(head) {
        *to = from;
    }
    // In one call. What is cut off all the same, by a death in its middle, is told by its length.
    file.write_all(record.bytes())?;
    *number += 1;
    Ok(record.bytes().len() as u64)
}

fn checksum(number: u64, content: &[u8]) -> [u8; 8] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(&number.to_be_bytes());
    context.update(content);
    let mut sum = [0; 8];
    for (to, from) in sum.iter_mut().zip(context.finish().as_ref()) {
        *to = *from;
    }
    sum
}

/// The state that all records together make up.
fn replay(bytes: &[u8], owner: &Owner) -> Result<Contents, Unusable> {
    let mut rest = bytes.strip_prefix(&MAGIC).ok_or(Unusable::Foreign)?;
    let mut contents = Contents::new();
    let mut number = 0;
    while !rest.is_empty() {
        let place = bytes.len() - rest.len();
        let (content, after) = match record(rest, number) {
            Record::Whole(content, after) => (content, after),
            Record::CutOff => {
                info!(
                    at = place,
                    "the journal ends in the middle of a step, which is left out"
                );
                break;
            }
            Record::Damaged => return Err(Unusable::Damaged(place)),
        };
        if number == 0 {
            let found: Owner = rmp_serde::from_slice(content).map_err(|_| Unusable::Foreign)?;
            if found != *owner {
                return Err(Unusable::Foreign);
            }
        } else {
            let parts: Vec<(Key, Option<serde_bytes::ByteBuf>)> = rmp_serde::from_slice(content)
                .map_err(|error| Unusable::Senseless(error.to_string()))?;
            for (key, part) in parts {
                match part {
                    Some(part) => contents.insert(key, Zeroizing::new(part.into_vec())),
                    None => contents.remove(&key),
                };
            }
        }
        number += 1;
        rest = after;
    }
    Ok(contents)
}

/// What bytes begin with.
enum Record<'a> {
    /// A record with this content, and what comes after it.
    Whole(&'a [u8], &'a [u8]),
    /// A record whose end is missing.
    CutOff,
    /// No record that was ever written.
    Damaged,
}

fn record(bytes: &[u8], number: u64) -> Record<'_> {
    let numbers = || {
        let (length, rest) = bytes.split_first_chunk()?;
        let (inverted, rest) = rest.split_first_chunk()?;
        let (sum, rest) = rest.split_first_chunk::<8>()?;
        let (length, inverted) = (u32::from_be_bytes(*length), u32::from_be_bytes(*inverted));
        Some((length, inverted, sum, rest))
    };
    let Some((length, inverted, sum, rest)) = numbers() else {
        return Record::CutOff;
    };
    if length != !inverted {
        return Record::Damaged;
    }
    match usize::try_from(length).map(|length| rest.split_at_checked(length)) {
        Ok(Some((content, after))) if *sum == checksum(number, content) => {
            Record::Whole(content, after)
        }
        Ok(None) => Record::CutOff,
        Ok(Some(_)) | Err(_) => Record::Damaged,
    }
}

#[cfg(test)]
mod tests;
