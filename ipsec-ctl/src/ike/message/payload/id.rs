//! The Identification payloads (RFC 7296 section 3.5).

use crate::ike::message::reader::{ParseError, Reader};
use crate::ike::message::writer::Writer;

/// What kind of name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IdType(pub u8);

impl IdType {
    /// An IPv4 address.
    pub const IPV4: Self = Self(1);
    /// A domain name.
    pub const FQDN: Self = Self(2);
    /// An e-mail address.
    pub const RFC822: Self = Self(3);
    /// An IPv6 address.
    pub const IPV6: Self = Self(5);
    /// An X.500 distinguished name in DER.
    pub const DER_ASN1_DN: Self = Self(9);
    /// Bytes that only the two sides understand.
    pub const KEY_ID: Self = Self(11);
}

/// The payload: type, three reserved bytes, data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identification<'a> {
    /// The type.
    pub kind: IdType,
    /// The name. Text is not checked to be text.
    pub data: &'a [u8],
}

impl<'a> Identification<'a> {
    /// Reads the body.
    pub fn parse(mut r: Reader<'a>) -> Result<Self, ParseError> {
        let kind = IdType(r.u8("ID type")?);
        r.array::<3>("ID reserved")?;
        let data = r.rest();
        match (kind, data.len()) {
            (IdType::IPV4, 4) | (IdType::IPV6, 16) => {}
            (IdType::IPV4 | IdType::IPV6, _) => return Err(ParseError::Invalid("ID address")),
            _ => {}
        }
        Ok(Self { kind, data })
    }

    /// Writes the body, which is also what the sender's proof covers.
    // RFC 7296 section 2.15: the proof covers the body of the ID payload without its generic header.
    pub fn emit(&self, w: &mut Writer) {
        w.u8(self.kind.0);
        w.bytes(&[0; 3]);
        w.bytes(self.data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_another_length_is_refused() {
        assert!(Identification::parse(Reader::new(&[1, 0, 0, 0, 10, 0, 0, 1])).is_ok());
        let short = Identification::parse(Reader::new(&[1, 0, 0, 0, 10, 0, 0]));
        assert_eq!(short, Err(ParseError::Invalid("ID address")));
        let long = Identification::parse(Reader::new(&[5, 0, 0, 0, 10, 0, 0, 1]));
        assert_eq!(long, Err(ParseError::Invalid("ID address")));
    }
}
