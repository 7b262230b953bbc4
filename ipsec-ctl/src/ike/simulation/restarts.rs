//! Daemons and data planes that die at any moment and come back: both ends agree in the end, no key is used twice with one
//! number, no packet is accepted twice, and no message ID stands for two messages.

use std::{panic, time::Duration};

use super::{
    network::{Conditions, Flight, Network, Seeded},
    node::{Node, Witness},
    pair::{A, B, PEER},
    upkeep::with_children,
};
use crate::ike::{
    config::Role,
    event::{ChildSaId, Command, Rekey},
    time::Time,
};

/// Seeds that are run unless the environment says otherwise.
const SEEDS: u64 = 100;

struct World {
    now: Time,
    network: Network,
    nodes: [Node; 2],
    witness: Witness,
    random: Seeded,
}

impl World {
    fn new(seed: u64, conditions: Conditions) -> Self {
        Self {
            now: Time::default(),
            network: Network::new(conditions, Seeded::new(seed, 0)),
            nodes: [
                Node::new(seed, with_children(B, Role::Initiate, 1)),
                Node::new(seed + 1, with_children(A, Role::Respond, 1)),
            ],
            witness: Witness::default(),
            random: Seeded::new(seed, 7),
        }
    }

    /// Lets a node do what there is to do; one that dies of it comes back, and may die of that.
    fn drain(&mut self, index: usize) {
        let (now, node) = (self.now, &mut self.nodes[index]);
        let mut alive = node.drain(now, &mut self.network, &mut self.witness);
        while alive.is_err() {
            node.deaths += 1;
            node.fuse = node.next_fuse.take();
            alive = node
                .come_back(now)
                .and_then(|()| node.drain(now, &mut self.network, &mut self.witness));
        }
    }

    fn deliver(&mut self, flight: &Flight) {
        for index in 0..2 {
            if self.nodes[index].address == flight.destination.ip() && flight.bytes != [0xff] {
                self.nodes[index].endpoint.handle_datagram(
                    self.now,
                    flight.destination,
                    flight.source,
                    &flight.bytes,
                );
                self.drain(index);
            }
        }
    }

