//! Round trips of every suite, hostile packets, and known answers.

use proptest::prelude::*;
use zeroize::Zeroizing;

use super::*;

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn keys(cipher: usize, integrity: usize) -> EspKeys {
    EspKeys {
        cipher: Zeroizing::new((0..cipher).map(|i| u8::try_from(i).unwrap()).collect()),
        integrity: Zeroizing::new(
            (0..integrity)
                .map(|i| u8::try_from(100 + i).unwrap())
                .collect(),
        ),
    }
}

fn transforms(esn: bool) -> Vec<(EspSuite, EspTransform)> {
    let mut all = vec![
        (EspSuite::Aes128Gcm16, keys(20, 0)),
        (EspSuite::Aes256Gcm16, keys(36, 0)),
        (EspSuite::ChaCha20Poly1305, keys(36, 0)),
    ];
    for key_bytes in [16, 24, 32] {
        for (integrity, size) in [
            (Integrity::HmacSha256, 32),
            (Integrity::HmacSha384, 48),
            (Integrity::HmacSha512, 64),
        ] {
            let suite = EspSuite::AesCbc {
                key_bytes,
                integrity,
            };
            all.push((suite, keys(key_bytes.into(), size)));
        }
    }
    all.into_iter()
        .map(|(suite, keys)| (suite, EspTransform::new(suite, &keys, esn).unwrap()))
        .collect()
}

const ROOM: usize = 32;

/// A frame with a payload in it, and room around it.
fn framed(payload: &[u8]) -> (Vec<u8>, Range<usize>) {
    let mut frame = vec![0xee; ROOM];
    frame.extend(payload);
    frame.extend([0xee; 96]);
    (frame, ROOM..ROOM + payload.len())
}

#[test]
fn what_is_sealed_opens_in_every_suite_and_length() {
    for esn in [false, true] {
        for (suite, transform) in transforms(esn) {
            for length in 0..100 {
                let payload: Vec<u8> = (0..length).collect();
                let (mut frame, range) = framed(&payload);
                let sequence = if esn { 0x1_0000_0005 } else { 5 };
                let esp = transform
                    .seal(Spi(0x1234_5678), sequence, 4, &mut frame, range.clone())
                    .unwrap();
                assert_eq!(esp.len(), transform.sealed_bytes(payload.len()));
                assert!(esp.end - range.end <= transform.max_trailer_bytes());
                assert_eq!(frame[esp.start..esp.start + 8], bytes("1234567800000005"));
                let opened = transform.open(sequence, &mut frame, esp).unwrap();
                assert_eq!(
                    (opened.payload.clone(), opened.next_header),
                    (range, 4),
                    "{suite:?}"
                );
                assert_eq!(frame[opened.payload], payload);
            }
        }
    }
}

#[test]
fn a_change_of_any_bit_or_of_the_high_half_is_noticed() {
    for esn in [false, true] {
        for (suite, transform) in transforms(esn) {
            let (mut frame, range) = framed(&[7; 20]);
            let esp = transform.seal(Spi(300), 9, 4, &mut frame, range).unwrap();
            for bit in 0..esp.len() * 8 {
                let mut forged = frame.clone();
                forged[esp.start + bit / 8] ^= 1 << (bit % 8);
                // A changed sequence number is looked up as such, so it is opened as such.
                let number = forged[esp.start + 4..].first_chunk::<4>().unwrap();
                let sequence = u32::from_be_bytes(*number).into();
                assert_eq!(
                    transform.open(sequence, &mut forged, esp.clone()),
                    Err(OpenError::BadIcv),
                    "{suite:?}, bit {bit}"
                );
            }
            let other = transform.open(0x1_0000_0009, &mut frame, esp);
            assert_eq!(other.is_err(), esn, "the high half counts with ESN alone");
        }
    }
}

#[test]
fn padding_that_is_not_as_the_rfc_has_it_is_refused() {
    assert_eq!(unpad(&[9, 9, 1, 2, 2, 4]), Some((2, 4)));
    assert_eq!(unpad(&[9, 9, 1, 3, 2, 4]), None);
    assert_eq!(
        unpad(&[1, 2, 3, 4, 5, 4]),
        None,
        "more padding than there is"
    );
    assert_eq!(unpad(&[4]), None);
}

