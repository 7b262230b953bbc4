//! Sorting of payloads into what an exchange is made of.

use crate::ike::message::{
    Payload, PayloadType,
    payload::{
        Authentication, Delete, Identification, KeyExchange, Nonce, Notify, NotifyType,
        SecurityAssociation, TrafficSelectors,
    },
};

/// Why payloads make no message of their exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SortError {
    /// RFC 7296 section 2.5: a critical payload of a type that we do not know.
    #[error("it has a critical payload of unknown type {}", .0.0)]
    UnknownCritical(PayloadType),
    /// A payload that may be there once is there twice.
    #[error("it has payload {} twice", .0.0)]
    Twice(PayloadType),
    /// A payload that must be there is not.
    #[error("it has no {0} payload")]
    Missing(&'static str),
}

/// All notifies of a message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notifies<'a>(Vec<Notify<'a>>);

impl<'a> Notifies<'a> {
    /// The first of a kind.
    pub fn find(&self, kind: NotifyType) -> Option<&Notify<'a>> {
        self.0.iter().find(|notify| notify.kind == kind)
    }

    /// Whether there is one of a kind.
    pub fn has(&self, kind: NotifyType) -> bool {
        self.find(kind).is_some()
    }

    /// All of a kind.
    pub fn all(&self, kind: NotifyType) -> impl Iterator<Item = &Notify<'a>> {
        self.0.iter().filter(move |notify| notify.kind == kind)
    }

    /// The first error.
    pub fn error(&self) -> Option<NotifyType> {
        self.0
            .iter()
            .map(|notify| notify.kind)
            .find(|kind| kind.is_error())
    }
}

/// Payloads by type.
#[derive(Default)]
struct Sorted<'a> {
    sa: Option<SecurityAssociation<'a>>,
    ke: Option<KeyExchange<'a>>,
    nonce: Option<Nonce<'a>>,
    id_i: Option<Identification<'a>>,
    id_r: Option<Identification<'a>>,
    auth: Option<Authentication<'a>>,
    ts_i: Option<TrafficSelectors<'a>>,
    ts_r: Option<TrafficSelectors<'a>>,
    notifies: Notifies<'a>,
    deletes: Vec<Delete<'a>>,
}

fn once<T>(place: &mut Option<T>, value: T, kind: PayloadType) -> Result<(), SortError> {
    if place.replace(value).is_some() {
        return Err(SortError::Twice(kind));
    }
    Ok(())
}

impl<'a> Sorted<'a> {
    fn new(payloads: Vec<Payload<'a>>) -> Result<Self, SortError> {
        let mut sorted = Self::default();
        for payload in payloads {
            let kind = payload.kind();
            match payload {
                Payload::SecurityAssociation(sa) => once(&mut sorted.sa, sa, kind)?,
                Payload::KeyExchange(ke) => once(&mut sorted.ke, ke, kind)?,
                Payload::Nonce(nonce) => once(&mut sorted.nonce, nonce, kind)?,
                Payload::IdInitiator(id) => once(&mut sorted.id_i, id, kind)?,
                Payload::IdResponder(id) => once(&mut sorted.id_r, id, kind)?,
                Payload::Authentication(auth) => once(&mut sorted.auth, auth, kind)?,
                Payload::TsInitiator(ts) => once(&mut sorted.ts_i, ts, kind)?,
                Payload::TsResponder(ts) => once(&mut sorted.ts_r, ts, kind)?,
                Payload::Notify(notify) => sorted.notifies.0.push(notify),
                Payload::Delete(delete) => sorted.deletes.push(delete),
                Payload::Unknown { critical: true, .. } => {
                    return Err(SortError::UnknownCritical(kind));
                }
                // RFC 7296 section 2.5: what is not critical and of no use to us is skipped.
                Payload::Unknown { .. }
                | Payload::Certificate(_)
                | Payload::CertificateRequest(_)
                | Payload::VendorId(_)
                | Payload::Configuration(_)
                | Payload::Eap(_)
                | Payload::Encrypted(_)
                | Payload::EncryptedFragment { .. } => {}
            }
        }
        Ok(sorted)
    }
}

fn need<T>(value: Option<T>, name: &'static str) -> Result<T, SortError> {
    value.ok_or(SortError::Missing(name))
}

/// IKE_SA_INIT request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitRequest<'a> {
    /// Proposals.
    pub sa: SecurityAssociation<'a>,
    /// Public value of the group that the initiator expects to be chosen.
    pub ke: KeyExchange<'a>,
    /// Nonce.
    pub nonce: Nonce<'a>,
    /// Notifies.
    pub notifies: Notifies<'a>,
}

