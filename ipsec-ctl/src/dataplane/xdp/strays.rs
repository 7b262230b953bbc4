//! ESP in UDP that has come past the sockets through which the kernel opens it: for an SA of the kernel, from where no peer is known
//! to be. A NAT has given the peer another port, or somebody pretends it; who has the keys can tell.

use std::net::{IpAddr, SocketAddr};

use ipsec_common::Spi;
use tokio::sync::broadcast;

use super::events::RateLimit;

/// One such datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stray {
    /// The SA that it names.
    pub spi: Spi,
    /// Our address and port.
    pub local: SocketAddr,
    /// Where it came from.
    pub remote: SocketAddr,
}

/// Reports of them, to whoever asks for them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Strays {
    reports: broadcast::Sender<Stray>,
    often: RateLimit<IpAddr>,
}

/// Reports that wait at most: later ones say the same again.
const QUEUE: usize = 64;

impl Default for Strays {
    fn default() -> Self {
        Self {
            reports: broadcast::channel(QUEUE).0,
            often: RateLimit::new(1, 1024),
        }
    }
}

impl Strays {
    /// Reports one, once a second for each address. `now` is in seconds of CLOCK_MONOTONIC.
    pub fn report(&self, stray: Stray, now: u64) {
        if self.often.pass(stray.remote.ip(), now) {
            // Without anybody who asks there is no SA of the kernel.
            let _ = self.reports.send(stray);
        }
    }

    /// All that are reported from now on.
    pub fn listen(&self) -> broadcast::Receiver<Stray> {
        self.reports.subscribe()
    }
}
