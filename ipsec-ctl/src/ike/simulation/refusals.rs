//! What a peer may refuse, and what becomes of the SAs then: CHILD_SA_NOT_FOUND and NO_ADDITIONAL_SAS, said and heard.

use std::time::Duration;

use ipsec_common::Spi;

use super::{
    network::Conditions,
    pair::{self, B, Pair},
};
use crate::ike::{
    config::{PeerId, Role},
    crypto::{Group, ke::PrivateKey},
    event::{Command, DownReason, Event, FailureReason, Rekey},
    fuzzing::puppet::{Bench, Counter, OURS, Puppet, notify, peer},
    message::{
        ExchangeType, Message, MessageId, Payload,
        payload::{
            Delete, KeMethod, KeyExchange, Nonce, Notify, NotifyType, Protocol, TrafficSelectors,
        },
    },
    negotiate::proposals,
    time::Time,
};

const PEER: PeerId = PeerId(1);

// What the peer has begun and we replace at once looks like two that were begun at the same time, of which one goes again.
#[test]
fn an_ike_sa_of_the_peer_that_is_refused_its_first_rekeying_is_replaced_when_it_is_older() {
    for what in [Rekey::Children, Rekey::Ike] {
        let mut pair = Pair::configured(1, Conditions::PERFECT);
        pair.up_a();
        pair.run(Duration::from_secs(5));
        for side in [&mut pair.a, &mut pair.b] {
            side.endpoint.watched().is_minimal = true;
        }
        pair.tell_b(Command::Rekey(pair::PEER, what));
        for _ in 0..100 {
            pair.run(Duration::from_secs(1));
            pair.assert_nothing_is_lost();
        }
        pair.assert_agreement(1);
        assert_eq!((pair.a.ike_ups, pair.b.ike_ups), (2, 2), "{what:?}");
        for side in [&pair.a, &pair.b] {
            let up: Vec<_> = side.endpoint.established().collect();
            let [(_, _, info)] = up.as_slice() else {
                panic!("{} are up", up.len());
            };
            assert_eq!(
                info.initiator,
                side.address == B,
                "the fresh one has stayed"
            );
        }
    }
}

/// What the endpoint asks its peer for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    /// A child, in the place of another.
    ChildInPlaceOf(Vec<u8>),
    /// A child.
    Child,
    /// An IKE SA in the place of this one.
    Ike,
    /// A fresh IKE SA.
    Fresh,
    /// Something else.
    Else,
}

fn asked(puppet: &Puppet, datagram: &[u8]) -> (u32, Asked) {
    let header = Message::parse(datagram).unwrap().header;
    if header.exchange == ExchangeType::IKE_SA_INIT {
        return (0, Asked::Fresh);
    }
    let what = puppet.open(datagram, |header, payloads| {
        let rekeyed = payloads.iter().find_map(|payload| match payload {
            Payload::Notify(notify) if notify.kind == NotifyType::REKEY_SA => {
                Some(notify.spi.to_vec())
            }
            _ => None,
        });
        let selects = payloads
            .iter()
            .any(|payload| matches!(payload, Payload::TsInitiator(_)));
        match (header.exchange, rekeyed, selects) {
            (ExchangeType::CREATE_CHILD_SA, Some(spi), _) => Asked::ChildInPlaceOf(spi),
            (ExchangeType::CREATE_CHILD_SA, None, true) => Asked::Child,
            (ExchangeType::CREATE_CHILD_SA, None, false) => Asked::Ike,
            _ => Asked::Else,
        }
    });
    let MessageId(id) = header.message_id;
    (id, what.unwrap_or(Asked::Else))
}

/// A peer that has one child with the endpoint, and has proved that it has.
pub(super) fn proved(bench: &mut Bench) -> Puppet {
    let mut puppet = Puppet::connect(bench, &[]).unwrap();
    let proof = puppet
        .seal(ExchangeType::INFORMATIONAL, 2, false, &[])
        .unwrap();
    bench.deliver(&proof);
    bench.sent.clear();
    puppet
}

