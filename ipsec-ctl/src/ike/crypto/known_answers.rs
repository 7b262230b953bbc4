//! Project Wycheproof's vectors for every primitive that IKE and ESP are built on, and the primes of RFC 3526.

use aes::{Aes128, Aes192, Aes256};
use cbc::{
    Decryptor,
    cipher::{BlockModeDecrypt, KeyIvInit, block_padding::Pkcs7},
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
