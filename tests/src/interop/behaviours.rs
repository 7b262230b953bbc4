//! What peers do besides negotiating a suite, and how tunnels are set up: identities, selectors, NAT, cookies, groups.

use std::net::IpAddr;

use anyhow::{Context, bail, ensure};

use super::{Cell, Column, Kind, SUITE, life, talk, topology};
use crate::{
    attack::{Attacker, captured, ike_message, udp, with_initiator_spi},
    capture::{Capture, Kind as PacketKind},
    connection::Connection,
    gateway::Tunnel,
    names::NameServer,
    topology::{Family, Options, Side, Topology, attacker},
};

const V4: Family = Family::V4;

/// Which columns a row is tried in.
type Columns = fn(&Column) -> bool;
type Row = (&'static str, Columns, fn(&Column) -> anyhow::Result<()>);

const ALL: Columns = |_| true;
const STRONGSWAN: Columns = |column| column.kind == Kind::StrongSwan;
/// As initiator libreswan starts no IKE SA without a child, and its requests are too short to be split.
const NOT_OF_LIBRESWAN: Columns = |column| column.kind == Kind::StrongSwan || column.we_initiate;
/// libreswan 4 has one selector a side, and rekeys children in the group of the IKE SA whatever its configuration says.
const NOT_OF_LIBRESWAN_4: Columns = |column| !column.peer.starts_with("libreswan 4");
/// Only our role as responder is of interest.
const WE_RESPOND: Columns = |column| !column.we_initiate;

const ROWS: &[Row] = &[
    ("PSK, identities are addresses", ALL, |column| {
        identities(column, ("198.51.100.2", "203.0.113.2"))
    }),
    ("PSK, identities are IPv6 addresses", ALL, |column| {
        identities(column, ("2001:db8:a::2", "2001:db8:b::2"))
    }),
    ("PSK, identities are mailboxes", ALL, |column| {
        identities(column, ("a@example.org", "b@example.org"))
    }),
    ("PSK, identities are key ids", ALL, |column| {
        identities(column, ("keyid:left", "keyid:right"))
    }),
    ("the responder narrows the selectors", ALL, narrowing),
    (
        "two selectors a side in one child",
        NOT_OF_LIBRESWAN_4,
        several_selectors,
    ),
    ("selectors with protocol and port", ALL, protocol_and_port),
    ("a selector that is a range", STRONGSWAN, range),
    ("selectors 0.0.0.0/0", ALL, everything),
    ("IPv6 outside", ALL, |column| {
        families(column, Family::V6, Family::V4)
    }),
    ("IPv6 inside", ALL, |column| {
        families(column, Family::V4, Family::V6)
    }),
    ("the peer has a name", ALL, name),
    (
        "IKE_AUTH without a child (RFC 6023)",
        NOT_OF_LIBRESWAN,
        childless,
    ),
    ("NAT before the initiator", ALL, nat),
    ("the initiator's address moves (MOBIKE)", ALL, life::moves),
    ("the responder demands a cookie", ALL, cookies),
    (
        "the responder wants another group (INVALID_KE)",
        ALL,
        other_group,
    ),
    ("IKE messages in fragments", NOT_OF_LIBRESWAN, fragments),
    ("the peer rekeys the child under traffic", ALL, |column| {
        life::replaced(column, |_, peer| peer.rekey_child("net"))
    }),
    ("the peer rekeys the IKE SA under traffic", ALL, |column| {
        life::replaced(column, |_, peer| peer.rekey_ike())
    }),
    (
        "the peer reauthenticates under traffic",
        STRONGSWAN,
        |column| life::replaced(column, |_, peer| peer.reauthenticate()),
    ),
    ("we rekey the child under traffic", ALL, |column| {
        life::replaced(column, |gateway, _| gateway.rekey("site").map(drop))
    }),
    ("we rekey the IKE SA under traffic", ALL, |column| {
        life::replaced(column, |gateway, _| gateway.rekey_ike("site").map(drop))
    }),
    ("the peer rekeys the child with PFS", ALL, |column| {
        life::pfs(column, life::SAME_GROUP, |_, peer| peer.rekey_child("net"))
    }),
    ("we rekey the child with PFS", ALL, |column| {
        life::pfs(column, life::SAME_GROUP, |gateway, _| {
            gateway.rekey("site").map(drop)
        })
    }),
    (
        "the peer rekeys the child in another group than the IKE SA's",
        NOT_OF_LIBRESWAN_4,
        |column| life::pfs(column, life::OTHER_GROUP, |_, peer| peer.rekey_child("net")),
    ),
    (
        "we rekey the child in another group than the IKE SA's",
        NOT_OF_LIBRESWAN_4,
        |column| {
            life::pfs(column, life::OTHER_GROUP, |gateway, _| {
                gateway.rekey("site").map(drop)
            })
        },
    ),
    (
        "the peer deletes the child, and makes another",
        ALL,
        life::peer_deletes_child,
    ),
    ("the peer deletes the IKE SA", ALL, life::peer_deletes),
    ("we delete the IKE SA", ALL, life::we_delete),
    ("the peer freezes past DPD", ALL, life::peer_freezes),
    ("we freeze past DPD", ALL, life::we_freeze),
    ("the peer is killed and calls again", ALL, |column| {
        life::peer_returns(column, true)
    }),
    ("the same without INITIAL_CONTACT", ALL, |column| {
        life::peer_returns(column, false)
    }),
    (
        "we are killed under traffic and come back to the same SAs",
        ALL,
        life::we_come_back,
    ),
    (
        "we are killed, have lost all SAs, and call again",
        ALL,
        life::we_return,
    ),
    (
        "one identity calls from two addresses, our unique = keep or replace",
        WE_RESPOND,
        unique,
    ),
];

pub(super) fn run(column: &Column, filter: &str, done: &(dyn Fn(&Cell) + Sync)) -> Vec<Cell> {
    ROWS.iter()
        .filter(|(name, tried_in, _)| name.contains(filter) && tried_in(column))
        .map(|(name, _, behaviour)| {
            let cell = column.cell("Behaviours", name, behaviour(column));
            done(&cell);
            cell
        })
        .collect()
}

/// The tunnel comes up and carries pings.
fn works(column: &Column, (tunnel, connection): (Tunnel, Connection)) -> anyhow::Result<()> {
    let topology = topology()?;
    let _ends = column.up(&topology, (tunnel, &connection))?;
    talk(&topology, V4)
}

fn identities(column: &Column, (left, right): (&str, &str)) -> anyhow::Result<()> {
    let (mut tunnel, mut connection) = column.plan();
    (tunnel.local_id, tunnel.remote_id) = (left.to_owned(), right.to_owned());
    (connection.local_id, connection.remote_id) = (right.to_owned(), left.to_owned());
    works(column, (tunnel, connection))
}

fn narrowing(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (mut tunnel, mut connection) = column.plan();
    if column.we_initiate {
        "10.2.0.0/28".clone_into(&mut connection.children[0].local);
    } else {
        tunnel.children[0].remote = vec!["10.2.0.0/28".to_owned()];
    }
    if column.kind == Kind::LibreSwan {
        connection.lines.push("narrowing=yes".to_owned());
    }
    let (gateway, _peer) = column.up(&topology, (tunnel, &connection))?;
    let children = gateway.tunnel("site")?.children;
    ensure!(children[0].remote == ["10.2.0.0/28"], "{children:?}");
    talk(&topology, V4)
}

fn several_selectors(column: &Column) -> anyhow::Result<()> {
    let halves = |site: u8| vec![format!("10.{site}.0.0/25"), format!("10.{site}.0.128/25")];
    let (mut tunnel, mut connection) = column.plan();
    tunnel.children[0].local = halves(1);
    tunnel.children[0].remote = halves(2);
    connection.children[0].local = halves(2).join(",");
    connection.children[0].remote = halves(1).join(",");
    let topology = topology()?;
    // strongSwan 5.9 installs no route without an address of its own inside each selector.
    topology.gateway_b.ip("addr add 10.2.0.129/24 dev lan")?;
    let (gateway, _peer) = column.up(&topology, (tunnel, &connection))?;
    let children = gateway.tunnel("site")?.children;
    ensure!(
        children[0].local.len() == 2 && children[0].remote.len() == 2,
        "{children:?}"
    );
    talk(&topology, V4)
}

fn protocol_and_port(column: &Column) -> anyhow::Result<()> {
    let (mut tunnel, mut connection) = column.plan();
    tunnel.children[0].local = vec!["10.1.0.0/24 icmp".to_owned()];
    tunnel.children[0].remote = vec!["10.2.0.0/24 icmp".to_owned()];
    match column.kind {
        Kind::StrongSwan => {
            "10.2.0.0/24[1/any]".clone_into(&mut connection.children[0].local);
            "10.1.0.0/24[1/any]".clone_into(&mut connection.children[0].remote);
        }
        Kind::LibreSwan => {
            connection.lines = ["leftprotoport=icmp", "rightprotoport=icmp"]
                .map(str::to_owned)
                .to_vec();
        }
    }
    works(column, (tunnel, connection))
}

fn range(column: &Column) -> anyhow::Result<()> {
    let (mut tunnel, mut connection) = column.plan();
    tunnel.children[0].remote = vec!["10.2.0.1-10.2.0.77".to_owned()];
    "10.2.0.1-10.2.0.77".clone_into(&mut connection.children[0].local);
    works(column, (tunnel, connection))
}

fn everything(column: &Column) -> anyhow::Result<()> {
    let all = || "0.0.0.0/0".to_owned();
    let (mut tunnel, mut connection) = column.plan();
    tunnel.children[0].local = vec![all()];
    tunnel.children[0].remote = vec![all()];
    connection.children[0].local = all();
    connection.children[0].remote = all();
    let topology = topology()?;
    let _ends = column.up(&topology, (tunnel, &connection))?;
    // The peer would have even what is for its own site, or comes from there, in the tunnel. libreswan removes all policies when it starts.
    let exempt: &[&str] = match column.kind {
        Kind::StrongSwan => &["rule add to 10.2.0.0/24 lookup main pref 100"],
        Kind::LibreSwan => &[
            "xfrm policy add dst 10.2.0.0/24 dir out priority 1",
            "xfrm policy add src 10.2.0.0/24 dir fwd priority 1",
        ],
    };
    for exempt in exempt {
        topology.gateway_b.ip(exempt)?;
    }
    talk(&topology, V4)
}

fn families(column: &Column, outside: Family, inside: Family) -> anyhow::Result<()> {
    let (mut tunnel, mut connection) = column.plan();
    tunnel.peer = Side::B.outside(outside).to_string();
    connection.local = Some(Side::B.outside(outside));
    connection.remote = Some(Side::A.outside(outside).to_string());
    tunnel.children[0].local = vec![Side::A.prefix(inside)];
    tunnel.children[0].remote = vec![Side::B.prefix(inside)];
    connection.children[0].local = Side::B.prefix(inside);
    connection.children[0].remote = Side::A.prefix(inside);
    let topology = topology()?;
    let _ends = column.up(&topology, (tunnel, &connection))?;
    talk(&topology, inside)
}

/// The side that starts knows the other by a name.
fn name(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (mut tunnel, mut connection) = column.plan();
    let (asks, address) = if column.we_initiate {
        "gateway.example".clone_into(&mut tunnel.peer);
        (&topology.gateway_a, Side::B.outside(V4))
    } else {
        connection.remote = Some("gateway.example".to_owned());
        (&topology.gateway_b, Side::A.outside(V4))
    };
    let IpAddr::V4(address) = address else {
        bail!("{address} is not IPv4")
    };
    let _names = NameServer::start(asks, address)?;
    let _ends = column.up(&topology, (tunnel, &connection))?;
    talk(&topology, V4)
}

fn childless(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, mut connection) = column.plan();
    if column.kind == Kind::StrongSwan {
        let theirs = if column.we_initiate { "allow" } else { "force" };
        connection.lines = vec![format!("childless = {theirs}")];
    }
    let tunnel = tunnel.with("childless = true");
    let (gateway, _peer) = column.up(&topology, (tunnel, &connection))?;
    // After IKE_SA_INIT and IKE_AUTH, CREATE_CHILD_SA was the third exchange.
    let ike = gateway.tunnel("site")?.ike.context("no IKE SA")?;
    let exchanges = if column.we_initiate {
        ike.next_request
    } else {
        ike.expected_request
    };
    ensure!(exchanges >= 3, "{ike:?}");
    talk(&topology, V4)
}

