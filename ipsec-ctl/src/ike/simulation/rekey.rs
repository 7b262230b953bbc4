//! Rekeying in place: by either side, by both at once, on any network, without a moment in which a packet is lost.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use ipsec_common::Spi;

use super::{
    network::{Conditions, Seeded},
    pair::{A, B, PEER, Pair, Side, child, peer},
    upkeep::with_children,
};
use crate::ike::{
    config::{ChildName, PeerConfig, Role},
    event::{Command, Rekey},
};

/// How finely packets are looked at.
const STEP: Duration = Duration::from_millis(20);

/// Traffic in both directions all the time, each packet as slow as the slowest datagram.
struct Traffic {
    delay: Duration,
    by_a: VecDeque<BTreeSet<Spi>>,
    by_b: VecDeque<BTreeSet<Spi>>,
    children: usize,
    /// IKE SAs that either side had at most.
    most_ike_sas: usize,
}

impl Traffic {
    fn new(children: usize, delay: Duration) -> Self {
        Self {
            delay,
            by_a: VecDeque::new(),
            by_b: VecDeque::new(),
            children,
            most_ike_sas: 0,
        }
    }

    /// Lets time pass, and holds every packet against what is installed at its other end.
    fn flow(&mut self, pair: &mut Pair, time: Duration) {
        let steps = time.as_millis() / STEP.as_millis();
        let under_way = usize::try_from(self.delay.as_millis() / STEP.as_millis()).unwrap();
        for _ in 0..steps {
            pair.run(STEP);
            for (from, to, sent) in [
                (&pair.a, &pair.b, &mut self.by_a),
                (&pair.b, &pair.a, &mut self.by_b),
            ] {
                self.most_ike_sas = self.most_ike_sas.max(from.endpoint.len());
                let used: BTreeSet<Spi> = from.used.values().copied().collect();
                assert_eq!(
                    used.len(),
                    self.children,
                    "a child without SA, {:?}",
                    pair.now
                );
                sent.push_front(used);
                sent.truncate(under_way + 1);
                let inbound: BTreeSet<Spi> = to.installed.values().map(|up| up.spi_in).collect();
                for spis in &*sent {
                    let lost: Vec<&Spi> = spis.difference(&inbound).collect();
                    assert!(
                        lost.is_empty(),
                        "{lost:?} sent by {} at {:?}; the peer receives on {inbound:?}",
                        from.address,
                        pair.now
                    );
                }
            }
        }
    }
}

fn configure(pair: &mut Pair, at_a: PeerConfig, at_b: PeerConfig) {
    pair.tell_a(Command::SetPeer(Box::new(at_a)));
    pair.tell_b(Command::SetPeer(Box::new(at_b)));
}

/// A tunnel that is up, with children that have key exchanges of their own.
fn tunnel(seed: u64, children: u32, conditions: Conditions) -> Pair {
    let mut pair = Pair::new(seed, Conditions::PERFECT);
    configure(
        &mut pair,
        with_children(B, Role::Initiate, children),
        with_children(A, Role::Respond, children),
    );
    pair.up_a();
    pair.run(Duration::from_secs(10));
    pair.assert_agreement(usize::try_from(children).unwrap());
    pair.network.conditions = conditions;
    pair
}

fn rekey_at_a(pair: &mut Pair, id: u32) {
    let sa = pair.a.child(id).unwrap().sa;
    pair.tell_a(Command::Expiring(sa));
}

fn rekey_at_b(pair: &mut Pair, id: u32) {
    let sa = pair.b.child(id).unwrap().sa;
    pair.tell_b(Command::Expiring(sa));
}

fn spis(side: &Side) -> BTreeMap<ChildName, Spi> {
    side.in_force()
        .iter()
        .map(|up| (up.child, up.spi_in))
        .collect()
}

/// A slow network that loses nothing.
const SLOW: Conditions = Conditions {
    delay: Duration::from_millis(300),
    job: Duration::from_millis(200),
    ..Conditions::PERFECT
};

