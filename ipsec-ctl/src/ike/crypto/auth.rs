//! The AUTH value of a pre-shared key (RFC 7296 section 2.15).

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::{keys::Key, transform::Prf};

/// What one side proves to have said.
#[derive(Clone, Copy, Debug)]
pub struct Signed<'a> {
    /// Its own IKE_SA_INIT message, whole.
    pub message: &'a [u8],
    /// The nonce of the other side.
    pub nonce: &'a [u8],
    /// Its SK_p.
    pub sk_p: &'a Key,
    /// The body of its ID payload.
    pub id: &'a [u8],
}

/// The AUTH value of the side that signs.
// RFC 7296 section 2.15: prf(prf(PSK, "Key Pad for IKEv2"), message | nonce | prf(SK_p, ID body)).
pub fn psk(prf: Prf, psk: &[u8], signed: &Signed<'_>) -> Zeroizing<Vec<u8>> {
    let key = prf.compute(psk, &[b"Key Pad for IKEv2"]);
    let id = prf.compute(signed.sk_p.bytes(), &[signed.id]);
    prf.compute(&key, &[signed.message, signed.nonce, &id])
}

/// Whether `given` is the AUTH value of the side that signed, in constant time.
pub fn psk_matches(prf: Prf, key: &[u8], signed: &Signed<'_>, given: &[u8]) -> bool {
    psk(prf, key, signed).ct_eq(given).into()
}
