//! Which engine carries a tunnel, as `status` and the kernel itself tell, and tunnels that go from one engine to the other.

use anyhow::{Context, ensure};
use ipsec_ctl::dataplane::seam::{KernelReason, Offload};

use crate::{
    command::wait_for,
    gateway::{Gateway, Tunnel},
    netns::Netns,
    pair::PATIENCE,
    topology::{Family, Side},
};

/// The line of a tunnel that the kernel's ESP is to carry.
pub const KERNEL: &str = "engine = \"kernel\"";
/// The line of a tunnel that our own ESP is to carry.
pub const XDP: &str = "engine = \"xdp\"";

/// Both SAs of a tunnel's first child are the kernel's, and have carried packets.
///
/// # Errors
///
/// What is otherwise.
pub fn is_by_the_kernel(gateway: &Gateway<'_>, tunnel: &str) -> anyhow::Result<()> {
    for direction in gateway.directions(tunnel)? {
        ensure!(
            direction.offload == Offload::Kernel(KernelReason::Configured),
            "{direction:?}"
        );
        ensure!(direction.slow.packets > 0, "{direction:?}");
        ensure!(direction.sequence > 0, "{direction:?}");
    }
    Ok(())
}

/// Both SAs of a tunnel's first child are our own ESP's.
///
/// # Errors
///
/// What is otherwise.
pub fn is_by_xdp(gateway: &Gateway<'_>, tunnel: &str) -> anyhow::Result<()> {
    for direction in gateway.directions(tunnel)? {
        ensure!(
            !matches!(direction.offload, Offload::Kernel(_)),
            "{direction:?}"
        );
    }
    Ok(())
}

/// A tunnel with two children, one for each family, so that neither may go to the other engine before both can.
pub fn of_two_families(side: Side) -> Tunnel {
    let mut tunnel = Tunnel::between_sites(side, Family::V4);
    let mut second = Tunnel::between_sites(side, Family::V6).children;
    for child in &mut second {
        child.name = "net6".to_owned();
    }
    tunnel.children.extend(second);
    tunnel
}

/// Index of a device.
///
/// # Errors
///
/// There is no such device.
pub fn index_of(netns: &Netns, device: &str) -> anyhow::Result<u32> {
    let link = netns.ip(&format!("-o link show {device}"))?;
    let (index, _) = link.split_once(':').context("no index")?;
    Ok(index.parse()?)
}

/// How many states the kernel has.
///
/// # Errors
///
/// ip's.
pub fn states(netns: &Netns) -> anyhow::Result<usize> {
    Ok(netns.ip("xfrm state")?.matches("proto esp").count())
}

/// Waits until a gateway with one tunnel has nothing of a move that is over or was given up: neither a second device nor states
/// beyond so many, nor policies without states, nor an address that stood in for others.
///
/// # Errors
///
/// What is left.
pub fn leaves_nothing(netns: &Netns, wanted: usize) -> anyhow::Result<()> {
    wait_for("what is left of a move to go", PATIENCE, || {
        let links = netns.ip("-o link show")?;
        ensure!(!links.contains("ipsec"), "{links}");
        let states = states(netns)?;
        ensure!(states == wanted, "{states} states");
        // Those of sockets are theirs who have the sockets open.
        let policies = netns.ip("xfrm policy list nosock")?;
        ensure!(wanted > 0 || policies.trim().is_empty(), "{policies}");
        let addresses = netns.ip("address show dev site")?;
        ensure!(!addresses.contains("192.0.0.8"), "{addresses}");
        Ok(Some(()))
    })
}