impl<'a> InitRequest<'a> {
    /// Sorts the payloads.
    ///
    /// # Errors
    ///
    /// [`SortError`], as for all messages.
    pub fn sort(payloads: Vec<Payload<'a>>) -> Result<Self, SortError> {
        let sorted = Sorted::new(payloads)?;
        Ok(Self {
            sa: need(sorted.sa, "SA")?,
            ke: need(sorted.ke, "KE")?,
            nonce: need(sorted.nonce, "Nonce")?,
            notifies: sorted.notifies,
        })
    }
}

/// IKE_SA_INIT response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InitResponse<'a> {
    /// The responder agreed.
    Agreed {
        /// The chosen proposal.
        sa: SecurityAssociation<'a>,
        /// Public value.
        ke: KeyExchange<'a>,
        /// Nonce.
        nonce: Nonce<'a>,
        /// Notifies.
        notifies: Notifies<'a>,
    },
    /// It wants something else first, or refuses.
    Notified(Notifies<'a>),
}

impl<'a> InitResponse<'a> {
    /// Sorts the payloads.
    ///
    /// # Errors
    ///
    /// [`SortError`].
    pub fn sort(payloads: Vec<Payload<'a>>) -> Result<Self, SortError> {
        let sorted = Sorted::new(payloads)?;
        let wants_more = sorted.notifies.error().is_some()
            || (sorted.sa.is_none() && sorted.notifies.has(NotifyType::COOKIE));
        if wants_more {
            return Ok(Self::Notified(sorted.notifies));
        }
        Ok(Self::Agreed {
            sa: need(sorted.sa, "SA")?,
            ke: need(sorted.ke, "KE")?,
            nonce: need(sorted.nonce, "Nonce")?,
            notifies: sorted.notifies,
        })
    }
}

/// The child that an exchange asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChildOffer<'a> {
    /// Proposals.
    pub sa: SecurityAssociation<'a>,
    /// Selectors of the initiator's side.
    pub ts_i: TrafficSelectors<'a>,
    /// Selectors of the responder's side.
    pub ts_r: TrafficSelectors<'a>,
    /// In transport mode (RFC 7296 section 1.3.1): wished for in a request, agreed to in a response.
    pub transport: bool,
}

impl<'a> ChildOffer<'a> {
    fn of(
        sa: Option<SecurityAssociation<'a>>,
        ts_i: Option<TrafficSelectors<'a>>,
        ts_r: Option<TrafficSelectors<'a>>,
        notifies: &Notifies<'a>,
    ) -> Result<Option<Self>, SortError> {
        match (sa, ts_i, ts_r) {
            (None, None, None) => Ok(None),
            (sa, ts_i, ts_r) => Ok(Some(Self {
                sa: need(sa, "SA")?,
                ts_i: need(ts_i, "TSi")?,
                ts_r: need(ts_r, "TSr")?,
                transport: notifies.has(NotifyType::USE_TRANSPORT_MODE),
            })),
        }
    }
}

/// IKE_AUTH request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthRequest<'a> {
    /// Who the initiator is.
    pub id_i: Identification<'a>,
    /// Whom it wants to talk to.
    pub id_r: Option<Identification<'a>>,
    /// Its proof; absent where it wants EAP.
    pub auth: Option<Authentication<'a>>,
    /// The first child; absent in a childless IKE SA (RFC 6023).
    pub child: Option<ChildOffer<'a>>,
    /// Notifies.
    pub notifies: Notifies<'a>,
}

impl<'a> AuthRequest<'a> {
    /// Sorts the payloads.
    ///
    /// # Errors
    ///
    /// [`SortError`].
    pub fn sort(payloads: Vec<Payload<'a>>) -> Result<Self, SortError> {
        let sorted = Sorted::new(payloads)?;
        Ok(Self {
            id_i: need(sorted.id_i, "IDi")?,
            id_r: sorted.id_r,
            auth: sorted.auth,
            child: ChildOffer::of(sorted.sa, sorted.ts_i, sorted.ts_r, &sorted.notifies)?,
            notifies: sorted.notifies,
        })
    }
}

/// IKE_AUTH response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuthResponse<'a> {
    /// The responder proves who it is; the child may have failed all the same.
    Proof {
        /// Who the responder is.
        id_r: Identification<'a>,
        /// Its proof.
        auth: Authentication<'a>,
        /// The child, if it agreed to one.
        child: Option<ChildOffer<'a>>,
        /// Notifies.
        notifies: Notifies<'a>,
    },
    /// It refuses.
    Refused(NotifyType),
}

