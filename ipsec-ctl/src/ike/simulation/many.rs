//! A thousand tunnels between two gateways: what one more costs must not grow with how many there are.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use super::{
    network::Conditions,
    pair::{A, B, PEER, Pair, Side, limits, peer},
    upkeep::with_children,
};
use crate::ike::{
    Identity,
    config::{EndpointConfig, PeerId, Remote, Role},
    endpoint::Part,
    event::{Command, Rekey},
    sa::IkeSa,
};
use crate::wiped::Wiped;

const FLOOD: u32 = 50_000;

#[test]
fn a_thousand_tunnels_come_up_and_outlive_a_flood() {
    let many = EndpointConfig {
        cookie_threshold: 500,
        half_open: 2000,
        half_open_per_source: 2000,
        ..limits()
    };
    let mut pair = Pair::with(1, Conditions::PERFECT, many.clone(), many);
    let begun = Instant::now();
    for number in 0..1000_u32 {
        let name = |side: &str| {
            format!("{side}{number}.example")
                .parse::<Identity>()
                .unwrap()
        };
        let mut at_a = peer(B, Role::Initiate);
        at_a.id = PeerId(number);
        at_a.local_id = Some(name("a"));
        at_a.remote_id = Some(name("b"));
        let mut at_b = peer(A, Role::Respond);
        at_b.id = PeerId(number);
        at_b.local_id = Some(name("b"));
        at_b.remote_id = Some(name("a"));
        pair.tell_a(Command::SetPeer(Box::new(at_a)));
        pair.tell_b(Command::SetPeer(Box::new(at_b)));
    }
    for number in 0..1000_u32 {
        pair.tell_a(Command::Up(PeerId(number), (A, 500).into()));
    }
    pair.run(Duration::from_secs(20));
    eprintln!("1000 tunnels up after {:?}", begun.elapsed());
    pair.assert_agreement(1000);
    let before = (pair.a.downs.len(), pair.b.downs.len());

    // Each IKE_SA_INIT of a flood claims another address; a cookie is all that they get.
    let init = pair.network.sent[0].clone();
    let flood = Instant::now();
    for number in 0..FLOOD {
        let mut forged = init.clone();
        forged.bytes[..8].copy_from_slice(&u64::from(number + 1).to_be_bytes());
        forged.source = (Ipv4Addr::from_bits(0xcb00_7100 + number), 500).into();
        pair.b
            .endpoint
            .handle_datagram(pair.now, forged.destination, forged.source, &forged.bytes);
        while pair.b.endpoint.poll_transmit().is_some() {}
        while pair.b.endpoint.poll_event().is_some() {}
        let _ = pair.b.endpoint.poll_timeout();
    }
    eprintln!("{FLOOD} forged IKE_SA_INIT after {:?}", flood.elapsed());
    pair.run(Duration::from_secs(60));
    pair.assert_agreement(1000);
    assert_eq!(before, (pair.a.downs.len(), pair.b.downs.len()));
}

/// Bytes of each IKE SA that has changed since this was asked last, as they are saved.
fn changed(side: &mut Side) -> Vec<usize> {
    let changes = side.endpoint.changes().unwrap().into_iter();
    changes
        .filter(|(part, _)| matches!(part, Part::Ike(_)))
        .map(|(_, saved)| saved.map_or(0, |saved| saved.bytes().len()))
        .collect()
}

