//! Children: asked for in IKE_AUTH or CREATE_CHILD_SA, answered, installed, refused (RFC 7296 sections 1.3, 2.9, 2.17).

mod answer;
mod ask;
mod install;

use ipsec_common::TrafficSelector;
use serde::{Deserialize, Serialize};

use super::{
    initiate::NONCE_BYTES,
    rekey::{IkeJob, Lifetime, Replaced, Replaces, Standing},
};
use crate::ike::{
    config::{ChildConfig, ChildName, Mode},
    crypto::{ChildSuite, EspProposal, Group, ke::PrivateKey, keys::Nonces},
    endpoint::Shared,
    event::ChildSaId,
    job::JobId,
    message::{
        Payload,
        payload::{Notify, NotifyType, TrafficSelectors},
    },
    negotiate::{proposals, selectors},
};

/// A pair of ESP SAs that is installed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::ike) struct ChildSa {
    pub(in crate::ike) id: ChildSaId,
    pub(in crate::ike) child: ChildName,
    /// The first of the pairs that have replaced each other.
    pub(in crate::ike) line: ChildSaId,
    /// We have asked for it, not the peer.
    pub(in crate::ike::sa) asked: bool,
    pub(in crate::ike) spi_in: u32,
    pub(in crate::ike) spi_out: u32,
    /// The group of its own key exchange, if there was one.
    pub(in crate::ike::sa) group: Option<Group>,
    pub(in crate::ike::sa) local: Vec<TrafficSelector>,
    pub(in crate::ike::sa) remote: Vec<TrafficSelector>,
    /// Packets seen by the data plane, to notice progress.
    pub(in crate::ike) inbound: u64,
    pub(in crate::ike) outbound: u64,
    pub(in crate::ike::sa) life: Lifetime,
    pub(in crate::ike::sa) standing: Standing,
}

/// Selectors of our side and of the peer's.
pub(in crate::ike::sa) type Sides<'a> = (&'a [TrafficSelector], &'a [TrafficSelector]);

impl ChildSa {
    /// Whether it is in force for exactly this child and traffic.
    pub(in crate::ike::sa) fn is_for(&self, child: ChildName, sides: Sides<'_>) -> bool {
        self.standing == Standing::InForce
            && self.child == child
            && (self.local.as_slice(), self.remote.as_slice()) == sides
    }
}

/// A packet that asks for a child, as selectors of our side and of the peer's.
pub(in crate::ike) type Packet = (TrafficSelector, TrafficSelector);

/// A child that we have asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::ike) struct PendingChild {
    pub(in crate::ike) child: ChildName,
    pub(in crate::ike) spi_in: u32,
    pub(in crate::ike) local: Vec<TrafficSelector>,
    pub(in crate::ike) remote: Vec<TrafficSelector>,
    pub(in crate::ike) proposals: Vec<EspProposal>,
    pub(in crate::ike::sa) nonce: Vec<u8>,
    private: Option<PrivateKey>,
    /// The packet that asked for it, inside its selectors.
    packet: Option<Packet>,
    /// Which selectors of the configured child it is for.
    pub(in crate::ike::sa) part: Part,
    /// Groups that the responder has asked for instead.
    detours: u32,
    /// The pair that it is to take the place of.
    pub(in crate::ike::sa) replaces: Option<Replaces>,
    pub(in crate::ike::sa) mode: Mode,
}

/// What a pair of SAs is for, as seen from the configured child.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::ike::sa) enum Part {
    /// All of its selectors; what the peer leaves out is asked for in further exchanges.
    Whole,
    /// Some of its selectors, and nothing more is asked for.
    Some,
}

/// A child that waits for a key exchange of its own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::ike) enum ChildJob {
    /// We ask, and need our public value.
    Public(PendingChild),
    /// We asked, and need the secret.
    Agree(PendingChild, Agreed),
    /// We answer, and need both.
    Answer(Grant),
    /// It is no child but an IKE SA that takes the place of this one.
    Ike(IkeJob),
}

/// A child and the job that it waits for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::ike) struct Waiting {
    pub(in crate::ike::sa) job: JobId,
    pub(in crate::ike::sa) what: ChildJob,
}

/// What was agreed on, but for the keys.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::ike) struct Agreed {
    pub(in crate::ike::sa) spi_in: u32,
    spi_out: u32,
    suite: ChildSuite,
    local: Vec<TrafficSelector>,
    remote: Vec<TrafficSelector>,
    mode: Mode,
    /// The other side's nonce where we ask, ours where we answer.
    pub(in crate::ike::sa) nonce: Vec<u8>,
}

/// A child that the peer asks for in an exchange of its own, and gets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::ike) struct Grant {
    /// The request, to answer and to recognise it again.
    request: Vec<u8>,
    pub(in crate::ike::sa) agreed: Agreed,
    child: ChildName,
    /// Number of the chosen proposal.
    number: u8,
    nonce_i: Vec<u8>,
    /// The pair that the peer rekeys, and its line.
    pub(in crate::ike::sa) replaces: Option<Replaced>,
}

impl Grant {
    fn nonces(&self) -> Nonces<'_> {
        Nonces {
            initiator: &self.nonce_i,
            responder: &self.agreed.nonce,
        }
    }
}

impl Agreed {
    pub(in crate::ike::sa) fn sides(&self) -> Sides<'_> {
        (&self.local, &self.remote)
    }
}

impl ChildJob {
    pub(in crate::ike::sa) fn child(&self) -> Option<ChildName> {
        match self {
            Self::Public(pending) | Self::Agree(pending, _) => Some(pending.child),
            Self::Answer(grant) => Some(grant.child),
            Self::Ike(_) => None,
        }
    }

