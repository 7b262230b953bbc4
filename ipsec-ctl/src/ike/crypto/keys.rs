//! Keys of an IKE SA and of its children (RFC 7296 sections 2.14 and 2.17).

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{
    suite::{ChildSuite, IkeSuite},
    transform::{Encryption, Integrity, Prf},
};
use crate::ike::message::IkeSpi;

/// Key bytes, zeroized, without a rendering.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct Key(Zeroizing<Vec<u8>>);

impl Key {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl From<Zeroizing<Vec<u8>>> for Key {
    fn from(bytes: Zeroizing<Vec<u8>>) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(redacted)")
    }
}

/// Keys of one direction of an IKE SA.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SkKeys {
    /// SK_e: cipher key, for an AEAD with its salt behind it.
    pub encryption: Key,
    /// SK_a, empty for an AEAD.
    pub integrity: Key,
}

/// All keys of an IKE SA.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IkeKeys {
    /// SK_d, from which the children's keys come.
    pub sk_d: Key,
    /// Of the initiator's messages.
    pub initiator: SkKeys,
    /// Of the responder's messages.
    pub responder: SkKeys,
    /// SK_pi, which signs the initiator's identity.
    pub sk_pi: Key,
    /// SK_pr, which signs the responder's identity.
    pub sk_pr: Key,
}

/// Key material of one direction of a CHILD SA.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChildKey {
    /// Cipher key, for an AEAD with its salt behind it.
    pub encryption: Key,
    /// Integrity key, empty for an AEAD.
    pub integrity: Key,
}

/// Keys of a CHILD SA.
#[derive(Clone, Debug)]
pub struct ChildKeys {
    /// For what the initiator of the exchange sends.
    pub initiator: ChildKey,
    /// For what the responder of the exchange sends.
    pub responder: ChildKey,
}

/// What both nonces of an exchange are.
#[derive(Clone, Copy, Debug)]
pub struct Nonces<'a> {
    /// Of the initiator of the exchange.
    pub initiator: &'a [u8],
    /// Of its responder.
    pub responder: &'a [u8],
}

impl IkeKeys {
    /// Derives the keys of a first IKE SA from the shared secret of its key exchange.
    // RFC 7296 section 2.14: SKEYSEED = prf(Ni | Nr, g^ir),
    // {SK_d | SK_ai | SK_ar | SK_ei | SK_er | SK_pi | SK_pr} = prf+(SKEYSEED, Ni | Nr | SPIi | SPIr).
    pub fn derive(
        suite: &IkeSuite,
        shared: &[u8],
        nonces: Nonces<'_>,
        spi_i: IkeSpi,
        spi_r: IkeSpi,
    ) -> Self {
        let key = Zeroizing::new([nonces.initiator, nonces.responder].concat());
        let skeyseed = suite.prf.compute(&key, &[shared]);
        Self::expand(suite, &skeyseed, nonces, spi_i, spi_r)
    }

    /// Derives the keys of an IKE SA that takes the place of this one, whose PRF is `prf`.
    // RFC 7296 section 2.18: SKEYSEED = prf(SK_d (old), g^ir (new) | Ni | Nr) with the old PRF, all else with the new.
    pub fn rekeyed(
        &self,
        prf: Prf,
        suite: &IkeSuite,
        shared: &[u8],
        nonces: Nonces<'_>,
        spi_i: IkeSpi,
        spi_r: IkeSpi,
    ) -> Self {
        let parts = [shared, nonces.initiator, nonces.responder];
        let skeyseed = prf.compute(self.sk_d.bytes(), &parts);
        Self::expand(suite, &skeyseed, nonces, spi_i, spi_r)
    }

    fn expand(
        suite: &IkeSuite,
        skeyseed: &[u8],
        nonces: Nonces<'_>,
        spi_i: IkeSpi,
        spi_r: IkeSpi,
    ) -> Self {
        let (spi_i, spi_r) = (spi_i.0.to_be_bytes(), spi_r.0.to_be_bytes());
        let cipher = cipher_bytes(suite.encryption);
        let auth = suite.integrity.map_or(0, Integrity::key_bytes);
        let prf = suite.prf.output_bytes();
        let stream = suite.prf.plus(
            skeyseed,
            &[nonces.initiator, nonces.responder, &spi_i, &spi_r],
            3 * prf + 2 * auth + 2 * cipher,
        );
        let mut stream = Stream(&stream);
        let sk_d = stream.take(prf);
        let (sk_ai, sk_ar) = (stream.take(auth), stream.take(auth));
        let (sk_ei, sk_er) = (stream.take(cipher), stream.take(cipher));
        Self {
            sk_d,
            initiator: SkKeys {
                encryption: sk_ei,
                integrity: sk_ai,
            },
            responder: SkKeys {
                encryption: sk_er,
                integrity: sk_ar,
            },
            sk_pi: stream.take(prf),
            sk_pr: stream.take(prf),
        }
    }

    /// Wipes what signs identities, which is done once.
    pub fn forget_proofs(&mut self) {
        self.sk_pi = Key::default();
        self.sk_pr = Key::default();
    }

    /// Derives the keys of a child; `shared` is the secret of a key exchange of its own, if there was one.
    // RFC 7296 section 2.17: KEYMAT = prf+(SK_d, [g^ir |] Ni | Nr); first what the initiator sends, and in each
    // direction encryption before integrity.
    pub fn child(
        &self,
        prf: Prf,
        shared: Option<&[u8]>,
        nonces: Nonces<'_>,
        suite: &ChildSuite,
    ) -> ChildKeys {
        let cipher = cipher_bytes(suite.encryption);
        let auth = suite.integrity.map_or(0, Integrity::key_bytes);
        let stream = prf.plus(
            self.sk_d.bytes(),
            &[
                shared.unwrap_or_default(),
                nonces.initiator,
                nonces.responder,
            ],
            2 * (cipher + auth),
        );
        let mut stream = Stream(&stream);
        let mut direction = || ChildKey {
            encryption: stream.take(cipher),
            integrity: stream.take(auth),
        };
        ChildKeys {
            initiator: direction(),
            responder: direction(),
        }
    }
}

/// Bytes of key material that a cipher takes, the salt of an AEAD included.
// RFC 5282 section 7.1 and RFC 7634 section 2: four bytes of salt come behind the key.
fn cipher_bytes(encryption: Encryption) -> usize {
    match encryption {
        Encryption::AesCbc128 => 16,
        Encryption::AesCbc192 => 24,
        Encryption::AesCbc256 => 32,
        Encryption::Aes128Gcm16 => 16 + 4,
        Encryption::Aes256Gcm16 | Encryption::ChaCha20Poly1305 => 32 + 4,
    }
}

/// A key stream that is cut into keys.
struct Stream<'a>(&'a [u8]);

impl Stream<'_> {
    fn take(&mut self, length: usize) -> Key {
        let (key, rest) = self.0.split_at(length);
        self.0 = rest;
        Key(Zeroizing::new(key.to_vec()))
    }
}

#[cfg(test)]
mod tests;
