//! A capture of every packet in a namespace, judged as it comes in.
//!
//! Each frame is decoded, counted and searched for what must not be there in the clear: an address of the sites, or
//! [`CANARY`], which all test traffic carries. The first frames are kept, for attackers to replay.
#![expect(
    unsafe_code,
    reason = "the kernel's count of missed frames is read by getsockopt"
)]

use std::{
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, ensure};
use memchr::memmem::Finder;
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt,
            socket, sockopt,
        },
        time::TimeVal,
    },
};

pub use crate::decode::Kind;
use crate::{decode::decode, netns::Netns, topology::is_inside};

/// Every packet of test traffic carries this text.
pub const CANARY: &[u8] = b"this-must-not-be-readable-on-the-wan";

/// Frames kept for replays.
const KEPT: usize = 20_000;
/// Findings kept; all are counted.
const FINDINGS: usize = 20;
/// Receive buffer in the kernel, in bytes: the capture may lag behind a burst, but not lose any of it.
const BUFFER: usize = 256 << 20;

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    state: Arc<State>,
    socket: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    stop: AtomicBool,

    report: Mutex<Report>,
}

/// What was seen. Each packet on its way through the namespace counts once, where it comes in.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// ARP, neighbour discovery.
    pub neighbour: u64,
    /// ICMP and ICMPv6 in the clear.
    pub icmp: u64,
    /// ESP.
    pub esp: u64,
    /// ESP in UDP.
    pub esp_in_udp: u64,
    /// IKE.
    pub ike: u64,
    /// NAT keep-alives.
    pub keepalive: u64,
    /// Later fragments.
    pub fragments: u64,
    /// Anything else.
    pub other: u64,
    /// Packets in the clear that should have been protected, coming in or going out.
    pub cleartext: u64,
    /// The first of them, described.
    pub findings: Vec<String>,
    /// Frames that the kernel could not queue: a capture with any proves nothing.
    pub missed: u64,
    /// The first ESP and IKE packets, from their IP header on.
    pub kept: Vec<(Kind, Vec<u8>)>,
}

impl Report {
    /// Packets of all kinds.
    pub fn total(&self) -> u64 {
        self.neighbour
            + self.icmp
            + self.esp
            + self.esp_in_udp
            + self.ike
            + self.keepalive
            + self.fragments
            + self.other
    }

    /// ESP of both kinds.
    pub fn sealed(&self) -> u64 {
        self.esp + self.esp_in_udp
    }

    /// Nothing was in the clear, and nothing was missed.
    ///
    /// # Errors
    ///
    /// What was seen, or that the capture is incomplete.
    pub fn is_clean(&self) -> anyhow::Result<()> {
        ensure!(
            self.cleartext == 0,
            "{} packets in the clear: {}",
            self.cleartext,
            self.findings.join("; ")
        );
        ensure!(
            self.missed == 0,
            "the capture missed {} frames",
            self.missed
        );
        Ok(())
    }

    /// Nothing was in the clear, and at least so many packets were sealed, all of them in UDP or none.
    ///
    /// # Errors
    ///
    /// What was seen.
    pub fn is_sealed(&self, packets: u64, in_udp: bool) -> anyhow::Result<()> {
        self.is_clean()?;
        let (wanted, unwanted) = if in_udp {
            (self.esp_in_udp, self.esp)
        } else {
            (self.esp, self.esp_in_udp)
        };
        ensure!(wanted >= packets && unwanted == 0, "{}", self.summary());
        Ok(())
    }

    /// One line for people.
    pub fn summary(&self) -> String {
        format!(
            "{} packets: {} ESP, {} ESP-in-UDP, {} IKE, {} ARP/ND, {} ICMP, {} other, {} in the clear",
            self.total(),
            self.esp,
            self.esp_in_udp,
            self.ike,
            self.neighbour,
            self.icmp,
            self.other + self.fragments + self.keepalive,
            self.cleartext
        )
    }

