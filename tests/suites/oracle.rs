//! The kernel's ESP as the oracle for ours: what one seals the other must open, and both must refuse the same replays.
//!
//! One namespace with two TUN devices: plaintext goes in and out of one, ESP out and in of the other, and the kernel
//! between them seals and opens with states and policies of ours.

use std::{
    io,
    net::IpAddr,
    os::fd::AsFd,
    process::ExitCode,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, bail, ensure};
use ipsec_common::{SaWords, Spi, replay};
use ipsec_ctl::{
    dataplane::kernel::algorithms::{algorithms, all_suites, key_lengths},
    esp::{EspKeys, EspSuite, EspTransform},
    net::{
        tun::Tun,
        xfrm::{
            Action, Limits, Mode, Policy, PolicyDirection, PortMask, Replay, Selector, State,
            StateId, Template, Xfrm,
        },
    },
};
use ipsec_tests::{
    cases,
    netns::{Netns, Scope},
    suite::{self, Need::*},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use zeroize::Zeroizing;

fn main() -> ExitCode {
    suite::main(&cases![
        [KernelEsp] what_the_kernel_seals_we_open_and_what_we_seal_the_kernel_opens,
        [KernelEsp] long every_length_up_to_1500_bytes_agrees,
        [KernelEsp] a_packet_changed_anywhere_is_opened_by_neither,
        [KernelEsp] both_refuse_the_same_replays,
    ])
}

/// Our side of the wire, and the peer's.
const HERE: [u8; 4] = [192, 0, 2, 1];
const PEER: [u8; 4] = [192, 0, 2, 2];
/// A host on the inside, and one behind the peer.
const HOST: [u8; 4] = [10, 1, 0, 2];
const FAR: [u8; 4] = [10, 2, 0, 2];
const OUT_SPI: u32 = 0x1000;
const IN_SPI: u32 = 0x2000;
const REQID: u32 = 1;
const IPV4_HEADER: usize = 20;
const PROTOCOL_ESP: u8 = 50;
const NEXT_HEADER_IPV4: u8 = 4;

/// The kernel between plaintext and ESP.
struct Kernel {
    xfrm: Xfrm,
    inside: Tun,
    wire: Tun,
    _netns: Netns,
}

impl Kernel {
    fn build() -> anyhow::Result<Self> {
        let netns = Netns::create(&Scope::of_this_test().name("oracle"))?;
        netns.sysctl("net.ipv4.ip_forward", "1")?;
        let (xfrm, inside, wire) =
            netns.run(|| Ok((Xfrm::open()?, Tun::open("inside")?, Tun::open("wire")?)))?;
        for (device, address) in [("inside", "10.1.0.1/24"), ("wire", "192.0.2.1/24")] {
            netns.sysctl(&format!("net.ipv6.conf.{device}.disable_ipv6"), "1")?;
            netns.ip(&format!("address add {address} dev {device}"))?;
            netns.ip(&format!("link set {device} mtu 9000 up"))?;
        }
        netns.ip("route add 10.2.0.0/24 via 192.0.2.2")?;
        let any = PortMask::default();
        let selector = |source: [u8; 4], destination: [u8; 4]| Selector {
            source: IpAddr::from(source).into(),
            destination: IpAddr::from(destination).into(),
            protocol: 0,
            source_port: any,
            destination_port: any,
        };
        for (direction, from, to, template) in [
            (PolicyDirection::Out, HOST, FAR, (HERE, PEER)),
            (PolicyDirection::Forward, FAR, HOST, (PEER, HERE)),
        ] {
            xfrm.set_policy(&Policy {
                direction,
                selector: selector(from, to),
                priority: 1,
                if_id: 0,
                action: Action::Protect(Template {
                    source: template.0.into(),
                    destination: template.1.into(),
                    spi: 0,
                    reqid: REQID,
                    mode: Mode::Tunnel,
                }),
                card: None,
            })?;
        }
        Ok(Self {
            xfrm,
            inside,
            wire,
            _netns: netns,
        })
    }

    /// Puts new states with these keys in the place of the old ones.
    fn install(&self, sa: &Sa, replay: Replay) -> anyhow::Result<()> {
        for (source, destination, spi) in [(HERE, PEER, OUT_SPI), (PEER, HERE, IN_SPI)] {
            let state = State {
                source: source.into(),
                destination: destination.into(),
                spi,
                mode: Mode::Tunnel,
                reqid: REQID,
                if_id: 0,
                algorithms: algorithms(sa.suite, &sa.keys).context("key lengths")?,
                replay,
                encap: None,
                output_mark: None,
                limits: Limits::NONE,
                copy_dscp: true,
                clear_df: false,
                card: None,
            };
            self.xfrm.remove_state(&state.id())?;
            self.xfrm.add_state(&state)?;
        }
        Ok(())
    }

    /// What the kernel makes of a packet that is sent through the tunnel.
    fn seal(&self, packet: &[u8]) -> anyhow::Result<Vec<u8>> {
        self.inside.write(packet)?;
        receive(&self.wire, |packet| packet.get(9) == Some(&PROTOCOL_ESP))
    }

    fn offer(&self, esp: &[u8]) -> anyhow::Result<()> {
        let mut packet = ipv4(PEER, HERE, PROTOCOL_ESP, 64, esp.len());
        packet.extend(esp);
        self.wire.write(&packet)?;
        Ok(())
    }

    /// What comes out on the inside.
    fn opened(&self) -> anyhow::Result<Vec<u8>> {
        receive(&self.inside, |packet| packet.get(12..16) == Some(&FAR))
    }

    /// Packets that the inbound state has taken, and those whose ICV it found wrong.
    fn taken(&self) -> anyhow::Result<(u64, u32)> {
        let id = StateId {
            destination: HERE.into(),
            spi: IN_SPI,
        };
        let status = self.xfrm.state(&id)?.context("the state is gone")?;
        Ok((status.packets, status.forged))
    }
}

/// The next packet of a device that is the one waited for.
fn receive(device: &Tun, wanted: impl Fn(&[u8]) -> bool) -> anyhow::Result<Vec<u8>> {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut packet = vec![0; 16 * 1024];
    loop {
        match device.read(&mut packet) {
            Ok(length) if wanted(&packet[..length]) => {
                packet.truncate(length);
                return Ok(packet);
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                ensure!(Instant::now() < deadline, "no packet on the device");
                let mut ready = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
                poll(&mut ready, PollTimeout::from(100_u8))?;
            }
            Err(error) => bail!("read the device: {error}"),
        }
    }
}

/// Algorithms and keys, the same for both directions.
struct Sa {
    suite: EspSuite,
    keys: EspKeys,
    esn: bool,
    ours: EspTransform,
}

impl Sa {
    fn new(suite: EspSuite, esn: bool, random: &mut Random) -> anyhow::Result<Self> {
        let (cipher, integrity) = key_lengths(suite);
        let keys = EspKeys {
            cipher: Zeroizing::new(random.bytes(cipher)),
            integrity: Zeroizing::new(random.bytes(integrity)),
        };
        let ours = EspTransform::new(suite, &keys, esn)?;
        Ok(Self {
            suite,
            keys,
            esn,
            ours,
        })
    }

    fn replay(&self) -> Replay {
        Replay {
            esn: self.esn,
            window: 4096,
            ..Replay::default()
        }
    }

    fn seal(&self, sequence: u64, packet: &[u8]) -> anyhow::Result<Vec<u8>> {
        let header = self.ours.header_bytes();
        let mut frame = vec![0; header];
        frame.extend(packet);
        frame.resize(self.ours.sealed_bytes(packet.len()), 0);
        let payload = header..header + packet.len();
        let esp = self
            .ours
            .seal(Spi(IN_SPI), sequence, NEXT_HEADER_IPV4, &mut frame, payload)?;
        Ok(frame[esp].to_vec())
    }

    fn open(&self, sequence: u64, outer: &[u8]) -> anyhow::Result<Vec<u8>> {
        let mut frame = outer.to_vec();
        let end = frame.len();
        let opened = self.ours.open(sequence, &mut frame, IPV4_HEADER..end)?;
        ensure!(
            opened.next_header == NEXT_HEADER_IPV4,
            "next header {}",
            opened.next_header
        );
        Ok(frame[opened.payload].to_vec())
    }
}

/// The beginning of an IPv4 packet.
fn ipv4(source: [u8; 4], destination: [u8; 4], protocol: u8, ttl: u8, payload: usize) -> Vec<u8> {
    let [high, low] = u16::try_from(IPV4_HEADER + payload)
        .unwrap_or(u16::MAX)
        .to_be_bytes();
    let mut header = vec![0x45, 0, high, low, 0, 0, 0, 0, ttl, protocol, 0, 0];
    header.extend(source);
    header.extend(destination);
    let sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from(folded & 0xffff).unwrap_or_default();
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    header
}

/// A packet of so many bytes as a host sends it, and as it is forwarded.
fn packets(
    source: [u8; 4],
    destination: [u8; 4],
    length: usize,
    random: &mut Random,
) -> [Vec<u8>; 2] {
    const EXPERIMENT: u8 = 253;
    let payload = random.bytes(length - IPV4_HEADER);
    [64, 63].map(|ttl| {
        let mut packet = ipv4(source, destination, EXPERIMENT, ttl, payload.len());
        packet.extend(&payload);
        packet
    })
}

/// A small generator (xorshift64*), so that a failing run can be repeated from its seed.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let seed = std::env::var("IPSEC_XDP_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| {
            let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
            u64::from(now.subsec_nanos()) << 20 | 1
        });
        eprintln!("seed {seed}: repeat with IPSEC_XDP_SEED={seed}");
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next().to_be_bytes()[0]).collect()
    }
}

