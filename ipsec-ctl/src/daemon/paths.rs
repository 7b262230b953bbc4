//! Between which addresses the peers are reached, for as long as their IKE SAs are up: the kernel's routes and addresses
//! are watched, and where another way leads to a peer now, its IKE SA goes there (MOBIKE).
//!
//! A notification only says that something has changed. A task asks beside the loop where packets to each peer would leave
//! now, and what it finds comes back as a value. However fast routes change, it looks for a tenth of the time at most.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{Duration, Instant},
};

use tokio::{
    sync::mpsc,
    time::{sleep_until, timeout},
};
use tracing::{debug, warn};

use super::{convert, gateway::Gateway};
use crate::{
    dataplane::seam::TunnelId,
    ike::{
        config::{PeerId, Way},
        event::{Command, IkeInfo, IkeSaId},
    },
    net::{
        netlink::{Netlink, NetlinkError},
        watch::{self, Change},
    },
};

/// Time for which further changes are waited for: they seldom come alone.
const SETTLE: Duration = Duration::from_millis(50);
/// Time after which what came up or moved meanwhile is looked at, too.
const AGAIN: Duration = Duration::from_secs(1);
/// After a look there is none for so many times as long as it took, so that routes that never rest do not keep us busy.
const PAUSES: u32 = 10;
/// Time that the kernel has for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// An IKE SA that may go elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wish {
    ike: IkeSaId,
    tunnel: TunnelId,
    /// Our address in use.
    local: IpAddr,
    /// The only address that we may have, by the configuration.
    fixed: Option<IpAddr>,
    /// The peer's addresses, the preferred one first.
    remotes: Vec<IpAddr>,
    /// The peer's address in use.
    remote: IpAddr,
    /// It goes only if our address in use is gone: moving is not ours to decide, or is not possible without a new IKE SA.
    only_if_gone: bool,
}

/// Where an IKE SA should go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Move {
    ike: IkeSaId,
    tunnel: TunnelId,
    local: IpAddr,
    remote: IpAddr,
}

/// What a task has found.
#[derive(Debug)]
pub(super) struct Look {
    /// Our addresses that peers may be told of.
    addresses: Vec<IpAddr>,
    moves: Vec<Move>,
}

/// What there is to do.
pub(super) enum Step {
    /// Look where the peers are reached.
    Look,
    /// See to what was found.
    Found(Look),
}

/// The watch over routes and addresses.
#[derive(Debug)]
pub(super) struct Paths {
    netlink: Netlink,
    mark: u32,
    changes: mpsc::Receiver<Change>,
    looks: mpsc::UnboundedReceiver<Look>,
    found: mpsc::UnboundedSender<Look>,
    /// When to look next.
    due: Option<Instant>,
    /// When the look that is under way began.
    running: Option<Instant>,
    /// No look begins before.
    earliest: Instant,
}

impl Paths {
    /// Watches the network namespace that the caller is in. The first look is due at once.
    pub(super) fn start(netlink: Netlink, mark: u32) -> std::io::Result<Self> {
        let (found, looks) = mpsc::unbounded_channel();
        Ok(Self {
            netlink,
            mark,
            changes: watch::start()?,
            looks,
            found,
            due: Some(Instant::now()),
            running: None,
            earliest: Instant::now(),
        })
    }

    /// The next thing to do.
    pub(super) async fn next(&mut self) -> Step {
        let never = Instant::now() + Duration::from_secs(365 * 86_400);
        loop {
            let due = self.due.filter(|_| self.running.is_none()).unwrap_or(never);
            tokio::select! {
                Some(_) = self.changes.recv() => self.is_due_after(SETTLE),
                Some(look) = self.looks.recv() => {
                    self.looked();
                    return Step::Found(look);
                }
                () = sleep_until(due.into()) => {
                    self.due = None;
                    return Step::Look;
                }
            }
        }
    }