    fn add(&mut self, frame: &[u8], outgoing: bool, canary: &Finder<'_>) {
        let decoded = decode(frame);
        if let Some(finding) = cleartext(frame, decoded.addresses, canary) {
            self.cleartext += 1;
            if self.findings.len() < FINDINGS {
                let way = if outgoing { "going out" } else { "coming in" };
                let head = frame.get(decoded.transport..).unwrap_or_default();
                let head = &head[..head.len().min(8)];
                self.findings
                    .push(format!("{:?} {finding}, {way}, {head:02x?}", decoded.kind));
            }
        }
        if outgoing {
            return;
        }
        *match decoded.kind {
            Kind::Neighbour => &mut self.neighbour,
            Kind::Icmp => &mut self.icmp,
            Kind::Esp => &mut self.esp,
            Kind::EspInUdp => &mut self.esp_in_udp,
            Kind::Ike => &mut self.ike,
            Kind::Keepalive => &mut self.keepalive,
            Kind::Fragment => &mut self.fragments,
            Kind::Other => &mut self.other,
        } += 1;
        let wanted = matches!(decoded.kind, Kind::Esp | Kind::EspInUdp | Kind::Ike);
        if wanted && self.kept.len() < KEPT {
            let packet = frame.get(decoded.network..).unwrap_or_default();
            self.kept.push((decoded.kind, packet.to_vec()));
        }
    }
}

/// What gives a packet away as protected traffic in the clear.
fn cleartext(
    frame: &[u8],
    addresses: Option<(IpAddr, IpAddr)>,
    canary: &Finder<'_>,
) -> Option<String> {
    let (source, destination) = addresses?;
    if is_inside(source) || is_inside(destination) {
        Some(format!("from {source} to {destination}"))
    } else if canary.find(frame).is_some() {
        Some(format!(
            "from {source} to {destination} with readable test traffic"
        ))
    } else {
        None
    }
}

impl Capture {
    /// Captures on all interfaces of a namespace, from the return of this function on.
    ///
    /// # Errors
    ///
    /// The packet socket cannot be opened.
    pub fn start(netns: &Netns) -> anyhow::Result<Self> {
        let socket = netns.run(|| {
            let socket = socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::EthAll,
            )?;
            setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 20_000))?;
            Ok(socket)
        })?;
        let socket = Arc::new(socket);
        let state = Arc::new(State::default());
        let thread = thread::Builder::new()
            .name("capture".to_owned())
            .spawn({
                let (socket, state) = (Arc::clone(&socket), Arc::clone(&state));
                move || receive(&socket, &state)
            })
            .context("the capture's thread")?;
        Ok(Self {
            state,
            socket,
            thread: Some(thread),
        })
    }

    /// What was seen so far.
    pub fn report(&self) -> Report {
        let mut report = self.report_guard().clone();
        report.missed = self.missed(report.missed);
        report
    }

    /// Ends the capture once all that is queued has been judged.
    pub fn stop(mut self) -> Report {
        self.end();
        self.report()
    }

    fn report_guard(&self) -> std::sync::MutexGuard<'_, Report> {
        self.state
            .report
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the kernel's count of dropped frames, which reading resets, to what is known.
    fn missed(&self, known: u64) -> u64 {
        let mut statistics = libc::tpacket_stats {
            tp_packets: 0,
            tp_drops: 0,
        };
        let mut length = libc::socklen_t::try_from(size_of::<libc::tpacket_stats>()).unwrap_or(0);
        // SAFETY: the pointers are to a tpacket_stats and to its length, both alive across the call.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        let fresh = if result == 0 {
            u64::from(statistics.tp_drops)
        } else {
            0
        };
        self.report_guard().missed = known + fresh;
        known + fresh
    }

    fn end(&mut self) {
        self.state.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // A panicked capture has left its report poisoned; the test sees what was there.
            let _ = thread.join();
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.end();
    }
}

/// Judges frames until told to stop, and then until the queue is empty.
fn receive(socket: &OwnedFd, state: &State) {
    let canary = Finder::new(CANARY);
    let mut buffer = [0; 2048];
    loop {
        match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
            Ok((length, address)) => {
                let outgoing =
                    address.is_some_and(|address| address.pkttype() == libc::PACKET_OUTGOING);
                let frame = buffer.get(..length).unwrap_or_default();
                let mut report = state.report.lock().unwrap_or_else(PoisonError::into_inner);
                report.add(frame, outgoing, &canary);
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) if state.stop.load(Ordering::Acquire) => return,
            Err(Errno::EAGAIN) => {}
            // An interface that went down says so once; the next call goes on.
            Err(Errno::ENETDOWN) => {}
            Err(_) => return,
        }
    }
}
