//! The columns of libreswan: the same suites, and what of the behaviours it shares. Its kernel must have ESP.

use std::{net::IpAddr, thread, time::Duration};

use anyhow::{Context, ensure};

use super::{Cell, SUITE, suites::suites, talk, topology};
use crate::{
    command::wait_for,
    gateway::{ChildSettings, Gateway, Tunnel},
    libreswan::{Connection, LibreSwan},
    pair::PATIENCE,
    ping::Ping,
    release::Release,
    topology::{Family, Side, Topology},
};

const V4: Family = Family::V4;

/// A column: a release of libreswan, and our role.
#[derive(Clone, Debug)]
pub struct Column {
    /// Name of the peer, as in the head of the table.
    pub peer: String,
    /// Its programs.
    pub release: Release,
    /// Who starts: we or the peer.
    pub we_initiate: bool,
}

type Ends<'a> = (Gateway<'a>, LibreSwan);
type Behaviour = (&'static str, fn(&Column) -> anyhow::Result<()>);

const BEHAVIOURS: &[Behaviour] = &[
    ("the responder narrows the selectors", narrowing),
    ("IPv6 inside", ipv6_inside),
    ("the initiator's address moves (MOBIKE)", moves),
    ("IKE messages in fragments", fragments),
    ("the peer rekeys the child under traffic", |column| {
        rekeys(column, |_, peer| peer.rekey_child("net"))
    }),
    ("the peer rekeys the IKE SA under traffic", |column| {
        rekeys(column, |_, peer| peer.rekey_ike("net"))
    }),
    ("we rekey the child under traffic", |column| {
        rekeys(column, |gateway, _| gateway.rekey("site").map(drop))
    }),
    ("we rekey the IKE SA under traffic", |column| {
        rekeys(column, |gateway, _| gateway.rekey_ike("site").map(drop))
    }),
    ("the peer deletes the IKE SA", peer_deletes),
    ("we delete the IKE SA", we_delete),
    ("the peer is killed and calls again", peer_returns),
    ("we are killed and call again", we_return),
];

impl Column {
    /// Fills the column; rows whose name does not contain `filter` are left out.
    pub fn run(&self, filter: &str, done: &(dyn Fn(&Cell) + Sync)) -> Vec<Cell> {
        let mut cells = Vec::new();
        let mut note = |group, row: &str, result: anyhow::Result<()>| {
            let cell = Cell::of((group, row), (&self.peer, self.we_initiate), result);
            done(&cell);
            cells.push(cell);
        };
        for (ike, esp) in suites() {
            let row = format!("{ike} / {esp}");
            if row.contains(filter) {
                note("Suites: IKE / ESP", &row, self.suite(&ike, &esp));
            }
        }
        for (row, behaviour) in BEHAVIOURS {
            if row.contains(filter) {
                note("Behaviours", row, behaviour(self));
            }
        }
        cells
    }

    /// Two children: the second is made by CREATE_CHILD_SA, and so with a key exchange of its own.
    fn suite(&self, ike: &str, esp: &str) -> anyhow::Result<()> {
        let topology = topology()?;
        topology.host_b.ip("addr add 10.2.0.200/24 dev lan")?;
        let (mut tunnel, mut connection) = plan(ike, esp);
        let halves = [("net", "10.2.0.0/25"), ("more", "10.2.0.128/25")];
        tunnel.children = halves
            .map(|(name, remote)| ChildSettings {
                name: name.to_owned(),
                local: vec![Side::A.prefix(V4)],
                remote: vec![remote.to_owned()],
                lines: vec![format!("esp = [\"{esp}\"]")],
            })
            .to_vec();
        connection.children = halves
            .map(|(name, local)| [name.to_owned(), local.to_owned(), Side::A.prefix(V4)])
            .to_vec();
        let _ends = self.up(&topology, tunnel, &connection)?;
        talk(&topology, V4)?;
        Ping::to([10, 2, 0, 200].into())
            .count(5)
            .run(&topology.host_a)?
            .all_answered()
    }

    fn up<'a>(
        &self,
        topology: &'a Topology,
        tunnel: Tunnel,
        connection: &Connection,
    ) -> anyhow::Result<Ends<'a>> {
        let peer = LibreSwan::start(&self.release, &topology.gateway_b)?;
        peer.load(connection)?;
        let tunnel = if self.we_initiate {
            tunnel
        } else {
            tunnel.respond()
        };
        let gateway = Gateway::start(&topology.gateway_a, &[tunnel])?;
        if !self.we_initiate {
            for [child, ..] in &connection.children {
                peer.initiate(child)
                    .with_context(|| format!("{}\n{}", gateway.log(15), peer.log(20)))?;
            }
        }
        gateway
            .wait_up("site", PATIENCE)
            .with_context(|| format!("log of the peer:\n{}", peer.log(20)))?;
        Ok((gateway, peer))
    }
}

fn plan(ike: &str, esp: &str) -> (Tunnel, Connection) {
    (
        Tunnel::between_sites(Side::A, V4).suite(ike, esp),
        Connection::between_sites(ike, esp),
    )
}

fn usual() -> (Tunnel, Connection) {
    plan(SUITE.0, SUITE.1)
}

