//! Where the peers are: names looked up, our addresses towards them found, all beside the daemon's loop.
//!
//! A lookup is a task with a time limit, whose result comes back as a value. A resolver that hangs costs one of a few
//! permits and delays nobody but the peers whose names it owes.

use std::{
    collections::BTreeSet,
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tracing::{debug, warn};

use super::{convert, gateway::Gateway};
use crate::{
    config::{Host, Tunnel},
    dataplane::seam::{self, TunnelId},
    ike::{
        config::{PeerId, Way},
        event::Command,
    },
    net::netlink::Netlink,
};

/// Time that the resolver and the kernel each have for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Names that are looked up at the same time.
const LOOKUPS: usize = 32;
/// Addresses of one name that count; a resolver may answer with hundreds.
const ADDRESSES_MOST: usize = 8;
/// Age at which the answer for a name is asked for anew.
const AGE: Duration = Duration::from_secs(300);

/// One place where a peer may be, and what is known of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    /// As configured.
    pub(super) host: Host,
    /// Its addresses and the ways to them, or why none is known.
    pub(super) ways: Result<Vec<Way>, String>,
}

/// What a task has found out about a tunnel's peer.
#[derive(Debug)]
pub(super) struct Found {
    tunnel: TunnelId,
    places: Vec<Place>,
}

/// The tasks that look peers up.
#[derive(Debug)]
pub(super) struct Lookups {
    netlink: Netlink,
    mark: u32,
    running: BTreeSet<TunnelId>,
    permits: Arc<Semaphore>,
    found: mpsc::UnboundedSender<Found>,
}

impl Lookups {
    /// Results arrive at the receiver, at most one for each tunnel at a time.
    pub(super) fn new(netlink: Netlink, mark: u32) -> (Self, mpsc::UnboundedReceiver<Found>) {
        let (found, results) = mpsc::unbounded_channel();
        let lookups = Self {
            netlink,
            mark,
            running: BTreeSet::new(),
            permits: Arc::new(Semaphore::new(LOOKUPS)),
            found,
        };
        (lookups, results)
    }

    /// Begins to look a tunnel's peer up, unless that is under way.
    fn begin(&mut self, id: TunnelId, tunnel: &Tunnel, before: &[Place]) {
        if tunnel.peer.hosts().is_empty() || !self.running.insert(id) {
            return;
        }
        let (netlink, mark, found) = (self.netlink.clone(), self.mark, self.found.clone());
        let permits = Arc::clone(&self.permits);
        let (hosts, local) = (tunnel.peer.hosts().to_vec(), tunnel.local);
        let before = before.to_vec();
        tokio::spawn(async move {
            let mut places = Vec::new();
            for host in hosts {
                let known = before.iter().find(|place| place.host == host);
                let addresses = addresses(&host, &permits, system_lookup).await;
                let ways = match (addresses, known) {
                    (Ok(addresses), _) => Ok(ways(&netlink, mark, local, addresses).await),
                    // The last answer is better than none.
                    (Err(_), Some(Place { ways: Ok(ways), .. })) => Ok(ways.clone()),
                    (Err(why), _) => Err(why),
                };
                places.push(Place { host, ways });
            }
            // A daemon that stops does not want to know.
            let _ = found.send(Found { tunnel: id, places });
        });
    }
}

async fn system_lookup(name: String) -> io::Result<Vec<IpAddr>> {
    let found = tokio::net::lookup_host((name, 0)).await?;
    Ok(found.map(|address| address.ip()).collect())
}