// 1500 - 20 (IPv4) - 8 (ESP) - 16 (IV) - 32 (ICV) = 1424, a multiple of 16, less 2 for the trailer.
#[test]
fn the_tunnel_mtu_of_a_common_suite_is_what_other_gateways_have() {
    let suite = EspSuite::AesCbc {
        key_bytes: 32,
        integrity: Integrity::HmacSha512,
    };
    let transform = EspTransform::new(suite, &keys(32, 64), false).unwrap();
    assert_eq!(transform.max_payload(1500 - 20), 1422);
    for (suite, transform) in transforms(false) {
        for esp in 0..300 {
            let most = transform.max_payload(esp);
            if most > 0 {
                assert!(transform.sealed_bytes(most) <= esp, "{suite:?}");
            }
            assert!(transform.sealed_bytes(most + 1) > esp, "{suite:?}");
        }
    }
}

#[test]
fn keys_of_a_wrong_size_are_refused() {
    for (suite, wrong) in [
        (EspSuite::Aes256Gcm16, keys(32, 0)),
        (EspSuite::Aes256Gcm16, keys(36, 32)),
        (EspSuite::ChaCha20Poly1305, keys(35, 0)),
        (
            EspSuite::AesCbc {
                key_bytes: 32,
                integrity: Integrity::HmacSha256,
            },
            keys(32, 64),
        ),
    ] {
        assert_eq!(EspTransform::new(suite, &wrong, false).err(), Some(BadKeys));
    }
}

// RFC 7634 appendix A: an ICMP echo request in tunnel mode.
#[test]
fn chacha20_poly1305_gives_the_packet_of_rfc_7634() {
    let keys = EspKeys {
        cipher: Zeroizing::new(bytes(
            "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f a0a1a2a3",
        )),
        integrity: Zeroizing::default(),
    };
    let transform = EspTransform::new(EspSuite::ChaCha20Poly1305, &keys, false).unwrap();
    let packet = bytes(
        "01020304 00000005 1011121314151617
         24039428b97f417e3c13753a4f05087b67c352e6a7fab1b982d466ef407ae5c614ee8099d52844eb61aa95dfab4c02f7
         2aa71e7c4c4f64c9befe2facc638e8f3cbec163fac469b502773f6fb94e664da9165b82829f641e0
         76aaa8266b7fb0f7b11b369907e1ad43",
    );
    let mut frame = packet.clone();
    let end = frame.len();
    let opened = transform.open(5, &mut frame, 0..end).unwrap();
    assert_eq!(opened.next_header, 4);
    assert_eq!(
        frame[opened.payload],
        bytes(
            "45000054a6f200004001e778c6336405c000020508005b7a3a080000553bec10
             0007362708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20212223
             2425262728292a2b2c2d2e2f3031323334353637"
        )
    );
}

proptest! {
    #[test]
    fn any_bytes_are_opened_or_refused(mut frame: Vec<u8>, start in 0..40_usize, length in 0..200_usize) {
        for (_, transform) in transforms(true) {
            let _ = transform.open(1, &mut frame, start..start + length);
        }
    }
}

// draft-mcgrew-gcm-test-01: tunnel, transport and odd payloads, with ESN and without.
#[test]
fn aes_gcm_gives_the_packets_of_the_test_draft() {
    let lines = include_str!("data/gcm_test.txt").lines();
    let mut seen = [0; 2];
    for line in lines.filter(|line| !line.starts_with('#')) {
        let fields: Vec<Vec<u8>> = line.split(' ').map(bytes).collect();
        let [key, nonce, associated, plain, sealed, icv] = fields.as_slice() else {
            panic!("{line}");
        };
        let (suite, esn) = match (key.len(), associated.len()) {
            (16, 8) => (EspSuite::Aes128Gcm16, false),
            (16, _) => (EspSuite::Aes128Gcm16, true),
            (_, 8) => (EspSuite::Aes256Gcm16, false),
            (_, _) => (EspSuite::Aes256Gcm16, true),
        };
        let keys = EspKeys {
            cipher: Zeroizing::new([key, &nonce[..4]].concat()),
            integrity: Zeroizing::default(),
        };
        let transform = EspTransform::new(suite, &keys, esn).unwrap();
        let sequence = associated[4..]
            .iter()
            .fold(0, |number, byte| number << 8 | u64::from(*byte));
        let low = &associated[associated.len() - 4..];
        let mut frame = [&associated[..4], low, &nonce[4..], sealed, icv].concat();
        let end = frame.len();
        let opened = transform.open(sequence, &mut frame, 0..end).unwrap();
        let (padding, next_header) = (plain[plain.len() - 2], plain[plain.len() - 1]);
        assert_eq!(opened.next_header, next_header);
        let payload = plain.len() - 2 - usize::from(padding);
        assert_eq!(frame[opened.payload], plain[..payload]);
        seen[usize::from(esn)] += 1;
    }
    assert_eq!(seen, [4, 9]);
}

