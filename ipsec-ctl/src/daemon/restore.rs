//! Coming back: the state that the daemon before this one has left, and the data plane that has gone on without it.
//!
//! What is in the journal was written before anything was done of it. So an SA of the journal may be in the data plane or not,
//! and none that the journal does not know was ever used. The data plane is asked to go on with all of them; it refuses those
//! of which nobody knows how far they have counted, and those are deleted at the peer and negotiated anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use tracing::{info, warn};

use super::{
    gateway::{Gateway, StartError},
    journal::{Changes, Contents, Journal, Key, Unusable},
    tunnels::{Names, RestoredPair, SavedTunnel, Sends, Tunnels},
};
use crate::{
    config::Tunnel,
    dataplane::seam::{self, SaId, TunnelId},
    ike::{
        Endpoint,
        config::{EndpointConfig, PeerId},
        event::{ChildSaId, Command},
        rng::SystemRandom,
        time::Time,
    },
    wiped::Wiped,
};

/// What the daemon before this one has left.
pub(super) struct Left {
    pub(super) endpoint: Endpoint,
    pub(super) names: Names,
    tunnels: BTreeMap<TunnelId, SavedTunnel>,
    pairs: BTreeMap<ChildSaId, RestoredPair>,
}

impl Left {
    /// Reads it, if there is anything; tells the operator if that is of no use.
    pub(super) fn read(journal: &Journal, config: &EndpointConfig, now: Time) -> Option<Self> {
        let read = journal.read().and_then(|contents| {
            contents
                .map(|contents| Self::of(contents, config, now))
                .transpose()
        });
        read.unwrap_or_else(|cause| {
            warn!(%cause, "the journal of the daemon before this one is not used: tunnels are negotiated anew");
            None
        })
    }

    fn of(contents: Contents, config: &EndpointConfig, now: Time) -> Result<Self, Unusable> {
        let (mut names, mut tunnels, mut pairs) = (None, BTreeMap::new(), BTreeMap::new());
        let mut parts = Vec::new();
        for (key, bytes) in &contents {
            let senseless = |cause| Unusable::Senseless(format!("{key:?} cannot be read: {cause}"));
            match key {
                Key::Endpoint(part) => parts.push((*part, bytes.as_slice())),
                Key::Names => names = Some(rmp_serde::from_slice(bytes).map_err(senseless)?),
                Key::Tunnel(id) => {
                    tunnels.insert(*id, rmp_serde::from_slice(bytes).map_err(senseless)?);
                }
                Key::Pair(sa) => {
                    pairs.insert(*sa, rmp_serde::from_slice(bytes).map_err(senseless)?);
                }
            }
        }
        let random = Box::new(SystemRandom::new());
        let endpoint = Endpoint::restore(config.clone(), random, now, parts)
            .map_err(|cause| Unusable::Senseless(cause.to_string()))?;
        Ok(Self {
            endpoint,
            names: names.ok_or_else(|| Unusable::Senseless("it is not complete".to_owned()))?,
            tunnels,
            pairs,
        })
    }
}

/// What is left of a tunnel whose configuration is as it was.
struct Kept {
    id: TunnelId,
    saved: SavedTunnel,
    pairs: Vec<(ChildSaId, RestoredPair)>,
}

/// What is left, sorted by the configuration as it is now.
pub(super) struct Sorted {
    kept: BTreeMap<String, Kept>,
    /// Tunnels that are not configured any more, or otherwise.
    ended: Vec<TunnelId>,
}

impl Sorted {
    /// Nothing is left.
    pub(super) fn nothing() -> Self {
        Self {
            kept: BTreeMap::new(),
            ended: Vec::new(),
        }
    }

    /// Tells what stays from what the configuration does not want any more.
    pub(super) fn by(
        configured: &[Tunnel],
        tunnels: BTreeMap<TunnelId, SavedTunnel>,
        mut pairs: BTreeMap<ChildSaId, RestoredPair>,
    ) -> Self {
        let mut sorted = Self::nothing();
        for (id, saved) in tunnels {
            let same = configured.iter().any(|tunnel| {
                tunnel.name == saved.name && super::reload::terms(tunnel) == saved.terms
            });
            if !same {
                info!(
                    tunnel = saved.name,
                    "its configuration is another: its SAs are deleted"
                );
                sorted.ended.push(id);
                continue;
            }
            let kept = Kept {
                id,
                pairs: pairs.extract_if(.., |_, pair| pair.tunnel == id).collect(),
                saved,
            };
            sorted.kept.insert(kept.saved.name.clone(), kept);
        }
        sorted
    }
}

impl Left {
    /// Takes it apart: the endpoint with its names, and the tunnels sorted.
    pub(super) fn sort(self, configured: &[Tunnel]) -> (Endpoint, Names, Sorted) {
        let sorted = Sorted::by(configured, self.tunnels, self.pairs);
        (self.endpoint, self.names, sorted)
    }
}

