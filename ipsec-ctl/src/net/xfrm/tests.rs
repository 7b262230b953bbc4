//! Our messages against those that `ip xfrm` sends for the same states and policies, and policies set in a real kernel.

use netlink_packet_core::ParseableParametrized;
use netlink_packet_xfrm::{XFRM_MSG_NEWSA, XFRM_MSG_UPDPOLICY, XfrmAttrs, XfrmMessage};
use zeroize::Zeroizing;

use super::*;
use crate::net::tests::in_namespace;

/// What iproute2 6.1 sent for the command in the first line.
fn recorded(text: &str, kind: u16) -> XfrmMessage {
    let digits: Vec<u8> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(str::bytes)
        .collect();
    let bytes: Vec<u8> = digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect();
    XfrmMessage::parse_with_param(&bytes, kind).unwrap()
}

/// The order of attributes means nothing.
fn sorted(attributes: &[XfrmAttrs]) -> Vec<String> {
    let mut shown: Vec<_> = attributes.iter().map(|one| format!("{one:?}")).collect();
    shown.sort();
    shown
}

fn assert_same_state(state: &State, text: &str) {
    let XfrmMessage::AddSa(expected) = recorded(text, XFRM_MSG_NEWSA) else {
        panic!("not a state");
    };
    let ours = state.message();
    assert_eq!(ours.user_sa_info, expected.user_sa_info);
    assert_eq!(sorted(&ours.nlas), sorted(&expected.nlas));
}

fn key(bytes: u8) -> Zeroizing<Vec<u8>> {
    Zeroizing::new((0..bytes).collect())
}

fn state(source: &str, destination: &str, algorithms: Algorithms) -> State {
    State {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        spi: 0x10,
        mode: Mode::Tunnel,
        reqid: 0,
        if_id: 0,
        algorithms,
        replay: Replay::default(),
        encap: None,
        output_mark: None,
        limits: Limits::NONE,
        copy_dscp: true,
        clear_df: false,
        card: None,
    }
}

#[test]
fn a_state_with_esn_and_an_interface_is_what_iproute_sends() {
    let algorithms = Algorithms::Aead {
        name: "rfc4106(gcm(aes))",
        key: key(36),
        icv_bits: 128,
    };
    let state = State {
        spi: 0xc0ff_ee01,
        reqid: 7,
        if_id: 0x2a,
        replay: Replay {
            esn: true,
            window: 4096,
            ..Replay::default()
        },
        output_mark: Some(0x4958),
        limits: Limits {
            soft_bytes: 900,
            hard_bytes: 1000,
            soft_packets: 90,
            hard_packets: 100,
            ..Limits::NONE
        },
        copy_dscp: false,
        ..state("192.0.2.1", "192.0.2.2", algorithms)
    };
    assert_same_state(&state, include_str!("fixtures/gcm_esn_interface.hex"));
}

#[test]
fn an_encapsulated_ipv6_state_is_what_iproute_sends() {
    let algorithms = Algorithms::Separate {
        cipher: "cbc(aes)",
        cipher_key: key(16),
        integrity: "hmac(sha256)",
        integrity_key: key(32),
        icv_bits: 128,
    };
    let state = State {
        spi: 0x1234,
        reqid: 9,
        encap: Some(Encap {
            source_port: 4500,
            destination_port: 50_000,
        }),
        clear_df: true,
        ..state("2001:db8::1", "2001:db8::2", algorithms)
    };
    assert_same_state(&state, include_str!("fixtures/cbc_ipv6_encapsulated.hex"));
}

#[test]
fn a_state_that_goes_on_from_a_number_is_what_iproute_sends() {
    let algorithms = Algorithms::Aead {
        name: "rfc7539esp(chacha20,poly1305)",
        key: key(36),
        icv_bits: 128,
    };
    let state = State {
        replay: Replay {
            esn: true,
            window: 64,
            sent: 0x22 << 32 | 0x21,
            received: 0x12 << 32 | 0x11,
        },
        ..state("192.0.2.1", "192.0.2.2", algorithms)
    };
    assert_same_state(&state, include_str!("fixtures/chacha_esn_numbers.hex"));
}

