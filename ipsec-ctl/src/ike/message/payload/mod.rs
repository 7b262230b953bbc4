//! The payloads of RFC 7296 section 3, one type each, and the enum of them all.

mod auth;
mod cert;
mod config;
mod delete;
mod id;
mod key_exchange;
mod nonce;
mod notify;
mod sa;
mod ts;

use std::ops::Range;

use super::reader::{ParseError, Reader};
use super::writer::Writer;

pub use auth::{AuthMethod, Authentication};
pub use cert::{CertEncoding, Certificate};
pub use config::{ConfigAttribute, ConfigType, Configuration};
pub use delete::Delete;
pub use id::{IdType, Identification};
pub use key_exchange::{KeMethod, KeyExchange};
pub use nonce::Nonce;
pub use notify::{Notify, NotifyType};
pub use sa::{
    Attribute, KeyLength, Proposal, Protocol, SecurityAssociation, Transform, TransformType,
};
pub use ts::{TrafficSelectors, WireSelector};

/// Number of a payload's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PayloadType(pub u8);

impl PayloadType {
    /// No further payload.
    pub const NONE: Self = Self(0);
    /// Security Association.
    pub const SECURITY_ASSOCIATION: Self = Self(33);
    /// Key Exchange.
    pub const KEY_EXCHANGE: Self = Self(34);
    /// Identification of the initiator.
    pub const ID_INITIATOR: Self = Self(35);
    /// Identification of the responder.
    pub const ID_RESPONDER: Self = Self(36);
    /// Certificate.
    pub const CERTIFICATE: Self = Self(37);
    /// Certificate Request.
    pub const CERTIFICATE_REQUEST: Self = Self(38);
    /// Authentication.
    pub const AUTHENTICATION: Self = Self(39);
    /// Nonce.
    pub const NONCE: Self = Self(40);
    /// Notify.
    pub const NOTIFY: Self = Self(41);
    /// Delete.
    pub const DELETE: Self = Self(42);
    /// Vendor ID.
    pub const VENDOR_ID: Self = Self(43);
    /// Traffic Selectors of the initiator.
    pub const TS_INITIATOR: Self = Self(44);
    /// Traffic Selectors of the responder.
    pub const TS_RESPONDER: Self = Self(45);
    /// Encrypted.
    pub const ENCRYPTED: Self = Self(46);
    /// Configuration.
    pub const CONFIGURATION: Self = Self(47);
    /// EAP.
    pub const EAP: Self = Self(48);
    /// Encrypted fragment (RFC 7383).
    pub const ENCRYPTED_FRAGMENT: Self = Self(53);
}

