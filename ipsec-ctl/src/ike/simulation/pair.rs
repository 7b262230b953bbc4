//! Two endpoints, the network between them, and a data plane that only keeps a list of what is installed.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use ipsec_common::{Spi, TrafficSelector};
use zeroize::Zeroizing;

use super::network::{Conditions, Network, Seeded};
use crate::ike::{
    Endpoint,
    config::{
        ChildConfig, ChildName, DpdMode, EndpointConfig, Mode, NatPolicy, OnDead, PeerConfig,
        PeerId, Role, Unique,
    },
    event::{ChildSaId, ChildUp, Command, DownReason, Event, Failure, IkeSaId},
    job::JobResult,
    time::Time,
};

pub(super) const A: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
pub(super) const B: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 2));
/// The peer's id on either side.
pub(super) const PEER: PeerId = PeerId(7);
/// The first child.
pub(super) const CHILD: ChildName = ChildName(0);

/// One side.
pub(super) struct Side {
    pub(super) endpoint: Endpoint,
    pub(super) address: IpAddr,
    pub(super) installed: BTreeMap<ChildSaId, ChildUp>,
    /// Those of them that only receive, until they are removed.
    pub(super) receive_only: BTreeSet<ChildSaId>,
    /// Outbound SAs in the order of their installation.
    outbound: Vec<(ChildName, Spi)>,
    /// SPI of the outbound SA that carries a child's traffic: the last one that is there.
    pub(super) used: BTreeMap<ChildName, Spi>,
    pub(super) failures: Vec<Failure>,
    pub(super) downs: Vec<DownReason>,
    pub(super) ike_ups: usize,
    pub(super) ike_rekeys: usize,
    /// Nothing that it sends arrives.
    pub(super) mute: bool,
    /// Rounds of attempts in vain.
    pub(super) exhausted: usize,
    /// IKE SAs whose peers have not answered at their addresses in use.
    pub(super) unreachable: Vec<IkeSaId>,
    jobs: Vec<(Time, JobResult)>,
}

pub(super) struct Pair {
    pub(super) now: Time,
    pub(super) network: Network,
    pub(super) a: Side,
    pub(super) b: Side,
    /// Drops everything that is sent to it.
    pub(super) dead: Option<IpAddr>,
    /// Another address of B.
    pub(super) second_of_b: Option<IpAddr>,
}

/// Settings of an endpoint.
pub(super) fn limits() -> EndpointConfig {
    EndpointConfig {
        ike_port: 500,
        nat_port: 4500,
        cookie_threshold: 100,
        half_open: 1000,
        half_open_per_source: 100,
    }
}

pub(super) fn selector(text: &str) -> TrafficSelector {
    let net: ipnet::IpNet = text.parse().unwrap();
    TrafficSelector {
        protocol: 0,
        ports: (0, u16::MAX),
        addresses: (net.network(), net.broadcast()),
    }
}

pub(super) fn child(id: u32, local: &[&str], remote: &[&str], esp: &str) -> ChildConfig {
    ChildConfig {
        id: ChildName(id),
        name: format!("child{id}"),
        local: local.iter().map(|text| selector(text)).collect(),
        remote: remote.iter().map(|text| selector(text)).collect(),
        proposals: vec![esp.parse().unwrap()],
        on_dead: OnDead::Restart,
        lifetime: Duration::from_secs(3600),
        mode: Mode::Tunnel,
    }
}

/// A packet that asks for a child of the peer.
pub(super) fn acquire(child: u32, local: IpAddr) -> Command {
    Command::Acquire {
        peer: PEER,
        child: ChildName(child),
        local: (local, 500).into(),
        packet: None,
    }
}

