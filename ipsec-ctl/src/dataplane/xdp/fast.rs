//! The fast path as a whole: which interfaces carry the program, which workers serve them, and which SAs take it.
//!
//! Keeps the program's tables ([`Classifier`]), the workers ([`Fleet`]) and the ledger in step with links, tunnels, SAs
//! and the firewall. Everything here may fail or be missing: then the slow path carries the packets.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::IpAddr,
    os::fd::BorrowedFd,
    sync::Arc,
};

use ipsec_common::{Reason, Spi};

use super::{
    af_xdp::socket::{CopyMode, QueueId},
    fleet::{Fleet, FleetConfig, FleetError, FleetLink},
    gateway::{Port, Shared},
    offload::{Facts, decide, has_partial_checksums, is_offloaded, unsuitable},
    program::{AttachMode, Program, ProgramError},
    resolver::Resolver,
    slow::SlowPath,
};
use crate::{
    dataplane::seam::{
        Direction, FastPath as Configured, InterfaceStatus, Ledger, Offload, OffloadReason, SaId,
        TunnelId, XdpMode,
    },
    net::{netlink::Link, queues::receive_queues},
};

/// The XDP program and its tables, as far as the fast path keeps them. Removing what is not there is no error.
pub trait Classifier: Send {
    /// Attaches the program to an interface, or finds that it is attached already. It passes everything for now.
    ///
    /// # Errors
    ///
    /// Why the interface does not take it.
    fn attach(&mut self, ifindex: u32) -> Result<XdpMode, OffloadReason>;
    /// Detaches it.
    fn detach(&mut self, ifindex: u32);
    /// Enters the socket of a queue of an interface with so many queues.
    ///
    /// # Errors
    ///
    /// As for all that follow, what the kernel answers.
    fn enter_socket(&mut self, at: QueueId, queues: u32, socket: BorrowedFd<'_>) -> io::Result<()>;
    /// Lets it redirect what arrives on an interface.
    fn activate(&mut self, ifindex: u32, mac: [u8; 6]) -> Result<(), ProgramError>;
    /// Makes it pass everything again.
    fn deactivate(&mut self, ifindex: u32);
    /// Tells it about the device of a tunnel.
    fn set_tunnel(&mut self, device: u32, mtu: u32, offloaded: bool) -> Result<(), ProgramError>;
    /// Forgets a tunnel.
    fn remove_tunnel(&mut self, device: u32);
    /// Tells it about an inbound SA.
    fn set_inbound(&mut self, sa: &FastSa, offloaded: bool) -> Result<(), ProgramError>;
    /// Forgets an inbound SA.
    fn remove_inbound(&mut self, sa: &FastSa);
    /// Tells it which addresses are ours.
    fn set_addresses(&mut self, addresses: &[IpAddr]) -> Result<(), ProgramError>;
    /// Packets that it counted.
    fn count(&self, reason: Reason) -> u64;
}

impl Classifier for Program {
    fn attach(&mut self, ifindex: u32) -> Result<XdpMode, OffloadReason> {
        Program::attach(self, ifindex).map(|mode| match mode {
            AttachMode::Native => XdpMode::Native,
            AttachMode::Generic => XdpMode::Generic,
        })
    }

    fn detach(&mut self, ifindex: u32) {
        Program::detach(self, ifindex);
    }

    fn enter_socket(&mut self, at: QueueId, queues: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        Program::enter_socket(self, at, queues, socket)
    }

    fn activate(&mut self, ifindex: u32, mac: [u8; 6]) -> Result<(), ProgramError> {
        Program::activate(self, ifindex, mac)
    }

    fn deactivate(&mut self, ifindex: u32) {
        Program::deactivate(self, ifindex);
    }

    fn set_tunnel(&mut self, device: u32, mtu: u32, offloaded: bool) -> Result<(), ProgramError> {
        Program::set_tunnel(self, device, mtu, offloaded)
    }

    fn remove_tunnel(&mut self, device: u32) {
        Program::remove_tunnel(self, device);
    }

    fn set_inbound(&mut self, sa: &FastSa, offloaded: bool) -> Result<(), ProgramError> {
        Program::set_inbound(self, sa.spi, sa.local, sa.slot, offloaded)
    }

    fn remove_inbound(&mut self, sa: &FastSa) {
        Program::remove_inbound(self, sa.spi, sa.local);
    }

    fn set_addresses(&mut self, addresses: &[IpAddr]) -> Result<(), ProgramError> {
        Program::set_addresses(self, addresses)
    }

