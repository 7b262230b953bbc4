//! What fuzzing has found, once more; and what an authenticated peer may ask for that no peer of ours does.

use std::path::Path;

use super::{
    TARGETS,
    puppet::{Bench, Puppet, notify},
};
use crate::ike::{
    config::{ChildName, PeerId, Role},
    event::{Command, Event},
    message::{
        ExchangeType, MessageId, Payload,
        payload::{Notify, NotifyType},
    },
};

const SUPPORTED: NotifyType = NotifyType::IKEV2_MESSAGE_ID_SYNC_SUPPORTED;
const SYNC: NotifyType = NotifyType::IKEV2_MESSAGE_ID_SYNC;

#[test]
fn the_corpus_of_every_fuzz_target_passes() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (name, target) in TARGETS {
        let mut ran = 0;
        for entry in std::fs::read_dir(corpus.join(name)).unwrap() {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            target(&std::fs::read(&path).unwrap());
            ran += 1;
        }
        assert!(ran > 0, "{name} has no corpus");
    }
}

fn connected(role: Role) -> (Bench, Puppet) {
    let mut bench = Bench::new(8, role);
    let puppet = Puppet::connect(&mut bench, &[SUPPORTED]).unwrap();
    assert_eq!(bench.endpoint.established().count(), 1);
    (bench, puppet)
}

fn numbers(bench: &Bench) -> (u32, u32) {
    let (_, _, info) = bench.endpoint.established().next().unwrap();
    (info.next_request, info.expected_request)
}

/// Sends a synchronization; returns the data of the answer's notify.
fn synchronize(
    bench: &mut Bench,
    puppet: &mut Puppet,
    nonce: u32,
    send: u32,
    receive: u32,
) -> Option<Vec<u8>> {
    let data = [nonce, send, receive].map(u32::to_be_bytes).concat();
    let payload = Payload::Notify(Notify::new(SYNC, &data));
    let request = puppet
        .seal(ExchangeType::INFORMATIONAL, 0, false, &[payload])
        .unwrap();
    let answers = bench.deliver(&request);
    let answer = answers.first()?;
    puppet.open(answer, |header, payloads| {
        assert_eq!(header.message_id, MessageId(0));
        assert!(header.flags.response);
        let [Payload::Notify(notify)] = payloads.as_slice() else {
            panic!("{payloads:?}")
        };
        assert_eq!(notify.kind, SYNC);
        notify.data.to_vec()
    })
}

// RFC 6311 section 5.1: both go on from the higher numbers, and what is not higher than before is not answered.
#[test]
fn a_cluster_that_has_failed_over_makes_both_sides_go_on_from_the_higher_numbers() {
    let (mut bench, mut puppet) = connected(Role::Respond);
    assert_eq!(numbers(&bench), (0, 2));
    let answer = synchronize(&mut bench, &mut puppet, 77, 50, 30).unwrap();
    assert_eq!(answer, [77_u32, 30, 50].map(u32::to_be_bytes).concat());
    assert_eq!(numbers(&bench), (30, 50));
    // The same numbers, lower ones, and such as would leave none.
    for (send, receive) in [(50, 30), (49, 100), (u32::MAX, 1), (60, u32::MAX)] {
        assert_eq!(
            synchronize(&mut bench, &mut puppet, 78, send, receive),
            None
        );
        assert_eq!(numbers(&bench), (30, 50));
    }
    // Ours is the higher one.
    let answer = synchronize(&mut bench, &mut puppet, 79, 51, 3).unwrap();
    assert_eq!(answer, [79_u32, 30, 51].map(u32::to_be_bytes).concat());
    // The peer goes on from there.
    let request = puppet
        .seal(ExchangeType::INFORMATIONAL, 51, false, &[])
        .unwrap();
    assert_eq!(bench.deliver(&request).len(), 1);
    assert_eq!(numbers(&bench), (30, 52));
}