/// A peer with one child and a suite whose key exchange is quick.
pub(super) fn peer(remote: IpAddr, role: Role) -> PeerConfig {
    let (ours, theirs) = if remote == B {
        ("10.1.0.0/24", "10.2.0.0/24")
    } else {
        ("10.2.0.0/24", "10.1.0.0/24")
    };
    PeerConfig {
        id: PEER,
        name: "peer".to_owned(),
        remote: remote.into(),
        local: None,
        local_id: None,
        remote_id: None,
        psk: Zeroizing::new(b"a secret that both know".to_vec()),
        role,
        proposals: vec!["aes256gcm16-prfsha256-x25519".parse().unwrap()],
        nat: NatPolicy::Auto,
        fragment_size: Some(1200),
        keepalive: Duration::from_secs(20),
        mobike: true,
        return_routability: true,
        childless: false,
        dpd_mode: DpdMode::OnDemand,
        dpd_interval: Duration::from_secs(10),
        dpd_timeout: Duration::from_secs(60),
        unique: Unique::Replace,
        lifetime: Duration::from_secs(86_400),
        reauth: false,
        children: vec![child(0, &[ours], &[theirs], "aes256gcm16")],
    }
}

impl Side {
    fn new(address: IpAddr, random: Seeded, config: EndpointConfig) -> Self {
        Self {
            endpoint: Endpoint::new(config, Box::new(random)),
            address,
            installed: BTreeMap::new(),
            receive_only: BTreeSet::new(),
            outbound: Vec::new(),
            used: BTreeMap::new(),
            failures: Vec::new(),
            downs: Vec::new(),
            ike_ups: 0,
            ike_rekeys: 0,
            mute: false,
            exhausted: 0,
            unreachable: Vec::new(),
            jobs: Vec::new(),
        }
    }

    fn drain(&mut self, now: Time, network: &mut Network) {
        while let Some(event) = self.endpoint.poll_event() {
            self.trace(now, &event);
            match event {
                Event::IkeUp(_) => self.ike_ups += 1,
                Event::IkeRekeyed(_) => self.ike_rekeys += 1,
                Event::IkeDown { reason, .. } => self.downs.push(reason),
                Event::ChildUp(up) => {
                    assert!(
                        self.installed
                            .values()
                            .all(|known| known.spi_in != up.spi_in),
                        "an inbound SPI was given out twice"
                    );
                    assert!(self.installed.insert(up.sa, *up).is_none());
                }
                Event::Outbound(sa) => {
                    let up = self.installed.get(&sa).expect("an installed SA");
                    let outbound = (up.child, up.spi_out);
                    // Who is told twice does nothing the second time.
                    if !self.outbound.contains(&outbound) {
                        self.outbound.push(outbound);
                        self.used.insert(up.child, up.spi_out);
                    }
                }
                Event::OutboundDown(sa) => {
                    let up = self.installed.get(&sa).expect("an installed SA");
                    assert!(self.receive_only.insert(sa), "removed twice");
                    let (child, spi) = (up.child, up.spi_out);
                    self.sends_no_more(child, spi);
                }
                Event::ChildDown { sa, .. } => {
                    let up = self.installed.remove(&sa).expect("an installed SA");
                    self.receive_only.remove(&sa);
                    self.sends_no_more(up.child, up.spi_out);
                }
                Event::Moved(sa, outer) => {
                    self.installed.get_mut(&sa).expect("an installed SA").outer = outer;
                }
                Event::Exhausted(_) => self.exhausted += 1,
                Event::Unreachable(ike) => self.unreachable.push(ike),
                Event::Failed(failure) => self.failures.push(*failure),
            }
        }
        while let Some(transmit) = self.endpoint.poll_transmit() {
            if !self.mute {
                network.send(now, transmit);
            }
        }
        while let Some(job) = self.endpoint.poll_job() {
            let done = now + network.job_delay();
            self.jobs.push((done, job.run()));
        }
    }

    fn trace(&self, now: Time, event: &Event) {
        if std::env::var_os("IPSEC_XDP_TRACE").is_none() {
            return;
        }
        let (at, side) = (
            now.0.as_secs_f64(),
            if self.address == A { 'A' } else { 'B' },
        );
        match event {
            Event::ChildUp(up) => eprintln!(
                "{at:.6} {side} ChildUp({:?} of {:?}, replaces {:?}, {} {})",
                up.sa, up.child, up.replaces, up.spi_in, up.spi_out
            ),
            Event::IkeUp(up) => eprintln!("{at:.6} {side} IkeUp({:?})", up.ike),
            Event::IkeRekeyed(up) => eprintln!("{at:.6} {side} IkeRekeyed({:?})", up.ike),
            event => eprintln!("{at:.6} {side} {event:?}"),
        }
    }

