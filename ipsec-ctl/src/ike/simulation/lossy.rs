//! Thousands of bad networks: both sides reach the same state, or fail for the same reason.

use std::{panic, time::Duration};

use super::{
    network::{Conditions, NatBox, Seeded},
    pair::{A, B, PEER, Pair, acquire, peer, sent},
    upkeep::with_children,
};
use crate::ike::{
    config::{Remote, Role},
    event::{Command, FailureReason},
};

/// Seeds that are run unless the environment says otherwise.
const SEEDS: u64 = 1500;

/// Runs `scenario` with every seed and names the one that fails.
fn for_every_seed(scenario: impl Fn(u64) + panic::RefUnwindSafe) {
    for_every_seed_of(SEEDS, scenario);
}

/// The same with as many seeds as the scenario is worth, unless the environment says otherwise.
pub(super) fn for_every_seed_of(seeds: u64, scenario: impl Fn(u64) + panic::RefUnwindSafe) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().unwrap());
    if let Some(seed) = number("IPSEC_XDP_SEED") {
        return scenario(seed);
    }
    for seed in 0..number("IPSEC_XDP_SEEDS").unwrap_or(seeds) {
        if let Err(cause) = panic::catch_unwind(|| scenario(seed)) {
            eprintln!("seed {seed} failed; IPSEC_XDP_SEED={seed} runs it alone");
            panic::resume_unwind(cause);
        }
    }
}

/// Conditions between a good and a terrible network.
pub(super) fn conditions(seed: u64) -> Conditions {
    let mut random = Seeded::new(seed, 9);
    Conditions {
        loss: random.below(35),
        repetition: random.below(30),
        corruption: random.below(10),
        delay: Duration::from_millis(1 + random.below(3000)),
        job: Duration::from_millis(1 + random.below(800)),
    }
}

#[test]
fn a_tunnel_comes_up_on_any_network_that_delivers_at_times() {
    for_every_seed(|seed| {
        let mut pair = Pair::configured(seed, conditions(seed));
        pair.up_a();
        pair.run(Duration::from_secs(400));
        pair.network.conditions = Conditions::PERFECT;
        pair.run(Duration::from_secs(200));
        pair.assert_agreement(1);
        assert_eq!(pair.a.endpoint.len(), 1);
    });
}

// RFC 7383: fragments of one message arrive in any order, repeated, late, or never.
#[test]
fn a_tunnel_comes_up_though_its_messages_arrive_in_pieces() {
    for_every_seed(|seed| {
        // A damaged IKE_SA_INIT may hide that a side can join pieces, and is found out only by what comes after it.
        let conditions = Conditions {
            corruption: 0,
            ..conditions(seed)
        };
        let mut pair = Pair::configured(seed, conditions);
        let proposal = if seed % 2 == 0 {
            "aes256gcm16-prfsha256-x25519"
        } else {
            "aes256-sha512-x25519"
        };
        set(&mut pair, 2, |config| {
            config.fragment_size = Some(200);
            config.proposals = vec![proposal.parse().unwrap()];
        });
        pair.up_a();
        pair.run(Duration::from_secs(400));
        pair.network.conditions = Conditions::PERFECT;
        pair.run(Duration::from_secs(200));
        pair.assert_agreement(2);
        // Byte 16 of the header is the type of the first payload: 53 is a fragment, 46 a whole encrypted message.
        let of_type = |kind: u8| {
            let bytes = pair.network.sent.iter().map(|flight| &flight.bytes);
            bytes.filter(move |bytes| bytes.get(16) == Some(&kind))
        };
        assert!(of_type(53).count() >= 4);
        assert!(
            of_type(53)
                .chain(of_type(46))
                .all(|bytes| bytes.len() <= 200 - 28)
        );
    });
}

#[test]
fn whatever_the_operators_do_both_sides_agree_in_the_end() {
    for_every_seed(|seed| {
        let mut random = Seeded::new(seed, 8);
        let mut pair = Pair::configured(seed, conditions(seed));
        pair.tell_b(Command::SetPeer(Box::new(peer(A, Role::Initiate))));
        pair.up_a();
        for _ in 0..6 {
            pair.run(Duration::from_millis(1 + random.below(20_000)));
            match random.below(6) {
                0 => pair.tell_a(Command::Down(PEER)),
                1 => pair.tell_b(Command::Down(PEER)),
                2 => pair.up_b(),
                3 => {
                    pair.restart_b(seed);
                    pair.tell_b(Command::SetPeer(Box::new(peer(A, Role::Initiate))));
                }
                4 => pair.tell_b(acquire(0, pair.b.address)),
                _ => {}
            }
            pair.up_a();
        }
        pair.up_b();
        pair.run(Duration::from_secs(300));
        pair.network.conditions = Conditions::PERFECT;
        // Long enough for every liveness check to have told a dead IKE SA from a live one.
        for _ in 0..40 {
            let outbound = 1 + random.below(1_000_000);
            for sa in pair.a.installed.keys().copied().collect::<Vec<_>>() {
                pair.tell_a(sent(sa, outbound));
            }
            for sa in pair.b.installed.keys().copied().collect::<Vec<_>>() {
                pair.tell_b(sent(sa, outbound));
            }
            pair.run(Duration::from_secs(20));
        }
        pair.assert_agreement(1);
    });
}

