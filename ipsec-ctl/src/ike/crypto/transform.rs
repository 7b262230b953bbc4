//! Transforms (RFC 7296 section 3.3.2) that we implement policy for, with their IANA numbers and the names users write.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Encryption algorithm (transform type 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Encryption {
    /// ENCR_AES_CBC with a 128-bit key.
    AesCbc128,
    /// ENCR_AES_CBC with a 192-bit key.
    AesCbc192,
    /// ENCR_AES_CBC with a 256-bit key.
    AesCbc256,
    /// AES-GCM with a 16-octet ICV and a 128-bit key.
    Aes128Gcm16,
    /// AES-GCM with a 16-octet ICV and a 256-bit key.
    Aes256Gcm16,
    /// ENCR_CHACHA20_POLY1305.
    ChaCha20Poly1305,
}

impl Encryption {
    /// Transform ID.
    pub fn id(self) -> u16 {
        match self {
            Self::AesCbc128 | Self::AesCbc192 | Self::AesCbc256 => 12,
            Self::Aes128Gcm16 | Self::Aes256Gcm16 => 20,
            Self::ChaCha20Poly1305 => 28,
        }
    }

    /// Value of the Key Length attribute in bits, for the algorithms that carry one.
    // RFC 7634 section 4: ChaCha20-Poly1305 has one key size, so the attribute must not be there.
    pub fn key_length_bits(self) -> Option<u16> {
        match self {
            Self::AesCbc128 | Self::Aes128Gcm16 => Some(128),
            Self::AesCbc192 => Some(192),
            Self::AesCbc256 | Self::Aes256Gcm16 => Some(256),
            Self::ChaCha20Poly1305 => None,
        }
    }

    /// Whether it authenticates by itself, so that no integrity algorithm goes with it (RFC 5282 section 8).
    pub fn is_aead(self) -> bool {
        match self {
            Self::AesCbc128 | Self::AesCbc192 | Self::AesCbc256 => false,
            Self::Aes128Gcm16 | Self::Aes256Gcm16 | Self::ChaCha20Poly1305 => true,
        }
    }

    /// The name users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::AesCbc128 => "aes128",
            Self::AesCbc192 => "aes192",
            Self::AesCbc256 => "aes256",
            Self::Aes128Gcm16 => "aes128gcm16",
            Self::Aes256Gcm16 => "aes256gcm16",
            Self::ChaCha20Poly1305 => "chacha20poly1305",
        }
    }
}

/// Pseudorandom function (transform type 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Prf {
    /// PRF_HMAC_SHA2_256.
    HmacSha256,
    /// PRF_HMAC_SHA2_384.
    HmacSha384,
    /// PRF_HMAC_SHA2_512.
    HmacSha512,
}

impl Prf {
    /// Transform ID.
    pub fn id(self) -> u16 {
        match self {
            Self::HmacSha256 => 5,
            Self::HmacSha384 => 6,
            Self::HmacSha512 => 7,
        }
    }

    /// The name users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::HmacSha256 => "prfsha256",
            Self::HmacSha384 => "prfsha384",
            Self::HmacSha512 => "prfsha512",
        }
    }
}

/// Integrity algorithm (transform type 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Integrity {
    /// AUTH_HMAC_SHA2_256_128.
    HmacSha256,
    /// AUTH_HMAC_SHA2_384_192.
    HmacSha384,
    /// AUTH_HMAC_SHA2_512_256.
    HmacSha512,
}

impl Integrity {
    /// Transform ID.
    pub fn id(self) -> u16 {
        match self {
            Self::HmacSha256 => 12,
            Self::HmacSha384 => 13,
            Self::HmacSha512 => 14,
        }
    }

    /// The name users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::HmacSha256 => "sha256",
            Self::HmacSha384 => "sha384",
            Self::HmacSha512 => "sha512",
        }
    }

    /// The PRF with the same hash, meant when a proposal names none.
    pub fn prf(self) -> Prf {
        match self {
            Self::HmacSha256 => Prf::HmacSha256,
            Self::HmacSha384 => Prf::HmacSha384,
            Self::HmacSha512 => Prf::HmacSha512,
        }
    }
}

/// Key exchange group (transform type 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Group {
    /// Group 14, 2048-bit MODP (RFC 3526).
    Modp2048,
    /// Group 15, 3072-bit MODP (RFC 3526).
    Modp3072,
    /// Group 16, 4096-bit MODP (RFC 3526).
    Modp4096,
    /// Group 17, 6144-bit MODP (RFC 3526).
    Modp6144,
    /// Group 18, 8192-bit MODP (RFC 3526).
    Modp8192,
    /// Group 19, NIST P-256 (RFC 5903).
    Ecp256,
    /// Group 20, NIST P-384 (RFC 5903).
    Ecp384,
    /// Group 21, NIST P-521 (RFC 5903).
    Ecp521,
    /// Group 31, Curve25519 (RFC 8031).
    Curve25519,
}

