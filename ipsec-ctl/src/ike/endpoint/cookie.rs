//! Cookies: proof that an initiator receives at the address it sends from (RFC 7296 section 2.6).

use std::{net::SocketAddr, time::Duration};

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::ike::{crypto::Prf, message::IkeSpi, rng::Random, time::Time};

/// Time after which the secret changes; the one before stays good for as long again.
const ROTATION: Duration = Duration::from_secs(60);
const SECRET_BYTES: usize = 32;

/// The secrets behind our cookies.
pub(super) struct Cookies {
    current: Zeroizing<Vec<u8>>,
    previous: Zeroizing<Vec<u8>>,
    since: Time,
}

impl Cookies {
    pub(super) fn new(random: &mut dyn Random) -> Self {
        Self {
            current: secret(random),
            previous: secret(random),
            since: Time::default(),
        }
    }

    /// The cookie that an initiator must send back.
    pub(super) fn issue(
        &mut self,
        random: &mut dyn Random,
        now: Time,
        remote: SocketAddr,
        spi: IkeSpi,
        nonce: &[u8],
    ) -> Vec<u8> {
        self.rotate(random, now);
        cookie(&self.current, remote, spi, nonce)
    }

    /// Whether a cookie is one of ours, and this initiator's.
    pub(super) fn is_good(
        &mut self,
        random: &mut dyn Random,
        now: Time,
        (remote, spi, nonce): (SocketAddr, IkeSpi, &[u8]),
        given: &[u8],
    ) -> bool {
        self.rotate(random, now);
        [&self.current, &self.previous]
            .into_iter()
            .any(|secret| cookie(secret, remote, spi, nonce).ct_eq(given).into())
    }

    fn rotate(&mut self, random: &mut dyn Random, now: Time) {
        let age = now - self.since;
        if age < ROTATION {
            return;
        }
        let fresh = secret(random);
        let last = std::mem::replace(&mut self.current, fresh);
        // After a long silence the last secret is too old to be good for anything.
        self.previous = if age < 2 * ROTATION {
            last
        } else {
            secret(random)
        };
        self.since = now;
    }
}

fn secret(random: &mut dyn Random) -> Zeroizing<Vec<u8>> {
    let mut bytes = Zeroizing::new(vec![0; SECRET_BYTES]);
    random.fill(&mut bytes);
    bytes
}

// RFC 7296 section 2.6: Hash(Ni | IPi | SPIi | secret), here as an HMAC.
fn cookie(secret: &[u8], remote: SocketAddr, spi: IkeSpi, nonce: &[u8]) -> Vec<u8> {
    let address = match remote.ip() {
        std::net::IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        std::net::IpAddr::V6(address) => address.octets(),
    };
    Prf::HmacSha256
        .compute(secret, &[&spi.0.to_be_bytes(), &address, nonce])
        .to_vec()
}
