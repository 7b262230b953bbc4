//! Children over time: asked for at once by both sides, taken away, refused, split, given up half-way.

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

use ipsec_common::Spi;

use super::{
    network::Conditions,
    pair::{A, B, PEER, Pair, Side, acquire, child, peer},
};
use crate::ike::{
    config::{PeerConfig, Remote, Role},
    event::{Command, DownReason, FailureReason},
};

const PFS: &str = "aes256gcm16-x25519";
/// Both sides of four children.
const NETS: [(&str, &str); 4] = [
    ("10.1.0.0/24", "10.2.0.0/24"),
    ("10.1.1.0/24", "10.2.1.0/24"),
    ("10.1.2.0/24", "10.2.2.0/24"),
    ("10.1.3.0/24", "10.2.3.0/24"),
];

/// A peer with the first `count` children.
pub(super) fn with_children(remote: std::net::IpAddr, role: Role, count: u32) -> PeerConfig {
    let mut config = peer(remote, role);
    config.children = (0..count)
        .zip(NETS)
        .map(|(id, (at_a, at_b))| {
            let (ours, theirs) = if remote == B {
                (at_a, at_b)
            } else {
                (at_b, at_a)
            };
            child(id, &[ours], &[theirs], PFS)
        })
        .collect();
    config
}

fn set(pair: &mut Pair, at_a: PeerConfig, at_b: PeerConfig) {
    pair.tell_a(Command::SetPeer(Box::new(at_a)));
    pair.tell_b(Command::SetPeer(Box::new(at_b)));
}

fn pair_of(count: u32) -> Pair {
    let mut pair = Pair::new(1, Conditions::PERFECT);
    set(
        &mut pair,
        with_children(B, Role::Initiate, count),
        with_children(A, Role::Respond, count),
    );
    pair
}

#[test]
fn both_sides_may_ask_for_children_at_the_same_time() {
    for job in [1, 50, 300] {
        let mut pair = pair_of(2);
        pair.network.conditions.job = Duration::from_millis(job);
        pair.up_a();
        pair.run(Duration::from_secs(5));
        pair.assert_agreement(2);
        set(
            &mut pair,
            with_children(B, Role::Initiate, 4),
            with_children(A, Role::Respond, 4),
        );
        pair.tell_a(acquire(2, A));
        pair.tell_b(acquire(3, B));
        pair.run(Duration::from_secs(5));
        pair.assert_agreement(4);
        assert!(pair.a.failures.is_empty() && pair.b.failures.is_empty());
    }
}

#[test]
fn a_tunnel_taken_down_while_children_come_up_leaves_nothing_behind() {
    for moment in 0..60 {
        for by_a in [true, false] {
            let mut pair = pair_of(4);
            pair.network.conditions = Conditions {
                delay: Duration::from_millis(40),
                job: Duration::from_millis(300),
                ..Conditions::PERFECT
            };
            pair.tell_b(Command::SetPeer(Box::new(with_children(
                A,
                Role::Respond,
                4,
            ))));
            pair.up_a();
            pair.run(Duration::from_millis(moment * 40));
            pair.tell_a(Command::Down(PEER));
            if !by_a {
                pair.tell_b(Command::Down(PEER));
            }
            pair.run(Duration::from_secs(3));
            assert!(pair.a.installed.is_empty(), "at A, {moment}");
            assert!(pair.a.endpoint.is_empty(), "at A, {moment}");
            // What was half-open at B ends by its time limit alone, for A never came back to it.
            assert!(pair.b.installed.is_empty(), "at B, {moment}");
            pair.run(Duration::from_secs(60));
            assert!(pair.b.endpoint.is_empty(), "at B, {moment}");
        }
    }
}

#[test]
fn a_child_that_the_peer_takes_away_is_brought_back() {
    let mut pair = pair_of(2);
    let mut anywhere = with_children(A, Role::Respond, 2);
    anywhere.remote_id = Some(A.into());
    anywhere.remote = Remote::Anywhere;
    pair.tell_b(Command::SetPeer(Box::new(anywhere)));
    pair.up_a();
    pair.run(Duration::from_secs(3));
    pair.assert_agreement(2);
    let gone = pair.b.child(1).unwrap().sa;
    pair.tell_b(Command::Expired(gone));
    pair.run(Duration::from_millis(200));
    pair.assert_agreement(1);
    pair.run(Duration::from_secs(5));
    pair.assert_agreement(2);
    assert_eq!(pair.a.ike_ups, 1, "the IKE SA has stayed");
}