#[test]
fn either_side_replaces_a_child_in_place_without_losing_a_packet() {
    for by_a in [true, false] {
        for seed in 0..20 {
            let mut pair = tunnel(seed, 2, SLOW);
            let before = spis(&pair.a);
            let mut traffic = Traffic::new(2, SLOW.delay);
            if by_a {
                rekey_at_a(&mut pair, 1);
            } else {
                rekey_at_b(&mut pair, 1);
            }
            traffic.flow(&mut pair, Duration::from_secs(15));
            pair.assert_agreement(2);
            let after = spis(&pair.a);
            assert_eq!(before[&ChildName(0)], after[&ChildName(0)]);
            assert_ne!(before[&ChildName(1)], after[&ChildName(1)]);
            assert_eq!((pair.a.installed.len(), pair.b.installed.len()), (2, 2));
            assert_eq!((pair.a.ike_ups, pair.b.ike_ups), (1, 1));
            assert!(pair.a.failures.is_empty() && pair.b.failures.is_empty());
        }
    }
}

// RFC 7296 section 2.8.1: two rekeyings at once leave one pair.
#[test]
fn two_sides_that_replace_a_child_at_once_keep_one() {
    let mut redundant = 0;
    for seed in 0..200 {
        let mut random = Seeded::new(seed, 6);
        let mut pair = tunnel(seed, 1, SLOW);
        let mut traffic = Traffic::new(1, SLOW.delay);
        let first = random.percent(50);
        let apart = Duration::from_millis(random.below(600));
        for by_a in [first, !first] {
            // The other side may have been quicker; then there is a new pair to name.
            if by_a {
                rekey_at_a(&mut pair, 0);
            } else {
                rekey_at_b(&mut pair, 0);
            }
            if by_a == first {
                traffic.flow(&mut pair, apart);
            }
        }
        traffic.flow(&mut pair, Duration::from_secs(2));
        redundant += usize::from(pair.a.installed.len() > 2);
        traffic.flow(&mut pair, Duration::from_secs(15));
        pair.assert_agreement(1);
        assert_eq!((pair.a.installed.len(), pair.b.installed.len()), (1, 1));
        assert!(pair.a.failures.is_empty() && pair.b.failures.is_empty());
    }
    assert!(
        redundant > 20,
        "{redundant} collisions are too few to prove anything"
    );
}

// Both keep the tunnel up, and each asks for what is missing: one pair remains, the one of who has begun the IKE SA.
#[test]
fn two_sides_that_miss_a_child_at_once_make_one() {
    let mut twins = 0;
    for seed in 0..100 {
        let mut pair = Pair::new(seed, Conditions::PERFECT);
        configure(
            &mut pair,
            with_children(B, Role::Initiate, 1),
            with_children(A, Role::Initiate, 1),
        );
        pair.up_a();
        pair.run(Duration::from_secs(10));
        pair.up_b();
        pair.network.conditions = SLOW;
        let sa = pair.a.child(0).unwrap().sa;
        pair.tell_a(Command::Lost(sa));
        let mut most = 0;
        for _ in 0..100 {
            pair.run(Duration::from_millis(100));
            most = most.max(pair.a.installed.len());
        }
        twins += usize::from(most > 1);
        pair.run(Duration::from_secs(15));
        pair.assert_agreement(1);
        assert_eq!((pair.a.installed.len(), pair.b.installed.len()), (1, 1));
        assert!(pair.a.failures.is_empty() && pair.b.failures.is_empty());
    }
    assert!(twins > 20, "{twins} twins are too few to prove anything");
}

