//! What goes beyond the base exchanges, or beyond the common case of them: packets that ask for children, several peers at
//! one address, IKE SAs without a child.

use std::time::Duration;

use ipsec_common::TrafficSelector;
use zeroize::Zeroizing;

use super::{
    network::Conditions,
    pair::{A, B, PEER, Pair, child, peer, selector},
};
use crate::ike::{
    Identity,
    config::{ChildName, PeerConfig, PeerId, Role},
    event::Command,
    message::{Message, Payload, payload::NotifyType},
};

fn pair_of(a: PeerConfig, b: PeerConfig) -> Pair {
    let mut pair = Pair::new(1, Conditions::PERFECT);
    pair.tell_a(Command::SetPeer(Box::new(a)));
    pair.tell_b(Command::SetPeer(Box::new(b)));
    pair
}

fn packet(address: &str, port: u16) -> TrafficSelector {
    TrafficSelector {
        protocol: 6,
        ports: (port, port),
        addresses: (address.parse().unwrap(), address.parse().unwrap()),
    }
}

// RFC 7296 section 2.9: the packet that asks for the SAs is the first selector of either side, and a responder that must
// narrow prefers what has room for it.
#[test]
fn a_packet_gets_the_child_that_has_room_for_it() {
    for via_create_child in [false, true] {
        let esp = "aes256gcm16";
        let a = PeerConfig {
            children: vec![child(0, &["10.1.0.0/16"], &["10.2.0.0/16"], esp)],
            childless: via_create_child,
            ..peer(B, Role::OnDemand)
        };
        let b = PeerConfig {
            children: vec![
                child(0, &["10.2.7.0/24"], &["10.1.7.0/24"], esp),
                child(1, &["10.2.8.0/24"], &["10.1.8.0/24"], esp),
            ],
            ..peer(A, Role::Respond)
        };
        let mut pair = pair_of(a, b);
        let wanted = (packet("10.1.8.1", 4000), packet("10.2.8.1", 80));
        pair.tell_a(Command::Acquire {
            peer: PEER,
            child: ChildName(0),
            local: (A, 500).into(),
            packet: Some(wanted),
        });
        pair.run(Duration::from_secs(3));
        pair.assert_agreement(1);
        assert!(pair.b.child(1).is_some());
        let up = pair.a.child(0).unwrap();
        assert_eq!(up.local, [selector("10.1.8.0/24")]);
        assert_eq!(up.remote, [selector("10.2.8.0/24")]);
    }
}

#[test]
fn a_packet_outside_the_childs_selectors_is_not_told_to_the_peer() {
    let mut pair = pair_of(peer(B, Role::OnDemand), peer(A, Role::Respond));
    pair.tell_a(Command::Acquire {
        peer: PEER,
        child: ChildName(0),
        local: (A, 500).into(),
        packet: Some((packet("10.9.0.1", 1), packet("10.2.0.1", 1))),
    });
    pair.run(Duration::from_secs(3));
    pair.assert_agreement(1);
    assert_eq!(
        pair.b.child(0).unwrap().remote,
        [selector("10.1.0.0/24")],
        "as configured"
    );
}

#[test]
fn a_peer_that_may_be_anywhere_may_also_be_where_another_is_expected() {
    const ROAD: PeerId = PeerId(77);
    let name = |text: &str| Some(text.parse::<Identity>().unwrap());
    let secret = || Zeroizing::new(b"the secret of the road".to_vec());
    let a = PeerConfig {
        local_id: name("road.example"),
        psk: secret(),
        proposals: vec!["aes128-sha256-modp2048".parse().unwrap()],
        ..peer(B, Role::Initiate)
    };
    let fixed = PeerConfig {
        remote_id: name("office.example"),
        ..peer(A, Role::Respond)
    };
    let anywhere = PeerConfig {
        id: ROAD,
        remote: crate::ike::config::Remote::Anywhere,
        remote_id: name("road.example"),
        psk: secret(),
        proposals: a.proposals.clone(),
        ..peer(A, Role::Respond)
    };
    let mut pair = pair_of(a, fixed);
    pair.tell_b(Command::SetPeer(Box::new(anywhere)));
    pair.up_a();
    pair.run(Duration::from_secs(5));
    pair.assert_agreement(1);
    assert_eq!(pair.b.child(0).unwrap().peer, ROAD);
    // The one that is expected there is still found.
    let office = PeerConfig {
        local_id: name("office.example"),
        ..peer(B, Role::Initiate)
    };
    pair.tell_a(Command::Down(PEER));
    pair.run(Duration::from_secs(5));
    pair.tell_a(Command::SetPeer(Box::new(office)));
    pair.up_a();
    pair.run(Duration::from_secs(5));
    pair.assert_agreement(1);
    assert_eq!(pair.b.child(0).unwrap().peer, PEER);
}

// RFC 6023 section 3.
#[test]
fn an_ike_sa_comes_up_without_a_child_which_then_has_a_key_exchange_of_its_own() {
    let esp = "aes256gcm16-x25519";
    let a = PeerConfig {
        childless: true,
        children: vec![child(0, &["10.1.0.0/24"], &["10.2.0.0/24"], esp)],
        ..peer(B, Role::Initiate)
    };
    let b = PeerConfig {
        children: vec![child(0, &["10.2.0.0/24"], &["10.1.0.0/24"], esp)],
        ..peer(A, Role::Respond)
    };
    let mut pair = pair_of(a, b);
    pair.up_a();
    pair.run(Duration::from_secs(3));
    pair.assert_agreement(1);
    assert!(pair.a.child(0).unwrap().suite.group.is_some());
    let (_, _, info) = pair.a.endpoint.established().next().unwrap();
    // IKE_SA_INIT, IKE_AUTH and CREATE_CHILD_SA were ours.
    assert_eq!((info.next_request, info.expected_request), (3, 0));
}

// RFC 6023 section 3: the responder says so in IKE_SA_INIT.
#[test]
fn a_responder_says_that_it_takes_ike_sas_without_a_child() {
    let mut pair = Pair::configured(1, Conditions::PERFECT);
    pair.up_a();
    pair.run(Duration::from_secs(3));
    let answer = Message::parse(&pair.network.sent[1].bytes).unwrap();
    assert!(answer.payloads.iter().any(|payload| matches!(
        payload,
        Payload::Notify(notify) if notify.kind == NotifyType::CHILDLESS_IKEV2_SUPPORTED
    )));
}
