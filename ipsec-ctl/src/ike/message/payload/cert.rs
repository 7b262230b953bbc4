//! The Certificate and Certificate Request payloads (RFC 7296 sections 3.6 and 3.7): of one form, not interpreted here.

use crate::ike::message::reader::{ParseError, Reader};
use crate::ike::message::writer::Writer;

/// What kind of certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CertEncoding(pub u8);

impl CertEncoding {
    /// An X.509 certificate that holds a signing key, in DER.
    pub const X509_SIGNATURE: Self = Self(4);
    /// Hash and URL of an X.509 certificate.
    pub const HASH_AND_URL: Self = Self(12);
}

/// The payload: encoding and data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Certificate<'a> {
    /// The encoding.
    pub encoding: CertEncoding,
    /// The certificate; in a request, hashes of the authorities' keys.
    pub data: &'a [u8],
}

impl<'a> Certificate<'a> {
    /// Reads the body.
    pub fn parse(mut r: Reader<'a>) -> Result<Self, ParseError> {
        Ok(Self {
            encoding: CertEncoding(r.u8("certificate encoding")?),
            data: r.rest(),
        })
    }

    /// Writes the body.
    pub fn emit(&self, w: &mut Writer) {
        w.u8(self.encoding.0);
        w.bytes(self.data);
    }
}
