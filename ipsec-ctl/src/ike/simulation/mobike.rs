//! Addresses that change under IKE SAs that are up (RFC 4555), by either side, on good networks and on bad ones.

use std::{net::IpAddr, time::Duration};

use super::{
    lossy::{conditions, for_every_seed_of},
    network::{Conditions, NatBox, Seeded},
    pair::{A, B, PEER, Pair, peer, sent},
};
use crate::ike::{
    config::{PeerConfig, Remote, Role, Way},
    event::{Command, DownReason, FailureReason, IkeInfo, Rekey},
};

const NEW: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 10));
const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 20));
const SECOND: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 77));
const SOON: Duration = Duration::from_secs(3);

fn at_a() -> PeerConfig {
    PeerConfig {
        local_id: Some("a.example".parse().unwrap()),
        remote_id: Some("b.example".parse().unwrap()),
        ..peer(B, Role::Initiate)
    }
}

fn at_b() -> PeerConfig {
    PeerConfig {
        local_id: Some("b.example".parse().unwrap()),
        remote_id: Some("a.example".parse().unwrap()),
        remote: Remote::Anywhere,
        ..peer(A, Role::Respond)
    }
}

fn pair_of(seed: u64, conditions: Conditions, at_a: PeerConfig, at_b: PeerConfig) -> Pair {
    let mut pair = Pair::new(seed, conditions);
    pair.tell_a(Command::SetPeer(Box::new(at_a)));
    pair.tell_b(Command::SetPeer(Box::new(at_b)));
    pair.up_a();
    pair
}

/// A tunnel that is up, started by A.
fn up() -> Pair {
    let mut pair = pair_of(1, Conditions::PERFECT, at_a(), at_b());
    pair.run(SOON);
    pair.assert_agreement(1);
    pair
}

/// A is at another address, and goes to B at one of its own, as the daemon has it do.
fn go(pair: &mut Pair, local: IpAddr, remote: IpAddr) {
    pair.a.address = local;
    let mut config = at_a();
    config.remote = Remote::At(vec![Way {
        remote,
        local: Some(local),
    }]);
    pair.tell_a(Command::SetPeer(Box::new(config)));
    let up: Vec<_> = pair.a.endpoint.established().map(|(ike, ..)| ike).collect();
    for ike in up {
        pair.tell_a(Command::MoveTo(ike, local, remote));
    }
}

fn info_at_a(pair: &Pair) -> IkeInfo {
    let (_, _, info) = pair.a.endpoint.established().last().unwrap();
    info
}

/// Both sides send between these addresses, with the SAs that they have had all along.
fn assert_at(pair: &Pair, local: IpAddr, remote: IpAddr) {
    pair.assert_agreement(1);
    let (ours, theirs) = (pair.a.in_force()[0].outer, pair.b.in_force()[0].outer);
    assert_eq!((ours.local.ip(), ours.remote.ip()), (local, remote), "at A");
    assert_eq!(
        (theirs.remote.ip(), theirs.local.ip()),
        (local, remote),
        "at B"
    );
    let (_, _, info) = pair.b.endpoint.established().last().unwrap();
    assert_eq!((info.remote.ip(), info.local.ip()), (local, remote));
}

#[test]
fn the_initiator_moves_and_everything_goes_with_it_in_two_exchanges() {
    let mut pair = up();
    assert!(info_at_a(&pair).mobike);
    // RFC 4555 section 3.3: a NAT that is met later then needs no other port.
    assert_eq!(info_at_a(&pair).remote.port(), 4500);
    assert!(!pair.a.child(0).unwrap().outer.encapsulated);
    let (spi, sent) = (pair.a.child(0).unwrap().spi_in, pair.network.sent.len());
    go(&mut pair, NEW, B);
    assert_eq!(pair.a.child(0).unwrap().outer.local.ip(), NEW, "at once");
    pair.run(SOON);
    assert_at(&pair, NEW, B);
    assert_eq!(pair.a.child(0).unwrap().spi_in, spi);
    assert_eq!(pair.network.sent.len() - sent, 4);
    assert_eq!((pair.a.ike_ups, pair.b.ike_ups), (1, 1));
}

