//! Algorithms of an SA as the kernel's cryptography names them.

use crate::{
    esp::{EspKeys, EspSuite, Integrity},
    net::xfrm::Algorithms,
};

/// Every suite that the daemon negotiates, for probes and tests.
pub fn all_suites() -> impl Iterator<Item = EspSuite> {
    let hashes = [
        Integrity::HmacSha256,
        Integrity::HmacSha384,
        Integrity::HmacSha512,
    ];
    let cbc = [16, 24, 32].into_iter().flat_map(move |key_bytes| {
        hashes.into_iter().map(move |integrity| EspSuite::AesCbc {
            key_bytes,
            integrity,
        })
    });
    [
        EspSuite::Aes128Gcm16,
        EspSuite::Aes256Gcm16,
        EspSuite::ChaCha20Poly1305,
    ]
    .into_iter()
    .chain(cbc)
}

/// Lengths of cipher key with salt, and of integrity key, in bytes.
pub fn key_lengths(suite: EspSuite) -> (usize, usize) {
    const SALT: usize = 4;
    match suite {
        EspSuite::Aes128Gcm16 => (16 + SALT, 0),
        EspSuite::Aes256Gcm16 | EspSuite::ChaCha20Poly1305 => (32 + SALT, 0),
        EspSuite::AesCbc {
            key_bytes,
            integrity,
        } => (key_bytes.into(), hash_bytes(integrity)),
    }
}

/// A suite as users write it.
pub fn name(suite: EspSuite) -> String {
    match suite {
        EspSuite::Aes128Gcm16 => "aes128gcm16".to_owned(),
        EspSuite::Aes256Gcm16 => "aes256gcm16".to_owned(),
        EspSuite::ChaCha20Poly1305 => "chacha20poly1305".to_owned(),
        EspSuite::AesCbc {
            key_bytes,
            integrity,
        } => format!(
            "aes{}-{}",
            u16::from(key_bytes) * 8,
            match integrity {
                Integrity::HmacSha256 => "sha256",
                Integrity::HmacSha384 => "sha384",
                Integrity::HmacSha512 => "sha512",
            }
        ),
    }
}

fn hash_bytes(integrity: Integrity) -> usize {
    match integrity {
        Integrity::HmacSha256 => 32,
        Integrity::HmacSha384 => 48,
        Integrity::HmacSha512 => 64,
    }
}

/// The suite with its keys for the kernel; none if their lengths do not fit.
pub fn algorithms(suite: EspSuite, keys: &EspKeys) -> Option<Algorithms> {
    if (keys.cipher.len(), keys.integrity.len()) != key_lengths(suite) {
        return None;
    }
    let aead = |name| Algorithms::Aead {
        name,
        key: keys.cipher.clone(),
        icv_bits: 128,
    };
    Some(match suite {
        EspSuite::Aes128Gcm16 | EspSuite::Aes256Gcm16 => aead("rfc4106(gcm(aes))"),
        EspSuite::ChaCha20Poly1305 => aead("rfc7539esp(chacha20,poly1305)"),
        EspSuite::AesCbc { integrity, .. } => Algorithms::Separate {
            cipher: "cbc(aes)",
            cipher_key: keys.cipher.clone(),
            integrity: match integrity {
                Integrity::HmacSha256 => "hmac(sha256)",
                Integrity::HmacSha384 => "hmac(sha384)",
                Integrity::HmacSha512 => "hmac(sha512)",
            },
            integrity_key: keys.integrity.clone(),
            // RFC 4868 section 2.3: half of the hash.
            icv_bits: match integrity {
                Integrity::HmacSha256 => 128,
                Integrity::HmacSha384 => 192,
                Integrity::HmacSha512 => 256,
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use zeroize::Zeroizing;

    use super::*;

    #[test]
    fn keys_of_a_wrong_length_do_not_reach_the_kernel() {
        for suite in all_suites() {
            let (cipher, integrity) = key_lengths(suite);
            let keys = |cipher, integrity| EspKeys {
                cipher: Zeroizing::new(vec![1; cipher]),
                integrity: Zeroizing::new(vec![2; integrity]),
            };
            assert!(algorithms(suite, &keys(cipher, integrity)).is_some());
            assert!(algorithms(suite, &keys(cipher - 1, integrity)).is_none());
            assert!(algorithms(suite, &keys(cipher, integrity + 1)).is_none());
        }
    }
}
