//! The Key Exchange payload (RFC 7296 section 3.4).

use crate::ike::message::reader::{ParseError, Reader};
use crate::ike::message::writer::Writer;

/// The key exchange method, once called Diffie-Hellman group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeMethod(pub u16);

/// The payload.
///
/// ```text
/// +-------------------------------+-------------------------------+
/// |            method             |           reserved            |
/// +-------------------------------+-------------------------------+
/// ~                         public value                          ~
/// +---------------------------------------------------------------+
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyExchange<'a> {
    /// The method.
    pub method: KeMethod,
    /// The sender's public value, not checked here.
    pub public: &'a [u8],
}

impl<'a> KeyExchange<'a> {
    /// Reads the body.
    pub fn parse(mut r: Reader<'a>) -> Result<Self, ParseError> {
        let method = KeMethod(r.u16("key exchange method")?);
        r.array::<2>("key exchange reserved")?;
        Ok(Self {
            method,
            public: r.rest(),
        })
    }

    /// Writes the body.
    pub fn emit(&self, w: &mut Writer) {
        w.u16(self.method.0);
        w.u16(0);
        w.bytes(self.public);
    }
}
