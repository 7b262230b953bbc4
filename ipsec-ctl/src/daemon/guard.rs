//! What holds without a daemon: backstops before it starts, and the way to take all of it down.

use std::{collections::BTreeSet, io};

use super::convert;
use crate::{
    config::Config,
    dataplane::{
        kernel, link,
        routing::{self, Routing},
        seam::TunnelId,
        xdp::program,
    },
    net::{netlink::Netlink, preflight, tun::Tun},
};

/// Blocks everything that the configuration protects, until a daemon opens the tunnels. Returns what was done, in
/// words.
///
/// # Errors
///
/// What the kernel refused; the rest was done.
pub fn guard(config: &Config) -> io::Result<String> {
    in_runtime(async {
        let netlink = Netlink::open()?;
        let mut routing = Routing::new(
            netlink.clone(),
            config.mark,
            [config.ports.ike, config.ports.nat_traversal],
        );
        let mut prefixes = 0;
        let mut without_device = Vec::new();
        for (number, tunnel) in (1..).zip(&config.tunnels) {
            let spec = convert::tunnel_spec(TunnelId(number), tunnel, &[], &BTreeSet::new());
            if tunnel.is_without_device() {
                prefixes += spec.routing.remote.len();
                without_device.push(spec);
                continue;
            }
            let spec = spec.routing;
            prefixes += spec.remote.len();
            // A device that a dead daemon has left stays in its place: it is down or has no reader, so it blocks, too. Behind
            // an xfrm interface the kernel's policies let through only what its states protect.
            let device = netlink
                .link(&tunnel.device)
                .await
                .map_err(io::Error::other)?
                .map(|link| link.index);
            routing.set(number, &tunnel.device, device, &spec);
        }
        kernel::engine::block(&without_device)?;
        routing.apply().await.map_err(io::Error::other)?;
        routing.guard();
        Ok(format!(
            "{prefixes} prefix(es) of {} tunnel(s) are blocked until the gateway runs{}\n",
            config.tunnels.len(),
            if routing.is_guarded() {
                ""
            } else {
                "; plaintext from there is not: the kernel refuses the nf_tables table of the plaintext guard"
            }
        ))
    })
}

/// Removes the XDP program, devices, routes and rules. Returns what was done, in words.
///
/// # Errors
///
/// What the kernel refused.
pub fn release(config: &Config) -> io::Result<String> {
    in_runtime(async {
        // Before all else, for it would mend what is removed.
        link::end(&super::supervise::socket(config)).await?;
        super::journal::discard(&super::journal(config));
        let netlink = Netlink::open()?;
        // First: without it packets take the kernel's way, which leads into the devices as long as they are there.
        program::release(&config.instance).map_err(io::Error::other)?;
        routing::release(&netlink).await.map_err(io::Error::other)?;
        let mut devices = kernel::engine::release(&netlink)
            .await
            .map_err(io::Error::other)?;
        let tunnels = config.tunnels.iter();
        for tunnel in tunnels.filter(|tunnel| !tunnel.is_without_device()) {
            let there = netlink
                .link(&tunnel.device)
                .await
                .map_err(io::Error::other)?;
            if there.is_some() {
                Tun::open(&tunnel.device)?.remove()?;
                devices += 1;
            }
        }
        preflight::restore(&super::originals(config))?;
        Ok(format!(
            "the XDP program, {devices} device(s), the plaintext guard and all routes and rules of ours are gone; nothing is protected any more\n"
        ))
    })
}

fn in_runtime(work: impl Future<Output = io::Result<String>>) -> io::Result<String> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}
