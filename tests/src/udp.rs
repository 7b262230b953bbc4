//! UDP flows whose packets are numbered, so that loss, duplicates and disorder are counted, not guessed.

use std::{
    fmt,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, ensure};
use socket2::SockRef;

use crate::{capture::CANARY, command::slower, netns::Netns};

/// Most packets of one flow: each has a bit in memory.
const LONGEST: u64 = 100_000_000;

/// A flow to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// Where it goes.
    pub to: IpAddr,
    /// Packets a second, fewer on a machine that is [`slower`]; `None` for as many as possible.
    pub rate: Option<u32>,
    /// How long.
    pub time: Duration,
    /// Bytes of UDP payload, at least the canary's and 8.
    pub size: usize,
}

/// What became of a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FlowReport {
    /// Packets sent.
    pub sent: u64,
    /// Packets that the kernel refused to send.
    pub refused: u64,
    /// Different packets received.
    pub received: u64,
    /// Packets received again.
    pub duplicated: u64,
    /// Packets received after one that was sent later.
    pub reordered: u64,
    /// Packets received that are not as they were sent.
    pub damaged: u64,
    /// Bytes of UDP payload in a packet.
    pub size: usize,
    /// Time between the first and the last packet received.
    pub time: Duration,
}

impl Flow {
    /// A moderate flow of 1000 packets a second for two seconds.
    pub fn to(to: IpAddr) -> Self {
        Self {
            to,
            rate: Some(1000),
            time: Duration::from_secs(2),
            size: 200,
        }
    }

    /// Sends it from one namespace to another and waits until it has drained.
    ///
    /// # Errors
    ///
    /// Sockets cannot be opened. Lost packets are no error.
    pub fn run(self, from: &Netns, into: &Netns) -> anyhow::Result<FlowReport> {
        self.start(from, into)?.finish()
    }

    /// Starts it in the background.
    ///
    /// # Errors
    ///
    /// As for [`Self::run`].
    pub fn start(self, from: &Netns, into: &Netns) -> anyhow::Result<Running> {
        let receiver = into.run(|| open(self.to, 64 << 20))?;
        let destination = receiver.local_addr()?;
        let sender = from.run(|| open(unspecified(self.to), 0))?;
        sender
            .connect(destination)
            .context("a UDP flow without a route")?;
        let stop = Arc::new(AtomicBool::new(false));
        let receiving = {
            let stop = Arc::clone(&stop);
            spawn("udp-in", move || receive(&receiver, self.size(), &stop))?
        };
        let cut = Arc::new(AtomicBool::new(false));
        let sending = {
            let cut = Arc::clone(&cut);
            spawn("udp-out", move || send(&sender, self, &cut))?
        };
        Ok(Running {
            sending,
            receiving,
            stop,
            cut,
            size: self.size(),
        })
    }

    fn size(self) -> usize {
        self.size.max(8 + CANARY.len())
    }
}

/// A flow under way.
#[derive(Debug)]
pub struct Running {
    sending: JoinHandle<(u64, u64)>,
    receiving: JoinHandle<anyhow::Result<FlowReport>>,
    stop: Arc<AtomicBool>,
    cut: Arc<AtomicBool>,
    size: usize,
}

impl Running {
    /// Waits until all is sent and has had half a second to arrive.
    ///
    /// # Errors
    ///
    /// The receiver failed.
    pub fn finish(self) -> anyhow::Result<FlowReport> {
        let (sent, refused) = self
            .sending
            .join()
            .map_err(|_| anyhow!("the sender panicked"))?;
        thread::sleep(Duration::from_millis(500));
        self.stop.store(true, Ordering::Release);
        let report = self
            .receiving
            .join()
            .map_err(|_| anyhow!("the receiver panicked"))??;
        Ok(FlowReport {
            sent,
            refused,
            size: self.size,
            ..report
        })
    }

    /// Stops sending now, then as [`Self::finish`].
    ///
    /// # Errors
    ///
    /// As for [`Self::finish`].
    pub fn cut(self) -> anyhow::Result<FlowReport> {
        self.cut.store(true, Ordering::Release);
        self.finish()
    }
}

