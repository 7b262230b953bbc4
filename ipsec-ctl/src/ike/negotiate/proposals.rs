//! Choosing algorithms (RFC 7296 sections 2.7 and 3.3), and saying what was offered when none fits.

use ipsec_common::Spi;

use crate::ike::{
    crypto::{
        ChildSuite, Encryption, Esn, EspProposal, Group, IkeProposal, IkeSuite, Integrity, Prf,
    },
    exchange::Notifies,
    message::{
        IkeSpi,
        payload::{
            Attribute, KeyLength, NotifyType, Proposal, Protocol, SecurityAssociation, Transform,
            TransformType,
        },
    },
};

/// A kind of algorithm with its number on the wire.
trait Algorithm: Copy + PartialEq + std::fmt::Display {
    const KIND: TransformType;

    fn number(self) -> u16;

    fn key_bits(self) -> Option<u16> {
        None
    }
}

macro_rules! algorithm {
    ($type:ty, $kind:ident) => {
        impl Algorithm for $type {
            const KIND: TransformType = TransformType::$kind;

            fn number(self) -> u16 {
                self.id()
            }
        }
    };
}

impl Algorithm for Encryption {
    const KIND: TransformType = TransformType::ENCRYPTION;

    fn number(self) -> u16 {
        self.id()
    }

    fn key_bits(self) -> Option<u16> {
        self.key_length_bits()
    }
}

algorithm!(Prf, PRF);
algorithm!(Integrity, INTEGRITY);
algorithm!(Group, KEY_EXCHANGE);
algorithm!(Esn, ESN);

fn transform<A: Algorithm>(algorithm: A) -> Transform<'static> {
    Transform {
        kind: A::KIND,
        id: algorithm.number(),
        attributes: algorithm
            .key_bits()
            .map(|bits| Attribute::KeyLength { bits })
            .into_iter()
            .collect(),
    }
}

fn transforms<A: Algorithm>(algorithms: &[A]) -> impl Iterator<Item = Transform<'static>> {
    algorithms.iter().copied().map(transform)
}

fn is<A: Algorithm>(algorithm: A, offered: &Transform<'_>) -> bool {
    let bits = match offered.key_length() {
        KeyLength::Absent => None,
        KeyLength::Bits(bits) => Some(bits),
        KeyLength::NotUnderstood => return false,
    };
    offered.kind == A::KIND && offered.id == algorithm.number() && bits == algorithm.key_bits()
}

/// The first of ours that is offered.
fn pick<A: Algorithm>(ours: &[A], offer: &Proposal<'_>) -> Option<A> {
    ours.iter().copied().find(|algorithm| {
        offer
            .transforms
            .iter()
            .any(|offered| is(*algorithm, offered))
    })
}

fn offers(offer: &Proposal<'_>, kind: TransformType) -> bool {
    offer.transforms.iter().any(|offered| offered.kind == kind)
}

/// Whether every transform is of a kind that this protocol has.
// RFC 7296 section 3.3.6: a proposal with a transform type that we do not know is not acceptable.
fn is_understood(offer: &Proposal<'_>, kinds: &[TransformType]) -> bool {
    offer
        .transforms
        .iter()
        .all(|offered| kinds.contains(&offered.kind))
}

/// Integrity algorithm beside `encryption`: `Some(None)` where none belongs there and none must.
// RFC 7296 section 3.3.3 and RFC 5282 section 8: with an AEAD it is left out, or offered as NONE.
fn pick_integrity(
    ours: &[Integrity],
    encryption: Encryption,
    offer: &Proposal<'_>,
) -> Option<Option<Integrity>> {
    const NONE: u16 = 0;
    if !encryption.is_aead() {
        return pick(ours, offer).map(Some);
    }
    let acceptable = !offers(offer, TransformType::INTEGRITY)
        || offer
            .transforms
            .iter()
            .any(|offered| offered.kind == TransformType::INTEGRITY && offered.id == NONE);
    acceptable.then_some(None)
}

/// What is offered for an IKE SA.
pub fn ike_offer(proposals: &[IkeProposal]) -> SecurityAssociation<'static> {
    SecurityAssociation {
        proposals: (1..)
            .zip(proposals)
            .map(|(number, proposal)| Proposal {
                number,
                protocol: Protocol::IKE,
                spi: &[],
                transforms: transforms(&proposal.encryption)
                    .chain(transforms(&proposal.integrity))
                    .chain(transforms(&proposal.prf))
                    .chain(transforms(&proposal.groups))
                    .collect(),
            })
            .collect(),
    }
}