    /// An IKE SA has come up, perhaps between addresses that were good when it was begun.
    pub(super) fn look_soon(&mut self) {
        self.is_due_after(AGAIN);
    }

    fn is_due_after(&mut self, pause: Duration) {
        self.due = self.due.or(Some(Instant::now() + pause));
        self.due = self.due.max(Some(self.earliest));
    }

    /// A look is done; the next one has its time.
    fn looked(&mut self) {
        if let Some(began) = self.running.take() {
            let now = Instant::now();
            self.earliest = now + now.duration_since(began) * PAUSES;
            self.due = self.due.map(|due| due.max(self.earliest));
        }
    }

    /// Asks the kernel about all that may go elsewhere.
    fn look(&mut self, wishes: Vec<Wish>, ours: BTreeSet<String>) {
        self.running = Some(Instant::now());
        let (netlink, mark, found) = (self.netlink.clone(), self.mark, self.found.clone());
        tokio::spawn(async move {
            let look = match timeout(PATIENCE, look(&netlink, mark, &wishes, &ours)).await {
                Ok(Ok(look)) => look,
                Ok(Err(cause)) => {
                    warn!(%cause, "our addresses cannot be looked up");
                    Look::nothing()
                }
                Err(_) => Look::nothing(),
            };
            // A daemon that stops does not want to know.
            let _ = found.send(look);
        });
    }
}

impl Look {
    fn nothing() -> Self {
        Self {
            addresses: Vec::new(),
            moves: Vec::new(),
        }
    }
}

