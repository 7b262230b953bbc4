//! Addresses that change while an IKE SA is up (MOBIKE, RFC 4555).
//!
//! Who has started the first of the IKE SAs that have replaced each other *leads*: it alone decides which pair of addresses
//! is used, and tells the other side with UPDATE_SA_ADDRESSES. The other side takes the addresses of that packet for IKE at
//! once, and for ESP when the leader has shown that it receives there (return routability).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use super::{Exchange, IkeSa, Nat, State, Task};
use crate::ike::{
    config::NatPolicy,
    endpoint::{Shared, nat_hash},
    event::{DownReason, Event, FailureReason, OuterAddresses, Stage},
    exchange::{Informational, Notifies},
    message::{
        ExchangeType, Payload,
        payload::{Notify, NotifyType},
    },
    time::Time,
};

/// Length of our cookies in bytes. RFC 4555 section 4.2.5: 8 to 64.
const COOKIE: usize = 16;
/// Further addresses of one side that count.
const MOST_ADDRESSES: usize = 8;
/// So many transmissions without an answer, and another address of the peer is tried.
const TRANSMISSIONS: u32 = 3;
/// For so long after a move packets of ESP from where the peer was before may still arrive.
const STRAGGLERS: std::time::Duration = std::time::Duration::from_secs(2);

/// Our address and port, and the peer's.
pub(super) type Path = (SocketAddr, SocketAddr);
/// A notify that owns its data.
pub(super) type Said = (NotifyType, Vec<u8>);

/// What an IKE SA knows of addresses beyond those in use.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Mobike {
    /// Both sides have said that they can.
    pub(super) agreed: bool,
    /// Which addresses are used is ours to decide.
    leads: bool,
    /// The peer's further addresses.
    peers: Vec<IpAddr>,
    /// Our further addresses, as the peer knows them.
    told: Vec<IpAddr>,
    /// Where ESP stays until the peer has shown that it receives at its new address.
    held: Option<OuterAddresses>,
    /// When the peer moved last.
    moved: Option<Time>,
    /// What the peer said last of the address that it sees of us, as a hash.
    seen: Vec<u8>,
}

impl Mobike {
    /// Whether moving is ours to decide.
    pub(super) fn leads(&self) -> bool {
        self.leads
    }

    /// What holds for an IKE SA that takes the place of this one, too. The hash is of the SPIs of this one.
    pub(super) fn inherited(&self) -> Self {
        Self {
            seen: Vec::new(),
            ..self.clone()
        }
    }
}

/// A request about one pair of addresses. Its response counts while they are those in use.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::ike) struct Probe {
    path: Path,
    cookie: Vec<u8>,
}

/// Notifies as payloads.
pub(super) fn payloads(said: &[Said]) -> Vec<Payload<'_>> {
    said.iter()
        .map(|(kind, data)| Payload::Notify(Notify::new(*kind, data)))
        .collect()
}

/// The addresses that a message lists; none if it does not speak of them.
// RFC 4555 section 3.6: each list is complete, and takes the place of the one before.
fn listed(notifies: &Notifies<'_>) -> Option<Vec<IpAddr>> {
    let v4 = notifies
        .all(NotifyType::ADDITIONAL_IP4_ADDRESS)
        .filter_map(|notify| <[u8; 4]>::try_from(notify.data).ok())
        .map(IpAddr::from);
    let v6 = notifies
        .all(NotifyType::ADDITIONAL_IP6_ADDRESS)
        .filter_map(|notify| <[u8; 16]>::try_from(notify.data).ok())
        .map(IpAddr::from);
    let list: Vec<IpAddr> = v4.chain(v6).take(MOST_ADDRESSES).collect();
    (!list.is_empty() || notifies.has(NotifyType::NO_ADDITIONAL_ADDRESSES)).then_some(list)
}

/// A list of addresses, for the peer.
fn list(addresses: &[IpAddr]) -> Vec<Said> {
    if addresses.is_empty() {
        return vec![(NotifyType::NO_ADDITIONAL_ADDRESSES, Vec::new())];
    }
    let said = |address: &IpAddr| match address {
        IpAddr::V4(address) => (
            NotifyType::ADDITIONAL_IP4_ADDRESS,
            address.octets().to_vec(),
        ),
        IpAddr::V6(address) => (
            NotifyType::ADDITIONAL_IP6_ADDRESS,
            address.octets().to_vec(),
        ),
    };
    addresses.iter().map(said).collect()
}

