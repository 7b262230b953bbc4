//! All IKE SAs of a gateway: which one a datagram belongs to, which are too many, which one replaces which.
//!
//! The caller feeds datagrams, commands, results and the time, and after each call drains what there is to do: first
//! **all events**, for an SA must be installed before the peer can use it, then transmits and jobs, then the timeout.

mod cookie;
mod handover;
mod index;
mod init;
mod peers;
mod presence;
mod saved;
mod shared;
mod unprotected;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

pub(super) use handover::{HANDOVER, Origin};
pub use saved::{Part, RestoreError};
pub use shared::Refusal;
pub(super) use shared::{NAT_PORT, Shared, nat_hash};

use self::{
    cookie::Cookies,
    index::{Index, owner},
    unprotected::Rate,
};
use super::{
    config::{ChildName, EndpointConfig, PeerId, Role, Unique},
    event::{ChildSaId, Command, DownReason, Event, IkeInfo, IkeSaId, Rekey, Transmit},
    job::{Job, JobResult},
    message::{ExchangeType, IkeSpi, Message},
    rng::Random,
    sa::{Closed, FollowUp, IkeSa, Packet, Start, State},
    time::Time,
};
use crate::wiped::Wiped;

/// Time for which an IKE SA that was replaced still receives. The side that started the new one deletes it; the other
/// waits longer and does so only if that side does not.
fn grace(first: bool) -> Duration {
    if first {
        HANDOVER
    } else {
        Duration::from_secs(40)
    }
}

/// The endpoint.
pub struct Endpoint {
    shared: Shared,
    sas: BTreeMap<IkeSaId, Box<IkeSa>>,
    by_spi: HashMap<IkeSpi, IkeSaId>,
    index: Index,
    /// IKE SAs that the call under way has dealt with.
    touched: Vec<IkeSaId>,
    /// IKE SAs that are not saved as they are now.
    changed: BTreeSet<IkeSaId>,
    /// What all share, as it was saved last.
    saved_common: Wiped,
    /// Jobs whose results are owed.
    under_way: BTreeMap<IkeSaId, Vec<Job>>,
    cookies: Cookies,
    /// Responses to those who have no IKE SA with us.
    courtesy: Rate,
    /// What the operator is told of those who are refused before anything about them is known.
    complaints: Rate,
}

impl Endpoint {
    /// An endpoint without peers.
    pub fn new(config: EndpointConfig, random: Box<dyn Random + Send>) -> Self {
        let mut shared = Shared::new(config, random);
        let cookies = Cookies::new(&mut *shared.random);
        Self {
            shared,
            sas: BTreeMap::new(),
            by_spi: HashMap::new(),
            index: Index::default(),
            touched: Vec::new(),
            changed: BTreeSet::new(),
            saved_common: Wiped::default(),
            under_way: BTreeMap::new(),
            cookies,
            courtesy: Rate::default(),
            complaints: Rate::default(),
        }
    }

    /// Takes a datagram that came from `remote` to `local`, without the non-ESP marker.
    pub fn handle_datagram(
        &mut self,
        now: Time,
        local: SocketAddr,
        remote: SocketAddr,
        bytes: &[u8],
    ) {
        let message = match Message::parse(bytes) {
            Ok(message) => message,
            Err(error) => return self.not_understood(now, local, remote, bytes, error),
        };
        let header = message.header;
        if header.exchange == ExchangeType::IKE_SA_INIT
            && !header.flags.response
            && header.flags.initiator
        {
            self.init_request(now, local, remote, bytes, message);
            return self.settle(now);
        }
        let ours = if header.flags.initiator {
            header.spi_r
        } else {
            header.spi_i
        };
        let Some(id) = self.by_spi.get(&ours).copied() else {
            return self.unknown_spi(now, local, remote, &message);
        };
        self.touched.push(id);
        if let Some(sa) = self.sas.get_mut(&id) {
            let peers = if header.flags.initiator {
                header.spi_i
            } else {
                header.spi_r
            };
            let known = if sa.initiator { sa.spi_r } else { sa.spi_i };
            // The responder's SPI is not known before its first response.
            if known == peers || (known == IkeSpi(0) && sa.state == State::InitSent) {
                let before = owner(sa);
                sa.handle_message(&mut self.shared, now, (local, remote), bytes, &message);
                self.index.owned(id, before, owner(sa));
            } else {
                self.shared.refuse(Refusal::UnknownSpi);
            }
        }
        self.settle(now);
    }

