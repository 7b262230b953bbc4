//! IKE as it arrives: whose message it may be, with nothing of it believed.

use super::{Frame, Outline, PROTOCOL_UDP, UDP_HEADER_BYTES};

/// Bytes of the header behind which a message's payloads begin (RFC 7296 section 3.1).
const HEADER_BYTES: usize = 28;
/// Flag of all messages of who has started the IKE SA.
const INITIATOR: u8 = 0x08;
/// Notify payload, and the notification that brings a cookie back (RFC 7296 sections 3.2 and 3.10.1).
const NOTIFY: u8 = 41;
const COOKIE: u16 = 16_390;

/// An SPI of an IKE SA, in network order; all zero is none.
pub type IkeSpi = [u8; 8];

/// A datagram to a port of IKE that is not ESP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ike {
    /// The SPI that we would have chosen, if there is an IKE SA already.
    pub ours: IkeSpi,
    /// What it asks for.
    pub stage: Stage,
}

/// How far an exchange has come that a datagram belongs to.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It begins one, or is no IKE message at all.
    First = 0,
    /// It brings a cookie of ours back, or belongs to an IKE SA, as it says.
    Later = 1,
}

/// Number of stages.
pub const STAGES: u32 = 2;

/// The SPI that is ours in a message that we send, if it has one.
pub fn own_spi(message: &[u8]) -> Option<IkeSpi> {
    let (initiator, responder, flags) = spis(message, 0)?;
    let ours = if flags & INITIATOR != 0 {
        initiator
    } else {
        responder
    };
    (ours != [0; 8]).then_some(ours)
}

/// Initiator's SPI, responder's SPI and flags of a message at an offset.
#[inline(always)]
fn spis<F: Frame + ?Sized>(frame: &F, at: usize) -> Option<(IkeSpi, IkeSpi, u8)> {
    let [_, _, _, flags]: [u8; 4] = frame.read(at + 16)?;
    Some((frame.read(at)?, frame.read(at + 8)?, flags))
}

impl Outline {
    /// IKE, as far as ports tell: to `ike_port`, or to `nat_port` and no ESP.
    #[inline(always)]
    pub fn ike<F: Frame + ?Sized>(&self, frame: &F, ike_port: u16, nat_port: u16) -> Option<Ike> {
        if self.protocol != PROTOCOL_UDP || self.is_fragment || self.has_options {
            return None;
        }
        let [high, low]: [u8; 2] = frame.read(self.transport + 2)?;
        let port = u16::from_be_bytes([high, low]);
        // RFC 3948 section 2.2: four zero bytes before the message.
        let marker = match port {
            0 => return None,
            port if port == ike_port => 0,
            port if port == nat_port => 4,
            _ => return None,
        };
        let message = self.transport + UDP_HEADER_BYTES + marker;
        Some(header(frame, message).unwrap_or(Ike {
            ours: [0; 8],
            stage: Stage::First,
        }))
    }
}

#[inline(always)]
fn header<F: Frame + ?Sized>(frame: &F, at: usize) -> Option<Ike> {
    let (initiator, responder, flags) = spis(frame, at)?;
    let [first]: [u8; 1] = frame.read(at + 16)?;
    // The SPI of who did not send it.
    let ours = if flags & INITIATOR != 0 {
        responder
    } else {
        initiator
    };
    let later = ours != [0; 8] || (first == NOTIFY && brings_cookie(frame, at + HEADER_BYTES));
    Some(Ike {
        ours,
        stage: if later { Stage::Later } else { Stage::First },
    })
}

// RFC 7296 section 2.6: who was asked for a cookie repeats its request with the cookie as the first payload.
#[inline(always)]
fn brings_cookie<F: Frame + ?Sized>(frame: &F, at: usize) -> bool {
    frame
        .read(at + 6)
        .is_some_and(|kind| u16::from_be_bytes(kind) == COOKIE)
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::{
        super::tests::{ethernet, udp, v4},
        *,
    };

    fn message(initiator: u64, responder: u64, flags: u8, first: u8, notification: u16) -> Vec<u8> {
        let mut message = initiator.to_be_bytes().to_vec();
        message.extend(responder.to_be_bytes());
        message.extend([first, 0x20, 34, flags, 0, 0, 0, 0, 0, 0, 0, 60]);
        message.extend([0, 0, 0, 32, 0, 0]);
        message.extend(notification.to_be_bytes());
        message.extend([7; 24]);
        message
    }

    fn read(port: u16, payload: &[u8]) -> Option<Ike> {
        let frame = ethernet(&[], 0x0800, &v4(PROTOCOL_UDP, &udp(port, payload)));
        Outline::of(&*frame)?.ike(&*frame, 500, 4500)
    }

    #[test]
    fn our_spi_is_that_of_who_did_not_send_the_message() {
        let (one, other) = (1_u64.to_be_bytes(), 2_u64.to_be_bytes());
        let later = |ours| {
            Some(Ike {
                ours,
                stage: Stage::Later,
            })
        };
        assert_eq!(read(500, &message(1, 2, INITIATOR, 46, 0)), later(other));
        assert_eq!(read(500, &message(1, 2, 0x20, 46, 0)), later(one));
        assert_eq!(own_spi(&message(1, 2, INITIATOR, 46, 0)), Some(one));
        assert_eq!(own_spi(&message(1, 2, 0x20, 46, 0)), Some(other));
        assert_eq!(own_spi(&message(1, 0, 0x20, 41, COOKIE)), None);
        assert_eq!(own_spi(&[0; 19]), None);
    }

    #[test]
    fn a_first_message_is_told_from_one_that_brings_a_cookie_back() {
        let stage = |message: &[u8]| read(500, message).unwrap().stage;
        assert_eq!(stage(&message(1, 0, INITIATOR, 33, 0)), Stage::First);
        assert_eq!(
            stage(&message(1, 0, INITIATOR, NOTIFY, 16_388)),
            Stage::First
        );
        assert_eq!(
            stage(&message(1, 0, INITIATOR, NOTIFY, COOKIE)),
            Stage::Later
        );
        assert_eq!(stage(b"what is this"), Stage::First);
        assert_eq!(stage(&[]), Stage::First);
    }

    #[test]
    fn behind_a_nat_the_message_follows_a_marker() {
        let behind = [&[0; 4][..], &message(1, 2, INITIATOR, 46, 0)].concat();
        assert_eq!(read(4500, &behind).unwrap().ours, 2_u64.to_be_bytes());
        assert_eq!(read(4500, &[0xff]).unwrap().stage, Stage::First);
        assert_eq!(read(501, &behind), None);
    }
}
