//! Datagrams that nobody honest sends: they change nothing, and what they are answered with is little.

use std::{net::SocketAddr, time::Duration};

use super::{
    network::{Conditions, Flight, Seeded},
    pair::{A, B, Pair},
};
use crate::ike::{
    endpoint::Refusal,
    message::{
        Message, Payload,
        payload::{Notify, NotifyType},
    },
};

const HEADER: usize = 28;

fn up() -> Pair {
    up_with(1)
}

fn up_with(seed: u64) -> Pair {
    let mut pair = Pair::configured(seed, Conditions::PERFECT);
    pair.up_a();
    pair.run(Duration::from_secs(3));
    pair.assert_agreement(1);
    pair
}

/// Everything that another tunnel has sent in its life.
fn recorded() -> Vec<Flight> {
    let mut pair = up_with(2);
    pair.tell_a(crate::ike::event::Command::Down(super::pair::PEER));
    pair.run(Duration::from_secs(3));
    pair.network.sent
}

fn set_length(bytes: &mut [u8]) {
    if let (Ok(length), Some(field)) = (u32::try_from(bytes.len()), bytes.get_mut(24..HEADER)) {
        field.copy_from_slice(&length.to_be_bytes());
    }
}

/// Cuts, lengthens, or changes some bytes.
fn damage(random: &mut Seeded, bytes: &mut Vec<u8>) {
    match random.below(4) {
        0 => {
            let keep = random.below(bytes.len() as u64 + 1);
            bytes.truncate(usize::try_from(keep).unwrap());
        }
        1 => {
            let mut more = vec![0; usize::try_from(random.below(64)).unwrap()];
            crate::ike::rng::Random::fill(random, &mut more);
            bytes.extend(more);
        }
        _ => {
            for _ in 0..=random.below(4) {
                let at = usize::try_from(random.below(bytes.len() as u64)).unwrap();
                bytes[at] ^= u8::try_from(1 + random.below(255)).unwrap();
            }
        }
    }
    if random.percent(80) {
        set_length(bytes);
    }
}

#[test]
fn damaged_datagrams_of_any_kind_neither_panic_nor_disturb_a_tunnel() {
    let recorded = recorded();
    let mut pair = up();
    let own: Vec<Flight> = pair.network.sent.clone();
    let mut random = Seeded::new(5, 5);
    let before: Vec<_> = pair.a.installed.keys().copied().collect();
    for _ in 0..20_000 {
        let from = if random.percent(50) { &recorded } else { &own };
        let which = usize::try_from(random.below(from.len() as u64)).unwrap();
        let mut flight = from[which].clone();
        damage(&mut random, &mut flight.bytes);
        pair.deliver(&flight);
        pair.network.flights.clear();
        assert!(pair.b.endpoint.half_open() <= 100);
    }
    assert_eq!(before, pair.a.installed.keys().copied().collect::<Vec<_>>());
    pair.assert_agreement(1);
    assert!(pair.a.downs.is_empty() && pair.b.downs.is_empty());
    // The tunnel still answers.
    pair.run(Duration::from_secs(40));
    pair.a_sends(1);
    pair.run(Duration::from_secs(120));
    pair.assert_agreement(1);
    assert!(pair.a.downs.is_empty());
}

#[test]
fn replayed_datagrams_change_nothing() {
    let mut pair = up();
    let recorded = pair.network.sent.clone();
    for flight in recorded.iter().chain(recorded.iter().rev()) {
        pair.deliver(flight);
        pair.run(Duration::from_millis(10));
    }
    pair.assert_agreement(1);
    assert_eq!((pair.a.ike_ups, pair.b.ike_ups), (1, 1));
}

fn stranger() -> SocketAddr {
    "203.0.113.66:500".parse().unwrap()
}

/// What B answers to a datagram of a stranger.
fn answer(pair: &mut Pair, bytes: &[u8]) -> Option<Vec<u8>> {
    let sent = pair.network.sent.len();
    pair.deliver(&Flight {
        at: pair.now,
        source: stranger(),
        destination: (B, 500).into(),
        bytes: bytes.to_vec(),
    });
    pair.network
        .sent
        .get(sent)
        .map(|flight| flight.bytes.clone())
}

fn only_notify(bytes: &[u8]) -> NotifyType {
    let message = Message::parse(bytes).unwrap();
    assert!(message.header.flags.response);
    let [Payload::Notify(Notify { kind, .. })] = message.payloads.as_slice() else {
        panic!("{message:?}")
    };
    *kind
}

// RFC 7296 section 1.5: a request for an unknown IKE SA is answered by one notify, and not too often.
#[test]
fn a_request_for_an_unknown_ike_sa_is_answered_a_few_times_a_second() {
    let mut pair = up();
    let request = pair
        .network
        .sent
        .iter()
        .find(|flight| flight.source.ip() == A && flight.bytes[18] == 35)
        .unwrap()
        .bytes
        .clone();
    let mut unknown = request.clone();
    unknown[8] ^= 1;
    let mut answered = 0;
    for _ in 0..100 {
        if let Some(bytes) = answer(&mut pair, &unknown) {
            assert_eq!(only_notify(&bytes), NotifyType::INVALID_IKE_SPI);
            assert!(bytes.len() < unknown.len());
            answered += 1;
        }
    }
    assert_eq!(answered, 10);
    pair.run(Duration::from_secs(1));
    assert!(answer(&mut pair, &unknown).is_some());
    // A response is never answered.
    pair.run(Duration::from_secs(1));
    unknown[19] |= 0x20;
    assert_eq!(answer(&mut pair, &unknown), None);
}

// RFC 7296 section 2.5: a higher major version is told which one we speak; version 1 is not spoken to.
#[test]
fn a_later_version_is_told_that_we_speak_version_2() {
    let mut pair = up();
    let mut init = pair.network.sent[0].bytes.clone();
    init[17] = 0x30;
    let bytes = answer(&mut pair, &init).unwrap();
    assert_eq!(only_notify(&bytes), NotifyType::INVALID_MAJOR_VERSION);
    assert_eq!(bytes[17], 0x20);
    init[17] = 0x10;
    assert_eq!(answer(&mut pair, &init), None);
}

#[test]
fn an_ike_sa_init_that_makes_no_sense_is_told_why() {
    let mut pair = up();
    let init = pair.network.sent[0].bytes.clone();
    let message = Message::parse(&init).unwrap();
    let without = |drop: usize, add: Option<Payload<'static>>| {
        let mut message = message.clone();
        message.payloads.remove(drop);
        message.payloads.extend(add);
        message.header.spi_i.0 ^= 1;
        message.emit().unwrap()
    };
    let bytes = answer(&mut pair, &without(1, None)).unwrap();
    assert_eq!(only_notify(&bytes), NotifyType::INVALID_SYNTAX);
    let critical = Payload::Unknown {
        kind: crate::ike::message::PayloadType(200),
        critical: true,
        body: &[],
    };
    let bytes = answer(&mut pair, &without(3, Some(critical))).unwrap();
    assert_eq!(
        only_notify(&bytes),
        NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD
    );
    assert!(
        pair.b
            .endpoint
            .refusals()
            .any(|(refusal, count)| refusal == Refusal::Malformed && count == 2)
    );
}
