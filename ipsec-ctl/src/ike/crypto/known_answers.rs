//! Project Wycheproof's vectors for every primitive that IKE and ESP are built on, and those of RFC 3602 for AES-CBC.

use aes::{Aes128, Aes192, Aes256};
use cbc::{
    Decryptor,
    cipher::{
        BlockModeDecrypt, KeyIvInit,
        block_padding::{NoPadding, Pkcs7},
    },
};
use ring::aead;
use wycheproof::TestResult;

use super::{
    ke::{KeError, PrivateKey},
    transform::{Group, Prf},
};

/// A set that shrinks to nothing would prove nothing.
fn at_least(least: usize, ran: usize) {
    assert!(ran >= least, "only {ran} vectors were run");
}

#[test]
fn hmac_gives_wycheproofs_answers() {
    use wycheproof::mac::{TestName, TestSet};
    for (name, prf) in [
        (TestName::HmacSha256, Prf::HmacSha256),
        (TestName::HmacSha384, Prf::HmacSha384),
        (TestName::HmacSha512, Prf::HmacSha512),
    ] {
        let mut ran = 0;
        for group in TestSet::load(name).unwrap().test_groups {
            let bytes = group.tag_size / 8;
            for test in group.tests {
                let tag = prf.compute(&test.key, &[&test.msg]);
                let same = tag[..bytes] == test.tag[..];
                assert_eq!(
                    same,
                    test.result == TestResult::Valid,
                    "{name:?} {}",
                    test.tc_id
                );
                ran += 1;
            }
        }
        at_least(100, ran);
    }
}

#[test]
fn aeads_give_wycheproofs_answers() {
    use wycheproof::aead::{TestName, TestSet};
    for (name, algorithms) in [
        (
            TestName::AesGcm,
            &[&aead::AES_128_GCM, &aead::AES_256_GCM][..],
        ),
        (TestName::ChaCha20Poly1305, &[&aead::CHACHA20_POLY1305]),
    ] {
        let mut ran = 0;
        for group in TestSet::load(name).unwrap().test_groups {
            let Some(algorithm) = algorithms
                .iter()
                .find(|algorithm| algorithm.key_len() * 8 == group.key_size)
                .filter(|_| group.nonce_size == 96 && group.tag_size == 128)
            else {
                continue;
            };
            for test in group.tests {
                let key = aead::UnboundKey::new(algorithm, &test.key).unwrap();
                let nonce = aead::Nonce::try_assume_unique_for_key(&test.nonce).unwrap();
                let mut text = [&test.ct[..], &test.tag].concat();
                let opened = aead::LessSafeKey::new(key)
                    .open_in_place(nonce, aead::Aad::from(&test.aad[..]), &mut text)
                    .ok();
                let same = opened.is_some_and(|opened| *opened == test.pt[..]);
                assert_eq!(
                    same,
                    test.result == TestResult::Valid,
                    "{name:?} {}",
                    test.tc_id
                );
                ran += 1;
            }
        }
        at_least(100, ran);
    }
}

#[test]
fn aes_cbc_gives_wycheproofs_answers() {
    use wycheproof::cipher::{TestName, TestSet};
    let mut ran = 0;
    for group in TestSet::load(TestName::AesCbcPkcs5).unwrap().test_groups {
        for test in group.tests {
            let mut text = test.ct.to_vec();
            let opened = match group.key_size {
                128 => Decryptor::<Aes128>::new_from_slices(&test.key, &test.nonce)
                    .unwrap()
                    .decrypt_padded::<Pkcs7>(&mut text)
                    .ok(),
                192 => Decryptor::<Aes192>::new_from_slices(&test.key, &test.nonce)
                    .unwrap()
                    .decrypt_padded::<Pkcs7>(&mut text)
                    .ok(),
                _ => Decryptor::<Aes256>::new_from_slices(&test.key, &test.nonce)
                    .unwrap()
                    .decrypt_padded::<Pkcs7>(&mut text)
                    .ok(),
            };
            let same = opened.is_some_and(|opened| *opened == test.pt[..]);
            assert_eq!(same, test.result == TestResult::Valid, "{}", test.tc_id);
            ran += 1;
        }
    }
    at_least(100, ran);
}

