//! Sealing and opening one ESP packet in place (RFC 4303), with ring for AEADs and HMAC and RustCrypto for AES-CBC.
//!
//! Nothing is allocated for a packet. Sequence numbers and replay are the caller's business: here they are input.

use std::ops::Range;

use aes::{
    Aes128, Aes192, Aes256, Block,
    cipher::{
        BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt, InnerIvInit, KeyInit,
        block_padding::NoPadding,
    },
};
use ipsec_common::Spi;
use ring::{
    aead, hmac,
    rand::{SecureRandom, SystemRandom},
};
use subtle::ConstantTimeEq;

use super::suite::{EspKeys, EspSuite, Integrity};

/// SPI and sequence number.
const ESP_HEADER: usize = 8;
/// Explicit IV of an AEAD (RFC 4106 section 3.1, RFC 7634 section 2).
const AEAD_IV: usize = 8;
/// Tag of an AEAD.
const TAG: usize = 16;
/// Block and IV of AES.
const BLOCK: usize = 16;
/// Pad length and next header.
const TRAILER: usize = 2;
/// Salt behind the key of an AEAD.
const SALT: usize = 4;

/// Keys of a wrong size, or no randomness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the keys do not fit the algorithms")]
pub struct BadKeys;

/// Why a packet was not sealed; a mistake of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// There is not enough room before or behind the payload.
    #[error("no room for the ESP packet")]
    Room,
    /// The cipher refused.
    #[error("the cipher refused the packet")]
    Cipher,
}

/// Why a packet was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Its length is impossible.
    #[error("the packet has an impossible length")]
    Malformed,
    /// It is forged, damaged, or sealed with other keys.
    #[error("the integrity check failed")]
    BadIcv,
    /// RFC 4303 section 2.4: it is authentic, and its padding is not 1, 2, 3 and so on.
    #[error("the padding is wrong")]
    BadTrailer,
}

/// An opened packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Where its payload is.
    pub payload: Range<usize>,
    /// What its payload is: 4 for IPv4, 41 for IPv6, 59 for a dummy packet (RFC 4303 section 2.6).
    pub next_header: u8,
}

/// AES with its key expanded.
enum Aes {
    Bits128(Aes128),
    Bits192(Aes192),
    Bits256(Aes256),
}

enum Cipher {
    Aead {
        key: Box<aead::LessSafeKey>,
        salt: [u8; SALT],
    },
    /// Boxed, for it is far longer than the other, which most SAs use: what all packets need should be close together.
    Cbc(Box<Cbc>),
}

struct Cbc {
    aes: Aes,
    /// Makes IVs that nobody can predict.
    iv: Aes128,
    mac: hmac::Key,
    icv: usize,
}

/// Algorithms and keys of one SA in one direction.
pub struct EspTransform {
    cipher: Cipher,
    esn: bool,
}

impl EspTransform {
    /// Expands the keys.
    ///
    /// # Errors
    ///
    /// [`BadKeys`].
    pub fn new(suite: EspSuite, keys: &EspKeys, esn: bool) -> Result<Self, BadKeys> {
        let cipher = match suite {
            EspSuite::Aes128Gcm16 => aead_cipher(&aead::AES_128_GCM, keys)?,
            EspSuite::Aes256Gcm16 => aead_cipher(&aead::AES_256_GCM, keys)?,
            EspSuite::ChaCha20Poly1305 => aead_cipher(&aead::CHACHA20_POLY1305, keys)?,
            EspSuite::AesCbc {
                key_bytes,
                integrity,
            } => cbc_cipher(key_bytes, integrity, keys)?,
        };
        Ok(Self { cipher, esn })
    }

    /// Bytes in front of the payload: ESP header and IV.
    pub fn header_bytes(&self) -> usize {
        match self.cipher {
            Cipher::Aead { .. } => ESP_HEADER + AEAD_IV,
            Cipher::Cbc(_) => ESP_HEADER + BLOCK,
        }
    }

    fn icv_bytes(&self) -> usize {
        match &self.cipher {
            Cipher::Aead { .. } => TAG,
            Cipher::Cbc(cbc) => cbc.icv,
        }
    }

    /// Multiple of which the padded payload with its trailer is.
    // RFC 4303 section 2.4: the ICV begins at a multiple of four, and a block cipher takes whole blocks.
    fn alignment(&self) -> usize {
        match self.cipher {
            Cipher::Aead { .. } => 4,
            Cipher::Cbc(_) => BLOCK,
        }
    }

