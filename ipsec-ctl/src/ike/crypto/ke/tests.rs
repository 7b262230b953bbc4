//! Public values and shared secrets: known answers, hostile values, both sides of every group.

use proptest::prelude::*;

use super::*;

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

struct Counter(u64);

impl Random for Counter {
    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            *byte = self.0.to_be_bytes()[0];
        }
    }
}

const GROUPS: [Group; 7] = [
    Group::Modp2048,
    Group::Modp3072,
    Group::Modp4096,
    Group::Ecp256,
    Group::Ecp384,
    Group::Ecp521,
    Group::Curve25519,
];

#[test]
fn both_sides_of_every_group_get_the_same_secret() {
    for group in GROUPS {
        let mut random = Counter(u64::from(group.id()));
        let (ours, theirs) = (
            PrivateKey::generate(group, &mut random),
            PrivateKey::generate(group, &mut random),
        );
        let secret = ours.agree(&theirs.public()).unwrap();
        assert_eq!(secret, theirs.agree(&ours.public()).unwrap(), "{group}");
        assert!(secret.iter().any(|byte| *byte != 0));
    }
}

fn key(group: Group, hex: &str) -> PrivateKey {
    PrivateKey {
        group,
        value: Zeroizing::new(bytes(hex)),
    }
}

// RFC 5903 section 8.1.
#[test]
fn the_256_bit_curve_gives_the_known_answer() {
    let ours = key(
        Group::Ecp256,
        "C88F01F510D9AC3F70A292DAA2316DE544E9AAB8AFE84049C62A9C57862D1433",
    );
    assert_eq!(
        ours.public(),
        bytes(
            "DAD0B65394221CF9B051E1FECA5787D098DFE637FC90B9EF945D0C3772581180
             5271A0461CDB8252D61F1C456FA3E59AB1F45B33ACCF5F58389E0577B8990BB3"
        )
    );
    let theirs = bytes(
        "D12DFB5289C8D4F81208B70270398C342296970A0BCCB74C736FC7554494BF63
         56FBF3CA366CC23E8157854C13C58D6AAC23F046ADA30F8353E74F33039872AB",
    );
    assert_eq!(
        ours.agree(&theirs).unwrap()[..],
        bytes("D6840F6B42F6EDAFD13116E0E12565202FEF8E9ECE7DCE03812464D04B9442DE")
    );
}

#[test]
fn values_that_no_honest_peer_sends_are_refused() {
    for group in GROUPS {
        let ours = PrivateKey::generate(group, &mut Counter(7));
        let length = ours.public().len();
        assert_eq!(
            ours.agree(&vec![1; length - 1]),
            Err(KeError::Length),
            "{group}"
        );
        assert_eq!(ours.agree(&vec![0; length]), Err(KeError::Value), "{group}");
        if !matches!(group, Group::Curve25519) {
            assert_eq!(
                ours.agree(&vec![0xff; length]),
                Err(KeError::Value),
                "{group}"
            );
        }
    }
    // RFC 6989 section 2.1: neither 1 nor p - 1, which have orders 1 and 2.
    let ours = PrivateKey::generate(Group::Modp2048, &mut Counter(7));
    let mut one = vec![0; 256];
    one[255] = 1;
    assert_eq!(ours.agree(&one), Err(KeError::Value));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_public_value_is_used_or_refused(group in prop::sample::select(&GROUPS[3..]), public: Vec<u8>) {
        let _ = PrivateKey::generate(group, &mut Counter(1)).agree(&public);
    }
}