fn agree(lengths: &dyn Fn() -> Vec<usize>) -> anyhow::Result<()> {
    let kernel = Kernel::build()?;
    let mut random = Random::new();
    for suite in all_suites() {
        for esn in [false, true] {
            let sa = Sa::new(suite, esn, &mut random)?;
            kernel.install(&sa, sa.replay())?;
            for (sequence, length) in (1..).zip(lengths()) {
                let at = || format!("{suite:?}, ESN {esn}, {length} bytes");
                let [sent, forwarded] = packets(HOST, FAR, length, &mut random);
                let outer = kernel.seal(&sent).with_context(at)?;
                let expected = IPV4_HEADER + sa.ours.sealed_bytes(length);
                ensure!(outer.len() == expected, "{}: {} bytes", at(), outer.len());
                let opened = sa.open(sequence, &outer).with_context(at)?;
                ensure!(opened == forwarded, "{}: we opened something else", at());

                let [sent, forwarded] = packets(FAR, HOST, length, &mut random);
                kernel.offer(&sa.seal(sequence, &sent).with_context(at)?)?;
                let opened = kernel.opened().with_context(at)?;
                ensure!(
                    opened == forwarded,
                    "{}: the kernel opened something else",
                    at()
                );
            }
        }
    }
    Ok(())
}

