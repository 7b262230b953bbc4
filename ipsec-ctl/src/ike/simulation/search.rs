//! Bounded exhaustive search: what both sides may want at once, in every order of events that differs from the usual one
//! in a few places.
//!
//! A run is a list of decisions, one for each step: which datagram arrives, is lost or arrives twice, which key exchange
//! is done, or that a timer fires first. Decision 0 is the usual one, and so is everything beyond the end of the list. A
//! run tells how many choices each step had, from which further lists are made. Nothing but the list is kept, so a
//! failure is replayed by its list: `IPSEC_XDP_DECISIONS=0,3,0,1`.

use std::{collections::BTreeSet, panic, time::Duration};

use ipsec_common::Spi;

use super::{
    network::Conditions,
    pair::{A, B, PEER, Pair, Side},
    upkeep::with_children,
};
use crate::ike::{
    config::Role,
    event::{Command, Rekey},
};

/// Decisions that differ from the usual one, unless the environment says otherwise.
const DEVIATIONS: usize = 2;
/// Steps within which they do.
const STEPS: usize = 16;
/// No datagram and no key exchange takes longer.
const SOON: Duration = Duration::from_secs(5);
/// Steps after which a run goes on by itself.
const MOST_STEPS: usize = 40;

/// What one side wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Nothing,
    RekeyChild,
    RekeyIke,
    /// First the child, then the IKE SA.
    RekeyBoth,
    DeleteChild,
}

use Wish::*;

/// What both sides want at once. Each is run with the sides exchanged, too.
const SCENARIOS: &[(&str, Wish, Wish)] = &[
    ("a child is rekeyed by one side", RekeyChild, Nothing),
    ("a child is rekeyed by both sides", RekeyChild, RekeyChild),
    ("an IKE SA is rekeyed by one side", RekeyIke, Nothing),
    ("an IKE SA is rekeyed by both sides", RekeyIke, RekeyIke),
    ("an IKE SA is rekeyed beside a child", RekeyIke, RekeyChild),
    ("both are rekeyed beside a child", RekeyBoth, RekeyChild),
    ("both are rekeyed beside an IKE SA", RekeyBoth, RekeyIke),
    ("a child is rekeyed and deleted", RekeyChild, DeleteChild),
    ("a child is deleted by both sides", DeleteChild, DeleteChild),
    (
        "an IKE SA is rekeyed beside a Delete",
        RekeyIke,
        DeleteChild,
    ),
];

/// One thing that may happen next.
#[derive(Clone, Copy, Debug)]
enum Move {
    Arrives(usize),
    JobAtA,
    JobAtB,
    Lost(usize),
    ArrivesTwice(usize),
    TimerFires,
}

fn moves(pair: &Pair) -> Vec<Move> {
    let flights = pair.network.flights.len();
    let jobs = |side: &Side, done: Move| side.has_job().then_some(done);
    let usual: Vec<Move> = (0..flights)
        .map(Move::Arrives)
        .chain(jobs(&pair.a, Move::JobAtA))
        .chain(jobs(&pair.b, Move::JobAtB))
        .collect();
    if usual.is_empty() {
        return usual;
    }
    usual
        .into_iter()
        .chain((0..flights).map(Move::Lost))
        .chain((0..flights).map(Move::ArrivesTwice))
        .chain(pair.has_timer_within(SOON).then_some(Move::TimerFires))
        .collect()
}

fn act(pair: &mut Pair, what: Move) {
    pair.now = pair.now + Duration::from_millis(1);
    match what {
        Move::Arrives(index) => {
            let flight = pair.network.flights.remove(index);
            pair.deliver(&flight);
        }
        Move::Lost(index) => drop(pair.network.flights.remove(index)),
        Move::ArrivesTwice(index) => {
            let flight = pair.network.flights[index].clone();
            pair.deliver(&flight);
        }
        Move::JobAtA => pair.a.finish_job(pair.now, &mut pair.network),
        Move::JobAtB => pair.b.finish_job(pair.now, &mut pair.network),
        Move::TimerFires => pair.fire_timer(),
    }
}

fn wish(pair: &mut Pair, at_a: bool, wish: Wish) {
    let mut tell = |command| {
        if at_a {
            pair.tell_a(command);
        } else {
            pair.tell_b(command);
        }
    };
    match wish {
        Nothing => {}
        RekeyChild => tell(Command::Rekey(PEER, Rekey::Children)),
        RekeyIke => tell(Command::Rekey(PEER, Rekey::Ike)),
        RekeyBoth => {
            tell(Command::Rekey(PEER, Rekey::Children));
            tell(Command::Rekey(PEER, Rekey::Ike));
        }
        DeleteChild => {
            let side = if at_a { &pair.a } else { &pair.b };
            let sa = side.child(0).unwrap().sa;
            if at_a {
                pair.tell_a(Command::Expired(sa));
            } else {
                pair.tell_b(Command::Expired(sa));
            }
        }
    }
}

