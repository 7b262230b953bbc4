//! Curve25519 (RFC 7748, RFC 8031).

use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::KeError;

fn secret(value: &[u8]) -> StaticSecret {
    let mut bytes = Zeroizing::new([0; 32]);
    for (to, from) in bytes.iter_mut().zip(value) {
        *to = *from;
    }
    StaticSecret::from(*bytes)
}

/// The public value of a private one.
pub(super) fn public(value: &[u8]) -> Vec<u8> {
    PublicKey::from(&secret(value)).as_bytes().to_vec()
}

/// The secret shared with the owner of `public`.
pub(super) fn agree(value: &[u8], public: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeError> {
    let public: [u8; 32] = public.try_into().map_err(|_| KeError::Length)?;
    let shared = secret(value).diffie_hellman(&PublicKey::from(public));
    // RFC 8031 section 2.3: a result of all zeros means that the peer sent a point of small order.
    if !shared.was_contributory() {
        return Err(KeError::Value);
    }
    Ok(Zeroizing::new(shared.as_bytes().to_vec()))
}
