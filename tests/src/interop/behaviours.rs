//! What peers do besides negotiating a suite: identities, selectors, NAT, cookies, rekeying, deaths and returns.

use std::{net::IpAddr, thread, time::Duration};

use anyhow::{Context, bail, ensure};
use ipsec_ctl::api::model::State;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{Cell, Column, SUITE, talk, topology};
use crate::{
    attack::{Attacker, captured, ike_message, udp, with_initiator_spi},
    capture::{Capture, Kind},
    command::wait_for,
    gateway::{Gateway, Tunnel},
    hops::Hops,
    names::NameServer,
    pair::PATIENCE,
    ping::Ping,
    strongswan::{Connection, StrongSwan},
    topology::{Family, Options, Side, Topology, attacker},
    udp::{Flow, Running},
};

const V4: Family = Family::V4;
/// Long enough for a peer to be given up, with retransmissions.
const DEATH: Duration = Duration::from_secs(40);
/// Our liveness checks where they matter.
const DPD: &str = "dpd = { interval = \"2s\", timeout = \"6s\" }";

/// Packets of a flow at 200 a second that the peer may lose while it replaces an SA.
const MOST_LOST_BY_PEER: u64 = 10;

type Behaviour = (&'static str, fn(&Column) -> anyhow::Result<()>);

const ALL: &[Behaviour] = &[
    ("PSK, identities are addresses", |column| {
        identities(column, ("198.51.100.2", "203.0.113.2"))
    }),
    ("PSK, identities are IPv6 addresses", |column| {
        identities(column, ("2001:db8:a::2", "2001:db8:b::2"))
    }),
    ("PSK, identities are mailboxes", |column| {
        identities(column, ("a@example.org", "b@example.org"))
    }),
    ("PSK, identities are key ids", |column| {
        identities(column, ("keyid:left", "keyid:right"))
    }),
    ("the responder narrows the selectors", narrowing),
    ("two selectors a side in one child", several_selectors),
    ("selectors with protocol and port", protocol_and_port),
    ("a selector that is a range", range),
    ("selectors 0.0.0.0/0", everything),
    ("IPv6 outside", |column| {
        families(column, Family::V6, Family::V4)
    }),
    ("IPv6 inside", |column| {
        families(column, Family::V4, Family::V6)
    }),
    ("the peer has a name", name),
    ("IKE_AUTH without a child (RFC 6023)", childless),
    ("NAT before the initiator", nat),
    ("the initiator's address moves (MOBIKE)", moves),
    ("the responder demands a cookie", cookies),
    (
        "the responder wants another group (INVALID_KE)",
        other_group,
    ),
    ("IKE messages in fragments", fragments),
    ("the peer rekeys the child under traffic", |column| {
        peer_rekeys(column, |swan| swan.rekey_child("net"))
    }),
    ("the peer rekeys the IKE SA under traffic", |column| {
        peer_rekeys(column, StrongSwan::rekey_ike)
    }),
    ("the peer reauthenticates under traffic", |column| {
        peer_rekeys(column, StrongSwan::reauthenticate)
    }),
    ("we rekey the child under traffic", |column| {
        replaced(column, |gateway, _| gateway.rekey("site").map(drop))
    }),
    ("we rekey the IKE SA under traffic", |column| {
        replaced(column, |gateway, _| gateway.rekey_ike("site").map(drop))
    }),
    ("the peer rekeys the child with PFS", pfs_rekey),
    (
        "the peer deletes the child, and makes another",
        peer_deletes_child,
    ),
    ("the peer deletes the IKE SA", peer_deletes),
    ("we delete the IKE SA", we_delete),
    ("the peer freezes past DPD", peer_freezes),
    ("we freeze past DPD", we_freeze),
    ("the peer is killed and calls again", |column| {
        peer_returns(column, "unique = replace")
    }),
    ("the same without INITIAL_CONTACT", |column| {
        peer_returns(column, "unique = never")
    }),
    ("we are killed and call again", we_return),
];

/// Those in which only our role as responder is of interest.
const AS_RESPONDER: &[Behaviour] = &[(
    "one identity calls from two addresses, our unique = keep or replace",
    unique,
)];

pub(super) fn run(column: &Column, filter: &str, done: &(dyn Fn(&Cell) + Sync)) -> Vec<Cell> {
    let further = if column.we_initiate {
        &[][..]
    } else {
        AS_RESPONDER
    };
    ALL.iter()
        .chain(further)
        .filter(|(name, _)| name.contains(filter))
        .map(|(name, behaviour)| {
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
    let (gateway, swan) = column.up(&topology, (tunnel, &connection))?;
    let children = gateway.tunnel("site")?.children;
    ensure!(children[0].remote == ["10.2.0.0/28"], "{children:?}");
    ensure!(swan.sas()?.contains("10.2.0.0/28"), "{}", swan.sas()?);
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
    let (gateway, _swan) = column.up(&topology, (tunnel, &connection))?;
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
    "10.2.0.0/24[1/any]".clone_into(&mut connection.children[0].local);
    "10.1.0.0/24[1/any]".clone_into(&mut connection.children[0].remote);
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
    // strongSwan's route takes even what is for its own site, unless a rule comes before.
    topology
        .gateway_b
        .ip("rule add to 10.2.0.0/24 lookup main pref 100")?;
    let _ends = column.up(&topology, (tunnel, &connection))?;
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
    let theirs = if column.we_initiate { "allow" } else { "force" };
    connection.lines = vec![format!("childless = {theirs}")];
    let tunnel = tunnel.with("childless = true");
    let (_gateway, swan) = column.up(&topology, (tunnel, &connection))?;
    ensure!(swan.has_logged("CREATE_CHILD_SA"), "{}", swan.log(30));
    talk(&topology, V4)
}

fn moves(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, mut connection) = column.plan();
    connection.mobike = true;
    connection.local = None;
    let (gateway, swan) = column.up(&topology, (tunnel, &connection))?;
    let before = gateway.tunnel("site")?.ike.context("no IKE SA")?;
    ensure!(before.mobike, "MOBIKE was not agreed on");
    let side = if column.we_initiate { Side::A } else { Side::B };
    topology.renumber(side, side.outside(V4), side.elsewhere())?;
    let moved = gateway
        .wait("site", "elsewhere", PATIENCE, |tunnel| {
            let at = tunnel.ike.as_ref().map(|ike| (ike.local, ike.remote));
            // It may also take an IPv6 address that it was told of.
            at.is_some_and(|(ours, theirs)| ![ours.ip(), theirs.ip()].contains(&side.outside(V4)))
        })
        .with_context(|| format!("log of the peer:\n{}", swan.log(30)))?;
    let ike = moved.ike.context("no IKE SA")?;
    ensure!(ike.initiator_spi == before.initiator_spi, "another IKE SA");
    wait_for("traffic", PATIENCE, || Ok(talk(&topology, V4).ok()))
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
        // It does not say INITIAL_CONTACT.
        connection.lines = vec!["unique = never".to_owned()];
        let (gateway, _first) = column.up(&topology, (tunnel, &connection))?;
        talk(&topology, V4)?;
        // strongSwan 5.9 installs no child without an address of its own inside the child's selectors.
        topology.attacker.ip("addr add 10.2.0.2/32 dev lo")?;
        let second = StrongSwan::start_release(&column.release, &topology.attacker, &[])?;
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
    let swan = StrongSwan::start_release(&column.release, &topology.gateway_a, &[])?;
    let _gateway = column.connect(&topology.gateway_b, &swan, (tunnel, &connection), "")?;
    talk(&topology, V4)
}

fn cookies(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, mut connection) = column.plan();
    if column.we_initiate {
        // It leaves no IKE SA half open for an address that no connection is for.
        connection.remote = None;
        let swan = StrongSwan::start_release(
            &column.release,
            &topology.gateway_b,
            &["cookie_threshold = 1"],
        )?;
        swan.load(&connection)?;
        let capture = Capture::start(&topology.router)?;
        {
            let _gateway = column.connect(
                &topology.gateway_a,
                &swan,
                (tunnel.clone(), &connection),
                "",
            )?;
        }
        half_open(&topology, &capture)?;
        let _gateway = column.connect(&topology.gateway_a, &swan, (tunnel, &connection), "")?;
        ensure!(
            swan.has_logged("COOKIE"),
            "strongSwan demanded no cookie:\n{}",
            swan.log(200)
        );
        return talk(&topology, V4);
    }
    let swan = StrongSwan::start_release(&column.release, &topology.gateway_b, &[])?;
    let _gateway = column.connect(
        &topology.gateway_a,
        &swan,
        (tunnel, &connection),
        "[limits]\ncookie_threshold = 0",
    )?;
    ensure!(swan.has_logged("N(COOKIE)"), "{}", swan.log(20));
    talk(&topology, V4)
}

/// Leaves IKE SAs half open at gateway B: the first message of a capture, from another address.
fn half_open(topology: &Topology, capture: &Capture) -> anyhow::Result<()> {
    let report = capture.report();
    let packets = captured(&report, Kind::Ike, Side::B.outside(V4));
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
    let (_gateway, swan) = column.up(&topology, (tunnel, &connection))?;
    ensure!(swan.has_logged("fragment"), "{}", swan.log(40));
    talk(&topology, V4)
}

/// The peer replaces SAs while packets flow.
fn peer_rekeys(
    column: &Column,
    rekey: impl Fn(&StrongSwan) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    replaced(column, |_, swan| rekey(swan))
}

/// SAs are replaced while packets flow, and none is lost. It is done by command, so that no lifetime ends meanwhile: whatever we
/// do not seal we have lost, however slow the machine is.
fn replaced(
    column: &Column,
    replace: impl Fn(&Gateway<'_>, &StrongSwan) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = column.plan();
    let (gateway, swan) = column.up(&topology, (tunnel, &connection))?;
    talk(&topology, V4)?;
    let before = gateway.spis("site")?;
    let (hops, flow) = (Hops::count(&topology)?, traffic(&topology)?);
    replace(&gateway, &swan)?;
    gateway
        .wait("site", "rekeyed", PATIENCE, |_| {
            gateway.spis("site").is_ok_and(|now| now != before)
        })
        .with_context(|| format!("log of the peer:\n{}", swan.log(20)))?;
    settle(flow, &hops).with_context(|| format!("what we have dropped: {}", dropped(&gateway)))?;
    talk(&topology, V4)
}

/// Lets the traffic go on for a while after what has happened: then we must have sealed all of it, and the peer may have
/// dropped what came on an SA that it had just removed.
fn settle(flow: Running, hops: &Hops<'_>) -> anyhow::Result<()> {
    thread::sleep(Duration::from_secs(1));
    let report = flow.cut()?;
    let sealed = hops.towards(Side::B)?;
    ensure!(
        sealed >= report.sent && report.refused == 0 && report.damaged == 0,
        "we lost packets: {report}, {sealed} sealed"
    );
    ensure!(
        report.lost() <= MOST_LOST_BY_PEER,
        "the peer lost packets: {report}, {sealed} sealed"
    );
    Ok(())
}

/// Reasons for which a gateway has dropped packets.
fn dropped(gateway: &Gateway<'_>) -> String {
    let counters = gateway.counters().unwrap_or_default();
    let dropped = counters
        .iter()
        .filter(|counter| counter.kind == "dropped" && counter.packets > 0)
        .map(|counter| format!("{} {}", counter.packets, counter.name));
    dropped.collect::<Vec<_>>().join(", ")
}

/// A flow from site A to site B at a moderate rate, until it is cut.
fn traffic(topology: &Topology) -> anyhow::Result<Running> {
    let flow = Flow {
        rate: Some(200),
        time: Duration::from_secs(60),
        ..Flow::to(Side::B.host(V4))
    };
    flow.start(&topology.host_a, &topology.host_b)
}

fn pfs_rekey(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    // The first child has no key exchange of its own, so this group is used by the rekeying for the first time.
    let (tunnel, connection) = column.plan_for(Side::A, (SUITE.0, "aes256gcm16-ecp384"));
    let (gateway, swan) = column.up(&topology, (tunnel, &connection))?;
    let before = gateway.spis("site")?;
    swan.rekey_child("net")?;
    gateway.wait("site", "rekeyed", PATIENCE, |_| {
        gateway.spis("site").is_ok_and(|now| now != before)
    })?;
    ensure!(swan.sas()?.contains("ECP_384"), "{}", swan.sas()?);
    talk(&topology, V4)
}

fn peer_deletes_child(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = column.plan();
    let (gateway, swan) = column.up(&topology, (tunnel, &connection))?;
    swan.terminate_child("net")?;
    if !column.we_initiate {
        gateway.wait("site", "without child", PATIENCE, |tunnel| {
            tunnel.children[0].state != State::Up
        })?;
        swan.initiate("net")?;
    }
    // Where we start tunnels, we ask for the child again.
    gateway.wait_up("site", PATIENCE)?;
    talk(&topology, V4)
}

fn peer_deletes(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = column.plan();
    let (gateway, swan) = column.up(&topology, (tunnel, &connection))?;
    swan.terminate()?;
    if !column.we_initiate {
        gateway.wait("site", "down", PATIENCE, |tunnel| tunnel.ike.is_none())?;
        swan.initiate("net")?;
    }
    gateway.wait_up("site", PATIENCE)?;
    talk(&topology, V4)
}

fn we_delete(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = column.plan();
    let (gateway, swan) = column.up(&topology, (tunnel, &connection))?;
    gateway.down("site")?;
    swan.wait_sas("our delete", PATIENCE, |sas| !sas.contains("ESTABLISHED"))?;
    Ok(())
}

fn peer_freezes(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = column.plan();
    let (gateway, swan) = column.up(&topology, (tunnel.with(DPD), &connection))?;
    swan.freeze()?;
    let pings = Ping::to(Side::B.host(V4))
        .count(75)
        .interval(Duration::from_millis(200));
    pings.run(&topology.host_a)?;
    let dead = gateway.wait("site", "given up", DEATH, |tunnel| {
        tunnel.state != State::Up
    });
    swan.thaw()?;
    dead?;
    if !column.we_initiate {
        // It has to find out that we gave it up; a new start is what its operator would do.
        let _ = swan.terminate();
        swan.initiate("net")?;
    }
    gateway.wait_up("site", DEATH)?;
    talk(&topology, V4)
}

fn we_freeze(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, mut connection) = column.plan();
    connection.dpd = 2;
    let (gateway, swan) = column.up(&topology, (tunnel.with(DPD), &connection))?;
    let pid = Pid::from_raw(i32::try_from(gateway.pid().context("no daemon")?)?);
    kill(pid, Signal::SIGSTOP)?;
    let dead = swan.wait_sas("us to be given up", DEATH, |sas| {
        !sas.contains("ESTABLISHED")
    });
    kill(pid, Signal::SIGCONT)?;
    dead?;
    if column.we_initiate {
        // Its userspace ESP drops what comes on the SAs it has forgotten; traffic makes us ask.
        let pings = Ping::to(Side::B.host(V4))
            .count(75)
            .interval(Duration::from_millis(200));
        pings.run(&topology.host_a)?;
    } else {
        swan.initiate("net")?;
    }
    swan.wait_sas("a new SA", DEATH, |sas| sas.contains("INSTALLED"))?;
    gateway.wait_up("site", DEATH)?;
    talk(&topology, V4)
}

fn peer_returns(column: &Column, unique: &str) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, mut connection) = column.plan();
    connection.lines = vec![unique.to_owned()];
    let (gateway, swan) = column.up(&topology, (tunnel.with(DPD), &connection))?;
    let before = gateway.tunnel("site")?.ike.context("no IKE SA")?;
    let swan = swan.crash_and_restart(&topology.gateway_b)?;
    // Both may call now, and one tunnel must remain.
    swan.initiate("net")?;
    gateway.wait("site", "up anew", PATIENCE, |tunnel| {
        tunnel.state == State::Up
            && tunnel
                .ike
                .as_ref()
                .is_some_and(|ike| ike.initiator_spi != before.initiator_spi)
    })?;
    // One that does not say that it has lost its SAs has new ones, and traffic follows those before DPD says anything.
    wait_for("traffic", Duration::from_secs(8), || {
        Ok(talk(&topology, V4).ok())
    })
}

fn we_return(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = column.plan();
    let (mut gateway, swan) = column.up(&topology, (tunnel, &connection))?;
    gateway.kill()?;
    gateway.run()?;
    if !column.we_initiate {
        let _ = swan.terminate();
        swan.initiate("net")?;
    }
    gateway.wait_up("site", DEATH)?;
    talk(&topology, V4)?;
    swan.wait_sas("one IKE SA", PATIENCE, |sas| {
        sas.matches("ESTABLISHED").count() == 1
    })?;
    Ok(())
}
