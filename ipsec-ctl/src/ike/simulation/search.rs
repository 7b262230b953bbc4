//! Bounded exhaustive search: what both sides may want at once, in every order of events that differs from the usual one
//! in a few places.
//!
//! A run is a list of decisions, one for each step: which datagram arrives, is lost or arrives twice, which key exchange
//! is done, or that a timer fires first. Decision 0 is the usual one, and so is everything beyond the end of the list. A
//! run tells how many choices each step had, from which further lists are made. Nothing but the list is kept, so a
//! failure is replayed by its list: `IPSEC_XDP_DECISIONS=0,3,0,1`, in the scenarios whose name contains `IPSEC_XDP_SCENARIO`.

use std::{collections::BTreeSet, panic, time::Duration};

use super::{
    network::Conditions,
    pair::{A, B, CHILD, PEER, Pair, Side, acquire},
    upkeep::with_children,
};
use crate::ike::{
    config::{Remote, Role},
    event::{Command, Rekey},
    message::payload::NotifyType,
};

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
    /// An IKE SA, where there is none.
    Begin,
    RekeyChild,
    RekeyIke,
    /// First the child, then the IKE SA.
    RekeyBoth,
    DeleteChild,
    /// The child goes as soon as another is there in its place, by the hand of who should leave that to the other side.
    DeleteTooEarly,
    /// One child more.
    CreateChild,
    /// The IKE SA goes, and a fresh one is welcome.
    DeleteIke,
}

use Wish::*;

/// How things are when both sides begin to want something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Setting {
    /// A tunnel is up that A has started.
    Up,
    /// As before, and each side would use a group that the other one does not take.
    OtherGroups,
    /// A tunnel is up, and neither side agrees to any SA beyond what IKE_AUTH has brought.
    Full,
    /// As before, and B cannot call A.
    FullAndAway,
    /// Nothing is up, and either side may begin.
    Down,
}

use Setting::*;

impl Setting {
    /// Decisions that differ from the usual one, unless the environment says otherwise: `IPSEC_XDP_DEVIATIONS=2`.
    fn deviations(self) -> usize {
        match self {
            Up => 2,
            OtherGroups | Full | FullAndAway | Down => 1,
        }
    }

    /// Whether an IKE SA lives on under a fresh one.
    fn is_full(self) -> bool {
        matches!(self, Full | FullAndAway)
    }
}