#[test]
fn a_child_that_is_refused_is_asked_for_again_with_growing_pauses() {
    let mut pair = pair_of(2);
    let mut strange = with_children(A, Role::Respond, 2);
    strange.children[1].proposals = vec!["aes128-sha256".parse().unwrap()];
    pair.tell_b(Command::SetPeer(Box::new(strange)));
    pair.up_a();
    pair.run(Duration::from_secs(120));
    pair.assert_agreement(1);
    let tries = pair.a.failures.len();
    assert!((5..=9).contains(&tries), "{tries} tries in two minutes");
    assert!(
        pair.a
            .failures
            .iter()
            .all(|failure| failure.reason == FailureReason::PeerRefusedProposals)
    );
    pair.tell_b(Command::SetPeer(Box::new(with_children(
        A,
        Role::Respond,
        2,
    ))));
    pair.run(Duration::from_secs(90));
    pair.assert_agreement(2);
    assert_eq!(pair.a.ike_ups, 1);
}

// RFC 7296 section 2.9: a responder may take one pair of several, without an error.
#[test]
fn a_peer_that_takes_one_pair_of_selectors_gets_a_child_for_each() {
    let mut pair = Pair::new(1, Conditions::PERFECT);
    let mut at_a = peer(B, Role::Initiate);
    at_a.children = vec![child(
        0,
        &["10.1.0.0/24", "10.1.7.0/24"],
        &["10.2.0.0/24", "10.2.7.0/24"],
        "aes256gcm16",
    )];
    let mut at_b = peer(A, Role::Respond);
    at_b.children = vec![
        child(0, &["10.2.0.0/24"], &["10.1.0.0/24"], "aes256gcm16"),
        child(1, &["10.2.0.0/24"], &["10.1.7.0/24"], "aes256gcm16"),
        child(2, &["10.2.7.0/24"], &["10.1.0.0/24"], "aes256gcm16"),
        child(3, &["10.2.7.0/24"], &["10.1.7.0/24"], "aes256gcm16"),
    ];
    set(&mut pair, at_a, at_b);
    pair.up_a();
    pair.run(Duration::from_secs(5));
    pair.assert_agreement(4);
    assert!(pair.a.failures.is_empty());
}

/// Whether `receiver` could open what `sender` has sent within the last `steps`.
fn receives(receiver: &Side, sent: &[BTreeSet<Spi>]) -> bool {
    let inbound: BTreeSet<Spi> = receiver.installed.values().map(|up| up.spi_in).collect();
    sent.iter().all(|spis| spis.is_subset(&inbound))
}

// Make before break: no packet is lost when an IKE SA takes the place of another, however slow the network.
#[test]
fn every_packet_finds_its_sa_while_ike_sas_replace_each_other() {
    const STEP: Duration = Duration::from_millis(50);
    for (at_a, at_b) in [
        (Role::Initiate, Role::Respond),
        (Role::Initiate, Role::Initiate),
        (Role::OnDemand, Role::Respond),
    ] {
        let mut pair = pair_of(4);
        for (remote, role) in [(B, at_a), (A, at_b)] {
            let mut config = with_children(remote, role, 4);
            config.lifetime = Duration::from_secs(200);
            config.reauth = true;
            pair.set_peer(remote, config);
        }
        pair.up_a();
        pair.run(Duration::from_secs(10));
        // Each exchange takes longer than the grace of an IKE SA that nobody needs any more.
        pair.network.conditions.delay = Duration::from_millis(700);
        pair.network.conditions.job = Duration::from_millis(900);
        let (mut by_a, mut by_b) = (VecDeque::new(), VecDeque::new());
        for _ in 0..12_000 {
            pair.run(STEP);
            for (side, sent) in [(&pair.a, &mut by_a), (&pair.b, &mut by_b)] {
                let used: BTreeSet<Spi> = side.used.values().copied().collect();
                assert_eq!(used.len(), 4);
                sent.push_front(used);
                sent.truncate(14);
            }
            assert!(receives(&pair.b, by_a.make_contiguous()), "{:?}", pair.now);
            assert!(receives(&pair.a, by_b.make_contiguous()), "{:?}", pair.now);
        }
        assert!(pair.a.ike_ups > 2);
        assert!(
            pair.a
                .downs
                .iter()
                .all(|reason| matches!(reason, DownReason::Replaced | DownReason::PeerDeleted))
        );
    }
}

#[test]
fn a_peer_without_configuration_for_it_is_not_asked_without_end() {
    let mut pair = Pair::configured(1, Conditions::PERFECT);
    let mut config = peer(B, Role::Initiate);
    config.remote_id = Some("gw.example".parse().unwrap());
    pair.tell_a(Command::SetPeer(Box::new(config)));
    let mut config = peer(A, Role::Respond);
    config.local_id = Some("other.example".parse().unwrap());
    pair.tell_b(Command::SetPeer(Box::new(config)));
    pair.up_a();
    pair.run(Duration::from_secs(300));
    let tries = pair.a.failures.len();
    assert!((6..=14).contains(&tries), "{tries} tries in five minutes");
}
