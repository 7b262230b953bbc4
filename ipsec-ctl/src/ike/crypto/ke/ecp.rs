//! Elliptic curve Diffie-Hellman over the NIST curves (RFC 5903).

use zeroize::Zeroizing;

use super::{KeError, ecp521};
use crate::ike::crypto::transform::Group;

/// Runs an expression with `$curve` naming the crate of the group.
macro_rules! on_curve {
    ($group:expr, |$curve:ident| $body:expr) => {
        match $group {
            Group::Ecp384 => {
                use p384 as $curve;
                $body
            }
            Group::Ecp521 => {
                use p521 as $curve;
                $body
            }
            // The other groups are not curves of this module; its callers see to that.
            _ => {
                use p256 as $curve;
                $body
            }
        }
    };
}

/// Length of a private value in bytes.
pub(super) fn scalar_bytes(group: Group) -> usize {
    match group {
        Group::Ecp384 => 48,
        Group::Ecp521 => 66,
        _ => 32,
    }
}

/// Whether the value is a private one: not zero and below the order.
pub(super) fn is_scalar(group: Group, value: &[u8]) -> bool {
    on_curve!(group, |curve| curve::SecretKey::from_slice(value).is_ok())
}

/// The public value of a private one.
// RFC 5903 section 7: x and y, each of the curve's width.
pub(super) fn public(group: Group, value: &[u8]) -> Vec<u8> {
    on_curve!(group, |curve| curve::SecretKey::from_slice(value)
        .map(|secret| {
            use curve::elliptic_curve::sec1::ToSec1Point as _;
            // The uncompressed form of SEC 1 with its first byte, the kind, left out.
            let point = secret.public_key().to_sec1_point(false);
            point.as_bytes().get(1..).unwrap_or_default().to_vec()
        })
        .unwrap_or_default())
}

/// The secret shared with the owner of `public`.
// RFC 5903 section 9: the shared secret is the x coordinate alone.
pub(super) fn agree(
    group: Group,
    value: &[u8],
    public: &[u8],
) -> Result<Zeroizing<Vec<u8>>, KeError> {
    if public.len() != 2 * scalar_bytes(group) {
        return Err(KeError::Length);
    }
    let uncompressed = [&[4], public].concat();
    on_curve!(group, |curve| {
        let secret = curve::SecretKey::from_slice(value).map_err(|_| KeError::Value)?;
        // RFC 6989 section 2.3: the point is on the curve and not the one at infinity.
        let public =
            curve::PublicKey::from_sec1_bytes(&uncompressed).map_err(|_| KeError::Value)?;
        if group == Group::Ecp521 {
            return agree_521(value, &uncompressed).ok_or(KeError::Length);
        }
        let shared = secret.diffie_hellman(&public);
        Ok(Zeroizing::new(shared.raw_secret_bytes().to_vec()))
    })
}

/// As [`agree`], of values that are valid: a byte for the kind of encoding, x and y.
fn agree_521(value: &[u8], point: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (x, y) = point.get(1..)?.split_first_chunk()?;
    ecp521::multiply(value.try_into().ok()?, x, y.try_into().ok()?)
}