    /// The one before takes over, if there is one.
    fn sends_no_more(&mut self, child: ChildName, spi: Spi) {
        self.outbound.retain(|outbound| *outbound != (child, spi));
        match self.outbound.iter().rfind(|(other, _)| *other == child) {
            Some((_, before)) => self.used.insert(child, *before),
            None => self.used.remove(&child),
        };
    }

    /// The pairs that carry traffic, or are about to.
    pub(super) fn in_force(&self) -> Vec<&ChildUp> {
        let in_force = |up: &&ChildUp| !self.receive_only.contains(&up.sa);
        self.installed.values().filter(in_force).collect()
    }

    pub(super) fn command(&mut self, now: Time, network: &mut Network, command: Command) {
        self.endpoint.handle_command(now, command);
        self.drain(now, network);
    }

    /// Whether a key exchange is under way.
    pub(super) fn has_job(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// The first key exchange that is under way is done.
    pub(super) fn finish_job(&mut self, now: Time, network: &mut Network) {
        let (_, result) = self.jobs.remove(0);
        self.endpoint.handle_job(now, result);
        self.drain(now, network);
    }

    fn due_job(&mut self, now: Time) -> Option<JobResult> {
        let index = self.jobs.iter().position(|(at, _)| *at <= now)?;
        Some(self.jobs.swap_remove(index).1)
    }

    fn next(&self) -> Option<Time> {
        self.jobs
            .iter()
            .map(|(at, _)| *at)
            .chain(self.endpoint.poll_timeout())
            .min()
    }

    fn work(&mut self, now: Time, network: &mut Network) {
        while let Some(result) = self.due_job(now) {
            self.endpoint.handle_job(now, result);
            self.drain(now, network);
        }
        self.fire(now, network);
    }

    fn fire(&mut self, now: Time, network: &mut Network) {
        if self.endpoint.poll_timeout().is_some_and(|at| at <= now) {
            self.endpoint.handle_timeout(now);
            self.drain(now, network);
        }
    }

    /// The SA pair that carries a child, the newest if there are several.
    pub(super) fn child(&self, id: u32) -> Option<&ChildUp> {
        self.installed
            .values()
            .rfind(|up| up.child == ChildName(id))
    }
}

/// So many packets were sent by a pair, and none has come back: reason to ask whether the peer lives.
pub(super) fn sent(sa: ChildSaId, packets: u64) -> Command {
    Command::Traffic {
        sa,
        inbound: 0,
        outbound: packets,
    }
}

impl Pair {
    pub(super) fn new(seed: u64, conditions: Conditions) -> Self {
        Self::with(seed, conditions, limits(), limits())
    }

    pub(super) fn with(
        seed: u64,
        conditions: Conditions,
        a: EndpointConfig,
        b: EndpointConfig,
    ) -> Self {
        Self {
            now: Time::default(),
            network: Network::new(conditions, Seeded::new(seed, 0)),
            a: Side::new(A, Seeded::new(seed, 1), a),
            b: Side::new(B, Seeded::new(seed, 2), b),
            dead: None,
            second_of_b: None,
        }
    }

    /// A pair whose peers know each other, `a` to initiate.
    pub(super) fn configured(seed: u64, conditions: Conditions) -> Self {
        let mut pair = Self::new(seed, conditions);
        pair.tell_a(Command::SetPeer(Box::new(peer(B, Role::Initiate))));
        pair.tell_b(Command::SetPeer(Box::new(peer(A, Role::Respond))));
        pair
    }

    /// A has sent so many packets in all by the pair of its first child, and nothing has come back.
    pub(super) fn a_sends(&mut self, packets: u64) {
        let sa = self.a.child(0).unwrap().sa;
        self.tell_a(sent(sa, packets));
    }

    pub(super) fn tell_a(&mut self, command: Command) {
        self.a.command(self.now, &mut self.network, command);
    }

    pub(super) fn tell_b(&mut self, command: Command) {
        self.b.command(self.now, &mut self.network, command);
    }

    /// Tells the end whose peer is at `remote` about it.
    pub(super) fn set_peer(&mut self, remote: IpAddr, config: PeerConfig) {
        let command = Command::SetPeer(Box::new(config));
        if remote == B {
            self.tell_a(command);
        } else {
            self.tell_b(command);
        }
    }