/// Whether a range of addresses has all of its family.
fn is_everywhere((first, last): (IpAddr, IpAddr)) -> bool {
    match last {
        IpAddr::V4(last) => first.is_unspecified() && last == Ipv4Addr::BROADCAST,
        IpAddr::V6(last) => first.is_unspecified() && last.to_bits() == u128::MAX,
    }
}

/// Whether a packet from `remote` may be the peer's at all.
fn is_acceptable(shared: &Shared, remote: SocketAddr) -> bool {
    let address = remote.ip();
    let strange = match address {
        IpAddr::V4(address) => address.is_broadcast() || address == Ipv4Addr::UNSPECIFIED,
        IpAddr::V6(address) => address == Ipv6Addr::UNSPECIFIED,
    };
    !(strange
        || address.is_multicast()
        || remote.port() == 0
        || shared.addresses.contains(&address))
}

/// Whether a packet has come with other addresses than its sender has written on it, which is what a NAT does.
// RFC 4555 section 4.2.6: source, destination, source port and destination port.
fn is_translated(data: &[u8], (local, remote): Path) -> bool {
    let bytes = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let seen = [
        bytes(remote.ip()),
        bytes(local.ip()),
        remote.port().to_be_bytes().to_vec(),
        local.port().to_be_bytes().to_vec(),
    ];
    data != seen.concat()
}

impl IkeSa {
    /// Whether the peer is told in IKE_AUTH that we can, and of which addresses.
    pub(super) fn offer_mobike(&mut self, shared: &Shared) -> Vec<Said> {
        if !self.peer_config(shared).is_some_and(|peer| peer.mobike) {
            return Vec::new();
        }
        self.mobike.told = self.further_addresses(shared);
        let mut said = vec![(NotifyType::MOBIKE_SUPPORTED, Vec::new())];
        if !self.mobike.told.is_empty() {
            said.extend(list(&self.mobike.told));
        }
        said
    }

    /// Takes what the peer says of it in IKE_AUTH.
    pub(super) fn agree_on_mobike(&mut self, shared: &Shared, notifies: &Notifies<'_>) {
        let ours = self.peer_config(shared).is_some_and(|peer| peer.mobike);
        self.mobike.agreed = ours && notifies.has(NotifyType::MOBIKE_SUPPORTED);
        self.mobike.leads = self.initiator;
        self.mobike.peers = listed(notifies).unwrap_or_default();
    }

    /// Whether an initiator goes to the port of NAT traversal though there is no NAT.
    // RFC 4555 section 3.3: there may be one where it moves to, and then the port need not change.
    pub(super) fn leaves_ike_port(&self, shared: &Shared) -> bool {
        self.nat.supported && self.peer_config(shared).is_some_and(|peer| peer.mobike)
    }

    /// Our addresses that the peer may use besides the one in use: those that are not inside of the tunnel.
    fn further_addresses(&self, shared: &Shared) -> Vec<IpAddr> {
        let Some(peer) = self.peer_config(shared) else {
            return Vec::new();
        };
        let inside: Vec<_> = peer
            .children
            .iter()
            .flat_map(|child| &child.local)
            .filter(|selector| !is_everywhere(selector.addresses))
            .collect();
        let is_outside = |address: &IpAddr| {
            let mut inside = inside.iter();
            !inside.any(|selector| {
                let (first, last) = selector.addresses;
                first.is_ipv4() == address.is_ipv4() && (first..=last).contains(address)
            })
        };
        shared
            .addresses
            .iter()
            .copied()
            .filter(|address| *address != self.local.ip())
            .filter(|_| peer.local.is_none())
            .filter(is_outside)
            .take(MOST_ADDRESSES)
            .collect()
    }

    /// The peer's addresses, the one in use first, for a leader that looks for a way to one of them.
    pub(super) fn ways_to_peer(&self) -> Vec<IpAddr> {
        let others = self.mobike.peers.iter().copied();
        let used = self.remote.ip();
        let others = others.filter(|address| *address != used && self.mobike.leads);
        std::iter::once(used).chain(others).collect()
    }

