//! What the fuzz targets do with their input, so that a normal test can do the same with what they have found.
//!
//! Each function takes any bytes and panics if something is wrong. `fuzz/fuzz_targets` calls them under libFuzzer.

pub mod puppet;

use std::time::Duration;

use self::puppet::{Bench, Puppet};
use super::{
    config::{PeerId, Role},
    event::Command,
    message::{
        ExchangeType, Message, Payload, PayloadType, emit_payloads, parse_payloads,
        payload::NotifyType,
    },
};

/// Name of a target, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 9] = [
    ("ike_message", message),
    ("ike_payloads", payloads),
    ("ike_sa", sa),
    ("ike_ts", ts),
    ("ike_notify_delete", notify_delete),
    ("ike_id_cert_config", id_cert_config),
    ("ike_key_exchange", key_exchange),
    ("ike_endpoint", endpoint),
    ("ike_exchanges", exchanges),
];

/// Datagrams, fragments among them: whatever is read can be written, and reads the same again.
pub fn message(bytes: &[u8]) {
    let Ok(message) = Message::parse(bytes) else {
        return;
    };
    for payload in &message.payloads {
        if let Payload::Encrypted(content) | Payload::EncryptedFragment { content, .. } = payload {
            assert!(content.associated.end == content.body.start);
            assert!(content.body.end == bytes.len());
            return;
        }
    }
    let written = message.emit().expect("what was read has a wire form");
    let again = Message::parse(&written).expect("what was written can be read");
    assert_eq!(again.payloads, message.payloads);
}

/// Chains of payloads, as an Encrypted payload holds them. The first byte is the type of the first payload.
pub fn payloads(bytes: &[u8]) {
    if let Some((first, chain)) = bytes.split_first() {
        round_trip(PayloadType(*first), chain);
    }
}

fn round_trip(first: PayloadType, chain: &[u8]) {
    let Ok(payloads) = parse_payloads(first, chain) else {
        return;
    };
    let (kind, written) = emit_payloads(&payloads).expect("what was read has a wire form");
    let again = parse_payloads(kind, &written).expect("what was written can be read");
    assert_eq!(again, payloads);
}

/// One payload; the first byte chooses among types.
fn one_of(kinds: &[PayloadType], bytes: &[u8]) {
    let Some((choice, body)) = bytes.split_first() else {
        return;
    };
    let Ok(length) = u16::try_from(body.len() + 4) else {
        return;
    };
    let [high, low] = length.to_be_bytes();
    let chain = [&[0, 0, high, low], body].concat();
    if let Some(kind) = kinds.get(usize::from(*choice) % kinds.len()) {
        round_trip(*kind, &chain);
    }
}

/// Proposals.
pub fn sa(bytes: &[u8]) {
    one_of(&[PayloadType::SECURITY_ASSOCIATION], bytes);
}

/// Traffic selectors.
pub fn ts(bytes: &[u8]) {
    one_of(
        &[PayloadType::TS_INITIATOR, PayloadType::TS_RESPONDER],
        bytes,
    );
}

/// Notify and Delete.
pub fn notify_delete(bytes: &[u8]) {
    one_of(&[PayloadType::NOTIFY, PayloadType::DELETE], bytes);
}

/// Identities, certificates, AUTH, configuration.
pub fn id_cert_config(bytes: &[u8]) {
    let kinds = [
        PayloadType::ID_INITIATOR,
        PayloadType::ID_RESPONDER,
        PayloadType::CERTIFICATE,
        PayloadType::CERTIFICATE_REQUEST,
        PayloadType::AUTHENTICATION,
        PayloadType::CONFIGURATION,
    ];
    one_of(&kinds, bytes);
}

/// Public values and nonces.
pub fn key_exchange(bytes: &[u8]) {
    one_of(&[PayloadType::KEY_EXCHANGE, PayloadType::NONCE], bytes);
}

/// An endpoint that strangers send datagrams to: it neither panics nor lets half-open IKE SAs pile up. The input is a row
/// of datagrams, each after its length in two bytes.
pub fn endpoint(input: &[u8]) {
    const HALF_OPEN: u32 = 8;
    let mut bench = Bench::new(HALF_OPEN, Role::Initiate);
    bench.command(Command::Up(PeerId(1), puppet::OURS));
    let mut rest = input;
    while let Some((length, behind)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(behind.len());
        let (datagram, behind) = behind.split_at(length);
        rest = behind;
        bench.deliver(datagram);
        bench.wait(Duration::from_millis(100));
        assert!(bench.endpoint.half_open() <= HALF_OPEN as usize);
        assert_eq!(
            bench.endpoint.established().count(),
            0,
            "nobody has the secret"
        );
    }
}

/// An endpoint whose authenticated peer sends anything at all under the right keys.
///
/// The input is a row of messages: a byte that chooses what is sent and how, a byte for the message ID, a byte for the
/// number of payloads, then each payload as its type, its length and its bytes.
pub fn exchanges(input: &[u8]) {
    const MOST: usize = 64;
    let mut bench = Bench::new(8, Role::Initiate);
    let supports = [NotifyType::IKEV2_MESSAGE_ID_SYNC_SUPPORTED];
    let mut puppet = Puppet::connect(&mut bench, &supports).expect("an honest handshake succeeds");
    let mut rest = input;
    for _ in 0..MOST {
        let Some((&[how, id, count], behind)) = rest.split_first_chunk::<3>() else {
            return;
        };
        rest = behind;
        let mut payloads = Vec::new();
        for _ in 0..count % 16 {
            let Some((&[kind, length], behind)) = rest.split_first_chunk::<2>() else {
                break;
            };
            let (body, behind) = behind.split_at(usize::from(length).min(behind.len()));
            rest = behind;
            payloads.push(Payload::Unknown {
                kind: PayloadType(kind),
                critical: how & 0x40 != 0,
                body,
            });
        }
        send(&mut bench, &mut puppet, (how, id), &payloads);
        assert!(bench.endpoint.len() <= 16, "IKE SAs pile up");
        bench.wait(Duration::from_millis(u64::from(how) * 100));
        bench.events.clear();
    }
}

fn send(bench: &mut Bench, puppet: &mut Puppet, (how, id): (u8, u8), payloads: &[Payload<'_>]) {
    let exchange = match how & 3 {
        0 => ExchangeType::INFORMATIONAL,
        1 => ExchangeType::CREATE_CHILD_SA,
        2 => ExchangeType::IKE_AUTH,
        _ => ExchangeType(id),
    };
    let (id, response) = (u32::from(id), how & 4 != 0);
    if how & 8 != 0 {
        let parts = puppet.seal_split(exchange, id, payloads, 100);
        for part in parts.unwrap_or_default() {
            bench.deliver(&part);
        }
    } else if let Some(datagram) = puppet.seal(exchange, id, response, payloads) {
        bench.deliver(&datagram);
        if how & 16 != 0 {
            bench.deliver(&datagram);
        }
    }
}

#[cfg(test)]
mod tests;