    fn work(&mut self, index: usize) {
        self.drain(index);
        while !self.nodes[index].jobs.is_empty() {
            let result = self.nodes[index].jobs.remove(0);
            self.nodes[index].endpoint.handle_job(self.now, result);
            self.drain(index);
        }
        let due = self.nodes[index].endpoint.poll_timeout();
        if due.is_some_and(|at| at <= self.now) {
            self.nodes[index].endpoint.handle_timeout(self.now);
            self.drain(index);
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        for _ in 0..1_000_000 {
            self.work(0);
            self.work(1);
            while let Some(flight) = self.network.arrival(self.now) {
                self.deliver(&flight);
            }
            self.traffic();
            if self.nodes.iter().any(|node| !node.jobs.is_empty()) {
                continue;
            }
            let timers = self.nodes.iter().map(|node| node.endpoint.poll_timeout());
            let next = timers.chain([self.network.next_arrival()]).flatten().min();
            match next {
                Some(at) if at <= end => self.now = self.now.max(at),
                _ => {
                    self.now = end;
                    return;
                }
            }
        }
        panic!("the endpoints never come to rest");
    }

    /// A packet each way, and an old one once more.
    fn traffic(&mut self) -> [bool; 2] {
        [(0, 1), (1, 0)].map(|(from, to)| {
            let packet = self.nodes[from].plane.send(&mut self.witness);
            let arrived = packet
                .is_some_and(|packet| self.nodes[to].plane.receive(&packet, &mut self.witness));
            let old = self.witness.sealed.len() as u64;
            if old > 0 {
                let old = usize::try_from(self.random.below(old)).unwrap();
                let old = self.witness.sealed[old].clone();
                self.nodes[to].plane.receive(&old, &mut self.witness);
            }
            arrived
        })
    }

    fn assert_agreement(&mut self) {
        for node in &self.nodes {
            let in_force: Vec<_> = node.pairs.keys().collect();
            assert_eq!(in_force.len(), 1, "at {}: {in_force:?}", node.address);
            assert_eq!(node.plane.sas.len(), 2, "at {}", node.address);
            assert_eq!(node.endpoint.len(), 1, "at {}", node.address);
        }
        assert_eq!(self.traffic(), [true, true]);
    }

    fn end_well(&mut self) {
        self.network.conditions = Conditions::PERFECT;
        for node in &mut self.nodes {
            (node.fuse, node.next_fuse) = (None, None);
        }
        self.run(Duration::from_secs(400));
        self.assert_agreement();
    }
}

/// What one side does when all is well.
#[derive(Clone, Copy, Debug)]
enum Wish {
    RekeyChild,
    RekeyIke,
    DeleteChild,
}

fn wish(world: &mut World, index: usize, wish: Wish) {
    let now = world.now;
    let node = &mut world.nodes[index];
    match wish {
        Wish::RekeyChild => node.tell(now, Command::Rekey(PEER, Rekey::Children)),
        Wish::RekeyIke => node.tell(now, Command::Rekey(PEER, Rekey::Ike)),
        Wish::DeleteChild => {
            if let Some(sa) = node.pairs.keys().next_back().copied() {
                node.tell(now, Command::Lost(sa));
            }
        }
    }
}

/// What happens, and who dies of it after how many acts, and perhaps once more; tells whether anybody did.
fn dies(what: Option<(usize, Wish)>, who: usize, fuse: u32, again: Option<u32>) -> bool {
    let mut world = World::new(1, Conditions::PERFECT);
    if what.is_some() {
        world.run(Duration::from_secs(12));
        world.assert_agreement();
    }
    world.nodes[who].fuse = Some(fuse);
    world.nodes[who].next_fuse = again;
    if let Some((side, what)) = what {
        wish(&mut world, side, what);
    }
    world.run(Duration::from_secs(30));
    let died = world.nodes[who].deaths > 0;
    world.end_well();
    died
}

#[test]
fn wherever_a_daemon_dies_in_an_exchange_both_ends_agree_and_nothing_is_used_twice() {
    let mut whats = vec![None];
    for what in [Wish::RekeyChild, Wish::RekeyIke, Wish::DeleteChild] {
        whats.extend([Some((0, what)), Some((1, what))]);
    }
    for what in whats {
        for who in [0, 1] {
            for again in [None, Some(1), Some(3), Some(6)] {
                let least = everywhere(what, who, again);
                assert!(least > 5, "{what:?}: nobody has died");
            }
        }
    }
}

/// Runs what happens with every fuse that burns down; tells how many those are.
fn everywhere(what: Option<(usize, Wish)>, who: usize, again: Option<u32>) -> u32 {
    let mut fuse = 0;
    loop {
        let died = panic::catch_unwind(|| dies(what, who, fuse, again)).unwrap_or_else(|cause| {
            eprintln!("{what:?}: node {who} dies after {fuse} acts, and after {again:?}");
            panic::resume_unwind(cause);
        });
        if !died {
            return fuse;
        }
        fuse += 1;
    }
}

/// A long life with many deaths of every kind, on a bad network.
fn live(seed: u64) {
    let mut random = Seeded::new(seed, 8);
    let conditions = Conditions {
        loss: random.below(15),
        repetition: random.below(20),
        corruption: random.below(3),
        delay: Duration::from_millis(1 + random.below(500)),
        job: Duration::from_millis(1),
    };
    let mut world = World::new(seed, conditions);
    for _ in 0..30 {
        let side = usize::from(random.percent(50));
        match random.below(8) {
            0 | 1 => wish(&mut world, side, Wish::RekeyChild),
            2 => wish(&mut world, side, Wish::RekeyIke),
            3 => wish(&mut world, side, Wish::DeleteChild),
            4 => world.nodes[side].lose_plane(world.now, false),
            5 if random.percent(30) => world.nodes[side].lose_plane(world.now, true),
            _ => {
                let node = &mut world.nodes[side];
                node.fuse = Some(u32::try_from(random.below(40)).unwrap());
                node.next_fuse = random
                    .percent(30)
                    .then(|| u32::try_from(random.below(10)).unwrap());
            }
        }
        world.run(Duration::from_millis(random.below(8000)));
    }
    world.end_well();
}

#[test]
fn whatever_dies_and_when_both_ends_agree_in_the_end_and_nothing_is_used_twice() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().unwrap());
    if let Some(seed) = number("IPSEC_XDP_SEED") {
        return live(seed);
    }
    for seed in 0..number("IPSEC_XDP_SEEDS").unwrap_or(SEEDS) {
        if let Err(cause) = panic::catch_unwind(|| live(seed)) {
            eprintln!("seed {seed} failed; IPSEC_XDP_SEED={seed} runs it alone");
            panic::resume_unwind(cause);
        }
    }
}