/// The answer to an offer for an IKE SA.
pub fn ike_answer(suite: &IkeSuite, number: u8) -> SecurityAssociation<'static> {
    SecurityAssociation {
        proposals: vec![Proposal {
            number,
            protocol: Protocol::IKE,
            spi: &[],
            transforms: std::iter::once(transform(suite.encryption))
                .chain(suite.integrity.map(transform))
                .chain([transform(suite.prf), transform(suite.group)])
                .collect(),
        }],
    }
}

/// What is offered for an IKE SA that takes the place of another; `spi` is ours of the new one.
// RFC 7296 section 3.3.1: only here do proposals for IKE have an SPI.
pub fn ike_rekey_offer<'a>(proposals: &[IkeProposal], spi: &'a [u8]) -> SecurityAssociation<'a> {
    with_spi(ike_offer(proposals), spi)
}

/// The answer to an offer for an IKE SA that takes the place of another.
pub fn ike_rekey_answer<'a>(
    suite: &IkeSuite,
    number: u8,
    spi: &'a [u8],
) -> SecurityAssociation<'a> {
    with_spi(ike_answer(suite, number), spi)
}

fn with_spi<'a>(offer: SecurityAssociation<'static>, spi: &'a [u8]) -> SecurityAssociation<'a> {
    SecurityAssociation {
        proposals: offer
            .proposals
            .into_iter()
            .map(|proposal| Proposal { spi, ..proposal })
            .collect(),
    }
}

/// What was chosen for an IKE SA that takes the place of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IkeChoice {
    /// Algorithms.
    pub suite: IkeSuite,
    /// Number of the proposal.
    pub number: u8,
    /// The peer's SPI.
    pub spi: IkeSpi,
}

/// Chooses algorithms for an IKE SA that takes the place of another.
pub fn choose_ike_rekey(
    ours: &[IkeProposal],
    offer: &SecurityAssociation<'_>,
    have: Option<u16>,
) -> Option<IkeChoice> {
    let (suite, number) = choose_ike(ours, offer, have)?;
    let mut same = offer.proposals.iter();
    let chosen = same.find(|proposal| proposal.number == number)?;
    let spi = IkeSpi(u64::from_be_bytes(chosen.spi.try_into().ok()?));
    (spi != IkeSpi(0)).then_some(IkeChoice { suite, number, spi })
}

/// Chooses algorithms for an IKE SA; also tells the number of the proposal. A group whose public value has come
/// already is preferred, because another one costs a round trip.
pub fn choose_ike(
    ours: &[IkeProposal],
    offer: &SecurityAssociation<'_>,
    have: Option<u16>,
) -> Option<(IkeSuite, u8)> {
    const KINDS: &[TransformType] = &[
        TransformType::ENCRYPTION,
        TransformType::PRF,
        TransformType::INTEGRITY,
        TransformType::KEY_EXCHANGE,
    ];
    ours.iter()
        .flat_map(|mine| offer.proposals.iter().map(move |theirs| (mine, theirs)))
        .filter(|(_, theirs)| theirs.protocol == Protocol::IKE && is_understood(theirs, KINDS))
        .find_map(|(mine, theirs)| {
            let encryption = pick(&mine.encryption, theirs)?;
            let group = mine
                .groups
                .iter()
                .copied()
                .filter(|group| Some(group.id()) == have)
                .find(|group| pick(&[*group], theirs).is_some())
                .or_else(|| pick(&mine.groups, theirs))?;
            let suite = IkeSuite {
                encryption,
                integrity: pick_integrity(&mine.integrity, encryption, theirs)?,
                prf: pick(&mine.prf, theirs)?,
                group,
            };
            Some((suite, theirs.number))
        })
}

