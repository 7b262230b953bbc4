//! The algorithms of an ESP SA, and its keys.

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// Algorithms of an ESP SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum EspSuite {
    /// AES-GCM with a 16-byte ICV and a 128-bit key (RFC 4106).
    Aes128Gcm16,
    /// AES-GCM with a 16-byte ICV and a 256-bit key (RFC 4106).
    Aes256Gcm16,
    /// ChaCha20-Poly1305 (RFC 7634).
    ChaCha20Poly1305,
    /// AES-CBC (RFC 3602) with a key of 16, 24 or 32 bytes, and HMAC.
    AesCbc {
        /// Length of the cipher's key in bytes: 16, 24 or 32.
        key_bytes: u8,
        /// The HMAC.
        integrity: Integrity,
    },
}

/// Integrity algorithm of an ESP SA whose cipher has none of its own (RFC 4868).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Integrity {
    /// HMAC-SHA2-256-128.
    HmacSha256,
    /// HMAC-SHA2-384-192.
    HmacSha384,
    /// HMAC-SHA2-512-256.
    HmacSha512,
}

/// Keys of one SA in one direction: cipher key followed by its salt, and integrity key (empty for an AEAD).
#[derive(Clone, Serialize, Deserialize)]
pub struct EspKeys {
    /// Cipher key, with the 4-byte salt of RFC 4106 and RFC 7634 behind it.
    pub cipher: Zeroizing<Vec<u8>>,
    /// Integrity key.
    pub integrity: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for EspKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EspKeys(redacted)")
    }
}
