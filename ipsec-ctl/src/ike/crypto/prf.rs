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

    // RFC 4231 sections 4.2 to 4.8: the seven test cases, the fifth of which shows only the first 128 bits.
    #[test]
    fn the_functions_give_the_known_answers_of_rfc_4231() {
        let cases: [(&[u8], &[u8], [&str; 3]); 7] = [
            (
                &[0x0b; 20],
                b"Hi There",
                [
                    "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
                    "afd03944d84895626b0825f4ab46907f15f9dadbe4101ec682aa034c7cebc59cfaea9ea9076ede7f4af152e8b2fa9cb6",
                    "87aa7cdea5ef619d4ff0b4241a1d6cb02379f4e2ce4ec2787ad0b30545e17cdedaa833b7d6b8a702038b274eaea3f4e4be9d914eeb61f1702e696c203a126854",
                ],
            ),
            (
                b"Jefe",
                b"what do ya want for nothing?",
                [
                    "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
                    "af45d2e376484031617f78d2b58a6b1b9c7ef464f5a01b47e42ec3736322445e8e2240ca5e69e2c78b3239ecfab21649",
                    "164b7a7bfcf819e2e395fbe73b56e0a387bd64222e831fd610270cd7ea2505549758bf75c05a994a6d034f65f8f0e6fdcaeab1a34d4a6b4b636e070a38bce737",
                ],
            ),
            (
                &[0xaa; 20],
                &[0xdd; 50],
                [
                    "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe",
                    "88062608d3e6ad8a0aa2ace014c8a86f0aa635d947ac9febe83ef4e55966144b2a5ab39dc13814b94e3ab6e101a34f27",
                    "fa73b0089d56a284efb0f0756c890be9b1b5dbdd8ee81a3655f83e33b2279d39bf3e848279a722c806b485a47e67c807b946a337bee8942674278859e13292fb",
                ],
            ),
            (
                &(1..=25).collect::<Vec<u8>>(),
                &[0xcd; 50],
                [
                    "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b",
                    "3e8a69b7783c25851933ab6290af6ca77a9981480850009cc5577c6e1f573b4e6801dd23c4a7d679ccf8a386c674cffb",
                    "b0ba465637458c6990e5a8c5f61d4af7e576d97ff94b872de76f8050361ee3dba91ca5c11aa25eb4d679275cc5788063a5f19741120c4f2de2adebeb10a298dd",
                ],
            ),
            (
                &[0x0c; 20],
                b"Test With Truncation",
                [
                    "a3b6167473100ee06e0c796c2955552b",
                    "3abf34c3503b2a23a46efc619baef897",
                    "415fad6271580a531d4179bc891d87a6",
                ],
            ),
            (
                &[0xaa; 131],
                b"Test Using Larger Than Block-Size Key - Hash Key First",
                [
                    "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
                    "4ece084485813e9088d2c63a041bc5b44f9ef1012a2b588f3cd11f05033ac4c60c2ef6ab4030fe8296248df163f44952",
                    "80b24263c7c1a3ebb71493c1dd7be8b49b46d1f41b4aeec1121b013783f8f3526b56d037e05f2598bd0fd2215d6a1e5295e64f73f63f0aec8b915a985d786598",
                ],
            ),
            (
                &[0xaa; 131],
                b"This is a test using a larger than block-size key and a larger than block-size data. The key needs to be hashed before being used by the HMAC algorithm.",
                [
                    "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2",
                    "6617178e941f020d351e2f254e8fd32c602420feb0b8fb9adccebb82461e99c5a678cc31e799176d3860e6110c46523e",
                    "e37b6a775dc87dbaa4dfa9f96e5e3ffddebd71f8867289865df5a32d20cdc944b6022cac3c4982b10d5eeb55c3e4de15134676fb6de0446065c97440fa8c6a58",
                ],
            ),
        ];
        let functions = [Prf::HmacSha256, Prf::HmacSha384, Prf::HmacSha512];
        for (number, (key, data, answers)) in (1..).zip(cases) {
            for (prf, answer) in functions.iter().zip(answers) {
                let tag = prf.compute(key, &[data]);
                let hex: String = tag.iter().map(|byte| format!("{byte:02x}")).collect();
                assert_eq!(hex[..answer.len()], *answer, "case {number}, {prf:?}");
            }
        }
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