#[test]
fn one_more_peer_of_a_tunnel_for_many_has_nothing_done_about_the_others() {
    const PEERS: u32 = 20;
    let mut pair = Pair::with(1, Conditions::PERFECT, limits(), limits());
    let mut at_b = peer(A, Role::Respond);
    at_b.remote = Remote::Anywhere;
    pair.tell_b(Command::SetPeer(Box::new(at_b)));
    for number in 0..PEERS {
        let mut at_a = peer(B, Role::Initiate);
        at_a.id = PeerId(number);
        at_a.local_id = Some(format!("host{number}.example").parse().unwrap());
        at_a.remote_id = Some(B.into());
        pair.tell_a(Command::SetPeer(Box::new(at_a)));
        pair.tell_a(Command::Up(PeerId(number), (A, 500).into()));
        // Before anything else is due.
        pair.run(Duration::from_millis(400));
        for (name, side) in [("initiator", &mut pair.a), ("responder", &mut pair.b)] {
            assert_eq!(changed(side).len(), 1, "{name}, peer {number}");
        }
    }
    pair.run(Duration::from_secs(15));
    pair.assert_agreement(PEERS as usize);
    changed(&mut pair.a);
    changed(&mut pair.b);

    // A rekeying is of all of them.
    let ids = |pair: &Pair| -> BTreeSet<_> {
        let up = pair.b.endpoint.established();
        up.map(|(id, ..)| id).collect()
    };
    let before = ids(&pair);
    pair.tell_b(Command::Rekey(PEER, Rekey::Ike));
    // Until the old ones are forgotten.
    pair.run(Duration::from_secs(60));
    pair.assert_agreement(PEERS as usize);
    assert!(ids(&pair).is_disjoint(&before));
    changed(&mut pair.a);
    changed(&mut pair.b);

    // Down and up again: of two with one identity the newer stays, and nobody else's is touched.
    pair.tell_a(Command::Down(PeerId(3)));
    pair.tell_a(Command::Up(PeerId(3), (A, 500).into()));
    pair.run(Duration::from_secs(10));
    pair.assert_agreement(PEERS as usize);
    for side in [&mut pair.a, &mut pair.b] {
        assert_eq!(changed(side).len(), 2, "the old one and the new one");
    }
}

/// Parts as they are saved, without those that are gone.
fn contents(parts: impl IntoIterator<Item = (Part, Option<Wiped>)>) -> Vec<(Part, Vec<u8>)> {
    let there = parts.into_iter().filter_map(|(part, content)| {
        let content = content?;
        Some((part, content.bytes().to_vec()))
    });
    there.collect()
}

#[test]
fn what_is_copied_from_any_part_on_is_all_that_is_saved_after_it() {
    let mut pair = Pair::new(1, Conditions::PERFECT);
    for (remote, role) in [(B, Role::Initiate), (A, Role::Respond)] {
        pair.set_peer(remote, with_children(remote, role, 3));
    }
    pair.up_a();
    pair.run(Duration::from_secs(5));
    pair.tell_a(Command::Rekey(PEER, Rekey::Ike));
    pair.run(Duration::from_millis(1));
    let endpoint = &mut pair.a.endpoint;
    endpoint.everything_has_changed();
    let mut saved = contents(endpoint.changes().unwrap());
    saved.sort();
    assert!(saved.len() >= 5, "{}", saved.len());
    let copied = |after| {
        let parts = endpoint.parts_after(after);
        contents(parts.map(|(part, content)| (part, Some(content.unwrap()))))
    };
    assert_eq!(copied(None), saved);
    for (place, (part, _)) in saved.iter().enumerate() {
        assert_eq!(copied(Some(*part)), saved[place + 1..], "after {part:?}");
    }
}

// There may be tens of thousands: what the first exchanges needed must be gone, and what is rare must not be in each.
#[test]
fn an_ike_sa_that_is_up_keeps_little() {
    let mut pair = Pair::configured(1, Conditions::PERFECT);
    pair.up_a();
    pair.run(Duration::from_secs(3));
    pair.assert_agreement(1);
    for side in [&mut pair.a, &mut pair.b] {
        side.endpoint.everything_has_changed();
        let saved = changed(side);
        assert!(saved.iter().all(|bytes| *bytes < 2000), "{saved:?} bytes");
    }
    assert!(size_of::<IkeSa>() <= 1192, "{}", size_of::<IkeSa>());
}