/// The addresses of a host, or why there are none.
async fn addresses<F>(
    host: &Host,
    permits: &Arc<Semaphore>,
    lookup: impl FnOnce(String) -> F,
) -> Result<Vec<IpAddr>, String>
where
    F: Future<Output = io::Result<Vec<IpAddr>>> + Send + 'static,
{
    let name = match host {
        Host::Address(address) => return Ok(vec![*address]),
        Host::Name(name) => name.clone(),
    };
    let seconds = PATIENCE.as_secs();
    let late = |_| format!("{name}: the resolver has not answered within {seconds} s");
    let permit = timeout(PATIENCE, Arc::clone(permits).acquire_owned())
        .await
        .map_err(late)?;
    let lookup = lookup(name.clone());
    // The system's resolver cannot be interrupted, so the permit stays with it and not with whoever waits.
    let task = tokio::spawn(async move {
        let answer = lookup.await;
        drop(permit);
        answer
    });
    let answer = timeout(PATIENCE, task).await.map_err(late)?;
    let mut found: Vec<IpAddr> = Vec::new();
    match answer {
        Ok(Ok(answer)) => {
            for address in answer {
                if !found.contains(&address) && found.len() < ADDRESSES_MOST {
                    found.push(address);
                }
            }
        }
        Ok(Err(cause)) => return Err(format!("{name}: {cause}")),
        Err(cause) => return Err(format!("{name}: {cause}")),
    }
    if found.is_empty() {
        return Err(format!("{name} has no address"));
    }
    Ok(found)
}

/// How addresses are reached: from the configured address, or from the one that the kernel gives our own packets.
async fn ways(
    netlink: &Netlink,
    mark: u32,
    local: Option<IpAddr>,
    addresses: Vec<IpAddr>,
) -> Vec<Way> {
    let mut ways = Vec::new();
    for remote in addresses {
        let local = match local {
            Some(local) if local.is_ipv4() == remote.is_ipv4() => Some(local),
            Some(_) => continue,
            None => match timeout(PATIENCE, netlink.way(remote, None, Some(mark))).await {
                Ok(Ok(way)) => way.and_then(|way| way.source),
                Ok(Err(cause)) => {
                    warn!(%remote, %cause, "the way to a peer cannot be looked up");
                    None
                }
                Err(_) => None,
            },
        };
        ways.push(Way { remote, local });
    }
    ways
}

/// The ways of all places, each address once and in their order.
pub(super) fn all_ways(places: &[Place]) -> Vec<Way> {
    let mut all: Vec<Way> = Vec::new();
    for way in places.iter().flat_map(|place| place.ways.iter().flatten()) {
        if all.iter().all(|known| known.remote != way.remote) {
            all.push(*way);
        }
    }
    all
}

impl Gateway {
    /// Has a tunnel's peer looked up.
    pub(super) fn look_up(&mut self, id: TunnelId) {
        if let Some(tunnel) = self.tunnels.get_mut(id) {
            tunnel.looked_up = Instant::now();
            self.lookups.begin(id, &tunnel.config, &tunnel.places);
        }
    }

    /// Has names looked up whose answers are old.
    pub(super) fn look_up_what_is_old(&mut self) {
        let old: Vec<TunnelId> = self
            .tunnels
            .iter()
            .filter(|(_, tunnel)| {
                tunnel.pending
                    || (tunnel.config.peer.has_names() && tunnel.looked_up.elapsed() >= AGE)
            })
            .map(|(id, _)| id)
            .collect();
        for id in old {
            self.look_up(id);
        }
    }

    /// Starts a tunnel as soon as the way to its peer is known.
    pub(super) fn bring_up(&mut self, id: TunnelId) {
        if let Some(tunnel) = self.tunnels.get_mut(id) {
            tunnel.pending = true;
        }
        self.look_up(id);
    }