/// Whatever is sent now is received, and something can be sent.
fn assert_no_loss(pair: &Pair) {
    for (from, to) in [(&pair.a, &pair.b), (&pair.b, &pair.a)] {
        let inbound: BTreeSet<Spi> = to.installed.values().map(|up| up.spi_in).collect();
        assert_eq!(
            from.used.len(),
            1,
            "{} has nothing to send on",
            from.address
        );
        assert!(
            from.used.values().all(|spi| inbound.contains(spi)),
            "{} sends what the peer does not receive",
            from.address
        );
    }
}

/// Runs one list of decisions; tells how many choices each step had.
fn run(at_a: Wish, at_b: Wish, decisions: &[usize]) -> Vec<usize> {
    let mut pair = Pair::new(1, Conditions::PERFECT);
    for (remote, role) in [(B, Role::Initiate), (A, Role::Respond)] {
        pair.set_peer(remote, with_children(remote, role, 1));
    }
    pair.up_a();
    pair.run(Duration::from_secs(12));
    wish(&mut pair, true, at_a);
    wish(&mut pair, false, at_b);
    let is_deleted = at_a == DeleteChild || at_b == DeleteChild;
    let mut choices = Vec::new();
    for step in 0..MOST_STEPS {
        let moves = moves(&pair);
        if moves.is_empty() {
            break;
        }
        choices.push(moves.len());
        let decision = decisions.get(step).copied().unwrap_or(0);
        act(&mut pair, moves[decision]);
        if step % 3 == 0 {
            pair.a.endpoint.save_and_restore();
            pair.b.endpoint.save_and_restore();
        }
        if !is_deleted {
            assert_no_loss(&pair);
        }
    }
    for _ in 0..100 {
        pair.run(Duration::from_secs(1));
        if !is_deleted {
            assert_no_loss(&pair);
        }
    }
    pair.assert_agreement(1);
    assert_no_loss(&pair);
    assert_eq!((pair.a.endpoint.len(), pair.b.endpoint.len()), (1, 1));
    assert_eq!((pair.a.installed.len(), pair.b.installed.len()), (1, 1));
    assert_eq!((pair.a.ike_ups, pair.b.ike_ups), (1, 1));
    choices
}

/// Runs all lists within the bounds; returns how many those were.
fn search(name: &str, at_a: Wish, at_b: Wish, deviations: usize) -> usize {
    let mut lists = vec![(Vec::new(), 0)];
    let mut runs = 0;
    while let Some((list, deviated)) = lists.pop() {
        runs += 1;
        let choices = match panic::catch_unwind(|| run(at_a, at_b, &list)) {
            Ok(choices) => choices,
            Err(cause) => {
                let list: Vec<String> = list.iter().map(ToString::to_string).collect();
                eprintln!(
                    "{name}, A {at_a:?}, B {at_b:?}: IPSEC_XDP_DECISIONS={}",
                    list.join(",")
                );
                panic::resume_unwind(cause);
            }
        };
        if deviated == deviations {
            continue;
        }
        for (step, choices) in choices.iter().enumerate().take(STEPS).skip(list.len()) {
            for decision in 1..*choices {
                let mut next = list.clone();
                next.resize(step, 0);
                next.push(decision);
                lists.push((next, deviated + 1));
            }
        }
    }
    runs
}

#[test]
fn whatever_both_sides_want_at_once_ends_well_in_every_order() {
    let text = |name: &str| std::env::var(name).ok();
    if let Some(list) = text("IPSEC_XDP_DECISIONS") {
        let list: Vec<usize> = list.split(',').filter_map(|one| one.parse().ok()).collect();
        for (_, one, other) in SCENARIOS {
            run(*one, *other, &list);
        }
        return;
    }
    let deviations = text("IPSEC_XDP_DEVIATIONS").map_or(DEVIATIONS, |text| text.parse().unwrap());
    let mut searches = Vec::new();
    for (name, one, other) in SCENARIOS {
        searches.push((*name, *one, *other));
        if one != other {
            searches.push((*name, *other, *one));
        }
    }
    for (name, at_a, at_b) in searches {
        let runs = search(name, at_a, at_b, deviations);
        eprintln!("{name}, A {at_a:?}, B {at_b:?}: {runs} runs");
    }
}
