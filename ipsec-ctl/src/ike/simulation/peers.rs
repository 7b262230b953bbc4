//! Peers with several addresses, dead peers, and several who claim one identity.

use std::{net::IpAddr, time::Duration};

use super::{
    network::{Conditions, Seeded},
    pair::{A, B, PEER, Pair, acquire, child, limits, peer, sent},
};
use crate::ike::{
    Endpoint,
    config::{ChildName, DpdMode, OnDead, PeerConfig, PeerId, Remote, Role, Unique, Way},
    event::{Command, DownReason, FailureReason},
};

const SECOND: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 77));

fn at(addresses: &[IpAddr]) -> Remote {
    let way = |remote: &IpAddr| Way {
        remote: *remote,
        local: None,
    };
    Remote::At(addresses.iter().map(way).collect())
}

/// A knows B at its primary address and at another; B takes A by its identity.
fn with_two_addresses() -> (Pair, PeerConfig) {
    let mut pair = Pair::configured(3, Conditions::PERFECT);
    pair.second_of_b = Some(SECOND);
    let mut at_a = peer(B, Role::Initiate);
    at_a.remote = at(&[B, SECOND]);
    at_a.remote_id = Some("b.example".parse().unwrap());
    let mut at_b = peer(A, Role::Respond);
    at_b.local_id = Some("b.example".parse().unwrap());
    pair.tell_a(Command::SetPeer(Box::new(at_a.clone())));
    pair.tell_b(Command::SetPeer(Box::new(at_b)));
    (pair, at_a)
}

fn remote_of_a(pair: &Pair) -> Option<IpAddr> {
    let established = pair.a.endpoint.established();
    established.last().map(|(_, _, info)| info.remote.ip())
}

#[test]
fn after_a_failed_attempt_the_next_address_follows_at_once_and_the_next_start_is_with_the_primary()
{
    let (mut pair, _) = with_two_addresses();
    pair.dead = Some(B);
    pair.up_a();
    pair.run(Duration::from_secs(31));
    assert_eq!(remote_of_a(&pair), Some(SECOND));
    assert_eq!(pair.a.failures.len(), 1);
    assert_eq!(pair.a.failures[0].remote.ip(), B);
    assert_eq!(pair.a.failures[0].reason, FailureReason::Timeout);
    assert_eq!(pair.a.exhausted, 0);
    // The primary answers again, but an IKE SA that is up stays where it is.
    pair.dead = None;
    pair.run(Duration::from_secs(60));
    assert_eq!(remote_of_a(&pair), Some(SECOND));
    pair.tell_b(Command::Down(PEER));
    pair.tell_b(Command::Allow(PEER));
    pair.run(Duration::from_secs(5));
    assert_eq!(remote_of_a(&pair), Some(B));
    pair.assert_agreement(1);
}

#[test]
fn a_round_of_attempts_in_vain_is_told_and_repeated_with_growing_pauses() {
    let (mut pair, at_a) = with_two_addresses();
    pair.network.conditions.loss = 100;
    pair.up_a();
    pair.run(Duration::from_secs(600));
    // Two addresses, half a minute each, and pauses of a second to a minute.
    assert!((5..=9).contains(&pair.a.exhausted), "{}", pair.a.exhausted);
    let tried = pair
        .a
        .failures
        .iter()
        .filter(|failure| failure.remote.ip() == SECOND);
    assert_eq!(tried.count(), pair.a.exhausted);
    // A name that stands for something else by now ends the pause.
    pair.network.conditions.loss = 0;
    let mut at_a = at_a;
    at_a.remote = at(&[SECOND]);
    pair.run(Duration::from_secs(62));
    pair.tell_a(Command::SetPeer(Box::new(at_a)));
    pair.run(Duration::from_secs(31));
    pair.assert_agreement(1);
}

#[test]
fn a_peer_whose_name_is_not_resolved_is_called_as_soon_as_it_is() {
    let (mut pair, at_a) = with_two_addresses();
    let mut unknown = at_a.clone();
    unknown.remote = at(&[]);
    pair.tell_a(Command::SetPeer(Box::new(unknown)));
    pair.up_a();
    pair.run(Duration::from_secs(30));
    assert!(pair.a.exhausted >= 3, "so often the name is looked up");
    assert_eq!(pair.a.endpoint.len(), 0);
    pair.tell_a(Command::SetPeer(Box::new(at_a)));
    pair.run(Duration::from_secs(1));
    pair.assert_agreement(1);
}

