//! The IKE header (RFC 7296 section 3.1).

use std::fmt;

use serde::{Deserialize, Serialize};

use super::payload::PayloadType;
use super::reader::{ParseError, Reader};
use super::writer::Writer;

/// SPI of one side of an IKE SA; 0 while the responder's is not known.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct IkeSpi(pub u64);

impl fmt::Display for IkeSpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Number of a request and of its response.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct MessageId(pub u32);

/// What an exchange is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ExchangeType(pub u8);

impl ExchangeType {
    /// Algorithms, key exchange and nonces.
    pub const IKE_SA_INIT: Self = Self(34);
    /// Identities, proofs of them, and the first child.
    pub const IKE_AUTH: Self = Self(35);
    /// Further children, and rekeying.
    pub const CREATE_CHILD_SA: Self = Self(36);
    /// Deletion, errors, liveness.
    pub const INFORMATIONAL: Self = Self(37);
}

/// The flags of the header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// The sender is the original initiator of the IKE SA.
    pub initiator: bool,
    /// The sender could also speak a higher major version.
    pub version: bool,
    /// A response, not a request.
    pub response: bool,
}

impl Flags {
    const INITIATOR: u8 = 0x08;
    const VERSION: u8 = 0x10;
    const RESPONSE: u8 = 0x20;

    // RFC 7296 section 3.1: the other bits are ignored on receipt and sent as zero.
    fn from_bits(bits: u8) -> Self {
        Self {
            initiator: bits & Self::INITIATOR != 0,
            version: bits & Self::VERSION != 0,
            response: bits & Self::RESPONSE != 0,
        }
    }

    fn bits(self) -> u8 {
        let bit = |set, bit| if set { bit } else { 0 };
        bit(self.initiator, Self::INITIATOR)
            | bit(self.version, Self::VERSION)
            | bit(self.response, Self::RESPONSE)
    }
}

/// The header without its length, which only counts when read and is computed when written.
///
/// ```text
///                      1                   2                   3
///  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
/// +---------------------------------------------------------------+
/// |                    IKE SA initiator's SPI                     |
/// |                                                               |
/// +---------------------------------------------------------------+
/// |                    IKE SA responder's SPI                     |
/// |                                                               |
/// +---------------+-------+-------+---------------+---------------+
/// | next payload  | major | minor | exchange type |     flags     |
/// +---------------+-------+-------+---------------+---------------+
/// |                          message ID                           |
/// +---------------------------------------------------------------+
/// |                            length                             |
/// +---------------------------------------------------------------+
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// SPI of the original initiator.
    pub spi_i: IkeSpi,
    /// SPI of the original responder.
    pub spi_r: IkeSpi,
    /// Type of the first payload.
    pub first: PayloadType,
    /// Minor version of the sender.
    pub minor: u8,
    /// Type of the exchange.
    pub exchange: ExchangeType,
    /// Flags.
    pub flags: Flags,
    /// Message ID.
    pub message_id: MessageId,
}

impl Header {
    /// Length in bytes.
    pub const LENGTH: usize = 28;

    /// Reads the header of a datagram that `r` stands at the start of, and checks the length it claims.
    pub fn parse(r: &mut Reader<'_>) -> Result<Self, ParseError> {
        let datagram = r.remaining();
        let spi_i = IkeSpi(r.u64("initiator's SPI")?);
        let spi_r = IkeSpi(r.u64("responder's SPI")?);
        let first = PayloadType(r.u8("first payload")?);
        let version = r.u8("version")?;
        // RFC 7296 section 2.5: another major version is refused, a higher minor version is not.
        if version >> 4 != 2 {
            return Err(ParseError::MajorVersion(version >> 4));
        }
        let exchange = ExchangeType(r.u8("exchange type")?);
        let flags = Flags::from_bits(r.u8("flags")?);
        let message_id = MessageId(r.u32("message ID")?);
        let length = r.u32("message length")?;
        if usize::try_from(length) != Ok(datagram) {
            return Err(ParseError::Invalid("message length"));
        }
        Ok(Self {
            spi_i,
            spi_r,
            first,
            minor: version & 0x0f,
            exchange,
            flags,
            message_id,
        })
    }

    /// Writes the header of a message with `body` bytes behind it.
    pub fn emit(&self, w: &mut Writer, body: usize) {
        w.u64(self.spi_i.0);
        w.u64(self.spi_r.0);
        w.u8(self.first.0);
        w.u8(0x20 | (self.minor & 0x0f));
        w.u8(self.exchange.0);
        w.u8(self.flags.bits());
        w.u32(self.message_id.0);
        // The field has 32 bits, but nothing longer than 16 bits' worth fits into a datagram.
        w.u16(0);
        w.count_u16(Self::LENGTH + body, "message");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of_version(version: u8) -> Vec<u8> {
        let mut bytes = vec![7; 28];
        bytes[17] = version;
        bytes[24..].copy_from_slice(&28u32.to_be_bytes());
        bytes
    }

    // RFC 7296 section 2.5: a higher minor version is accepted.
    #[test]
    fn a_higher_minor_version_is_accepted() {
        let header = Header::parse(&mut Reader::new(&bytes_of_version(0x2f))).unwrap();
        assert_eq!(header.minor, 15);
    }

    // RFC 7296 section 2.5: another major version is refused, and says which.
    #[test]
    fn another_major_version_is_refused() {
        for major in [0, 1, 3, 15] {
            let refused = Header::parse(&mut Reader::new(&bytes_of_version(major << 4)));
            assert_eq!(refused, Err(ParseError::MajorVersion(major)));
        }
    }

    #[test]
    fn a_length_other_than_the_datagrams_is_refused() {
        let mut bytes = bytes_of_version(0x20);
        bytes[27] += 1;
        assert_eq!(
            Header::parse(&mut Reader::new(&bytes)),
            Err(ParseError::Invalid("message length"))
        );
        bytes.push(0);
        assert!(Header::parse(&mut Reader::new(&bytes)).is_ok());
        bytes.push(0);
        assert_eq!(
            Header::parse(&mut Reader::new(&bytes)),
            Err(ParseError::Invalid("message length"))
        );
    }
}