/// What is offered for a child whose inbound SPI is `spi`. The first child of an IKE SA has no key exchange of its own.
pub fn child_offer<'a>(
    proposals: &[EspProposal],
    spi: &'a [u8],
    first: bool,
) -> SecurityAssociation<'a> {
    SecurityAssociation {
        proposals: (1..)
            .zip(proposals)
            .map(|(number, proposal)| {
                let groups: &[Group] = if first { &[] } else { &proposal.groups };
                Proposal {
                    number,
                    protocol: Protocol::ESP,
                    spi,
                    transforms: transforms(&proposal.encryption)
                        .chain(transforms(&proposal.integrity))
                        .chain(transforms(groups))
                        .chain(transforms(&proposal.esn))
                        .collect(),
                }
            })
            .collect(),
    }
}

/// The answer to an offer for a child.
pub fn child_answer<'a>(suite: &ChildSuite, number: u8, spi: &'a [u8]) -> SecurityAssociation<'a> {
    SecurityAssociation {
        proposals: vec![Proposal {
            number,
            protocol: Protocol::ESP,
            spi,
            transforms: std::iter::once(transform(suite.encryption))
                .chain(suite.integrity.map(transform))
                .chain(suite.group.map(transform))
                .chain(std::iter::once(transform(suite.esn)))
                .collect(),
        }],
    }
}

/// What was chosen for a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChildChoice {
    /// Algorithms.
    pub suite: ChildSuite,
    /// Number of the proposal.
    pub number: u8,
    /// The peer's inbound SPI.
    pub spi: Spi,
}

/// Chooses algorithms for a child.
pub fn choose_child(
    ours: &[EspProposal],
    offer: &SecurityAssociation<'_>,
    first: bool,
) -> Option<ChildChoice> {
    const KINDS: &[TransformType] = &[
        TransformType::ENCRYPTION,
        TransformType::INTEGRITY,
        TransformType::KEY_EXCHANGE,
        TransformType::ESN,
    ];
    ours.iter()
        .flat_map(|mine| offer.proposals.iter().map(move |theirs| (mine, theirs)))
        .filter(|(_, theirs)| theirs.protocol == Protocol::ESP && is_understood(theirs, KINDS))
        .find_map(|(mine, theirs)| {
            let encryption = pick(&mine.encryption, theirs)?;
            let suite = ChildSuite {
                encryption,
                integrity: pick_integrity(&mine.integrity, encryption, theirs)?,
                esn: pick_esn(&mine.esn, theirs)?,
                group: pick_child_group(&mine.groups, theirs, first)?,
            };
            let spi = Spi(u32::from_be_bytes(theirs.spi.try_into().ok()?));
            Some(ChildChoice {
                suite,
                number: theirs.number,
                spi,
            })
        })
}

/// Some peers leave the transform out where they can do without ESN only.
// RFC 7296 section 3.3.3: it is mandatory; to take its absence as "no" harms nobody.
fn pick_esn(ours: &[Esn], offer: &Proposal<'_>) -> Option<Esn> {
    if offers(offer, TransformType::ESN) {
        pick(ours, offer)
    } else {
        ours.contains(&Esn::No).then_some(Esn::No)
    }
}

/// The group of a child's own key exchange, if it is to have one.
// RFC 7296 section 1.2: IKE_AUTH has no KE payload, so a group that is offered there can only be meant for later.
fn pick_child_group(ours: &[Group], offer: &Proposal<'_>, first: bool) -> Option<Option<Group>> {
    const NONE: u16 = 0;
    if first || (ours.is_empty() && !offers(offer, TransformType::KEY_EXCHANGE)) {
        return Some(None);
    }
    match pick(ours, offer) {
        Some(group) => Some(Some(group)),
        None => offer
            .transforms
            .iter()
            .any(|offered| offered.kind == TransformType::KEY_EXCHANGE && offered.id == NONE)
            .then_some(None),
    }
}

/// The group that a responder asks for instead of ours, if it is one that we offer.
// RFC 7296 section 1.3: INVALID_KE_PAYLOAD names it in two bytes. Section 2.7: a group that we did not offer may be an
// attacker's wish.
pub fn wanted_group<'a>(
    notifies: &Notifies<'_>,
    offered: impl IntoIterator<Item = &'a Group>,
) -> Option<Group> {
    let data = notifies.find(NotifyType::INVALID_KE_PAYLOAD)?.data;
    let wanted = u16::from_be_bytes(data.try_into().ok()?);
    offered
        .into_iter()
        .copied()
        .find(|group| group.id() == wanted)
}