#[test]
fn a_peer_may_start_from_any_of_its_addresses_and_before_its_name_is_resolved() {
    for addresses in [&[SECOND, A][..], &[]] {
        let (mut pair, _) = with_two_addresses();
        let mut at_b = peer(A, Role::Respond);
        at_b.remote = at(addresses);
        at_b.remote_id = Some("a.example".parse().unwrap());
        at_b.local_id = Some("b.example".parse().unwrap());
        let mut at_a = peer(B, Role::Initiate);
        at_a.remote_id.clone_from(&at_b.local_id);
        at_a.local_id.clone_from(&at_b.remote_id);
        pair.tell_a(Command::SetPeer(Box::new(at_a)));
        pair.tell_b(Command::SetPeer(Box::new(at_b)));
        pair.up_a();
        pair.run(Duration::from_secs(3));
        pair.assert_agreement(1);
    }
}

#[test]
fn an_address_of_the_other_family_than_ours_is_passed_over() {
    let (mut pair, mut at_a) = with_two_addresses();
    at_a.remote = at(&["2001:db8::9".parse().unwrap(), SECOND]);
    pair.tell_a(Command::SetPeer(Box::new(at_a)));
    pair.up_a();
    pair.run(Duration::from_secs(1));
    assert_eq!(remote_of_a(&pair), Some(SECOND));
}

/// A pair that is up, of which A asks for liveness in the given way.
fn up_with(mode: DpdMode, on_dead: &[OnDead]) -> Pair {
    let mut pair = Pair::configured(4, Conditions::PERFECT);
    for (remote, role) in [(B, Role::Initiate), (A, Role::Respond)] {
        let mut config = peer(remote, role);
        config.dpd_mode = mode;
        config.children = (0..)
            .zip(on_dead)
            .map(|(id, on_dead)| {
                let net = |site: u32| format!("10.{site}.{id}.0/24");
                let (ours, theirs) = if remote == B { (1, 2) } else { (2, 1) };
                let mut child = child(id, &[&net(ours)], &[&net(theirs)], "aes256gcm16");
                child.on_dead = *on_dead;
                child
            })
            .collect();
        pair.set_peer(remote, config);
    }
    pair.up_a();
    pair.run(Duration::from_secs(3));
    pair.assert_agreement(on_dead.len());
    pair
}

/// The peer falls silent for good, and A finds out.
fn die(pair: &mut Pair) {
    pair.dead = Some(B);
    let sa = pair.a.child(0).unwrap().sa;
    for outbound in 1..100 {
        pair.run(Duration::from_secs(1));
        pair.tell_a(sent(sa, outbound));
    }
    pair.dead = None;
    pair.restart_b(9);
}

#[test]
fn a_peer_that_is_asked_periodically_is_found_dead_without_traffic_and_one_on_demand_is_not() {
    for (mode, dead) in [
        (DpdMode::Periodic, true),
        (DpdMode::OnDemand, false),
        (DpdMode::Off, false),
    ] {
        let mut pair = up_with(mode, &[OnDead::Clear]);
        let before = pair.network.sent.len();
        pair.run(Duration::from_secs(35));
        let asked = pair.network.sent.len() > before;
        assert_eq!(asked, dead, "{mode:?}");
        assert!(pair.a.downs.is_empty(), "it lives");
        pair.dead = Some(B);
        pair.run(Duration::from_secs(100));
        assert_eq!(pair.a.downs == [DownReason::Dead], dead, "{mode:?}");
    }
}

#[test]
fn nothing_is_asked_of_a_dead_peer_where_liveness_checks_are_off() {
    let mut pair = up_with(DpdMode::Off, &[OnDead::Restart]);
    die(&mut pair);
    assert!(pair.a.downs.is_empty());
}