#[test]
fn esp_follows_when_the_peer_has_shown_that_it_receives_at_its_new_address() {
    for checks in [true, false] {
        let mut at_b = at_b();
        at_b.return_routability = checks;
        let mut pair = pair_of(1, Conditions::PERFECT, at_a(), at_b);
        pair.run(SOON);
        // Whoever claims an address at which it does not receive.
        pair.dead = Some(NEW);
        go(&mut pair, NEW, B);
        pair.run(SOON);
        let (_, _, info) = pair.b.endpoint.established().last().unwrap();
        assert_eq!(info.remote.ip(), NEW, "IKE follows at once");
        let esp = pair.b.child(0).unwrap().outer.remote.ip();
        assert_eq!(esp, if checks { A } else { NEW });
        pair.dead = None;
        pair.run(SOON);
        assert_at(&pair, NEW, B);
    }
    let mut pair = up();
    pair.dead = Some(NEW);
    go(&mut pair, NEW, B);
    pair.run(Duration::from_secs(70));
    assert_eq!(pair.b.downs, [DownReason::Dead]);
}

#[test]
fn a_newer_move_overrides_one_that_is_under_way() {
    let mut pair = up();
    go(&mut pair, NEW, B);
    // The request is on its way, or already its answer.
    for micros in [0, 1500, 2500] {
        pair.run(Duration::from_micros(micros));
        go(&mut pair, OTHER, B);
        pair.run(Duration::from_micros(micros));
        go(&mut pair, A, B);
        pair.run(Duration::from_micros(micros));
        go(&mut pair, NEW, B);
    }
    pair.run(SOON);
    assert_at(&pair, NEW, B);
    assert_eq!(pair.a.ike_ups, 1);
}

#[test]
fn who_has_started_first_leads_after_the_other_has_rekeyed_the_ike_sa() {
    let mut pair = up();
    pair.tell_b(Command::Rekey(PEER, Rekey::Ike));
    pair.run(SOON);
    assert!(!info_at_a(&pair).initiator);
    assert!(info_at_a(&pair).leads);
    go(&mut pair, NEW, B);
    pair.run(SOON);
    assert_at(&pair, NEW, B);
    assert_eq!(pair.a.ike_ups, 1);
}

#[test]
fn a_responder_whose_address_changes_is_followed() {
    let mut pair = up();
    pair.b.address = SECOND;
    let (ike, ..) = pair.b.endpoint.established().next().unwrap();
    pair.tell_b(Command::MoveTo(ike, SECOND, A));
    assert_eq!(pair.b.child(0).unwrap().outer.local.ip(), SECOND, "at once");
    pair.run(SOON);
    assert_at(&pair, A, SECOND);
    assert_eq!(info_at_a(&pair).ways_to_peer, [SECOND], "B is not there");
}

#[test]
fn encapsulation_comes_and_goes_with_the_nat() {
    let mut pair = up();
    pair.network.nat = Some(NatBox {
        inside: NEW,
        outside: OTHER,
        shift: 1000,
    });
    go(&mut pair, NEW, B);
    pair.run(SOON);
    pair.assert_agreement(1);
    let theirs = pair.b.child(0).unwrap().outer;
    assert!(theirs.encapsulated);
    assert_eq!(theirs.remote, (OTHER, 5500).into());
    assert!(info_at_a(&pair).nat_local);
    // The NAT forgets; the next liveness check finds out, and nothing of it moves anything by itself.
    pair.network.nat = Some(NatBox {
        inside: NEW,
        outside: OTHER,
        shift: 2000,
    });
    pair.run(Duration::from_secs(12));
    pair.a_sends(1);
    pair.run(SOON);
    assert_eq!(pair.b.child(0).unwrap().outer.remote, (OTHER, 6500).into());
    pair.network.nat = None;
    go(&mut pair, A, B);
    pair.run(SOON);
    assert_at(&pair, A, B);
    assert!(!pair.b.child(0).unwrap().outer.encapsulated);
}

#[test]
fn an_esp_packet_that_a_move_has_overtaken_does_not_undo_it() {
    let mut pair = up();
    pair.network.nat = Some(NatBox {
        inside: A,
        outside: OTHER,
        shift: 0,
    });
    go(&mut pair, NEW, B);
    pair.run(SOON);
    go(&mut pair, A, B);
    pair.run(Duration::from_millis(100));
    assert_eq!(pair.b.child(0).unwrap().outer.remote.ip(), OTHER);
    let sa = pair.b.child(0).unwrap().sa;
    pair.tell_b(Command::PeerMoved(sa, (NEW, 4500).into()));
    assert_eq!(pair.b.child(0).unwrap().outer.remote.ip(), OTHER);
    pair.run(SOON);
    pair.tell_b(Command::PeerMoved(sa, (OTHER, 4501).into()));
    assert_eq!(pair.b.child(0).unwrap().outer.remote.port(), 4501);
}