#[test]
fn a_repeated_synchronization_gets_the_same_answer_and_changes_nothing() {
    let (mut bench, mut puppet) = connected(Role::Respond);
    let data = [1_u32, 9, 9].map(u32::to_be_bytes).concat();
    let payload = Payload::Notify(Notify::new(SYNC, &data));
    let request = puppet
        .seal(ExchangeType::INFORMATIONAL, 0, false, &[payload])
        .unwrap();
    let first = bench.deliver(&request);
    let next = puppet
        .seal(ExchangeType::INFORMATIONAL, 9, false, &[])
        .unwrap();
    bench.deliver(&next);
    assert_eq!(numbers(&bench), (9, 10));
    assert_eq!(bench.deliver(&request), first);
    assert_eq!(numbers(&bench), (9, 10));
}

#[test]
fn what_was_asked_before_a_synchronization_is_asked_again_under_its_new_number() {
    let (mut bench, mut puppet) = connected(Role::OnDemand);
    // The child goes, and a packet asks for it.
    let up = bench.events.iter().find_map(|event| match event {
        Event::ChildUp(up) => Some(up.spi_out),
        _ => None,
    });
    let delete = crate::ike::message::payload::Delete::Esp(vec![up.unwrap()]);
    let request = puppet
        .seal(
            ExchangeType::INFORMATIONAL,
            2,
            false,
            &[Payload::Delete(delete)],
        )
        .unwrap();
    bench.deliver(&request);
    bench.sent.clear();
    bench.command(Command::Acquire {
        peer: PeerId(1),
        child: ChildName(0),
        local: super::puppet::OURS,
        packet: None,
    });
    let asked = |puppet: &Puppet, bytes: &[u8]| {
        puppet
            .open(bytes, |header, _| (header.exchange, header.message_id))
            .unwrap()
    };
    assert_eq!(
        asked(&puppet, bench.sent.first().unwrap()),
        (ExchangeType::CREATE_CHILD_SA, MessageId(0))
    );
    let data = [1_u32, 20, 20].map(u32::to_be_bytes).concat();
    let payload = Payload::Notify(Notify::new(SYNC, &data));
    let request = puppet
        .seal(ExchangeType::INFORMATIONAL, 0, false, &[payload])
        .unwrap();
    let sent = bench.deliver(&request);
    let all: Vec<_> = sent.iter().map(|bytes| asked(&puppet, bytes)).collect();
    assert_eq!(
        all,
        [
            (ExchangeType::INFORMATIONAL, MessageId(0)),
            (ExchangeType::CREATE_CHILD_SA, MessageId(20)),
        ]
    );
}

#[test]
fn a_synchronization_that_was_not_agreed_on_is_not_answered() {
    let mut bench = Bench::new(8, Role::Respond);
    let mut puppet = Puppet::connect(&mut bench, &[]).unwrap();
    assert_eq!(synchronize(&mut bench, &mut puppet, 1, 50, 30), None);
    assert_eq!(numbers(&bench), (0, 2));
}

// RFC 7296 section 2.3: a larger window is an offer, and one request at a time is always within it.
#[test]
fn a_peer_with_a_larger_window_is_served_one_request_at_a_time() {
    let mut bench = Bench::new(8, Role::Respond);
    let puppet = Puppet::connect(&mut bench, &[]);
    let mut puppet = puppet.unwrap();
    let size = 4_u32.to_be_bytes();
    let window = Payload::Notify(Notify::new(NotifyType::SET_WINDOW_SIZE, &size));
    let mut request = |id, payloads: &[Payload<'_>]| {
        puppet
            .seal(ExchangeType::INFORMATIONAL, id, false, payloads)
            .unwrap()
    };
    let first = request(2, &[window]);
    let (second, third) = (request(3, &[]), request(4, &[notify(NotifyType(40_000))]));
    assert_eq!(bench.deliver(&first).len(), 1);
    // What is ahead of its turn waits for its repetition, as we have announced no larger window.
    assert_eq!(bench.deliver(&third).len(), 0);
    assert_eq!(bench.deliver(&second).len(), 1);
    assert_eq!(bench.deliver(&third).len(), 1);
    assert_eq!(numbers(&bench), (0, 5));
}
