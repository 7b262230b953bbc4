//! Message ID synchronization (RFC 6311): a cluster that has failed over tells where to go on counting.
//!
//! A member that takes over does not know exactly how far its predecessor has come. It proposes numbers above all that can
//! have been used, and both sides go on from the higher ones. We answer such a request and never make one. What we have
//! asked and not been answered is asked again under a new number, and what the peer has asked is forgotten, for it will.

use serde::{Deserialize, Serialize};

use super::{Exchange, IkeSa, Outstanding, State, Task, child::ChildJob};
use crate::ike::{
    endpoint::{Refusal, Shared},
    exchange::Informational,
    message::{
        ExchangeType, Header, MessageId, Payload, PayloadType, parse_payloads,
        payload::{Notify, NotifyType},
    },
    time::Time,
};

/// Highest number that a peer may make us go on from: half of them are left then.
const HIGHEST: u32 = u32::MAX / 2;
const NONCE: usize = 4;

/// What an IKE SA knows of synchronization.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Sync {
    /// Both sides have said that they can.
    pub(super) agreed: bool,
    /// The last one.
    last: Option<Box<Done>>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Done {
    /// The number that the peer has proposed for its next request.
    proposed: u32,
    request: Vec<u8>,
    response: Vec<u8>,
}

/// Content of the notify, as its sender sees things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Numbers {
    nonce: [u8; NONCE],
    /// Message ID of the sender's next request.
    send: u32,
    /// Message ID that the sender expects in the receiver's next request.
    receive: u32,
}

impl Numbers {
    // RFC 6311 section 8.2: a nonce, then both message IDs, four bytes each.
    fn parse(data: &[u8]) -> Option<Self> {
        let (nonce, rest) = data.split_first_chunk()?;
        let (send, receive) = rest.split_first_chunk()?;
        Some(Self {
            nonce: *nonce,
            send: u32::from_be_bytes(*send),
            receive: u32::from_be_bytes(receive.try_into().ok()?),
        })
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        [
            self.nonce,
            self.send.to_be_bytes(),
            self.receive.to_be_bytes(),
        ]
        .concat()
    }
}

impl Sync {
    /// What holds for an IKE SA that takes the place of this one, too.
    pub(super) fn inherited(&self) -> Self {
        Self {
            agreed: self.agreed,
            last: None,
        }
    }
}

/// The notify that tells that we can.
pub(super) fn sync_supported() -> Payload<'static> {
    Payload::Notify(Notify::new(
        NotifyType::IKEV2_MESSAGE_ID_SYNC_SUPPORTED,
        &[],
    ))
}

impl IkeSa {
    /// Whether a message may be a request to synchronize, as far as its header tells.
    // RFC 6311 section 5.1: its message ID is 0, whatever has been used.
    pub(super) fn may_synchronize(&self, header: &Header) -> bool {
        self.sync.agreed
            && header.exchange == ExchangeType::INFORMATIONAL
            && !header.flags.response
            && header.message_id == MessageId(0)
            && matches!(self.state, State::Up | State::Deleting)
    }

    /// The numbers that an authentic message proposes, if it is a request to synchronize.
    pub(super) fn proposed(first: PayloadType, chain: &[u8]) -> Option<Numbers> {
        let request = Informational::sort(parse_payloads(first, chain).ok()?).ok()?;
        let notify = request.notifies.find(NotifyType::IKEV2_MESSAGE_ID_SYNC)?;
        Numbers::parse(notify.data)
    }

    /// Goes on from the higher of both sides' numbers, and tells them.
    // RFC 6311 section 5.1: a proposal that is not above all that the peer has used before, proposals included, may be a
    // replay and gets no answer.
    pub(super) fn synchronize(
        &mut self,
        shared: &mut Shared,
        now: Time,
        bytes: &[u8],
        theirs: Numbers,
    ) {
        if let Some(last) = self.sync.last.as_ref().filter(|last| last.request == bytes) {
            let response = last.response.clone();
            return self.transmit(shared, now, response);
        }
        let used = self.sync.last.as_ref().map(|last| last.proposed);
        if theirs.send < self.expected_request
            || used.is_some_and(|used| theirs.send <= used)
            || theirs.send.max(theirs.receive) > HIGHEST
        {
            return shared.refuse(Refusal::OutOfWindow);
        }
        let ours = Numbers {
            nonce: theirs.nonce,
            send: self.next_request.max(theirs.receive),
            receive: theirs.send,
        };
        let Some(response) = self.seal_synchronized(shared, &ours, theirs.send) else {
            return;
        };
        self.next_request = ours.send;
        self.expected_request = ours.receive;
        self.sync.last = Some(Box::new(Done {
            proposed: theirs.send,
            request: bytes.to_vec(),
            response: response.clone(),
        }));
        self.fragments.forget();
        self.forget_answer(shared, now);
        self.transmit(shared, now, response);
        if let Some(lost) = self.outstanding.take() {
            self.ask_again(shared, now, *lost);
        }
    }

    /// What the peer has asked for and we compute: the member that takes over knows nothing of it.
    fn forget_answer(&mut self, shared: &mut Shared, now: Time) {
        let Some(waiting) = self.answering.take() else {
            return;
        };
        match waiting.what {
            ChildJob::Answer(grant) => {
                shared.release_pending(Some(grant.agreed.spi_in));
                self.forget_rival(now, grant.replaces);
            }
            ChildJob::Ike(job) => shared.release_ike_spi(job.spi()),
            // What we ask for is not what we answer.
            ChildJob::Public(_) | ChildJob::Agree(..) => {}
        }
    }

    /// The response to a request will not come any more: the same is asked for once more, under its new number.
    fn ask_again(&mut self, shared: &mut Shared, now: Time, lost: Outstanding) {
        match lost.exchange {
            Exchange::Child(pending) => {
                shared.release_pending(Some(pending.spi_in));
                let group = pending.group();
                let again = pending.again(shared);
                self.begin_child(shared, now, again, group);
            }
            Exchange::RekeyIke(pending) => {
                self.give_up_heir(shared, &pending);
                self.tasks.push_front(Task::RekeyIke);
            }
            Exchange::DeleteChildren(spis) => self.tasks.push_front(Task::DeleteChildren(spis)),
            Exchange::DeleteIke => self.tasks.push_front(Task::DeleteIke { refused: false }),
            Exchange::Liveness => self.tasks.push_front(Task::Liveness),
            Exchange::UpdateAddresses(_) => self.tasks.push_front(Task::UpdateAddresses),
            Exchange::CheckPath(_) => self.tasks.push_front(Task::CheckPath),
            Exchange::TellAddresses => self.tasks.push_front(Task::TellAddresses),
            Exchange::AskForFresh => self.tasks.push_front(Task::AskForFresh),
            // There is nothing to synchronize before IKE_AUTH is answered.
            exchange @ (Exchange::Init | Exchange::Auth(_)) => {
                shared.release_pending(exchange.spi());
            }
        }
    }
}
