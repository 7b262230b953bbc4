//! Every cipher, PRF and group that both ends know, one suite a row, on one daemon of the peer.

use super::{Cell, Column, peer::Peer, talk, topology};
use crate::{
    command::wait_for,
    connection::ChildConnection,
    gateway::ChildSettings,
    pair::PATIENCE,
    ping::Ping,
    topology::{Family, Side, Topology},
};

const AEAD: [&str; 3] = ["aes128gcm16", "aes256gcm16", "chacha20poly1305"];
const CBC: [&str; 3] = ["aes128", "aes192", "aes256"];
const HASHES: [&str; 3] = ["sha256", "sha384", "sha512"];
const GROUPS: [&str; 9] = [
    "x25519", "ecp256", "ecp384", "ecp521", "modp2048", "modp3072", "modp4096", "modp6144",
    "modp8192",
];

/// IKE and ESP proposals that cover every cipher with every PRF or integrity algorithm, and every group.
fn suites() -> Vec<(String, String)> {
    let hashed = |cipher: &'static str| HASHES.map(|hash| (cipher, hash));
    let aead = AEAD
        .into_iter()
        .flat_map(hashed)
        .map(|(cipher, hash)| (format!("{cipher}-prf{hash}-x25519"), cipher.to_owned()));
    let cbc = CBC.into_iter().flat_map(hashed).map(|(cipher, hash)| {
        let esp = format!("{cipher}-{hash}");
        (format!("{esp}-x25519"), esp)
    });
    // The second child is made by CREATE_CHILD_SA, and so with a key exchange of its own.
    let groups = GROUPS.into_iter().map(|group| {
        (
            format!("aes256gcm16-prfsha256-{group}"),
            format!("aes256gcm16-{group}"),
        )
    });
    aead.chain(cbc).chain(groups).collect()
}

pub(super) fn run(
    column: &Column,
    filter: &str,
    done: &(dyn Fn(&Cell) + Sync),
) -> anyhow::Result<Vec<Cell>> {
    let rows: Vec<_> = suites()
        .into_iter()
        .map(|(ike, esp)| (format!("{ike} / {esp}"), ike, esp))
        .filter(|(row, ..)| row.contains(filter))
        .collect();
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let topology = topology()?;
    // strongSwan installs a child's routes only with an address of its own inside the child's selectors.
    topology.gateway_b.ip("addr add 10.2.0.129/24 dev lan")?;
    topology.host_b.ip("addr add 10.2.0.200/24 dev lan")?;
    let peer = column.start(&topology.gateway_b, &[])?;
    Ok(rows
        .iter()
        .map(|(row, ike, esp)| {
            let result = one(column, &topology, &peer, (ike, esp));
            let cell = column.cell("Suites: IKE / ESP", row, result);
            done(&cell);
            cell
        })
        .collect())
}

fn one(
    column: &Column,
    topology: &Topology,
    peer: &Peer<'_>,
    suite: (&str, &str),
) -> anyhow::Result<()> {
    let (mut tunnel, mut connection) = column.plan_for(Side::A, suite);
    let child = |name: &str, remote: &str| ChildSettings {
        name: name.to_owned(),
        local: vec![Side::A.prefix(Family::V4)],
        remote: vec![remote.to_owned()],
        lines: vec![format!("esp = [\"{}\"]", suite.1)],
    };
    let mirrored = |name: &str, local: &str| ChildConnection {
        name: name.to_owned(),
        local: local.to_owned(),
        remote: Side::A.prefix(Family::V4),
        esp: suite.1.to_owned(),
        lines: Vec::new(),
    };
    tunnel.children = vec![child("net", "10.2.0.0/25"), child("more", "10.2.0.128/25")];
    connection.children = vec![
        mirrored("net", "10.2.0.0/25"),
        mirrored("more", "10.2.0.128/25"),
    ];
    let gateway = column.connect(&topology.gateway_a, peer, (tunnel, &connection), "")?;
    let result = talk(topology, Family::V4).and_then(|()| {
        Ping::to([10, 2, 0, 200].into())
            .count(5)
            .run(&topology.host_a)?
            .all_answered()
    });
    gateway.down("site")?;
    // The next suite must not meet the IKE SA of this one.
    wait_for("the peer's SAs to go", PATIENCE, || {
        Ok((peer.ike_sas()? == 0).then_some(()))
    })?;
    result
}

#[cfg(test)]
mod tests {
    use ipsec_ctl::ike::crypto::{EspProposal, IkeProposal};

    use super::*;

    #[test]
    fn every_suite_is_one_that_we_can_read() {
        let all = suites();
        assert_eq!(all.len(), 27);
        for (ike, esp) in all {
            assert!(ike.parse::<IkeProposal>().is_ok(), "{ike}");
            assert!(esp.parse::<EspProposal>().is_ok(), "{esp}");
        }
    }
}