impl FlowReport {
    /// Packets that did not arrive.
    pub fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.received)
    }

    /// Everything arrived once and whole.
    ///
    /// # Errors
    ///
    /// It says what was lost.
    pub fn is_perfect(&self) -> anyhow::Result<()> {
        ensure!(
            self.sent > 0
                && self.refused == 0
                && self.lost() == 0
                && self.duplicated == 0
                && self.damaged == 0,
            "{self}"
        );
        Ok(())
    }

    /// Received UDP payload in bits a second.
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    pub fn bits_per_second(&self) -> f64 {
        let seconds = self.time.as_secs_f64();
        if seconds == 0.0 {
            return 0.0;
        }
        self.received as f64 * self.size as f64 * 8.0 / seconds
    }

    /// Received packets a second.
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    pub fn packets_per_second(&self) -> f64 {
        let seconds = self.time.as_secs_f64();
        if seconds == 0.0 {
            return 0.0;
        }
        self.received as f64 / seconds
    }
}

impl fmt::Display for FlowReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} packets arrived ({} refused, {} duplicated, {} reordered, {} damaged)",
            self.received, self.sent, self.refused, self.duplicated, self.reordered, self.damaged
        )
    }
}

fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> anyhow::Result<JoinHandle<T>> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .context("a thread for a UDP flow")
}

fn open(address: IpAddr, buffer: usize) -> anyhow::Result<UdpSocket> {
    let socket = UdpSocket::bind(SocketAddr::new(address, 0))
        .with_context(|| format!("a UDP socket on {address}"))?;
    if buffer > 0 {
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &buffer)?;
    }
    SockRef::from(&socket).set_send_buffer_size(4 << 20)?;
    Ok(socket)
}

fn unspecified(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    }
}

/// Sends the flow; returns packets sent and refused.
fn send(socket: &UdpSocket, flow: Flow, cut: &AtomicBool) -> (u64, u64) {
    let mut packet = vec![0; 8];
    packet.extend(CANARY);
    packet.resize(flow.size(), b'.');
    let start = Instant::now();
    let (mut sent, mut refused) = (0, 0);
    let slower = u64::from(slower());
    let due = |elapsed: Duration| match flow.rate {
        Some(rate) => {
            let passed = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
            passed * u64::from(rate) / (1_000_000 * slower)
        }
        None => u64::MAX,
    };
    while start.elapsed() < flow.time && sent < LONGEST && !cut.load(Ordering::Acquire) {
        if sent + refused >= due(start.elapsed()) {
            thread::sleep(Duration::from_micros(500));
            continue;
        }
        packet[..8].copy_from_slice(&sent.to_be_bytes());
        match socket.send(&packet) {
            Ok(_) => sent += 1,
            Err(_) => refused += 1,
        }
    }
    (sent, refused)
}

fn receive(socket: &UdpSocket, size: usize, stop: &AtomicBool) -> anyhow::Result<FlowReport> {
    socket.set_read_timeout(Some(Duration::from_millis(20)))?;
    let mut seen: Vec<u64> = Vec::new();
    let mut report = FlowReport::default();
    let mut times: Option<(Instant, Instant)> = None;
    let mut highest = 0;
    let mut buffer = vec![0; 65_536];
    while !stop.load(Ordering::Acquire) {
        let Ok(length) = socket.recv(&mut buffer) else {
            continue;
        };
        let now = Instant::now();
        times = Some((times.map_or(now, |(first, _)| first), now));
        let packet = &buffer[..length];
        let number = packet.first_chunk().map(|bytes| u64::from_be_bytes(*bytes));
        let intact = length == size && packet[8..].starts_with(CANARY);
        let Some(number) = number.filter(|number| intact && *number < LONGEST) else {
            report.damaged += 1;
            continue;
        };
        let word = usize::try_from(number / 64)?;
        if seen.len() <= word {
            seen.resize(word + 1024, 0);
        }
        let bit = 1 << (number % 64);
        if seen[word] & bit != 0 {
            report.duplicated += 1;
            continue;
        }
        seen[word] |= bit;
        report.received += 1;
        if number < highest {
            report.reordered += 1;
        }
        highest = highest.max(number);
    }
    report.time = times.map_or(Duration::ZERO, |(first, last)| last - first);
    Ok(report)
}
