//! The device of a tunnel, whichever engine it belongs to.

use crate::{
    dataplane::seam::TunnelSpec,
    net::{
        netlink::{Netlink, NetlinkError},
        sysctl,
    },
};

/// Sets a device up and gives it the addresses of its tunnel.
pub(super) async fn bring_up(
    netlink: &Netlink,
    index: u32,
    spec: &TunnelSpec,
) -> Result<(), NetlinkError> {
    let addresses = &spec.routing.addresses;
    if !addresses.iter().any(|net| net.addr().is_ipv6()) {
        // 1 is "none": no link-local address appears. A kernel without IPv6 lacks the setting.
        let _ = sysctl::set(&["net", "ipv6", "conf", &spec.device, "addr_gen_mode"], "1");
    }
    netlink.set_up(index).await?;
    for &address in addresses {
        netlink.add_address(index, address).await?;
    }
    Ok(())
}
