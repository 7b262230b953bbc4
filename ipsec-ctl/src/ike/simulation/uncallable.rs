//! Peers that we cannot call: what becomes of an IKE SA that only they can replace (RFC 7296 section 2.8.3, RFC 4478).

use std::time::Duration;

use super::{
    network::Conditions,
    pair::{A, B, Pair, peer},
    refusals::proved,
};
use crate::ike::{
    config::{PeerConfig, PeerId, Remote, Role},
    event::{ChildSaId, Command, DownReason, Event, Rekey},
    fuzzing::puppet::{Bench, Puppet, notify, peer as puppets_peer},
    message::{
        Message, MessageId, Payload,
        payload::{Delete, Notify, NotifyType},
    },
};

/// Lifetime of an IKE SA, at whose end identities are proved anew.
const LIFETIME: Duration = Duration::from_secs(300);

/// B, which does not know where A is, and wants it to prove its identity once in a lifetime.
fn responder() -> PeerConfig {
    let mut config = peer(A, Role::Respond);
    config.remote = Remote::Anywhere;
    config.remote_id = Some(A.into());
    config.lifetime = LIFETIME;
    config.reauth = true;
    config
}

fn up(at_a: PeerConfig, at_b: PeerConfig) -> Pair {
    let mut pair = Pair::new(3, Conditions::PERFECT);
    pair.set_peer(B, at_a);
    pair.set_peer(A, at_b);
    pair.up_a();
    pair.run(Duration::from_secs(10));
    pair
}

#[test]
fn a_peer_that_knows_how_begins_a_fresh_ike_sa_in_time_and_nothing_is_lost() {
    let mut pair = up(peer(B, Role::Initiate), responder());
    for _ in 0..20_000 {
        pair.run(Duration::from_millis(100));
        pair.assert_nothing_is_lost();
    }
    let ups = (pair.a.ike_ups, pair.b.ike_ups);
    assert!(
        ups.0 >= 6 && ups.0 == ups.1,
        "{ups:?} in more than six lifetimes"
    );
    assert!(
        pair.b
            .downs
            .iter()
            .all(|reason| matches!(reason, DownReason::Replaced | DownReason::PeerDeleted)),
        "{:?}",
        pair.b.downs
    );
}

#[test]
fn rekeying_does_not_put_off_that_identities_are_proved_anew() {
    let mut at_a = peer(B, Role::Initiate);
    at_a.lifetime = Duration::from_secs(100);
    let mut pair = up(at_a, responder());
    pair.run(LIFETIME);
    pair.assert_nothing_is_lost();
    assert!(pair.b.ike_rekeys >= 2, "{} rekeyings", pair.b.ike_rekeys);
    assert!(pair.b.ike_ups >= 2, "none has proved anything again");
}

#[test]
fn what_can_be_renewed_is_until_the_end_and_then_the_peer_is_told() {
    let mut at_b = responder();
    at_b.children[0].lifetime = Duration::from_secs(60);
    let mut pair = up(peer(B, Role::Initiate), at_b);
    // What it is asked for it cannot do: it has forgotten where to call.
    let mut lost = peer(B, Role::Initiate);
    lost.remote = Remote::Anywhere;
    lost.remote_id = Some(B.into());
    pair.tell_a(Command::SetPeer(Box::new(lost)));
    for _ in 0..2890 {
        pair.run(Duration::from_millis(100));
        pair.assert_nothing_is_lost();
    }
    pair.run(Duration::from_secs(2));
    assert_eq!(pair.b.downs, [DownReason::Expired]);
    assert_eq!(pair.a.downs, [DownReason::PeerDeleted]);
    assert!(pair.a.installed.is_empty() && pair.b.installed.is_empty());
}

/// The puppet's name.
const PUPPET: PeerId = PeerId(1);

/// An endpoint that has one child with a peer that it cannot call.
fn connected() -> (Bench, Puppet, ChildSaId) {
    let mut bench = Bench::new(8, Role::Respond);
    let mut config = puppets_peer(Role::Respond);
    config.remote = Remote::Anywhere;
    bench.command(Command::SetPeer(Box::new(config)));
    let puppet = proved(&mut bench);
    let up = bench.events.iter().find_map(|event| match event {
        Event::ChildUp(up) => Some(up.sa),
        _ => None,
    });
    bench.events.clear();
    (bench, puppet, up.unwrap())
}

/// What the endpoint asks its peer.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    /// To agree to an SA.
    Sa,
    /// To begin a fresh IKE SA within so many seconds.
    Fresh(u32),
    /// To forget the IKE SA.
    Delete,
    /// Something else.
    Else,
}

