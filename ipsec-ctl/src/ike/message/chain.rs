//! The chain of payloads: of a datagram, and of what an Encrypted payload held.

use std::ops::Range;

use super::header::Header;
use super::payload::{Encrypted, Part, Payload, PayloadType};
use super::reader::{ParseError, Reader};
use super::writer::{EmitError, Writer};

/// More payloads than any honest message has.
const MAX_PAYLOADS: usize = 128;

/// Length of the generic payload header.
const GENERIC_HEADER: usize = 4;
/// Length of a fragment's numbers.
const PART: usize = 4;

/// A datagram: its header, and its payloads up to an encrypted one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// The header.
    pub header: Header,
    /// The payloads in their order. An encrypted one is the last.
    pub payloads: Vec<Payload<'a>>,
}

impl<'a> Message<'a> {
    /// Reads a datagram.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let mut r = Reader::new(bytes);
        let header = Header::parse(&mut r)?;
        let payloads = parse_chain(
            header.first,
            r,
            Place::Outer {
                length: bytes.len(),
            },
        )?;
        Ok(Self { header, payloads })
    }

    /// Writes the datagram. `header.first` is set from the payloads, which must not be encrypted ones
    /// (see [`frame_encrypted`]).
    pub fn emit(&self) -> Result<Vec<u8>, EmitError> {
        let (first, body) = emit_payloads(&self.payloads)?;
        let mut w = Writer::new();
        Header {
            first,
            ..self.header
        }
        .emit(&mut w, body.len());
        w.bytes(&body);
        w.finish()
    }
}

/// Reads the decrypted content of an Encrypted payload, whose first payload has the type `first`.
pub fn parse_payloads(first: PayloadType, bytes: &[u8]) -> Result<Vec<Payload<'_>>, ParseError> {
    parse_chain(first, Reader::new(bytes), Place::Inner)
}

/// Writes a chain of payloads and tells the type of the first, which the header in front of the chain holds.
pub fn emit_payloads(payloads: &[Payload<'_>]) -> Result<(PayloadType, Vec<u8>), EmitError> {
    let mut w = Writer::new();
    let mut types = payloads.iter().map(Payload::kind);
    let first = types.next().unwrap_or(PayloadType::NONE);
    for payload in payloads {
        w.u8(types.next().unwrap_or(PayloadType::NONE).0);
        w.u8(if payload.is_critical() { CRITICAL } else { 0 });
        w.with_length(2, "payload", |w| payload.emit(w));
    }
    w.finish().map(|bytes| (first, bytes))
}

/// A datagram whose Encrypted payload waits to be filled and sealed in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncryptedFrame {
    /// The whole datagram, with zeros where the body goes.
    pub bytes: Vec<u8>,
    /// What the integrity check covers in front of the body: both headers, and the numbers of a fragment.
    pub associated: Range<usize>,
    /// IV, ciphertext and ICV.
    pub body: Range<usize>,
}

/// Bytes in front of the body of an Encrypted payload, or of a fragment of one.
pub fn encrypted_overhead(fragment: bool) -> usize {
    Header::LENGTH + GENERIC_HEADER + if fragment { PART } else { 0 }
}

/// Writes both headers of a datagram with one Encrypted payload, or with one part of it, and leaves `body` bytes for IV,
/// ciphertext and ICV. `first` is the type of the first payload inside.
pub fn frame_encrypted(
    header: &Header,
    first: PayloadType,
    part: Option<Part>,
    body: usize,
) -> Result<EncryptedFrame, EmitError> {
    // An absurd length must be refused before memory is taken for it.
    if u16::try_from(encrypted_overhead(part.is_some()))
        .is_ok_and(|heads| usize::from(u16::MAX - heads) < body)
    {
        return Err(EmitError("message"));
    }
    let mut w = Writer::new();
    let kind = match part {
        None => PayloadType::ENCRYPTED,
        Some(_) => PayloadType::ENCRYPTED_FRAGMENT,
    };
    let payload = encrypted_overhead(part.is_some()) - Header::LENGTH + body;
    Header {
        first: kind,
        ..*header
    }
    .emit(&mut w, payload);
    w.u8(first.0);
    w.u8(0);
    w.with_length(2, "payload", |w| {
        if let Some(Part { number, total }) = part {
            w.u16(number);
            w.u16(total);
        }
        w.bytes(&vec![0; body]);
    });
    let bytes = w.finish()?;
    let start = bytes.len() - body;
    Ok(EncryptedFrame {
        associated: 0..start,
        body: start..bytes.len(),
        bytes,
    })
}

const CRITICAL: u8 = 0x80;

#[derive(Clone, Copy)]
enum Place {
    Outer { length: usize },
    Inner,
}

fn parse_chain<'a>(
    first: PayloadType,
    mut r: Reader<'a>,
    place: Place,
) -> Result<Vec<Payload<'a>>, ParseError> {
    let mut payloads = Vec::new();
    let mut kind = first;
    while kind != PayloadType::NONE {
        if payloads.len() == MAX_PAYLOADS {
            return Err(ParseError::TooMany("payloads"));
        }
        let next = PayloadType(r.u8("next payload")?);
        // RFC 7296 section 2.5: of the flags only the critical bit counts, the reserved ones are ignored.
        let critical = r.u8("payload flags")? & CRITICAL != 0;
        let length = r.u16("payload length")?;
        let body = r.body(length, GENERIC_HEADER, "payload")?;
        if kind == PayloadType::ENCRYPTED || kind == PayloadType::ENCRYPTED_FRAGMENT {
            payloads.push(encrypted(kind, next, body, r, place)?);
            return Ok(payloads);
        }
        payloads.push(Payload::parse(kind, critical, body)?);
        kind = next;
    }
    r.finish("last payload")?;
    Ok(payloads)
}

/// The payload that ends an outer chain.
// RFC 7296 section 3.14: an Encrypted payload is the last of its message, and its next-payload field tells the type
// of the first payload inside.
fn encrypted<'a>(
    kind: PayloadType,
    first: PayloadType,
    mut body: Reader<'a>,
    behind: Reader<'_>,
    place: Place,
) -> Result<Payload<'a>, ParseError> {
    let Place::Outer { length } = place else {
        return Err(ParseError::Invalid("encrypted payload inside another"));
    };
    behind.finish("encrypted payload")?;
    let content = |body: &Reader<'_>| {
        let start = length - body.remaining();
        Encrypted {
            first,
            associated: 0..start,
            body: start..length,
        }
    };
    if kind == PayloadType::ENCRYPTED {
        return Ok(Payload::Encrypted(content(&body)));
    }
    // RFC 7383 section 2.5: fragments are numbered from 1 to their total.
    let (number, total) = (body.u16("fragment number")?, body.u16("total fragments")?);
    if number == 0 || number > total {
        return Err(ParseError::Invalid("fragment number"));
    }
    Ok(Payload::EncryptedFragment {
        content: content(&body),
        part: Part { number, total },
    })
}

#[cfg(test)]
mod tests;