/// An offer in the users' notation, with numbers for what we do not know.
pub fn describe(offer: &SecurityAssociation<'_>) -> String {
    let words = |proposal: &Proposal<'_>| {
        proposal
            .transforms
            .iter()
            .map(word)
            .collect::<Vec<_>>()
            .join("-")
    };
    offer
        .proposals
        .iter()
        .map(words)
        .collect::<Vec<_>>()
        .join(", ")
}

fn word(offered: &Transform<'_>) -> String {
    fn known<A: Algorithm>(all: &[A], offered: &Transform<'_>) -> Option<String> {
        all.iter()
            .find(|algorithm| is(**algorithm, offered))
            .map(ToString::to_string)
    }
    known(
        &[
            Encryption::AesCbc128,
            Encryption::AesCbc192,
            Encryption::AesCbc256,
            Encryption::Aes128Gcm16,
            Encryption::Aes256Gcm16,
            Encryption::ChaCha20Poly1305,
        ],
        offered,
    )
    .or_else(|| {
        known(
            &[Prf::HmacSha256, Prf::HmacSha384, Prf::HmacSha512],
            offered,
        )
    })
    .or_else(|| {
        known(
            &[
                Integrity::HmacSha256,
                Integrity::HmacSha384,
                Integrity::HmacSha512,
            ],
            offered,
        )
    })
    .or_else(|| {
        known(
            &[
                Group::Modp2048,
                Group::Modp3072,
                Group::Modp4096,
                Group::Modp6144,
                Group::Modp8192,
                Group::Ecp256,
                Group::Ecp384,
                Group::Ecp521,
                Group::Curve25519,
            ],
            offered,
        )
    })
    .or_else(|| known(&[Esn::No, Esn::Yes], offered))
    .unwrap_or_else(|| unknown_word(offered))
}

fn unknown_word(offered: &Transform<'_>) -> String {
    let kind = match offered.kind {
        TransformType::ENCRYPTION => "cipher",
        TransformType::PRF => "prf",
        TransformType::INTEGRITY => "integrity",
        TransformType::KEY_EXCHANGE => "group",
        TransformType::ESN => "esn",
        TransformType(_) => "type",
    };
    match offered.key_length() {
        KeyLength::Bits(bits) => format!("{kind}#{}/{bits}", offered.id),
        KeyLength::Absent | KeyLength::NotUnderstood => format!("{kind}#{}", offered.id),
    }
}

/// Which of our proposals comes nearest to the offer, and what stands in its way.
pub fn nearest_ike(ours: &[IkeProposal], offer: &SecurityAssociation<'_>) -> String {
    let missing = |mine: &IkeProposal, theirs: &Proposal<'_>| {
        let mut missing = Vec::new();
        let encryption = pick(&mine.encryption, theirs);
        if encryption.is_none() {
            missing.push("cipher");
        }
        if !mine.integrity.is_empty() && pick(&mine.integrity, theirs).is_none() {
            missing.push("integrity");
        }
        if pick(&mine.prf, theirs).is_none() {
            missing.push("PRF");
        }
        if pick(&mine.groups, theirs).is_none() {
            missing.push("group");
        }
        missing
    };
    nearest(ours.iter().flat_map(|mine| {
        offer
            .proposals
            .iter()
            .map(move |theirs| (mine.to_string(), missing(mine, theirs)))
    }))
}

/// As [`nearest_ike`], for a child.
pub fn nearest_child(ours: &[EspProposal], offer: &SecurityAssociation<'_>, first: bool) -> String {
    let missing = |mine: &EspProposal, theirs: &Proposal<'_>| {
        let mut missing = Vec::new();
        if pick(&mine.encryption, theirs).is_none() {
            missing.push("cipher");
        }
        if !mine.integrity.is_empty() && pick(&mine.integrity, theirs).is_none() {
            missing.push("integrity");
        }
        if pick_esn(&mine.esn, theirs).is_none() {
            missing.push("ESN");
        }
        if pick_child_group(&mine.groups, theirs, first).is_none() {
            missing.push("group");
        }
        missing
    };
    nearest(ours.iter().flat_map(|mine| {
        offer
            .proposals
            .iter()
            .map(move |theirs| (mine.to_string(), missing(mine, theirs)))
    }))
}