fn narrowing(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (mut tunnel, mut connection) = usual();
    connection.lines.push("narrowing=yes".to_owned());
    if column.we_initiate {
        "10.2.0.0/28".clone_into(&mut connection.children[0][1]);
    } else {
        tunnel.children[0].remote = vec!["10.2.0.0/28".to_owned()];
    }
    let (gateway, _peer) = column.up(&topology, tunnel, &connection)?;
    let children = gateway.tunnel("site")?.children;
    ensure!(children[0].remote == ["10.2.0.0/28"], "{children:?}");
    talk(&topology, V4)
}

fn ipv6_inside(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (mut tunnel, mut connection) = usual();
    let prefix = |side: Side| side.prefix(Family::V6);
    tunnel.children[0].local = vec![prefix(Side::A)];
    tunnel.children[0].remote = vec![prefix(Side::B)];
    connection.children[0][1] = prefix(Side::B);
    connection.children[0][2] = prefix(Side::A);
    let _ends = column.up(&topology, tunnel, &connection)?;
    talk(&topology, Family::V6)
}

/// Its peers move only if they may call from anywhere, and it moves only with an address that the kernel chooses.
fn moves(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, mut connection) = usual();
    connection.lines.push("mobike=yes".to_owned());
    if column.we_initiate {
        "%any".clone_into(&mut connection.peer);
    } else {
        "%defaultroute".clone_into(&mut connection.own);
    }
    // Its answers hold no COOKIE2, so that it cannot show that it is where it claims to be.
    let tunnel = tunnel.with("return_routability = false");
    let (gateway, peer) = column.up(&topology, tunnel, &connection)?;
    let before = gateway.tunnel("site")?.ike.context("no IKE SA")?;
    ensure!(before.mobike, "MOBIKE was not agreed on");
    let side = if column.we_initiate { Side::A } else { Side::B };
    topology.renumber(side, side.outside(V4), side.elsewhere())?;
    let is_there = |address: IpAddr| address == side.elsewhere();
    gateway
        .wait("site", "elsewhere", PATIENCE, |tunnel| {
            let ike = tunnel.ike.as_ref();
            ike.is_some_and(|ike| is_there(ike.local.ip()) || is_there(ike.remote.ip()))
        })
        .with_context(|| format!("log of the peer:\n{}", peer.log(30)))?;
    let after = gateway.tunnel("site")?.ike.context("no IKE SA")?;
    ensure!(
        after.initiator_spi == before.initiator_spi,
        "another IKE SA"
    );
    wait_for("traffic", PATIENCE, || Ok(talk(&topology, V4).ok()))
}

/// It splits only what is longer than 1280 bytes; we split earlier, and it puts together.
fn fragments(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, mut connection) = usual();
    connection.lines.push("fragmentation=yes".to_owned());
    let _ends = column.up(&topology, tunnel.with("fragment_size = 576"), &connection)?;
    talk(&topology, V4)
}

/// SAs are replaced while pings go; few may be lost while the peer changes over.
fn rekeys(
    column: &Column,
    rekey: impl Fn(&Gateway<'_>, &LibreSwan) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = usual();
    let (gateway, peer) = column.up(&topology, tunnel, &connection)?;
    let before = gateway.spis("site")?;
    rekey(&gateway, &peer)?;
    gateway
        .wait("site", "rekeyed", PATIENCE, |_| {
            gateway.spis("site").is_ok_and(|now| now != before)
        })
        .with_context(|| format!("log of the peer:\n{}", peer.log(20)))?;
    talk(&topology, V4)?;
    thread::sleep(Duration::from_secs(1));
    talk(&topology, V4)
}

fn peer_deletes(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = usual();
    let (gateway, peer) = column.up(&topology, tunnel, &connection)?;
    peer.terminate("net")?;
    if !column.we_initiate {
        gateway.wait("site", "down", PATIENCE, |tunnel| tunnel.ike.is_none())?;
        peer.initiate("net")?;
    }
    gateway.wait_up("site", PATIENCE)?;
    wait_for("traffic", PATIENCE, || Ok(talk(&topology, V4).ok()))
}

fn we_delete(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = usual();
    let (gateway, _peer) = column.up(&topology, tunnel, &connection)?;
    gateway.down("site")?;
    wait_for("the peer's SAs to go", PATIENCE, || {
        let states = topology.gateway_b.ip("xfrm state")?;
        Ok((!states.contains("spi")).then_some(()))
    })
}

fn peer_returns(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = usual();
    let tunnel = tunnel.with("dpd = { interval = \"2s\", timeout = \"6s\" }");
    let (gateway, peer) = column.up(&topology, tunnel, &connection)?;
    let before = gateway.tunnel("site")?.ike.context("no IKE SA")?;
    let peer = peer.crash_and_restart(&topology.gateway_b, &connection)?;
    peer.initiate("net")?;
    gateway.wait("site", "up anew", PATIENCE, |tunnel| {
        let ike = tunnel.ike.as_ref();
        ike.is_some_and(|ike| ike.initiator_spi != before.initiator_spi)
    })?;
    wait_for("traffic", PATIENCE, || Ok(talk(&topology, V4).ok()))
}

fn we_return(column: &Column) -> anyhow::Result<()> {
    let topology = topology()?;
    let (tunnel, connection) = usual();
    let (mut gateway, peer) = column.up(&topology, tunnel, &connection)?;
    gateway.kill()?;
    gateway.run()?;
    if !column.we_initiate {
        peer.terminate("net")?;
        peer.initiate("net")?;
    }
    gateway.wait_up("site", PATIENCE)?;
    wait_for("traffic", PATIENCE, || Ok(talk(&topology, V4).ok()))
}
