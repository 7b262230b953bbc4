//! The Nonce payload (RFC 7296 section 3.9).

use crate::ike::message::reader::{ParseError, Reader};
use crate::ike::message::writer::Writer;

/// A nonce of 16 to 256 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Nonce<'a>(&'a [u8]);

impl<'a> Nonce<'a> {
    /// Takes `bytes` for a nonce if it has a permitted length.
    // RFC 7296 section 3.9: a nonce has 16 to 256 bytes.
    pub fn new(bytes: &'a [u8]) -> Result<Self, ParseError> {
        if (16..=256).contains(&bytes.len()) {
            Ok(Self(bytes))
        } else {
            Err(ParseError::Invalid("nonce length"))
        }
    }

    /// The bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.0
    }

    /// Reads the body.
    pub fn parse(mut r: Reader<'a>) -> Result<Self, ParseError> {
        Self::new(r.rest())
    }

    /// Writes the body.
    pub fn emit(&self, w: &mut Writer) {
        w.bytes(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // RFC 7296 section 3.9: a nonce has 16 to 256 bytes.
    #[test]
    fn a_nonce_has_16_to_256_bytes() {
        let bytes = [0; 257];
        for (length, accepted) in [
            (0, false),
            (15, false),
            (16, true),
            (256, true),
            (257, false),
        ] {
            assert_eq!(
                Nonce::parse(Reader::new(&bytes[..length])).is_ok(),
                accepted,
                "{length} bytes"
            );
        }
    }
}
