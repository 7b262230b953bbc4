//! Sealing and opening of encrypted IKE messages, whole or in fragments (RFC 7296 section 3.14, RFC 5282, RFC 7634, RFC 7383).

use aes::{Aes128, Aes192, Aes256};
use cbc::{
    Decryptor, Encryptor,
    cipher::{BlockModeDecrypt, BlockModeEncrypt, KeyIvInit, block_padding::NoPadding},
};
use ring::{aead, hmac};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::{keys::SkKeys, suite::IkeSuite, transform::Encryption};
use crate::ike::{
    message::{
        EmitError, Header, emit_payloads, encrypted_overhead, frame_encrypted,
        payload::{Encrypted, Part, Payload, PayloadType},
    },
    rng::Random,
};

/// Block and IV of AES-CBC, in bytes.
const BLOCK: usize = 16;
/// Explicit IV of an AEAD, in bytes.
const AEAD_IV: usize = 8;
/// Tag of an AEAD, in bytes.
const TAG: usize = 16;
/// Fragments that a message may have: its parts' numbers fit seven bits of an IV, and no honest message needs more.
pub const MOST_PARTS: u16 = 64;
/// In the place of a part's number: none has it.
const SYNCHRONIZATION: u16 = 127;

/// Why a message cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// It is too short, or not a whole number of blocks.
    #[error("the encrypted payload has an impossible length")]
    Length,
    /// It is forged, damaged, or from another IKE SA.
    #[error("the integrity check failed")]
    Integrity,
    /// It is authentic and yet wrong.
    #[error("the padding is longer than the payload")]
    Padding,
}

/// Why a message cannot be sealed; a mistake of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// It does not fit the format.
    #[error(transparent)]
    Emit(#[from] EmitError),
    /// The keys do not belong to the algorithms.
    #[error("the keys do not fit the algorithms")]
    Keys,
}

