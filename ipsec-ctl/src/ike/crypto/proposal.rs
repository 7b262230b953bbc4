//! Proposals (RFC 7296 section 3.3) as users write them: `aes256-sha512-ecp521`, `aes256gcm16-prfsha384-x25519`.
//!
//! The order of words of one kind is the order of preference; a proposal that could never be agreed on is refused.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::transform::{Encryption, Esn, Group, Integrity, Prf, Word, obsolete};

/// One acceptable combination for an IKE SA; every list but `integrity` has at least one entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IkeProposal {
    /// Ciphers, either all AEAD or none.
    pub encryption: Vec<Encryption>,
    /// Pseudorandom functions.
    pub prf: Vec<Prf>,
    /// Integrity algorithms; empty exactly if the ciphers are AEAD.
    pub integrity: Vec<Integrity>,
    /// Key exchange groups.
    pub groups: Vec<Group>,
}

/// One acceptable combination for a CHILD SA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EspProposal {
    /// Ciphers, either all AEAD or none.
    pub encryption: Vec<Encryption>,
    /// Integrity algorithms; empty exactly if the ciphers are AEAD.
    pub integrity: Vec<Integrity>,
    /// Groups for perfect forward secrecy; empty for none. Never used by the first child of an IKE SA.
    pub groups: Vec<Group>,
    /// Sequence number sizes, at least one.
    pub esn: Vec<Esn>,
}

/// Why a text is no proposal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposalError {
    /// A word names an algorithm that is too weak.
    #[error("`{word}` is refused: {why}")]
    Obsolete {
        /// The word.
        word: String,
        /// The reason.
        why: &'static str,
    },
    /// A word names nothing we know.
    #[error("`{0}` is not an algorithm")]
    Unknown(String),
    /// A word stands there twice.
    #[error("`{0}` stands there twice")]
    Twice(String),
    /// There is no cipher.
    #[error("it names no cipher")]
    NoEncryption,
    /// Ciphers with and without authentication of their own.
    // RFC 7296 section 3.3: AEAD and other ciphers must not share a proposal.
    #[error("it mixes ciphers that authenticate with ciphers that do not; write two proposals")]
    Mixed,
    /// A cipher that does not authenticate, alone.
    #[error("`{0}` does not authenticate, so it needs sha256, sha384 or sha512 beside it")]
    NoIntegrity(Encryption),
    /// An integrity algorithm beside a cipher that authenticates.
    #[error(
        "`{encryption}` authenticates by itself, so `{integrity}` has no place beside it; name a PRF as prf{integrity}"
    )]
    NeedlessIntegrity {
        /// The cipher.
        encryption: Encryption,
        /// The integrity algorithm.
        integrity: Integrity,
    },
    /// An IKE proposal with an AEAD cipher and no PRF.
    #[error("it names no PRF; add prfsha256, prfsha384 or prfsha512")]
    NoPrf,
    /// An IKE proposal without a group.
    #[error("it names no key exchange group; add for example x25519 or ecp521")]
    NoGroup,
    /// A word that has no meaning in this kind of proposal.
    #[error("`{word}` has no place in a proposal for {protocol}")]
    OutOfPlace {
        /// The word.
        word: String,
        /// IKE or ESP.
        protocol: &'static str,
    },
}

/// The words of a proposal by kind.
#[derive(Default)]
struct Words {
    encryption: Vec<Encryption>,
    prf: Vec<Prf>,
    integrity: Vec<Integrity>,
    groups: Vec<Group>,
    esn: Vec<Esn>,
}

impl Words {
    fn read(text: &str) -> Result<Self, ProposalError> {
        let mut words = Self::default();
        for word in text.split('-') {
            let lower = word.trim().to_ascii_lowercase();
            if let Some(why) = obsolete(&lower) {
                return Err(ProposalError::Obsolete { word: lower, why });
            }
            let added =
                match Word::read(&lower).ok_or_else(|| ProposalError::Unknown(lower.clone()))? {
                    Word::Encryption(value) => add(&mut words.encryption, value),
                    Word::Prf(value) => add(&mut words.prf, value),
                    Word::Integrity(value) => add(&mut words.integrity, value),
                    Word::Group(value) => add(&mut words.groups, value),
                    Word::Esn(value) => add(&mut words.esn, value),
                };
            if !added {
                return Err(ProposalError::Twice(lower));
            }
        }
        words.check_ciphers()?;
        Ok(words)
    }

    fn check_ciphers(&self) -> Result<(), ProposalError> {
        let first = *self.encryption.first().ok_or(ProposalError::NoEncryption)?;
        if self
            .encryption
            .iter()
            .any(|cipher| cipher.is_aead() != first.is_aead())
        {
            return Err(ProposalError::Mixed);
        }
        match self.integrity.first() {
            None if !first.is_aead() => Err(ProposalError::NoIntegrity(first)),
            Some(&integrity) if first.is_aead() => Err(ProposalError::NeedlessIntegrity {
                encryption: first,
                integrity,
            }),
            None | Some(_) => Ok(()),
        }
    }
}