    /// Most bytes behind the payload: padding, trailer and ICV.
    pub fn max_trailer_bytes(&self) -> usize {
        self.alignment() - 1 + TRAILER + self.icv_bytes()
    }

    /// Length of the ESP packet of a payload of so many bytes.
    pub fn sealed_bytes(&self, payload: usize) -> usize {
        self.header_bytes()
            + (payload + TRAILER).next_multiple_of(self.alignment())
            + self.icv_bytes()
    }

    /// Longest payload whose ESP packet fits into so many bytes; 0 if none does.
    pub fn max_payload(&self, esp: usize) -> usize {
        let room = esp.saturating_sub(self.header_bytes() + self.icv_bytes());
        (room - room % self.alignment()).saturating_sub(TRAILER)
    }

    /// Addresses of the expanded keys, for fetching them into the cache ahead of use.
    pub fn key_addresses(&self) -> Range<usize> {
        match &self.cipher {
            Cipher::Aead { key, .. } => addresses(&**key),
            Cipher::Cbc(cbc) => addresses(&**cbc),
        }
    }

    /// Seals the payload in `frame`, with [`Self::header_bytes`] of room in front of it and as much behind as
    /// [`Self::sealed_bytes`] needs. Returns where the ESP packet is.
    ///
    /// # Errors
    ///
    /// [`SealError`], with the frame in whatever state.
    pub fn seal(
        &self,
        spi: Spi,
        sequence: u64,
        next_header: u8,
        frame: &mut [u8],
        payload: Range<usize>,
    ) -> Result<Range<usize>, SealError> {
        let start = payload
            .start
            .checked_sub(self.header_bytes())
            .ok_or(SealError::Room)?;
        let end = start + self.sealed_bytes(payload.len());
        let packet = frame.get_mut(start..end).ok_or(SealError::Room)?;
        let (header, rest) = packet.split_at_mut(self.header_bytes());
        let (text, icv) = rest.split_at_mut(rest.len() - self.icv_bytes());
        pad(text, payload.len(), next_header);
        let associated = Associated::new(spi, sequence, self.esn);
        let Some((esp_header, iv)) = header.split_at_mut_checked(ESP_HEADER) else {
            return Err(SealError::Room);
        };
        esp_header.copy_from_slice(&associated.header);
        match &self.cipher {
            Cipher::Aead { key, salt } => {
                // RFC 4106 section 3.1: the IV must not repeat under one key, and a sequence number does not.
                iv.copy_from_slice(&sequence.to_be_bytes());
                let tag = key
                    .seal_in_place_separate_tag(
                        nonce(*salt, iv).ok_or(SealError::Cipher)?,
                        aead::Aad::from(associated.bytes()),
                        text,
                    )
                    .map_err(|_| SealError::Cipher)?;
                icv.copy_from_slice(tag.as_ref());
            }
            Cipher::Cbc(cbc) => {
                let mut block = Block::default();
                block
                    .iter_mut()
                    .zip(sequence.to_be_bytes())
                    .for_each(|(to, from)| *to = from);
                cbc.iv.encrypt_block(&mut block);
                iv.copy_from_slice(&block);
                cbc.aes.encrypt(&block, text).ok_or(SealError::Cipher)?;
                let sum = sum(&cbc.mac, &[header, text], &associated);
                icv.copy_from_slice(sum.as_ref().get(..icv.len()).ok_or(SealError::Cipher)?);
            }
        }
        Ok(start..end)
    }

