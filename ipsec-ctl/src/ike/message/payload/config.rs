//! The Configuration payload (RFC 7296 section 3.15), its attributes kept as bytes.

use crate::ike::message::reader::{ParseError, Reader};
use crate::ike::message::writer::Writer;

/// More attributes than any honest peer asks for.
const MAX_ATTRIBUTES: usize = 64;

/// Request, reply, or one of the two that nobody uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConfigType(pub u8);

impl ConfigType {
    /// CFG_REQUEST.
    pub const REQUEST: Self = Self(1);
    /// CFG_REPLY.
    pub const REPLY: Self = Self(2);
    /// CFG_SET.
    pub const SET: Self = Self(3);
    /// CFG_ACK.
    pub const ACK: Self = Self(4);
}

/// The payload: type, three reserved bytes, attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration<'a> {
    /// The type.
    pub kind: ConfigType,
    /// The attributes.
    pub attributes: Vec<ConfigAttribute<'a>>,
}

/// One attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigAttribute<'a> {
    /// Its type, of 15 bits.
    pub kind: u16,
    /// Its value.
    pub value: &'a [u8],
}

impl<'a> Configuration<'a> {
    /// Reads the body.
    pub fn parse(mut r: Reader<'a>) -> Result<Self, ParseError> {
        let kind = ConfigType(r.u8("configuration type")?);
        r.array::<3>("configuration reserved")?;
        let mut attributes = Vec::new();
        while !r.is_empty() {
            if attributes.len() == MAX_ATTRIBUTES {
                return Err(ParseError::TooMany("configuration attributes"));
            }
            // RFC 7296 section 3.15.1: the highest bit is reserved and ignored.
            let kind = r.u16("configuration attribute type")? & 0x7fff;
            let length = r.u16("configuration attribute length")?;
            attributes.push(ConfigAttribute {
                kind,
                value: r.take(length.into(), "configuration attribute")?,
            });
        }
        Ok(Self { kind, attributes })
    }

    /// Writes the body.
    pub fn emit(&self, w: &mut Writer) {
        w.u8(self.kind.0);
        w.bytes(&[0; 3]);
        for attribute in &self.attributes {
            w.u16(attribute.kind & 0x7fff);
            w.count_u16(attribute.value.len(), "configuration attribute");
            w.bytes(attribute.value);
        }
    }
}