fn connected() -> (Bench, Puppet) {
    let mut bench = Bench::new(8, Role::Initiate);
    let puppet = proved(&mut bench);
    bench.events.clear();
    (bench, puppet)
}

/// What the endpoint asks for, and what it asks for when that is refused.
fn refuse(bench: &mut Bench, puppet: &mut Puppet, kind: NotifyType) -> (Asked, Option<Asked>) {
    let request = bench.sent.last().expect("a request").clone();
    let (id, first) = asked(puppet, &request);
    let response = puppet
        .seal(ExchangeType::CREATE_CHILD_SA, id, true, &[notify(kind)])
        .unwrap();
    let answers = bench.deliver(&response);
    bench.sent.clone_from(&answers);
    (
        first,
        answers.last().map(|datagram| asked(puppet, datagram).1),
    )
}

fn lost_children(bench: &Bench) -> Vec<DownReason> {
    let reasons = bench.events.iter().filter_map(|event| match event {
        Event::ChildDown { reason, .. } => Some(*reason),
        _ => None,
    });
    reasons.collect()
}

fn failures(bench: &Bench, wanted: FailureReason) -> usize {
    let failed =
        |event: &&Event| matches!(event, Event::Failed(failure) if failure.reason == wanted);
    bench.events.iter().filter(failed).count()
}

// RFC 7296 section 2.25.1: who hears CHILD_SA_NOT_FOUND forgets the child and asks for a new one.
#[test]
fn a_child_that_the_peer_has_lost_is_made_anew_without_naming_the_old_one() {
    let (mut bench, mut puppet) = connected();
    bench.command(Command::Rekey(PEER, Rekey::Children));
    let (first, then) = refuse(&mut bench, &mut puppet, NotifyType::CHILD_SA_NOT_FOUND);
    assert!(matches!(first, Asked::ChildInPlaceOf(_)), "{first:?}");
    assert_eq!(then, Some(Asked::Child));
    assert_eq!(lost_children(&bench), [DownReason::PeerDeleted]);
    assert_eq!(bench.endpoint.established().count(), 1);
}

// RFC 7296 section 1.3.3: a peer that takes no more SAs cannot rekey; a fresh IKE SA is to take over, and what is there
// carries traffic until then.
#[test]
fn a_peer_that_takes_no_more_sas_gets_a_fresh_ike_sa_before_the_old_one_ends() {
    for what in [Rekey::Children, Rekey::Ike] {
        let (mut bench, mut puppet) = connected();
        bench.wait(Duration::from_secs(31));
        bench.command(Command::Rekey(PEER, what));
        let (first, then) = refuse(&mut bench, &mut puppet, NotifyType::NO_ADDITIONAL_SAS);
        match what {
            Rekey::Children => assert!(matches!(first, Asked::ChildInPlaceOf(_)), "{first:?}"),
            Rekey::Ike => assert_eq!(first, Asked::Ike),
        }
        assert_eq!(then, Some(Asked::Fresh), "{what:?}");
        assert_eq!(lost_children(&bench), [], "{what:?}");
        assert_eq!(bench.endpoint.established().count(), 1, "{what:?}");
        if what == Rekey::Children {
            assert_eq!(failures(&bench, FailureReason::NoAdditionalSas), 1);
        }
    }
}

