//! A state: one SA in one direction, with its keys.

use std::{fmt, net::IpAddr};

use netlink_packet_xfrm::{
    Address, Alg, AlgAead, AlgAuth, EncapTmpl, IPPROTO_ESP, LifetimeConfig, ReplayEsn,
    UDP_ENCAP_ESPINUDP, UserOffloadDev, UserSaId, UserSaInfo, XFRM_MODE_TRANSPORT,
    XFRM_MODE_TUNNEL, XFRM_OFFLOAD_INBOUND, XFRM_SA_XFLAG_DONT_ENCAP_DSCP, XFRM_STATE_AF_UNSPEC,
    XFRM_STATE_ESN, XFRM_STATE_NOPMTUDISC, XfrmAttrs, XfrmMessage,
    state::{DelGetMessage, ModifyMessage},
};
use zeroize::{Zeroize, Zeroizing};

/// Algorithms by their names in the kernel, with their keys.
#[derive(Clone)]
pub enum Algorithms {
    /// One that encrypts and authenticates.
    Aead {
        /// For instance `rfc4106(gcm(aes))`.
        name: &'static str,
        /// Key, the salt behind it.
        key: Zeroizing<Vec<u8>>,
        /// Length of the ICV in bits.
        icv_bits: u32,
    },
    /// A cipher and a separate integrity algorithm.
    Separate {
        /// For instance `cbc(aes)`.
        cipher: &'static str,
        /// Its key.
        cipher_key: Zeroizing<Vec<u8>>,
        /// For instance `hmac(sha256)`.
        integrity: &'static str,
        /// Its key.
        integrity_key: Zeroizing<Vec<u8>>,
        /// Length of the ICV in bits.
        icv_bits: u32,
    },
}

impl fmt::Debug for Algorithms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Aead { name, .. } => write!(f, "{name}"),
            Self::Separate {
                cipher, integrity, ..
            } => write!(f, "{cipher} {integrity}"),
        }
    }
}

/// UDP ports of encapsulated ESP, as they stand in the packets of the state's direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encap {
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
}

/// Limits; by volume `u64::MAX` is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes after which the kernel says so.
    pub soft_bytes: u64,
    /// Bytes after which the state is gone.
    pub hard_bytes: u64,
    /// Packets after which the kernel says so.
    pub soft_packets: u64,
    /// Packets after which the state is gone.
    pub hard_packets: u64,
    /// Seconds after which the kernel says so; 0 is never.
    pub soft_seconds: u64,
    /// Seconds after which the state is gone; 0 is never.
    pub hard_seconds: u64,
}

impl Limits {
    /// No limits.
    pub const NONE: Self = Self {
        soft_bytes: u64::MAX,
        hard_bytes: u64::MAX,
        soft_packets: u64::MAX,
        hard_packets: u64::MAX,
        soft_seconds: 0,
        hard_seconds: 0,
    };
}

/// Where the sequence numbers of a state stand, and its window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replay {
    /// Numbers of 64 bits (RFC 4303 section 2.2.1).
    pub esn: bool,
    /// Window in packets, up to 4096; 0 accepts replays, which the kernel refuses with ESN.
    pub window: u32,
    /// The number sent last.
    pub sent: u64,
    /// The highest number received.
    pub received: u64,
}

/// The network card that is to carry a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnCard {
    /// Index of its interface.
    pub device: u32,
    /// The state receives.
    pub inbound: bool,
    /// The card does all of ESP, not the cryptography alone.
    pub packet: bool,
}

/// The longest window that the kernel takes.
const LONGEST_WINDOW: u32 = 4096;

/// How a state carries packets (RFC 4301 section 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// Whole, in another packet.
    Tunnel,
    /// Their payload.
    Transport,
}

impl Mode {
    pub(super) fn number(self) -> u8 {
        match self {
            Self::Tunnel => XFRM_MODE_TUNNEL,
            Self::Transport => XFRM_MODE_TRANSPORT,
        }
    }

    pub(super) fn of(number: u8) -> Option<Self> {
        [Self::Tunnel, Self::Transport]
            .into_iter()
            .find(|mode| mode.number() == number)
    }
}

/// How the kernel names a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StateId {
    /// Destination of the outer packets.
    pub destination: IpAddr,
    /// SPI.
    pub spi: u32,
}

impl fmt::Display for StateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x} to {}", self.spi, self.destination)
    }
}

/// An ESP state.
#[derive(Clone, Debug)]
pub struct State {
    /// Source of the outer packets.
    pub source: IpAddr,
    /// Destination of the outer packets.
    pub destination: IpAddr,
    /// SPI.
    pub spi: u32,
    /// How it carries packets.
    pub mode: Mode,
    /// By which policies choose it; 0 is none.
    pub reqid: u32,
    /// Of the xfrm interface that it belongs to; 0 is none.
    pub if_id: u32,
    /// Algorithms and keys.
    pub algorithms: Algorithms,
    /// Sequence numbers.
    pub replay: Replay,
    /// UDP encapsulation.
    pub encap: Option<Encap>,
    /// Firewall mark of the outer packets; none leaves that of the inner ones.
    pub output_mark: Option<u32>,
    /// Limits.
    pub limits: Limits,
    /// Copies the inner DSCP outwards.
    pub copy_dscp: bool,
    /// Clears the outer don't-fragment bit instead of copying the inner one.
    pub clear_df: bool,
    /// What a network card is to do.
    pub card: Option<OnCard>,
}