    /// Goes on with another pair of addresses, as whoever watches the kernel's routes has found out.
    pub(in crate::ike) fn move_to(
        &mut self,
        shared: &mut Shared,
        now: Time,
        local: IpAddr,
        remote: IpAddr,
    ) {
        if (local, remote) == (self.local.ip(), self.remote.ip())
            || local.is_ipv4() != remote.is_ipv4()
            || self.state != State::Up
        {
            return;
        }
        if !self.mobike.agreed {
            // Without MOBIKE only a fresh IKE SA gets anywhere else.
            return self.ask_for_replacement(shared, now);
        }
        let port = self.local.port();
        let theirs = if remote == self.remote.ip() {
            self.remote.port()
        } else if port == shared.config.nat_port {
            crate::ike::endpoint::NAT_PORT
        } else {
            port
        };
        let path = ((local, port).into(), (remote, theirs).into());
        if self.mobike.leads {
            self.lead_to(shared, now, path);
        } else {
            // RFC 4555 section 3.5: whose own address is gone may send from another one at once.
            self.mobike.held = None;
            self.take_path(shared, now, path);
            self.tell_moved(shared);
            self.tell_addresses_now(shared, now);
        }
    }

    /// As the leader, goes to another pair of addresses and tells the peer.
    // RFC 4555 section 3.5: IKE and ESP move first, then the peer is told. A response to what was asked before counts no more.
    fn lead_to(&mut self, shared: &mut Shared, now: Time, path: Path) {
        let left = self.remote.ip();
        self.take_path(shared, now, path);
        self.tell_moved(shared);
        let peers = &mut self.mobike.peers;
        peers.retain(|address| *address != path.1.ip());
        if left != path.1.ip() && !peers.contains(&left) {
            peers.push(left);
        }
        self.wish_update(shared, now);
    }

    fn wish_update(&mut self, shared: &mut Shared, now: Time) {
        if !self.has_task(|task| matches!(task, Task::UpdateAddresses)) {
            self.tasks.push_front(Task::UpdateAddresses);
        }
        self.next_task(shared, now);
    }

    fn has_task(&self, which: impl Fn(&Task) -> bool) -> bool {
        self.tasks.iter().any(which)
    }

    /// Uses another pair of addresses from here on. What has no response yet is repeated there, at once.
    fn take_path(&mut self, shared: &mut Shared, now: Time, (local, remote): Path) {
        let is_ours = local != self.local;
        self.local = local;
        self.remote = remote;
        let Some(outstanding) = &mut self.outstanding else {
            return;
        };
        outstanding.attempt = 0;
        outstanding.again_at = now + shared.retransmission(0);
        if is_ours {
            outstanding.first_sent = now;
        }
        let datagrams = outstanding.datagrams.clone();
        self.transmit_all(shared, now, datagrams);
    }

    /// Another address of the peer is worth a try, as nothing comes back from this one.
    pub(super) fn note_silence(&self, shared: &mut Shared, attempt: u32) {
        if self.mobike.agreed
            && self.mobike.leads
            && self.state == State::Up
            && attempt.is_multiple_of(TRANSMISSIONS)
            && self.ways_to_peer().len() > 1
        {
            shared.events.push_back(Event::Unreachable(self.id));
        }
    }

    /// Our addresses may be others than before.
    pub(in crate::ike) fn addresses_changed(&mut self, shared: &mut Shared, now: Time) {
        let agreed = self.mobike.agreed && self.state == State::Up;
        if agreed && self.further_addresses(shared) != self.mobike.told {
            self.tell_addresses_now(shared, now);
        }
    }

    fn tell_addresses_now(&mut self, shared: &mut Shared, now: Time) {
        if !self.has_task(|task| matches!(task, Task::TellAddresses)) {
            self.tasks.push_back(Task::TellAddresses);
        }
        self.next_task(shared, now);
    }