    fn count(&self, reason: Reason) -> u64 {
        Program::count(self, reason)
    }
}

/// What a fast path is made of.
pub struct FastConfig {
    /// Names of the interfaces that may carry the program; all that can, if there are none.
    pub interfaces: Option<Vec<String>>,
    /// How workers run.
    pub fleet: FleetConfig,
    /// What workers share.
    pub shared: Shared,
    /// Where they ask for next hops.
    pub resolver: Resolver,
    /// Where they leave what they cannot send.
    pub exit: Arc<SlowPath>,
}

/// The fast path of an engine.
pub struct FastPath {
    config: FastConfig,
    /// None where no program can be loaded.
    classifier: Option<Box<dyn Classifier>>,
    interfaces: BTreeMap<u32, Interface>,
    fleet: Option<Fleet>,
    foreign_netfilter: bool,
    tunnels: HashMap<TunnelId, FastTunnel>,
    sas: HashMap<SaId, FastSa>,
}

/// An interface that may carry the program.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Interface {
    link: Link,
    /// Mode and queues, or why it has no fast path.
    outcome: Result<(XdpMode, u32), OffloadReason>,
}

/// A tunnel as the fast path knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FastTunnel {
    /// Index of its device.
    pub device: u32,
    /// MTU of its device in bytes.
    pub mtu: u16,
    /// What its configuration says.
    pub fast_path: Configured,
}

/// An SA as the fast path knows it.
#[derive(Clone, Copy, Debug)]
pub struct FastSa {
    /// Its tunnel.
    pub tunnel: TunnelId,
    /// Its direction.
    pub direction: Direction,
    /// Its SPI.
    pub spi: Spi,
    /// Our outer address.
    pub local: IpAddr,
    /// Slot of its words.
    pub slot: u32,
    offload: Offload,
}

impl FastSa {
    /// An SA that is not offloaded yet.
    pub fn new(tunnel: TunnelId, direction: Direction, spi: Spi, local: IpAddr, slot: u32) -> Self {
        Self {
            tunnel,
            direction,
            spi,
            local,
            slot,
            offload: Offload::Declined(OffloadReason::NoInterface),
        }
    }
}

impl FastPath {
    /// A fast path without interfaces yet.
    pub fn new(config: FastConfig, classifier: Option<Box<dyn Classifier>>) -> Self {
        Self {
            config,
            classifier,
            interfaces: BTreeMap::new(),
            fleet: None,
            foreign_netfilter: false,
            tunnels: HashMap::new(),
            sas: HashMap::new(),
        }
    }

