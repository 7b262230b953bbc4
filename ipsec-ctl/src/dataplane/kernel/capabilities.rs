//! What this engine needs of the kernel, and what of it is missing.

use crate::{
    dataplane::kernel::{algorithms::all_suites, probe},
    esp::EspSuite,
    net::{netlink::Netlink, xfrm::Xfrm},
};

/// Why this engine cannot work here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Incapable {
    /// There is no XFRM.
    #[error("the kernel has no XFRM ({0})")]
    Xfrm(String),
    /// There is no ESP.
    #[error("the kernel has no ESP ({0})")]
    Esp(String),
    /// There are no xfrm interfaces.
    #[error("the kernel has no xfrm interfaces ({0})")]
    Interface(String),
}

/// What the kernel can do.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// Suites that it lacks, with its own words.
    pub lacking: Vec<(EspSuite, String)>,
}

/// The name of an interface that exists for a moment.
const PROBE: &str = "ipx-probe";

impl Capabilities {
    /// Asks the kernel of the network namespace that the caller is in.
    ///
    /// # Errors
    ///
    /// [`Incapable`].
    pub async fn ask(xfrm: &Xfrm, netlink: &Netlink) -> Result<Self, Incapable> {
        let lacking: Vec<_> = all_suites()
            .filter_map(|suite| Some((suite, probe::esp(xfrm, suite).err()?)))
            .collect();
        // Whoever has none at all has no ESP.
        if lacking.len() == all_suites().count()
            && let Some((_, reason)) = lacking.first()
        {
            return Err(Incapable::Esp(reason.clone()));
        }
        interface(netlink).await?;
        Ok(Self { lacking })
    }
}

/// Whether there are xfrm interfaces: one is created and removed again.
async fn interface(netlink: &Netlink) -> Result<(), Incapable> {
    let refused = |error: crate::net::netlink::NetlinkError| Incapable::Interface(error.reason);
    let if_id = super::engine::PROBE_IF_ID;
    match netlink.add_xfrm_interface(PROBE, if_id).await {
        // Another probe is at it.
        Err(error) if error.errno == Some(libc::EEXIST) => return Ok(()),
        other => other.map_err(refused)?,
    }
    let link = netlink.link(PROBE).await.map_err(refused)?;
    if let Some(link) = link {
        netlink.remove_link(link.index).await.map_err(refused)?;
    }
    Ok(())
}