/// What both sides want at once. Each is run with the sides exchanged, too.
// RFC 7296 section 2.25, with what else may go wrong in each of these.
const SCENARIOS: &[(&str, Setting, Wish, Wish)] = &[
    ("both sides start", Down, Begin, Begin),
    ("a child is rekeyed by one side", Up, RekeyChild, Nothing),
    ("a child is rekeyed by both", Up, RekeyChild, RekeyChild),
    ("an IKE SA is rekeyed by one side", Up, RekeyIke, Nothing),
    ("an IKE SA is rekeyed by both", Up, RekeyIke, RekeyIke),
    (
        "an IKE SA and a child are rekeyed",
        Up,
        RekeyIke,
        RekeyChild,
    ),
    ("both are rekeyed beside a child", Up, RekeyBoth, RekeyChild),
    ("both are rekeyed beside an IKE SA", Up, RekeyBoth, RekeyIke),
    (
        "a child is rekeyed and deleted",
        Up,
        RekeyChild,
        DeleteChild,
    ),
    ("a child is deleted by both", Up, DeleteChild, DeleteChild),
    ("a Delete comes too early", Up, RekeyChild, DeleteTooEarly),
    ("an IKE SA and a Delete", Up, RekeyIke, DeleteChild),
    ("a child is made by both", Up, CreateChild, CreateChild),
    ("one is made, one rekeyed", Up, CreateChild, RekeyChild),
    ("one is made, one deleted", Up, CreateChild, DeleteChild),
    ("an IKE SA and a new child", Up, RekeyIke, CreateChild),
    ("an IKE SA is rekeyed and deleted", Up, RekeyIke, DeleteIke),
    ("an IKE SA goes under a child", Up, DeleteIke, RekeyChild),
    (
        "an IKE SA goes under a new child",
        Up,
        DeleteIke,
        CreateChild,
    ),
    ("an IKE SA and its child go", Up, DeleteIke, DeleteChild),
    ("an IKE SA is deleted by both", Up, DeleteIke, DeleteIke),
    ("a group is refused", OtherGroups, RekeyChild, Nothing),
    ("both are refused", OtherGroups, RekeyChild, RekeyChild),
    (
        "an IKE SA's group is refused",
        OtherGroups,
        RekeyIke,
        Nothing,
    ),
    ("both IKE SAs' are refused", OtherGroups, RekeyIke, RekeyIke),
    ("both kinds are refused", OtherGroups, RekeyIke, RekeyChild),
    ("no child in its place is taken", Full, RekeyChild, Nothing),
    ("by neither side", Full, RekeyChild, RekeyChild),
    ("no IKE SA in its place is taken", Full, RekeyIke, Nothing),
    ("by neither side", Full, RekeyIke, RekeyIke),
    ("neither kind is taken", Full, RekeyIke, RekeyChild),
    ("no further child is taken", Full, CreateChild, Nothing),
    ("nor one in its place", Full, CreateChild, RekeyChild),
    ("what none may replace goes", Full, RekeyChild, DeleteChild),
    ("the peer must begin anew", FullAndAway, Nothing, RekeyChild),
    ("for the IKE SA, too", FullAndAway, Nothing, RekeyIke),
    ("and both want to", FullAndAway, RekeyChild, RekeyChild),
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

fn tell(pair: &mut Pair, at_a: bool, command: Command) {
    if at_a {
        pair.tell_a(command);
    } else {
        pair.tell_b(command);
    }
}

fn wish(pair: &mut Pair, at_a: bool, wish: Wish) {
    let (side, address) = if at_a { (&pair.a, A) } else { (&pair.b, B) };
    match wish {
        Nothing | DeleteTooEarly => {}
        Begin => tell(pair, at_a, Command::Up(PEER, (address, 500).into())),
        RekeyChild => tell(pair, at_a, Command::Rekey(PEER, Rekey::Children)),
        RekeyIke => tell(pair, at_a, Command::Rekey(PEER, Rekey::Ike)),
        RekeyBoth => {
            tell(pair, at_a, Command::Rekey(PEER, Rekey::Children));
            tell(pair, at_a, Command::Rekey(PEER, Rekey::Ike));
        }
        DeleteChild => {
            let sa = side.child(0).unwrap().sa;
            tell(pair, at_a, Command::Expired(sa));
        }
        CreateChild => tell(pair, at_a, acquire(1, address)),
        DeleteIke => {
            tell(pair, at_a, Command::Down(PEER));
            let again = if at_a {
                Command::Up(PEER, (address, 500).into())
            } else {
                Command::Allow(PEER)
            };
            tell(pair, at_a, again);
        }
    }
}

/// Who is to delete too early does so as soon as there is something in the place of what goes.
fn delete_too_early(pair: &mut Pair, early: &mut [bool; 2]) {
    for (waits, at_a) in early.iter_mut().zip([true, false]) {
        let side = if at_a { &pair.a } else { &pair.b };
        let mut of_child = side.installed.values().filter(|up| up.child == CHILD);
        let old = of_child.next().map(|up| up.sa);
        if let (true, Some(old), Some(_)) = (*waits, old, of_child.next()) {
            *waits = false;
            tell(pair, at_a, Command::Expired(old));
        }
    }
}

/// Both ends, before anybody wants anything.
fn set_up(setting: Setting, children: u32) -> Pair {
    let mut pair = Pair::new(1, Conditions::PERFECT);
    let role_of_b = match setting {
        Up | OtherGroups | Full | FullAndAway => Role::Respond,
        Down => Role::Initiate,
    };
    let with_children = |remote, role, count| {
        let mut config = with_children(remote, role, count);
        if remote == A && setting == FullAndAway {
            config.remote = Remote::Anywhere;
        }
        config
    };
    for (remote, role) in [(B, Role::Initiate), (A, role_of_b)] {
        pair.set_peer(remote, with_children(remote, role, 1));
    }
    if setting == Down {
        return pair;
    }
    pair.up_a();
    pair.run(Duration::from_secs(12));
    if setting.is_full() {
        // A fresh IKE SA begun sooner could be one that both sides have begun at once.
        pair.run(Duration::from_secs(20));
    }
    for (remote, role) in [(B, Role::Initiate), (A, role_of_b)] {
        let mut config = with_children(remote, role, children);
        if setting == OtherGroups {
            let (ike, esp) = if remote == B {
                ("x25519-ecp256", "ecp256-x25519")
            } else {
                ("ecp256", "ecp384-x25519")
            };
            config.proposals = vec![format!("aes256gcm16-prfsha256-{ike}").parse().unwrap()];
            config.children[0].proposals = vec![format!("aes256gcm16-{esp}").parse().unwrap()];
        }
        pair.set_peer(remote, config);
    }
    for side in [&mut pair.a, &mut pair.b] {
        side.endpoint.watched().is_minimal = setting.is_full();
    }
    pair
}

/// Runs one list of decisions; tells how many choices each step had, and notes what was refused.
fn run(
    (setting, at_a, at_b): Search,
    decisions: &[usize],
    refused: &mut BTreeSet<NotifyType>,
) -> Vec<usize> {
    let wishes = [at_a, at_b];
    let children = 1 + u32::from(wishes.contains(&CreateChild));
    let mut pair = set_up(setting, children);
    wish(&mut pair, true, at_a);
    wish(&mut pair, false, at_b);
    let mut early = [at_a == DeleteTooEarly, at_b == DeleteTooEarly];
    let stays = !wishes
        .iter()
        .any(|wish| matches!(wish, Begin | DeleteChild | DeleteTooEarly | DeleteIke));
    let mut choices = Vec::new();
    for step in 0..MOST_STEPS {
        let moves = moves(&pair);
        if moves.is_empty() {
            break;
        }
        choices.push(moves.len());
        let decision = decisions.get(step).copied().unwrap_or(0);
        // A list that is replayed is one of some scenario, and others may have fewer choices.
        act(&mut pair, moves.get(decision).copied().unwrap_or(moves[0]));
        delete_too_early(&mut pair, &mut early);
        if step % 3 == 0 {
            pair.a.endpoint.save_and_restore();
            pair.b.endpoint.save_and_restore();
        }
        if stays {
            pair.assert_nothing_is_lost();
        }
    }
    for _ in 0..5000 {
        if early == [false, false] {
            break;
        }
        pair.run(Duration::from_millis(1));
        delete_too_early(&mut pair, &mut early);
    }
    assert_eq!(early, [false, false], "nothing was deleted too early");
    for _ in 0..100 {
        pair.run(Duration::from_secs(1));
        for (at_a, what) in [(true, at_a), (false, at_b)] {
            let side = if at_a { &pair.a } else { &pair.b };
            // Packets go on asking.
            if what == CreateChild && side.child(1).is_none() {
                wish(&mut pair, at_a, what);
            }
        }
        if stays {
            pair.assert_nothing_is_lost();
        }
    }
    let children = match setting {
        Full | FullAndAway => 1,
        Up | OtherGroups | Down => usize::try_from(children).unwrap(),
    };
    pair.assert_agreement(children);
    pair.assert_nothing_is_lost();
    assert_eq!((pair.a.endpoint.len(), pair.b.endpoint.len()), (1, 1));
    let installed = (pair.a.installed.len(), pair.b.installed.len());
    assert_eq!(installed, (children, children));
    let stays_up = !wishes.iter().any(|wish| matches!(wish, Begin | DeleteIke));
    if stays_up && !setting.is_full() {
        assert_eq!((pair.a.ike_ups, pair.b.ike_ups), (1, 1));
    }
    for side in [&mut pair.a, &mut pair.b] {
        refused.extend(&side.endpoint.watched().told);
    }
    choices
}

type Search = (Setting, Wish, Wish);

/// Runs all lists within the bounds; returns how many those were.
fn search(
    name: &str,
    what: Search,
    deviations: usize,
    refused: &mut BTreeSet<NotifyType>,
) -> usize {
    let mut lists = vec![(Vec::new(), 0)];
    let mut runs = 0;
    while let Some((list, deviated)) = lists.pop() {
        runs += 1;
        let run = panic::AssertUnwindSafe(|| run(what, &list, refused));
        let choices = match panic::catch_unwind(run) {
            Ok(choices) => choices,
            Err(cause) => {
                let list: Vec<String> = list.iter().map(ToString::to_string).collect();
                let list = list.join(",");
                eprintln!("{name}, {what:?}: IPSEC_XDP_DECISIONS={list}");
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
    let mut refused = BTreeSet::new();
    let chosen = text("IPSEC_XDP_SCENARIO");
    let replayed: Option<Vec<usize>> = text("IPSEC_XDP_DECISIONS")
        .map(|list| list.split(',').filter_map(|one| one.parse().ok()).collect());
    let deviations = text("IPSEC_XDP_DEVIATIONS").map(|text| text.parse().unwrap());
    for (name, setting, one, other) in SCENARIOS {
        if chosen.as_ref().is_some_and(|chosen| !name.contains(chosen)) {
            continue;
        }
        let mut orders = vec![(*setting, *one, *other)];
        if one != other && *setting != FullAndAway {
            orders.push((*setting, *other, *one));
        }
        for what in orders {
            if let Some(list) = &replayed {
                eprintln!("{name}, {what:?}");
                run(what, list, &mut refused);
                continue;
            }
            let begun = std::time::Instant::now();
            let deviations = deviations.unwrap_or_else(|| setting.deviations());
            let mut told = BTreeSet::new();
            let runs = search(name, what, deviations, &mut told);
            let time = begun.elapsed();
            eprintln!("{name}, {what:?}: {runs} runs, {time:?}, {told:?}");
            refused.append(&mut told);
        }
    }
    if chosen.is_some() || replayed.is_some() {
        return;
    }
    // RFC 7296 section 2.25, and sections 1.3 and 1.3.1: every way to refuse has been met, and no other.
    let all = BTreeSet::from([
        NotifyType::INVALID_KE_PAYLOAD,
        NotifyType::NO_ADDITIONAL_SAS,
        NotifyType::TEMPORARY_FAILURE,
        NotifyType::CHILD_SA_NOT_FOUND,
    ]);
    assert_eq!(refused, all);
}