#[test]
fn when_the_peer_is_dead_each_child_does_as_configured() {
    let mut pair = up_with(
        DpdMode::OnDemand,
        &[OnDead::Trap, OnDead::Restart, OnDead::Clear],
    );
    die(&mut pair);
    assert_eq!(pair.a.downs, [DownReason::Dead]);
    assert!(pair.a.installed.is_empty());
    let mut at_b = peer(A, Role::Respond);
    at_b.children = (0..3)
        .map(|id| {
            child(
                id,
                &[&format!("10.2.{id}.0/24")],
                &[&format!("10.1.{id}.0/24")],
                "aes256gcm16",
            )
        })
        .collect();
    pair.tell_b(Command::SetPeer(Box::new(at_b)));
    pair.run(Duration::from_secs(120));
    pair.assert_agreement(1);
    assert!(pair.a.child(1).is_some(), "only this one starts by itself");
    pair.tell_a(acquire(0, A));
    pair.run(Duration::from_secs(30));
    pair.assert_agreement(2);
    assert!(pair.a.child(0).is_some(), "this one by traffic");
    // What the peer or the operator starts comes up in any case.
    pair.tell_b(acquire(2, B));
    pair.run(Duration::from_secs(5));
    pair.assert_agreement(3);
}

#[test]
fn a_tunnel_none_of_whose_children_starts_again_leaves_a_dead_peer_alone_until_traffic_comes() {
    let mut pair = up_with(DpdMode::OnDemand, &[OnDead::Trap]);
    die(&mut pair);
    pair.tell_b(Command::SetPeer(Box::new(peer(A, Role::Respond))));
    let sent = pair.network.sent.len();
    pair.run(Duration::from_secs(300));
    assert_eq!(pair.network.sent.len(), sent, "not a word");
    pair.tell_a(acquire(0, A));
    pair.run(Duration::from_secs(3));
    assert_eq!(pair.a.installed.len(), 1);
}

// RFC 7296 section 2.4: INITIAL_CONTACT may be missing, and then only the new IKE SA tells that there was a restart.
#[test]
fn traffic_follows_a_peer_that_has_restarted_and_says_nothing_of_it() {
    for seed in 0..6 {
        for (first_by_us, age) in [(true, 2), (true, 25), (true, 300), (false, 2), (false, 300)] {
            let mut pair = Pair::configured(seed, Conditions::PERFECT);
            pair.tell_a(Command::SetPeer(Box::new(peer(B, Role::OnDemand))));
            if first_by_us {
                pair.tell_a(acquire(0, A));
            } else {
                pair.up_b();
            }
            pair.run(Duration::from_secs(age));
            pair.assert_agreement(1);
            pair.restart_b(seed);
            pair.tell_b(Command::SetPeer(Box::new(peer(A, Role::Initiate))));
            pair.b.endpoint.has_met(PEER);
            pair.up_b();
            pair.run(Duration::from_secs(5));
            let used = pair.a.used[&ChildName(0)];
            let known = pair.b.child(0).unwrap().spi_in;
            let case = format!("seed {seed}, first by us: {first_by_us}, {age} s old");
            assert_eq!(used, known, "{case}");
            pair.run(Duration::from_secs(120));
            pair.assert_agreement(1);
            assert_eq!(pair.a.endpoint.established().count(), 1, "{case}");
        }
    }
}

/// B answers everybody who has the key. A calls itself `user`, and afterwards somebody else does, from another address and
/// without INITIAL_CONTACT or with it.
fn two_claim_one_identity(unique: Unique, initial_contact: bool) -> (Pair, Pair) {
    let mut at_b = peer(A, Role::Respond);
    at_b.remote = Remote::Anywhere;
    at_b.unique = unique;
    let mut user = peer(B, Role::Initiate);
    user.local_id = Some("user".parse().unwrap());
    let mut first = Pair::new(5, Conditions::PERFECT);
    first.tell_a(Command::SetPeer(Box::new(user.clone())));
    first.tell_b(Command::SetPeer(Box::new(at_b)));
    first.up_a();
    first.run(Duration::from_secs(2));
    first.assert_agreement(1);

    let mut second = Pair::with(6, Conditions::PERFECT, limits(), limits());
    second.a.address = SECOND;
    second.tell_a(Command::SetPeer(Box::new(user)));
    std::mem::swap(&mut first.b, &mut second.b);
    second.now = first.now;
    if !initial_contact {
        second.a.endpoint.has_met(PEER);
    }
    second.tell_a(Command::Up(PEER, (SECOND, 500).into()));
    second.run(Duration::from_secs(2));
    (first, second)
}