fn set(pair: &mut Pair, count: u32, change: impl Fn(&mut crate::ike::config::PeerConfig)) {
    for (remote, role) in [(B, Role::Initiate), (A, Role::Respond)] {
        let mut config = with_children(remote, role, count);
        change(&mut config);
        pair.set_peer(remote, config);
    }
}

#[test]
fn several_children_with_key_exchanges_come_up_on_any_network() {
    for_every_seed(|seed| {
        let mut pair = Pair::new(seed, conditions(seed));
        set(&mut pair, 3, |_| {});
        pair.up_a();
        pair.run(Duration::from_secs(400));
        pair.network.conditions = Conditions::PERFECT;
        pair.run(Duration::from_secs(200));
        pair.assert_agreement(3);
    });
}

#[test]
fn generations_of_ike_sas_follow_each_other_on_any_network() {
    for_every_seed(|seed| {
        let mut pair = Pair::new(seed, conditions(seed));
        set(&mut pair, 2, |config| {
            config.lifetime = Duration::from_secs(150);
            config.reauth = seed % 2 == 0;
        });
        pair.up_a();
        pair.run(Duration::from_secs(900));
        pair.network.conditions = Conditions::PERFECT;
        pair.run(Duration::from_secs(100));
        // The last generation may be in the middle of taking over.
        for _ in 0..100 {
            if pair.a.installed.len() == 2 && pair.b.installed.len() == 2 {
                break;
            }
            pair.run(Duration::from_secs(1));
        }
        pair.assert_agreement(2);
    });
}

// All state of an IKE SA is in its value, a key exchange under way included.
#[test]
fn ike_sas_go_on_after_they_were_saved_and_restored_at_any_moment() {
    for seed in 0..30 {
        let mut random = Seeded::new(seed, 6);
        let mut pair = Pair::new(seed, conditions(seed));
        set(&mut pair, 3, |config| {
            config.lifetime = Duration::from_secs(400)
        });
        pair.up_a();
        for _ in 0..600 {
            pair.run(Duration::from_millis(1 + random.below(1500)));
            pair.a.endpoint.save_and_restore();
            pair.b.endpoint.save_and_restore();
        }
        pair.network.conditions = Conditions::PERFECT;
        for _ in 0..300 {
            pair.run(Duration::from_secs(1));
            pair.a.endpoint.save_and_restore();
            if pair.a.installed.len() == 3 && pair.b.installed.len() == 3 {
                break;
            }
        }
        pair.assert_agreement(3);
    }
}

#[test]
fn a_wrong_psk_fails_for_the_same_reason_at_both_ends() {
    for_every_seed(|seed| {
        // A damaged IKE_SA_INIT would fail for another reason, and rightly.
        let conditions = Conditions {
            corruption: 0,
            ..conditions(seed)
        };
        let mut pair = Pair::new(seed, conditions);
        set(&mut pair, 1, |_| {});
        let mut config = peer(A, Role::Respond);
        config.psk = zeroize::Zeroizing::new(b"another".to_vec());
        pair.tell_b(Command::SetPeer(Box::new(config)));
        pair.up_a();
        pair.run(Duration::from_secs(300));
        assert!(pair.a.installed.is_empty() && pair.b.installed.is_empty());
        let refused =
            |reason| move |failure: &&crate::ike::event::Failure| failure.reason == reason;
        let at_b = pair.b.failures.len();
        assert!(
            pair.b
                .failures
                .iter()
                .all(|f| f.reason == FailureReason::WeRefusedAuth)
        );
        let at_a = pair.a.failures.iter();
        let told = at_a
            .clone()
            .filter(refused(FailureReason::PeerRefusedAuth))
            .count();
        let silent = at_a.filter(refused(FailureReason::Timeout)).count();
        assert_eq!(told + silent, pair.a.failures.len());
        // What B refused A learns of, unless the network stays silent for half a minute.
        assert!(
            at_b >= told && at_b <= told + silent + 1,
            "{at_b} {told} {silent}"
        );
        assert!(told > 0 || conditions.loss > 0);
    });
}

#[test]
fn a_nat_that_forgets_is_followed_on_any_network() {
    for_every_seed(|seed| {
        let mut random = Seeded::new(seed, 7);
        let mut pair = Pair::new(seed, conditions(seed));
        set(&mut pair, 1, |_| {});
        let mut config = peer(A, Role::Respond);
        config.children = with_children(A, Role::Respond, 1).children;
        config.remote = Remote::Anywhere;
        config.remote_id = Some(A.into());
        pair.tell_b(Command::SetPeer(Box::new(config)));
        let outside = "203.0.113.50".parse().unwrap();
        let mut remap = |pair: &mut Pair| {
            let shift = u16::try_from(1 + random.below(50_000)).unwrap();
            pair.network.nat = Some(NatBox {
                inside: A,
                outside,
                shift,
            });
            shift
        };
        remap(&mut pair);
        pair.up_a();
        pair.run(Duration::from_secs(400));
        pair.network.conditions = Conditions::PERFECT;
        pair.run(Duration::from_secs(200));
        pair.assert_agreement(1);
        let shift = remap(&mut pair);
        for outbound in 1..10 {
            pair.a_sends(outbound);
            pair.run(Duration::from_secs(15));
        }
        pair.assert_agreement(1);
        let seen = pair.b.child(0).unwrap().outer.remote;
        assert_eq!(seen, (outside, 4500_u16.wrapping_add(shift)).into());
    });
}
