//! TCP transfers whose every byte is compared with what was sent.

use std::{
    fmt,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{capture::CANARY, netns::Netns};

/// Length of the pattern that repeats in the stream: prime, so that no buffer or packet size divides it.
const PATTERN: usize = 65_521;
/// Longest silence before a transfer is given up.
const SILENCE: Duration = Duration::from_secs(10);

/// What a transfer achieved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TransferReport {
    /// Bytes that arrived, every one as it was sent.
    pub bytes: u64,
    /// From the first byte to the last.
    pub time: Duration,
}

impl TransferReport {
    /// Bits a second.
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    pub fn bits_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.time.as_secs_f64().max(1e-9)
    }
}

impl fmt::Display for TransferReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} bytes in {:.2} s, {:.0} Mbit/s",
            self.bytes,
            self.time.as_secs_f64(),
            self.bits_per_second() / 1e6
        )
    }
}

/// The MSS that a SYN has when it arrives, from one namespace at `to` in another.
///
/// # Errors
///
/// No connection, or a SYN without the option.
#[expect(unsafe_code, reason = "the kernel's copy of a SYN has no safe wrapper")]
pub fn arriving_mss(from: &Netns, into: &Netns, to: IpAddr) -> anyhow::Result<u16> {
    let listener = into.run(|| Ok(TcpListener::bind(SocketAddr::new(to, 0))?))?;
    let on: libc::c_int = 1;
    // SAFETY: the option's value is an int that lives for the call.
    let set = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_SAVE_SYN,
            (&raw const on).cast(),
            libc::socklen_t::try_from(size_of_val(&on)).unwrap_or_default(),
        )
    };
    ensure!(
        set == 0,
        "TCP_SAVE_SYN: {}",
        std::io::Error::last_os_error()
    );
    let address = listener.local_addr()?;
    let _caller = from.run(|| Ok(TcpStream::connect_timeout(&address, SILENCE)?))?;
    let (accepted, _) = listener.accept()?;
    let mut syn = [0_u8; 256];
    let mut length = libc::socklen_t::try_from(syn.len())?;
    // SAFETY: the kernel writes at most as many bytes as `length` says there are.
    let got = unsafe {
        libc::getsockopt(
            accepted.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_SAVED_SYN,
            syn.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    ensure!(
        got == 0,
        "TCP_SAVED_SYN: {}",
        std::io::Error::last_os_error()
    );
    // Behind an IPv4 header without options, or an IPv6 header, and a TCP header of 20 bytes.
    let options = if to.is_ipv4() { 20 } else { 40 } + 20;
    match syn.get(options..options + 4) {
        Some([2, 4, high, low]) => Ok(u16::from_be_bytes([*high, *low])),
        other => bail!("the first option of the SYN is {other:?}"),
    }
}

/// Sends for `time`, or until `most` bytes are out, from one namespace to `to` in another.
///
/// # Errors
///
/// No connection, a stall, a missing or a wrong byte.
pub fn transfer(
    from: &Netns,
    into: &Netns,
    to: IpAddr,
    time: Duration,
    most: u64,
) -> anyhow::Result<TransferReport> {
    let listener = into.run(|| Ok(TcpListener::bind(SocketAddr::new(to, 0))?))?;
    let address = listener.local_addr()?;
    let sender = from.run(|| connect(address))?;
    let (receiver, _) = accept(&listener)?;
    for stream in [&sender, &receiver] {
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
    }
    let pattern = pattern();
    thread::scope(|scope| {
        let sending = scope.spawn(|| send(sender, &pattern, time, most));
        let received = receive(receiver, &pattern);
        let sent = sending.join().map_err(|_| anyhow!("the sender panicked"))?;
        let (sent, report) = (sent.context("sending")?, received.context("receiving")?);
        ensure!(
            sent == report.bytes,
            "{sent} bytes sent, {} received",
            report.bytes
        );
        Ok(report)
    })
}

fn connect(to: SocketAddr) -> anyhow::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket
        .connect_timeout(&to.into(), Duration::from_secs(5))
        .with_context(|| format!("a TCP connection to {to}"))?;
    socket.set_nonblocking(false)?;
    Ok(socket.into())
}

/// The connection is there already, for `connect` has returned.
fn accept(listener: &TcpListener) -> anyhow::Result<(TcpStream, SocketAddr)> {
    listener.set_nonblocking(true)?;
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        match listener.accept() {
            Ok((stream, address)) => {
                stream.set_nonblocking(false)?;
                return Ok((stream, address));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < end => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// The canary and numbers, over and over, with bytes of a generator in between.
fn pattern() -> Vec<u8> {
    let mut state: u32 = 0x2545_f491;
    let mut pattern = Vec::with_capacity(PATTERN);
    while pattern.len() < PATTERN {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        pattern.extend(state.to_be_bytes());
        if pattern.len() % 1024 < 4 {
            pattern.extend(CANARY);
        }
    }
    pattern.truncate(PATTERN);
    pattern
}

fn send(mut stream: TcpStream, pattern: &[u8], time: Duration, most: u64) -> anyhow::Result<u64> {
    let start = Instant::now();
    let mut sent: u64 = 0;
    while start.elapsed() < time && sent < most {
        let left = usize::try_from(most - sent).unwrap_or(usize::MAX);
        let piece = &pattern[..left.min(pattern.len())];
        stream.write_all(piece)?;
        sent += u64::try_from(piece.len())?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    Ok(sent)
}

fn receive(mut stream: TcpStream, pattern: &[u8]) -> anyhow::Result<TransferReport> {
    let mut buffer = vec![0; 256 << 10];
    let mut at = 0;
    let mut bytes: u64 = 0;
    let mut start = None;
    loop {
        let length = stream.read(&mut buffer)?;
        let start = *start.get_or_insert_with(Instant::now);
        if length == 0 {
            return Ok(TransferReport {
                bytes,
                time: start.elapsed(),
            });
        }
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            let piece = rest.len().min(pattern.len() - at);
            if rest[..piece] != pattern[at..at + piece] {
                bail!("a wrong byte after {bytes}");
            }
            at = (at + piece) % pattern.len();
            rest = &rest[piece..];
        }
        bytes += u64::try_from(length)?;
    }
}