async fn look(
    netlink: &Netlink,
    mark: u32,
    wishes: &[Wish],
    ours: &BTreeSet<String>,
) -> Result<Look, NetlinkError> {
    let links = netlink.links().await?;
    let outside: BTreeSet<u32> = links
        .iter()
        .filter(|link| link.up && !link.loopback && !ours.contains(&link.name))
        .map(|link| link.index)
        .collect();
    let all = netlink.addresses().await?;
    let present: BTreeSet<IpAddr> = all.iter().map(|(_, net)| net.addr()).collect();
    let addresses: BTreeSet<IpAddr> = all
        .iter()
        .filter(|(link, _)| outside.contains(link))
        .map(|(_, net)| net.addr())
        .filter(|address| !is_link_local(*address))
        .collect();
    let mut moves = Vec::new();
    for wish in wishes {
        if wish.only_if_gone && present.contains(&wish.local) {
            continue;
        }
        let mut ways = Vec::new();
        for remote in &wish.remotes {
            let way = netlink.way(*remote, wish.fixed, Some(mark)).await?;
            let source = way.filter(|way| !way.local).and_then(|way| way.source);
            let local = wish.fixed.filter(|_| way.is_some()).or(source);
            ways.push(Way {
                remote: *remote,
                local,
            });
        }
        moves.extend(choose(wish, &ways));
    }
    Ok(Look {
        addresses: addresses.into_iter().collect(),
        moves,
    })
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// The first way that leads anywhere, unless it is the one that is in use.
fn choose(wish: &Wish, ways: &[Way]) -> Option<Move> {
    let (local, remote) = ways.iter().find_map(|way| Some((way.local?, way.remote)))?;
    let is_other = (local, remote) != (wish.local, wish.remote);
    is_other.then_some(Move {
        ike: wish.ike,
        tunnel: wish.tunnel,
        local,
        remote,
    })
}

impl Gateway {
    pub(super) fn path_step(&mut self, step: Step) {
        match step {
            Step::Look => {
                let wishes = self.wishes(|_| true);
                let ours = self.our_devices();
                self.paths.look(wishes, ours);
            }
            Step::Found(look) => self.paths_found(look),
        }
    }

    fn our_devices(&self) -> BTreeSet<String> {
        let devices = self.tunnels.iter();
        devices
            .map(|(_, tunnel)| tunnel.config.device.clone())
            .collect()
    }

    /// What may go elsewhere, of the IKE SAs that are up.
    fn wishes(&self, which: impl Fn(IkeSaId) -> bool) -> Vec<Wish> {
        let up = self.endpoint.established().filter(|(ike, ..)| which(*ike));
        up.filter_map(|(ike, peer, info)| self.wish(ike, peer, &info))
            .collect()
    }

    fn wish(&self, ike: IkeSaId, peer: PeerId, info: &IkeInfo) -> Option<Wish> {
        // Without MOBIKE only who has started the IKE SA can start another.
        if !info.mobike && !info.leads {
            return None;
        }
        let tunnel = TunnelId(peer.0);
        let config = &self.tunnels.get(tunnel)?.config;
        Some(Wish {
            ike,
            tunnel,
            local: info.local.ip(),
            fixed: config.local,
            remotes: info.ways_to_peer.clone(),
            remote: info.remote.ip(),
            only_if_gone: !(info.mobike && info.leads),
        })
    }

    /// Nothing comes back from a peer that has other addresses: the next one is tried.
    pub(super) fn unreachable(&mut self, ike: IkeSaId) {
        let mut wishes = self.wishes(|other| other == ike);
        for wish in &mut wishes {
            debug!(
                tunnel = self.name_of(PeerId(wish.tunnel.0)),
                remote = %wish.remote,
                "the peer does not answer; its next address is tried"
            );
            wish.remotes.rotate_left(1);
        }
        // A look that is under way may have found something else; the next silence comes soon.
        if self.paths.running.is_none() {
            let ours = self.our_devices();
            self.paths.look(wishes, ours);
        }
    }

    fn paths_found(&mut self, look: Look) {
        let now = self.now();
        if !look.addresses.is_empty() {
            let command = Command::Addresses(look.addresses);
            self.endpoint.handle_command(now, command);
        }
        // An IKE SA that was rekeyed meanwhile has an heir, which is to move, too.
        if !look.moves.is_empty() {
            self.paths.look_soon();
        }
        for step in look.moves {
            debug!(
                tunnel = self.name_of(PeerId(step.tunnel.0)),
                local = %step.local,
                remote = %step.remote,
                "another way leads to the peer now"
            );
            self.note_way(step);
            let command = Command::MoveTo(step.ike, step.local, step.remote);
            self.endpoint.handle_command(now, command);
        }
    }

    /// What is known of the ways to a peer is what the next start goes by.
    fn note_way(&mut self, step: Move) {
        let now = self.now();
        let Some(tunnel) = self.tunnels.get_mut(step.tunnel) else {
            return;
        };
        let ways = tunnel.places.iter_mut().flat_map(|place| &mut place.ways);
        for way in ways.flatten().filter(|way| way.remote == step.remote) {
            way.local = Some(step.local);
        }
        let peer = convert::peer_config(step.tunnel, &tunnel.config, &tunnel.places);
        self.endpoint
            .handle_command(now, Command::SetPeer(Box::new(peer)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn wish() -> Wish {
        Wish {
            ike: IkeSaId(1),
            tunnel: TunnelId(1),
            local: address(1),
            fixed: None,
            remotes: vec![address(100), address(101)],
            remote: address(100),
            only_if_gone: false,
        }
    }

    fn way(remote: u8, local: Option<u8>) -> Way {
        Way {
            remote: address(remote),
            local: local.map(address),
        }
    }

    #[test]
    fn the_first_address_of_the_peer_to_which_a_way_leads_is_chosen() {
        let chosen = |ways: &[Way]| choose(&wish(), ways).map(|step| (step.local, step.remote));
        let (one, two) = (address(1), address(2));
        assert_eq!(chosen(&[way(100, Some(1)), way(101, Some(2))]), None);
        assert_eq!(
            chosen(&[way(100, Some(2)), way(101, Some(1))]),
            Some((two, address(100)))
        );
        assert_eq!(
            chosen(&[way(100, None), way(101, Some(1))]),
            Some((one, address(101)))
        );
        assert_eq!(chosen(&[way(100, None), way(101, None)]), None);
    }
}
