//! The packets of the benchmarks: inner ones, and inner ones sealed by the peer.

use std::sync::Arc;

use anyhow::{Context, ensure};
use ipsec_common::{Spi, TrafficSelector};
use ipsec_ctl::{
    dataplane::{
        routing::{RoutesMode, RoutingSpec},
        seam::{
            ChildId, ChildTrap, Df, Direction, EngineChoice, FastPath, Lifetime, Outer, SaId,
            SaSpec, SelectorPair, TunnelId, TunnelSpec,
        },
        xdp::{
            events::Events,
            outbound::{HEADROOM, Outbound, OutboundPipeline, TAILROOM},
            sa::Origin,
            table::{Tables, Tunnel},
            words::WordsArray,
        },
    },
    esp::{EspKeys, EspSuite, EspTransform},
};

/// Bytes of the inner IP packets.
pub(crate) const SIZES: [usize; 3] = [64, 590, 1400];
/// Hosts behind the two gateways.
const LOCAL_HOST: [u8; 4] = [10, 1, 0, 9];
const REMOTE_HOST: [u8; 4] = [10, 2, 0, 9];
/// Outer addresses of the measured gateway and of its peer.
pub(crate) const LOCAL: [u8; 4] = [192, 0, 2, 1];
pub(crate) const REMOTE: [u8; 4] = [192, 0, 2, 2];

/// A UDP packet of `size` bytes from one host to the other.
fn udp(source: [u8; 4], destination: [u8; 4], size: usize) -> anyhow::Result<Vec<u8>> {
    let total = u16::try_from(size)?;
    let length = total
        .checked_sub(20)
        .context("a packet of 28 bytes at least")?;
    let mut packet = vec![0x45, 0];
    packet.extend(total.to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    packet.extend(source);
    packet.extend(destination);
    let sum: u32 = packet
        .as_chunks::<2>()
        .0
        .iter()
        .map(|word| u32::from(u16::from_be_bytes(*word)))
        .sum();
    let checksum = !u16::try_from((sum & 0xffff) + (sum >> 16))?;
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet.extend([0x12, 0x34, 0x56, 0x78]);
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0]);
    packet.resize(size, 0xab);
    Ok(packet)
}

/// An inner packet that is routed into the tunnel.
pub(crate) fn outwards(size: usize) -> anyhow::Result<Vec<u8>> {
    udp(LOCAL_HOST, REMOTE_HOST, size)
}

fn selectors(address: [u8; 4]) -> Vec<TrafficSelector> {
    let [a, b, c, _] = address;
    vec![TrafficSelector {
        protocol: 0,
        ports: (0, u16::MAX),
        addresses: ([a, b, c, 0].into(), [a, b, c, 255].into()),
    }]
}

fn pair(swapped: bool) -> SelectorPair {
    let (local, remote) = (selectors(LOCAL_HOST), selectors(REMOTE_HOST));
    if swapped {
        SelectorPair {
            local: remote,
            remote: local,
        }
    } else {
        SelectorPair { local, remote }
    }
}

/// The tunnel, seen from the measured gateway or, `swapped`, from its peer.
pub(crate) fn tunnel(swapped: bool) -> TunnelSpec {
    TunnelSpec {
        id: TunnelId(1),
        name: "bench".into(),
        device: "tun0".into(),
        mtu: None,
        engine: EngineChoice::Xdp,
        fast_path: FastPath::On,
        df: Df::Copy,
        clamp_mss: true,
        copy_dscp: true,
        children: vec![ChildTrap {
            id: ChildId(0),
            name: "net".into(),
            selectors: pair(swapped),
            on_demand: false,
        }],
        routing: RoutingSpec {
            mode: RoutesMode::Manual,
            remote: vec![],
            local: vec![],
            peer: None,
            outer_local: None,
            addresses: vec![],
            bypass: vec![],
        },
    }
}

fn keys(suite: EspSuite) -> EspKeys {
    let cipher = match suite {
        EspSuite::Aes128Gcm16 => 20,
        EspSuite::Aes256Gcm16 | EspSuite::ChaCha20Poly1305 | EspSuite::AesCbc { .. } => 36,
    };
    EspKeys {
        cipher: vec![7; cipher].into(),
        integrity: vec![].into(),
    }
}

/// An SA of the tunnel, seen from the measured gateway or, `swapped`, from its peer.
pub(crate) fn sa(suite: EspSuite, direction: Direction, swapped: bool) -> SaSpec {
    let (local, remote) = if swapped {
        (REMOTE, LOCAL)
    } else {
        (LOCAL, REMOTE)
    };
    SaSpec {
        id: SaId(1),
        tunnel: TunnelId(1),
        child: ChildId(0),
        direction,
        spi: Spi(0x0102_0304),
        suite,
        keys: keys(suite),
        esn: true,
        replay_window: 4096,
        outer: Outer {
            local: local.into(),
            remote: remote.into(),
            encap: None,
        },
        selectors: pair(swapped),
        lifetime: Lifetime {
            soft_packets: u64::MAX,
            hard_packets: u64::MAX,
            soft_bytes: u64::MAX,
            hard_bytes: u64::MAX,
            expires: None,
        },
    }
}

/// The peer: seals what is to be opened.
pub(crate) struct Sealer {
    tables: Tables,
    pipeline: OutboundPipeline,
    tunnel: Arc<Tunnel>,
    transform: EspTransform,
    sequence: u64,
    frame: Vec<u8>,
}

impl Sealer {
    pub(crate) fn new(suite: EspSuite) -> anyhow::Result<Self> {
        let (events, _) = Events::channel(1);
        let tables = Tables::new(WordsArray::anonymous(2)?);
        let tunnel = tables.set_tunnel(&tunnel(true), 1, 1420);
        tables.install(&sa(suite, Direction::Outbound, true))?;
        Ok(Self {
            tables,
            pipeline: OutboundPipeline::new(events),
            tunnel,
            transform: EspTransform::new(suite, &keys(suite), true)?,
            sequence: 0,
            frame: vec![0; HEADROOM + 1500 + TAILROOM],
        })
    }

    /// The next outer packet of the peer, with an inner one of `size` bytes.
    pub(crate) fn next(&mut self, size: usize) -> anyhow::Result<Vec<u8>> {
        let inner = udp(REMOTE_HOST, LOCAL_HOST, size)?;
        let range = HEADROOM..HEADROOM + size;
        self.frame[range.clone()].copy_from_slice(&inner);
        match self
            .pipeline
            .process(&self.tunnel, &mut self.frame, range, Origin::Slow, 1)
        {
            Outbound::Send(sealed) => Ok(self.frame[sealed.packet].to_vec()),
            other => anyhow::bail!("the peer does not send: {other:?}"),
        }
    }

    /// Seals once with nothing around it.
    pub(crate) fn transform_alone(&mut self, size: usize) -> anyhow::Result<()> {
        self.sequence += 1;
        let payload = HEADROOM..HEADROOM + size;
        let sealed =
            self.transform
                .seal(Spi(0x0102_0304), self.sequence, 4, &mut self.frame, payload)?;
        ensure!(!sealed.is_empty() && !self.tables.stats().is_empty());
        Ok(())
    }
}