fn nearest(candidates: impl Iterator<Item = (String, Vec<&'static str>)>) -> String {
    candidates
        .min_by_key(|(_, missing)| missing.len())
        .map_or_else(
            || "nothing was offered".to_owned(),
            |(mine, missing)| {
                if missing.is_empty() {
                    format!("{mine} is the nearest")
                } else {
                    format!("{mine} is the nearest, no common {}", missing.join(", "))
                }
            },
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ike(texts: &[&str]) -> Vec<IkeProposal> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn esp(texts: &[&str]) -> Vec<EspProposal> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn agreed(ours: &[&str], theirs: &[&str], have: Option<Group>) -> Option<String> {
        choose_ike(&ike(ours), &ike_offer(&ike(theirs)), have.map(Group::id))
            .map(|(suite, _)| suite.to_string())
    }

    #[test]
    fn our_preference_decides_among_what_is_offered() {
        assert_eq!(
            agreed(
                &["aes256-sha512-ecp521", "aes128-sha256-modp2048"],
                &[
                    "aes128-sha256-modp2048",
                    "aes256-aes128-sha256-sha512-modp2048-ecp521"
                ],
                None
            )
            .as_deref(),
            Some("aes256-sha512-ecp521")
        );
        assert_eq!(
            agreed(&["aes256-sha512-ecp521"], &["aes256-sha384-ecp521"], None),
            None
        );
    }

    #[test]
    fn a_group_whose_public_value_has_come_is_preferred() {
        let ours = ["aes256gcm16-prfsha384-x25519-ecp384"];
        let theirs = ["aes256gcm16-prfsha384-ecp384-x25519"];
        assert_eq!(
            agreed(&ours, &theirs, Some(Group::Ecp384)).as_deref(),
            Some("aes256gcm16-prfsha384-ecp384")
        );
        assert_eq!(
            agreed(&ours, &theirs, Some(Group::Modp2048)).as_deref(),
            Some("aes256gcm16-prfsha384-x25519")
        );
    }

    #[test]
    fn our_own_defaults_agree_with_themselves() {
        let defaults = IkeProposal::defaults();
        assert!(choose_ike(&defaults, &ike_offer(&defaults), None).is_some());
        let spi = [1, 2, 3, 4];
        let defaults = EspProposal::defaults();
        let choice = choose_child(&defaults, &child_offer(&defaults, &spi, true), true).unwrap();
        assert_eq!(choice.spi, Spi(0x0102_0304));
        assert_eq!(choice.suite.group, None);
    }

    #[test]
    fn the_first_child_ignores_groups_and_a_later_one_needs_a_common_one() {
        let ours = esp(&["aes256-sha512-ecp521"]);
        let theirs = esp(&["aes256-sha512"]);
        let spi = [0, 0, 1, 0];
        let choose = |first| choose_child(&ours, &child_offer(&theirs, &spi, first), first);
        assert!(choose(true).is_some());
        assert!(choose(false).is_none());
        let with_group = child_offer(&ours, &spi, false);
        assert_eq!(
            choose_child(&ours, &with_group, false).unwrap().suite.group,
            Some(Group::Ecp521)
        );
        assert!(choose_child(&theirs, &with_group, false).is_none());
    }

    #[test]
    fn an_answer_is_one_proposal_that_chooses_itself() {
        for text in ["aes256-sha512-ecp521", "chacha20poly1305-prfsha256-x25519"] {
            let ours = ike(&[text]);
            let (suite, number) = choose_ike(&ours, &ike_offer(&ours), None).unwrap();
            let answer = ike_answer(&suite, number);
            assert_eq!(choose_ike(&ours, &answer, None), Some((suite, number)));
            assert_eq!(suite.to_string(), text);
        }
    }

    #[test]
    fn a_refusal_tells_the_offer_and_the_nearest_match() {
        let offer = ike_offer(&ike(&[
            "aes256-sha512-modp2048",
            "aes128gcm16-prfsha256-ecp256",
        ]));
        assert_eq!(
            describe(&offer),
            "aes256-sha512-prfsha512-modp2048, aes128gcm16-prfsha256-ecp256"
        );
        assert_eq!(
            nearest_ike(&ike(&["aes256-sha512-ecp521"]), &offer),
            "aes256-sha512-ecp521 is the nearest, no common group"
        );
    }
}
