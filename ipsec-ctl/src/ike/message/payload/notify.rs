//! The Notify payload (RFC 7296 section 3.10) and the numbers of its types.

use std::fmt;

use super::Protocol;
use crate::ike::message::reader::{ParseError, Reader};
use crate::ike::message::writer::Writer;

/// What a notify says.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NotifyType(pub u16);

impl NotifyType {
    /// Whether it reports an error rather than a state.
    // RFC 7296 section 3.10.1: types below 16384 report errors.
    pub fn is_error(self) -> bool {
        self.0 < 16384
    }
}

impl fmt::Display for NotifyType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "notify {}", self.0),
        }
    }
}

impl fmt::Debug for NotifyType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One table gives the constants and the names for logs.
macro_rules! notify_types {
    ($($name:ident = $number:literal,)*) => {
        #[expect(missing_docs, reason = "the names are those of IANA's registry, which explains them")]
        impl NotifyType {
            $(pub const $name: Self = Self($number);)*

            /// Its name in IANA's registry.
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

notify_types! {
    UNSUPPORTED_CRITICAL_PAYLOAD = 1,
    INVALID_IKE_SPI = 4,
    INVALID_MAJOR_VERSION = 5,
    INVALID_SYNTAX = 7,
    INVALID_MESSAGE_ID = 9,
    INVALID_SPI = 11,
    NO_PROPOSAL_CHOSEN = 14,
    INVALID_KE_PAYLOAD = 17,
    AUTHENTICATION_FAILED = 24,
    SINGLE_PAIR_REQUIRED = 34,
    NO_ADDITIONAL_SAS = 35,
    INTERNAL_ADDRESS_FAILURE = 36,
    FAILED_CP_REQUIRED = 37,
    TS_UNACCEPTABLE = 38,
    INVALID_SELECTORS = 39,
    UNACCEPTABLE_ADDRESSES = 40,
    UNEXPECTED_NAT_DETECTED = 41,
    TEMPORARY_FAILURE = 43,
    CHILD_SA_NOT_FOUND = 44,
    INITIAL_CONTACT = 16384,
    SET_WINDOW_SIZE = 16385,
    ADDITIONAL_TS_POSSIBLE = 16386,
    IPCOMP_SUPPORTED = 16387,
    NAT_DETECTION_SOURCE_IP = 16388,
    NAT_DETECTION_DESTINATION_IP = 16389,
    COOKIE = 16390,
    USE_TRANSPORT_MODE = 16391,
    HTTP_CERT_LOOKUP_SUPPORTED = 16392,
    REKEY_SA = 16393,
    ESP_TFC_PADDING_NOT_SUPPORTED = 16394,
    NON_FIRST_FRAGMENTS_ALSO = 16395,
    MOBIKE_SUPPORTED = 16396,
    ADDITIONAL_IP4_ADDRESS = 16397,
    ADDITIONAL_IP6_ADDRESS = 16398,
    NO_ADDITIONAL_ADDRESSES = 16399,
    UPDATE_SA_ADDRESSES = 16400,
    COOKIE2 = 16401,
    NO_NATS_ALLOWED = 16402,
    AUTH_LIFETIME = 16403,
    MULTIPLE_AUTH_SUPPORTED = 16404,
    ANOTHER_AUTH_FOLLOWS = 16405,
    REDIRECT_SUPPORTED = 16406,
    REDIRECT = 16407,
    REDIRECTED_FROM = 16408,
    EAP_ONLY_AUTHENTICATION = 16417,
    CHILDLESS_IKEV2_SUPPORTED = 16418,
    QUICK_CRASH_DETECTION = 16419,
    IKEV2_MESSAGE_ID_SYNC_SUPPORTED = 16420,
    IPSEC_REPLAY_COUNTER_SYNC_SUPPORTED = 16421,
    IKEV2_MESSAGE_ID_SYNC = 16422,
    IPSEC_REPLAY_COUNTER_SYNC = 16423,
    IKEV2_FRAGMENTATION_SUPPORTED = 16430,
    SIGNATURE_HASH_ALGORITHMS = 16431,
    USE_PPK = 16435,
    PPK_IDENTITY = 16436,
    NO_PPK_AUTH = 16437,
    INTERMEDIATE_EXCHANGE_SUPPORTED = 16438,
    ADDITIONAL_KEY_EXCHANGE = 16441,
}

/// The payload.
///
/// ```text
/// +---------------+---------------+-------------------------------+
/// |   protocol    |   SPI size    |             type              |
/// +---------------+---------------+-------------------------------+
/// ~                              SPI                              ~
/// ~                             data                              ~
/// +---------------------------------------------------------------+
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notify<'a> {
    /// Protocol of the SA that it concerns, or none.
    pub protocol: Protocol,
    /// SPI of that SA, or empty.
    pub spi: &'a [u8],
    /// What it says.
    pub kind: NotifyType,
    /// Data as the type prescribes.
    pub data: &'a [u8],
}

impl<'a> Notify<'a> {
    /// Makes a notify that concerns no SA.
    pub fn new(kind: NotifyType, data: &'a [u8]) -> Self {
        Self {
            protocol: Protocol::NONE,
            spi: &[],
            kind,
            data,
        }
    }

    /// Reads the body.
    // RFC 7296 section 3.10: the protocol is ignored where there is no SPI, so it is not checked here.
    pub fn parse(mut r: Reader<'a>) -> Result<Self, ParseError> {
        let protocol = Protocol(r.u8("notify protocol")?);
        let spi_size = r.u8("notify SPI size")?;
        let kind = NotifyType(r.u16("notify type")?);
        let spi = r.take(spi_size.into(), "notify SPI")?;
        Ok(Self {
            protocol,
            spi,
            kind,
            data: r.rest(),
        })
    }

    /// Writes the body.
    pub fn emit(&self, w: &mut Writer) {
        w.u8(self.protocol.0);
        w.count_u8(self.spi.len(), "notify SPI");
        w.u16(self.kind.0);
        w.bytes(self.spi);
        w.bytes(self.data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_print_their_registered_name_or_their_number() {
        assert_eq!(
            NotifyType::NO_PROPOSAL_CHOSEN.to_string(),
            "NO_PROPOSAL_CHOSEN"
        );
        assert_eq!(NotifyType(40960).to_string(), "notify 40960");
    }

    // RFC 7296 section 3.10.1: types below 16384 report errors.
    #[test]
    fn types_below_16384_report_errors() {
        assert!(NotifyType(16383).is_error());
        assert!(!NotifyType::INITIAL_CONTACT.is_error());
    }
}