#[test]
fn without_mobike_a_fresh_ike_sa_takes_over_from_the_new_address() {
    let mut without = at_b();
    without.mobike = false;
    let mut pair = pair_of(1, Conditions::PERFECT, at_a(), without);
    pair.run(SOON);
    assert!(!info_at_a(&pair).mobike);
    go(&mut pair, NEW, B);
    pair.run(Duration::from_secs(60));
    assert_at(&pair, NEW, B);
    assert_eq!(pair.a.ike_ups, 2);
    assert_eq!(pair.a.endpoint.established().count(), 1);
}

#[test]
fn a_move_that_the_peer_does_not_accept_leads_to_a_fresh_ike_sa() {
    let mut pair = up();
    // An address that the peer takes for its own.
    pair.tell_b(Command::Addresses(vec![B, NEW]));
    go(&mut pair, NEW, B);
    pair.run(Duration::from_secs(60));
    let refused = |reason| {
        pair.a
            .failures
            .iter()
            .any(|failure| failure.reason == reason)
    };
    assert!(refused(FailureReason::UnacceptableAddresses));
    assert_at(&pair, NEW, B);
    assert_eq!(pair.a.ike_ups, 2);
}

#[test]
fn another_address_of_the_peer_is_tried_where_this_one_is_silent() {
    let mut pair = Pair::new(1, Conditions::PERFECT);
    pair.second_of_b = Some(SECOND);
    let inside = "10.2.0.1".parse().unwrap();
    pair.tell_b(Command::Addresses(vec![inside, B]));
    pair.tell_a(Command::SetPeer(Box::new(at_a())));
    pair.tell_b(Command::SetPeer(Box::new(at_b())));
    pair.up_a();
    pair.run(SOON);
    assert_eq!(
        info_at_a(&pair).ways_to_peer,
        [B],
        "what is inside is not told"
    );
    pair.tell_b(Command::Addresses(vec![inside, B, SECOND]));
    pair.run(SOON);
    assert_eq!(info_at_a(&pair).ways_to_peer, [B, SECOND]);
    pair.dead = Some(B);
    let sa = pair.a.child(0).unwrap().sa;
    for outbound in 1..20 {
        pair.run(Duration::from_secs(1));
        pair.tell_a(sent(sa, outbound));
    }
    assert!(!pair.a.unreachable.is_empty());
    go(&mut pair, A, SECOND);
    pair.run(Duration::from_secs(5));
    assert_at(&pair, A, SECOND);
    assert_eq!(info_at_a(&pair).ways_to_peer, [SECOND, B]);
    assert_eq!(pair.a.ike_ups, 1);
}

#[test]
fn moves_end_in_agreement_on_any_network_and_between_rekeyings() {
    for_every_seed_of(500, |seed| {
        let mut random = Seeded::new(seed, 8);
        let mut pair = pair_of(seed, Conditions::PERFECT, at_a(), at_b());
        pair.run(SOON);
        pair.network.conditions = conditions(seed);
        let mut place = A;
        for _ in 0..8 {
            match random.below(5) {
                0 => pair.tell_a(Command::Rekey(PEER, Rekey::Ike)),
                1 => pair.tell_b(Command::Rekey(PEER, Rekey::Ike)),
                2 => pair.tell_a(Command::Rekey(PEER, Rekey::Children)),
                _ => {
                    place = [A, NEW, OTHER][usize::try_from(random.below(3)).unwrap()];
                    go(&mut pair, place, B);
                }
            }
            pair.a.endpoint.save_and_restore();
            pair.b.endpoint.save_and_restore();
            pair.run(Duration::from_millis(random.below(4000)));
        }
        pair.network.conditions = Conditions::PERFECT;
        pair.run(Duration::from_secs(300));
        assert_at(&pair, place, B);
        let up = [&pair.a, &pair.b].map(|side| side.endpoint.established().count());
        assert_eq!(up, [1, 1]);
    });
}