// A fresh IKE SA would not help, were the peer asked at once: each could be refused its child.
#[test]
fn a_peer_that_takes_no_more_sas_is_asked_again_with_growing_pauses_and_then_for_a_fresh_ike_sa() {
    let (mut bench, mut puppet) = connected();
    bench.command(Command::Up(PEER, OURS));
    let spi = Spi(u32::from_be_bytes([0xc0, 0xff, 0xee, 0x01]));
    let delete = puppet
        .seal(
            ExchangeType::INFORMATIONAL,
            3,
            false,
            &[Payload::Delete(Delete::Esp(std::iter::once(spi).collect()))],
        )
        .unwrap();
    bench.deliver(&delete);
    assert_eq!(lost_children(&bench), [DownReason::PeerDeleted]);
    let mut requests = 0;
    let begun = bench.now;
    loop {
        bench.sent.clear();
        bench.wait(Duration::from_millis(100));
        let Some(request) = bench.sent.last() else {
            assert!(bench.now - begun < Duration::from_secs(90));
            continue;
        };
        assert_eq!(asked(&puppet, request).1, Asked::Child);
        requests += 1;
        if refuse(&mut bench, &mut puppet, NotifyType::NO_ADDITIONAL_SAS).1 == Some(Asked::Fresh) {
            break;
        }
    }
    assert!(bench.now - begun > Duration::from_secs(25));
    assert!((3..=7).contains(&requests), "{requests} requests");
    assert_eq!(failures(&bench, FailureReason::NoAdditionalSas), requests);
    assert_eq!(bench.endpoint.established().count(), 1);
}

// RFC 7296 section 2.25: who hears TEMPORARY_FAILURE does not ask again at once, but for some minutes; then both sides are out
// of step, and the IKE SA is closed.
#[test]
fn a_peer_that_is_busy_is_asked_again_for_some_minutes_and_then_left() {
    for what in [Rekey::Children, Rekey::Ike] {
        let (mut bench, mut puppet) = connected();
        bench.command(Command::Rekey(PEER, what));
        let (begun, mut last, mut requests) = (bench.now, None::<Time>, 0);
        let left = loop {
            let waited = bench.now - begun;
            if let Some(request) = bench.sent.last() {
                if asked(&puppet, request).1 == Asked::Fresh {
                    break waited;
                }
                let since = last.replace(bench.now).map(|last| bench.now - last);
                let pause = Duration::from_secs(1);
                assert!(since.is_none_or(|since| since > pause), "{since:?}");
                requests += 1;
                refuse(&mut bench, &mut puppet, NotifyType::TEMPORARY_FAILURE);
                continue;
            }
            assert!(waited < Duration::from_secs(300), "it is never left");
            bench.sent.clear();
            bench.wait(Duration::from_millis(100));
        };
        assert!(left >= Duration::from_secs(120), "{left:?} is too early");
        assert!((40..100).contains(&requests), "{requests} requests");
        assert_eq!(lost_children(&bench), [], "what is there goes on");
        assert_eq!(bench.endpoint.established().count(), 1);
    }
}

// RFC 7296 section 2.8.2: of two heirs that were begun at once the exchange that goes on decides; here only the peer's is left.
#[test]
fn an_answer_without_sense_to_our_rekeying_of_the_ike_sa_leaves_the_heir_that_the_peer_has_begun() {
    let (mut bench, mut puppet) = connected();
    bench.command(Command::Rekey(PEER, Rekey::Ike));
    let (id, what) = asked(&puppet, bench.sent.last().expect("a request"));
    assert_eq!(what, Asked::Ike);
    let group = Group::Curve25519;
    let public = PrivateKey::generate(group, &mut Counter(5)).public();
    let spi = 0x5eed_u64.to_be_bytes();
    let rekeying = [
        Payload::SecurityAssociation(proposals::ike_rekey_offer(
            &peer(Role::Respond).proposals,
            &spi,
        )),
        Payload::Nonce(Nonce::new(&[3; 32]).unwrap()),
        Payload::KeyExchange(KeyExchange {
            method: KeMethod(group.id()),
            public: &public,
        }),
    ];
    let kind = ExchangeType::CREATE_CHILD_SA;
    let request = puppet.seal(kind, 3, false, &rekeying).unwrap();
    let answers = bench.deliver(&request);
    assert_eq!(answers.len(), 1, "the peer's heir is agreed to");
    let two = [(); 2].map(|()| Payload::Nonce(Nonce::new(&[4; 32]).unwrap()));
    let senseless = puppet.seal(kind, id, true, &two).unwrap();
    bench.deliver(&senseless);
    assert_eq!(lost_children(&bench), [], "they are the heir's");
    bench.sent.clear();
    bench.command(Command::Rekey(PEER, Rekey::Children));
    let request = bench.sent.last().expect("the heir is in force");
    let header = Message::parse(request).unwrap().header;
    assert_eq!(header.exchange, kind);
    assert_eq!(header.spi_i.0.to_be_bytes(), spi);
}

