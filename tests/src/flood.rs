//! A flood of first IKE messages from addresses that nobody has, at a rate that no socket reaches.

use std::{
    fs,
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::Context;
use nix::{
    net::if_::if_nametoindex,
    unistd::{SysconfVar, sysconf},
};

use crate::{
    attack::{udp, with_initiator_spi},
    bench::generator::Generator,
    netns::Netns,
};

/// Different messages, each from an address of its own; then they come again.
const SOURCES: u32 = 16 * 1024;
/// Frames handed to the kernel at once at most.
const MOST_AT_ONCE: u64 = 2048;

/// The attacker's frames: an IKE_SA_INIT under many addresses.
///
/// # Errors
///
/// The interfaces are not there.
pub fn frames(
    from: (&Netns, &str),
    next_hop: (&Netns, &str),
    to: Ipv4Addr,
    message: &[u8],
) -> anyhow::Result<Vec<Vec<u8>>> {
    let macs = [mac(next_hop.0, next_hop.1)?, mac(from.0, from.1)?].concat();
    (0..SOURCES)
        .map(|number| {
            // All over the addresses that are nobody's here: 11.0.0.0/8 to 90.0.0.0/8.
            let [_, high, low, last] = number.wrapping_mul(40_503).to_be_bytes();
            let first = 11 + u8::try_from(number % 80)?;
            let source = Ipv4Addr::new(first, high, low, last);
            let message = with_initiator_spi(message, number.into());
            let mut packet = udp((source, 500), (to, 500), &message)?;
            complete(&mut packet)?;
            Ok([&macs[..], &[0x08, 0x00], &packet].concat())
        })
        .collect()
}

/// Fills in length and checksum of an IPv4 header, which the kernel does for sockets only.
fn complete(packet: &mut [u8]) -> anyhow::Result<()> {
    let length = u16::try_from(packet.len())?.to_be_bytes();
    let header = packet.first_chunk_mut::<20>().context("no IPv4 packet")?;
    header[2..4].copy_from_slice(&length);
    let words = header
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16))?;
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    Ok(())
}

fn mac(netns: &Netns, interface: &str) -> anyhow::Result<Vec<u8>> {
    let shown = netns.ip(&format!("link show {interface}"))?;
    let mut words = shown.split_whitespace();
    words
        .find(|word| *word == "link/ether")
        .and_then(|_| words.next())
        .context("no hardware address")?
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).context("a hardware address"))
        .collect()
}

/// What a flood was.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// Frames.
    pub frames: u64,
    /// How long it went on.
    pub time: Duration,
}

impl Sent {
    /// Frames a second.
    pub fn rate(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52 frames")]
        let frames = self.frames as f64;
        frames / self.time.as_secs_f64()
    }
}

/// Sends frames out of an interface of a namespace at a rate until it is to stop.
///
/// # Errors
///
/// The kernel has no live frames, or the generator was not built.
pub fn send(
    netns: &Netns,
    interface: &str,
    frames: &[Vec<u8>],
    per_second: u32,
    stop: &AtomicBool,
) -> anyhow::Result<Sent> {
    netns.run(|| {
        let mut generator = Generator::new(if_nametoindex(interface)?, frames)?;
        generator.start()?;
        let (start, mut sent) = (Instant::now(), 0);
        while !stop.load(Ordering::Acquire) {
            let due =
                u64::from(per_second) * u64::try_from(start.elapsed().as_micros())? / 1_000_000;
            let batch = due.saturating_sub(sent).min(MOST_AT_ONCE);
            if batch < 64 {
                sleep(Duration::from_millis(1));
                continue;
            }
            generator.send(u32::try_from(batch)?)?;
            sent += batch;
        }
        let time = start.elapsed();
        generator.stop()?;
        Ok(Sent { frames: sent, time })
    })
}

/// What a process has used.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Time on a processor.
    pub processor: Duration,
    /// Resident memory in bytes.
    pub memory: u64,
}

/// What a process has used so far.
///
/// # Errors
///
/// There is no such process.
pub fn usage(pid: u32) -> anyhow::Result<Usage> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Behind the name, which may have anything in it, the 12th and 13th field are user and system time (proc(5)).
    let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = |at: usize| -> anyhow::Result<u64> {
        Ok(fields.get(at).context("/proc/PID/stat")?.parse()?)
    };
    let hertz = u64::try_from(sysconf(SysconfVar::CLK_TCK)?.unwrap_or(100))?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let resident = status.lines().find_map(|line| {
        let kilobytes = line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?;
        kilobytes.trim().parse::<u64>().ok()
    });
    Ok(Usage {
        processor: Duration::from_millis((ticks(11)? + ticks(12)?) * 1000 / hertz),
        memory: resident.context("no VmRSS")? * 1024,
    })
}
