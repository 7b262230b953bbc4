//! A journal that has become long is written anew in pieces, so that no step waits for more than one of them, however many
//! tunnels there are.
//!
//! What each step changes goes into both files meanwhile, and with each step the next parts are copied into the new one, in the
//! order of their keys. A part is in it, then, as it was when its turn came, or as a later step has made it. When the last part
//! is copied the new file has all that the old one has, and takes its place. A daemon that dies before leaves the old one.

use std::{io, path::Path};

use tracing::warn;

use super::{Changes, Journal, Key, Owner, State, beside, create, record::Records, remove};
use crate::wiped::Wiped;

/// How long is too long, and how much is copied at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Bytes that a file may grow by, however short it was.
    pub(super) growth: u64,
    /// Bytes that are copied with a step; the last part may go beyond.
    pub(super) piece: usize,
}

impl Limits {
    pub(super) const USUAL: Self = Self {
        growth: 1 << 20,
        piece: 64 << 10,
    };

    /// From which length on a file is written anew that had this one when it was new.
    pub(super) fn long(self, at_first: u64) -> u64 {
        2 * at_first + self.growth
    }
}

/// The file that is to take a journal's place.
#[derive(Debug)]
pub(super) struct Renewal {
    records: Records,
    /// The last part that was copied.
    copied: Option<Key>,
}

impl Renewal {
    fn begin(path: &Path, owner: &Owner) -> io::Result<Self> {
        Ok(Self {
            records: Records::begin(create(path)?, owner)?,
            copied: None,
        })
    }

    /// Takes what has changed.
    pub(super) fn follow(&mut self, changes: &Changes) -> io::Result<()> {
        self.records.append(changes)
    }

    #[cfg(test)]
    pub(super) fn cannot_write(&mut self, readable: std::fs::File) {
        self.records.file = readable;
    }

    /// Copies the next parts; tells whether those were the last.
    fn copy(
        &mut self,
        parts: impl Iterator<Item = (Key, io::Result<Wiped>)>,
        piece: usize,
    ) -> io::Result<bool> {
        let (mut copies, mut bytes) = (Changes::new(), 0);
        let mut parts = parts.peekable();
        while bytes < piece
            && let Some((key, part)) = parts.next()
        {
            let part = part?;
            bytes += part.bytes().len();
            copies.push((key, Some(part)));
            self.copied = Some(key);
        }
        self.records.append(&copies)?;
        Ok(parts.peek().is_none())
    }
}

impl Journal {
    /// Goes on with writing a journal anew that has become long, by one piece. `parts` are all that there is after a key, in their
    /// order and as they were saved last.
    pub(in crate::daemon) fn renew<P>(&mut self, parts: impl FnOnce(Option<Key>) -> P)
    where
        P: Iterator<Item = (Key, io::Result<Wiped>)>,
    {
        let State::Kept {
            records,
            long,
            renewal,
        } = &mut self.state
        else {
            return;
        };
        if renewal.is_none() && records.bytes <= *long {
            return;
        }
        let begun = match renewal.take() {
            Some(begun) => Ok(begun),
            None => Renewal::begin(&beside(&self.path), &self.owner),
        };
        let piece = self.limits.piece;
        let copied = begun.and_then(|mut begun| {
            let done = begun.copy(parts(begun.copied), piece)?;
            Ok((begun, done))
        });
        let renewed = match copied {
            Ok((begun, false)) => {
                *renewal = Some(begun);
                return;
            }
            Ok((begun, true)) => self.put_in_place(begun.records),
            Err(error) => Err(error),
        };
        if let Err(error) = renewed {
            self.grow_on(&error);
        }
    }

    /// No new file can be written: the old one may become as long again before another is tried.
    pub(super) fn grow_on(&mut self, error: &io::Error) {
        warn!(%error, "the journal cannot be written anew for now, and grows");
        if let Err(error) = remove(&beside(&self.path)) {
            warn!(%error, "what was begun of it cannot be removed");
        }
        if let State::Kept {
            records,
            long,
            renewal,
        } = &mut self.state
        {
            *renewal = None;
            *long = self.limits.long(records.bytes);
        }
    }
}
