//! Pseudorandom functions: HMAC (RFC 4868), and prf+ (RFC 7296 section 2.13).

use ring::hmac;
use zeroize::Zeroizing;

use super::transform::{Integrity, Prf};

impl Prf {
    fn algorithm(self) -> hmac::Algorithm {
        match self {
            Self::HmacSha256 => hmac::HMAC_SHA256,
            Self::HmacSha384 => hmac::HMAC_SHA384,
            Self::HmacSha512 => hmac::HMAC_SHA512,
        }
    }

    /// Length of its output, and of the keys that are derived for it, in bytes.
    pub fn output_bytes(self) -> usize {
        self.algorithm().digest_algorithm().output_len()
    }

    /// prf(key, data), where `data` is the concatenation of its parts.
    pub fn compute(self, key: &[u8], data: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        let mut context = hmac::Context::with_key(&hmac::Key::new(self.algorithm(), key));
        for part in data {
            context.update(part);
        }
        Zeroizing::new(context.sign().as_ref().to_vec())
    }

    /// The first `length` bytes of prf+(key, seed), at most 255 outputs of the function.
    // RFC 7296 section 2.13: T1 = prf(K, S | 1), Tn = prf(K, T(n-1) | S | n); the counter is one byte.
    pub fn plus(self, key: &[u8], seed: &[&[u8]], length: usize) -> Zeroizing<Vec<u8>> {
        let key = hmac::Key::new(self.algorithm(), key);
        let mut stream = Zeroizing::new(Vec::with_capacity(length + self.output_bytes()));
        let mut block = Zeroizing::new(Vec::new());
        for counter in 1..=u8::MAX {
            if stream.len() >= length {
                break;
            }
            let mut context = hmac::Context::with_key(&key);
            context.update(&block);
            for part in seed {
                context.update(part);
            }
            context.update(&[counter]);
            block = Zeroizing::new(context.sign().as_ref().to_vec());
            stream.extend_from_slice(&block);
        }
        stream.truncate(length);
        stream
    }
}

impl Integrity {
    /// The HMAC behind it.
    pub(super) fn hmac(self) -> hmac::Algorithm {
        self.prf().algorithm()
    }

    /// Length of its key in bytes (RFC 4868 section 2.1.1: that of the hash).
    pub fn key_bytes(self) -> usize {
        self.prf().output_bytes()
    }

    /// Length of the truncated tag in bytes: half of the hash.
    pub fn icv_bytes(self) -> usize {
        self.key_bytes() / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // RFC 4231 section 4.3: test case 2.
    #[test]
    fn the_functions_give_the_known_answers_of_rfc_4231() {
        let hex = |bytes: &[u8]| {
            bytes
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
        };
        let data: [&[u8]; 2] = [b"what do ya want ", b"for nothing?"];
        assert_eq!(
            hex(&Prf::HmacSha256.compute(b"Jefe", &data)),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
        assert_eq!(
            hex(&Prf::HmacSha384.compute(b"Jefe", &data)),
            "af45d2e376484031617f78d2b58a6b1b9c7ef464f5a01b47e42ec3736322445e\
             8e2240ca5e69e2c78b3239ecfab21649"
        );
        assert_eq!(
            hex(&Prf::HmacSha512.compute(b"Jefe", &data)),
            "164b7a7bfcf819e2e395fbe73b56e0a387bd64222e831fd610270cd7ea250554\
             9758bf75c05a994a6d034f65f8f0e6fdcaeab1a34d4a6b4b636e070a38bce737"
        );
    }

    #[test]
    fn a_longer_stream_begins_with_a_shorter_one() {
        let long = Prf::HmacSha256.plus(b"key", &[b"seed"], 200);
        assert_eq!(long.len(), 200);
        assert_eq!(
            Prf::HmacSha256.plus(b"key", &[b"se", b"ed"], 33)[..],
            long[..33]
        );
        assert_eq!(
            long[..32],
            Prf::HmacSha256.compute(b"key", &[b"seed\x01"])[..]
        );
    }
}