/// The peer calls, and somebody with its identity and key does so from elsewhere.
fn unique(column: &Column) -> anyhow::Result<()> {
    for keeps in [true, false] {
        let topology = topology()?;
        let (tunnel, mut connection) = column.plan();
        let ours = if keeps { "keep" } else { "replace" };
        let tunnel = tunnel
            .respond_to_any()
            .with(&format!("unique = \"{ours}\""));
        connection.initial_contact = false;
        let (gateway, _first) = column.up(&topology, (tunnel, &connection))?;
        talk(&topology, V4)?;
        // strongSwan 5.9 installs no child without an address of its own inside the child's selectors.
        topology.attacker.ip("addr add 10.2.0.2/32 dev lo")?;
        let second = column.start(&topology.attacker, &[])?;
        connection.local = None;
        second.load(&connection)?;
        let came = second.initiate("net").is_ok();
        ensure!(
            came != keeps && keeps == second.has_logged("AUTHENTICATION_FAILED"),
            "{ours}: the second one came up: {came}\n{}",
            second.log(20)
        );
        let at = gateway.tunnel("site")?.ike.context("no IKE SA")?.remote;
        let expected = if keeps {
            Side::B.outside(V4)
        } else {
            attacker(V4)
        };
        ensure!(at.ip() == expected, "{ours}: the peer is at {at}");
    }
    Ok(())
}