fn policies() -> [Policy; 2] {
    let any = PortMask::default();
    [
        Policy {
            direction: PolicyDirection::Out,
            selector: Selector {
                source: "10.1.0.0/24".parse().unwrap(),
                destination: "10.2.0.0/16".parse().unwrap(),
                protocol: 6,
                source_port: any,
                destination_port: PortMask {
                    port: 443,
                    mask: u16::MAX,
                },
            },
            priority: 1000,
            if_id: 42,
            action: Action::Protect(Template {
                source: "192.0.2.1".parse().unwrap(),
                destination: "192.0.2.2".parse().unwrap(),
                spi: 0xc0ff_ee01,
                reqid: 7,
                mode: Mode::Tunnel,
            }),
            card: None,
        },
        Policy {
            direction: PolicyDirection::Forward,
            selector: Selector {
                source: "2001:db8:1::/48".parse().unwrap(),
                destination: "::/0".parse().unwrap(),
                protocol: 0,
                source_port: any,
                destination_port: any,
            },
            priority: 5,
            if_id: 0,
            action: Action::Block,
            card: None,
        },
    ]
}

#[test]
fn policies_are_what_iproute_sends() {
    let texts = [
        include_str!("fixtures/protect_out.hex"),
        include_str!("fixtures/block_forward.hex"),
    ];
    for (policy, text) in policies().iter().zip(texts) {
        let XfrmMessage::UpdatePolicy(expected) = recorded(text, XFRM_MSG_UPDPOLICY) else {
            panic!("not a policy");
        };
        let ours = policy.message();
        assert_eq!(ours.user_policy_info, expected.user_policy_info);
        assert_eq!(sorted(&ours.nlas), sorted(&expected.nlas));
        // And read back from what the kernel shows.
        assert_eq!(Policy::of(&XfrmMessage::AddPolicy(expected)), Some(*policy));
    }
}

#[test]
fn a_policy_is_set_replaced_listed_and_removed() {
    if let Err(error) = Xfrm::open() {
        return crate::skip::skip(format_args!("no XFRM: {error}"));
    }
    in_namespace(async || {
        let xfrm = Xfrm::open().unwrap();
        let mut watch = Watch::start().unwrap();
        // The kernel under the tests may lack xfrm interfaces, and the attribute with them.
        let [first, second] = policies().map(|policy| Policy { if_id: 0, ..policy });
        for policy in [&first, &second, &first] {
            xfrm.set_policy(policy).unwrap();
        }
        let blocked = Policy {
            action: Action::Block,
            ..first
        };
        xfrm.set_policy(&blocked).unwrap();
        let mut listed = xfrm.policies().unwrap();
        listed.sort();
        let mut expected = vec![blocked, second];
        expected.sort();
        assert_eq!(listed, expected);
        xfrm.remove_policy(&first).unwrap();
        xfrm.remove_policy(&first).unwrap();
        assert_eq!(xfrm.policies().unwrap(), [second]);
        for notice in [
            Notice::PolicySet(first),
            Notice::PolicySet(second),
            Notice::PolicySet(first),
            Notice::PolicySet(blocked),
            Notice::PolicyRemoved(blocked),
        ] {
            assert_eq!(watch.next().await.unwrap(), [notice]);
        }
    });
}

#[test]
fn the_kernels_words_for_a_refusal_are_kept() {
    let xfrm = match Xfrm::open() {
        Ok(xfrm) => xfrm,
        Err(error) => return crate::skip::skip(format_args!("no XFRM: {error}")),
    };
    let algorithms = Algorithms::Aead {
        name: "no such thing",
        key: key(4),
        icv_bits: 128,
    };
    let error = xfrm
        .add_state(&state("192.0.2.1", "192.0.2.2", algorithms))
        .unwrap_err();
    assert!(
        error.reason.contains("AEAD") || error.errno == Some(libc::EPERM),
        "{error}"
    );
}

#[test]
fn keys_are_wiped_from_a_message_that_was_written() {
    let algorithms = Algorithms::Aead {
        name: "rfc4106(gcm(aes))",
        key: key(36),
        icv_bits: 128,
    };
    let mut message = XfrmMessage::AddSa(state("192.0.2.1", "192.0.2.2", algorithms).message());
    super::state::wipe(&mut message);
    let XfrmMessage::AddSa(message) = message else {
        panic!("not a state");
    };
    let key = message.nlas.iter().find_map(|attribute| match attribute {
        XfrmAttrs::EncryptionAlgAead(algorithm) => Some(&algorithm.alg_key),
        _ => None,
    });
    assert_eq!(key, Some(&Vec::new()));
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_read_or_passed_over(bytes: Vec<u8>, kind in 0x10_u16..0x29) {
        for (kind, _, body) in messages(&bytes) {
            parse(kind, body);
        }
        parse(kind, &bytes);
    }
}
