//! Sealing and opening of encrypted IKE messages (RFC 7296 section 3.14, RFC 5282, RFC 7634).

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
        EmitError, Header, emit_payloads, frame_encrypted,
        payload::{Encrypted, Payload},
    },
    rng::Random,
};

/// Block and IV of AES-CBC, in bytes.
const BLOCK: usize = 16;
/// Explicit IV of an AEAD, in bytes.
const AEAD_IV: usize = 8;
/// Tag of an AEAD, in bytes.
const TAG: usize = 16;

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

/// Writes a message whose payloads are all encrypted.
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
    let aead = suite.encryption.is_aead();
    let (iv, block, icv) = if aead {
        (AEAD_IV, 1, TAG)
    } else {
        let icv = suite.integrity.map_or(0, |integrity| integrity.icv_bytes());
        (BLOCK, BLOCK, icv)
    };
    // RFC 7296 section 3.14: as much padding as fills the block, then its length in a byte.
    let padding = (block - (content.len() + 1) % block) % block;
    let plain = content.len() + padding + 1;
    let mut frame = frame_encrypted(header, first, iv + plain + icv)?;
    let (associated, body) = frame
        .bytes
        .split_at_mut_checked(frame.body.start)
        .ok_or(SealError::Keys)?;
    let (iv_bytes, rest) = body.split_at_mut(iv);
    random.fill(iv_bytes);
    if aead {
        // RFC 5282 section 3.1: the IV must not repeat under one key. A message ID is used once for a request and once
        // for a response; the random half guards against what a restored state may repeat.
        let [_, _, _, kind, id @ ..] = iv_bytes else {
            return Err(SealError::Keys);
        };
        *kind = (*kind & !1) | u8::from(header.flags.response);
        id.copy_from_slice(&header.message_id.0.to_be_bytes());
    }
    let (text, tag) = rest.split_at_mut(plain);
    text.get_mut(..content.len())
        .ok_or(SealError::Keys)?
        .copy_from_slice(&content);
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
        let covered = frame.bytes.len() - icv;
        let (covered, tag) = frame.bytes.split_at_mut(covered);
        let sum = checksum(suite, keys, covered).ok_or(SealError::Keys)?;
        tag.copy_from_slice(sum.as_ref().get(..icv).ok_or(SealError::Keys)?);
    }
    Ok(frame.bytes)
}

/// Opens the Encrypted payload of `message`; returns the chain of payloads inside.
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
