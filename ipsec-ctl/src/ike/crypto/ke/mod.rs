//! Key exchange (RFC 7296 section 3.4) with private values that can be saved and restored.
//!
//! ring keeps its private keys to itself, so these come from RustCrypto and dalek, whose arithmetic is constant-time.

mod ecp;
mod ecp521;
mod modp;
mod x25519;

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::transform::Group;
use crate::ike::rng::Random;

/// Why a key exchange fails; the peer's public value is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeError {
    /// Its length is not that of the group.
    #[error("the public value has the wrong length for its group")]
    Length,
    /// RFC 6989 section 2: it is out of range, not on the curve, or gives away the secret.
    #[error("the public value is not valid in its group")]
    Value,
}

/// A private value. Its public value and the shared secret are slow to compute.
#[derive(Clone, Serialize, Deserialize)]
pub struct PrivateKey {
    group: Group,
    /// As the group defines it: scalar or exponent, big-endian for MODP and ECP.
    value: Zeroizing<Vec<u8>>,
}

/// The secret that both sides get.
pub type SharedSecret = Zeroizing<Vec<u8>>;

impl PrivateKey {
    /// Draws a private value.
    pub fn generate(group: Group, random: &mut dyn Random) -> Self {
        let draw = |random: &mut dyn Random, bytes: usize| {
            let mut value = Zeroizing::new(vec![0; bytes]);
            random.fill(&mut value);
            value
        };
        let value = match group {
            // RFC 3526 section 8: exponents of twice the group's strength, rounded up.
            Group::Modp2048 => draw(random, 40),
            Group::Modp3072 => draw(random, 53),
            Group::Modp4096 => draw(random, 60),
            Group::Modp6144 => draw(random, 68),
            Group::Modp8192 => draw(random, 78),
            Group::Ecp256 | Group::Ecp384 | Group::Ecp521 => loop {
                // A value of the curve's width is below the order in all but hopeless cases; others are drawn again.
                let mut value = draw(random, ecp::scalar_bytes(group));
                if let (Group::Ecp521, Some(first)) = (group, value.first_mut()) {
                    *first &= 1;
                }
                if ecp::is_scalar(group, &value) {
                    break value;
                }
            },
            Group::Curve25519 => draw(random, 32),
        };
        Self { group, value }
    }

    /// One of a known answer.
    #[cfg(test)]
    pub(super) fn from_bytes(group: Group, value: Vec<u8>) -> Self {
        Self {
            group,
            value: Zeroizing::new(value),
        }
    }

    /// Its group.
    pub fn group(&self) -> Group {
        self.group
    }

    /// The public value as it travels.
    pub fn public(&self) -> Vec<u8> {
        match self.group {
            Group::Modp2048 => modp::public_2048(&self.value),
            Group::Modp3072 => modp::public_3072(&self.value),
            Group::Modp4096 => modp::public_4096(&self.value),
            Group::Modp6144 => modp::public_6144(&self.value),
            Group::Modp8192 => modp::public_8192(&self.value),
            Group::Ecp256 | Group::Ecp384 | Group::Ecp521 => ecp::public(self.group, &self.value),
            Group::Curve25519 => x25519::public(&self.value),
        }
    }

    /// The secret shared with the owner of `public`.
    ///
    /// # Errors
    ///
    /// [`KeError`], for a value that an honest peer would not send.
    pub fn agree(&self, public: &[u8]) -> Result<SharedSecret, KeError> {
        match self.group {
            Group::Modp2048 => modp::agree_2048(&self.value, public),
            Group::Modp3072 => modp::agree_3072(&self.value, public),
            Group::Modp4096 => modp::agree_4096(&self.value, public),
            Group::Modp6144 => modp::agree_6144(&self.value, public),
            Group::Modp8192 => modp::agree_8192(&self.value, public),
            Group::Ecp256 | Group::Ecp384 | Group::Ecp521 => {
                ecp::agree(self.group, &self.value, public)
            }
            Group::Curve25519 => x25519::agree(&self.value, public),
        }
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey({}, redacted)", self.group)
    }
}

#[cfg(test)]
mod tests;