    /// What is known of a tunnel's peer has been asked for anew.
    pub(super) async fn found(&mut self, found: Found) {
        let id = found.tunnel;
        self.lookups.running.remove(&id);
        let now = self.now();
        let Some(tunnel) = self.tunnels.get_mut(id) else {
            return;
        };
        // A reload may have changed the peer while it was looked up.
        let hosts = found.places.iter().map(|place| &place.host);
        if !hosts.eq(tunnel.config.peer.hosts()) {
            return self.look_up(id);
        }
        for place in &found.places {
            if let Err(why) = &place.ways {
                debug!(tunnel = tunnel.config.name, "{why}");
            }
        }
        let addresses = |places: &[Place]| -> Vec<IpAddr> {
            all_ways(places).iter().map(|way| way.remote).collect()
        };
        let moved = addresses(&tunnel.places) != addresses(&found.places);
        let changed = tunnel.places != found.places;
        tunnel.places = found.places;
        let (config, places) = (tunnel.config.clone(), tunnel.places.clone());
        if moved {
            self.set_tunnel(id).await;
        }
        if changed {
            let peer = convert::peer_config(id, &config, &places);
            self.endpoint
                .handle_command(now, Command::SetPeer(Box::new(peer)));
        }
        self.start_if_pending(id);
    }

    /// Tells the data plane where a tunnel's peer is.
    pub(super) async fn set_tunnel(&self, id: TunnelId) {
        let Some(tunnel) = self.tunnels.get(id) else {
            return;
        };
        let config = &tunnel.config;
        let spec = convert::tunnel_spec(id, config, &tunnel.places, &tunnel.elsewhere);
        let command = seam::Command::SetTunnel(Box::new(spec));
        if let Err(cause) = self.engine.command(command).await {
            warn!(tunnel = config.name, %cause, "the peer's addresses could not be set");
        }
    }

    fn start_if_pending(&mut self, id: TunnelId) {
        let (now, port) = (self.now(), self.config.ports.ike);
        let Some(tunnel) = self.tunnels.get_mut(id).filter(|tunnel| tunnel.pending) else {
            return;
        };
        if let Some(local) = tunnel.local() {
            tunnel.pending = false;
            let command = Command::Up(PeerId(id.0), (local, port).into());
            return self.endpoint.handle_command(now, command);
        }
        let unknown = tunnel
            .places
            .iter()
            .find_map(|place| place.ways.as_ref().err());
        let why = unknown.map_or("there is no route to the peer", String::as_str);
        if tunnel.failure.as_deref() != Some(why) {
            warn!(tunnel = tunnel.config.name, "{why}");
            tunnel.failure = Some(why.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> Host {
        Host::Name("gw.example.com".to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn a_resolver_that_never_answers_is_given_up_and_delays_no_other_name() {
        let permits = Arc::new(Semaphore::new(2));
        let hangs = |_| std::future::pending();
        let why = addresses(&name(), &permits, hangs).await.unwrap_err();
        assert!(why.contains("has not answered within 5 s"), "{why}");
        let answers = |_| async { Ok(vec![IpAddr::from([192, 0, 2, 1])]) };
        assert_eq!(
            addresses(&name(), &permits, answers).await.unwrap(),
            [IpAddr::from([192, 0, 2, 1])]
        );
        // The one that hangs keeps its permit: their number bounds the threads that a dead resolver can hold.
        assert_eq!(permits.available_permits(), 1);
    }

    #[tokio::test]
    async fn a_flood_of_addresses_and_repetitions_are_cut_down() {
        let permits = Arc::new(Semaphore::new(1));
        let many = |_| async {
            let numbers = (0..=255).flat_map(|number| [number, number]);
            Ok(numbers
                .map(|number| IpAddr::from([192, 0, 2, number]))
                .collect())
        };
        let found = addresses(&name(), &permits, many).await.unwrap();
        assert_eq!(found.len(), ADDRESSES_MOST);
        assert_eq!(found.last(), Some(&IpAddr::from([192, 0, 2, 7])));
    }

    #[test]
    fn an_address_that_several_places_have_is_tried_once() {
        let way = |last: u8| Way {
            remote: IpAddr::from([192, 0, 2, last]),
            local: None,
        };
        let place = |ways| Place { host: name(), ways };
        let places = [
            place(Ok(vec![way(1), way(2)])),
            place(Err("no answer".to_owned())),
            place(Ok(vec![way(2), way(3)])),
        ];
        assert_eq!(all_ways(&places), [way(1), way(2), way(3)]);
    }
}