    /// Takes the result of a job.
    pub fn handle_job(&mut self, now: Time, result: JobResult) {
        self.touched.push(result.ike);
        if let Some(jobs) = self.under_way.get_mut(&result.ike) {
            jobs.retain(|job| job.id != result.id);
            if jobs.is_empty() {
                self.under_way.remove(&result.ike);
            }
        }
        if let Some(sa) = self.sas.get_mut(&result.ike) {
            sa.handle_job(&mut self.shared, now, result);
        }
        self.settle(now);
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Time) {
        let due = self.index.due(now);
        self.keep_what_is_needed(now, &due);
        for id in due {
            self.touched.push(id);
            if let Some(sa) = self.sas.get_mut(&id) {
                sa.handle_timeout(&mut self.shared, now);
            }
        }
        self.shared.hand_over_what_is_due(now);
        for (peer, local) in self.shared.due_attempts(now) {
            self.start(now, peer, local);
        }
        self.settle(now);
    }

    /// When [`Self::handle_timeout`] is to be called next.
    pub fn poll_timeout(&self) -> Option<Time> {
        [
            self.index.next(),
            self.shared.next_attempt(),
            self.shared.next_handover(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// The next thing that the caller should know. Drained before [`Self::poll_transmit`].
    pub fn poll_event(&mut self) -> Option<Event> {
        self.shared.events.pop_front()
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.shared.transmits.pop_front()
    }

    /// The next job to compute.
    pub fn poll_job(&mut self) -> Option<Job> {
        let job = self.shared.jobs.pop_front()?;
        self.under_way.entry(job.ike).or_default().push(job.clone());
        Some(job)
    }

    /// Datagrams refused so far, by reason.
    pub fn refusals(&self) -> impl Iterator<Item = (Refusal, u64)> {
        self.shared.refusals()
    }

    /// All authenticated IKE SAs.
    pub fn established(&self) -> impl Iterator<Item = (IkeSaId, PeerId, IkeInfo)> {
        self.sas
            .values()
            .filter_map(|sa| Some((sa.id, sa.peer?, sa.info()?)))
    }

    /// Whether an IKE SA with the peer is under way but not authenticated yet.
    pub fn is_connecting(&self, peer: PeerId) -> bool {
        self.of_peer(peer)
            .any(|sa| sa.established.is_none() && !sa.is_ending())
    }

    fn of_peer(&self, peer: PeerId) -> impl Iterator<Item = &IkeSa> {
        let ids = self.index.of_peer(peer);
        ids.filter_map(|id| self.sas.get(&id).map(Box::as_ref))
    }

    /// The newest of a peer's that fits.
    fn newest(&self, peer: PeerId, fits: impl Fn(&IkeSa) -> bool) -> Option<IkeSaId> {
        self.of_peer(peer)
            .filter(|sa| fits(sa))
            .map(|sa| sa.id)
            .max()
    }

    /// Number of half-open IKE SAs.
    pub fn half_open(&self) -> usize {
        self.sas.values().filter(|sa| sa.is_half_open()).count()
    }

    /// Number of IKE SAs in whatever state, without those that are over but for repeating their last response.
    pub fn len(&self) -> usize {
        self.sas
            .values()
            .filter(|sa| sa.state != State::Lingering)
            .count()
    }

    /// Whether there is no IKE SA at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Does what the caller wants.
    pub fn handle_command(&mut self, now: Time, command: Command) {
        match command {
            Command::SetPeer(config) => {
                let peer = config.id;
                self.touch(peer);
                if self.shared.set_peer(*config) && !self.has_ike_sa(peer) {
                    self.shared.try_now(peer, now);
                }
            }
            Command::RemovePeer(peer) => {
                self.delete_all(now, peer, DownReason::Operator);
                self.shared.remove_peer(peer);
            }
            Command::Up(peer, local) => self.up(now, peer, local),
            Command::Down(peer) => {
                self.shared.want(peer, None);
                self.shared.hold(peer, true);
                self.delete_all(now, peer, DownReason::Operator);
            }
            Command::Allow(peer) => self.shared.hold(peer, false),
            Command::Rekey(peer, what) => self.rekey(now, peer, what),
            Command::Acquire {
                peer,
                child,
                local,
                packet,
            } => self.acquire(now, (peer, local), child, packet),
            Command::Traffic {
                sa,
                inbound,
                outbound,
            } => return self.traffic(now, sa, (inbound, outbound)),
            Command::Expiring(sa) => self.with_child(sa, |ike, shared| {
                ike.volume_reached(shared, now, sa, false);
            }),
            Command::Expired(sa) => self.with_child(sa, |ike, shared| {
                ike.volume_reached(shared, now, sa, true);
            }),
            Command::Lost(sa) => self.with_child(sa, |ike, shared| ike.lost(shared, now, sa)),
            Command::PeerMoved(sa, remote) => {
                self.with_child(sa, |ike, shared| ike.peer_moved(shared, now, remote));
            }
            Command::Addresses(addresses) => self.our_addresses(now, addresses),
            Command::MoveTo(ike, local, remote) => {
                self.touched.push(ike);
                if let Some(sa) = self.sas.get_mut(&ike) {
                    sa.move_to(&mut self.shared, now, local, remote);
                }
            }
            Command::Shutdown => self.shutdown(now),
        }
        self.settle(now);
    }

    fn our_addresses(&mut self, now: Time, addresses: Vec<IpAddr>) {
        if self.shared.addresses == addresses {
            return;
        }
        self.shared.addresses = addresses;
        self.touched.extend(self.sas.keys());
        for sa in self.sas.values_mut() {
            sa.addresses_changed(&mut self.shared, now);
        }
        self.settle(now);
    }

    /// What SAs have carried is told every second, and need not be saved each time.
    fn traffic(&mut self, now: Time, sa: ChildSaId, (inbound, outbound): (u64, u64)) {
        let saved = self
            .shared
            .owner(sa)
            .filter(|ike| !self.changed.contains(ike));
        self.with_child(sa, |ike, shared| {
            ike.traffic(shared, now, sa, inbound, outbound);
        });
        self.settle(now);
        if let (Some(ike), false) = (saved, self.has_output()) {
            self.changed.remove(&ike);
        }
    }

    fn with_child(&mut self, sa: ChildSaId, act: impl FnOnce(&mut IkeSa, &mut Shared)) {
        let Some(id) = self.shared.owner(sa) else {
            return;
        };
        self.touched.push(id);
        if let Some(ike) = self.sas.get_mut(&id) {
            act(ike, &mut self.shared);
        }
    }

    /// All IKE SAs of a peer are dealt with.
    fn touch(&mut self, peer: PeerId) {
        self.touched.extend(self.index.of_peer(peer));
    }

    /// Has all IKE SAs of a peer do something, oldest first.
    fn with_all(&mut self, peer: PeerId, mut act: impl FnMut(&mut IkeSa, &mut Shared)) {
        let mut ids: Vec<IkeSaId> = self.index.of_peer(peer).collect();
        ids.sort_unstable();
        for id in &ids {
            if let Some(sa) = self.sas.get_mut(id) {
                act(sa, &mut self.shared);
            }
        }
        self.touched.extend(ids);
    }

    /// Rekeys all that is up of a peer, which may be many hosts. What is about to go is left alone.
    fn rekey(&mut self, now: Time, peer: PeerId, what: Rekey) {
        self.with_all(peer, |sa, shared| {
            if sa.state != State::Up || sa.is_retiring() {
                return;
            }
            match what {
                Rekey::Ike => sa.wish_ike_rekeyed(shared, now),
                Rekey::Children => sa.wish_all_rekeyed(shared, now),
            }
        });
    }

    fn up(&mut self, now: Time, peer: PeerId, local: SocketAddr) {
        self.shared.want(peer, Some(local));
        self.shared.hold(peer, false);
        if !self.has_ike_sa(peer) {
            self.start(now, peer, local);
            return;
        }
        // What it has lost while nobody wanted it up is wanted now.
        self.with_all(peer, |sa, shared| sa.ask_for_missing(shared, now));
    }

    fn acquire(
        &mut self,
        now: Time,
        (peer, local): (PeerId, SocketAddr),
        child: ChildName,
        packet: Option<Packet>,
    ) {
        self.touch(peer);
        self.shared.wake(peer, child);
        // The newest one counts; an older one is about to go.
        let up = self.newest(peer, |sa| sa.state == State::Up);
        match up.and_then(|id| self.sas.get_mut(&id)) {
            Some(sa) => sa.acquire(&mut self.shared, now, child, packet),
            None => {
                if !self.has_ike_sa(peer)
                    && !self.shared.is_backing_off(peer, now)
                    && let Some(sa) = self.start(now, peer, local)
                {
                    sa.note_packet(child, packet);
                }
            }
        }
    }

    fn has_ike_sa(&self, peer: PeerId) -> bool {
        self.of_peer(peer).any(|sa| !sa.is_ending())
    }

    fn delete_all(&mut self, now: Time, peer: PeerId, reason: DownReason) {
        self.with_all(peer, |sa, shared| sa.delete(shared, now, reason));
    }

    fn shutdown(&mut self, now: Time) {
        self.shared.want_nothing();
        self.touched.extend(self.sas.keys());
        for sa in self.sas.values_mut() {
            sa.delete(&mut self.shared, now, DownReason::Operator);
        }
    }

    /// What tests make of it, and see of it.
    #[cfg(test)]
    pub(super) fn watched(&mut self) -> &mut shared::Watched {
        &mut self.shared.watched
    }

    /// As if an IKE SA with the peer had been up before, so that nothing is said of a first contact.
    #[cfg(test)]
    pub(super) fn has_met(&mut self, peer: PeerId) {
        self.shared.attempt_succeeded(peer);
    }

    /// Begins an IKE SA with a configured peer, at the address whose turn it is.
    fn start(&mut self, now: Time, peer: PeerId, local: SocketAddr) -> Option<&mut IkeSa> {
        match self.shared.next_way(peer, local) {
            Some((local, remote)) => self.start_at(now, peer, local, remote),
            None => {
                self.shared.try_again(peer, now, true);
                None
            }
        }
    }

    fn start_at(
        &mut self,
        now: Time,
        peer: PeerId,
        local: SocketAddr,
        remote: IpAddr,
    ) -> Option<&mut IkeSa> {
        let config = self.shared.peer(peer).cloned()?;
        let start = Start {
            id: self.shared.next_ike(),
            local,
            remote: SocketAddr::new(remote, shared::IKE_PORT),
            spi: self.shared.allocate_ike_spi(),
        };
        let sa = IkeSa::start(&mut self.shared, now, &config, &start);
        let id = sa.id;
        self.insert(Box::new(sa));
        self.sas.get_mut(&id).map(Box::as_mut)
    }

    fn insert(&mut self, sa: Box<IkeSa>) {
        if !sa.initiator {
            self.index.asked(sa.id, (sa.remote, sa.spi_i));
        }
        self.take_in(sa);
    }

    fn take_in(&mut self, sa: Box<IkeSa>) {
        self.index.owned(sa.id, None, owner(&sa));
        self.by_spi.insert(sa.our_spi(), sa.id);
        self.touched.push(sa.id);
        self.sas.insert(sa.id, sa);
    }

    /// Sees to what concerns several IKE SAs, and forgets those that are over.
    fn settle(&mut self, now: Time) {
        while let Some(follow_up) = self.shared.follow_ups.pop_front() {
            match follow_up {
                FollowUp::Authenticated {
                    ike,
                    peer,
                    initial_contact,
                } => self.authenticated(now, ike, peer, initial_contact),
                FollowUp::Closed { peer, why } => self.closed(now, peer, why),
                FollowUp::Replace(peer) => self.replace(now, peer),
                FollowUp::Born(mut heir) => {
                    heir.next_task(&mut self.shared, now);
                    self.take_in(heir);
                }
                FollowUp::Decided(heir) => {
                    self.touched.push(heir);
                    if let Some(heir) = self.sas.get_mut(&heir) {
                        heir.decided(&mut self.shared, now);
                    }
                }
                FollowUp::Inherits { from, heir } => {
                    self.hand_on(now, from, heir);
                    if let Some(from) = self.sas.get_mut(&from) {
                        from.leave_to_peer(now);
                    }
                }
                FollowUp::Returns { from, to } => {
                    self.hand_on(now, from, to);
                    if let Some(to) = self.sas.get_mut(&to) {
                        to.forget_rival_heir();
                    }
                    if let Some(from) = self.sas.get_mut(&from) {
                        from.deleted_as_redundant(&mut self.shared, now);
                    }
                }
                FollowUp::Yields(ike) => {
                    self.touched.push(ike);
                    if let Some(sa) = self.sas.get_mut(&ike) {
                        sa.retire(now + grace(sa.initiator));
                        self.shared.yields(ike);
                    }
                }
                FollowUp::Doubt(ike) => {
                    self.touched.push(ike);
                    if let Some(sa) = self.sas.get_mut(&ike) {
                        sa.ask_if_alive(&mut self.shared, now);
                    }
                }
            }
        }
        for id in std::mem::take(&mut self.touched) {
            let Some(sa) = self.sas.get(&id) else {
                continue;
            };
            self.changed.insert(id);
            self.shared.note_presence(sa);
            if sa.state == State::Closed {
                self.under_way.remove(&id);
                self.by_spi.remove(&sa.our_spi());
                self.shared.release_ike_spi(sa.our_spi());
                self.index.remove(sa);
                self.sas.remove(&id);
            } else {
                self.index.update(sa, sa.next_timeout(&self.shared));
            }
        }
    }

    /// An IKE SA hands its children on to another.
    fn hand_on(&mut self, now: Time, from: IkeSaId, to: IkeSaId) {
        self.touched.extend([from, to]);
        let Some(mut giver) = self.sas.remove(&from) else {
            return;
        };
        if let Some(taker) = self.sas.get_mut(&to) {
            taker.inherit(&mut self.shared, &mut giver);
            taker.next_task(&mut self.shared, now);
        }
        self.sas.insert(from, giver);
    }

    /// One IKE SA for each identity of a peer, unless the configuration wants it otherwise: the new one takes the place of
    /// the others.
    // RFC 7296 section 2.4: INITIAL_CONTACT says that the peer knows of no other, so those end without a word.
    fn authenticated(&mut self, now: Time, ike: IkeSaId, peer: PeerId, initial_contact: bool) {
        self.shared.attempt_succeeded(peer);
        self.touched.push(ike);
        let Some(newest) = self.sas.get(&ike) else {
            return;
        };
        let (ours, nonce) = (newest.initiator, newest.lowest_nonce().to_vec());
        // Several may be somebody's wish; but one that we have started is always to take another's place.
        if self.shared.unique(peer) == Unique::Never && !ours {
            return;
        }
        let identity = newest.remote_id.clone();
        let same: Vec<IkeSaId> = self.index.of_owner(owner(newest)).collect();
        for id in same {
            let Some(other) = self.sas.get_mut(&id) else {
                continue;
            };
            if id == ike || other.state != State::Up || other.remote_id != identity {
                continue;
            }
            self.touched.push(id);
            if initial_contact {
                other.close(&mut self.shared, DownReason::InitialContact, Closed::Wanted);
            } else if other.initiator != ours && other.is_as_young(now) {
                // Both sides have started at once. Both know both pairs of nonces, so both let the same one go: unless the
                // peer has started anew and knows of one only, which is seen when it is asked.
                if other.lowest_nonce() < nonce.as_slice() {
                    other.retire(now + grace(other.initiator));
                    self.shared.yields(id);
                } else {
                    other.stays_if_alive(&mut self.shared, now, ike);
                }
            } else {
                other.retire(now + grace(ours));
            }
        }
    }

    fn closed(&mut self, now: Time, peer: Option<PeerId>, why: Closed) {
        let Some(peer) = peer else { return };
        let alone = !self.has_ike_sa(peer);
        if alone && why == Closed::Dead {
            self.shared.peer_died(peer);
        }
        match why {
            Closed::Wanted if self.shared.role(peer) != Some(Role::Initiate) => {}
            Closed::Wanted | Closed::Lost | Closed::Dead if alone => {
                self.shared.try_again(peer, now, false);
            }
            Closed::Failed if alone => self.shared.try_again(peer, now, true),
            Closed::Failed => {
                let pause = self.shared.back_off(peer);
                self.with_all(peer, |sa, _| sa.not_replaced(now, pause));
            }
            Closed::Wanted | Closed::Lost | Closed::Dead => {}
        }
    }

    /// An IKE SA that was replaced stays while the newer one still asks for its children.
    fn keep_what_is_needed(&mut self, now: Time, due: &[IkeSaId]) {
        for id in due {
            let Some(old) = self.sas.get(id).filter(|sa| sa.retires(now)) else {
                continue;
            };
            // A tunnel may have many peers, who have nothing to do with each other.
            let same = self.index.of_owner(owner(old));
            let mut same = same.filter_map(|id| self.sas.get(&id));
            let takes_over = same.any(|sa| {
                !sa.is_retiring() && sa.is_taking_over(now) && sa.remote_id == old.remote_id
            });
            if takes_over && let Some(old) = self.sas.get_mut(id) {
                old.stay(now);
            }
        }
    }

    /// Begins a fresh IKE SA beside one that is near its end.
    fn replace(&mut self, now: Time, peer: PeerId) {
        let under_way = self.is_connecting(peer);
        let ends = self
            .of_peer(peer)
            .filter(|sa| sa.state == State::Up)
            .min_by_key(|sa| sa.id)
            .map(|sa| (sa.local.ip(), sa.remote.ip()));
        if let (Some((local, remote)), false) = (ends, under_way) {
            let local = SocketAddr::new(local, self.shared.config.ike_port);
            let local = self.shared.local_towards(peer, remote, local);
            self.start_at(now, peer, local, remote);
        }
    }
}
