//! The matrix of `cargo xtask interop`: what we and a peer have in common, tried in both roles, and what became of it.
//!
//! A row is a suite or a behaviour, a column a release of the peer and our role. Suites share one topology and one
//! daemon of the peer a column; behaviours that kill, freeze or hide a peer have their own.

mod behaviours;
mod life;
mod peer;
mod report;
mod suites;

use anyhow::Context;

use self::peer::Peer;
pub use self::{
    peer::Kind,
    report::{Cell, Table},
};

use crate::{
    connection::Connection,
    gateway::{Gateway, Tunnel},
    netns::Netns,
    pair::PATIENCE,
    ping::Ping,
    release::Release,
    topology::{Family, Options, Side, Topology},
};

/// The suite of cells that are not about suites.
const SUITE: (&str, &str) = ("aes256gcm16-prfsha384-x25519", "aes256gcm16");

/// A column: a release of the peer, and our role.
#[derive(Clone, Debug)]
pub struct Column {
    /// Name of the peer, as in the head of the table.
    pub peer: String,
    /// Which implementation it is.
    pub kind: Kind,
    /// Its programs.
    pub release: Release,
    /// Who starts: we or the peer.
    pub we_initiate: bool,
}

/// Ends of a tunnel that is up.
type Ends<'a> = (Gateway<'a>, Peer<'a>);

impl Column {
    /// Fills the column; rows whose name does not contain `filter` are left out.
    ///
    /// # Errors
    ///
    /// The topology cannot be built. What fails in a cell stands in the cell.
    pub fn run(&self, filter: &str, done: &(dyn Fn(&Cell) + Sync)) -> anyhow::Result<Vec<Cell>> {
        let mut cells = suites::run(self, filter, done)?;
        cells.extend(behaviours::run(self, filter, done));
        Ok(cells)
    }

    /// A cell out of what became of it.
    fn cell(&self, group: &'static str, row: &str, result: anyhow::Result<()>) -> Cell {
        Cell::of((group, row), (&self.peer, self.we_initiate), result)
    }

    /// The tunnel's ends for the suite that most cells use, the peer at site B.
    fn plan(&self) -> (Tunnel, Connection) {
        self.plan_for(Side::A, SUITE)
    }

    /// The tunnel's ends for a suite. strongSwan's userspace ESP needs encapsulation.
    fn plan_for(&self, us: Side, (ike, esp): (&str, &str)) -> (Tunnel, Connection) {
        let mut tunnel = Tunnel::between_sites(us, Family::V4).suite(ike, esp);
        if self.kind == Kind::StrongSwan {
            tunnel = tunnel.with("nat = \"force\"");
        }
        (tunnel, Connection::between_sites(us.other(), ike, esp))
    }

    /// Starts the peer, with further lines for its daemon's settings.
    fn start<'a>(&self, netns: &'a Netns, lines: &[&str]) -> anyhow::Result<Peer<'a>> {
        Peer::start(self.kind, &self.release, netns, lines)
    }

    /// Brings a tunnel up in the role of this column, with the peer already running.
    fn connect<'a>(
        &self,
        gateway: &'a Netns,
        peer: &Peer<'_>,
        (tunnel, connection): (Tunnel, &Connection),
        top: &str,
    ) -> anyhow::Result<Gateway<'a>> {
        peer.load(connection)?;
        let tunnel = if self.we_initiate {
            tunnel
        } else {
            tunnel.respond()
        };
        let gateway = Gateway::start_with(gateway, top, &[tunnel])?;
        if !self.we_initiate {
            for child in &connection.children {
                peer.initiate(&child.name)
                    .with_context(|| format!("our log:\n{}\n{peer}", gateway.log(15)))?;
            }
        }
        gateway
            .wait_up("site", PATIENCE)
            .with_context(|| peer.to_string())?;
        Ok(gateway)
    }

    /// A topology's two ends, up.
    fn up<'a>(
        &self,
        topology: &'a Topology,
        (tunnel, connection): (Tunnel, &Connection),
    ) -> anyhow::Result<Ends<'a>> {
        let peer = self.start(&topology.gateway_b, &[])?;
        let gateway = self.connect(&topology.gateway_a, &peer, (tunnel, connection), "")?;
        Ok((gateway, peer))
    }
}

fn topology() -> anyhow::Result<Topology> {
    Topology::build(Options::default())
}

/// A few pings from site A to site B, all answered.
fn talk(topology: &Topology, family: Family) -> anyhow::Result<()> {
    Ping::to(Side::B.host(family))
        .count(5)
        .run(&topology.host_a)?
        .all_answered()
}