fn nat(column: &Column) -> anyhow::Result<()> {
    let topology = Topology::build(Options {
        nat: true,
        ..Options::default()
    })?;
    // Who starts is behind the NAT, at site A.
    if column.we_initiate {
        let (_, connection) = column.plan();
        let connection = Connection {
            remote: None,
            ..connection
        };
        let tunnel = Tunnel::between_sites(Side::A, V4).suite(SUITE.0, SUITE.1);
        let _ends = column.up(&topology, (tunnel, &connection))?;
        return talk(&topology, V4);
    }
    let tunnel = Tunnel::between_sites(Side::B, V4)
        .suite(SUITE.0, SUITE.1)
        .respond_to_any();
    let (_, connection) = column.plan_for(Side::B, SUITE);
    let peer = column.start(&topology.gateway_a, &[])?;
    let _gateway = column.connect(&topology.gateway_b, &peer, (tunnel, &connection), "")?;
    talk(&topology, V4)
}

fn cookies(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, mut connection) = column.plan();
    let capture = Capture::start(&topology.router)?;
    let (settings, top): (&[&str], _) = match (column.we_initiate, column.kind) {
        (true, Kind::StrongSwan) => (&["cookie_threshold = 1"], ""),
        (true, Kind::LibreSwan) => (&["ddos-mode=busy"], ""),
        (false, _) => (&[], "[limits]\ncookie_threshold = 0"),
    };
    let peer = column.start(&topology.gateway_b, settings)?;
    if column.we_initiate && column.kind == Kind::StrongSwan {
        // It leaves no IKE SA half open for an address that no connection is for.
        connection.remote = None;
        peer.load(&connection)?;
        drop(column.connect(
            &topology.gateway_a,
            &peer,
            (tunnel.clone(), &connection),
            "",
        )?);
        half_open(&topology, &capture)?;
    }
    let _gateway = column.connect(&topology.gateway_a, &peer, (tunnel, &connection), top)?;
    // RFC 7296 section 2.6: the request is repeated, the cookie in front.
    let starter = if column.we_initiate { Side::A } else { Side::B };
    let repeated = messages(&capture, starter.other()).iter().any(|message| {
        message.get(NEXT_PAYLOAD) == Some(&NOTIFY) && message.get(EXCHANGE) == Some(&IKE_SA_INIT)
    });
    ensure!(repeated, "no cookie came back\n{peer}");
    talk(&topology, V4)
}

