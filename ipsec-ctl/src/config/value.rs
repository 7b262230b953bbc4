//! The small languages inside values: durations, volumes and traffic selectors.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use ipsec_common::TrafficSelector;

/// Any port.
const ANY_PORT: (u16, u16) = (0, u16::MAX);

/// Reads `90s`, `30m`, `24h`, `7d`.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let (digits, seconds_per_unit) =
        split_unit(text, &[("s", 1), ("m", 60), ("h", 3600), ("d", 86400)])?;
    digits
        .checked_mul(seconds_per_unit)
        .map(Duration::from_secs)
}

/// Reads `500MB`, `4GiB` or plain bytes.
pub(super) fn volume_bytes(text: &str) -> Option<u64> {
    const UNITS: &[(&str, u64)] = &[
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("", 1),
    ];
    let (digits, bytes_per_unit) = split_unit(text, UNITS)?;
    digits.checked_mul(bytes_per_unit)
}

fn split_unit(text: &str, units: &[(&str, u64)]) -> Option<(u64, u64)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at_checked(end)?;
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim_start())?;
    Some((digits.parse().ok()?, *factor))
}

/// Why a selector cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SelectorError {
    #[error("`{0}` is neither an address, a prefix nor a range of addresses")]
    Addresses(String),
    #[error("`{prefix}` has bits set behind its length")]
    HostBits { prefix: String, network: IpNet },
    #[error("the range ends before it starts, or mixes IPv4 with IPv6")]
    Range,
    #[error("`{0}` is not a protocol")]
    Protocol(String),
    #[error("`{0}` is not a port or a range of ports")]
    Ports(String),
    #[error("ports mean nothing for protocol `{0}`")]
    PortsWithout(String),
}

impl SelectorError {
    pub(super) fn help(&self) -> String {
        match self {
            Self::HostBits { network, .. } => format!("write \"{network}\", or the address alone for one host"),
            Self::Protocol(_) => "write tcp, udp, icmp, icmpv6, sctp, gre, or a number from 1 to 255".to_owned(),
            Self::PortsWithout(_) => "leave the ports out; only tcp, udp and sctp have them".to_owned(),
            Self::Addresses(_) | Self::Range | Self::Ports(_) => {
                "write for example \"10.1.0.0/24\", \"10.1.0.5-10.1.0.9\", \"2001:db8::/64\" or \"10.1.0.0/24 tcp 443\""
                    .to_owned()
            }
        }
    }
}

/// Reads `ADDRESSES [PROTOCOL [PORT[-PORT]]]`, where addresses are a prefix, a range or one address.
pub(super) fn selector(text: &str) -> Result<TrafficSelector, SelectorError> {
    let mut words = text.split_whitespace();
    let addresses = addresses(words.next().unwrap_or_default())?;
    let protocol_word = words.next();
    let protocol = match protocol_word {
        None => 0,
        Some(word) => protocol(word).ok_or_else(|| SelectorError::Protocol(word.to_owned()))?,
    };
    let ports = match words.next() {
        None => ANY_PORT,
        Some(_) if !matches!(protocol, 6 | 17 | 132) => {
            return Err(SelectorError::PortsWithout(
                protocol_word.unwrap_or_default().to_owned(),
            ));
        }
        Some(word) => ports(word).ok_or_else(|| SelectorError::Ports(word.to_owned()))?,
    };
    match words.next() {
        Some(extra) => Err(SelectorError::Ports(extra.to_owned())),
        None => Ok(TrafficSelector {
            protocol,
            ports,
            addresses,
        }),
    }
}

fn addresses(word: &str) -> Result<(IpAddr, IpAddr), SelectorError> {
    let wrong = || SelectorError::Addresses(word.to_owned());
    if let Some((first, last)) = word.split_once('-') {
        let (first, last): (IpAddr, IpAddr) = (
            first.parse().map_err(|_| wrong())?,
            last.parse().map_err(|_| wrong())?,
        );
        if first.is_ipv4() != last.is_ipv4() || first > last {
            return Err(SelectorError::Range);
        }
        return Ok((first, last));
    }
    if let Ok(address) = word.parse::<IpAddr>() {
        return Ok((address, address));
    }
    let prefix: IpNet = word.parse().map_err(|_| wrong())?;
    if prefix.addr() != prefix.network() {
        return Err(SelectorError::HostBits {
            prefix: word.to_owned(),
            network: prefix.trunc(),
        });
    }
    Ok(match prefix {
        IpNet::V4(v4) => (v4.network().into(), v4.broadcast().into()),
        IpNet::V6(v6) => (v6.network().into(), v6.broadcast().into()),
    })
}

fn protocol(word: &str) -> Option<u8> {
    Some(match word {
        "icmp" => 1,
        "tcp" => 6,
        "udp" => 17,
        "gre" => 47,
        "icmpv6" => 58,
        "sctp" => 132,
        number => number.parse().ok().filter(|&number| number != 0)?,
    })
}

fn ports(word: &str) -> Option<(u16, u16)> {
    let (first, last) = word.split_once('-').unwrap_or((word, word));
    let range = (first.parse().ok()?, last.parse().ok()?);
    (range.0 <= range.1).then_some(range)
}
