//! A cursor over bytes from the network: every read names its field, so that a refusal says what was wrong.

use thiserror::Error;

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ParseError {
    /// The bytes end inside a field.
    #[error("{0} is cut short")]
    Truncated(&'static str),
    /// A field holds what the RFC forbids.
    #[error("{0} has an impossible value")]
    Invalid(&'static str),
    /// More of something than any honest peer sends.
    #[error("too many {0}")]
    TooMany(&'static str),
    /// Bytes are left where a structure has ended.
    #[error("{0} is followed by stray bytes")]
    Trailing(&'static str),
    /// Another major version of IKE.
    #[error("IKE version {0} is not 2")]
    MajorVersion(u8),
}

/// The cursor.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    left: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts at the first of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { left: bytes }
    }

    /// Takes `count` bytes.
    pub fn take(&mut self, count: usize, field: &'static str) -> Result<&'a [u8], ParseError> {
        let (head, tail) = self
            .left
            .split_at_checked(count)
            .ok_or(ParseError::Truncated(field))?;
        self.left = tail;
        Ok(head)
    }

    /// Takes an array.
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], ParseError> {
        let (head, tail) = self
            .left
            .split_first_chunk()
            .ok_or(ParseError::Truncated(field))?;
        self.left = tail;
        Ok(*head)
    }

    /// Takes one byte.
    pub fn u8(&mut self, field: &'static str) -> Result<u8, ParseError> {
        self.array(field).map(u8::from_be_bytes)
    }

    /// Takes a 16-bit number.
    pub fn u16(&mut self, field: &'static str) -> Result<u16, ParseError> {
        self.array(field).map(u16::from_be_bytes)
    }

    /// Takes a 32-bit number.
    pub fn u32(&mut self, field: &'static str) -> Result<u32, ParseError> {
        self.array(field).map(u32::from_be_bytes)
    }

    /// Takes a 64-bit number.
    pub fn u64(&mut self, field: &'static str) -> Result<u64, ParseError> {
        self.array(field).map(u64::from_be_bytes)
    }

    /// Takes all that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.left)
    }

    /// Takes the body of a structure whose length field counts `head` bytes before the body too.
    pub fn body(
        &mut self,
        length: u16,
        head: usize,
        field: &'static str,
    ) -> Result<Self, ParseError> {
        let body = usize::from(length)
            .checked_sub(head)
            .ok_or(ParseError::Invalid(field))?;
        self.take(body, field).map(Self::new)
    }

    /// How many bytes are left.
    pub fn remaining(&self) -> usize {
        self.left.len()
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// Refuses bytes behind the end of `field`.
    pub fn finish(self, field: &'static str) -> Result<(), ParseError> {
        if self.is_empty() {
            Ok(())
        } else {
            Err(ParseError::Trailing(field))
        }
    }
}