#[test]
fn lifetimes_replace_children_over_and_over_on_any_network() {
    for seed in 0..60 {
        let mut random = Seeded::new(seed, 5);
        let mut pair = tunnel(seed, 3, Conditions::PERFECT);
        for (remote, role) in [(B, Role::Initiate), (A, Role::Respond)] {
            let mut config = with_children(remote, role, 3);
            for child in &mut config.children {
                child.lifetime = Duration::from_secs(60 + random.below(60));
            }
            pair.set_peer(remote, config);
        }
        for id in 0..3 {
            rekey_at_a(&mut pair, id);
        }
        pair.run(Duration::from_secs(10));
        let conditions = Conditions {
            loss: random.below(10),
            repetition: random.below(20),
            corruption: random.below(3),
            delay: Duration::from_millis(1 + random.below(400)),
            job: Duration::from_millis(1 + random.below(300)),
        };
        pair.network.conditions = conditions;
        let mut traffic = Traffic::new(3, conditions.delay);
        for _ in 0..50 {
            traffic.flow(&mut pair, Duration::from_secs(10));
            pair.a.endpoint.save_and_restore();
            pair.b.endpoint.save_and_restore();
        }
        pair.network.conditions = Conditions::PERFECT;
        pair.run(Duration::from_secs(70));
        pair.assert_agreement(3);
        assert_eq!((pair.a.ike_ups, pair.b.ike_ups), (1, 1), "seed {seed}");
        assert!(pair.a.endpoint.len() == 1 && pair.b.endpoint.len() == 1);
        assert!(pair.a.installed.len() <= 6 && pair.b.installed.len() <= 6);
    }
}

fn rekey(pair: &mut Pair, at_a: bool, what: Rekey) {
    if at_a {
        pair.tell_a(Command::Rekey(PEER, what));
    } else {
        pair.tell_b(Command::Rekey(PEER, what));
    }
}

/// Both sides have one IKE SA, which is the same.
fn assert_one_ike_sa(pair: &Pair) {
    let of = |side: &Side| -> Vec<_> {
        let established = side.endpoint.established();
        established
            .map(|(_, _, info)| (info.spi_i, info.spi_r))
            .collect()
    };
    assert_eq!(of(&pair.a), of(&pair.b));
    assert_eq!((pair.a.endpoint.len(), pair.b.endpoint.len()), (1, 1));
}

#[test]
fn either_side_replaces_the_ike_sa_and_its_children_stay() {
    for by_a in [true, false] {
        for seed in 0..20 {
            let mut pair = tunnel(seed, 3, SLOW);
            let before = spis(&pair.a);
            let mut traffic = Traffic::new(3, SLOW.delay);
            for round in 1..4 {
                rekey(&mut pair, by_a == (round != 2), Rekey::Ike);
                traffic.flow(&mut pair, Duration::from_secs(3));
                assert_one_ike_sa(&pair);
                assert_eq!((pair.a.ike_rekeys, pair.b.ike_rekeys), (round, round));
                assert_eq!(spis(&pair.a), before);
            }
            // The children are rekeyed with keys that come from the new IKE SA, in either direction.
            rekey(&mut pair, true, Rekey::Children);
            traffic.flow(&mut pair, Duration::from_secs(10));
            rekey(&mut pair, false, Rekey::Children);
            traffic.flow(&mut pair, Duration::from_secs(15));
            pair.assert_agreement(3);
            assert_eq!((pair.a.installed.len(), pair.b.installed.len()), (3, 3));
            assert_eq!((pair.a.ike_ups, pair.b.ike_ups), (1, 1));
            assert!(pair.a.failures.is_empty() && pair.b.failures.is_empty());
        }
    }
}

