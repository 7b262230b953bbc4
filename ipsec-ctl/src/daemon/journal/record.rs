//! What the journal's file is made of: records, each with its length, a checksum over its number and content, and then that.

use std::{
    fs::File,
    io::{self, Write as _},
};

use ring::digest;
use serde::Serialize;
use tracing::info;
use zeroize::Zeroizing;

use super::{Changes, Contents, Key, Owner, Unusable};
use crate::wiped::Wiped;

/// What the file begins with.
const MAGIC: [u8; 8] = *b"ipsec-xj";
/// Bytes of a record before its content: length, the same inverted, and checksum.
const HEAD: usize = 16;

/// A file of records that is being written.
#[derive(Debug)]
pub(super) struct Records {
    pub(super) file: File,
    /// Number of the next record.
    number: u64,
    /// How long it is.
    pub(super) bytes: u64,
}

impl Records {
    /// Begins an empty file.
    pub(super) fn begin(mut file: File, owner: &Owner) -> io::Result<Self> {
        file.write_all(&MAGIC)?;
        let mut records = Self {
            file,
            number: 0,
            bytes: MAGIC.len() as u64,
        };
        records.append_value(owner)?;
        Ok(records)
    }

    /// Adds what has changed in one step.
    pub(super) fn append(&mut self, changes: &Changes) -> io::Result<()> {
        let parts: Vec<(Key, Option<&serde_bytes::Bytes>)> = changes
            .iter()
            .map(|(key, part)| (*key, part.as_ref().map(|part| part.bytes().into())))
            .collect();
        self.append_value(&parts)
    }

    fn append_value<T: Serialize>(&mut self, value: &T) -> io::Result<()> {
        let mut record = Wiped::new();
        record.extend(&[0; HEAD]);
        record.append(value)?;
        let content = record.bytes().get(HEAD..).unwrap_or_default();
        let sum = checksum(self.number, content);
        let length = u32::try_from(content.len()).map_err(|_| io::ErrorKind::InvalidData)?;
        let head = [&length.to_be_bytes()[..], &(!length).to_be_bytes(), &sum].concat();
        for (to, from) in record.bytes_mut().iter_mut().zip(head) {
            *to = from;
        }
        // In one call. What is cut off all the same, by a death in its middle, is told by its length.
        self.file.write_all(record.bytes())?;
        self.number += 1;
        self.bytes += record.bytes().len() as u64;
        Ok(())
    }
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
pub(super) fn replay(bytes: &[u8], owner: &Owner) -> Result<Contents, Unusable> {
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
