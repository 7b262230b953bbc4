//! The Security Parameters Index of ESP.

use core::fmt;

/// SPI of an ESP SA, in host byte order (RFC 4303 section 2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[repr(transparent)]
pub struct Spi(pub u32);

impl Spi {
    /// Lowest SPI that may name an SA.
    // RFC 4303 section 2.1: 0 is for local use and 1 to 255 are reserved.
    pub const LOWEST: Self = Self(256);

    /// Reads an SPI as it stands in a packet.
    pub const fn from_be_bytes(bytes: [u8; 4]) -> Self {
        Self(u32::from_be_bytes(bytes))
    }

    /// Writes the SPI as it stands in a packet.
    pub const fn to_be_bytes(self) -> [u8; 4] {
        self.0.to_be_bytes()
    }
}

impl fmt::Display for Spi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}
