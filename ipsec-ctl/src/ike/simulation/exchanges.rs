//! Each exchange and each of its errors, on a network that does what it should.

use std::time::Duration;

use super::{
    network::{Conditions, NatBox},
    pair::{A, B, PEER, Pair, acquire, child, limits, peer, selector},
};
use crate::ike::{
    Identity,
    config::{EndpointConfig, NatPolicy, Remote, Role},
    event::{Command, DownReason, FailureReason},
};

const SOON: Duration = Duration::from_secs(3);

fn pair() -> Pair {
    Pair::configured(1, Conditions::PERFECT)
}

#[test]
fn two_gateways_bring_up_a_child_with_the_same_keys() {
    let mut pair = pair();
    pair.up_a();
    pair.run(SOON);
    pair.assert_agreement(1);
    assert_eq!((pair.a.ike_ups, pair.b.ike_ups), (1, 1));
    assert!(!pair.a.child(0).unwrap().outer.encapsulated);
    assert_eq!(pair.network.sent.len(), 4, "two exchanges and nothing else");
}

#[test]
fn every_suite_that_users_write_comes_up() {
    for (ike, esp) in [
        ("aes256-sha512-ecp521", "aes256-sha512"),
        ("aes256gcm16-prfsha384-x25519", "aes256gcm16-esn"),
        ("chacha20poly1305-prfsha256-x25519", "chacha20poly1305"),
        ("aes128-sha256-modp2048", "aes128-sha256"),
        ("aes192-sha384-ecp384", "aes192-sha384-esn"),
        ("aes128gcm16-prfsha512-ecp256", "aes128gcm16"),
        ("aes128-sha256-modp3072", "aes256-sha256"),
        ("aes128-sha256-modp4096", "aes128-sha512"),
    ] {
        let mut pair = pair();
        for (tell, remote, role) in [(true, B, Role::Initiate), (false, A, Role::Respond)] {
            let mut config = peer(remote, role);
            config.proposals = vec![ike.parse().unwrap()];
            config.children[0].proposals = vec![esp.parse().unwrap()];
            let command = Command::SetPeer(Box::new(config));
            if tell {
                pair.tell_a(command);
            } else {
                pair.tell_b(command);
            }
        }
        pair.up_a();
        pair.run(SOON);
        pair.assert_agreement(1);
        let up = pair.a.child(0).unwrap();
        assert_eq!(up.suite.to_string(), esp);
        let (_, _, info) = pair.b.endpoint.established().next().unwrap();
        assert_eq!(info.suite.to_string(), ike);
    }
}

#[test]
fn a_wrong_psk_is_told_to_both_operators_and_installs_nothing() {
    let mut pair = pair();
    let mut config = peer(A, Role::Respond);
    config.psk = zeroize::Zeroizing::new(b"another".to_vec());
    pair.tell_b(Command::SetPeer(Box::new(config)));
    pair.up_a();
    pair.run(SOON);
    pair.assert_agreement(0);
    assert_eq!(pair.b.failures[0].reason, FailureReason::WeRefusedAuth);
    assert!(
        pair.b.failures[0]
            .to_string()
            .contains("wrong PSK for ID 192.0.2.1, or the peer uses another")
    );
    assert_eq!(pair.a.failures[0].reason, FailureReason::PeerRefusedAuth);
    assert!(
        pair.a.failures[0]
            .to_string()
            .contains("the peer refused our PSK or identity")
    );
}

#[test]
fn a_responder_whose_proof_is_wrong_is_told_so() {
    let mut pair = pair();
    let mut config = peer(B, Role::Initiate);
    config.remote_id = Some("gw.example".parse().unwrap());
    pair.tell_a(Command::SetPeer(Box::new(config)));
    let mut config = peer(A, Role::Respond);
    config.local_id = Some("gw.example".parse().unwrap());
    config.remote_id = Some(Identity::from(A));
    pair.tell_b(Command::SetPeer(Box::new(config.clone())));
    pair.up_a();
    pair.run(SOON);
    pair.assert_agreement(1);

    // From now on B calls itself something else than A expects, and A does not say whom it wants.
    let mut pair = self::pair();
    config.local_id = Some("other.example".parse().unwrap());
    pair.tell_b(Command::SetPeer(Box::new(config)));
    pair.up_a();
    pair.run(SOON);
    pair.assert_agreement(0);
    assert_eq!(pair.a.failures[0].reason, FailureReason::WeRefusedAuth);
    assert!(
        pair.a.failures[0]
            .detail
            .contains("the peer is other.example, and remote_id expects 198.51.100.2")
    );
    assert!(
        pair.b
            .failures
            .iter()
            .any(|failure| failure.reason == FailureReason::PeerRefusedAuth)
    );
}

