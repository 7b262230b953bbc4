//! Transport mode (RFC 7296 section 1.3.1): agreed on by both sides, or not at all.

use std::time::Duration;

use super::{
    network::Conditions,
    pair::{A, B, PEER, Pair, peer},
};
use crate::ike::{
    config::{Mode, NatPolicy, Role},
    event::{Command, FailureReason, Rekey},
};

const SOON: Duration = Duration::from_secs(3);

/// Two gateways whose child is in these modes, and the initiator's idea of NATs.
fn pair(at_a: Mode, at_b: Mode, nat: NatPolicy) -> Pair {
    let mut pair = Pair::configured(1, Conditions::PERFECT);
    let (mut a, mut b) = (peer(B, Role::Initiate), peer(A, Role::Respond));
    a.children[0].mode = at_a;
    a.nat = nat;
    b.children[0].mode = at_b;
    pair.tell_a(Command::SetPeer(Box::new(a)));
    pair.tell_b(Command::SetPeer(Box::new(b)));
    pair.up_a();
    pair.run(SOON);
    pair
}

#[test]
fn a_child_in_transport_mode_comes_up_and_is_rekeyed_by_either_side() {
    let mut pair = pair(Mode::Transport, Mode::Transport, NatPolicy::Auto);
    pair.assert_agreement(1);
    for by_a in [true, false] {
        let before = pair.a.child(0).unwrap().spi_in;
        let rekey = Command::Rekey(PEER, Rekey::Children);
        if by_a {
            pair.tell_a(rekey);
        } else {
            pair.tell_b(rekey);
        }
        pair.run(Duration::from_secs(30));
        pair.assert_agreement(1);
        assert_ne!(pair.a.child(0).unwrap().spi_in, before);
    }
    assert!(pair.a.failures.is_empty() && pair.b.failures.is_empty());
}

#[test]
fn a_responder_in_tunnel_mode_declines_and_the_initiator_takes_the_child_down() {
    let pair = pair(Mode::Transport, Mode::Tunnel, NatPolicy::Auto);
    pair.assert_agreement(0);
    assert_eq!(pair.a.failures[0].reason, FailureReason::BadMessage);
    assert!(pair.a.failures[0].to_string().contains("tunnel mode"));
}

#[test]
fn a_responder_in_transport_mode_refuses_tunnel_mode() {
    let pair = pair(Mode::Tunnel, Mode::Transport, NatPolicy::Auto);
    pair.assert_agreement(0);
    assert_eq!(pair.b.failures[0].reason, FailureReason::WeRefusedProposals);
    assert!(pair.b.failures[0].to_string().contains("tunnel mode"));
}

#[test]
fn transport_mode_is_refused_where_esp_goes_in_udp() {
    let pair = pair(Mode::Transport, Mode::Transport, NatPolicy::Force);
    pair.assert_agreement(0);
    let reason = FailureReason::PeerRefusedProposals;
    assert_eq!(pair.a.failures[0].reason, reason);
    assert!(pair.b.failures[0].to_string().contains("NAT"));
}