impl State {
    /// How the kernel names it.
    pub fn id(&self) -> StateId {
        StateId {
            destination: self.destination,
            spi: self.spi,
        }
    }

    pub(super) fn message(&self) -> ModifyMessage {
        let mut info = UserSaInfo {
            reqid: self.reqid,
            mode: self.mode.number(),
            flags: match self.mode {
                // Inner packets of either family; which, the policies say.
                Mode::Tunnel => XFRM_STATE_AF_UNSPEC,
                Mode::Transport => 0,
            },
            lifetime_cfg: LifetimeConfig {
                soft_byte_limit: self.limits.soft_bytes,
                hard_byte_limit: self.limits.hard_bytes,
                soft_packet_limit: self.limits.soft_packets,
                hard_packet_limit: self.limits.hard_packets,
                soft_add_expires_seconds: self.limits.soft_seconds,
                hard_add_expires_seconds: self.limits.hard_seconds,
                ..LifetimeConfig::default()
            },
            ..UserSaInfo::default()
        };
        info.source(&self.source);
        info.destination(&self.destination);
        info.id.spi = self.spi;
        info.id.proto = IPPROTO_ESP;
        if self.replay.esn {
            info.flags |= XFRM_STATE_ESN;
        }
        if self.clear_df {
            info.flags |= XFRM_STATE_NOPMTUDISC;
        }
        let mut nlas = self.algorithms.attributes();
        nlas.extend(self.replay.attribute());
        nlas.extend(self.encap.map(|encap| {
            XfrmAttrs::EncapsulationTemplate(EncapTmpl {
                encap_type: UDP_ENCAP_ESPINUDP,
                encap_sport: encap.source_port,
                encap_dport: encap.destination_port,
                encap_oa: Address::default(),
            })
        }));
        if let Some(mark) = self.output_mark {
            nlas.push(XfrmAttrs::MarkVal(mark));
            nlas.push(XfrmAttrs::MarkMask(u32::MAX));
        }
        if self.if_id != 0 {
            nlas.push(XfrmAttrs::IfId(self.if_id));
        }
        if !self.copy_dscp {
            nlas.push(XfrmAttrs::ExtraFlags(XFRM_SA_XFLAG_DONT_ENCAP_DSCP));
        }
        nlas.extend(self.card.map(OnCard::attribute));
        ModifyMessage {
            user_sa_info: info,
            nlas,
        }
    }
}

impl OnCard {
    /// `XFRM_OFFLOAD_PACKET` of linux/xfrm.h (Linux 6.2).
    const PACKET: u8 = 4;

    pub(super) fn attribute(self) -> XfrmAttrs {
        let (mut flags, device) = (0, i32::try_from(self.device));
        if self.inbound {
            flags |= XFRM_OFFLOAD_INBOUND;
        }
        if self.packet {
            flags |= Self::PACKET;
        }
        XfrmAttrs::OffloadDevice(UserOffloadDev {
            // Indexes are positive numbers of an int; 0 is no device.
            ifindex: device.unwrap_or_default(),
            flags,
        })
    }

    pub(super) fn of(attribute: &UserOffloadDev) -> Option<Self> {
        Some(Self {
            device: u32::try_from(attribute.ifindex).ok()?,
            inbound: attribute.flags & XFRM_OFFLOAD_INBOUND != 0,
            packet: attribute.flags & Self::PACKET != 0,
        })
    }
}

impl StateId {
    pub(super) fn message(&self) -> DelGetMessage {
        let mut user_sa_id = UserSaId {
            spi: self.spi,
            proto: IPPROTO_ESP,
            ..UserSaId::default()
        };
        user_sa_id.destination(&self.destination);
        DelGetMessage {
            user_sa_id,
            nlas: Vec::new(),
        }
    }
}

impl Algorithms {
    fn attributes(&self) -> Vec<XfrmAttrs> {
        match self {
            Self::Aead {
                name,
                key,
                icv_bits,
            } => vec![XfrmAttrs::EncryptionAlgAead(AlgAead {
                alg_name: padded(name),
                alg_key_len: bits(key),
                alg_icv_len: *icv_bits,
                alg_key: key.to_vec(),
            })],
            Self::Separate {
                cipher,
                cipher_key,
                integrity,
                integrity_key,
                icv_bits,
            } => vec![
                // RFC 4868 section 2.3: half of the hash. Without a length the kernel takes 96 bits of SHA-256.
                XfrmAttrs::AuthenticationAlgTrunc(AlgAuth {
                    alg_name: padded(integrity),
                    alg_key_len: bits(integrity_key),
                    alg_trunc_len: *icv_bits,
                    alg_key: integrity_key.to_vec(),
                }),
                XfrmAttrs::EncryptionAlg(Alg {
                    alg_name: padded(cipher),
                    alg_key_len: bits(cipher_key),
                    alg_key: cipher_key.to_vec(),
                }),
            ],
        }
    }
}

