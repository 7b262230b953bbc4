//! `ipsec-ctl status`: what is up, what carries it, and why not faster.

use std::{fmt::Write, net::SocketAddr};

use miette::IntoDiagnostic;

use super::{
    print,
    remote::Remote,
    summary,
    table::{age, bytes, columns},
};
use crate::{
    api::model::{Child, Direction, IkeSa, PeerAddress, State, Status, Tunnel},
    dataplane::seam::{FastPath, Nic, Offload},
};

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
    /// One line for each tunnel.
    #[arg(long, conflicts_with = "json")]
    summary: bool,
    /// Only this tunnel.
    #[arg(value_name = "NAME")]
    tunnel: Option<String>,
    #[command(flatten)]
    remote: Remote,
}

pub(super) fn run(options: &Options) -> miette::Result<()> {
    let mut status = options.remote.ask(async |client| client.status().await)?;
    if let Some(name) = &options.tunnel {
        let known = status
            .tunnels
            .iter()
            .map(|tunnel| tunnel.name.clone())
            .collect::<Vec<_>>()
            .join(", ");
        status.tunnels.retain(|tunnel| tunnel.name == *name);
        if status.tunnels.is_empty() {
            return Err(miette::miette!(
                help = format!("the daemon knows these: {known}"),
                "there is no tunnel `{name}`"
            ));
        }
    }
    let text = if options.json {
        serde_json::to_string_pretty(&status).into_diagnostic()? + "\n"
    } else if options.summary {
        summary::render(&status.tunnels)
    } else {
        render(&status)
    };
    print(&text)
}

fn render(status: &Status) -> String {
    let up = status
        .tunnels
        .iter()
        .filter(|tunnel| tunnel.state == State::Up)
        .count();
    let mut text = format!(
        "ipsec-xdp {}, instance {}, up {}, {} of memory, {up} of {} tunnels up\n",
        status.version,
        status.instance,
        age(status.uptime_seconds),
        bytes(status.memory_bytes),
        status.tunnels.len(),
    );
    let interfaces: Vec<Vec<String>> = status
        .interfaces
        .iter()
        .map(|interface| {
            vec![
                format!("interface {}", interface.name),
                interface.fast_path.clone(),
            ]
        })
        .collect();
    text.push_str(&columns(&interfaces));
    for tunnel in &status.tunnels {
        text.push('\n');
        text.push_str(&render_tunnel(tunnel));
    }
    text
}

fn render_tunnel(tunnel: &Tunnel) -> String {
    let mut rows = vec![vec![
        format!("tunnel {}", tunnel.name),
        format!(
            "{}, peer {}, {}",
            state(tunnel.state),
            tunnel.peer,
            tunnel.role
        ),
    ]];
    let mut row = |name: &str, value: String| rows.push(vec![format!("  {name}"), value]);
    row(
        "device",
        match tunnel.mtu {
            Some(mtu) => format!("{}, MTU {mtu}", tunnel.device),
            None => tunnel.device.clone(),
        },
    );
    if let Some(changed) = &tunnel.device_changed {
        row(
            "",
            format!(
                "ifindex {}, was {} with the other engine",
                changed.to, changed.from
            ),
        );
    }
    if let Some(failure) = &tunnel.last_failure {
        row("failed", failure.clone());
    }
    if tunnel.addresses.len() > 1 || tunnel.addresses.iter().any(|place| place.address.is_none()) {
        for place in &tunnel.addresses {
            row("address", peer_address(place));
        }
    }
    if let Some(ike) = &tunnel.ike {
        row("IKE SA", ike_sa(ike));
        row(
            "message IDs",
            format!(
                "next request {}, expected request {}",
                ike.next_request, ike.expected_request
            ),
        );
        row("peers", format!("{} <-> {}", ike.local_id, ike.remote_id));
    }
    if tunnel.fast_path == FastPath::On {
        row(
            "note",
            "fast path forced: bypasses netfilter and tc".to_owned(),
        );
    }
    for child in &tunnel.children {
        row(
            &format!("child {}", child.name),
            format!(
                "{}, {} <-> {}",
                state(child.state),
                child.local.join(", "),
                child.remote.join(", ")
            ),
        );
        child_rows(child, &mut row);
    }
    columns(&rows)
}

