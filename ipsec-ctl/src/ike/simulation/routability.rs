//! Return routability (RFC 4555 section 3.7): whoever cannot show that it has seen what was sent to an address is not
//! believed to be there.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::ike::{
    config::Role,
    event::{Command, DownReason, Event, FailureReason},
    fuzzing::puppet::{Bench, OURS, Puppet, THEIRS, notify},
    message::{
        ExchangeType, MessageId, Payload,
        payload::{Delete, Notify, NotifyType},
    },
};

const ELSEWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9)), 500);
const NEW: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 10));
const NEWER: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 20));
const SUPPORTS: [NotifyType; 1] = [NotifyType::MOBIKE_SUPPORTED];

/// What comes back in the place of a cookie.
type Echo = fn(&[u8]) -> Option<Vec<u8>>;

fn same(cookie: &[u8]) -> Option<Vec<u8>> {
    Some(cookie.to_vec())
}

/// Everything that is not the cookie.
const WRONG: [(&str, Echo); 5] = [
    ("none", |_| None),
    ("one that is empty", |_| Some(Vec::new())),
    ("another", |cookie| Some(vec![0x55; cookie.len()])),
    ("one bit of it wrong", |cookie| {
        let mut wrong = cookie.to_vec();
        wrong[cookie.len() - 1] ^= 1;
        Some(wrong)
    }),
    ("its beginning", |cookie| Some(cookie[..8].to_vec())),
];

/// Message ID and cookie of the request of the endpoint that has one.
fn cookie_of(puppet: &Puppet, sent: &[Vec<u8>]) -> (u32, Vec<u8>) {
    let asked = |datagram: &Vec<u8>| {
        puppet.open(datagram, |header, payloads| {
            let MessageId(id) = header.message_id;
            let cookie = payloads.iter().find_map(|payload| match payload {
                Payload::Notify(notify) if notify.kind == NotifyType::COOKIE2 => {
                    Some(notify.data.to_vec())
                }
                _ => None,
            });
            cookie
                .filter(|_| !header.flags.response)
                .map(|cookie| (id, cookie))
        })
    };
    sent.iter()
        .rev()
        .find_map(|datagram| asked(datagram).flatten())
        .expect("a cookie")
}

/// Answers a request with what takes the place of its cookie; returns what the endpoint sends then.
fn answer(
    bench: &mut Bench,
    puppet: &mut Puppet,
    (id, cookie): &(u32, Vec<u8>),
    echo: Echo,
) -> Vec<Vec<u8>> {
    let data = echo(cookie);
    let payloads: Vec<Payload<'_>> = data
        .iter()
        .map(|data| Payload::Notify(Notify::new(NotifyType::COOKIE2, data)))
        .collect();
    let response = puppet
        .seal(ExchangeType::INFORMATIONAL, *id, true, &payloads)
        .unwrap();
    bench.events.clear();
    bench.deliver(&response)
}

/// Where packets of ESP come from and go to from now on, as often as that was told.
fn moves(bench: &Bench) -> Vec<(IpAddr, IpAddr)> {
    let moves = bench.events.iter().filter_map(|event| match event {
        Event::Moved(_, outer) => Some((outer.local.ip(), outer.remote.ip())),
        _ => None,
    });
    moves.collect()
}

/// The IKE SA has ended with its child and a Delete, nothing has moved, and the operator is told why.
fn assert_ended(bench: &Bench, puppet: &Puppet, sent: &[Vec<u8>], what: &str) {
    assert_eq!(moves(bench), [], "{what}");
    assert_eq!(bench.endpoint.established().count(), 0, "{what}");
    assert!(bench.endpoint.pairs().next().is_none(), "{what}");
    let ended = |event: &Event| matches!(event, Event::IkeDown { reason, .. } if *reason == DownReason::Protocol);
    assert!(bench.events.iter().any(ended), "{what}: {:?}", bench.events);
    let told = |event: &Event| {
        matches!(event, Event::Failed(failure) if failure.reason == FailureReason::BadMessage
            && failure.detail.contains("cookie"))
    };
    assert!(bench.events.iter().any(told), "{what}: {:?}", bench.events);
    let deleted = sent.iter().any(|datagram| {
        let is_delete = puppet.open(datagram, |_, payloads| {
            payloads.contains(&Payload::Delete(Delete::IkeSa))
        });
        is_delete == Some(true)
    });
    assert!(deleted, "{what}");
}