    pub(super) fn up_a(&mut self) {
        self.tell_a(Command::Up(PEER, SocketAddr::new(A, 500)));
    }

    pub(super) fn up_b(&mut self) {
        self.tell_b(Command::Up(PEER, SocketAddr::new(B, 500)));
    }

    /// The other side forgets everything, as after a crash.
    pub(super) fn restart_b(&mut self, seed: u64) {
        self.b = Side::new(B, Seeded::new(seed, 3), limits());
    }

    /// Lets everything happen that happens within `time`.
    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        for _ in 0..1_000_000 {
            let next = [self.network.next_arrival(), self.a.next(), self.b.next()]
                .into_iter()
                .flatten()
                .min();
            match next {
                Some(at) if at <= end => self.now = self.now.max(at),
                _ => {
                    self.now = end;
                    return;
                }
            }
            while let Some(flight) = self.network.arrival(self.now) {
                self.deliver(&flight);
            }
            self.a.work(self.now, &mut self.network);
            self.b.work(self.now, &mut self.network);
        }
        panic!("the endpoints never come to rest");
    }

    fn next_timer(&self) -> Option<Time> {
        let due = |side: &Side| side.endpoint.poll_timeout();
        due(&self.a).into_iter().chain(due(&self.b)).min()
    }

    /// Whether a timer fires soon.
    pub(super) fn has_timer_within(&self, time: Duration) -> bool {
        self.next_timer().is_some_and(|at| at <= self.now + time)
    }

    /// Time passes until a timer fires, with nothing else having happened.
    pub(super) fn fire_timer(&mut self) {
        if let Some(at) = self.next_timer() {
            self.now = self.now.max(at);
            self.a.fire(self.now, &mut self.network);
            self.b.fire(self.now, &mut self.network);
        }
    }

    pub(super) fn deliver(&mut self, flight: &super::network::Flight) {
        if self.dead == Some(flight.destination.ip()) || flight.bytes == [0xff] {
            return;
        }
        let to = flight.destination.ip();
        for side in [&mut self.a, &mut self.b] {
            let second = self.second_of_b.filter(|_| side.address == B);
            if side.address == to || second == Some(to) {
                side.endpoint.handle_datagram(
                    self.now,
                    flight.destination,
                    flight.source,
                    &flight.bytes,
                );
                side.drain(self.now, &mut self.network);
            }
        }
    }

    /// Whatever is sent now by the first child is received, and something can be sent.
    pub(super) fn assert_nothing_is_lost(&self) {
        for (from, to) in [(&self.a, &self.b), (&self.b, &self.a)] {
            let mut inbound = to.installed.values().map(|up| up.spi_in);
            let used = from.used.get(&CHILD).copied();
            assert!(used.is_some(), "{} has nothing to send on", from.address);
            assert!(
                inbound.any(|spi| Some(spi) == used),
                "{} sends what the peer does not receive",
                from.address
            );
        }
    }

    /// Both sides have exactly these pairs of SAs, and the same keys for them.
    pub(super) fn assert_agreement(&self, children: usize) {
        assert_eq!(
            self.a.in_force().len(),
            children,
            "at A; failures {:?}",
            self.a.failures
        );
        assert_eq!(
            self.b.in_force().len(),
            children,
            "at B; failures {:?}",
            self.b.failures
        );
        for ours in self.a.in_force() {
            let theirs = self
                .b
                .in_force()
                .into_iter()
                .find(|theirs| theirs.spi_in == ours.spi_out)
                .expect("the peer has the other half");
            assert_eq!(theirs.spi_out, ours.spi_in);
            assert_eq!(theirs.suite, ours.suite);
            assert_eq!(theirs.local, ours.remote);
            assert_eq!(theirs.remote, ours.local);
            for (ours, theirs) in [
                (&ours.key_in, &theirs.key_out),
                (&ours.key_out, &theirs.key_in),
            ] {
                assert_eq!(ours.encryption.bytes(), theirs.encryption.bytes());
                assert_eq!(ours.integrity.bytes(), theirs.integrity.bytes());
            }
            assert_ne!(
                ours.key_in.encryption.bytes(),
                ours.key_out.encryption.bytes()
            );
            assert_eq!(theirs.outer.encapsulated, ours.outer.encapsulated);
        }
    }
}
