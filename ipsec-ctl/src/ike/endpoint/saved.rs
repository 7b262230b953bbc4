//! What an endpoint must not forget when its process dies, in parts, so that saving what has changed costs the same with
//! one IKE SA and with thousands.
//!
//! The caller saves what has changed before it acts on any output, and so nothing that a peer or a data plane has seen is
//! ever forgotten: no message ID is used for another message, no key for another pair. Datagrams to send are not saved:
//! requests are repeated, and responses when they are asked for again, byte by byte. Peers are not saved either, for they
//! hold the operator's secrets: the caller tells them again with [`Command::SetPeer`](super::Command::SetPeer).

use std::{collections::VecDeque, io, net::IpAddr, ops::Bound};

use serde::{Deserialize, Serialize};

use super::{Endpoint, handover::Pair, shared::Numbers};
use crate::ike::{
    config::EndpointConfig,
    event::{ChildSaId, Event, IkeSaId},
    job::Job,
    rng::Random,
    sa::{IkeSa, State},
    time::Time,
};
use crate::wiped::Wiped;

/// Names a part of what is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Part {
    /// Numbers that are given out next, and events that the caller has not polled.
    Common,
    /// An IKE SA.
    Ike(IkeSaId),
    /// What a pair of ESP SAs is used for.
    Pair(ChildSaId),
}

/// Why an endpoint cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A part is not what this version saves.
    #[error("{part:?} cannot be read: {cause}")]
    Unreadable {
        /// Which one.
        part: Part,
        /// Why.
        cause: rmp_serde::decode::Error,
    },
    /// A part that is always there is not.
    #[error("it is not complete")]
    Incomplete,
}

#[derive(Serialize)]
struct Common<'a> {
    next: Numbers,
    addresses: &'a [IpAddr],
    events: &'a VecDeque<Event>,
}

#[derive(Deserialize)]
struct RestoredCommon {
    next: Numbers,
    addresses: Vec<IpAddr>,
    events: VecDeque<Event>,
}

#[derive(Serialize)]
struct Ike<'a> {
    sa: &'a IkeSa,
    jobs: Vec<&'a Job>,
}

#[derive(Deserialize)]
struct RestoredIke {
    sa: IkeSa,
    jobs: Vec<Job>,
}

impl Endpoint {
    /// Whether there is something to do, which the caller must not begin before it has saved what has changed.
    pub fn has_output(&self) -> bool {
        let shared = &self.shared;
        !(shared.events.is_empty() && shared.transmits.is_empty() && shared.jobs.is_empty())
    }

    /// What has changed since this was asked last: the contents of parts, and none for a part that is gone.
    ///
    /// # Errors
    ///
    /// A part cannot be written down.
    pub fn changes(&mut self) -> io::Result<Vec<(Part, Option<Wiped>)>> {
        let common = self.save_common()?;
        let mut changes = Vec::new();
        if self.saved_common != common {
            changes.push((Part::Common, Some(common.clone())));
            self.saved_common = common;
        }
        for id in std::mem::take(&mut self.changed) {
            let saved = self.sas.get(&id).map(|sa| self.save_ike(sa)).transpose()?;
            changes.push((Part::Ike(id), saved));
        }
        for (id, pair) in self.shared.handover.changes() {
            let saved = pair.map(|pair| Wiped::of(&pair)).transpose()?;
            changes.push((Part::Pair(id), saved));
        }
        Ok(changes)
    }

    /// All parts after one, in their order, as they are now. They are none the more saved by this.
    pub fn parts_after(
        &self,
        after: Option<Part>,
    ) -> impl Iterator<Item = (Part, io::Result<Wiped>)> {
        use Bound::{Excluded, Unbounded};
        let (sas, pairs) = match after {
            None | Some(Part::Common) => (Some(Unbounded), Unbounded),
            Some(Part::Ike(id)) => (Some(Excluded(id)), Unbounded),
            Some(Part::Pair(id)) => (None, Excluded(id)),
        };
        let common = after.is_none().then(|| (Part::Common, self.save_common()));
        let sas = sas
            .into_iter()
            .flat_map(|after| self.sas.range((after, Unbounded)))
            .map(|(id, sa)| (Part::Ike(*id), self.save_ike(sa)));
        let pairs = self.shared.handover.after(pairs);
        let pairs = pairs.map(|(id, pair)| (Part::Pair(id), Wiped::of(pair)));
        common.into_iter().chain(sas).chain(pairs)
    }

