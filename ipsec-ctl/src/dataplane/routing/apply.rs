//! Bringing the kernel to what is planned, and taking it all away again.

use std::{collections::BTreeMap, net::IpAddr};

use super::{
    RoutingSpec,
    plan::{self, Kernel, MAIN, Plan, Wants},
};
use crate::net::netlink::{Netlink, NetlinkError, Route, Rule, Target};

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
    /// What the kernel had when it was last asked.
    kernel: Option<Kernel>,
    /// Whether all tunnels are known, so that what none of them wants is a leftover.
    complete: bool,
}

impl Routing {
    /// Takes over what is there; nothing is changed before [`Self::apply`].
    pub fn new(netlink: Netlink, mark: u32) -> Self {
        Self {
            netlink,
            mark,
            tunnels: BTreeMap::new(),
            unreachable: Vec::new(),
            kernel: None,
            complete: false,
        }
    }

    /// Notes that all tunnels have been set: from now on [`Self::apply`] removes what none of them wants. Before that a
    /// former life's routes stay, for the tunnel that wants them may only be about to be set.
    pub fn complete(&mut self) {
        self.complete = true;
    }

    /// Installs the backstops and routes of one tunnel at once, without looking at those of the others.
    ///
    /// # Errors
    ///
    /// The first step that failed; the others are done all the same.
    pub async fn protect(&mut self, number: u32) -> Result<(), NetlinkError> {
        let Some(entry) = self.tunnels.get(&number).cloned() else {
            return Ok(());
        };
        let kernel = match self.kernel.take() {
            Some(kernel) => kernel,
            None => self.ask().await?,
        };
        let wants = Wants {
            number,
            device: entry.device,
            spec: &entry.spec,
        };
        let plan = plan::plan(&[wants], &kernel);
        self.kernel = Some(kernel);
        self.add(&plan, &[], &[]).await
    }

    /// What the kernel has that the plan depends on.
    async fn ask(&self) -> Result<Kernel, NetlinkError> {
        Ok(Kernel {
            addresses: self
                .netlink
                .addresses()
                .await?
                .into_iter()
                .map(|(_, address)| address.addr())
                .collect(),
            routes: self.netlink.other_routes(MAIN).await?,
            mark: self.mark,
        })
    }

    /// Adds what is planned and not there: backstops first, then routes, then the rules that lead to them.
    async fn add(&self, plan: &Plan, routes: &[Route], rules: &[Rule]) -> Result<(), NetlinkError> {
        let mut first = Ok(());
        let missing = plan.routes.iter().filter(|route| !routes.contains(route));
        let (backstops, others): (Vec<_>, Vec<_>) =
            missing.partition(|route| route.target == Target::Blackhole);
        for route in backstops.into_iter().chain(others) {
            first = first.and(self.netlink.add_route(route).await);
        }
        for rule in plan.rules.iter().filter(|rule| !rules.contains(rule)) {
            first = first.and(self.netlink.add_rule(rule).await);
        }
        first
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
        let kernel = self.ask().await?;
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
        let mut first = self.add(&plan, &routes, &rules).await;
        if self.complete {
            for rule in rules.iter().filter(|rule| !plan.rules.contains(rule)) {
                first = first.and(self.netlink.remove_rule(rule).await);
            }
            let leftovers: Vec<&Route> = routes
                .iter()
                .filter(|route| !plan.routes.contains(route))
                .collect();
            for route in &leftovers {
                first = first.and(self.netlink.remove_route(route).await);
            }
            // A route that differs from the planned one in its source alone had kept that one out.
            if !leftovers.is_empty() {
                first = first.and(self.add(&plan, &[], &[]).await);
            }
        }
        self.kernel = Some(kernel);
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