impl Replay {
    fn attribute(&self) -> Option<XfrmAttrs> {
        // The kernel has no ESN without a window.
        let window = self.window.clamp(u32::from(self.esn), LONGEST_WINDOW);
        if window == 0 {
            return None;
        }
        let words = window.div_ceil(u32::BITS);
        let [sent_high, sent] = halves(self.sent);
        let [received_high, received] = halves(self.received);
        Some(XfrmAttrs::ReplayStateEsn(ReplayEsn {
            bmp_len: words,
            oseq: sent,
            seq: received,
            oseq_hi: sent_high,
            seq_hi: received_high,
            replay_window: window,
            // The kernel makes an empty one of the length above.
            bmp: Vec::new(),
        }))
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the two halves")]
fn halves(number: u64) -> [u32; 2] {
    [(number >> 32) as u32, number as u32]
}

fn whole(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

fn bits(key: &[u8]) -> u32 {
    u32::try_from(key.len() * 8).unwrap_or(u32::MAX)
}

fn padded(name: &str) -> [u8; 64] {
    let mut bytes = [0; 64];
    for (to, from) in bytes.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    bytes
}

/// Overwrites the keys in a message.
pub(super) fn wipe(message: &mut XfrmMessage) {
    let attributes = match message {
        XfrmMessage::AddSa(state) | XfrmMessage::UpdateSa(state) => &mut state.nlas,
        _ => return,
    };
    for attribute in attributes {
        match attribute {
            XfrmAttrs::EncryptionAlgAead(algorithm) => algorithm.alg_key.zeroize(),
            XfrmAttrs::EncryptionAlg(algorithm) | XfrmAttrs::AuthenticationAlg(algorithm) => {
                algorithm.alg_key.zeroize();
            }
            XfrmAttrs::AuthenticationAlgTrunc(algorithm) => algorithm.alg_key.zeroize(),
            _ => {}
        }
    }
}

/// What the kernel tells of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateStatus {
    /// Its name.
    pub id: StateId,
    /// Source of the outer packets.
    pub source: IpAddr,
    /// By which policies choose it.
    pub reqid: u32,
    /// Of its xfrm interface; 0 is none.
    pub if_id: u32,
    /// Packets carried.
    pub packets: u64,
    /// Bytes carried.
    pub bytes: u64,
    /// The number sent last.
    pub sent: u64,
    /// The highest number received.
    pub received: u64,
    /// Packets refused as too old.
    pub too_old: u32,
    /// Packets refused as replayed.
    pub replayed: u32,
    /// Packets whose ICV was wrong.
    pub forged: u32,
    /// What a network card does of it.
    pub card: Option<OnCard>,
}

impl StateStatus {
    pub(super) fn of(message: &XfrmMessage) -> Option<Self> {
        let XfrmMessage::AddSa(state) = message else {
            return None;
        };
        let info = &state.user_sa_info;
        if info.id.proto != IPPROTO_ESP {
            return None;
        }
        let mut status = Self {
            id: StateId {
                destination: ip(info.family, &info.id.daddr)?,
                spi: info.id.spi,
            },
            source: ip(info.family, &info.saddr)?,
            reqid: info.reqid,
            if_id: 0,
            packets: info.lifetime_cur.packets,
            bytes: info.lifetime_cur.bytes,
            sent: 0,
            received: 0,
            too_old: info.stats.replay_window,
            replayed: info.stats.replay,
            forged: info.stats.integrity_failed,
            card: None,
        };
        for attribute in &state.nlas {
            match attribute {
                XfrmAttrs::IfId(if_id) => status.if_id = *if_id,
                XfrmAttrs::OffloadDevice(device) => status.card = OnCard::of(device),
                XfrmAttrs::ReplayStateEsn(replay) => {
                    status.sent = whole(replay.oseq_hi, replay.oseq);
                    status.received = whole(replay.seq_hi, replay.seq);
                }
                XfrmAttrs::ReplayState(replay) => {
                    status.sent = replay.oseq.into();
                    status.received = replay.seq.into();
                }
                _ => {}
            }
        }
        Some(status)
    }
}

/// An address of a family, which XFRM's messages tell elsewhere.
pub(super) fn ip(family: u16, address: &Address) -> Option<IpAddr> {
    match i32::from(family) {
        libc::AF_INET => Some(address.to_ipv4().into()),
        libc::AF_INET6 => Some(address.to_ipv6().into()),
        _ => None,
    }
}
