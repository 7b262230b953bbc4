//! The matrix of `cargo xtask interop`: what we and a peer have in common, tried in both roles, and what became of it.
//!
//! A row is a suite or a behaviour, a column a release of the peer and our role. Suites share one topology and one
//! charon a column; behaviours that kill, freeze or hide a peer have their own.

mod behaviours;
pub mod libreswan;
mod report;
mod suites;

use anyhow::Context;

pub use report::{Cell, Table};

use crate::{
    gateway::{Gateway, Tunnel},
    pair::PATIENCE,
    ping::Ping,
    release::Release,
    strongswan::{Connection, StrongSwan},
    topology::{Family, Options, Side, Topology},
};

/// The suite of cells that are not about suites.
const SUITE: (&str, &str) = ("aes256gcm16-prfsha384-x25519", "aes256gcm16");

/// A column: a release of the peer, and our role.
#[derive(Clone, Debug)]
pub struct Column {
    /// Name of the peer, as in the head of the table.
    pub peer: String,
    /// Its programs.
    pub release: Release,
    /// Who starts: we or the peer.
    pub we_initiate: bool,
}

/// Ends of a tunnel that is up.
type Ends<'a> = (Gateway<'a>, StrongSwan);

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

    /// The tunnel's ends for the suite that most cells use, strongSwan at site B.
    fn plan(&self) -> (Tunnel, Connection) {
        self.plan_for(Side::A, SUITE)
    }

    /// The tunnel's ends for a suite. strongSwan's userspace ESP needs encapsulation.
    fn plan_for(&self, us: Side, (ike, esp): (&str, &str)) -> (Tunnel, Connection) {
        let tunnel = Tunnel::between_sites(us, Family::V4)
            .suite(ike, esp)
            .with("nat = \"force\"");
        (tunnel, Connection::between_sites(us.other(), ike, esp))
    }

    /// Brings a tunnel up in the role of this column, with strongSwan already running.
    fn connect<'a>(
        &self,
        gateway: &'a crate::netns::Netns,
        swan: &StrongSwan,
        (tunnel, connection): (Tunnel, &Connection),
        top: &str,
    ) -> anyhow::Result<Gateway<'a>> {
        swan.load(connection)?;
        let tunnel = if self.we_initiate {
            tunnel
        } else {
            tunnel.respond()
        };
        let gateway = Gateway::start_with(gateway, top, &[tunnel])?;
        if !self.we_initiate {
            for child in &connection.children {
                swan.initiate(&child.name)
                    .with_context(|| format!("our log:\n{}", gateway.log(15)))?;
            }
        }
        gateway.wait_up("site", PATIENCE)?;
        Ok(gateway)
    }

    /// A topology's two ends, up.
    fn up<'a>(
        &self,
        topology: &'a Topology,
        (tunnel, connection): (Tunnel, &Connection),
    ) -> anyhow::Result<Ends<'a>> {
        let swan = StrongSwan::start_release(&self.release, &topology.gateway_b, &[])?;
        let gateway = self.connect(&topology.gateway_a, &swan, (tunnel, connection), "")?;
        Ok((gateway, swan))
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
