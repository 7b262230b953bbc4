//! Bytes that may hold keys: a buffer that leaves none behind when it grows or goes.

use std::{fmt, io};

use serde::Serialize;
use zeroize::Zeroize;

/// Room that most values need.
const USUAL: usize = 4096;

/// A buffer that is wiped.
#[derive(Clone, PartialEq, Eq)]
pub struct Wiped(Vec<u8>);

impl Wiped {
    /// Empty, with room for most values.
    pub fn new() -> Self {
        Self(Vec::with_capacity(USUAL))
    }

    /// A value as MessagePack with the names of fields.
    ///
    /// # Errors
    ///
    /// It holds what MessagePack cannot say.
    pub fn of<T: Serialize + ?Sized>(value: &T) -> io::Result<Self> {
        let mut bytes = Self::new();
        bytes.append(value)?;
        Ok(bytes)
    }

    /// Adds a value as MessagePack with the names of fields.
    ///
    /// # Errors
    ///
    /// It holds what MessagePack cannot say.
    pub fn append<T: Serialize + ?Sized>(&mut self, value: &T) -> io::Result<()> {
        let mut serializer = rmp_serde::Serializer::new(self).with_struct_map();
        value
            .serialize(&mut serializer)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// Adds bytes.
    pub fn extend(&mut self, bytes: &[u8]) {
        if self.0.capacity() - self.0.len() < bytes.len() {
            let room = (self.0.capacity() * 2).max(self.0.len() + bytes.len());
            let mut larger = Vec::with_capacity(room);
            larger.extend_from_slice(&self.0);
            std::mem::replace(&mut self.0, larger).zeroize();
        }
        self.0.extend_from_slice(bytes);
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes, to be changed in place.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Default for Wiped {
    fn default() -> Self {
        Self::new()
    }
}

impl From<Vec<u8>> for Wiped {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl io::Write for Wiped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Wiped {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Wiped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wiped({} bytes)", self.0.len())
    }
}