/// A payload, its content understood as far as its form goes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "each variant is named for the payload it holds"
)]
pub enum Payload<'a> {
    SecurityAssociation(SecurityAssociation<'a>),
    KeyExchange(KeyExchange<'a>),
    IdInitiator(Identification<'a>),
    IdResponder(Identification<'a>),
    Certificate(Certificate<'a>),
    CertificateRequest(Certificate<'a>),
    Authentication(Authentication<'a>),
    Nonce(Nonce<'a>),
    Notify(Notify<'a>),
    Delete(Delete<'a>),
    VendorId(&'a [u8]),
    TsInitiator(TrafficSelectors<'a>),
    TsResponder(TrafficSelectors<'a>),
    Configuration(Configuration<'a>),
    /// An EAP message, which is none of IKE's business.
    Eap(&'a [u8]),
    /// Everything behind it is encrypted. Written by [`super::frame_encrypted`] alone.
    Encrypted(Encrypted),
    /// Part of a message that was split (RFC 7383).
    EncryptedFragment {
        content: Encrypted,
        part: Part,
    },
    /// A type that we do not know.
    Unknown {
        kind: PayloadType,
        critical: bool,
        body: &'a [u8],
    },
}

/// Where things are in a datagram that ends with an Encrypted payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encrypted {
    /// Type of the first payload inside.
    pub first: PayloadType,
    /// What the integrity check covers in front of the body: all up to the end of the payload's header, which in a
    /// fragment ends with its numbers.
    pub associated: Range<usize>,
    /// IV, ciphertext and ICV.
    pub body: Range<usize>,
}

/// Which part of a split message a fragment is (RFC 7383 section 2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// From 1 to `total`.
    pub number: u16,
    /// Fragments of the message.
    pub total: u16,
}

impl<'a> Payload<'a> {
    /// Reads the body `r` of a payload that is not encrypted.
    // RFC 7296 section 2.5: the critical bit says nothing about payloads that we know.
    pub(super) fn parse(
        kind: PayloadType,
        critical: bool,
        mut r: Reader<'a>,
    ) -> Result<Self, ParseError> {
        Ok(match kind {
            PayloadType::SECURITY_ASSOCIATION => {
                Self::SecurityAssociation(SecurityAssociation::parse(r)?)
            }
            PayloadType::KEY_EXCHANGE => Self::KeyExchange(KeyExchange::parse(r)?),
            PayloadType::ID_INITIATOR => Self::IdInitiator(Identification::parse(r)?),
            PayloadType::ID_RESPONDER => Self::IdResponder(Identification::parse(r)?),
            PayloadType::CERTIFICATE => Self::Certificate(Certificate::parse(r)?),
            PayloadType::CERTIFICATE_REQUEST => Self::CertificateRequest(Certificate::parse(r)?),
            PayloadType::AUTHENTICATION => Self::Authentication(Authentication::parse(r)?),
            PayloadType::NONCE => Self::Nonce(Nonce::parse(r)?),
            PayloadType::NOTIFY => Self::Notify(Notify::parse(r)?),
            PayloadType::DELETE => Self::Delete(Delete::parse(r)?),
            PayloadType::VENDOR_ID => Self::VendorId(r.rest()),
            PayloadType::TS_INITIATOR => Self::TsInitiator(TrafficSelectors::parse(r)?),
            PayloadType::TS_RESPONDER => Self::TsResponder(TrafficSelectors::parse(r)?),
            PayloadType::CONFIGURATION => Self::Configuration(Configuration::parse(r)?),
            PayloadType::EAP => Self::Eap(r.rest()),
            kind => Self::Unknown {
                kind,
                critical,
                body: r.rest(),
            },
        })
    }

    /// Writes the body.
    pub(super) fn emit(&self, w: &mut Writer) {
        match self {
            Self::SecurityAssociation(sa) => sa.emit(w),
            Self::KeyExchange(ke) => ke.emit(w),
            Self::IdInitiator(id) | Self::IdResponder(id) => id.emit(w),
            Self::Certificate(cert) | Self::CertificateRequest(cert) => cert.emit(w),
            Self::Authentication(auth) => auth.emit(w),
            Self::Nonce(nonce) => nonce.emit(w),
            Self::Notify(notify) => notify.emit(w),
            Self::Delete(delete) => delete.emit(w),
            Self::TsInitiator(ts) | Self::TsResponder(ts) => ts.emit(w),
            Self::Configuration(config) => config.emit(w),
            Self::VendorId(body) | Self::Eap(body) | Self::Unknown { body, .. } => w.bytes(body),
            Self::Encrypted(_) | Self::EncryptedFragment { .. } => {
                w.refuse("encrypted payload among others")
            }
        }
    }

    /// Its type.
    pub fn kind(&self) -> PayloadType {
        match self {
            Self::SecurityAssociation(_) => PayloadType::SECURITY_ASSOCIATION,
            Self::KeyExchange(_) => PayloadType::KEY_EXCHANGE,
            Self::IdInitiator(_) => PayloadType::ID_INITIATOR,
            Self::IdResponder(_) => PayloadType::ID_RESPONDER,
            Self::Certificate(_) => PayloadType::CERTIFICATE,
            Self::CertificateRequest(_) => PayloadType::CERTIFICATE_REQUEST,
            Self::Authentication(_) => PayloadType::AUTHENTICATION,
            Self::Nonce(_) => PayloadType::NONCE,
            Self::Notify(_) => PayloadType::NOTIFY,
            Self::Delete(_) => PayloadType::DELETE,
            Self::VendorId(_) => PayloadType::VENDOR_ID,
            Self::TsInitiator(_) => PayloadType::TS_INITIATOR,
            Self::TsResponder(_) => PayloadType::TS_RESPONDER,
            Self::Configuration(_) => PayloadType::CONFIGURATION,
            Self::Eap(_) => PayloadType::EAP,
            Self::Encrypted(_) => PayloadType::ENCRYPTED,
            Self::EncryptedFragment { .. } => PayloadType::ENCRYPTED_FRAGMENT,
            Self::Unknown { kind, .. } => *kind,
        }
    }

    /// Whether whoever does not know this payload must refuse the message. Never so for a known one.
    pub fn is_critical(&self) -> bool {
        matches!(self, Self::Unknown { critical: true, .. })
    }
}