    pub(in crate::ike::sa) fn spi(&self) -> Option<u32> {
        match self {
            Self::Public(pending) | Self::Agree(pending, _) => Some(pending.spi_in),
            Self::Answer(grant) => Some(grant.agreed.spi_in),
            Self::Ike(_) => None,
        }
    }
}

/// Our answer to a child that the peer asked for.
pub(in crate::ike::sa) enum ChildAnswer {
    /// It is installed.
    Agreed {
        agreed: Agreed,
        number: u8,
        /// Narrower than what was asked for.
        narrowed: bool,
    },
    /// It is refused.
    Refused(NotifyType),
}

impl PendingChild {
    pub(in crate::ike::sa) fn of(
        shared: &mut Shared,
        config: &ChildConfig,
        local: Vec<TrafficSelector>,
        remote: Vec<TrafficSelector>,
    ) -> Self {
        Self {
            child: config.id,
            spi_in: shared.allocate_spi(),
            local,
            remote,
            proposals: config.proposals.clone(),
            nonce: shared.random_bytes(NONCE_BYTES),
            private: None,
            packet: None,
            part: Part::Whole,
            detours: 0,
            replaces: None,
            mode: config.mode,
        }
    }

    /// Notes the packet that asks for it, if it is one that its selectors allow.
    pub(in crate::ike::sa) fn asked_for_by(mut self, packet: Option<Packet>) -> Self {
        self.packet = packet.filter(|(local, remote)| {
            selectors::all_covered(&self.local, &[*local])
                && selectors::all_covered(&self.remote, &[*remote])
        });
        self
    }

    // RFC 7296 section 2.9: the packet that asks for the SAs goes in front of the selectors, so that a responder which
    // must narrow them keeps what is needed.
    fn ts_of(
        first: Option<TrafficSelector>,
        side: &[TrafficSelector],
    ) -> TrafficSelectors<'static> {
        let first = first.filter(|first| side != [*first]);
        let all: Vec<TrafficSelector> = first.into_iter().chain(side.iter().copied()).collect();
        TrafficSelectors::new(&all)
    }

    /// Our side, as it is sent.
    pub(in crate::ike::sa) fn ts_local(&self) -> TrafficSelectors<'static> {
        Self::ts_of(self.packet.map(|(local, _)| local), &self.local)
    }

    /// The peer's side, as it is sent.
    pub(in crate::ike::sa) fn ts_remote(&self) -> TrafficSelectors<'static> {
        Self::ts_of(self.packet.map(|(_, remote)| remote), &self.remote)
    }

    /// The payloads of IKE_AUTH that ask for it.
    pub(in crate::ike::sa) fn first_payloads<'a>(
        &'a self,
        spi: &'a [u8],
    ) -> impl Iterator<Item = Payload<'a>> {
        let offer = proposals::child_offer(&self.proposals, spi, true);
        transport_mode(self.mode).into_iter().chain([
            Payload::SecurityAssociation(offer),
            Payload::TsInitiator(self.ts_local()),
            Payload::TsResponder(self.ts_remote()),
        ])
    }

    /// The group of its key exchange, if it has one.
    pub(in crate::ike::sa) fn group(&self) -> Option<Group> {
        self.private.as_ref().map(PrivateKey::group)
    }

    /// The same once more, with an SPI, a nonce and, later, a private value of its own.
    pub(in crate::ike::sa) fn again(self, shared: &mut Shared) -> Self {
        Self {
            spi_in: shared.allocate_spi(),
            nonce: shared.random_bytes(NONCE_BYTES),
            private: None,
            ..self
        }
    }

    /// The groups in our proposals, in order.
    pub(in crate::ike::sa) fn groups(&self) -> impl Iterator<Item = &Group> {
        self.proposals.iter().flat_map(|proposal| &proposal.groups)
    }

    /// The group that comes first in our proposals.
    pub(in crate::ike::sa) fn first_group(&self) -> Option<Group> {
        self.groups().next().copied()
    }

    pub(in crate::ike::sa) fn spi_of(answer: Option<&ChildAnswer>) -> [u8; 4] {
        match answer {
            Some(ChildAnswer::Agreed { agreed, .. }) => agreed.spi_in.to_be_bytes(),
            Some(ChildAnswer::Refused(_)) | None => [0; 4],
        }
    }

    /// The payloads of an answer that tell of the child.
    pub(in crate::ike::sa) fn answer_payloads<'a>(
        answer: &'a ChildAnswer,
        spi: &'a [u8],
        payloads: &mut Vec<Payload<'a>>,
    ) {
        match answer {
            ChildAnswer::Refused(kind) => {
                payloads.push(Payload::Notify(Notify::new(*kind, &[])));
            }
            ChildAnswer::Agreed {
                agreed,
                number,
                narrowed,
            } => {
                payloads.extend([
                    Payload::SecurityAssociation(proposals::child_answer(
                        &agreed.suite,
                        *number,
                        spi,
                    )),
                    Payload::TsInitiator(TrafficSelectors::new(&agreed.remote)),
                    Payload::TsResponder(TrafficSelectors::new(&agreed.local)),
                ]);
                payloads.extend(transport_mode(agreed.mode));
                if *narrowed {
                    payloads.push(Payload::Notify(Notify::new(
                        NotifyType::ADDITIONAL_TS_POSSIBLE,
                        &[],
                    )));
                }
            }
        }
    }
}

/// What asks for transport mode, or agrees to it.
// RFC 7296 section 1.3.1: without this notify, on either side, the child is in tunnel mode.
pub(in crate::ike::sa) fn transport_mode(mode: Mode) -> Option<Payload<'static>> {
    match mode {
        Mode::Tunnel => None,
        Mode::Transport => Some(Payload::Notify(Notify::new(
            NotifyType::USE_TRANSPORT_MODE,
            &[],
        ))),
    }
}