    fn save_common(&self) -> io::Result<Wiped> {
        Wiped::of(&Common {
            next: self.shared.next,
            addresses: &self.shared.addresses,
            events: &self.shared.events,
        })
    }

    fn save_ike(&self, sa: &IkeSa) -> io::Result<Wiped> {
        let under_way = self.under_way.get(&sa.id).into_iter().flatten();
        let queued = self.shared.jobs.iter().filter(|job| job.ike == sa.id);
        Wiped::of(&Ike {
            sa,
            jobs: under_way.chain(queued).collect(),
        })
    }

    /// All pairs of ESP SAs that the caller has been told of and that have not ended.
    pub fn pairs(&self) -> impl Iterator<Item = ChildSaId> {
        self.shared.handover.all()
    }

    /// As if everything had changed, so that [`Self::changes`] yields all there is.
    pub fn everything_has_changed(&mut self) {
        self.saved_common = Wiped::default();
        self.changed.extend(self.sas.keys());
        self.shared.handover.all_have_changed();
    }

    /// The endpoint that all the parts together make up. What it has asked and was not answered it asks again at once.
    ///
    /// # Errors
    ///
    /// [`RestoreError`].
    pub fn restore<'a>(
        config: EndpointConfig,
        random: Box<dyn Random + Send>,
        now: Time,
        parts: impl IntoIterator<Item = (Part, &'a [u8])>,
    ) -> Result<Self, RestoreError> {
        let mut endpoint = Self::new(config, random);
        let mut complete = false;
        for (part, bytes) in parts {
            let unreadable = |cause| RestoreError::Unreadable { part, cause };
            match part {
                Part::Common => {
                    let common: RestoredCommon =
                        rmp_serde::from_slice(bytes).map_err(unreadable)?;
                    endpoint.shared.next = common.next;
                    endpoint.shared.addresses = common.addresses;
                    endpoint.shared.events = common.events;
                    complete = true;
                }
                Part::Ike(_) => {
                    let ike: RestoredIke = rmp_serde::from_slice(bytes).map_err(unreadable)?;
                    endpoint.shared.jobs.extend(ike.jobs);
                    endpoint.put_back(ike.sa, now);
                }
                Part::Pair(id) => {
                    let pair: Pair = rmp_serde::from_slice(bytes).map_err(unreadable)?;
                    endpoint.shared.spis.insert(pair.spi_in());
                    endpoint.shared.handover.restore(id, pair);
                }
            }
        }
        if !complete {
            return Err(RestoreError::Incomplete);
        }
        endpoint.settle(now);
        Ok(endpoint)
    }

    /// Saves every IKE SA and restores it from what was saved, and nothing else.
    #[cfg(test)]
    pub(in crate::ike) fn save_and_restore(&mut self) {
        for sa in self.sas.values_mut() {
            let saved = Wiped::of(&**sa).unwrap();
            **sa = rmp_serde::from_slice(saved.bytes()).unwrap();
        }
    }

    fn put_back(&mut self, mut sa: IkeSa, now: Time) {
        sa.go_on(now);
        let (ours, esp) = sa.pending_spis();
        self.shared.ike_spis.insert(sa.our_spi());
        self.shared.ike_spis.extend(ours);
        self.shared.spis.extend(esp);
        if sa.established.is_some() {
            self.shared.peers.met_before.extend(sa.peer);
        }
        if matches!(sa.state, State::Respond | State::AwaitAuth) {
            // The request may come again.
            self.index.asked(sa.id, (sa.remote, sa.spi_i));
        }
        self.take_in(Box::new(sa));
    }
}