// RFC 7296 sections 2.8.1 and 2.25: whatever both sides begin at once, one IKE SA and one pair for each child remain.
#[test]
fn whatever_both_sides_rekey_at_once_nothing_is_lost_and_one_of_each_remains() {
    let mut redundant = 0;
    for seed in 0..400 {
        let mut random = Seeded::new(seed, 6);
        let conditions = Conditions {
            loss: random.below(20),
            repetition: random.below(20),
            ..SLOW
        };
        let mut pair = tunnel(seed, 2, conditions);
        let mut traffic = Traffic::new(2, SLOW.delay);
        let mut by_a = random.percent(50);
        for _ in 0..2 + random.below(3) {
            by_a ^= random.percent(80);
            let what = if random.percent(60) {
                Rekey::Ike
            } else {
                Rekey::Children
            };
            rekey(&mut pair, by_a, what);
            traffic.flow(&mut pair, Duration::from_millis(random.below(300)));
            pair.a.endpoint.save_and_restore();
            pair.b.endpoint.save_and_restore();
        }
        traffic.flow(&mut pair, Duration::from_secs(3));
        pair.network.conditions = SLOW;
        traffic.flow(&mut pair, Duration::from_secs(80));
        pair.assert_agreement(2);
        assert_one_ike_sa(&pair);
        assert_eq!((pair.a.installed.len(), pair.b.installed.len()), (2, 2));
        assert_eq!((pair.a.ike_ups, pair.b.ike_ups), (1, 1), "seed {seed}");
        assert!(pair.a.failures.is_empty() && pair.b.failures.is_empty());
        redundant += usize::from(traffic.most_ike_sas > 2);
    }
    assert!(redundant > 40, "{redundant} collisions are too few");
}

#[test]
fn lifetimes_replace_the_ike_sa_and_its_children_on_any_network() {
    for seed in 0..40 {
        let mut random = Seeded::new(seed, 5);
        let mut pair = Pair::new(seed, Conditions::PERFECT);
        let mut config = |remote, role| {
            let mut config = with_children(remote, role, 3);
            config.lifetime = Duration::from_secs(90 + random.below(60));
            for child in &mut config.children {
                child.lifetime = Duration::from_secs(70 + random.below(60));
            }
            config
        };
        let (at_a, at_b) = (config(B, Role::Initiate), config(A, Role::Respond));
        configure(&mut pair, at_a, at_b);
        pair.up_a();
        pair.run(Duration::from_secs(5));
        let conditions = Conditions {
            loss: random.below(10),
            repetition: random.below(20),
            corruption: random.below(3),
            delay: Duration::from_millis(1 + random.below(400)),
            job: Duration::from_millis(1 + random.below(300)),
        };
        pair.network.conditions = conditions;
        let mut traffic = Traffic::new(3, conditions.delay);
        for _ in 0..60 {
            traffic.flow(&mut pair, Duration::from_secs(10));
            pair.a.endpoint.save_and_restore();
            pair.b.endpoint.save_and_restore();
        }
        pair.network.conditions = Conditions::PERFECT;
        pair.run(Duration::from_secs(70));
        pair.assert_agreement(3);
        assert_eq!((pair.a.ike_ups, pair.b.ike_ups), (1, 1), "seed {seed}");
        assert!(
            (4..=20).contains(&pair.a.ike_rekeys),
            "{}",
            pair.a.ike_rekeys
        );
        assert!(pair.a.endpoint.len() <= 2 && pair.b.endpoint.len() <= 2);
        assert!(pair.a.installed.len() <= 6 && pair.b.installed.len() <= 6);
    }
}

// RFC 7296 section 1.2: IKE_AUTH has no group of its own, so the first rekeying may bring one that was never used.
#[test]
fn the_first_rekeying_brings_a_group_that_nobody_has_used_before() {
    let mut pair = Pair::new(1, Conditions::PERFECT);
    let with = |remote, role, esp: &[&str]| {
        let mut config = peer(remote, role);
        config.children[0].proposals = esp.iter().map(|text| text.parse().unwrap()).collect();
        config
    };
    configure(
        &mut pair,
        with(B, Role::Initiate, &["aes256gcm16-ecp521-ecp384"]),
        with(A, Role::Respond, &["aes256gcm16-ecp384"]),
    );
    pair.up_a();
    pair.run(Duration::from_secs(5));
    assert_eq!(pair.a.child(0).unwrap().suite.group, None);
    // A prefers a group that B does not take, and is told so.
    rekey_at_a(&mut pair, 0);
    pair.run(Duration::from_secs(5));
    let group = pair.a.child(0).unwrap().suite.group;
    assert_eq!(group, Some(crate::ike::crypto::Group::Ecp384));
    let before = pair.a.child(0).unwrap().spi_in;
    let told = pair.network.sent.len();
    rekey_at_a(&mut pair, 0);
    pair.run(Duration::from_secs(10));
    assert_ne!(pair.a.child(0).unwrap().spi_in, before);
    // Two exchanges, without a detour: the group of the last time is tried first.
    assert_eq!(pair.network.sent.len() - told, 4);
    pair.assert_agreement(1);
}