#[test]
fn a_second_initiator_with_the_same_identity_is_dealt_with_as_configured() {
    for (unique, initial_contact, refused, stay) in [
        (Unique::Replace, false, false, 2),
        (Unique::Replace, true, false, 1),
        (Unique::Keep, false, true, 1),
        (Unique::Keep, true, false, 1),
        (Unique::Never, false, false, 2),
        (Unique::Never, true, false, 2),
    ] {
        let case = format!("{unique:?}, INITIAL_CONTACT {initial_contact}");
        let (_first, mut second) = two_claim_one_identity(unique, initial_contact);
        let came = second.a.ike_ups == 1;
        assert_eq!(came, !refused, "{case}");
        // With `replace` the one before goes after a grace, and at once if INITIAL_CONTACT says that it is dead.
        assert_eq!(second.b.endpoint.established().count(), stay, "{case}");
        second.run(Duration::from_secs(50));
        let stay = if unique == Unique::Never { 2 } else { 1 };
        assert_eq!(
            second.b.endpoint.established().count(),
            stay,
            "{case}, later"
        );
    }
}

#[test]
fn one_that_was_replaced_goes_though_others_of_its_tunnel_come_up_all_the_time() {
    let (_first, mut second) = two_claim_one_identity(Unique::Replace, false);
    let others = [PeerId(8), PeerId(9)];
    for id in others {
        let mut other = peer(B, Role::Initiate);
        other.id = id;
        other.local_id = Some(format!("user{}", id.0).parse().unwrap());
        second.tell_a(Command::SetPeer(Box::new(other)));
    }
    // At each moment one of them has come up just now.
    for [down, up] in std::iter::repeat_n([others, [others[1], others[0]]], 10).flatten() {
        second.tell_a(Command::Up(up, (SECOND, 500).into()));
        second.run(Duration::from_millis(500));
        second.tell_a(Command::Down(down));
        second.run(Duration::from_secs(2));
    }
    assert_eq!(second.b.ike_ups, 22);
    let user = "user".parse().unwrap();
    let up = second.b.endpoint.established();
    let up: Vec<_> = up.filter(|(.., info)| info.remote_id == user).collect();
    let [(.., info)] = up.as_slice() else {
        panic!("{} of the user are up", up.len());
    };
    assert_eq!(info.remote.ip(), SECOND);
}

// Also one that was up before its tunnel wanted it so, and one that a daemon before this one has left.
#[test]
fn whoever_is_up_is_known_however_it_came_to_be_so() {
    for restarted in [false, true] {
        let mut pair = Pair::configured(7, Conditions::PERFECT);
        pair.up_a();
        pair.run(Duration::from_secs(2));
        if restarted {
            let parts: Vec<_> = pair.b.endpoint.parts_after(None).collect();
            let parts = parts
                .iter()
                .map(|(part, content)| (*part, content.as_ref().unwrap().bytes()));
            let random = Box::new(Seeded::new(7, 9));
            pair.b.endpoint = Endpoint::restore(limits(), random, pair.now, parts).unwrap();
        }
        let mut at_b = peer(A, Role::Respond);
        at_b.unique = Unique::Keep;
        at_b.remote = Remote::Anywhere;
        pair.tell_b(Command::SetPeer(Box::new(at_b)));
        let mut other = Pair::with(8, Conditions::PERFECT, limits(), limits());
        other.a.address = SECOND;
        let mut user = peer(B, Role::Initiate);
        user.local_id = Some(A.into());
        other.tell_a(Command::SetPeer(Box::new(user)));
        std::mem::swap(&mut pair.b, &mut other.b);
        other.now = pair.now;
        other.a.endpoint.has_met(PEER);
        other.tell_a(Command::Up(PEER, (SECOND, 500).into()));
        other.run(Duration::from_secs(2));
        assert_eq!(other.a.ike_ups, 0, "restarted: {restarted}");
        assert_eq!(other.b.endpoint.established().count(), 1);
    }
}
