//! Identities of IKE peers (RFC 7296 section 3.5), as users write and read them.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use super::message::payload::IdType;

/// Who a peer says it is. Two identities are the same only if kind and bytes are.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Identity {
    /// ID_IPV4_ADDR.
    Ipv4(Ipv4Addr),
    /// ID_IPV6_ADDR.
    Ipv6(Ipv6Addr),
    /// ID_FQDN.
    Fqdn(String),
    /// ID_RFC822_ADDR.
    Rfc822(String),
    /// ID_KEY_ID: bytes that only the two peers give a meaning.
    KeyId(Vec<u8>),
    /// A kind we do not configure, or bytes that do not fit their kind.
    Other {
        /// The ID type on the wire.
        kind: u8,
        /// Its data.
        data: Vec<u8>,
    },
}

/// Longest text taken as an identity.
const LONGEST_BYTES: usize = 255;

impl Identity {
    /// The ID type and data on the wire.
    pub fn to_wire(&self) -> (IdType, Vec<u8>) {
        match self {
            Self::Ipv4(address) => (IdType::IPV4, address.octets().to_vec()),
            Self::Fqdn(name) => (IdType::FQDN, name.clone().into_bytes()),
            Self::Rfc822(mailbox) => (IdType::RFC822, mailbox.clone().into_bytes()),
            Self::Ipv6(address) => (IdType::IPV6, address.octets().to_vec()),
            Self::KeyId(bytes) => (IdType::KEY_ID, bytes.clone()),
            Self::Other { kind, data } => (IdType(*kind), data.clone()),
        }
    }

    /// Reads an ID type and data from the wire; what does not fit its type is kept as [`Identity::Other`].
    pub fn from_wire(kind: IdType, data: &[u8]) -> Self {
        let text = || {
            std::str::from_utf8(data)
                .ok()
                .filter(|text| !text.is_empty() && !text.chars().any(char::is_control))
                .map(str::to_owned)
        };
        match kind {
            IdType::IPV4 => <[u8; 4]>::try_from(data)
                .ok()
                .map(|octets| Self::Ipv4(octets.into())),
            IdType::FQDN => text().map(Self::Fqdn),
            IdType::RFC822 => text().map(Self::Rfc822),
            IdType::IPV6 => <[u8; 16]>::try_from(data)
                .ok()
                .map(|octets| Self::Ipv6(octets.into())),
            IdType::KEY_ID => Some(Self::KeyId(data.to_vec())),
            _ => None,
        }
        .unwrap_or_else(|| Self::Other {
            kind: kind.0,
            data: data.to_vec(),
        })
    }
}

impl From<IpAddr> for Identity {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => Self::Ipv4(address),
            IpAddr::V6(address) => Self::Ipv6(address),
        }
    }
}

/// Why a text is no identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// It is empty or absurdly long.
    #[error("an identity has 1 to {LONGEST_BYTES} bytes")]
    Length,
    /// It has characters that no name, mailbox or key id has.
    #[error("an identity is printable ASCII without spaces")]
    Character,
}

impl FromStr for Identity {
    type Err = IdentityError;

    /// Reads an address, `user@domain`, `keyid:TEXT`, or else a name; `fqdn:`, `rfc822:` decide where that is unclear.
    fn from_str(text: &str) -> Result<Self, IdentityError> {
        if text.is_empty() || text.len() > LONGEST_BYTES {
            return Err(IdentityError::Length);
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(IdentityError::Character);
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(address.into());
        }
        let nonempty = |rest: &str| {
            if rest.is_empty() {
                Err(IdentityError::Length)
            } else {
                Ok(rest.to_owned())
            }
        };
        if let Some(rest) = text.strip_prefix("keyid:") {
            return nonempty(rest).map(|rest| Self::KeyId(rest.into_bytes()));
        }
        if let Some(rest) = text.strip_prefix("fqdn:") {
            return nonempty(rest).map(Self::Fqdn);
        }
        if let Some(rest) = text.strip_prefix("rfc822:") {
            return nonempty(rest).map(Self::Rfc822);
        }
        Ok(if text.contains('@') {
            Self::Rfc822(text.to_owned())
        } else {
            Self::Fqdn(text.to_owned())
        })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ipv4(address) => write!(f, "{address}"),
            Self::Ipv6(address) => write!(f, "{address}"),
            Self::Fqdn(name) => {
                // What a peer calls itself must read back as the same kind.
                let unclear = name.parse::<IpAddr>().is_ok() || name.contains('@');
                write!(f, "{}{name}", if unclear { "fqdn:" } else { "" })
            }
            Self::Rfc822(mailbox) => {
                write!(
                    f,
                    "{}{mailbox}",
                    if mailbox.contains('@') { "" } else { "rfc822:" }
                )
            }
            Self::KeyId(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) if text.bytes().all(|byte| byte.is_ascii_graphic()) => {
                    write!(f, "keyid:{text}")
                }
                _ => write!(f, "keyid:0x{}", Hex(bytes)),
            },
            Self::Other { kind, data } => write!(f, "type {kind}:0x{}", Hex(data)),
        }
    }
}

struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // RFC 7296 section 3.5: types 1, 2, 3, 5 and 11 are IPv4, FQDN, RFC 822, IPv6 and KEY_ID.
    #[test]
    fn texts_become_the_kinds_that_users_mean_and_read_back() {
        for (text, kind) in [
            ("192.0.2.1", 1),
            ("gw.example.com", 2),
            ("admin@example.com", 3),
            ("2001:db8::1", 5),
            ("keyid:site-7", 11),
            ("fqdn:192.0.2.1", 2),
            ("rfc822:root", 3),
        ] {
            let identity: Identity = text.parse().unwrap();
            let (wire, data) = identity.to_wire();
            assert_eq!(wire, IdType(kind), "{text}");
            assert_eq!(Identity::from_wire(wire, &data), identity);
            assert_eq!(identity.to_string(), text);
        }
    }

    #[test]
    fn bytes_that_do_not_fit_their_kind_are_kept_but_match_nothing_configured() {
        let odd = Identity::from_wire(IdType(1), &[1, 2, 3]);
        assert_eq!(
            odd,
            Identity::Other {
                kind: 1,
                data: vec![1, 2, 3]
            }
        );
        assert_eq!(odd.to_wire(), (IdType(1), vec![1, 2, 3]));
        assert_eq!(odd.to_string(), "type 1:0x010203");
        assert!(matches!(
            Identity::from_wire(IdType(2), b"a\x1b[2J"),
            Identity::Other { .. }
        ));
    }

    #[test]
    fn texts_that_no_identity_has_are_refused() {
        assert_eq!("".parse::<Identity>(), Err(IdentityError::Length));
        assert_eq!("keyid:".parse::<Identity>(), Err(IdentityError::Length));
        assert_eq!(
            "two words".parse::<Identity>(),
            Err(IdentityError::Character)
        );
    }
}