#[test]
fn what_was_narrowed_stays_as_it_is_and_no_line_is_taken_for_another() {
    let mut pair = Pair::new(1, Conditions::PERFECT);
    let mut at_a = peer(B, Role::Initiate);
    let nets = ["10.2.0.0/24", "10.2.7.0/24"];
    at_a.children = vec![child(0, &["10.1.0.0/24"], &nets, "aes256gcm16")];
    let mut at_b = peer(A, Role::Respond);
    at_b.children = vec![
        child(0, &[nets[0]], &["10.1.0.0/24"], "aes256gcm16"),
        child(1, &[nets[1]], &["10.1.0.0/24"], "aes256gcm16"),
    ];
    configure(&mut pair, at_a, at_b);
    pair.up_a();
    pair.run(Duration::from_secs(5));
    pair.assert_agreement(2);
    for round in 0..4 {
        let olds: Vec<_> = pair.a.in_force().iter().map(|up| up.sa).collect();
        for sa in olds {
            if round % 2 == 0 {
                pair.tell_a(Command::Expiring(sa));
            } else {
                let spi = pair.a.installed[&sa].spi_in;
                let at_b = pair.b.in_force().into_iter().find(|up| up.spi_out == spi);
                let sa = at_b.unwrap().sa;
                pair.tell_b(Command::Expiring(sa));
            }
        }
        pair.run(Duration::from_secs(15));
        pair.assert_agreement(2);
        let remotes: BTreeSet<String> = pair
            .a
            .in_force()
            .iter()
            .map(|up| format!("{:?}", up.remote))
            .collect();
        assert_eq!(
            remotes.len(),
            2,
            "both networks, each in a child of its own"
        );
        assert!(pair.a.failures.is_empty() && pair.b.failures.is_empty());
    }
}

#[test]
fn a_peer_that_never_deletes_what_it_has_replaced_is_relieved_of_it() {
    let mut pair = tunnel(1, 1, Conditions::PERFECT);
    rekey_at_b(&mut pair, 0);
    while pair.a.installed.len() < 2 {
        pair.run(Duration::from_millis(1));
    }
    // B has the answer, and none of its requests arrives from here on.
    pair.run(Duration::from_millis(3));
    pair.b.mute = true;
    pair.run(Duration::from_secs(45));
    assert_eq!(pair.a.in_force().len(), 2);
    pair.run(Duration::from_secs(20));
    assert_eq!(pair.a.in_force().len(), 1);
    assert_eq!(pair.a.used.len(), 1);
}

#[test]
fn a_peer_that_never_deletes_the_ike_sa_that_it_has_replaced_is_relieved_of_it() {
    let mut pair = tunnel(1, 1, Conditions::PERFECT);
    rekey(&mut pair, false, Rekey::Ike);
    while pair.a.endpoint.len() < 2 {
        pair.run(Duration::from_millis(1));
    }
    // B has the answer, and none of its requests arrives from here on.
    pair.run(Duration::from_millis(3));
    pair.b.mute = true;
    pair.run(Duration::from_secs(45));
    assert_eq!(pair.a.endpoint.len(), 2);
    // It is deleted then, and nobody confirms that.
    pair.run(Duration::from_secs(90));
    assert_eq!(pair.a.endpoint.len(), 1);
    assert_eq!((pair.a.in_force().len(), pair.a.used.len()), (1, 1));
    assert_eq!((pair.a.ike_ups, pair.a.ike_rekeys), (1, 1));
}