    /// Opens the ESP packet at `esp` in `frame`. `sequence` is the whole number, its high half recovered by the window.
    ///
    /// # Errors
    ///
    /// [`OpenError`], with the frame in whatever state.
    pub fn open(
        &self,
        sequence: u64,
        frame: &mut [u8],
        esp: Range<usize>,
    ) -> Result<Opened, OpenError> {
        let start = esp.start + self.header_bytes();
        let packet = frame.get_mut(esp).ok_or(OpenError::Malformed)?;
        let (header, rest) = packet
            .split_at_mut_checked(self.header_bytes())
            .ok_or(OpenError::Malformed)?;
        let length = rest
            .len()
            .checked_sub(self.icv_bytes())
            .filter(|length| *length > 0 && length % self.alignment() == 0)
            .ok_or(OpenError::Malformed)?;
        let spi = header
            .first_chunk::<4>()
            .map(|bytes| Spi(u32::from_be_bytes(*bytes)))
            .ok_or(OpenError::Malformed)?;
        let associated = Associated::new(spi, sequence, self.esn);
        match &self.cipher {
            Cipher::Aead { key, salt } => {
                let iv = header.get(ESP_HEADER..).ok_or(OpenError::Malformed)?;
                key.open_in_place(
                    nonce(*salt, iv).ok_or(OpenError::Malformed)?,
                    aead::Aad::from(associated.bytes()),
                    rest,
                )
                .map_err(|_| OpenError::BadIcv)?;
            }
            Cipher::Cbc(cbc) => {
                let (text, icv) = rest.split_at_mut(length);
                let sum = sum(&cbc.mac, &[header, text], &associated);
                let expected = sum.as_ref().get(..icv.len()).ok_or(OpenError::BadIcv)?;
                if !bool::from(expected.ct_eq(icv)) {
                    return Err(OpenError::BadIcv);
                }
                let iv = header.get(ESP_HEADER..).ok_or(OpenError::Malformed)?;
                let iv = Block::try_from(iv).map_err(|_| OpenError::Malformed)?;
                cbc.aes.decrypt(&iv, text).ok_or(OpenError::Malformed)?;
            }
        }
        let (payload, next_header) =
            unpad(rest.get(..length).unwrap_or_default()).ok_or(OpenError::BadTrailer)?;
        Ok(Opened {
            payload: start..start + payload,
            next_header,
        })
    }
}

/// What is authenticated beside the ciphertext.
struct Associated {
    header: [u8; ESP_HEADER],
    wide: [u8; 12],
    esn: bool,
}

impl Associated {
    // RFC 4303 section 2.2.1: of an ESN only the low half travels; the high half is authenticated all the same.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the low half is what travels"
    )]
    fn new(spi: Spi, sequence: u64, esn: bool) -> Self {
        let (spi, low, high) = (
            spi.0.to_be_bytes(),
            (sequence as u32).to_be_bytes(),
            ((sequence >> 32) as u32).to_be_bytes(),
        );
        let mut header = [0; ESP_HEADER];
        let mut wide = [0; 12];
        for (to, from) in header.iter_mut().zip(spi.iter().chain(&low)) {
            *to = *from;
        }
        for (to, from) in wide.iter_mut().zip(spi.iter().chain(&high).chain(&low)) {
            *to = *from;
        }
        Self { header, wide, esn }
    }

    /// RFC 4106 section 5 and RFC 7634 section 2.1: SPI and whole sequence number.
    fn bytes(&self) -> &[u8] {
        if self.esn { &self.wide } else { &self.header }
    }

    /// RFC 4303 section 2.2.1: for HMAC the high half comes behind the packet.
    fn behind(&self) -> &[u8] {
        match (&self.wide, self.esn) {
            ([_, _, _, _, high @ .., _, _, _, _], true) => high,
            (_, _) => &[],
        }
    }
}

fn sum(mac: &hmac::Key, parts: &[&[u8]], associated: &Associated) -> hmac::Tag {
    let mut context = hmac::Context::with_key(mac);
    for part in parts {
        context.update(part);
    }
    context.update(associated.behind());
    context.sign()
}

fn nonce(salt: [u8; SALT], iv: &[u8]) -> Option<aead::Nonce> {
    let mut nonce = [0; SALT + AEAD_IV];
    let (front, back) = nonce.split_at_mut(SALT);
    front.copy_from_slice(&salt);
    (back.len() == iv.len()).then(|| back.copy_from_slice(iv))?;
    Some(aead::Nonce::assume_unique_for_key(nonce))
}

/// Writes padding, pad length and next header behind the first `payload` bytes.
fn pad(text: &mut [u8], payload: usize, next_header: u8) {
    let padding = text.len().saturating_sub(payload + TRAILER);
    let Some(tail) = text.get_mut(payload..) else {
        return;
    };
    for (byte, number) in tail.iter_mut().zip(1..) {
        *byte = number;
    }
    if let [.., length, next] = tail {
        // At most one block.
        *length = u8::try_from(padding).unwrap_or_default();
        *next = next_header;
    }
}