// RFC 3602 section 4: cases 5 and 6 in transport mode, 7 and 8 in tunnel mode. They have no integrity protection, without which we open nothing: here
// each gets an ICV of RFC 4868.
#[test]
fn aes_cbc_gives_the_packets_of_rfc_3602() {
    const TRANSPORT: (&str, u8) = ("90d382b410eeba7ad938c46cec1a82bf", 1);
    const TUNNEL: (&str, u8) = ("0123456789abcdef0123456789abcdef", 4);
    let echo: Vec<u8> = (8..=0x37).collect();
    let cases = [
        (
            TRANSPORT,
            1,
            "0000432100000001e96e8c08ab465763fd098d45dd3ff893f663c25d325c18c6a9453e194e120849a4870b66cc6b9965
             330013b4898dc856a4699e523a55db080b59ec3a8e4b7e52775b07d1db34ed9c538ab50c551b874aa269add047ad2d59
             13ac19b7cfbad4a6",
            [bytes("08000ebda70a00008e9c083db95b0700"), echo].concat(),
        ),
        (
            TRANSPORT,
            8,
            "000043210000000869d08df7d203329db093fc4924e5bd80f51995881ec4e0c4488987ce742e8109689bb379d2d750c0
             d915dca346a89f75",
            bytes("0800b5e8a80a0500a69c083d0b660e00777777777777777777777777"),
        ),
        (
            TUNNEL,
            2,
            "0000876500000002f4e765244f6407adf13dc1380f673f37773b5241a4c449225e4f3ce5ed611b0c237ca96cf74a9301
             3c1b0ea1a0cf70f8e4ecaec78ac53aad7a0f022b859243c647752e94a859352b8a4d4d2decd136e5c177f132ad3fbfb2
             201ac9904c74ee0a109e0ca1e4dfe9d5a100b842f1c22f0d",
            bytes(
                "45000054090400004001f988c0a87b03c0a87bc808009f76a90a0100b49c083d02a2040008090a0b0c0d0e0f10111213
                 1415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f3031323334353637",
            ),
        ),
        (
            TUNNEL,
            5,
            "000087650000000585d47224b5f3dd5d2101d4ea8dffab2215b92683819596a8047232cc00f7048fe45318e11f8a0f62
             ede3c3fc61203bb50f980a08c9843fd3a1b06d5c07ff9639b7eb7dfb3512e5de435e7207ed971ef3d2726d9b5ef6affc
             6d17a0decbb13892",
            [
                bytes("45000044090c00004001f990c0a87b03c0a87bc80800d63caa0a0200c69c083da3de0300"),
                vec![0xff; 32],
            ]
            .concat(),
        ),
    ];
    let suite = EspSuite::AesCbc {
        key_bytes: 16,
        integrity: Integrity::HmacSha256,
    };
    for ((cipher, next_header), sequence, packet, payload) in cases {
        let keys = EspKeys {
            cipher: Zeroizing::new(bytes(cipher)),
            integrity: Zeroizing::new(vec![7; 32]),
        };
        let transform = EspTransform::new(suite, &keys, false).unwrap();
        let mut frame = bytes(packet);
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &[7; 32]), &frame);
        frame.extend(&tag.as_ref()[..16]);
        let end = frame.len();
        let opened = transform.open(sequence, &mut frame, 0..end).unwrap();
        assert_eq!(opened.next_header, next_header);
        assert_eq!(frame[opened.payload], payload);
    }
}
