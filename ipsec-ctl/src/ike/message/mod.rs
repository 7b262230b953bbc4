//! IKEv2 messages as bytes and as values (RFC 7296 section 3).
//!
//! Parsing borrows from the datagram, so it costs no more than one small value per structure of four bytes or more,
//! and the number of structures is limited besides. Unknown numbers are kept. Which payloads an exchange may or must
//! hold is not decided here, nor is anything encrypted or verified.

mod chain;
mod header;
pub mod payload;
mod reader;
mod writer;

pub use chain::{
    EncryptedFrame, Message, emit_payloads, encrypted_overhead, frame_encrypted, parse_payloads,
};
pub use header::{ExchangeType, Flags, Header, IkeSpi, MessageId};
pub use payload::{Payload, PayloadType};
pub use reader::{ParseError, Reader};
pub use writer::{EmitError, Writer};