fn add<T: PartialEq>(list: &mut Vec<T>, value: T) -> bool {
    let new = !list.contains(&value);
    if new {
        list.push(value);
    }
    new
}

impl FromStr for IkeProposal {
    type Err = ProposalError;

    fn from_str(text: &str) -> Result<Self, ProposalError> {
        let words = Words::read(text)?;
        if let Some(esn) = words.esn.first() {
            return Err(ProposalError::OutOfPlace {
                word: esn.to_string(),
                protocol: "IKE",
            });
        }
        let prf = match words.prf.as_slice() {
            [] => words
                .integrity
                .iter()
                .map(|integrity| integrity.prf())
                .collect(),
            named => named.to_vec(),
        };
        if prf.is_empty() {
            return Err(ProposalError::NoPrf);
        }
        if words.groups.is_empty() {
            return Err(ProposalError::NoGroup);
        }
        Ok(Self {
            encryption: words.encryption,
            prf,
            integrity: words.integrity,
            groups: words.groups,
        })
    }
}

impl FromStr for EspProposal {
    type Err = ProposalError;

    fn from_str(text: &str) -> Result<Self, ProposalError> {
        let words = Words::read(text)?;
        if let Some(prf) = words.prf.first() {
            return Err(ProposalError::OutOfPlace {
                word: prf.to_string(),
                protocol: "ESP",
            });
        }
        let esn = if words.esn.is_empty() {
            vec![Esn::No]
        } else {
            words.esn
        };
        Ok(Self {
            encryption: words.encryption,
            integrity: words.integrity,
            groups: words.groups,
            esn,
        })
    }
}

/// Ciphers proposed by default.
const DEFAULT_AEAD: &[Encryption] = &[
    Encryption::Aes256Gcm16,
    Encryption::ChaCha20Poly1305,
    Encryption::Aes128Gcm16,
];
const DEFAULT_CBC: &[Encryption] = &[Encryption::AesCbc256, Encryption::AesCbc128];
/// Integrity algorithms proposed by default beside [`DEFAULT_CBC`].
const DEFAULT_INTEGRITY: &[Integrity] = &[
    Integrity::HmacSha512,
    Integrity::HmacSha384,
    Integrity::HmacSha256,
];

impl IkeProposal {
    /// What is proposed where the configuration says nothing: AEAD first, then what older gateways speak.
    pub fn defaults() -> Vec<Self> {
        let prf = vec![Prf::HmacSha384, Prf::HmacSha512, Prf::HmacSha256];
        let groups = vec![
            Group::Curve25519,
            Group::Ecp521,
            Group::Ecp384,
            Group::Ecp256,
            Group::Modp4096,
        ];
        vec![
            Self {
                encryption: DEFAULT_AEAD.to_vec(),
                prf: prf.clone(),
                integrity: Vec::new(),
                groups: groups.clone(),
            },
            Self {
                encryption: DEFAULT_CBC.to_vec(),
                prf,
                integrity: DEFAULT_INTEGRITY.to_vec(),
                groups: [groups, vec![Group::Modp3072, Group::Modp2048]].concat(),
            },
        ]
    }
}

impl EspProposal {
    /// What is proposed where the configuration says nothing.
    pub fn defaults() -> Vec<Self> {
        let esn = vec![Esn::Yes, Esn::No];
        vec![
            Self {
                encryption: DEFAULT_AEAD.to_vec(),
                integrity: Vec::new(),
                groups: Vec::new(),
                esn: esn.clone(),
            },
            Self {
                encryption: DEFAULT_CBC.to_vec(),
                integrity: DEFAULT_INTEGRITY.to_vec(),
                groups: Vec::new(),
                esn,
            },
        ]
    }
}

/// Writes words with hyphens between them.
fn join<'a>(
    f: &mut fmt::Formatter<'_>,
    words: impl Iterator<Item = &'a dyn fmt::Display>,
) -> fmt::Result {
    for (i, word) in words.enumerate() {
        write!(f, "{}{word}", if i == 0 { "" } else { "-" })?;
    }
    Ok(())
}

fn shown<T: fmt::Display>(list: &[T]) -> impl Iterator<Item = &dyn fmt::Display> {
    list.iter().map(|word| word as &dyn fmt::Display)
}

impl fmt::Display for IkeProposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The PRF is shown only where the reader could not tell it from the integrity algorithm.
        let implied: Vec<Prf> = self
            .integrity
            .iter()
            .map(|integrity| integrity.prf())
            .collect();
        let prf = if self.prf == implied {
            &[]
        } else {
            self.prf.as_slice()
        };
        join(
            f,
            shown(&self.encryption)
                .chain(shown(&self.integrity))
                .chain(shown(prf))
                .chain(shown(&self.groups)),
        )
    }
}