#[test]
fn the_nist_curves_give_wycheproofs_answers() {
    use wycheproof::ecdh::{TestName, TestSet};
    for (name, group, width) in [
        (TestName::EcdhSecp256r1Ecpoint, Group::Ecp256, 32),
        (TestName::EcdhSecp384r1Ecpoint, Group::Ecp384, 48),
        (TestName::EcdhSecp521r1Ecpoint, Group::Ecp521, 66),
    ] {
        let mut ran = 0;
        for set in TestSet::load(name).unwrap().test_groups {
            for test in set.tests {
                // RFC 5903 section 7: IKE has no compressed points, and no byte in front of the others.
                let Some((4, point)) = test.public_key.split_first() else {
                    continue;
                };
                let digits = test.private_key.len().min(width);
                let mut private = vec![0; width - digits];
                private.extend(&test.private_key[test.private_key.len() - digits..]);
                let key = PrivateKey::from_bytes(group, private);
                let agreed = key.agree(point);
                let same = agreed.is_ok_and(|secret| secret[..] == test.shared_secret[..]);
                assert_eq!(
                    same,
                    test.result == TestResult::Valid,
                    "{name:?} {}",
                    test.tc_id
                );
                ran += 1;
            }
        }
        at_least(100, ran);
    }
}

#[test]
fn curve25519_gives_wycheproofs_answers_and_refuses_small_orders() {
    use wycheproof::xdh::{TestName, TestSet};
    let mut ran = 0;
    for set in TestSet::load(TestName::X25519).unwrap().test_groups {
        for test in set.tests {
            let key = PrivateKey::from_bytes(Group::Curve25519, test.private_key.to_vec());
            match key.agree(&test.public_key) {
                Ok(secret) => assert_eq!(secret[..], test.shared_secret[..], "{}", test.tc_id),
                // RFC 8031 section 2.3: a shared secret of zeros is refused, though arithmetic has no objection.
                Err(error) => {
                    assert_eq!(error, KeError::Value, "{}", test.tc_id);
                    assert!(
                        test.shared_secret.iter().all(|byte| *byte == 0),
                        "{}",
                        test.tc_id
                    );
                }
            }
            ran += 1;
        }
    }
    at_least(400, ran);
}

// RFC 3602 section 4: cases 1 to 4, the cipher alone.
#[test]
fn aes_cbc_gives_the_known_answers_of_rfc_3602() {
    let text = |first: u8, last: u8| (first..=last).collect::<Vec<u8>>();
    let cases = [
        (
            "06a9214036b8a15b512e03d534120006",
            "3dafba429d9eb430b422da802c9fac41",
            b"Single block msg".to_vec(),
            "e353779c1079aeb82708942dbe77181a",
        ),
        (
            "c286696d887c9aa0611bbb3e2025a45a",
            "562e17996d093d28ddb3ba695a2e6f58",
            text(0, 31),
            "d296cd94c2cccf8a3a863028b5e1dc0a7586602d253cfff91b8266bea6d61ab1",
        ),
        (
            "6c3ea0477630ce21a2ce334aa746c2cd",
            "c782dc4c098c66cbd9cd27d825682c81",
            b"This is a 48-byte message (exactly 3 AES blocks)".to_vec(),
            "d0a02b3836451753d493665d33f0e8862dea54cdb293abc7506939276772f8d5021c19216bad525c8579695d83ba2684",
        ),
        (
            "56e47a38c5598974bc46903dba290349",
            "8ce82eefbea0da3c44699ed7db51b7d9",
            text(0xa0, 0xdf),
            "c30e32ffedc0774e6aff6af0869f71aa0f3af07a9a31a9c684db207eb0ef8e4e\
             35907aa632c3ffdf868bb7b29d3d46ad83ce9f9a102ee99d49a53e87f4c3da55",
        ),
    ];
    for (key, iv, plain, sealed) in cases {
        let mut text = bytes(sealed);
        let opened = Decryptor::<Aes128>::new_from_slices(&bytes(key), &bytes(iv))
            .unwrap()
            .decrypt_padded::<NoPadding>(&mut text)
            .unwrap();
        assert_eq!(opened, plain);
    }
}

fn bytes(hex: &str) -> Vec<u8> {
    hex.as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}