impl Group {
    /// Transform ID.
    pub fn id(self) -> u16 {
        match self {
            Self::Modp2048 => 14,
            Self::Modp3072 => 15,
            Self::Modp4096 => 16,
            Self::Modp6144 => 17,
            Self::Modp8192 => 18,
            Self::Ecp256 => 19,
            Self::Ecp384 => 20,
            Self::Ecp521 => 21,
            Self::Curve25519 => 31,
        }
    }

    /// Whether a key exchange in it takes many times as long as one on a curve.
    pub fn is_slow(self) -> bool {
        match self {
            Self::Modp2048 | Self::Modp3072 | Self::Modp4096 | Self::Modp6144 | Self::Modp8192 => {
                true
            }
            Self::Ecp256 | Self::Ecp384 | Self::Ecp521 | Self::Curve25519 => false,
        }
    }

    /// The name users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Modp2048 => "modp2048",
            Self::Modp3072 => "modp3072",
            Self::Modp4096 => "modp4096",
            Self::Modp6144 => "modp6144",
            Self::Modp8192 => "modp8192",
            Self::Ecp256 => "ecp256",
            Self::Ecp384 => "ecp384",
            Self::Ecp521 => "ecp521",
            Self::Curve25519 => "x25519",
        }
    }
}

/// Sequence numbers of ESP (transform type 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Esn {
    /// 32 bits.
    No,
    /// 64 bits, of which 32 travel (RFC 4303 section 2.2.1).
    Yes,
}

impl Esn {
    /// Transform ID.
    pub fn id(self) -> u16 {
        match self {
            Self::No => 0,
            Self::Yes => 1,
        }
    }

    /// The name users write.
    pub fn name(self) -> &'static str {
        match self {
            Self::No => "noesn",
            Self::Yes => "esn",
        }
    }
}

/// One word of a proposal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    Encryption(Encryption),
    Prf(Prf),
    Integrity(Integrity),
    Group(Group),
    Esn(Esn),
}

impl Word {
    /// Reads one word; other implementations' spellings of the same algorithm are taken too.
    pub(super) fn read(word: &str) -> Option<Self> {
        Some(match word {
            "aes128" | "aes128cbc" => Self::Encryption(Encryption::AesCbc128),
            "aes192" | "aes192cbc" => Self::Encryption(Encryption::AesCbc192),
            "aes256" | "aes256cbc" => Self::Encryption(Encryption::AesCbc256),
            "aes128gcm16" | "aes128gcm128" | "aes128gcm" => {
                Self::Encryption(Encryption::Aes128Gcm16)
            }
            "aes256gcm16" | "aes256gcm128" | "aes256gcm" => {
                Self::Encryption(Encryption::Aes256Gcm16)
            }
            "chacha20poly1305" => Self::Encryption(Encryption::ChaCha20Poly1305),
            "prfsha256" => Self::Prf(Prf::HmacSha256),
            "prfsha384" => Self::Prf(Prf::HmacSha384),
            "prfsha512" => Self::Prf(Prf::HmacSha512),
            "sha256" | "sha2_256" => Self::Integrity(Integrity::HmacSha256),
            "sha384" | "sha2_384" => Self::Integrity(Integrity::HmacSha384),
            "sha512" | "sha2_512" => Self::Integrity(Integrity::HmacSha512),
            "modp2048" => Self::Group(Group::Modp2048),
            "modp3072" => Self::Group(Group::Modp3072),
            "modp4096" => Self::Group(Group::Modp4096),
            "modp6144" => Self::Group(Group::Modp6144),
            "modp8192" => Self::Group(Group::Modp8192),
            "ecp256" => Self::Group(Group::Ecp256),
            "ecp384" => Self::Group(Group::Ecp384),
            "ecp521" => Self::Group(Group::Ecp521),
            "x25519" | "curve25519" => Self::Group(Group::Curve25519),
            "esn" => Self::Esn(Esn::Yes),
            "noesn" => Self::Esn(Esn::No),
            _ => return None,
        })
    }
}

/// Why an algorithm is refused by name, for those that are too weak to offer.
pub(super) fn obsolete(word: &str) -> Option<&'static str> {
    Some(match word {
        // RFC 8247 section 2.1 and RFC 8221 section 5: DES must not be used; 3DES's small block is why it goes too.
        "des" => "DES has a 56-bit key and must not be used (RFC 8247, RFC 8221)",
        "3des" => {
            "3DES has a 64-bit block, which collides after a few gigabytes (RFC 8247, RFC 8221)"
        }
        // RFC 8247 section 2.3 and RFC 8221 section 6: HMAC-MD5 must not be used.
        "md5" | "prfmd5" => "MD5 must not be used (RFC 8247, RFC 8221)",
        "sha1" | "sha" | "prfsha1" => "SHA-1 is being withdrawn (RFC 8247); use sha256 or better",
        // RFC 8247 section 2.4: groups 1 and 22 must not, 2 and 5 should not be used.
        "modp768" | "modp1024" | "modp1536" => {
            "the group is shorter than 2048 bits and can be broken (RFC 8247)"
        }
        "null" => "NULL encryption would send everything in the clear",
        _ => return None,
    })
}

macro_rules! display_by_name {
    ($($kind:ty),*) => {$(
        impl fmt::Display for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    )*};
}

display_by_name!(Encryption, Prf, Integrity, Group, Esn);