fn peer_address(place: &PeerAddress) -> String {
    let mut line = match place.address {
        Some(address) if address.to_string() != place.host => format!("{address} ({})", place.host),
        _ => place.host.clone(),
    };
    if place.in_use {
        line.push_str(", in use");
    }
    if let Some(failure) = &place.failure {
        let _ = write!(line, ", failed: {failure}");
    }
    line
}

fn child_rows(child: &Child, row: &mut impl FnMut(&str, String)) {
    if let Some(suite) = &child.suite {
        let mut line = suite.clone();
        if child.encapsulated {
            line.push_str(", in UDP");
        }
        if let Some(seconds) = child.age_seconds {
            let _ = write!(line, ", age {}", age(seconds));
        }
        row("  ESP", line);
    }
    for (name, direction, nic) in [
        ("  in", &child.inbound, &child.inbound_nic),
        ("  out", &child.outbound, &child.outbound_nic),
    ] {
        if let Some(direction) = direction {
            let mut line = traffic(direction);
            if let Some(nic) = nic {
                let _ = write!(line, ", {}", card(nic));
            }
            row(name, line);
        }
    }
}

fn traffic(direction: &Direction) -> String {
    let packets = direction
        .fast
        .packets
        .saturating_add(direction.slow.packets);
    let mut line = format!(
        "SPI {:#010x}, {packets} packets, {}, fast {}, slow {}, {}",
        direction.spi,
        bytes(direction.fast.bytes.saturating_add(direction.slow.bytes)),
        direction.fast.packets,
        direction.slow.packets,
        offload(direction.offload),
    );
    for (count, what) in [
        (direction.replayed, "replayed"),
        (direction.forged, "forged"),
    ] {
        if count > 0 {
            let _ = write!(line, ", {count} {what}");
        }
    }
    line
}

/// The ledger entry in words.
fn offload(offload: Offload) -> String {
    match offload {
        Offload::Full => "offloaded".to_owned(),
        Offload::Partial(why) => format!("offloaded in part ({})", why.name()),
        Offload::Declined(why) => format!("not offloaded ({})", why.name()),
        Offload::Kernel(why) => format!("kernel ESP ({})", why.name()),
        Offload::Policies(why) => format!("kernel ESP by policies alone ({})", why.name()),
    }
}

/// What the network card does, in words.
fn card(nic: &Nic) -> String {
    match nic {
        Nic::Crypto => "cryptography by the network card".to_owned(),
        Nic::Packet => "ESP by the network card".to_owned(),
        Nic::Declined { reason, words } if words.is_empty() => {
            format!("not by the network card ({})", reason.name())
        }
        Nic::Declined { reason, words } => {
            format!("not by the network card ({}: {words})", reason.name())
        }
    }
}

fn ike_sa(ike: &IkeSa) -> String {
    let address = |address: SocketAddr| {
        if address.port() == 500 {
            address.ip().to_string()
        } else {
            address.to_string()
        }
    };
    format!(
        "{} <-> {}, {}, age {}, {}, NAT {}{}, SPIs {} {}",
        address(ike.local),
        address(ike.remote),
        ike.suite,
        age(ike.age_seconds),
        if ike.initiator {
            "initiator"
        } else {
            "responder"
        },
        ike.nat,
        if ike.mobike { ", MOBIKE" } else { "" },
        ike.initiator_spi,
        ike.responder_spi,
    )
}

