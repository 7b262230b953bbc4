//! The Security Association payload: proposals, transforms and attributes (RFC 7296 section 3.3).

use crate::ike::message::reader::{ParseError, Reader};
use crate::ike::message::writer::Writer;

/// More proposals than any honest offer has.
const MAX_PROPOSALS: usize = 64;
/// More attributes than any transform has.
const MAX_ATTRIBUTES: usize = 8;

/// What an SPI or a proposal is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Protocol(pub u8);

impl Protocol {
    /// None, where a notify concerns no SA.
    pub const NONE: Self = Self(0);
    /// The IKE SA.
    pub const IKE: Self = Self(1);
    /// AH.
    pub const AH: Self = Self(2);
    /// ESP.
    pub const ESP: Self = Self(3);
}

/// What a transform is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransformType(pub u8);

impl TransformType {
    /// Encryption.
    pub const ENCRYPTION: Self = Self(1);
    /// Pseudo-random function.
    pub const PRF: Self = Self(2);
    /// Integrity.
    pub const INTEGRITY: Self = Self(3);
    /// Key exchange method.
    pub const KEY_EXCHANGE: Self = Self(4);
    /// Extended sequence numbers.
    pub const ESN: Self = Self(5);
}

/// The payload: proposals in order of preference in an offer, exactly one in an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecurityAssociation<'a> {
    /// The proposals.
    pub proposals: Vec<Proposal<'a>>,
}

/// One proposal.
///
/// ```text
/// +---------------+---------------+-------------------------------+
/// | last (0) or 2 |   reserved    |        proposal length        |
/// +---------------+---------------+---------------+---------------+
/// |    number     |   protocol    |   SPI size    |  transforms   |
/// +---------------+---------------+---------------+---------------+
/// ~                              SPI                              ~
/// ~                          transforms                           ~
/// +---------------------------------------------------------------+
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposal<'a> {
    /// Number, from 1 in an offer.
    pub number: u8,
    /// Protocol.
    pub protocol: Protocol,
    /// The sender's SPI, empty in IKE_SA_INIT.
    pub spi: &'a [u8],
    /// The transforms of all types.
    pub transforms: Vec<Transform<'a>>,
}

/// One transform.
///
/// ```text
/// +---------------+---------------+-------------------------------+
/// | last (0) or 3 |   reserved    |       transform length        |
/// +---------------+---------------+-------------------------------+
/// |     type      |   reserved    |         transform ID          |
/// +---------------+---------------+-------------------------------+
/// ~                          attributes                           ~
/// +---------------------------------------------------------------+
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transform<'a> {
    /// Type.
    pub kind: TransformType,
    /// Algorithm.
    pub id: u16,
    /// Attributes; only the key length is defined.
    pub attributes: Vec<Attribute<'a>>,
}

/// An attribute, either a 16-bit value or bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attribute<'a> {
    /// The length of a cipher's key.
    KeyLength {
        /// In bits.
        bits: u16,
    },
    /// Another one of two bytes; its type has 15 bits.
    Short(u16, u16),
    /// Another one; its type has 15 bits.
    Long(u16, &'a [u8]),
}

/// What the attributes of a transform say about the length of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyLength {
    /// No attribute at all.
    Absent,
    /// Exactly one key length.
    Bits(u16),
    /// Attributes that nobody has defined.
    // RFC 7296 section 3.3.6: a transform with an attribute that we do not know is not acceptable.
    NotUnderstood,
}

impl Transform<'_> {
    /// The key length, and whether the attributes are understood.
    pub fn key_length(&self) -> KeyLength {
        match self.attributes.as_slice() {
            [] => KeyLength::Absent,
            [Attribute::KeyLength { bits }] => KeyLength::Bits(*bits),
            _ => KeyLength::NotUnderstood,
        }
    }
}

const LAST: u8 = 0;
const MORE_PROPOSALS: u8 = 2;
const MORE_TRANSFORMS: u8 = 3;

impl<'a> SecurityAssociation<'a> {
    /// Reads the body.
    pub fn parse(mut r: Reader<'a>) -> Result<Self, ParseError> {
        let mut proposals = Vec::new();
        loop {
            if proposals.len() == MAX_PROPOSALS {
                return Err(ParseError::TooMany("proposals"));
            }
            let more = r.u8("last proposal")?;
            r.u8("proposal reserved")?;
            let length = r.u16("proposal length")?;
            proposals.push(Proposal::parse(r.body(length, 4, "proposal")?)?);
            match more {
                LAST => break,
                MORE_PROPOSALS => {}
                _ => return Err(ParseError::Invalid("last proposal")),
            }
        }
        r.finish("last proposal")?;
        Ok(Self { proposals })
    }

    /// Writes the body.
    pub fn emit(&self, w: &mut Writer) {
        if self.proposals.is_empty() {
            w.refuse::<()>("security association without proposals");
        }
        for (index, proposal) in self.proposals.iter().enumerate() {
            let last = index + 1 == self.proposals.len();
            w.u8(if last { LAST } else { MORE_PROPOSALS });
            w.u8(0);
            w.with_length(2, "proposal", |w| proposal.emit(w));
        }
    }
}

