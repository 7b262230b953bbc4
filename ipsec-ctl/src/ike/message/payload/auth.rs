//! The Authentication payload (RFC 7296 section 3.8).

use std::fmt;

use crate::ike::message::reader::{ParseError, Reader};
use crate::ike::message::writer::Writer;

/// How a side proves its identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AuthMethod(pub u8);

impl AuthMethod {
    /// RSA signature of PKCS #1 1.5.
    pub const RSA: Self = Self(1);
    /// Message integrity code keyed with a shared secret.
    pub const SHARED_KEY: Self = Self(2);
    /// Signature whose algorithm is named in the data (RFC 7427).
    pub const DIGITAL_SIGNATURE: Self = Self(14);
}

/// The payload: method, three reserved bytes, data.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Authentication<'a> {
    /// The method.
    pub method: AuthMethod,
    /// The signature or code. Compare it with `subtle`, not with `==`.
    pub data: &'a [u8],
}

impl fmt::Debug for Authentication<'_> {
    // What can be attacked off-line with a dictionary stays out of logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authentication")
            .field("method", &self.method)
            .finish_non_exhaustive()
    }
}

impl<'a> Authentication<'a> {
    /// Reads the body.
    pub fn parse(mut r: Reader<'a>) -> Result<Self, ParseError> {
        let method = AuthMethod(r.u8("authentication method")?);
        r.array::<3>("authentication reserved")?;
        Ok(Self {
            method,
            data: r.rest(),
        })
    }

    /// Writes the body.
    pub fn emit(&self, w: &mut Writer) {
        w.u8(self.method.0);
        w.bytes(&[0; 3]);
        w.bytes(self.data);
    }
}