pub(super) fn state(state: State) -> &'static str {
    match state {
        State::Up => "up",
        State::Connecting => "connecting",
        State::Waiting => "waiting",
        State::Down => "down",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::model::Interface,
        dataplane::seam::{NicReason, OffloadReason, PathCounters},
    };

    fn office() -> Tunnel {
        let counters = |packets| PathCounters {
            packets,
            bytes: packets * 100,
        };
        let direction = |spi, offload| Direction {
            spi,
            offload,
            fast: counters(990),
            slow: counters(10),
            sequence: 1000,
            replayed: 0,
            forged: 2,
        };
        Tunnel {
            name: "office".to_owned(),
            state: State::Up,
            device: "ipx0".to_owned(),
            device_changed: None,
            mtu: Some(1422),
            peer: "203.0.113.9".to_owned(),
            addresses: Vec::new(),
            role: "initiate".to_owned(),
            last_failure: None,
            fast_path: FastPath::Auto,
            ike: Some(IkeSa {
                initiator_spi: "0102030405060708".to_owned(),
                responder_spi: "1112131415161718".to_owned(),
                initiator: true,
                suite: "aes256-sha512-ecp521".to_owned(),
                local: "192.0.2.1:500".parse().unwrap(),
                remote: "203.0.113.9:500".parse().unwrap(),
                local_id: "192.0.2.1".to_owned(),
                remote_id: "203.0.113.9".to_owned(),
                nat: "none".to_owned(),
                mobike: true,
                age_seconds: 61,
                next_request: 5,
                expected_request: 3,
            }),
            children: vec![Child {
                name: "net".to_owned(),
                state: State::Up,
                local: vec!["10.1.0.0/24".to_owned()],
                remote: vec!["10.2.0.0/24".to_owned()],
                suite: Some("aes256-sha512".to_owned()),
                age_seconds: Some(61),
                encapsulated: false,
                inbound: Some(direction(0xc0ff_ee01, Offload::Full)),
                outbound: Some(direction(
                    7,
                    Offload::Declined(OffloadReason::NetfilterRules),
                )),
                inbound_nic: Some(Nic::Crypto),
                outbound_nic: Some(Nic::Declined {
                    reason: NicReason::Refused,
                    words: "no more room".to_owned(),
                }),
            }],
        }
    }

    #[test]
    fn the_operator_sees_which_direction_is_offloaded_and_why_the_other_is_not() {
        let text = render(&Status {
            version: "0.1.0".to_owned(),
            instance: "default".to_owned(),
            uptime_seconds: 62,
            memory_bytes: 12 << 20,
            interfaces: vec![Interface {
                name: "wan0".to_owned(),
                fast_path: "native XDP, AF_XDP copy mode, 1 queue".to_owned(),
            }],
            tunnels: vec![office()],
        });
        for expected in [
            "1 of 1 tunnels up",
            "interface wan0  native XDP, AF_XDP copy mode, 1 queue",
            "tunnel office  up, peer 203.0.113.9, initiate",
            "ipx0, MTU 1422",
            "192.0.2.1 <-> 203.0.113.9, aes256-sha512-ecp521, age 1m01s, initiator, NAT none",
            "next request 5, expected request 3",
            "up, 10.1.0.0/24 <-> 10.2.0.0/24",
            "SPI 0xc0ffee01, 1000 packets, 97.6 KiB, fast 990, slow 10, offloaded, 2 forged, cryptography by the network card",
            "not by the network card (refused: no more room)",
            "SPI 0x00000007, 1000 packets, 97.6 KiB, fast 990, slow 10, not offloaded (netfilter-rules)",
        ] {
            assert!(
                text.contains(expected),
                "{expected:?} is missing in\n{text}"
            );
        }
    }

    #[test]
    fn the_summary_has_a_line_for_each_tunnel() {
        let mut waiting = office();
        "branch".clone_into(&mut waiting.name);
        waiting.state = State::Waiting;
        waiting.ike = None;
        waiting.children[0].state = State::Waiting;
        waiting.children[0].inbound = None;
        waiting.children[0].outbound = None;
        waiting.last_failure = Some("no answer".to_owned());
        assert_eq!(
            summary::render(&[office(), waiting]),
            "TUNNEL  STATE    PEER         UP     CHILDREN  IN        OUT       OFFLOADED  FAILED\n\
             office  up       203.0.113.9  1m01s  1/1       97.6 KiB  97.6 KiB  1/2 SAs\n\
             branch  waiting  203.0.113.9  -      0/1       0 B       0 B       0/0 SAs    no answer\n"
        );
    }

    #[test]
    fn a_tunnel_that_failed_shows_its_reason() {
        let mut tunnel = office();
        tunnel.state = State::Waiting;
        tunnel.ike = None;
        tunnel.children.clear();
        tunnel.last_failure = Some("the peer refused every proposal".to_owned());
        let text = render_tunnel(&tunnel);
        assert!(text.contains("waiting"), "{text}");
        assert!(
            text.contains("failed       the peer refused every proposal"),
            "{text}"
        );
    }
}