impl<'a> Proposal<'a> {
    fn parse(mut r: Reader<'a>) -> Result<Self, ParseError> {
        let number = r.u8("proposal number")?;
        let protocol = Protocol(r.u8("protocol")?);
        let spi_size = r.u8("SPI size")?;
        let count = r.u8("number of transforms")?;
        let spi = r.take(spi_size.into(), "SPI")?;
        let transforms = (1..=count)
            .map(|n| Transform::parse(&mut r, n == count))
            .collect::<Result<_, _>>()?;
        r.finish("last transform")?;
        Ok(Self {
            number,
            protocol,
            spi,
            transforms,
        })
    }

    fn emit(&self, w: &mut Writer) {
        w.u8(self.number);
        w.u8(self.protocol.0);
        w.count_u8(self.spi.len(), "SPI");
        w.count_u8(self.transforms.len(), "number of transforms");
        w.bytes(self.spi);
        for (index, transform) in self.transforms.iter().enumerate() {
            let last = index + 1 == self.transforms.len();
            w.u8(if last { LAST } else { MORE_TRANSFORMS });
            w.u8(0);
            w.with_length(2, "transform", |w| transform.emit(w));
        }
    }
}

impl<'a> Transform<'a> {
    fn parse(r: &mut Reader<'a>, last: bool) -> Result<Self, ParseError> {
        if r.u8("last transform")? != if last { LAST } else { MORE_TRANSFORMS } {
            return Err(ParseError::Invalid("last transform"));
        }
        r.u8("transform reserved")?;
        let length = r.u16("transform length")?;
        let mut body = r.body(length, 4, "transform")?;
        let kind = TransformType(body.u8("transform type")?);
        body.u8("transform reserved")?;
        let id = body.u16("transform ID")?;
        let mut attributes = Vec::new();
        while !body.is_empty() {
            if attributes.len() == MAX_ATTRIBUTES {
                return Err(ParseError::TooMany("attributes"));
            }
            attributes.push(Attribute::parse(&mut body)?);
        }
        Ok(Self {
            kind,
            id,
            attributes,
        })
    }

    fn emit(&self, w: &mut Writer) {
        w.u8(self.kind.0);
        w.u8(0);
        w.u16(self.id);
        self.attributes
            .iter()
            .for_each(|attribute| attribute.emit(w));
    }
}

impl<'a> Attribute<'a> {
    const SHORT: u16 = 0x8000;
    const KEY_LENGTH: u16 = 14;

    fn parse(r: &mut Reader<'a>) -> Result<Self, ParseError> {
        let kind = r.u16("attribute type")?;
        let value = r.u16("attribute value or length")?;
        if kind & Self::SHORT == 0 {
            return Ok(Self::Long(kind, r.take(value.into(), "attribute value")?));
        }
        Ok(match kind & !Self::SHORT {
            Self::KEY_LENGTH => Self::KeyLength { bits: value },
            other => Self::Short(other, value),
        })
    }

    fn emit(&self, w: &mut Writer) {
        match *self {
            Self::KeyLength { bits } => Self::Short(Self::KEY_LENGTH, bits).emit(w),
            Self::Short(kind, value) => {
                w.u16(kind | Self::SHORT);
                w.u16(value);
            }
            Self::Long(kind, value) => {
                w.u16(kind & !Self::SHORT);
                w.count_u16(value.len(), "attribute value");
                w.bytes(value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transform(attributes: Vec<Attribute<'_>>) -> Transform<'_> {
        Transform {
            kind: TransformType::ENCRYPTION,
            id: 12,
            attributes,
        }
    }

    // RFC 7296 section 3.3.6: a transform with an attribute that we do not know is not acceptable.
    #[test]
    fn unknown_attributes_are_kept_but_not_understood() {
        assert_eq!(transform(vec![]).key_length(), KeyLength::Absent);
        assert_eq!(
            transform(vec![Attribute::KeyLength { bits: 256 }]).key_length(),
            KeyLength::Bits(256)
        );
        assert_eq!(
            transform(vec![Attribute::Short(15, 1)]).key_length(),
            KeyLength::NotUnderstood
        );
        let twice = vec![
            Attribute::KeyLength { bits: 128 },
            Attribute::KeyLength { bits: 256 },
        ];
        assert_eq!(transform(twice).key_length(), KeyLength::NotUnderstood);
    }

    #[test]
    fn a_count_of_transforms_that_is_wrong_is_refused() {
        let proposal = Proposal {
            number: 1,
            protocol: Protocol::ESP,
            spi: &[1, 2, 3, 4],
            transforms: vec![transform(vec![]); 2],
        };
        let mut w = Writer::new();
        SecurityAssociation {
            proposals: vec![proposal],
        }
        .emit(&mut w);
        let good = w.finish().unwrap();
        assert!(SecurityAssociation::parse(Reader::new(&good)).is_ok());
        for count in [0, 1, 3, 255] {
            let mut bad = good.clone();
            bad[7] = count;
            assert!(
                SecurityAssociation::parse(Reader::new(&bad)).is_err(),
                "{count} transforms"
            );
        }
    }

    #[test]
    fn an_offer_of_nothing_has_no_wire_form() {
        let mut w = Writer::new();
        SecurityAssociation { proposals: vec![] }.emit(&mut w);
        assert!(w.finish().is_err());
    }

    #[test]
    fn proposals_without_end_are_refused() {
        let bytes = [MORE_PROPOSALS, 0, 0, 8, 1, 3, 0, 0].repeat(MAX_PROPOSALS + 1);
        assert_eq!(
            SecurityAssociation::parse(Reader::new(&bytes)),
            Err(ParseError::TooMany("proposals"))
        );
    }
}