/// Where an IKE header (RFC 7296 section 3.1) tells what comes first and which exchange it is.
const NEXT_PAYLOAD: usize = 16;
const EXCHANGE: usize = 18;
/// Values of these.
const NOTIFY: u8 = 41;
const FRAGMENT: u8 = 53;
const IKE_SA_INIT: u8 = 34;

/// The IKE messages of a capture that went to a side on port 500; on port 4500 they begin with a marker, which is left out.
fn messages(capture: &Capture, to: Side) -> Vec<Vec<u8>> {
    let report = capture.report();
    let packets = captured(&report, PacketKind::Ike, to.outside(V4));
    let message = |packet: &&[u8]| {
        let message = ike_message(packet).ok()?;
        Some(message.strip_prefix(&[0; 4]).unwrap_or(message).to_vec())
    };
    packets.iter().filter_map(message).collect()
}

/// Leaves IKE SAs half open at gateway B: the first message of a capture, from another address.
fn half_open(topology: &Topology, capture: &Capture) -> anyhow::Result<()> {
    let report = capture.report();
    let packets = captured(&report, PacketKind::Ike, Side::B.outside(V4));
    let message = ike_message(packets.first().context("no IKE_SA_INIT was captured")?)?;
    let attacker = Attacker::new(&topology.attacker)?;
    for number in 0..3 {
        attacker.send(&udp(
            ([192, 0, 2, 66].into(), 500),
            ([203, 0, 113, 2].into(), 500),
            &with_initiator_spi(message, number),
        )?)?;
    }
    Ok(())
}