    /// Takes in what links there are now. Returns whose offload has changed.
    pub fn set_links<'a>(&mut self, links: impl IntoIterator<Item = &'a Link>) -> Vec<Ledger> {
        let wanted: BTreeMap<u32, &Link> = links
            .into_iter()
            .filter(|link| self.is_candidate(link))
            .map(|link| (link.index, link))
            .collect();
        let gone: Vec<u32> = self
            .interfaces
            .keys()
            .filter(|index| !wanted.contains_key(index))
            .copied()
            .collect();
        let mut changed = !gone.is_empty();
        for index in gone {
            self.interfaces.remove(&index);
            if let Some(classifier) = &mut self.classifier {
                classifier.detach(index);
            }
        }
        for (index, link) in wanted {
            let queues = receive_queues(&link.name).unwrap_or(1);
            // A failure is not tried again before the link changes.
            let same = self.interfaces.get(&index).is_some_and(|known| {
                known.link == *link && known.outcome.map_or(true, |(_, known)| known == queues)
            });
            if !same {
                changed = true;
                let outcome = self.attach(link).map(|mode| (mode, queues));
                let interface = Interface {
                    link: link.clone(),
                    outcome,
                };
                self.interfaces.insert(index, interface);
            }
        }
        if changed {
            self.staff();
        }
        self.decide_all()
    }

    /// Takes in whether netfilter chains of others would be bypassed. Returns whose offload has changed.
    pub fn set_foreign_netfilter(&mut self, foreign: bool) -> Vec<Ledger> {
        if std::mem::replace(&mut self.foreign_netfilter, foreign) == foreign {
            return Vec::new();
        }
        self.decide_all()
    }

    /// Takes in which addresses are ours.
    pub fn set_addresses(&mut self, addresses: &[IpAddr]) {
        if let Some(classifier) = &mut self.classifier {
            report(classifier.set_addresses(addresses), "enter our addresses");
        }
    }

    /// Takes in a tunnel, or what changed about it. Returns whose offload has changed.
    pub fn set_tunnel(&mut self, id: TunnelId, tunnel: FastTunnel) -> Vec<Ledger> {
        let old = self.tunnels.insert(id, tunnel);
        if let Some(old) = old.filter(|old| old.device != tunnel.device)
            && let Some(classifier) = &mut self.classifier
        {
            classifier.remove_tunnel(old.device);
        }
        self.decide_all()
    }

    /// The MTU of a tunnel's device has changed.
    pub fn set_mtu(&mut self, id: TunnelId, mtu: u16) {
        if let Some(tunnel) = self.tunnels.get_mut(&id) {
            tunnel.mtu = mtu;
            self.enter_tunnels();
        }
    }

    /// Forgets a tunnel and its SAs.
    pub fn remove_tunnel(&mut self, id: TunnelId) {
        let sas: Vec<SaId> = self
            .sas
            .iter()
            .filter(|(_, sa)| sa.tunnel == id)
            .map(|(id, _)| *id)
            .collect();
        for sa in sas {
            self.remove(sa);
        }
        if let Some(tunnel) = self.tunnels.remove(&id)
            && let Some(classifier) = &mut self.classifier
        {
            classifier.remove_tunnel(tunnel.device);
        }
    }

    /// Takes in an SA, or its new outer address, and decides about it.
    pub fn install(&mut self, id: SaId, mut sa: FastSa) -> Offload {
        self.remove(id);
        sa.offload = self.decide(sa.tunnel);
        self.sas.insert(id, sa);
        self.enter_sa(&sa);
        sa.offload
    }

    /// An SA has moved to another address of ours.
    pub fn move_local(&mut self, id: SaId, local: IpAddr) {
        if let Some(sa) = self.sas.get(&id).copied()
            && sa.local != local
        {
            self.install(id, FastSa { local, ..sa });
        }
    }

    /// Forgets an SA, before its words are given to another one.
    pub fn remove(&mut self, id: SaId) {
        if let Some(sa) = self.sas.remove(&id)
            && sa.direction == Direction::Inbound
            && let Some(classifier) = &mut self.classifier
        {
            classifier.remove_inbound(&sa);
        }
    }

    /// Packets that the program and the workers counted.
    pub fn count(&self, reason: Reason) -> u64 {
        let program = self
            .classifier
            .as_ref()
            .map_or(0, |classifier| classifier.count(reason));
        let workers = self.fleet.as_ref().map_or(0, |fleet| fleet.count(reason));
        program + workers
    }

    /// What is done on which interface.
    pub fn status(&self) -> Vec<InterfaceStatus> {
        let zero_copy = self
            .fleet
            .as_ref()
            .is_some_and(|fleet| fleet.mode() == CopyMode::ZeroCopy);
        self.interfaces
            .values()
            .map(|interface| InterfaceStatus {
                name: interface.link.name.clone(),
                xdp: interface.outcome.ok().map(|(mode, _)| mode),
                zero_copy: zero_copy && interface.outcome.is_ok(),
                queues: interface.outcome.map_or(0, |(_, queues)| queues),
                reason: interface.outcome.err(),
            })
            .collect()
    }

    /// Stops the workers; the program passes everything to the slow path from now on.
    pub fn stop(&mut self) {
        if let Some(classifier) = &mut self.classifier {
            for index in self.interfaces.keys() {
                classifier.deactivate(*index);
            }
        }
        self.fleet = None;
    }

    fn is_candidate(&self, link: &Link) -> bool {
        let wanted = self.config.interfaces.as_ref();
        let ours = self
            .tunnels
            .values()
            .any(|tunnel| tunnel.device == link.index);
        // A TUN of somebody else has no Ethernet to offload, and a VLAN is carried by the interface below it.
        let is_upper = match link.kind.as_deref() {
            Some("vlan") => true,
            Some("tun") => link.mac.is_empty(),
            _ => false,
        };
        link.up
            && !link.loopback
            && !ours
            && !is_upper
            && wanted.is_none_or(|names| names.contains(&link.name))
    }

    fn attach(&mut self, link: &Link) -> Result<XdpMode, OffloadReason> {
        if let Some(reason) = unsuitable(link) {
            return Err(reason);
        }
        let classifier = self.classifier.as_mut().ok_or(OffloadReason::NoXdp)?;
        classifier.attach(link.index)
    }

    /// Replaces the workers by such as serve the interfaces there are now.
    fn staff(&mut self) {
        self.stop();
        loop {
            let links = self.fleet_links();
            if links.is_empty() {
                return;
            }
            match self.start_fleet(&links) {
                Ok(()) => return,
                Err(FleetError::Socket(error)) => {
                    tracing::warn!(%error, "the interface takes no AF_XDP socket: its packets take the slow path");
                    let Some(interface) = self.interfaces.get_mut(&error.at.ifindex) else {
                        return;
                    };
                    interface.outcome = Err(OffloadReason::NoAfXdp);
                }
                Err(FleetError::Other { step, source }) => {
                    tracing::error!(step, error = %source, "no worker runs: all packets take the slow path");
                    for interface in self.interfaces.values_mut() {
                        if interface.outcome.is_ok() {
                            interface.outcome = Err(OffloadReason::NoAfXdp);
                        }
                    }
                    return;
                }
            }
        }
    }

    fn fleet_links(&self) -> Vec<FleetLink> {
        self.interfaces
            .values()
            .filter_map(|interface| {
                let (_, queues) = interface.outcome.ok()?;
                Some(FleetLink {
                    port: Port {
                        ifindex: interface.link.index,
                        partial_checksums: has_partial_checksums(&interface.link),
                    },
                    queues,
                })
            })
            .collect()
    }

    fn start_fleet(&mut self, links: &[FleetLink]) -> Result<(), FleetError> {
        let Some(classifier) = &mut self.classifier else {
            return Ok(());
        };
        let queues: HashMap<u32, u32> = links
            .iter()
            .map(|link| (link.port.ifindex, link.queues))
            .collect();
        let config = &self.config;
        let fleet = Fleet::start(
            links,
            config.fleet,
            &config.shared,
            &config.resolver,
            &config.exit,
            |at, socket| {
                let queues = queues.get(&at.ifindex).copied().unwrap_or_default();
                classifier.enter_socket(at, queues, socket)
            },
        )?;
        tracing::info!(
            workers = fleet.workers(),
            interfaces = links.len(),
            mode = ?fleet.mode(),
            "the fast path is ready"
        );
        self.fleet = Some(fleet);
        for link in links {
            let index = link.port.ifindex;
            let mac = self
                .interfaces
                .get(&index)
                .and_then(|interface| interface.link.mac.as_slice().try_into().ok());
            if let Some(mac) = mac {
                report(classifier.activate(index, mac), "enter an interface");
            }
        }
        Ok(())
    }

    fn decide(&self, tunnel: TunnelId) -> Offload {
        let interfaces: Vec<_> = self
            .interfaces
            .values()
            .map(|interface| interface.outcome.err())
            .collect();
        decide(&Facts {
            fast_path: self
                .tunnels
                .get(&tunnel)
                .map_or(Configured::Off, |tunnel| tunnel.fast_path),
            foreign_netfilter: self.foreign_netfilter,
            no_xdp: self.classifier.is_none(),
            interfaces: &interfaces,
        })
    }

    /// Decides about all tunnels and SAs anew. Returns what has changed.
    fn decide_all(&mut self) -> Vec<Ledger> {
        self.enter_tunnels();
        let mut changed = Vec::new();
        let ids: Vec<SaId> = self.sas.keys().copied().collect();
        for id in ids {
            let Some(mut sa) = self.sas.get(&id).copied() else {
                continue;
            };
            let offload = self.decide(sa.tunnel);
            if offload != sa.offload {
                sa.offload = offload;
                self.sas.insert(id, sa);
                self.enter_sa(&sa);
                changed.push(Ledger { sa: id, offload });
            }
        }
        changed.sort_by_key(|ledger| ledger.sa);
        changed
    }

    fn enter_sa(&mut self, sa: &FastSa) {
        if sa.direction != Direction::Inbound {
            return;
        }
        if let Some(classifier) = &mut self.classifier {
            let offloaded = is_offloaded(sa.offload);
            report(classifier.set_inbound(sa, offloaded), "enter an SA");
        }
    }

    fn enter_tunnels(&mut self) {
        let decided: Vec<_> = self
            .tunnels
            .iter()
            .map(|(id, tunnel)| (*tunnel, is_offloaded(self.decide(*id))))
            .collect();
        let Some(classifier) = &mut self.classifier else {
            return;
        };
        for (tunnel, offloaded) in decided {
            let entered = classifier.set_tunnel(tunnel.device, tunnel.mtu.into(), offloaded);
            report(entered, "enter a tunnel");
        }
    }
}

impl Drop for FastPath {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A table that could not be written: the packets concerned take the slow path, or are dropped and counted.
fn report(result: Result<(), ProgramError>, step: &str) {
    if let Err(error) = result {
        tracing::warn!(%error, step, "the XDP program's tables are incomplete");
    }
}

#[cfg(test)]
mod tests;
