//! Thousands of bad networks: both sides reach the same state, or fail for the same reason.

use std::{panic, time::Duration};

use super::{
    network::{Conditions, Seeded},
    pair::{A, PEER, Pair, peer},
};
use crate::ike::{
    config::{ChildName, Role},
    event::Command,
};

/// Seeds that are run unless the environment says otherwise.
const SEEDS: u64 = 1500;

/// Runs `scenario` with every seed and names the one that fails.
fn for_every_seed(scenario: impl Fn(u64) + panic::RefUnwindSafe) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().unwrap());
    if let Some(seed) = number("IPSEC_XDP_SEED") {
        return scenario(seed);
    }
    for seed in 0..number("IPSEC_XDP_SEEDS").unwrap_or(SEEDS) {
        if let Err(cause) = panic::catch_unwind(|| scenario(seed)) {
            eprintln!("seed {seed} failed; IPSEC_XDP_SEED={seed} runs it alone");
            panic::resume_unwind(cause);
        }
    }
}

/// Conditions between a good and a terrible network.
fn conditions(seed: u64) -> Conditions {
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
                4 => pair.tell_b(Command::Acquire(
                    PEER,
                    ChildName(0),
                    (pair.b.address, 500).into(),
                )),
                _ => {}
            }
            pair.up_a();
        }
        pair.run(Duration::from_secs(300));
        pair.network.conditions = Conditions::PERFECT;
        // Long enough for every liveness check to have told a dead IKE SA from a live one.
        for _ in 0..40 {
            let outbound = 1 + random.below(1_000_000);
            for sa in pair.a.installed.keys().copied().collect::<Vec<_>>() {
                pair.tell_a(Command::Traffic {
                    sa,
                    inbound: 0,
                    outbound,
                });
            }
            for sa in pair.b.installed.keys().copied().collect::<Vec<_>>() {
                pair.tell_b(Command::Traffic {
                    sa,
                    inbound: 0,
                    outbound,
                });
            }
            pair.run(Duration::from_secs(20));
        }
        pair.assert_agreement(1);
    });
}