fn other_group(column: &Column) -> anyhow::Result<()> {
    let (both, one) = (
        "aes256gcm16-prfsha384-x25519-ecp256",
        "aes256gcm16-prfsha384-ecp256",
    );
    let (ours, theirs) = if column.we_initiate {
        (both, one)
    } else {
        (one, both)
    };
    let (tunnel, _) = column.plan_for(Side::A, (ours, SUITE.1));
    let (_, connection) = column.plan_for(Side::A, (theirs, SUITE.1));
    works(column, (tunnel, connection))
}

// RFC 7383: with a dozen ESP proposals IKE_AUTH is longer than 576 bytes.
fn fragments(column: &Column) -> anyhow::Result<()> {
    let proposals: Vec<String> = ["aes256", "aes192", "aes128"]
        .iter()
        .flat_map(|cipher| ["sha512", "sha384", "sha256"].map(|hash| format!("{cipher}-{hash}")))
        .chain(["aes256gcm16", "aes128gcm16", "chacha20poly1305"].map(str::to_owned))
        .collect();
    let (tunnel, mut connection) = column.plan();
    let mut tunnel = tunnel.with("fragment_size = 576");
    tunnel.children[0].lines = vec![format!("esp = {proposals:?}")];
    connection.fragments = true;
    connection.children[0].esp = proposals.join(",");
    let topology = topology()?;
    let capture = Capture::start(&topology.router)?;
    let (_gateway, peer) = column.up(&topology, (tunnel, &connection))?;
    let starter = if column.we_initiate { Side::A } else { Side::B };
    let split = messages(&capture, starter.other())
        .iter()
        .any(|message| message.get(NEXT_PAYLOAD) == Some(&FRAGMENT));
    ensure!(split, "no fragment was seen\n{peer}");
    talk(&topology, V4)
}
