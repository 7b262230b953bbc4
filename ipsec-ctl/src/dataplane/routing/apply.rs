//! Bringing the kernel to what is planned, and taking it all away again.

use std::{collections::BTreeMap, net::IpAddr};

use super::{
    RoutingSpec,
    plan::{self, Kernel, MAIN, Wants},
};
use crate::net::netlink::{Netlink, NetlinkError, Target};

/// A tunnel's wishes, and its device if there is one.
#[derive(Clone, Debug)]
struct Entry {
    device: Option<u32>,
    spec: RoutingSpec,
}

/// Keeps the kernel's routes and rules as the tunnels need them.
#[derive(Debug)]
pub struct Routing {
    netlink: Netlink,
    mark: u32,
    tunnels: BTreeMap<u32, Entry>,
    unreachable: Vec<IpAddr>,
}

impl Routing {
    /// Takes over what is there; nothing is changed before [`Self::apply`].
    pub fn new(netlink: Netlink, mark: u32) -> Self {
        Self {
            netlink,
            mark,
            tunnels: BTreeMap::new(),
            unreachable: Vec::new(),
        }
    }

    /// Notes what a tunnel wants; `number` names it.
    pub fn set(&mut self, number: u32, device: Option<u32>, spec: &RoutingSpec) {
        let spec = spec.clone();
        self.tunnels.insert(number, Entry { device, spec });
    }

    /// Forgets a tunnel.
    pub fn remove(&mut self, number: u32) {
        self.tunnels.remove(&number);
    }

    /// Peers that only a tunnel of ours leads to, by the last [`Self::apply`].
    pub fn unreachable(&self) -> &[IpAddr] {
        &self.unreachable
    }

    /// Brings the kernel to what is planned: additions before removals, backstops before all, so that there is no
    /// moment in which something protected goes in the clear.
    ///
    /// # Errors
    ///
    /// The first step that failed; the others are done all the same.
    pub async fn apply(&mut self) -> Result<(), NetlinkError> {
        let kernel = Kernel {
            addresses: self
                .netlink
                .addresses()
                .await?
                .into_iter()
                .map(|(_, address)| address.addr())
                .collect(),
            routes: self.netlink.other_routes(MAIN).await?,
            mark: self.mark,
        };
        let wants: Vec<Wants<'_>> = self
            .tunnels
            .iter()
            .map(|(number, entry)| Wants {
                number: *number,
                device: entry.device,
                spec: &entry.spec,
            })
            .collect();
        let plan = plan::plan(&wants, &kernel);
        let routes = self.netlink.our_routes().await?;
        let rules = self.netlink.our_rules().await?;
        let mut first = Ok(());
        let mut note = |result: Result<(), NetlinkError>| {
            if first.is_ok() {
                first = result;
            }
        };
        let missing = plan.routes.iter().filter(|route| !routes.contains(route));
        let (backstops, others): (Vec<_>, Vec<_>) =
            missing.partition(|route| route.target == Target::Blackhole);
        for route in backstops.into_iter().chain(others) {
            note(self.netlink.add_route(route).await);
        }
        for rule in plan.rules.iter().filter(|rule| !rules.contains(rule)) {
            note(self.netlink.add_rule(rule).await);
        }
        for rule in rules.iter().filter(|rule| !plan.rules.contains(rule)) {
            note(self.netlink.remove_rule(rule).await);
        }
        for route in routes.iter().filter(|route| !plan.routes.contains(route)) {
            note(self.netlink.remove_route(route).await);
        }
        self.unreachable = plan.unreachable;
        first
    }
}

/// Removes every route and rule of ours.
///
/// # Errors
///
/// The first step that failed.
pub async fn release(netlink: &Netlink) -> Result<(), NetlinkError> {
    for rule in netlink.our_rules().await? {
        netlink.remove_rule(&rule).await?;
    }
    for route in netlink.our_routes().await? {
        netlink.remove_route(&route).await?;
    }
    Ok(())
}
