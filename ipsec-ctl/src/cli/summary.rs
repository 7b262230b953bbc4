//! `ipsec-ctl status --summary`: one line for each tunnel, for those who have many.

use super::{
    status::state,
    table::{age, bytes, columns},
};
use crate::{
    api::model::{Direction, State, Tunnel},
    dataplane::seam::Offload,
};

const HEAD: [&str; 9] = [
    "TUNNEL",
    "STATE",
    "PEER",
    "UP",
    "CHILDREN",
    "IN",
    "OUT",
    "OFFLOADED",
    "FAILED",
];

pub(super) fn render(tunnels: &[Tunnel]) -> String {
    let head = HEAD.map(str::to_owned).to_vec();
    let rows: Vec<_> = std::iter::once(head)
        .chain(tunnels.iter().map(row))
        .collect();
    columns(&rows)
}

fn row(tunnel: &Tunnel) -> Vec<String> {
    let up = tunnel
        .children
        .iter()
        .filter(|child| child.state == State::Up);
    let inbound = || tunnel.children.iter().filter_map(|child| child.inbound);
    let outbound = || tunnel.children.iter().filter_map(|child| child.outbound);
    let offloaded = inbound()
        .chain(outbound())
        .filter(|direction| match direction.offload {
            Offload::Full | Offload::Partial(_) => true,
            Offload::Declined(_) | Offload::Kernel(_) | Offload::Policies(_) => false,
        });
    vec![
        tunnel.name.clone(),
        state(tunnel.state).to_owned(),
        tunnel
            .ike
            .as_ref()
            .map_or_else(|| tunnel.peer.clone(), |ike| ike.remote.ip().to_string()),
        tunnel
            .ike
            .as_ref()
            .map_or_else(|| "-".to_owned(), |ike| age(ike.age_seconds)),
        format!("{}/{}", up.count(), tunnel.children.len()),
        volume(inbound()),
        volume(outbound()),
        format!(
            "{}/{} SAs",
            offloaded.count(),
            inbound().chain(outbound()).count()
        ),
        tunnel.last_failure.clone().unwrap_or_default(),
    ]
}

/// Bytes that the SAs in force have carried.
fn volume(directions: impl Iterator<Item = Direction>) -> String {
    bytes(
        directions
            .map(|direction| direction.fast.bytes.saturating_add(direction.slow.bytes))
            .sum(),
    )
}