/// Length of the payload, and the next header, if the padding is as it must be.
fn unpad(text: &[u8]) -> Option<(usize, u8)> {
    let (&next_header, text) = text.split_last()?;
    let (&padding, text) = text.split_last()?;
    let payload = text.len().checked_sub(padding.into())?;
    let right = text
        .get(payload..)?
        .iter()
        .zip(1_u8..=u8::MAX)
        .all(|(byte, number)| *byte == number);
    right.then_some((payload, next_header))
}

fn addresses<T>(value: &T) -> Range<usize> {
    let start = std::ptr::from_ref(value).addr();
    start..start + size_of::<T>()
}

fn aead_cipher(algorithm: &'static aead::Algorithm, keys: &EspKeys) -> Result<Cipher, BadKeys> {
    let (key, salt) = keys
        .cipher
        .split_at_checked(algorithm.key_len())
        .ok_or(BadKeys)?;
    if !keys.integrity.is_empty() {
        return Err(BadKeys);
    }
    let key = aead::UnboundKey::new(algorithm, key).map_err(|_| BadKeys)?;
    Ok(Cipher::Aead {
        key: Box::new(aead::LessSafeKey::new(key)),
        salt: salt.try_into().map_err(|_| BadKeys)?,
    })
}

fn cbc_cipher(key_bytes: u8, integrity: Integrity, keys: &EspKeys) -> Result<Cipher, BadKeys> {
    let algorithm = match integrity {
        Integrity::HmacSha256 => hmac::HMAC_SHA256,
        Integrity::HmacSha384 => hmac::HMAC_SHA384,
        Integrity::HmacSha512 => hmac::HMAC_SHA512,
    };
    let hash = algorithm.digest_algorithm().output_len();
    if keys.cipher.len() != usize::from(key_bytes) || keys.integrity.len() != hash {
        return Err(BadKeys);
    }
    let key = keys.cipher.as_slice();
    let aes = match key_bytes {
        16 => Aes::Bits128(Aes128::new_from_slice(key).map_err(|_| BadKeys)?),
        24 => Aes::Bits192(Aes192::new_from_slice(key).map_err(|_| BadKeys)?),
        32 => Aes::Bits256(Aes256::new_from_slice(key).map_err(|_| BadKeys)?),
        _ => return Err(BadKeys),
    };
    // RFC 3602 section 3: the IV must not be predictable; a counter under a key that nobody knows is not.
    let mut iv = [0; 16];
    SystemRandom::new().fill(&mut iv).map_err(|_| BadKeys)?;
    Ok(Cipher::Cbc(Box::new(Cbc {
        aes,
        iv: Aes128::new(&iv.into()),
        mac: hmac::Key::new(algorithm, &keys.integrity),
        icv: hash / 2,
    })))
}

impl Aes {
    fn encrypt(&self, iv: &Block, text: &mut [u8]) -> Option<()> {
        let length = text.len();
        match self {
            Self::Bits128(aes) => cbc::Encryptor::inner_iv_init(aes, iv)
                .encrypt_padded::<NoPadding>(text, length)
                .is_ok(),
            Self::Bits192(aes) => cbc::Encryptor::inner_iv_init(aes, iv)
                .encrypt_padded::<NoPadding>(text, length)
                .is_ok(),
            Self::Bits256(aes) => cbc::Encryptor::inner_iv_init(aes, iv)
                .encrypt_padded::<NoPadding>(text, length)
                .is_ok(),
        }
        .then_some(())
    }

    fn decrypt(&self, iv: &Block, text: &mut [u8]) -> Option<()> {
        match self {
            Self::Bits128(aes) => cbc::Decryptor::inner_iv_init(aes, iv)
                .decrypt_padded::<NoPadding>(text)
                .is_ok(),
            Self::Bits192(aes) => cbc::Decryptor::inner_iv_init(aes, iv)
                .decrypt_padded::<NoPadding>(text)
                .is_ok(),
            Self::Bits256(aes) => cbc::Decryptor::inner_iv_init(aes, iv)
                .decrypt_padded::<NoPadding>(text)
                .is_ok(),
        }
        .then_some(())
    }
}

impl std::fmt::Debug for EspTransform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EspTransform(redacted)")
    }
}

#[cfg(test)]
mod tests;