/// Answers all that the endpoint has asked, every request for an SA with a refusal; tells what it was.
fn answer(bench: &mut Bench, puppet: &mut Puppet, refusal: NotifyType) -> Vec<Asked> {
    let mut all = Vec::new();
    while !bench.sent.is_empty() {
        let request = bench.sent.remove(0);
        let MessageId(id) = Message::parse(&request).unwrap().header.message_id;
        let (kind, asked) = puppet
            .open(&request, |header, payloads| {
                let asked = payloads.iter().find_map(|payload| match payload {
                    Payload::Notify(Notify {
                        kind: NotifyType::AUTH_LIFETIME,
                        data,
                        ..
                    }) => Some(Asked::Fresh(u32::from_be_bytes(
                        (*data).try_into().unwrap(),
                    ))),
                    Payload::Delete(Delete::IkeSa) => Some(Asked::Delete),
                    Payload::SecurityAssociation(_) => Some(Asked::Sa),
                    _ => None,
                });
                (header.exchange, asked.unwrap_or(Asked::Else))
            })
            .unwrap();
        let refused = [notify(refusal)];
        let payloads = if asked == Asked::Sa {
            &refused[..]
        } else {
            &[]
        };
        let response = puppet.seal(kind, id, true, payloads).unwrap();
        all.push(asked);
        let further = bench.deliver(&response);
        bench.sent.extend(further);
    }
    all
}

fn downs(bench: &Bench) -> Vec<DownReason> {
    let reasons = bench.events.iter().filter_map(|event| match event {
        Event::IkeDown { reason, .. } => Some(*reason),
        _ => None,
    });
    reasons.collect()
}

fn children(bench: &Bench) -> usize {
    let ended = |event: &&Event| matches!(event, Event::ChildDown { .. });
    1 - bench.events.iter().filter(ended).count()
}

// RFC 7296 section 1.3: after NO_ADDITIONAL_SAS the old SA is deleted and another made from scratch, here by the peer.
#[test]
fn a_peer_that_takes_no_more_sas_is_asked_to_begin_anew_and_told_when_the_first_of_them_ends() {
    for what in [Rekey::Children, Rekey::Ike] {
        let (mut bench, mut puppet, _) = connected();
        let begun = bench.now;
        bench.command(Command::Rekey(PUPPET, what));
        let asked = answer(&mut bench, &mut puppet, NotifyType::NO_ADDITIONAL_SAS);
        assert_eq!(asked, [Asked::Sa, Asked::Fresh(60)], "{what:?}");
        assert_eq!(children(&bench), 1, "what is there goes on");
        let mut later = Vec::new();
        while children(&bench) == 1 {
            assert!(bench.now - begun < Duration::from_secs(700), "{what:?}");
            bench.wait(Duration::from_secs(1));
            later.extend(answer(
                &mut bench,
                &mut puppet,
                NotifyType::NO_ADDITIONAL_SAS,
            ));
        }
        let lived = bench.now - begun;
        assert!(lived >= Duration::from_secs(598), "{what:?} {lived:?}");
        assert_eq!(later.last(), Some(&Asked::Delete), "{what:?} {later:?}");
        assert!(!later.iter().any(|asked| matches!(asked, Asked::Fresh(_))));
        assert_eq!(downs(&bench), [DownReason::Expired], "{what:?}");
        assert!(bench.endpoint.is_empty());
    }
}

#[test]
fn volume_that_is_used_up_ends_the_ike_sa_too_where_the_peer_takes_no_more() {
    let (mut bench, mut puppet, child) = connected();
    bench.command(Command::Rekey(PUPPET, Rekey::Children));
    answer(&mut bench, &mut puppet, NotifyType::NO_ADDITIONAL_SAS);
    bench.command(Command::Expired(child));
    let asked = answer(&mut bench, &mut puppet, NotifyType::NO_ADDITIONAL_SAS);
    assert_eq!(asked, [Asked::Delete]);
    assert_eq!(downs(&bench), [DownReason::Expired]);
}

// RFC 7296 section 2.25: both sides are out of step, and the IKE SA is closed.
#[test]
fn a_peer_that_is_busy_without_end_is_left() {
    for what in [Rekey::Children, Rekey::Ike] {
        let (mut bench, mut puppet, _) = connected();
        let begun = bench.now;
        bench.command(Command::Rekey(PUPPET, what));
        let mut asked = Vec::new();
        while downs(&bench).is_empty() {
            assert!(bench.now - begun < Duration::from_secs(300), "{what:?}");
            asked.extend(answer(
                &mut bench,
                &mut puppet,
                NotifyType::TEMPORARY_FAILURE,
            ));
            bench.wait(Duration::from_millis(100));
        }
        let waited = bench.now - begun;
        assert!(
            waited >= Duration::from_secs(120),
            "{waited:?} is too early"
        );
        asked.extend(answer(
            &mut bench,
            &mut puppet,
            NotifyType::TEMPORARY_FAILURE,
        ));
        assert_eq!(asked.pop(), Some(Asked::Delete), "{what:?}");
        assert!(asked.iter().all(|asked| *asked == Asked::Sa), "{asked:?}");
        assert_eq!(downs(&bench), [DownReason::Protocol], "{what:?}");
        assert!(bench.endpoint.is_empty());
    }
}
