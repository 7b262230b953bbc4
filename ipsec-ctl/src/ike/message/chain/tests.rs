//! Tests of whole messages: bytes of a real peer, round trips of every payload, and arbitrary bytes.

use std::net::IpAddr;

use ipsec_common::{Spi, TrafficSelector};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::ike::message::payload::*;
use crate::ike::message::{ExchangeType, Flags, IkeSpi, MessageId};

/// Reads one of the files in `data/`: hexadecimal bytes, and a comment that names their source.
fn captured(file: &str) -> Vec<u8> {
    let words = file
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(str::split_whitespace);
    words
        .map(|word| u8::from_str_radix(word, 16).unwrap())
        .collect()
}

#[test]
fn a_captured_ike_sa_init_request_is_understood_and_written_back_to_the_byte() {
    let bytes = captured(include_str!("data/ike_sa_init_request.hex"));
    let message = Message::parse(&bytes).unwrap();
    assert_eq!(message.header.exchange, ExchangeType::IKE_SA_INIT);
    assert_eq!(
        message.header.flags,
        Flags {
            initiator: true,
            ..Flags::default()
        }
    );
    assert_eq!(
        (message.header.spi_r, message.header.message_id),
        (IkeSpi(0), MessageId(0))
    );
    let [
        Payload::SecurityAssociation(sa),
        Payload::KeyExchange(ke),
        Payload::Nonce(nonce),
        notifies @ ..,
    ] = message.payloads.as_slice()
    else {
        panic!("other payloads: {message:?}");
    };
    let transforms = &sa.proposals[0].transforms;
    assert_eq!(
        transforms
            .iter()
            .map(|t| (t.kind.0, t.id))
            .collect::<Vec<_>>(),
        [(1, 20), (2, 6), (4, 31)]
    );
    assert_eq!(transforms[0].key_length(), KeyLength::Bits(256));
    assert_eq!(
        (ke.method, ke.public.len(), nonce.bytes().len()),
        (KeMethod(31), 32, 32)
    );
    let kinds = notifies.iter().map(|payload| match payload {
        Payload::Notify(notify) => notify.kind,
        other => panic!("not a notify: {other:?}"),
    });
    let expected = [
        NotifyType::NAT_DETECTION_SOURCE_IP,
        NotifyType::NAT_DETECTION_DESTINATION_IP,
        NotifyType::IKEV2_FRAGMENTATION_SUPPORTED,
        NotifyType::SIGNATURE_HASH_ALGORITHMS,
        NotifyType::REDIRECT_SUPPORTED,
    ];
    assert_eq!(kinds.collect::<Vec<_>>(), expected);
    assert_eq!(message.emit().unwrap(), bytes);
}

#[test]
fn captured_decrypted_payloads_are_understood_and_written_back_to_the_byte() {
    // The numbers of payloads are those of the summary lines in the same log.
    let files = [
        (
            PayloadType::ID_INITIATOR,
            include_str!("data/ike_auth_request.hex"),
            10,
        ),
        (
            PayloadType::ID_RESPONDER,
            include_str!("data/ike_auth_response.hex"),
            5,
        ),
        (
            PayloadType::NOTIFY,
            include_str!("data/rekey_child_request.hex"),
            6,
        ),
        (
            PayloadType::SECURITY_ASSOCIATION,
            include_str!("data/rekey_child_response.hex"),
            5,
        ),
        (
            PayloadType::DELETE,
            include_str!("data/delete_child.hex"),
            1,
        ),
        (
            PayloadType::DELETE,
            include_str!("data/delete_ike_sa.hex"),
            1,
        ),
    ];
    for (first, file, count) in files {
        let bytes = captured(file);
        let payloads = parse_payloads(first, &bytes).unwrap();
        assert_eq!(payloads.len(), count, "{payloads:?}");
        assert!(
            !payloads
                .iter()
                .any(|payload| matches!(payload, Payload::Unknown { .. })),
            "{payloads:?}"
        );
        assert_eq!(emit_payloads(&payloads).unwrap(), (first, bytes));
    }
}

