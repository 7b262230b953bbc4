//! What this engine needs of the kernel, and what of it is missing.

use crate::{
    dataplane::{
        kernel::{algorithms::all_suites, probe},
        seam::{Mode, PoliciesReason},
    },
    esp::EspSuite,
    net::{
        netlink::{Netlink, NetlinkError},
        xfrm::Xfrm,
    },
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
}

/// What the kernel can do.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// Suites that it lacks, with its own words.
    pub lacking: Vec<(EspSuite, String)>,
    /// Whether it has xfrm interfaces, or its own words for why not. Without them tunnels are carried by policies alone.
    pub interfaces: Result<(), String>,
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
        Ok(Self {
            lacking,
            interfaces: interface(netlink).await,
        })
    }

    /// Why a tunnel gets no device; none if it gets one.
    pub fn policies_alone(&self, mode: Mode, policy_based: bool) -> Option<PoliciesReason> {
        match (mode, policy_based, &self.interfaces) {
            (Mode::Transport, _, _) => Some(PoliciesReason::TransportMode),
            (Mode::Tunnel, true, _) => Some(PoliciesReason::Configured),
            (Mode::Tunnel, false, Err(_)) => Some(PoliciesReason::NoXfrmInterfaces),
            (Mode::Tunnel, false, Ok(())) => None,
        }
    }
}

/// Whether there are xfrm interfaces: one is created and removed again.
async fn interface(netlink: &Netlink) -> Result<(), String> {
    let refused = |error: NetlinkError| error.reason;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_has_a_device_unless_it_wants_none_or_the_kernel_has_none() {
        let kernel = |interfaces| Capabilities {
            lacking: Vec::new(),
            interfaces,
        };
        let with = kernel(Ok(()));
        let without = kernel(Err("Operation not supported".to_owned()));
        assert_eq!(with.policies_alone(Mode::Tunnel, false), None);
        assert_eq!(
            without.policies_alone(Mode::Tunnel, false),
            Some(PoliciesReason::NoXfrmInterfaces)
        );
        for kernel in [with, without] {
            let why = |mode, wanted| kernel.policies_alone(mode, wanted);
            assert_eq!(why(Mode::Tunnel, true), Some(PoliciesReason::Configured));
            assert_eq!(
                why(Mode::Transport, false),
                Some(PoliciesReason::TransportMode)
            );
        }
    }
}
