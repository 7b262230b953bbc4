//! Encrypted messages of every suite, whole, changed and cut short.

use super::*;
use crate::ike::{
    crypto::{
        keys::{IkeKeys, Nonces},
        transform::{Group, Integrity, Prf},
    },
    message::{
        ExchangeType, Flags, IkeSpi, Message, MessageId, parse_payloads,
        payload::{Notify, NotifyType, PayloadType},
    },
};

struct Fixed(u8);

impl Random for Fixed {
    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            self.0 = self.0.wrapping_add(41);
            *byte = self.0;
        }
    }
}

fn suites() -> Vec<IkeSuite> {
    let cbc = [
        Encryption::AesCbc128,
        Encryption::AesCbc192,
        Encryption::AesCbc256,
    ]
    .into_iter()
    .flat_map(|cipher| {
        [
            Integrity::HmacSha256,
            Integrity::HmacSha384,
            Integrity::HmacSha512,
        ]
        .map(|integrity| (cipher, Some(integrity)))
    });
    let aead = [
        Encryption::Aes128Gcm16,
        Encryption::Aes256Gcm16,
        Encryption::ChaCha20Poly1305,
    ]
    .map(|cipher| (cipher, None));
    cbc.chain(aead)
        .map(|(encryption, integrity)| IkeSuite {
            encryption,
            integrity,
            prf: Prf::HmacSha384,
            group: Group::Curve25519,
        })
        .collect()
}

const HEADER: Header = Header {
    spi_i: IkeSpi(1),
    spi_r: IkeSpi(2),
    first: PayloadType::NONE,
    minor: 0,
    exchange: ExchangeType::INFORMATIONAL,
    flags: Flags {
        initiator: true,
        version: false,
        response: false,
    },
    message_id: MessageId(5),
};

fn keys(suite: &IkeSuite) -> IkeKeys {
    let nonces = Nonces {
        initiator: &[1; 32],
        responder: &[2; 32],
    };
    IkeKeys::derive(suite, &[3; 32], nonces, IkeSpi(1), IkeSpi(2))
}

fn encrypted(message: &[u8]) -> Encrypted {
    match Message::parse(message).unwrap().payloads.pop() {
        Some(Payload::Encrypted(encrypted)) => encrypted,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_sealed_opens_in_every_suite_and_length() {
    for suite in suites() {
        let keys = keys(&suite);
        for length in 0..40 {
            let data = vec![7; length];
            let payloads = [Payload::Notify(Notify::new(NotifyType::COOKIE, &data))];
            let message = seal(&HEADER, &payloads, &suite, &keys.initiator, &mut Fixed(0)).unwrap();
            let content = encrypted(&message);
            let chain = open(&message, &content, &suite, &keys.initiator).unwrap();
            assert_eq!(
                parse_payloads(content.first, &chain).unwrap(),
                payloads,
                "{suite}"
            );
            assert_eq!(
                open(&message, &content, &suite, &keys.responder),
                Err(OpenError::Integrity),
                "{suite}: each direction has its own keys"
            );
        }
    }
}

#[test]
fn a_change_of_any_byte_is_noticed() {
    for suite in suites() {
        let keys = keys(&suite);
        let message = seal(&HEADER, &[], &suite, &keys.initiator, &mut Fixed(0)).unwrap();
        let content = encrypted(&message);
        for at in 0..message.len() {
            let mut forged = message.clone();
            forged[at] ^= 1;
            assert_eq!(
                open(&forged, &content, &suite, &keys.initiator),
                Err(OpenError::Integrity),
                "{suite}, byte {at}"
            );
        }
    }
}

#[test]
fn truncated_bodies_are_refused_without_a_panic() {
    for suite in suites() {
        let keys = keys(&suite);
        let message = seal(&HEADER, &[], &suite, &keys.initiator, &mut Fixed(0)).unwrap();
        let whole = encrypted(&message);
        for end in 0..message.len() {
            let cut = Encrypted {
                body: whole.body.start.min(end)..end,
                associated: 0..whole.body.start.min(end),
                first: whole.first,
            };
            assert!(open(&message[..end], &cut, &suite, &keys.initiator).is_err());
        }
    }
}

// RFC 5282 section 3.1: an IV must not repeat, and a request and its response share their message ID and nothing else.
#[test]
fn the_ivs_of_a_request_and_a_response_with_one_id_differ() {
    let suite = suites().pop().unwrap();
    let keys = keys(&suite);
    let response = Header {
        flags: Flags {
            response: true,
            ..HEADER.flags
        },
        ..HEADER
    };
    let iv = |header: &Header| {
        let message = seal(header, &[], &suite, &keys.initiator, &mut Fixed(0)).unwrap();
        let body = encrypted(&message).body;
        message[body.start..body.start + AEAD_IV].to_vec()
    };
    assert_ne!(iv(&HEADER), iv(&response));
}

// RFC 7383 section 2.5: every part is sealed on its own, is no longer than it may be, and all have IVs of their own.
#[test]
fn a_long_message_is_split_into_parts_that_open_and_join() {
    let data = [7; 700];
    let payloads = [Payload::Notify(Notify::new(NotifyType::COOKIE, &data))];
    for suite in suites() {
        let keys = keys(&suite);
        for most in [150, 151, 165, 166, 300, 700, 1000] {
            let mut random = Fixed(0);
            let parts = seal_split(
                &HEADER,
                &payloads,
                &suite,
                &keys.initiator,
                &mut random,
                most,
            )
            .unwrap();
            assert_eq!(parts.len() > 1, most < 780, "{most}");
            let mut joined = Vec::new();
            let mut ivs = std::collections::BTreeSet::new();
            for (number, bytes) in (1..).zip(&parts) {
                assert!(bytes.len() <= most, "{} of {most}", bytes.len());
                let message = Message::parse(bytes).unwrap();
                let (content, first) = match message.payloads.last().unwrap() {
                    Payload::Encrypted(content) => (content, content.first),
                    Payload::EncryptedFragment { content, part } => {
                        assert_eq!(
                            (part.number, usize::from(part.total)),
                            (number, parts.len())
                        );
                        assert_eq!(content.first == PayloadType::NONE, number > 1);
                        (content, content.first)
                    }
                    other => panic!("{other:?}"),
                };
                assert!(number > 1 || first == PayloadType::NOTIFY);
                assert!(ivs.insert(bytes[content.body.start..][..AEAD_IV].to_vec()));
                joined.extend_from_slice(&open(bytes, content, &suite, &keys.initiator).unwrap());
                let mut renumbered = bytes.clone();
                renumbered[33] ^= 1;
                assert!(
                    parts.len() == 1
                        || open(&renumbered, content, &suite, &keys.initiator).is_err(),
                    "the number of a part is protected"
                );
            }
            assert_eq!(
                parse_payloads(PayloadType::NOTIFY, &joined).unwrap(),
                payloads
            );
        }
    }
}

#[test]
fn a_message_of_too_many_parts_is_not_sent() {
    let data = [7; 60_000];
    let payloads = [Payload::Notify(Notify::new(NotifyType::COOKIE, &data))];
    let suite = &suites()[0];
    let split = |most| {
        let (keys, mut random) = (keys(suite), Fixed(0));
        seal_split(
            &HEADER,
            &payloads,
            suite,
            &keys.initiator,
            &mut random,
            most,
        )
    };
    assert!(split(1100).is_ok());
    assert_eq!(split(500), Err(SealError::Emit(EmitError("message"))));
    assert!(split(0).is_err());
}
