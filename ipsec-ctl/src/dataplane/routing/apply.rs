//! Bringing the kernel to what is planned, and taking it all away again.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{
    RoutingSpec,
    guard::{self, Guarded, Protected},
    plan::{self, Kernel, MAIN, Plan, Wants},
};
use crate::net::{
    netfilter::guard::{self as table, Guard},
    netlink::{Netlink, NetlinkError, Route, Rule, Target},
};

/// A tunnel's wishes, and its device if there is one.
#[derive(Clone, Debug)]
struct Entry {
    name: String,
    device: Option<u32>,
    spec: RoutingSpec,
    /// Names of other devices that its packets may come out of.
    beside: Vec<String>,
}

/// What the kernel has of ours.
#[derive(Debug, Default)]
struct Present {
    routes: BTreeSet<Route>,
    rules: BTreeSet<Rule>,
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
    /// UDP ports of IKE and of ESP in UDP.
    ports: [u16; 2],
    /// What must not arrive in the clear, as the kernel was last told.
    guard: Option<Guard>,
    /// Whether it was said that the kernel refuses the guard.
    refused: bool,
}

impl Routing {
    /// Takes over what is there; nothing is changed before [`Self::apply`]. `ports` are those of IKE and of ESP in UDP.
    pub fn new(netlink: Netlink, mark: u32, ports: [u16; 2]) -> Self {
        Self {
            netlink,
            mark,
            tunnels: BTreeMap::new(),
            unreachable: Vec::new(),
            kernel: None,
            complete: false,
            ports,
            guard: None,
            refused: false,
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
        self.add(&plan, &Present::default()).await
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
            ports: self.ports,
        })
    }

    /// Adds what is planned and not there: backstops first, then routes, then the rules that lead to them.
    async fn add(&self, plan: &Plan, present: &Present) -> Result<(), NetlinkError> {
        let mut first = Ok(());
        let missing = plan.routes.difference(&present.routes);
        let (backstops, others): (Vec<_>, Vec<_>) =
            missing.partition(|route| route.target == Target::Blackhole);
        for route in backstops.into_iter().chain(others) {
            first = first.and(self.netlink.add_route(route).await);
        }
        for rule in plan.rules.difference(&present.rules) {
            first = first.and(self.netlink.add_rule(rule).await);
        }
        first
    }

    /// Notes what a tunnel wants; `number` names it, `name` and `device` its device, which may not be there yet.
    pub fn set(&mut self, number: u32, name: &str, device: Option<u32>, spec: &RoutingSpec) {
        let old = self.tunnels.remove(&number);
        let entry = Entry {
            name: name.to_owned(),
            device,
            spec: spec.clone(),
            beside: old.map(|old| old.beside).unwrap_or_default(),
        };
        self.tunnels.insert(number, entry);
    }

    /// From now on packets of a tunnel may come out of these devices, too.
    pub fn expect_beside(&mut self, number: u32, names: Vec<String>) {
        if let Some(entry) = self.tunnels.get_mut(&number) {
            entry.beside = names;
        }
        if self.complete {
            self.guard();
        }
    }

    /// Lets all routes that lead into one device of a tunnel lead into another, those of others, too.
    ///
    /// # Errors
    ///
    /// The first step that failed; the others are done all the same.
    pub async fn hand_over(&mut self, number: u32, from: u32, to: u32) -> Result<(), NetlinkError> {
        if let Some(entry) = self.tunnels.get_mut(&number) {
            entry.device = Some(to);
        }
        self.netlink.inherit_routes(from, to).await
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
        let present = Present {
            routes: self.netlink.our_routes().await?.into_iter().collect(),
            rules: self.netlink.our_rules().await?.into_iter().collect(),
        };
        let mut first = self.add(&plan, &present).await;
        if self.complete {
            for rule in present.rules.difference(&plan.rules) {
                first = first.and(self.netlink.remove_rule(rule).await);
            }
            let mut leftovers = present.routes.difference(&plan.routes).peekable();
            // A route that differs from the planned one in its source alone had kept that one out.
            let again = leftovers.peek().is_some();
            for route in leftovers {
                first = first.and(self.netlink.remove_route(route).await);
            }
            if again {
                first = first.and(self.add(&plan, &Present::default()).await);
            }
        }
        self.kernel = Some(kernel);
        self.unreachable = plan.unreachable;
        if self.complete {
            self.guard();
        }
        first
    }

    /// Lets the kernel drop plaintext that should have come through a tunnel, anew if somebody has removed that. Until
    /// all tunnels are known a former life's guard stays as it is.
    pub fn guard(&mut self) {
        let tunnels: Vec<_> = self
            .tunnels
            .values()
            .flat_map(|entry| {
                let names = [&entry.name].into_iter().chain(&entry.beside);
                names.map(|name| Guarded {
                    device: name,
                    is_there: entry.device.is_some(),
                    spec: &entry.spec,
                })
            })
            .collect();
        let wanted = guard::guard(&tunnels, self.ports);
        if self.guard.as_ref() == Some(&wanted) && self.stands() {
            return;
        }
        let done = if wanted.is_empty() {
            table::remove()
        } else {
            table::install(&wanted)
        };
        match done {
            Ok(()) => {
                if self.guard.as_ref() == Some(&wanted) {
                    tracing::warn!("somebody had removed the plaintext guard");
                }
                self.guard = Some(wanted);
                self.refused = false;
            }
            Err(error) => {
                self.guard = None;
                if !std::mem::replace(&mut self.refused, true) {
                    tracing::warn!(
                        %error,
                        "no plaintext guard: the kernel does not take the nf_tables table ipsec-xdp, so plaintext from remote \
                         selectors is not refused; load the modules nf_tables, nft_fib_inet"
                    );
                }
            }
        }
    }

    /// Devices of tunnels that may take packets whose source a tunnel protects.
    pub fn wary(&self) -> BTreeSet<u32> {
        let protected = Protected::by(self.tunnels.values().map(|entry| &entry.spec));
        let wary = self.tunnels.values();
        wary.filter(|entry| protected.meets(&entry.spec))
            .filter_map(|entry| entry.device)
            .collect()
    }

    /// Sees to it that the plaintext guard is still there. To be called now and then.
    pub fn keep_guard(&mut self) {
        if self.complete && !self.stands() {
            self.guard();
        }
    }

    /// Whether the kernel has the guard that it was told.
    fn stands(&self) -> bool {
        self.guard
            .as_ref()
            .is_some_and(|guard| guard.is_empty() || matches!(table::dropped(), Ok(Some(_))))
    }

    /// Whether the plaintext guard stands as far as it is wanted; false before the first [`Self::guard`].
    pub fn is_guarded(&self) -> bool {
        self.guard.is_some()
    }
}

/// Removes every route and rule of ours, and the plaintext guard.
///
/// # Errors
///
/// The first step that failed.
pub async fn release(netlink: &Netlink) -> Result<(), NetlinkError> {
    table::remove().map_err(|error| NetlinkError {
        step: "remove the plaintext guard".to_owned(),
        reason: error.to_string(),
        errno: error.raw_os_error(),
    })?;
    for rule in netlink.our_rules().await? {
        netlink.remove_rule(&rule).await?;
    }
    for route in netlink.our_routes().await? {
        netlink.remove_route(&route).await?;
    }
    Ok(())
}