fn what_the_kernel_seals_we_open_and_what_we_seal_the_kernel_opens() -> anyhow::Result<()> {
    agree(&|| {
        (21..=52)
            .chain((53..=1500).step_by(61))
            .chain([1500])
            .collect()
    })
}

fn every_length_up_to_1500_bytes_agrees() -> anyhow::Result<()> {
    agree(&|| (21..=1500).collect())
}

fn a_packet_changed_anywhere_is_opened_by_neither() -> anyhow::Result<()> {
    let kernel = Kernel::build()?;
    let mut random = Random::new();
    for suite in all_suites() {
        let sa = Sa::new(suite, true, &mut random)?;
        kernel.install(&sa, sa.replay())?;
        let [sent, _] = packets(FAR, HOST, 60, &mut random);
        let sealed = sa.seal(1, &sent)?;
        // The SPI names the state, so it is not part of the experiment.
        for at in 4..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1 << random.below(8);
            let mut outer = vec![0; IPV4_HEADER];
            outer.extend(&changed);
            let low = changed[4..].first_chunk::<4>().context("cut off")?;
            let sequence = u32::from_be_bytes(*low).into();
            let opened = sa.open(sequence, &outer);
            ensure!(opened.is_err(), "{suite:?}: we took byte {at}");
            kernel.offer(&changed)?;
            let (taken, _) = kernel.taken()?;
            ensure!(taken == 0, "{suite:?}: the kernel took byte {at}");
        }
        kernel.offer(&sealed)?;
        let (taken, forged) = kernel.taken()?;
        ensure!(taken == 1, "{suite:?}: the unchanged packet was not taken");
        // A changed sequence number may fall out of the window before its ICV is looked at.
        let least = u32::try_from(sealed.len() - 8)?;
        ensure!(
            forged >= least,
            "{suite:?}: {forged} packets were found forged"
        );
    }
    Ok(())
}

fn both_refuse_the_same_replays() -> anyhow::Result<()> {
    let kernel = Kernel::build()?;
    let mut random = Random::new();
    for (esn, window, start) in [
        (false, 32, 0),
        (false, 1024, 0),
        (false, 4096, u64::from(u32::MAX) - 3000),
        (true, 32, 0),
        (true, 64, (1 << 32) - 200),
        (true, 4096, (1 << 32) - 5000),
        (true, 4096, (5 << 32) - 2000),
    ] {
        let sa = Sa::new(EspSuite::ChaCha20Poly1305, esn, &mut random)?;
        let replay = Replay {
            esn,
            window,
            sent: 0,
            received: start,
        };
        kernel.install(&sa, replay)?;
        let ours = Box::<SaWords>::default();
        ours.sequence
            .store(start, std::sync::atomic::Ordering::Relaxed);
        let [packet, _] = packets(FAR, HOST, 40, &mut random);
        let (mut highest, mut accepted) = (start, 0);
        for step in 0..1500 {
            let back = random.below(u64::from(window) * 3 / 2);
            let sequence = match random.below(10) {
                0..4 => highest + 1,
                4..6 => highest + random.below(5),
                6..9 => highest.saturating_sub(back),
                _ => highest + random.below(u64::from(window) * 2),
            };
            // RFC 4303 section 3.3.3: a sender never sends the number 0, nor past the end.
            let last = if esn { u64::MAX } else { u32::MAX.into() };
            let sequence = sequence.clamp(1, last);
            let low = u32::try_from(sequence & 0xffff_ffff)?;
            let known = replay::recover(&ours, window, esn, low) == sequence;
            let takes = known
                && replay::check(&ours, window, sequence).is_ok()
                && replay::accept(&ours, window, sequence).is_ok();
            kernel.offer(&sa.seal(sequence, &packet)?)?;
            let (taken, _) = kernel.taken()?;
            ensure!(
                taken == accepted + u64::from(takes),
                "ESN {esn}, window {window}, highest {highest:#x}, step {step}: {sequence:#x} is {} by us and {} by the kernel",
                if takes { "taken" } else { "refused" },
                if taken > accepted { "taken" } else { "refused" },
            );
            accepted = taken;
            if takes {
                highest = highest.max(sequence);
            }
        }
        ensure!(highest > start, "nothing was taken");
    }
    Ok(())
}