    /// The hashes of NAT detection as we send them, for a pair of addresses.
    fn nat_said(&self, shared: &mut Shared, (local, remote): Path) -> Vec<Said> {
        let policy = shared.nat_policy(self.peer);
        if !self.nat.supported || policy == NatPolicy::Forbid {
            return Vec::new();
        }
        let source = match policy {
            // A hash that fits no address makes the peer believe in a NAT, hence in encapsulation.
            NatPolicy::Force => shared.random_bytes(20),
            NatPolicy::Auto | NatPolicy::Forbid => nat_hash(self.spi_i, self.spi_r, local).to_vec(),
        };
        let destination = nat_hash(self.spi_i, self.spi_r, remote).to_vec();
        vec![
            (NotifyType::NAT_DETECTION_SOURCE_IP, source),
            (NotifyType::NAT_DETECTION_DESTINATION_IP, destination),
        ]
    }

    /// What the peer's hashes say about NATs between a pair of addresses.
    fn find_nat(&mut self, notifies: &Notifies<'_>, (local, remote): Path) {
        let mut sources = notifies.all(NotifyType::NAT_DETECTION_SOURCE_IP).peekable();
        let Some(destination) = notifies.find(NotifyType::NAT_DETECTION_DESTINATION_IP) else {
            return;
        };
        if sources.peek().is_none() || !self.nat.supported {
            return;
        }
        let theirs = nat_hash(self.spi_i, self.spi_r, remote);
        let ours = nat_hash(self.spi_i, self.spi_r, local);
        self.nat = Nat {
            supported: true,
            remote: !sources.any(|source| source.data == theirs),
            local: destination.data != ours,
        };
    }

    fn probe(&self, shared: &mut Shared) -> Probe {
        Probe {
            path: (self.local, self.remote),
            cookie: shared.random_bytes(COOKIE),
        }
    }

    fn say(&mut self, shared: &mut Shared, now: Time, said: &[Said], exchange: Exchange) {
        let kind = ExchangeType::INFORMATIONAL;
        self.request(shared, now, kind, &payloads(said), exchange);
    }

    /// Tells the peer that the addresses of this packet are those to use.
    pub(super) fn update_addresses(&mut self, shared: &mut Shared, now: Time) {
        let probe = self.probe(shared);
        let mut said = vec![
            (NotifyType::UPDATE_SA_ADDRESSES, Vec::new()),
            (NotifyType::COOKIE2, probe.cookie.clone()),
        ];
        said.extend(self.nat_said(shared, probe.path));
        self.say(shared, now, &said, Exchange::UpdateAddresses(probe));
    }

    /// Asks the peer to show that it receives at the address in use.
    pub(super) fn check_path(&mut self, shared: &mut Shared, now: Time) {
        let probe = self.probe(shared);
        let said = [(NotifyType::COOKIE2, probe.cookie.clone())];
        self.say(shared, now, &said, Exchange::CheckPath(probe));
    }

    /// Tells the peer which other addresses we have.
    pub(super) fn tell_addresses(&mut self, shared: &mut Shared, now: Time) {
        self.mobike.told = self.further_addresses(shared);
        let said = list(&self.mobike.told);
        self.say(shared, now, &said, Exchange::TellAddresses);
    }

    /// Asks whether the peer lives, and whether a NAT in front of us still shows it the same address.
    // RFC 4555 section 3.8.
    pub(super) fn ask_for_life(&mut self, shared: &mut Shared, now: Time) {
        let said = if self.mobike.agreed && self.mobike.leads && self.nat.local {
            self.nat_said(shared, (self.local, self.remote))
        } else {
            Vec::new()
        };
        self.say(shared, now, &said, Exchange::Liveness);
    }

    /// The peer lives.
    pub(super) fn lives(&mut self, shared: &mut Shared, now: Time, notifies: &Notifies<'_>) {
        let Some(seen) = notifies.find(NotifyType::NAT_DETECTION_DESTINATION_IP) else {
            return;
        };
        // The first hash has nothing to be compared with. An update too many does no harm.
        let before = std::mem::replace(&mut self.mobike.seen, seen.data.to_vec());
        if self.mobike.agreed && self.mobike.leads && before != seen.data {
            self.wish_update(shared, now);
        }
    }