impl Gateway {
    /// Sets all configured tunnels up, those that were up before with their SAs, and lets the data plane go on with these.
    pub(super) async fn come_back(&mut self, sorted: Sorted) -> Result<(), StartError> {
        let Sorted { mut kept, ended } = sorted;
        let mut ids = BTreeSet::new();
        for tunnel in self.config.tunnels.clone() {
            ids.insert(match kept.remove(&tunnel.name) {
                Some(kept) => self.put_back(tunnel, kept),
                None => self.tunnels.add(tunnel),
            });
        }
        let now = self.now();
        for id in ended {
            let peer = PeerId(id.0);
            self.endpoint.handle_command(now, Command::RemovePeer(peer));
        }
        // What the data plane is to forget now must not be come back to.
        self.save();
        for tunnel in self.engine.survey().await.tunnels {
            if !ids.contains(&tunnel.id) {
                self.tell(seam::Command::RemoveTunnel(tunnel.id)).await;
            }
        }
        for id in ids {
            let name = self
                .tunnels
                .get(id)
                .map(|tunnel| tunnel.config.name.clone());
            self.set_up(id).await.map_err(|cause| StartError::Tunnel {
                name: name.unwrap_or_default(),
                cause,
            })?;
        }
        let lost = self.go_on().await;
        let _ = self.engine.command(seam::Command::Configured).await;
        for sa in lost {
            self.endpoint.handle_command(now, Command::Lost(sa));
        }
        Ok(())
    }

    fn put_back(&mut self, config: Tunnel, kept: Kept) -> TunnelId {
        let Kept { id, saved, pairs } = kept;
        self.tunnels.put_in(id, config);
        if let Some(state) = self.tunnels.get_mut(id) {
            state.down = saved.down;
            state.raised = saved.raised;
            state.places = saved.places;
            state.elsewhere = saved.elsewhere;
        }
        for (sa, RestoredPair { pair, .. }) in pairs {
            self.tunnels.installed(id, sa, pair);
        }
        id
    }

    /// Lets the data plane go on with the SAs that were in force, does what the daemon before had begun to do, and removes what
    /// nobody wants. Returns the pairs that cannot go on.
    async fn go_on(&mut self) -> BTreeSet<ChildSaId> {
        let mut lost: BTreeSet<ChildSaId> = self.resume_all().await.into_iter().collect();
        // They may have been acted on, or not: in either case there is one way to make it so.
        self.in_doubt = Some(BTreeSet::new());
        while let Some(event) = self.endpoint.poll_event() {
            self.ike_event(event).await;
        }
        lost.extend(self.in_doubt.take().unwrap_or_default());
        let known: BTreeSet<ChildSaId> = self.endpoint.pairs().collect();
        let pairs = || {
            self.tunnels
                .iter()
                .flat_map(|(id, tunnel)| tunnel.pairs.iter().map(move |(sa, pair)| (id, *sa, pair)))
        };
        let wanted: BTreeSet<SaId> = pairs()
            .filter(|(_, sa, _)| known.contains(sa))
            .flat_map(|(_, _, pair)| pair.installed().map(|spec| spec.id).collect::<Vec<_>>())
            .collect();
        let stray: Vec<(TunnelId, ChildSaId)> = pairs()
            .filter(|(_, sa, _)| !known.contains(sa))
            .map(|(id, sa, _)| (id, sa))
            .collect();
        let ours: BTreeSet<ChildSaId> = pairs().map(|(_, sa, _)| sa).collect();
        let kept = pairs()
            .filter(|(_, _, pair)| pair.sends == Sends::Now)
            .count();
        for (id, sa) in stray {
            self.tunnels.removed(id, sa);
        }
        lost.extend(known.difference(&ours));
        let survey = self.engine.survey().await;
        for tunnel in survey.tunnels {
            if let Some(state) = self.tunnels.get_mut(tunnel.id) {
                state.mtu = tunnel.mtu;
                state.policies = tunnel.policies;
            }
        }
        for sa in survey.sas {
            if !wanted.contains(&sa.id) {
                self.tell(seam::Command::Remove(sa.id)).await;
            }
        }
        if kept > 0 || !lost.is_empty() {
            info!(
                children = kept,
                lost = lost.len(),
                "the SAs of the daemon before this one go on"
            );
        }
        lost
    }

    pub(super) async fn tell(&self, command: seam::Command) {
        if let Err(cause) = self.engine.command(command).await {
            warn!(%cause, "the data plane keeps what is not wanted any more");
        }
    }

    /// Writes down what has changed. Before anything is done of it, so that a daemon that comes after this one knows it.
    pub(super) fn save(&mut self) {
        if !self.journal.is_kept() {
            return;
        }
        if self.journal.wants_everything() {
            self.endpoint.everything_has_changed();
            self.tunnels.everything_has_changed();
        }
        match self.changes() {
            Ok(changes) if changes.is_empty() => {}
            Ok(changes) => {
                self.journal.save(&changes);
                let (endpoint, tunnels) = (&self.endpoint, &self.tunnels);
                self.journal
                    .renew(|after| all_parts(endpoint, tunnels, after));
            }
            Err(error) => {
                // What is not written down must not be come back to.
                warn!(%error, "the state cannot be written down: if the daemon dies now, tunnels are negotiated anew");
                self.journal.discard();
            }
        }
    }

    fn changes(&mut self) -> io::Result<Changes> {
        let mut changes = self.tunnels.changes()?;
        for (part, content) in self.endpoint.changes()? {
            changes.push((Key::Endpoint(part), content));
        }
        Ok(changes)
    }
}

/// All that is saved, after a key and in the order of keys.
fn all_parts<'a>(
    endpoint: &'a Endpoint,
    tunnels: &'a Tunnels,
    after: Option<Key>,
) -> impl Iterator<Item = (Key, io::Result<Wiped>)> + 'a {
    let of_endpoint = match after {
        None => Some(None),
        Some(Key::Endpoint(part)) => Some(Some(part)),
        Some(Key::Names | Key::Tunnel(_) | Key::Pair(_)) => None,
    };
    of_endpoint
        .into_iter()
        .flat_map(|after| endpoint.parts_after(after))
        .map(|(part, content)| (Key::Endpoint(part), content))
        .chain(tunnels.parts_after(after))
}