impl<'a> AuthResponse<'a> {
    /// Sorts the payloads.
    ///
    /// # Errors
    ///
    /// [`SortError`].
    pub fn sort(payloads: Vec<Payload<'a>>) -> Result<Self, SortError> {
        let sorted = Sorted::new(payloads)?;
        match (sorted.id_r, sorted.auth, sorted.notifies.error()) {
            (Some(id_r), Some(auth), _) => Ok(Self::Proof {
                id_r,
                auth,
                child: ChildOffer::of(sorted.sa, sorted.ts_i, sorted.ts_r, &sorted.notifies)?,
                notifies: sorted.notifies,
            }),
            (_, _, Some(error)) => Ok(Self::Refused(error)),
            (None, _, None) => Err(SortError::Missing("IDr")),
            (_, None, None) => Err(SortError::Missing("AUTH")),
        }
    }
}

/// CREATE_CHILD_SA request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChildRequest<'a> {
    /// For a child.
    Child {
        /// The child.
        offer: ChildOffer<'a>,
        /// Nonce.
        nonce: Nonce<'a>,
        /// Public value of a key exchange of its own.
        ke: Option<KeyExchange<'a>>,
        /// Notifies; REKEY_SA tells that it replaces another.
        notifies: Notifies<'a>,
    },
    /// For an IKE SA that takes the place of this one.
    RekeyIke {
        /// Proposals.
        sa: SecurityAssociation<'a>,
        /// Nonce.
        nonce: Nonce<'a>,
        /// Public value.
        ke: KeyExchange<'a>,
    },
}

impl<'a> ChildRequest<'a> {
    /// Sorts the payloads.
    ///
    /// # Errors
    ///
    /// [`SortError`].
    pub fn sort(payloads: Vec<Payload<'a>>) -> Result<Self, SortError> {
        let sorted = Sorted::new(payloads)?;
        let nonce = need(sorted.nonce, "Nonce")?;
        // RFC 7296 section 1.3.2: an IKE SA is rekeyed by an exchange without selectors.
        if sorted.ts_i.is_none()
            && sorted.ts_r.is_none()
            && let Some(sa) = sorted.sa
        {
            let ke = need(sorted.ke, "KE")?;
            return Ok(Self::RekeyIke { sa, nonce, ke });
        }
        Ok(Self::Child {
            offer: need(
                ChildOffer::of(sorted.sa, sorted.ts_i, sorted.ts_r, &sorted.notifies)?,
                "SA",
            )?,
            nonce,
            ke: sorted.ke,
            notifies: sorted.notifies,
        })
    }
}

/// CREATE_CHILD_SA response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChildResponse<'a> {
    /// The responder agreed.
    Agreed {
        /// The child.
        offer: ChildOffer<'a>,
        /// Nonce.
        nonce: Nonce<'a>,
        /// Public value.
        ke: Option<KeyExchange<'a>>,
    },
    /// The responder agreed to an IKE SA that takes the place of this one.
    Ike {
        /// The chosen proposal.
        sa: SecurityAssociation<'a>,
        /// Nonce.
        nonce: Nonce<'a>,
        /// Public value.
        ke: KeyExchange<'a>,
    },
    /// It refuses.
    Refused(Notifies<'a>),
}

impl<'a> ChildResponse<'a> {
    /// Sorts the payloads.
    ///
    /// # Errors
    ///
    /// [`SortError`].
    pub fn sort(payloads: Vec<Payload<'a>>) -> Result<Self, SortError> {
        let sorted = Sorted::new(payloads)?;
        if sorted.notifies.error().is_some() {
            return Ok(Self::Refused(sorted.notifies));
        }
        if sorted.ts_i.is_none()
            && sorted.ts_r.is_none()
            && let Some(sa) = sorted.sa
        {
            return Ok(Self::Ike {
                sa,
                nonce: need(sorted.nonce, "Nonce")?,
                ke: need(sorted.ke, "KE")?,
            });
        }
        Ok(Self::Agreed {
            offer: need(
                ChildOffer::of(sorted.sa, sorted.ts_i, sorted.ts_r, &sorted.notifies)?,
                "SA",
            )?,
            nonce: need(sorted.nonce, "Nonce")?,
            ke: sorted.ke,
        })
    }
}

/// INFORMATIONAL, either direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Informational<'a> {
    /// SAs that the sender deletes.
    pub deletes: Vec<Delete<'a>>,
    /// Notifies.
    pub notifies: Notifies<'a>,
}

impl<'a> Informational<'a> {
    /// Sorts the payloads.
    ///
    /// # Errors
    ///
    /// [`SortError`].
    pub fn sort(payloads: Vec<Payload<'a>>) -> Result<Self, SortError> {
        let sorted = Sorted::new(payloads)?;
        Ok(Self {
            deletes: sorted.deletes,
            notifies: sorted.notifies,
        })
    }
}
