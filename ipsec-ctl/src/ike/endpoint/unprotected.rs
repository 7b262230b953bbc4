//! Responses without protection, to what belongs to no IKE SA (RFC 7296 sections 1.5, 2.5 and 2.21.1).
//!
//! Anybody can ask for them under any name, so they are few and no longer than what they answer.

use std::{net::SocketAddr, time::Duration};

use super::{Endpoint, Refusal};
use crate::ike::{
    event::Transmit,
    exchange::SortError,
    message::{
        ExchangeType, Flags, Header, IkeSpi, Message, ParseError, Payload, PayloadType, Reader,
        payload::{Notify, NotifyType},
    },
    time::Time,
};

/// So many within [`PERIOD`] and no more.
const MOST: u32 = 10;
const PERIOD: Duration = Duration::from_secs(1);

/// A limit on how often something is done at the wish of strangers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rate {
    since: Time,
    done: u32,
}

impl Rate {
    /// Whether it may be done once more.
    pub(super) fn allows(&mut self, now: Time) -> bool {
        if now - self.since >= PERIOD {
            *self = Self {
                since: now,
                done: 0,
            };
        }
        let allowed = self.done < MOST;
        self.done = self.done.saturating_add(1);
        allowed
    }
}

impl Endpoint {
    /// A datagram that is no message. One of a later version of IKE is told which version we speak.
    pub(super) fn not_understood(
        &mut self,
        now: Time,
        local: SocketAddr,
        remote: SocketAddr,
        bytes: &[u8],
        error: ParseError,
    ) {
        self.shared.refuse(Refusal::Malformed);
        // RFC 7296 section 2.5: version 1 knows no such answer.
        if let (ParseError::MajorVersion(3..), Some(header)) = (error, as_ours(bytes)) {
            let kind = NotifyType::INVALID_MAJOR_VERSION;
            self.answer_stranger(now, local, remote, &header, kind, &[]);
        }
    }

    /// A message for an IKE SA that we do not have: the peer may not know that we have started anew.
    // RFC 7296 section 1.5: only a request is answered, and one notify is all that may be said.
    pub(super) fn unknown_spi(
        &mut self,
        now: Time,
        local: SocketAddr,
        remote: SocketAddr,
        message: &Message<'_>,
    ) {
        self.shared.refuse(Refusal::UnknownSpi);
        if matches!(message.payloads.last(), Some(Payload::Encrypted(_))) {
            let kind = NotifyType::INVALID_IKE_SPI;
            self.answer_stranger(now, local, remote, &message.header, kind, &[]);
        }
    }

    /// An IKE_SA_INIT that lacks something, or asks for what we do not know.
    pub(super) fn bad_init(
        &mut self,
        now: Time,
        local: SocketAddr,
        remote: SocketAddr,
        header: &Header,
        error: SortError,
    ) {
        self.shared.refuse(Refusal::Malformed);
        match error {
            SortError::UnknownCritical(PayloadType(number)) => {
                let kind = NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD;
                self.answer_stranger(now, local, remote, header, kind, &[number]);
            }
            SortError::Twice(_) | SortError::Missing(_) => {
                let kind = NotifyType::INVALID_SYNTAX;
                self.answer_stranger(now, local, remote, header, kind, &[]);
            }
        }
    }

    fn answer_stranger(
        &mut self,
        now: Time,
        local: SocketAddr,
        remote: SocketAddr,
        request: &Header,
        kind: NotifyType,
        data: &[u8],
    ) {
        if request.flags.response || !self.courtesy.allows(now) {
            return;
        }
        let answer = respond(local, remote, request, kind, data);
        self.shared.transmits.extend(answer);
    }
}

/// A response without state to an IKE_SA_INIT: the responder's SPI stays zero.
pub(super) fn notify(
    local: SocketAddr,
    remote: SocketAddr,
    spi_i: IkeSpi,
    kind: NotifyType,
    data: &[u8],
) -> Option<Transmit> {
    let request = Header {
        spi_i,
        spi_r: IkeSpi(0),
        first: PayloadType::NONE,
        minor: 0,
        exchange: ExchangeType::IKE_SA_INIT,
        flags: Flags {
            initiator: true,
            version: false,
            response: false,
        },
        message_id: crate::ike::message::MessageId(0),
    };
    respond(local, remote, &request, kind, data)
}

fn respond(
    local: SocketAddr,
    remote: SocketAddr,
    request: &Header,
    kind: NotifyType,
    data: &[u8],
) -> Option<Transmit> {
    let message = Message {
        header: Header {
            minor: 0,
            flags: Flags {
                initiator: !request.flags.initiator,
                version: false,
                response: true,
            },
            ..*request
        },
        payloads: vec![Payload::Notify(Notify::new(kind, data))],
    };
    message.emit().ok().map(|bytes| Transmit {
        local,
        remote,
        bytes,
    })
}

/// The header of a message of a later version, as far as it is like ours.
fn as_ours(bytes: &[u8]) -> Option<Header> {
    const VERSION: usize = 17;
    let mut bytes = bytes.to_vec();
    *bytes.get_mut(VERSION)? = 0x20;
    Header::parse(&mut Reader::new(&bytes)).ok()
}
