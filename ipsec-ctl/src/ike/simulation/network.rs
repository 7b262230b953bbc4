//! The network: what happens to a datagram on its way, drawn from the seed.

use std::{net::SocketAddr, time::Duration};

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

use crate::ike::{event::Transmit, rng::Random, time::Time};

/// Randomness of one simulation.
pub(super) struct Seeded(ChaCha8Rng);

impl Seeded {
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Self(rng)
    }

    /// A number below `limit`.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0.next_u64() % limit
    }

    /// True in so many of a hundred cases.
    pub(super) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

impl Random for Seeded {
    fn fill(&mut self, bytes: &mut [u8]) {
        self.0.fill_bytes(bytes);
    }
}

/// How bad the network is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Conditions {
    /// Datagrams lost, in percent.
    pub(super) loss: u64,
    /// Datagrams that arrive twice, in percent.
    pub(super) repetition: u64,
    /// Datagrams of which a bit is wrong, in percent.
    pub(super) corruption: u64,
    /// Longest delay; the shortest is a millisecond, so that datagrams overtake each other.
    pub(super) delay: Duration,
    /// Longest time that a job takes.
    pub(super) job: Duration,
}

impl Conditions {
    /// A network that does what it should.
    pub(super) const PERFECT: Self = Self {
        loss: 0,
        repetition: 0,
        corruption: 0,
        delay: Duration::from_millis(1),
        job: Duration::from_millis(1),
    };
}

/// A NAT in front of one side, which shows the other side another address and port.
#[derive(Clone, Copy, Debug)]
pub(super) struct NatBox {
    pub(super) inside: std::net::IpAddr,
    pub(super) outside: std::net::IpAddr,
    /// Added to ports on the way out; changing it is what happens when a NAT forgets.
    pub(super) shift: u16,
}

impl NatBox {
    fn outwards(&self, address: SocketAddr) -> SocketAddr {
        if address.ip() == self.inside {
            SocketAddr::new(self.outside, address.port().wrapping_add(self.shift))
        } else {
            address
        }
    }

    fn inwards(&self, address: SocketAddr) -> SocketAddr {
        if address.ip() == self.outside {
            SocketAddr::new(self.inside, address.port().wrapping_sub(self.shift))
        } else {
            address
        }
    }
}

/// A datagram on its way.
#[derive(Clone, Debug)]
pub(super) struct Flight {
    pub(super) at: Time,
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    pub(super) bytes: Vec<u8>,
}

pub(super) struct Network {
    pub(super) conditions: Conditions,
    pub(super) nat: Option<NatBox>,
    pub(super) flights: Vec<Flight>,
    /// Every datagram that was sent, as the wire saw it.
    pub(super) sent: Vec<Flight>,
    random: Seeded,
}

impl Network {
    pub(super) fn new(conditions: Conditions, random: Seeded) -> Self {
        Self {
            conditions,
            nat: None,
            flights: Vec::new(),
            sent: Vec::new(),
            random,
        }
    }

    fn delay(&mut self, longest: Duration) -> Duration {
        let micros = u64::try_from(longest.as_micros()).unwrap();
        Duration::from_micros(1000 + self.random.below(micros.max(1)))
    }

    pub(super) fn job_delay(&mut self) -> Duration {
        self.delay(self.conditions.job)
    }

    pub(super) fn send(&mut self, now: Time, transmit: Transmit) {
        let mut flight = Flight {
            at: now,
            source: transmit.local,
            destination: transmit.remote,
            bytes: transmit.bytes,
        };
        if let Some(nat) = self.nat {
            flight.source = nat.outwards(flight.source);
            // Only what answers a packet from inside gets in, to the port that the NAT chose.
            flight.destination = nat.inwards(flight.destination);
        }
        self.sent.push(flight.clone());
        if self.random.percent(self.conditions.loss) {
            return;
        }
        let copies = if self.random.percent(self.conditions.repetition) {
            2
        } else {
            1
        };
        for _ in 0..copies {
            let mut copy = flight.clone();
            copy.at = now + self.delay(self.conditions.delay);
            if self.random.percent(self.conditions.corruption) && !copy.bytes.is_empty() {
                let bit = self.random.below(copy.bytes.len() as u64 * 8);
                let at = usize::try_from(bit / 8).unwrap();
                copy.bytes[at] ^= 1 << (bit % 8);
            }
            self.flights.push(copy);
        }
    }

    /// The next datagram that arrives up to `now`.
    pub(super) fn arrival(&mut self, now: Time) -> Option<Flight> {
        let index = self
            .flights
            .iter()
            .enumerate()
            .filter(|(_, flight)| flight.at <= now)
            .min_by_key(|(_, flight)| flight.at)
            .map(|(index, _)| index)?;
        Some(self.flights.swap_remove(index))
    }

    pub(super) fn next_arrival(&self) -> Option<Time> {
        self.flights.iter().map(|flight| flight.at).min()
    }
}