// RFC 7296 section 3.14: an Encrypted payload is the last of its message, and its next-payload field tells the type
// of the first payload inside.
#[test]
fn a_captured_encrypted_message_shows_its_ranges() {
    let bytes = captured(include_str!("data/ike_auth_datagram.hex"));
    let message = Message::parse(&bytes).unwrap();
    let [Payload::Encrypted(encrypted)] = message.payloads.as_slice() else {
        panic!("{message:?}")
    };
    assert_eq!(encrypted.first, PayloadType::ID_INITIATOR);
    assert_eq!(
        (encrypted.associated.clone(), encrypted.body.clone()),
        (0..32, 32..bytes.len())
    );
    let frame =
        frame_encrypted(&message.header, encrypted.first, None, encrypted.body.len()).unwrap();
    assert_eq!(
        frame.bytes[frame.associated],
        bytes[encrypted.associated.clone()]
    );
    assert_eq!(frame.body, encrypted.body);
}

#[test]
fn an_encrypted_payload_is_refused_inside_another() {
    let refused = parse_payloads(PayloadType::ENCRYPTED, &[0, 0, 0, 4]);
    assert_eq!(
        refused,
        Err(ParseError::Invalid("encrypted payload inside another"))
    );
}

#[test]
fn a_frame_beyond_a_datagram_is_refused() {
    assert!(frame_encrypted(&header(), PayloadType::NONE, None, 65_503).is_ok());
    assert_eq!(
        frame_encrypted(&header(), PayloadType::NONE, None, 65_504),
        Err(EmitError("message"))
    );
    assert_eq!(
        frame_encrypted(&header(), PayloadType::NONE, None, usize::MAX),
        Err(EmitError("message"))
    );
}

#[test]
fn more_payloads_than_any_peer_sends_are_refused() {
    let vendor_ids = [PayloadType::VENDOR_ID.0, 0, 0, 4].repeat(MAX_PAYLOADS + 1);
    assert_eq!(
        parse_payloads(PayloadType::VENDOR_ID, &vendor_ids),
        Err(ParseError::TooMany("payloads"))
    );
}

#[test]
fn every_truncation_of_a_message_is_refused() {
    let bytes = captured(include_str!("data/ike_auth_request.hex"));
    for end in 0..bytes.len() {
        assert!(
            parse_payloads(PayloadType::ID_INITIATOR, &bytes[..end]).is_err(),
            "{end} bytes"
        );
    }
}

fn header() -> Header {
    Header {
        spi_i: IkeSpi(1),
        spi_r: IkeSpi(2),
        first: PayloadType::NONE,
        minor: 0,
        exchange: ExchangeType::IKE_AUTH,
        flags: Flags::default(),
        message_id: MessageId(1),
    }
}

/// What a generated payload is made of.
type Seed = (u8, u8, u16, Vec<u8>);

fn payload((choice, byte, word, bytes): &Seed) -> Payload<'_> {
    let (data, short) = (bytes.as_slice(), &bytes[..bytes.len().min(8)]);
    match choice {
        0 => Payload::SecurityAssociation(security_association(*byte, *word, short)),
        1 => Payload::KeyExchange(KeyExchange {
            method: KeMethod(*word),
            public: data,
        }),
        2 => Payload::IdInitiator(Identification {
            kind: IdType::FQDN,
            data,
        }),
        3 => Payload::IdResponder(Identification {
            kind: IdType::KEY_ID,
            data,
        }),
        4 => Payload::Certificate(Certificate {
            encoding: CertEncoding(*byte),
            data,
        }),
        5 => Payload::CertificateRequest(Certificate {
            encoding: CertEncoding(*byte),
            data,
        }),
        6 => Payload::Authentication(Authentication {
            method: AuthMethod(*byte),
            data,
        }),
        7 => Nonce::new(data).map_or(Payload::Eap(data), Payload::Nonce),
        8 => Payload::Notify(Notify {
            protocol: Protocol(*byte),
            spi: short,
            kind: NotifyType(*word),
            data,
        }),
        9 => Payload::Delete(Delete::Esp(vec![Spi((*word).into()); (*byte).into()])),
        10 => Payload::Delete(Delete::IkeSa),
        11 => Payload::VendorId(data),
        12 => Payload::TsInitiator(TrafficSelectors::new(&selectors(*byte, *word))),
        13 => Payload::TsResponder(TrafficSelectors {
            selectors: vec![WireSelector::Other {
                kind: 9,
                second: *byte,
                body: data,
            }],
        }),
        14 => Payload::Configuration(Configuration {
            kind: ConfigType(*byte),
            attributes: vec![
                ConfigAttribute {
                    kind: *word >> 1,
                    value: data
                };
                3
            ],
        }),
        _ => Payload::Unknown {
            kind: PayloadType(200),
            critical: *byte > 127,
            body: data,
        },
    }
}