impl fmt::Display for EspProposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let esn = if self.esn == [Esn::No] {
            &[]
        } else {
            self.esn.as_slice()
        };
        join(
            f,
            shown(&self.encryption)
                .chain(shown(&self.integrity))
                .chain(shown(&self.groups))
                .chain(shown(esn)),
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, sample::subsequence};

    use super::*;

    #[test]
    fn the_suites_of_common_gateways_are_read_as_meant() {
        let fortigate: IkeProposal = "aes256-sha512-ecp521".parse().unwrap();
        assert_eq!(
            fortigate,
            IkeProposal {
                encryption: vec![Encryption::AesCbc256],
                prf: vec![Prf::HmacSha512],
                integrity: vec![Integrity::HmacSha512],
                groups: vec![Group::Ecp521],
            }
        );
        for text in [
            "aes256gcm16-prfsha384-x25519",
            "chacha20poly1305-prfsha256-x25519",
            "aes128-sha256-modp2048",
            "aes256-aes128-sha512-sha256-prfsha384-ecp384-modp3072",
        ] {
            assert_eq!(text.parse::<IkeProposal>().unwrap().to_string(), text);
        }
        for text in [
            "aes256gcm16",
            "aes256-sha512",
            "aes256gcm16-x25519-esn",
            "aes128-sha256-modp2048-esn-noesn",
        ] {
            assert_eq!(text.parse::<EspProposal>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn spellings_of_other_implementations_mean_the_same() {
        assert_eq!(
            "AES256GCM128-curve25519".parse::<EspProposal>(),
            "aes256gcm16-x25519".parse()
        );
        assert_eq!(
            "aes128gcm16-noesn".parse::<EspProposal>(),
            "aes128gcm16".parse()
        );
    }

    // RFC 8247 and RFC 8221: what they withdraw is refused by name, with the reason.
    #[test]
    fn obsolete_algorithms_are_refused_by_name() {
        for text in [
            "3des-sha256-modp2048",
            "aes128-md5-modp2048",
            "aes128-sha1-modp2048",
            "aes128-sha256-modp1024",
        ] {
            let error = text.parse::<IkeProposal>().unwrap_err();
            let ProposalError::Obsolete { word, .. } = &error else {
                panic!("{text}: {error}")
            };
            assert!(text.split('-').any(|part| part == word));
            assert!(error.to_string().contains("RFC 8247"), "{error}");
        }
    }

    #[test]
    fn combinations_that_could_never_be_agreed_on_are_refused() {
        let ike = |text: &str| text.parse::<IkeProposal>().unwrap_err();
        assert_eq!(
            ike("aes256gcm16-aes256-sha256-x25519"),
            ProposalError::Mixed
        );
        assert_eq!(
            ike("aes256-x25519"),
            ProposalError::NoIntegrity(Encryption::AesCbc256)
        );
        assert_eq!(ike("aes256gcm16-x25519"), ProposalError::NoPrf);
        assert_eq!(ike("aes256-sha256"), ProposalError::NoGroup);
        assert_eq!(ike("sha256-x25519"), ProposalError::NoEncryption);
        assert_eq!(
            ike("aes256-aes256-sha256-x25519"),
            ProposalError::Twice("aes256".to_owned())
        );
        assert_eq!(
            ike("aes257-sha256-x25519"),
            ProposalError::Unknown("aes257".to_owned())
        );
        assert_eq!(ike(""), ProposalError::Unknown(String::new()));
        assert!(matches!(
            ike("aes256gcm16-sha256-x25519"),
            ProposalError::NeedlessIntegrity { .. }
        ));
        assert!(matches!(
            ike("aes256-sha256-x25519-esn"),
            ProposalError::OutOfPlace {
                protocol: "IKE",
                ..
            }
        ));
        let esp = "aes256gcm16-prfsha256".parse::<EspProposal>().unwrap_err();
        assert!(matches!(
            esp,
            ProposalError::OutOfPlace {
                protocol: "ESP",
                ..
            }
        ));
    }

    #[test]
    fn the_defaults_read_back_from_what_is_shown_of_them() {
        for proposal in IkeProposal::defaults() {
            assert_eq!(proposal.to_string().parse(), Ok(proposal));
        }
        for proposal in EspProposal::defaults() {
            assert_eq!(proposal.to_string().parse(), Ok(proposal));
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[a-z0-9-]{0,60}") {
            if let Ok(proposal) = text.parse::<IkeProposal>() {
                prop_assert_eq!(proposal.to_string().parse(), Ok(proposal));
            }
        }

        #[test]
        fn what_is_shown_reads_back(
            encryption in subsequence(vec![Encryption::AesCbc128, Encryption::AesCbc192, Encryption::AesCbc256], 1..=3),
            integrity in subsequence(vec![Integrity::HmacSha256, Integrity::HmacSha384, Integrity::HmacSha512], 1..=3),
            groups in subsequence(vec![Group::Modp2048, Group::Ecp256, Group::Ecp521, Group::Curve25519], 0..=4),
            esn in subsequence(vec![Esn::No, Esn::Yes], 1..=2),
        ) {
            let proposal = EspProposal { encryption, integrity, groups, esn };
            prop_assert_eq!(proposal.to_string().parse(), Ok(proposal));
        }
    }
}