#[test]
fn no_common_proposal_is_refused_with_the_nearest_match() {
    let mut pair = pair();
    let mut config = peer(A, Role::Respond);
    config.proposals = vec!["aes256gcm16-prfsha256-ecp521".parse().unwrap()];
    pair.tell_b(Command::SetPeer(Box::new(config)));
    pair.up_a();
    pair.run(Duration::from_millis(500));
    pair.assert_agreement(0);
    assert_eq!(pair.b.failures[0].reason, FailureReason::WeRefusedProposals);
    assert_eq!(
        pair.b.failures[0].detail,
        "the peer offers aes256gcm16-prfsha256-x25519; here are aes256gcm16-prfsha256-ecp521; \
         aes256gcm16-prfsha256-ecp521 is the nearest, no common group"
    );
    assert_eq!(
        pair.a.failures[0].reason,
        FailureReason::PeerRefusedProposals
    );
    assert!(pair.a.failures[0].detail.contains("we offered aes256gcm16"));
}

#[test]
fn a_child_without_common_proposal_fails_and_the_ike_sa_stays() {
    let mut pair = pair();
    let mut config = peer(A, Role::Respond);
    config.children[0].proposals = vec!["aes128gcm16".parse().unwrap()];
    pair.tell_b(Command::SetPeer(Box::new(config)));
    pair.up_a();
    pair.run(SOON);
    pair.assert_agreement(0);
    assert_eq!((pair.a.ike_ups, pair.b.ike_ups), (1, 1));
    assert_eq!(
        pair.a.failures[0].reason,
        FailureReason::PeerRefusedProposals
    );
    assert_eq!(pair.b.failures[0].reason, FailureReason::WeRefusedProposals);
    assert!(pair.b.failures[0].detail.contains("no common cipher"));
}

#[test]
fn an_unknown_peer_is_refused() {
    let mut pair = Pair::new(1, Conditions::PERFECT);
    pair.tell_a(Command::SetPeer(Box::new(peer(B, Role::Initiate))));
    pair.up_a();
    pair.run(Duration::from_millis(500));
    assert_eq!(pair.b.failures[0].reason, FailureReason::UnknownPeer);
    assert_eq!(
        pair.a.failures[0].reason,
        FailureReason::PeerRefusedProposals
    );
    assert!(pair.b.endpoint.is_empty());
}

#[test]
fn selectors_are_narrowed_to_what_both_sides_allow() {
    let mut pair = pair();
    let mut config = peer(B, Role::Initiate);
    config.children = vec![child(0, &["0.0.0.0/0"], &["0.0.0.0/0"], "aes256gcm16")];
    pair.tell_a(Command::SetPeer(Box::new(config)));
    pair.up_a();
    pair.run(SOON);
    pair.assert_agreement(1);
    let up = pair.a.child(0).unwrap();
    assert_eq!(up.local, [selector("10.1.0.0/24")]);
    assert_eq!(up.remote, [selector("10.2.0.0/24")]);
}

#[test]
fn selectors_without_anything_in_common_are_refused_with_both_policies_told() {
    let mut pair = pair();
    let mut config = peer(A, Role::Respond);
    config.children = vec![child(0, &["10.9.0.0/24"], &["10.1.0.0/24"], "aes256gcm16")];
    pair.tell_b(Command::SetPeer(Box::new(config)));
    pair.up_a();
    pair.run(SOON);
    pair.assert_agreement(0);
    assert_eq!(
        pair.a.failures[0].reason,
        FailureReason::PeerRefusedSelectors
    );
    assert_eq!(
        pair.b.failures[0].detail,
        "the peer wants 10.2.0.0/24 <-> 10.1.0.0/24, here are child0: 10.9.0.0/24 <-> 10.1.0.0/24"
    );
}