    /// Whether a response shows that the peer has seen our request, and is about the addresses in use.
    fn is_proved(
        &mut self,
        shared: &mut Shared,
        now: Time,
        probe: &Probe,
        notifies: &Notifies<'_>,
    ) -> bool {
        if self.state != State::Up {
            return false;
        }
        let same = notifies
            .find(NotifyType::COOKIE2)
            .is_some_and(|cookie| bool::from(cookie.data.ct_eq(&probe.cookie)));
        if !same {
            // RFC 4555 section 3.7: who answers without having seen the request is not where it claims to be. That holds
            // wherever we have gone since.
            let hint = if self.mobike.leads {
                ""
            } else {
                "; a peer that returns none when it moves needs return_routability = false"
            };
            let detail = format!("its answer does not hold our cookie{hint}");
            self.fail(shared, Stage::Move, FailureReason::BadMessage, detail);
            self.delete(shared, now, DownReason::Protocol);
            return false;
        }
        let moved_on = |task: &Task| matches!(task, Task::UpdateAddresses | Task::CheckPath);
        probe.path == (self.local, self.remote) && !self.has_task(moved_on)
    }

    /// The response to UPDATE_SA_ADDRESSES.
    pub(super) fn update_answered(
        &mut self,
        shared: &mut Shared,
        now: Time,
        probe: &Probe,
        notifies: &Notifies<'_>,
    ) {
        if !self.is_proved(shared, now, probe, notifies) {
            return;
        }
        if notifies.has(NotifyType::UNACCEPTABLE_ADDRESSES) {
            let detail = format!("we are at {} now", self.local);
            let reason = FailureReason::UnacceptableAddresses;
            self.fail(shared, Stage::Move, reason, detail);
            return self.ask_for_replacement(shared, now);
        }
        let before = self.outer(shared);
        self.find_nat(notifies, probe.path);
        if let Some(seen) = notifies.find(NotifyType::NAT_DETECTION_DESTINATION_IP) {
            self.mobike.seen = seen.data.to_vec();
        }
        if self.outer(shared) != before {
            self.tell_moved(shared);
        }
    }

    /// The response to a request that only shows where the peer receives.
    pub(super) fn path_answered(
        &mut self,
        shared: &mut Shared,
        now: Time,
        probe: &Probe,
        notifies: &Notifies<'_>,
    ) {
        if self.is_proved(shared, now, probe, notifies) && self.mobike.held.take().is_some() {
            self.tell_moved(shared);
        }
    }

    /// What a request says of addresses, and what is to be said in return.
    pub(super) fn addresses_asked(
        &mut self,
        shared: &mut Shared,
        now: Time,
        request: &Informational<'_>,
    ) -> Vec<Said> {
        let (mut answer, path) = (Vec::new(), self.asked_from);
        let notifies = &request.notifies;
        if !self.mobike.agreed {
            return answer;
        }
        // RFC 4555 section 4.2.5: copied as it is, even where nothing else is done any more.
        if let Some(cookie) = notifies.find(NotifyType::COOKIE2)
            && (8..=64).contains(&cookie.data.len())
        {
            answer.push((NotifyType::COOKIE2, cookie.data.to_vec()));
        }
        if self.state != State::Up {
            return answer;
        }
        if notifies.has(NotifyType::UPDATE_SA_ADDRESSES)
            && !self.mobike.leads
            && let Err(refusal) = self.follow_leader(shared, now, path, notifies)
        {
            answer.push((refusal, Vec::new()));
            return answer;
        }
        // RFC 4555 section 3.8: any request may ask how its addresses are seen here.
        if notifies.has(NotifyType::NAT_DETECTION_SOURCE_IP) {
            answer.extend(self.nat_said(shared, path));
        }
        if let Some(peers) = listed(notifies) {
            self.mobike.peers = peers;
            let used = self.remote.ip();
            let is_left = path.1.ip() != used && !self.mobike.peers.contains(&used);
            if self.mobike.leads && is_left {
                self.lead_to(shared, now, path);
                // It has just said that it is not there any more.
                self.mobike.peers.retain(|address| *address != used);
            }
        }
        answer
    }

