//! A thousand tunnels between two gateways: what one more costs must not grow with how many there are.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use super::{
    network::Conditions,
    pair::{A, B, Pair, limits, peer},
};
use crate::ike::{
    Identity,
    config::{EndpointConfig, PeerId, Role},
    event::Command,
};

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