fn with_two_children(pair: &mut Pair, esp: &str) {
    let mut config = peer(B, Role::Initiate);
    config.children = vec![
        child(0, &["10.1.0.0/24"], &["10.2.0.0/24"], esp),
        child(1, &["10.1.1.0/24", "10.1.7.0/24"], &["10.2.1.0/24"], esp),
    ];
    pair.tell_a(Command::SetPeer(Box::new(config)));
    let mut config = peer(A, Role::Respond);
    config.children = vec![
        child(0, &["10.2.0.0/24"], &["10.1.0.0/24"], esp),
        child(1, &["10.2.1.0/24"], &["10.1.1.0/24", "10.1.7.0/24"], esp),
    ];
    pair.tell_b(Command::SetPeer(Box::new(config)));
}

#[test]
fn further_children_come_by_exchanges_of_their_own_with_and_without_pfs() {
    for esp in ["aes256gcm16", "aes256-sha512-ecp256", "aes256gcm16-x25519"] {
        let mut pair = pair();
        with_two_children(&mut pair, esp);
        pair.up_a();
        pair.run(SOON);
        pair.assert_agreement(2);
        assert_eq!(pair.a.ike_ups, 1);
        let (first, second) = (pair.a.child(0).unwrap(), pair.a.child(1).unwrap());
        assert_eq!(first.suite.group, None, "IKE_AUTH has no key exchange");
        assert_eq!(second.suite.to_string(), esp);
        assert_eq!(second.local.len(), 2);
        assert_ne!(
            first.key_in.encryption.bytes(),
            second.key_in.encryption.bytes()
        );
    }
}

#[test]
fn another_group_is_used_if_the_responder_wants_it() {
    let mut pair = pair();
    let mut config = peer(B, Role::Initiate);
    config.proposals = vec!["aes256gcm16-prfsha256-ecp256-x25519".parse().unwrap()];
    pair.tell_a(Command::SetPeer(Box::new(config)));
    pair.up_a();
    pair.run(SOON);
    pair.assert_agreement(1);
    assert_eq!(pair.network.sent.len(), 6, "IKE_SA_INIT begins anew once");
}

#[test]
fn under_load_a_cookie_is_demanded_and_an_honest_initiator_brings_it() {
    let strict = EndpointConfig {
        cookie_threshold: 0,
        ..limits()
    };
    let mut pair = Pair::with(1, Conditions::PERFECT, limits(), strict);
    pair.tell_a(Command::SetPeer(Box::new(peer(B, Role::Initiate))));
    pair.tell_b(Command::SetPeer(Box::new(peer(A, Role::Respond))));
    pair.up_a();
    pair.run(SOON);
    pair.assert_agreement(1);
    assert_eq!(pair.network.sent.len(), 6, "one exchange more");
}

#[test]
fn a_flood_from_one_address_is_limited_and_does_not_keep_an_honest_peer_out() {
    let mut pair = pair();
    let mut flood = Pair::configured(2, Conditions::PERFECT);
    let mut first = None;
    for number in 0..500_u64 {
        if first.is_none() {
            flood.up_a();
            flood.run(Duration::from_millis(5));
            first = flood.network.sent.first().cloned();
        }
        let mut init = first.clone().unwrap();
        init.bytes[..8].copy_from_slice(&(number + 1).to_be_bytes());
        init.source = "203.0.113.66:500".parse().unwrap();
        pair.deliver(&init);
        assert!(pair.b.endpoint.half_open() <= 100);
    }
    pair.up_a();
    pair.run(SOON);
    pair.assert_agreement(1);
    pair.run(Duration::from_secs(40));
    assert_eq!(pair.b.endpoint.half_open(), 0, "nothing half-open stays");
}