/// The peer asks for a child; returns what the answer says.
fn ask(bench: &mut Bench, puppet: &mut Puppet, id: u32, rekeys: Option<u32>) -> Option<Answer> {
    let config = peer(Role::Respond);
    let child = &config.children[0];
    let spi = (0x1000 + id).to_be_bytes();
    let nonce = [9; 32];
    let old = rekeys.map(u32::to_be_bytes);
    let mut payloads = vec![
        Payload::SecurityAssociation(proposals::child_offer(&child.proposals, &spi, true)),
        Payload::Nonce(Nonce::new(&nonce).unwrap()),
        Payload::TsInitiator(TrafficSelectors::new(&child.remote)),
        Payload::TsResponder(TrafficSelectors::new(&child.local)),
    ];
    if let Some(spi) = &old {
        payloads.push(Payload::Notify(Notify {
            protocol: Protocol::ESP,
            spi,
            kind: NotifyType::REKEY_SA,
            data: &[],
        }));
    }
    let request = puppet
        .seal(ExchangeType::CREATE_CHILD_SA, id, false, &payloads)
        .unwrap();
    let answers = bench.deliver(&request);
    puppet.open(answers.first()?, |_, payloads| {
        let refusal = payloads.iter().find_map(|payload| match payload {
            Payload::Notify(notify) if notify.kind.is_error() => {
                Some((notify.kind, notify.spi.to_vec()))
            }
            _ => None,
        });
        refusal.map_or(Answer::Agreed, |(kind, spi)| Answer::Refused(kind, spi))
    })
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Agreed,
    Refused(NotifyType, Vec<u8>),
}

// RFC 7296 section 2.25: the notify names the SPI that the request has named.
#[test]
fn a_child_that_we_do_not_have_cannot_be_rekeyed() {
    let (mut bench, mut puppet) = connected();
    let unknown = 0xdead_beef_u32;
    let refused = Answer::Refused(
        NotifyType::CHILD_SA_NOT_FOUND,
        unknown.to_be_bytes().to_vec(),
    );
    assert_eq!(
        ask(&mut bench, &mut puppet, 3, Some(unknown)),
        Some(refused)
    );
    assert_eq!(lost_children(&bench), []);
    assert_eq!(ask(&mut bench, &mut puppet, 4, None), Some(Answer::Agreed));
}

// RFC 7296 section 1.3: NO_ADDITIONAL_SAS. What replaces another is no further one.
#[test]
fn there_is_an_end_to_the_children_of_a_peer_but_not_to_their_rekeying() {
    let (mut bench, mut puppet) = connected();
    let mut refused = None;
    let mut agreed = 1;
    for id in 3..400 {
        match ask(&mut bench, &mut puppet, id, None) {
            Some(Answer::Agreed) => agreed += 1,
            other => {
                refused = other.map(|answer| (id, answer));
                break;
            }
        }
    }
    let (id, answer) = refused.expect("no end");
    assert_eq!(
        answer,
        Answer::Refused(NotifyType::NO_ADDITIONAL_SAS, Vec::new())
    );
    assert_eq!(agreed, 256);
    let old = Some(0x1000 + 3);
    assert_eq!(
        ask(&mut bench, &mut puppet, id + 1, old),
        Some(Answer::Agreed)
    );
}