    /// The leader goes to the addresses of its request.
    // RFC 4555 section 3.5.
    fn follow_leader(
        &mut self,
        shared: &mut Shared,
        now: Time,
        path: Path,
        notifies: &Notifies<'_>,
    ) -> Result<(), NotifyType> {
        if let Some(written) = notifies.find(NotifyType::NO_NATS_ALLOWED)
            && is_translated(written.data, path)
        {
            return Err(NotifyType::UNEXPECTED_NAT_DETECTED);
        }
        if !is_acceptable(shared, path.1) {
            return Err(NotifyType::UNACCEPTABLE_ADDRESSES);
        }
        let before = self.outer(shared);
        let checks = self
            .peer_config(shared)
            .is_some_and(|peer| peer.return_routability);
        self.mobike.moved = Some(now);
        self.tasks.retain(|task| !matches!(task, Task::CheckPath));
        self.take_path(shared, now, path);
        self.find_nat(notifies, path);
        if checks && before.remote.ip() != path.1.ip() {
            self.mobike.held = Some(before);
            self.tasks.push_front(Task::CheckPath);
            return Ok(());
        }
        self.mobike.held = None;
        if self.outer(shared) != before {
            self.tell_moved(shared);
        }
        Ok(())
    }

    /// Where ESP stays for now, if it has not followed yet.
    pub(super) fn held(&self) -> Option<OuterAddresses> {
        self.mobike.held
    }

    /// Whether a packet of ESP tells that the peer has another address.
    // RFC 4555 section 3.8: it may; but not against a move that is under way, nor when it was overtaken by one.
    pub(super) fn esp_tells(&self, now: Time) -> bool {
        let recent = |moved| now - moved < STRAGGLERS;
        self.mobike.held.is_none() && !self.mobike.moved.is_some_and(recent)
    }

    /// What an IKE SA in the place of this one must do about addresses: what this one has not finished.
    pub(super) fn unfinished_moves(&self) -> Vec<Task> {
        let asked = self.outstanding.as_ref().map(|sent| &sent.exchange);
        let mut tasks = Vec::new();
        if matches!(asked, Some(Exchange::UpdateAddresses(_)))
            || self.has_task(|task| matches!(task, Task::UpdateAddresses))
        {
            tasks.push(Task::UpdateAddresses);
        }
        if self.mobike.held.is_some() {
            tasks.push(Task::CheckPath);
        }
        if matches!(asked, Some(Exchange::TellAddresses))
            || self.has_task(|task| matches!(task, Task::TellAddresses))
        {
            tasks.push(Task::TellAddresses);
        }
        tasks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(local: &str, remote: &str) -> Path {
        (local.parse().unwrap(), remote.parse().unwrap())
    }

    // RFC 4555 section 4.2.6.
    #[test]
    fn what_no_nats_allowed_says_is_held_against_the_packets_addresses() {
        let here = path("192.0.2.1:4500", "198.51.100.2:4501");
        let written = [198, 51, 100, 2, 192, 0, 2, 1, 0x11, 0x95, 0x11, 0x94];
        assert!(!is_translated(&written, here));
        assert!(is_translated(
            &written,
            path("192.0.2.1:4500", "198.51.100.2:1024")
        ));
        assert!(is_translated(
            &written,
            path("192.0.2.1:4500", "203.0.113.9:4501")
        ));
        assert!(is_translated(&written[..8], here));
    }

    #[test]
    fn a_list_of_addresses_is_read_as_it_was_written_and_bounded() {
        let written: Vec<IpAddr> = (0..20)
            .map(|last| match last % 2 {
                0 => IpAddr::from([192, 0, 2, last]),
                _ => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(last)]),
            })
            .collect();
        let said = list(&written);
        let sorted = Informational::sort(payloads(&said)).unwrap();
        let read = listed(&sorted.notifies).unwrap();
        assert_eq!(read.len(), MOST_ADDRESSES);
        assert!(read.iter().all(|address| written.contains(address)));
        let none = list(&[]);
        let sorted = Informational::sort(payloads(&none)).unwrap();
        assert_eq!(listed(&sorted.notifies), Some(Vec::new()));
        let silent = Informational::sort(Vec::new()).unwrap();
        assert_eq!(listed(&silent.notifies), None);
    }
}