/// A peer that has started the IKE SA says that it is elsewhere now; returns what it is asked there.
fn peer_elsewhere() -> (Bench, Puppet, (u32, Vec<u8>)) {
    let mut bench = Bench::new(8, Role::Respond);
    let mut puppet = Puppet::connect(&mut bench, &SUPPORTS).unwrap();
    let update = puppet
        .seal(
            ExchangeType::INFORMATIONAL,
            2,
            false,
            &[notify(NotifyType::UPDATE_SA_ADDRESSES)],
        )
        .unwrap();
    bench.events.clear();
    bench.theirs = ELSEWHERE;
    let sent = bench.deliver(&update);
    assert_eq!(moves(&bench), [], "before it has shown that it is there");
    let asked = cookie_of(&puppet, &sent);
    (bench, puppet, asked)
}

#[test]
fn esp_goes_to_a_peers_new_address_only_if_our_cookie_comes_back_from_there() {
    let (mut bench, mut puppet, asked) = peer_elsewhere();
    answer(&mut bench, &mut puppet, &asked, same);
    let here = OURS.ip();
    assert_eq!(moves(&bench), [(here, ELSEWHERE.ip())]);
    assert_eq!(bench.endpoint.established().count(), 1);
    for (what, echo) in WRONG {
        let (mut bench, mut puppet, asked) = peer_elsewhere();
        let sent = answer(&mut bench, &mut puppet, &asked, echo);
        assert_ended(&bench, &puppet, &sent, what);
    }
}

/// We have started the IKE SA and go elsewhere; returns what the peer is asked from there.
fn we_elsewhere() -> (Bench, Puppet, (u32, Vec<u8>)) {
    let mut bench = Bench::new(8, Role::Initiate);
    let puppet = Puppet::answer(&mut bench, &SUPPORTS).unwrap();
    let (ike, _, info) = bench.endpoint.established().next().expect("an IKE SA");
    assert!(info.leads && info.mobike);
    bench.sent.clear();
    bench.events.clear();
    bench.command(Command::MoveTo(ike, NEW, THEIRS.ip()));
    assert_eq!(moves(&bench), [(NEW, THEIRS.ip())], "at once");
    let asked = cookie_of(&puppet, &bench.sent);
    (bench, puppet, asked)
}

#[test]
fn a_peer_that_answers_our_move_without_our_cookie_is_left() {
    let (mut bench, mut puppet, asked) = we_elsewhere();
    answer(&mut bench, &mut puppet, &asked, same);
    assert_eq!(bench.endpoint.established().count(), 1);
    for (what, echo) in WRONG {
        let (mut bench, mut puppet, asked) = we_elsewhere();
        let sent = answer(&mut bench, &mut puppet, &asked, echo);
        assert_ended(&bench, &puppet, &sent, what);
    }
}

#[test]
fn the_answer_to_a_move_that_another_has_overtaken_counts_for_nothing_but_must_hold_our_cookie() {
    let overtaken = || {
        let (mut bench, puppet, asked) = we_elsewhere();
        let (ike, ..) = bench.endpoint.established().next().unwrap();
        bench.command(Command::MoveTo(ike, NEWER, THEIRS.ip()));
        (bench, puppet, asked)
    };
    let (mut bench, mut puppet, asked) = overtaken();
    let sent = answer(&mut bench, &mut puppet, &asked, same);
    assert_eq!(bench.endpoint.established().count(), 1);
    let again = cookie_of(&puppet, &sent);
    assert_ne!(again.1, asked.1, "each request has a cookie of its own");
    // What was good for the first is not for the second.
    let old = asked.1.clone();
    let data = Payload::Notify(Notify::new(NotifyType::COOKIE2, &old));
    let response = puppet
        .seal(ExchangeType::INFORMATIONAL, again.0, true, &[data])
        .unwrap();
    bench.events.clear();
    let sent = bench.deliver(&response);
    assert_ended(&bench, &puppet, &sent, "the cookie before");
    for (what, echo) in WRONG {
        let (mut bench, mut puppet, asked) = overtaken();
        let sent = answer(&mut bench, &mut puppet, &asked, echo);
        assert_ended(&bench, &puppet, &sent, what);
    }
}