#[test]
fn an_exchange_that_is_under_way_is_ended_by_the_daemon_that_comes_after() {
    let mut world = World::new(3, Conditions::PERFECT);
    world.run(Duration::from_secs(12));
    let before = world.nodes[0].pairs.clone();
    wish(&mut world, 0, Wish::RekeyChild);
    // It has sent its request, and dies before the response comes.
    world.drain(0);
    let result = world.nodes[0].jobs.remove(0);
    world.nodes[0].endpoint.handle_job(world.now, result);
    world.drain(0);
    assert_eq!(world.network.flights.len(), 1);
    assert!(world.nodes[0].come_back(world.now).is_ok());
    world.run(Duration::from_secs(30));
    world.assert_agreement();
    let after = &world.nodes[0].pairs;
    assert!(
        after.keys().all(|sa| !before.contains_key(sa)),
        "it was rekeyed"
    );
    assert_eq!(world.nodes[0].endpoint.established().count(), 1);
}

/// The names of what a wish replaces.
fn named(node: &Node, what: Wish) -> Vec<String> {
    let ike = node.endpoint.established();
    match what {
        Wish::RekeyIke => ike.map(|(ike, ..)| format!("{ike:?}")).collect(),
        Wish::RekeyChild | Wish::DeleteChild => {
            node.pairs.keys().map(|sa| format!("{sa:?}")).collect()
        }
    }
}

// The daemon answers an operator when it has saved what was asked for.
#[test]
fn what_an_operator_was_told_is_done_by_whatever_daemon_comes_after() {
    for what in [Wish::RekeyChild, Wish::RekeyIke] {
        for who in [0, 1] {
            for fuse in 0.. {
                let mut world = World::new(5, Conditions::PERFECT);
                world.run(Duration::from_secs(12));
                let before = named(&world.nodes[who], what);
                wish(&mut world, who, what);
                assert!(world.nodes[who].save().is_ok());
                world.nodes[who].fuse = Some(fuse);
                world.run(Duration::from_secs(30));
                let died = world.nodes[who].deaths > 0;
                world.end_well();
                let after = named(&world.nodes[who], what);
                assert_ne!(before, after, "{what:?} by {who}, dead after {fuse} acts");
                if !died {
                    assert!(fuse > 5, "nobody has died");
                    break;
                }
            }
        }
    }
}

#[test]
fn what_a_data_plane_has_lost_with_the_daemon_is_made_anew_by_the_daemon_that_comes_after() {
    for who in [0, 1] {
        let mut world = World::new(4, Conditions::PERFECT);
        world.run(Duration::from_secs(12));
        let before: Vec<ChildSaId> = world.nodes[who].pairs.keys().copied().collect();
        let node = &mut world.nodes[who];
        node.plane.sas.clear();
        node.plane.words.clear();
        assert!(node.come_back(world.now).is_ok());
        world.run(Duration::from_secs(30));
        world.assert_agreement();
        let after = &world.nodes[who].pairs;
        assert!(before.iter().all(|sa| !after.contains_key(sa)));
    }
}