#[test]
fn a_nat_in_front_of_the_initiator_moves_everything_to_port_4500() {
    let mut pair = pair();
    let outside = "203.0.113.50".parse().unwrap();
    pair.network.nat = Some(NatBox {
        inside: A,
        outside,
        shift: 1000,
    });
    let mut config = peer(A, Role::Respond);
    config.remote = Remote::Anywhere;
    config.remote_id = Some(Identity::from(A));
    pair.tell_b(Command::SetPeer(Box::new(config)));
    pair.up_a();
    pair.run(SOON);
    pair.assert_agreement(1);
    let (ours, theirs) = (pair.a.child(0).unwrap(), pair.b.child(0).unwrap());
    assert!(ours.outer.encapsulated);
    assert_eq!(ours.outer.local.port(), 4500);
    assert_eq!(ours.outer.remote.port(), 4500);
    assert_eq!(theirs.outer.remote.to_string(), "203.0.113.50:5500");

    let before = pair.network.sent.len();
    pair.run(Duration::from_secs(65));
    let kept = &pair.network.sent[before..];
    assert_eq!(kept.len(), 3, "a keep-alive every 20 s");
    assert!(kept.iter().all(|flight| flight.bytes == [0xff]));

    // The NAT forgets, and the next message of ours comes from another port.
    pair.network.nat = Some(NatBox {
        inside: A,
        outside,
        shift: 2000,
    });
    pair.a_sends(1);
    pair.run(SOON);
    assert_eq!(
        pair.b.child(0).unwrap().outer.remote.to_string(),
        "203.0.113.50:6500"
    );
}

#[test]
fn encapsulation_is_forced_or_forbidden_as_configured() {
    let mut pair = pair();
    let mut config = peer(B, Role::Initiate);
    config.nat = NatPolicy::Force;
    pair.tell_a(Command::SetPeer(Box::new(config)));
    pair.up_a();
    pair.run(SOON);
    pair.assert_agreement(1);
    assert!(pair.a.child(0).unwrap().outer.encapsulated);
    assert_eq!(pair.b.child(0).unwrap().outer.remote.port(), 4500);

    let mut pair = self::pair();
    let mut config = peer(A, Role::Respond);
    config.nat = NatPolicy::Forbid;
    pair.tell_b(Command::SetPeer(Box::new(config)));
    pair.up_a();
    pair.run(SOON);
    pair.assert_agreement(1);
    assert!(!pair.a.child(0).unwrap().outer.encapsulated);
}

#[test]
fn a_delete_from_either_side_ends_both() {
    for from_a in [true, false] {
        let mut pair = pair();
        let mut config = peer(B, Role::OnDemand);
        config.role = Role::OnDemand;
        pair.tell_a(Command::SetPeer(Box::new(config)));
        pair.tell_a(acquire(0, A));
        pair.run(SOON);
        pair.assert_agreement(1);
        if from_a {
            pair.tell_a(Command::Down(PEER));
        } else {
            pair.tell_b(Command::Down(PEER));
        }
        pair.run(SOON);
        pair.assert_agreement(0);
        assert!(pair.a.endpoint.is_empty() && pair.b.endpoint.is_empty());
        let (told, teller) = if from_a {
            (&pair.b, &pair.a)
        } else {
            (&pair.a, &pair.b)
        };
        assert_eq!(teller.downs, [DownReason::Operator]);
        assert_eq!(told.downs, [DownReason::PeerDeleted]);
    }
}

#[test]
fn an_initiator_for_ever_comes_back_after_the_peers_delete() {
    let mut pair = pair();
    pair.up_a();
    pair.run(SOON);
    // The peer forgets the tunnel and learns of it again, as on a reload.
    pair.tell_b(Command::RemovePeer(PEER));
    pair.tell_b(Command::SetPeer(Box::new(peer(A, Role::Respond))));
    pair.run(Duration::from_secs(5));
    pair.assert_agreement(1);
    assert_eq!(pair.a.ike_ups, 2);
}

