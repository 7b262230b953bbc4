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

const GROUPS: [Group; 9] = [
    Group::Modp2048,
    Group::Modp3072,
    Group::Modp4096,
    Group::Modp6144,
    Group::Modp8192,
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

fn gives(group: Group, private: &str, public: &str, theirs: &str, secret: &str) {
    let ours = key(group, private);
    assert_eq!(ours.public(), bytes(public), "{group}");
    assert_eq!(
        ours.agree(&bytes(theirs)).unwrap()[..],
        bytes(secret),
        "{group}"
    );
}

// RFC 5903 sections 8.1 to 8.3: both sides of each exchange.
#[test]
fn the_nist_curves_give_the_known_answers() {
    let (i, gi) = (
        "C88F01F510D9AC3F70A292DAA2316DE544E9AAB8AFE84049C62A9C57862D1433",
        "DAD0B65394221CF9B051E1FECA5787D098DFE637FC90B9EF945D0C3772581180
         5271A0461CDB8252D61F1C456FA3E59AB1F45B33ACCF5F58389E0577B8990BB3",
    );
    let (r, gr) = (
        "C6EF9C5D78AE012A011164ACB397CE2088685D8F06BF9BE0B283AB46476BEE53",
        "D12DFB5289C8D4F81208B70270398C342296970A0BCCB74C736FC7554494BF63
         56FBF3CA366CC23E8157854C13C58D6AAC23F046ADA30F8353E74F33039872AB",
    );
    let secret = "D6840F6B42F6EDAFD13116E0E12565202FEF8E9ECE7DCE03812464D04B9442DE";
    gives(Group::Ecp256, i, gi, gr, secret);
    gives(Group::Ecp256, r, gr, gi, secret);

    let (i, gi) = (
        "099F3C7034D4A2C699884D73A375A67F7624EF7C6B3C0F160647B67414DCE655E35B538041E649EE3FAEF896783AB194",
        "667842D7D180AC2CDE6F74F37551F55755C7645C20EF73E31634FE72B4C55EE6DE3AC808ACB4BDB4C88732AEE95F41AA
         9482ED1FC0EEB9CAFC4984625CCFC23F65032149E0E144ADA024181535A0F38EEB9FCFF3C2C947DAE69B4C634573A81C",
    );
    let (r, gr) = (
        "41CB0779B4BDB85D47846725FBEC3C9430FAB46CC8DC5060855CC9BDA0AA2942E0308312916B8ED2960E4BD55A7448FC",
        "E558DBEF53EECDE3D3FCCFC1AEA08A89A987475D12FD950D83CFA41732BC509D0D1AC43A0336DEF96FDA41D0774A3571
         DCFBEC7AACF3196472169E838430367F66EEBE3C6E70C416DD5F0C68759DD1FFF83FA40142209DFF5EAAD96DB9E6386C",
    );
    let secret = "11187331C279962D93D604243FD592CB9D0A926F422E47187521287E7156C5C4D603135569B9E9D09CF5D4A270F59746";
    gives(Group::Ecp384, i, gi, gr, secret);
    gives(Group::Ecp384, r, gr, gi, secret);

    let (i, gi) = (
        "0037ADE9319A89F4DABDB3EF411AACCCA5123C61ACAB57B5393DCE47608172A095AA85A30FE1C2952C6771D937BA9777F5957B2639BAB072462F68C27A57382D4A52",
        "0015417E84DBF28C0AD3C278713349DC7DF153C897A1891BD98BAB4357C9ECBEE1E3BF42E00B8E380AEAE57C2D107564941885942AF5A7F4601723C4195D176CED3E
         017CAE20B6641D2EEB695786D8C946146239D099E18E1D5A514C739D7CB4A10AD8A788015AC405D7799DC75E7B7D5B6CF2261A6A7F1507438BF01BEB6CA3926F9582",
    );
    let (r, gr) = (
        "0145BA99A847AF43793FDD0E872E7CDFA16BE30FDC780F97BCCC3F078380201E9C677D600B343757A3BDBF2A3163E4C2F869CCA7458AA4A4EFFC311F5CB151685EB9",
        "00D0B3975AC4B799F5BEA16D5E13E9AF971D5E9B984C9F39728B5E5739735A219B97C356436ADC6E95BB0352F6BE64A6C2912D4EF2D0433CED2B6171640012D9460F
         015C68226383956E3BD066E797B623C27CE0EAC2F551A10C2C724D9852077B87220B6536C5C408A1D2AEBB8E86D678AE49CB57091F4732296579AB44FCD17F0FC56A",
    );
    let secret = "01144C7D79AE6956BC8EDB8E7C787C4521CB086FA64407F97894E5E6B2D79B04D1427E73CA4BAA240A34786859810C06B3C715A3A8CC3151F2BEE417996D19F3DDEA";
    gives(Group::Ecp521, i, gi, gr, secret);
    gives(Group::Ecp521, r, gr, gi, secret);
}

// RFC 7748 section 6.1, the function that RFC 8031 takes as it is.
#[test]
fn curve25519_gives_the_known_answer() {
    let (a, ga) = (
        "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
    );
    let (b, gb) = (
        "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
        "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
    );
    let secret = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742";
    gives(Group::Curve25519, a, ga, gb, secret);
    gives(Group::Curve25519, b, gb, ga, secret);
}

// RFC 8031 appendix A.
#[test]
fn curve25519_gives_the_known_answer_of_ike() {
    let (a, ga) = (
        "751fb4308655b476b6789b7325f9ea8cddd16a58533ff6d9e60009464a5f9d94",
        "48d5ddd4061257ba166fa3f9bbdb74f1a4e81c089384fa77f790709f0dfbc766",
    );
    let (b, gb) = (
        "0a54645253290d60ddadd0e030bacd9e5501efdc220755a1e978f1b839a05688",
        "0be7c1f5aad87d7e448662673298a443478b859745179eaf564c79c0ef6eee25",
    );
    let secret = "c74950607a12327f3204d94b6825bfb068b7f8319a9e3708ed3d43ce8130c950";
    gives(Group::Curve25519, a, ga, gb, secret);
    gives(Group::Curve25519, b, gb, ga, secret);
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
    fn any_public_value_is_used_or_refused(group in prop::sample::select(&GROUPS[5..]), public: Vec<u8>) {
        let _ = PrivateKey::generate(group, &mut Counter(1)).agree(&public);
    }
}