fn security_association(byte: u8, word: u16, spi: &[u8]) -> SecurityAssociation<'_> {
    let attributes = vec![
        Attribute::KeyLength { bits: word },
        Attribute::Short(3, word),
        Attribute::Long(word >> 1, spi),
    ];
    let transform = Transform {
        kind: TransformType(byte),
        id: word,
        attributes,
    };
    let plain = Transform {
        attributes: vec![],
        ..transform
    };
    let proposal = Proposal {
        number: byte,
        protocol: Protocol(byte),
        spi,
        transforms: vec![transform, plain],
    };
    SecurityAssociation {
        proposals: vec![proposal; usize::from(byte % 3) + 1],
    }
}

fn selectors(protocol: u8, port: u16) -> [TrafficSelector; 2] {
    let range = |start: &str, end: &str| -> (IpAddr, IpAddr) {
        (start.parse().unwrap(), end.parse().unwrap())
    };
    let addresses = [
        range("10.0.0.0", "10.0.0.255"),
        range("2001:db8::", "2001:db8::ffff"),
    ];
    addresses.map(|addresses| TrafficSelector {
        protocol,
        ports: (port, u16::MAX),
        addresses,
    })
}

proptest! {
    #[test]
    fn what_is_emitted_parses_back(
        seeds in vec((0..16u8, any::<u8>(), any::<u16>(), vec(any::<u8>(), 0..300)), 0..20),
        spi in any::<u64>(), id in any::<u32>(), bits in any::<[bool; 3]>(), minor in 0..16u8,
    ) {
        let payloads: Vec<_> = seeds.iter().map(payload).collect();
        let flags = Flags { initiator: bits[0], version: bits[1], response: bits[2] };
        let first = payloads.first().map_or(PayloadType::NONE, Payload::kind);
        let header = Header { spi_i: IkeSpi(spi), first, flags, minor, message_id: MessageId(id), ..header() };
        let message = Message { header, payloads };
        let bytes = message.emit().unwrap();
        prop_assert_eq!(Message::parse(&bytes).unwrap(), message);
    }

    #[test]
    fn any_bytes_are_parsed_or_refused(first in 1..60u8, bytes in vec(any::<u8>(), 0..400)) {
        // Whatever is accepted can be written, and is then understood the same way.
        if let Ok(payloads) = parse_payloads(PayloadType(first), &bytes) {
            let (first, written) = emit_payloads(&payloads).unwrap();
            prop_assert_eq!(parse_payloads(first, &written).unwrap(), payloads);
        }
        let _ = Message::parse(&bytes);
    }

    #[test]
    fn any_change_of_captured_bytes_is_parsed_or_refused(at in 0..200usize, value in any::<u8>(), cut in 0..200usize) {
        let mut bytes = captured(include_str!("data/ike_auth_request.hex"));
        bytes[at] = value;
        bytes.truncate(bytes.len() - cut);
        if let Ok(payloads) = parse_payloads(PayloadType::ID_INITIATOR, &bytes) {
            let (first, written) = emit_payloads(&payloads).unwrap();
            prop_assert_eq!(parse_payloads(first, &written).unwrap(), payloads);
        }
    }
}