/// Writes a message whose payloads are all encrypted, as one datagram.
///
/// # Errors
///
/// [`SealError`].
pub fn seal(
    header: &Header,
    payloads: &[Payload<'_>],
    suite: &IkeSuite,
    keys: &SkKeys,
    random: &mut dyn Random,
) -> Result<Vec<u8>, SealError> {
    let (first, content) = emit_payloads(payloads)?;
    let content = Zeroizing::new(content);
    seal_part(header, first, Use::Whole, &content, (suite, keys), random)
}

/// Writes a message whose payloads are all encrypted, as fragments of at most `most` bytes each if it is longer.
///
/// # Errors
///
/// [`SealError`], also for a message that would need more than [`MOST_PARTS`] fragments.
// RFC 7383 section 2.5: the content is split and each part encrypted on its own; the first tells the type of the first
// payload, the others none.
pub fn seal_split(
    header: &Header,
    payloads: &[Payload<'_>],
    suite: &IkeSuite,
    keys: &SkKeys,
    random: &mut dyn Random,
    most: usize,
) -> Result<Vec<Vec<u8>>, SealError> {
    let (first, content) = emit_payloads(payloads)?;
    let content = Zeroizing::new(content);
    let shape = Shape::of(suite);
    if encrypted_overhead(false) + shape.body(content.len()) <= most {
        return seal_part(header, first, Use::Whole, &content, (suite, keys), random)
            .map(|whole| vec![whole]);
    }
    let chunk = shape.content_within(most.saturating_sub(encrypted_overhead(true)));
    let chunks = content.chunks(chunk.max(1));
    let total = u16::try_from(chunks.len())
        .ok()
        .filter(|total| *total <= MOST_PARTS)
        .ok_or(EmitError("message"))?;
    (1..=total)
        .zip(chunks)
        .map(|(number, chunk)| {
            let first = if number == 1 {
                first
            } else {
                PayloadType::NONE
            };
            let part = Use::Part(Part { number, total });
            seal_part(header, first, part, chunk, (suite, keys), random)
        })
        .collect()
}

/// Writes our answer to a synchronization of message IDs, all of which have message ID 0; `unique` tells them apart.
///
/// # Errors
///
/// [`SealError`].
pub fn seal_synchronization(
    header: &Header,
    payloads: &[Payload<'_>],
    (suite, keys): (&IkeSuite, &SkKeys),
    random: &mut dyn Random,
    unique: u32,
) -> Result<Vec<u8>, SealError> {
    let (first, content) = emit_payloads(payloads)?;
    let how = Use::Synchronization(unique);
    seal_part(header, first, how, &content, (suite, keys), random)
}

/// What a datagram is, as far as its IV must tell.
#[derive(Clone, Copy)]
enum Use {
    Whole,
    Part(Part),
    Synchronization(u32),
}

/// Lengths that a suite gives to the body of an Encrypted payload, in bytes.
struct Shape {
    iv: usize,
    block: usize,
    icv: usize,
}

impl Shape {
    fn of(suite: &IkeSuite) -> Self {
        if suite.encryption.is_aead() {
            return Self {
                iv: AEAD_IV,
                block: 1,
                icv: TAG,
            };
        }
        Self {
            iv: BLOCK,
            block: BLOCK,
            icv: suite.integrity.map_or(0, |integrity| integrity.icv_bytes()),
        }
    }

    // RFC 7296 section 3.14: as much padding as fills the block, then its length in a byte.
    fn padding(&self, content: usize) -> usize {
        (self.block - (content + 1) % self.block) % self.block
    }

    /// IV, padded content and ICV.
    fn body(&self, content: usize) -> usize {
        self.iv + content + self.padding(content) + 1 + self.icv
    }

    /// The longest content whose body has at most `body` bytes.
    fn content_within(&self, body: usize) -> usize {
        let padded = body.saturating_sub(self.iv + self.icv);
        (padded - padded % self.block).saturating_sub(1)
    }
}

/// Encrypts one datagram's content.
fn seal_part(
    header: &Header,
    first: PayloadType,
    how: Use,
    content: &[u8],
    (suite, keys): (&IkeSuite, &SkKeys),
    random: &mut dyn Random,
) -> Result<Vec<u8>, SealError> {
    let (part, number, unique) = match how {
        Use::Whole => (None, 0, header.message_id.0),
        Use::Part(part) => (Some(part), part.number, header.message_id.0),
        Use::Synchronization(unique) => (None, SYNCHRONIZATION, unique),
    };
    let shape = Shape::of(suite);
    let padding = shape.padding(content.len());
    let plain = content.len() + padding + 1;
    let mut frame = frame_encrypted(header, first, part, shape.body(content.len()))?;
    let (associated, body) = frame
        .bytes
        .split_at_mut_checked(frame.body.start)
        .ok_or(SealError::Keys)?;
    let (iv_bytes, rest) = body.split_at_mut(shape.iv);
    random.fill(iv_bytes);
    let aead = suite.encryption.is_aead();
    if aead {
        // RFC 5282 section 3.1: the IV must not repeat under one key. A message ID is used once for a request and once
        // for a response, and each of their parts has its number; the random bytes guard against what a restored state
        // may repeat.
        let [_, _, _, kind, id @ ..] = iv_bytes else {
            return Err(SealError::Keys);
        };
        *kind = u8::try_from(number << 1).map_err(|_| EmitError("message"))?
            | u8::from(header.flags.response);
        id.copy_from_slice(&unique.to_be_bytes());
    }
    let (text, tag) = rest.split_at_mut(plain);
    text.get_mut(..content.len())
        .ok_or(SealError::Keys)?
        .copy_from_slice(content);
    if let Some(length) = text.last_mut() {
        *length = u8::try_from(padding).unwrap_or_default();
    }
    if aead {
        let (key, nonce) = aead_key(suite.encryption, keys, iv_bytes).ok_or(SealError::Keys)?;
        let sealed = key
            .seal_in_place_separate_tag(nonce, aead::Aad::from(associated), text)
            .map_err(|_| SealError::Keys)?;
        tag.copy_from_slice(sealed.as_ref());
    } else {
        encrypt_cbc(suite.encryption, keys, iv_bytes, text).ok_or(SealError::Keys)?;
        let covered = frame.bytes.len() - shape.icv;
        let (covered, tag) = frame.bytes.split_at_mut(covered);
        let sum = checksum(suite, keys, covered).ok_or(SealError::Keys)?;
        tag.copy_from_slice(sum.as_ref().get(..shape.icv).ok_or(SealError::Keys)?);
    }
    Ok(frame.bytes)
}

/// Opens the Encrypted payload of `message`, or the fragment of one; returns the chain of payloads inside, or that part of
/// it.
///
/// # Errors
///
/// [`OpenError`]. Nothing is known about the message then.
pub fn open(
    message: &[u8],
    encrypted: &Encrypted,
    suite: &IkeSuite,
    keys: &SkKeys,
) -> Result<Zeroizing<Vec<u8>>, OpenError> {
    let body = message
        .get(encrypted.body.clone())
        .ok_or(OpenError::Length)?;
    let mut text = if suite.encryption.is_aead() {
        let associated = message
            .get(encrypted.associated.clone())
            .ok_or(OpenError::Length)?;
        open_aead(associated, body, suite, keys)?
    } else {
        open_cbc(message, body, suite, keys)?
    };
    let padding = text.pop().ok_or(OpenError::Padding)?;
    let length = text
        .len()
        .checked_sub(padding.into())
        .ok_or(OpenError::Padding)?;
    text.truncate(length);
    Ok(text)
}

fn open_aead(
    associated: &[u8],
    body: &[u8],
    suite: &IkeSuite,
    keys: &SkKeys,
) -> Result<Zeroizing<Vec<u8>>, OpenError> {
    let (iv, sealed) = body.split_at_checked(AEAD_IV).ok_or(OpenError::Length)?;
    let length = sealed.len().checked_sub(TAG).ok_or(OpenError::Length)?;
    let mut text = Zeroizing::new(sealed.to_vec());
    let (key, nonce) = aead_key(suite.encryption, keys, iv).ok_or(OpenError::Integrity)?;
    key.open_in_place(nonce, aead::Aad::from(associated), &mut text)
        .map_err(|_| OpenError::Integrity)?;
    text.truncate(length);
    Ok(text)
}

fn open_cbc(
    message: &[u8],
    body: &[u8],
    suite: &IkeSuite,
    keys: &SkKeys,
) -> Result<Zeroizing<Vec<u8>>, OpenError> {
    let icv = suite.integrity.map_or(0, |integrity| integrity.icv_bytes());
    let (iv, rest) = body.split_at_checked(BLOCK).ok_or(OpenError::Length)?;
    let length = rest.len().checked_sub(icv).ok_or(OpenError::Length)?;
    if length == 0 || length % BLOCK != 0 {
        return Err(OpenError::Length);
    }
    let (sealed, given) = rest.split_at(length);
    let covered = message
        .get(..message.len() - icv)
        .ok_or(OpenError::Length)?;
    let sum = checksum(suite, keys, covered).ok_or(OpenError::Integrity)?;
    let sum = sum.as_ref().get(..icv).ok_or(OpenError::Integrity)?;
    if !bool::from(sum.ct_eq(given)) {
        return Err(OpenError::Integrity);
    }
    let mut text = Zeroizing::new(sealed.to_vec());
    decrypt_cbc(suite.encryption, keys, iv, &mut text).ok_or(OpenError::Integrity)?;
    Ok(text)
}

/// Key and nonce of an AEAD: the salt behind the key, then the IV (RFC 5282 section 4).
fn aead_key(
    encryption: Encryption,
    keys: &SkKeys,
    iv: &[u8],
) -> Option<(aead::LessSafeKey, aead::Nonce)> {
    let algorithm = match encryption {
        Encryption::Aes128Gcm16 => &aead::AES_128_GCM,
        Encryption::Aes256Gcm16 => &aead::AES_256_GCM,
        Encryption::ChaCha20Poly1305 => &aead::CHACHA20_POLY1305,
        Encryption::AesCbc128 | Encryption::AesCbc192 | Encryption::AesCbc256 => return None,
    };
    let (key, salt) = keys
        .encryption
        .bytes()
        .split_at_checked(algorithm.key_len())?;
    let key = aead::UnboundKey::new(algorithm, key).ok()?;
    let nonce = aead::Nonce::try_assume_unique_for_key(&[salt, iv].concat()).ok()?;
    Some((aead::LessSafeKey::new(key), nonce))
}

fn checksum(suite: &IkeSuite, keys: &SkKeys, covered: &[u8]) -> Option<hmac::Tag> {
    let key = hmac::Key::new(suite.integrity?.hmac(), keys.integrity.bytes());
    Some(hmac::sign(&key, covered))
}

/// Runs an expression with `$aes` naming the cipher.
macro_rules! with_aes {
    ($encryption:expr, |$aes:ident| $body:expr) => {
        match $encryption {
            Encryption::AesCbc128 => {
                type $aes = Aes128;
                $body
            }
            Encryption::AesCbc192 => {
                type $aes = Aes192;
                $body
            }
            Encryption::AesCbc256 => {
                type $aes = Aes256;
                $body
            }
            Encryption::Aes128Gcm16 | Encryption::Aes256Gcm16 | Encryption::ChaCha20Poly1305 => {
                None
            }
        }
    };
}

fn encrypt_cbc(encryption: Encryption, keys: &SkKeys, iv: &[u8], text: &mut [u8]) -> Option<()> {
    let length = text.len();
    with_aes!(encryption, |Aes| {
        Encryptor::<Aes>::new_from_slices(keys.encryption.bytes(), iv)
            .ok()?
            .encrypt_padded::<NoPadding>(text, length)
            .ok()
            .map(|_| ())
    })
}

fn decrypt_cbc(encryption: Encryption, keys: &SkKeys, iv: &[u8], text: &mut [u8]) -> Option<()> {
    with_aes!(encryption, |Aes| {
        Decryptor::<Aes>::new_from_slices(keys.encryption.bytes(), iv)
            .ok()?
            .decrypt_padded::<NoPadding>(text)
            .ok()
            .map(|_| ())
    })
}

#[cfg(test)]
mod tests;
