//! ICMP echo between namespaces.

use std::{
    collections::HashMap,
    fmt,
    mem::MaybeUninit,
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{capture::CANARY, netns::Netns};

/// How to ping.
#[derive(Clone, Copy, Debug)]
pub struct Ping {
    /// Source address, if it matters.
    pub from: Option<IpAddr>,
    /// Destination.
    pub to: IpAddr,
    /// Requests.
    pub count: u16,
    /// Time between them.
    pub interval: Duration,
    /// Bytes of ICMP payload, at least the canary's.
    pub size: usize,
}

/// What came back.
#[derive(Clone, Debug, Default)]
pub struct PingReport {
    /// Requests sent.
    pub sent: u16,
    /// Requests that the kernel would not send, for instance without a route.
    pub refused: u16,
    /// Requests answered.
    pub received: u16,
    /// Further answers to the same request.
    pub duplicates: u16,
    /// Shortest and longest time from request to answer.
    pub times: Option<(Duration, Duration)>,
}

impl Ping {
    /// Ten requests, 20 ms apart.
    pub fn to(to: IpAddr) -> Self {
        Self {
            from: None,
            to,
            count: 10,
            interval: Duration::from_millis(20),
            size: 56,
        }
    }

    /// As many requests.
    pub fn count(self, count: u16) -> Self {
        Self { count, ..self }
    }

    /// That far apart.
    pub fn interval(self, interval: Duration) -> Self {
        Self { interval, ..self }
    }

    /// Pings, and waits up to a second for the last answer.
    ///
    /// # Errors
    ///
    /// The socket cannot be opened. Lost packets are no error.
    pub fn run(self, netns: &Netns) -> anyhow::Result<PingReport> {
        static IDENTIFIER: AtomicU16 = AtomicU16::new(1);
        let identifier = IDENTIFIER.fetch_add(1, Ordering::Relaxed);
        let socket = netns.run(|| open(self.to, self.from))?;
        let mut report = PingReport::default();
        let mut pending = HashMap::new();
        let start = Instant::now();
        for sequence in 0..self.count {
            pending.insert(sequence, Instant::now());
            let request = request(self.to.is_ipv6(), identifier, sequence, self.size);
            match socket.send_to(&request, &SocketAddr::new(self.to, 0).into()) {
                Ok(_) => report.sent += 1,
                Err(_) => report.refused += 1,
            }
            let next = start + self.interval * (u32::from(sequence) + 1);
            collect(&socket, identifier, next, &mut pending, &mut report, false)?;
        }
        let end = Instant::now() + Duration::from_secs(1);
        collect(&socket, identifier, end, &mut pending, &mut report, true)?;
        Ok(report)
    }
}

impl PingReport {
    /// Every request was answered once.
    ///
    /// # Errors
    ///
    /// It says what was lost.
    pub fn all_answered(&self) -> anyhow::Result<()> {
        ensure!(
            self.received > 0
                && self.received == self.sent
                && self.refused == 0
                && self.duplicates == 0,
            "{self}"
        );
        Ok(())
    }

    /// No request was answered.
    ///
    /// # Errors
    ///
    /// Some were.
    pub fn none_answered(&self) -> anyhow::Result<()> {
        ensure!(self.received == 0, "{self}");
        Ok(())
    }

    /// Share of requests without answer, in percent.
    pub fn loss_percent(&self) -> f64 {
        let asked = f64::from(self.sent) + f64::from(self.refused);
        if asked == 0.0 {
            return 0.0;
        }
        100.0 * (asked - f64::from(self.received)) / asked
    }
}

impl fmt::Display for PingReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} pings answered",
            self.received,
            self.sent + self.refused
        )?;
        if self.duplicates > 0 {
            write!(f, ", {} more than once", self.duplicates)?;
        }
        if let Some((least, most)) = self.times {
            write!(f, ", in {least:.1?} to {most:.1?}")?;
        }
        Ok(())
    }
}

fn open(to: IpAddr, from: Option<IpAddr>) -> anyhow::Result<Socket> {
    let (domain, protocol) = match to {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol)).context("a socket for pings")?;
    if let Some(from) = from {
        socket.bind(&SocketAddr::new(from, 0).into())?;
    }
    Ok(socket)
}

/// An echo request (RFC 792, RFC 4443); the kernel fills in the checksum of ICMPv6.
fn request(v6: bool, identifier: u16, sequence: u16, size: usize) -> Vec<u8> {
    let mut packet = vec![if v6 { 128 } else { 8 }, 0, 0, 0];
    packet.extend(identifier.to_be_bytes());
    packet.extend(sequence.to_be_bytes());
    packet.extend(CANARY);
    packet.resize(8 + size.max(CANARY.len()), b'.');
    if !v6 {
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

/// The Internet checksum (RFC 1071).
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .fold(0, u32::wrapping_add);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// Takes answers until `end`, or, if `eager`, until nothing is pending.
fn collect(
    socket: &Socket,
    identifier: u16,
    end: Instant,
    pending: &mut HashMap<u16, Instant>,
    report: &mut PingReport,
    eager: bool,
) -> anyhow::Result<()> {
    let mut buffer = [MaybeUninit::new(0); 2048];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || (eager && pending.is_empty()) {
            return Ok(());
        }
        // Less than a microsecond would be none at all, and none waits for ever.
        socket.set_read_timeout(Some(left.max(Duration::from_micros(1))))?;
        let Ok((length, from)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let v6 = from.is_ipv6();
        let packet = initialised(&buffer, length);
        // Raw IPv4 sockets deliver the IP header as well.
        let skip = if v6 {
            0
        } else {
            packet
                .first()
                .map_or(0, |first| usize::from(first & 15) * 4)
        };
        let Some([kind, _, _, _, id0, id1, seq0, seq1, ..]) = packet.get(skip..) else {
            continue;
        };
        let is_reply = *kind == if v6 { 129 } else { 0 };
        if !is_reply || u16::from_be_bytes([*id0, *id1]) != identifier {
            continue;
        }
        let Some(sent) = pending.remove(&u16::from_be_bytes([*seq0, *seq1])) else {
            report.duplicates += 1;
            continue;
        };
        report.received += 1;
        let time = sent.elapsed();
        let (least, most) = report.times.unwrap_or((time, time));
        report.times = Some((least.min(time), most.max(time)));
    }
}

/// Copies what was received out of a buffer that was initialised to begin with.
#[expect(unsafe_code, reason = "socket2 receives into uninitialised memory")]
fn initialised(buffer: &[MaybeUninit<u8>], length: usize) -> Vec<u8> {
    buffer
        .iter()
        .take(length)
        // SAFETY: every element was made by MaybeUninit::new.
        .map(|byte| unsafe { byte.assume_init() })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_sums_to_zero() {
        assert_eq!(checksum(&request(false, 7, 9, 56)), 0);
    }
}