#[test]
fn a_tunnel_that_the_operator_took_down_stays_down_whoever_starts_it() {
    let mut pair = pair();
    pair.up_a();
    pair.run(SOON);
    pair.tell_b(Command::Down(PEER));
    pair.run(Duration::from_secs(60));
    pair.assert_agreement(0);
    assert!(pair.b.failures[0].detail.contains("taken down here"));
    pair.up_b();
    pair.run(SOON);
    pair.assert_agreement(1);
}

#[test]
fn a_peer_that_does_not_answer_is_tried_for_ever_with_growing_pauses() {
    let mut pair = pair();
    pair.dead = Some(B);
    pair.up_a();
    pair.run(Duration::from_secs(600));
    assert_eq!(pair.a.failures[0].reason, FailureReason::Timeout);
    let attempts = pair.a.failures.len();
    assert!(
        (6..=15).contains(&attempts),
        "{attempts} attempts in ten minutes"
    );
    pair.dead = None;
    pair.run(Duration::from_secs(100));
    pair.assert_agreement(1);
}

#[test]
fn a_dead_peer_is_noticed_only_while_there_is_traffic_to_lose() {
    let mut pair = pair();
    pair.up_a();
    pair.run(SOON);
    pair.dead = Some(B);
    pair.run(Duration::from_secs(300));
    assert!(pair.a.downs.is_empty());
    pair.a_sends(5);
    pair.run(Duration::from_secs(100));
    assert_eq!(pair.a.downs, [DownReason::Dead]);
    assert!(pair.a.installed.is_empty());
}

#[test]
fn a_peer_that_restarts_replaces_what_it_has_forgotten() {
    let mut pair = pair();
    pair.up_a();
    pair.run(SOON);
    pair.restart_b(9);
    pair.tell_b(Command::SetPeer(Box::new(peer(A, Role::Initiate))));
    pair.up_b();
    pair.run(SOON);
    pair.assert_agreement(1);
    assert_eq!(pair.a.downs, [DownReason::InitialContact]);
    assert_eq!(pair.a.endpoint.len(), 1);
}

#[test]
fn two_sides_that_start_at_once_end_with_one_ike_sa() {
    for seed in 0..50 {
        let mut pair = Pair::configured(seed, Conditions::PERFECT);
        pair.tell_b(Command::SetPeer(Box::new(peer(A, Role::Initiate))));
        pair.up_a();
        pair.up_b();
        // The first of either says INITIAL_CONTACT, so that one side may have to find out that the other knows of one only.
        pair.run(Duration::from_secs(100));
        pair.assert_agreement(1);
        assert_eq!(
            (pair.a.endpoint.len(), pair.b.endpoint.len()),
            (1, 1),
            "seed {seed}"
        );
    }
}

#[test]
fn a_fresh_ike_sa_takes_over_before_the_old_one_ends() {
    let mut pair = pair();
    for (remote, role) in [(B, Role::Initiate), (A, Role::Respond)] {
        let mut config = peer(remote, role);
        config.children[0].lifetime = Duration::from_secs(100);
        pair.set_peer(remote, config);
    }
    pair.up_a();
    let mut spis = std::collections::BTreeSet::new();
    for _ in 0..1000 {
        pair.run(Duration::from_secs(1));
        assert!(!pair.a.installed.is_empty() && !pair.b.installed.is_empty());
        spis.extend(pair.a.child(0).map(|up| up.spi_in));
    }
    pair.run(Duration::from_secs(20));
    pair.assert_agreement(1);
    assert!((9..=14).contains(&spis.len()), "{} generations", spis.len());
    assert!(
        pair.a
            .downs
            .iter()
            .all(|reason| *reason == DownReason::Replaced)
    );
}

#[test]
fn an_sa_at_its_limit_is_never_used_past_it() {
    let mut pair = pair();
    pair.up_a();
    pair.run(SOON);
    let sa = pair.a.child(0).unwrap().sa;
    pair.dead = Some(B);
    pair.tell_a(Command::Expiring(sa));
    pair.run(SOON);
    assert_eq!(pair.a.installed.len(), 1, "the replacement cannot come up");
    pair.tell_a(Command::Expired(sa));
    assert!(pair.a.installed.is_empty());
    pair.dead = None;
    pair.run(Duration::from_secs(120));
    pair.assert_agreement(1);
}
