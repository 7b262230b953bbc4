//! Message IDs, the window of one, and the envelope of every encrypted message (RFC 7296 sections 2.2, 2.3 and 3.14).

use std::net::SocketAddr;

use zeroize::Zeroizing;

use super::{
    Answered, Exchange, FollowUp, IkeSa, Outstanding, SIMULTANEOUS, State, Task, child::ChildJob,
    digest, mobike::Path, rekey::Succession, sync::Numbers,
};
use crate::ike::{
    crypto::{keys::SkKeys, sk},
    endpoint::{Refusal, Shared},
    event::{Event, Transmit},
    exchange::{AuthRequest, AuthResponse, ChildRequest, ChildResponse, Informational, SortError},
    message::{
        ExchangeType, Flags, Header, Message, MessageId, Payload, PayloadType, parse_payloads,
        payload::{Notify, NotifyType, Part},
    },
    time::Time,
};

/// A message as it has come.
#[derive(Clone, Copy)]
struct Arrival<'a> {
    from: Path,
    bytes: &'a [u8],
    header: &'a Header,
}

/// What a message protects: a chain of payloads, and the type of the first.
type Content = (PayloadType, Zeroizing<Vec<u8>>);

impl IkeSa {
    pub(super) fn header(&self, exchange: ExchangeType, message_id: u32, response: bool) -> Header {
        Header {
            spi_i: self.spi_i,
            spi_r: self.spi_r,
            first: PayloadType::NONE,
            minor: 0,
            exchange,
            flags: Flags {
                initiator: self.initiator,
                version: false,
                response,
            },
            message_id: MessageId(message_id),
        }
    }

    /// Keys of what we send and of what the peer sends.
    fn directions(&self) -> Option<(&SkKeys, &SkKeys)> {
        let keys = self.keys.as_ref()?;
        Some(if self.initiator {
            (&keys.initiator, &keys.responder)
        } else {
            (&keys.responder, &keys.initiator)
        })
    }

    fn seal(
        &self,
        shared: &mut Shared,
        header: &Header,
        payloads: &[Payload<'_>],
    ) -> Option<Vec<Vec<u8>>> {
        let (ours, _) = self.directions()?;
        let most = self.most_bytes(shared);
        sk::seal_split(
            header,
            payloads,
            self.suite.as_ref()?,
            ours,
            &mut *shared.random,
            most,
        )
        .ok()
    }

    /// Seals our half of a synchronization; `proposed` never comes twice.
    pub(super) fn seal_synchronized(
        &self,
        shared: &mut Shared,
        ours: &Numbers,
        proposed: u32,
    ) -> Option<Vec<u8>> {
        let (keys, _) = self.directions()?;
        let data = ours.bytes();
        let notify = Notify::new(NotifyType::IKEV2_MESSAGE_ID_SYNC, &data);
        let header = self.header(ExchangeType::INFORMATIONAL, 0, true);
        sk::seal_synchronization(
            &header,
            &[Payload::Notify(notify)],
            (self.suite.as_ref()?, keys),
            &mut *shared.random,
            proposed,
        )
        .ok()
    }

    pub(super) fn transmit_all(&mut self, shared: &mut Shared, now: Time, datagrams: Vec<Vec<u8>>) {
        for bytes in datagrams {
            self.transmit(shared, now, bytes);
        }
    }

    pub(super) fn transmit(&mut self, shared: &mut Shared, now: Time, bytes: Vec<u8>) {
        self.sent = now;
        shared.transmits.push_back(Transmit {
            local: self.local,
            remote: self.remote,
            bytes,
        });
    }

    /// Sends a response.
    // RFC 7296 section 2.11: to where the request came from, and from where it came to.
    fn reply(&mut self, shared: &mut Shared, now: Time, datagrams: Vec<Vec<u8>>) {
        self.sent = now;
        let (local, remote) = self.asked_from;
        shared
            .transmits
            .extend(datagrams.into_iter().map(|bytes| Transmit {
                local,
                remote,
                bytes,
            }));
    }

    /// Sends an encrypted request; there must be none outstanding.
    pub(super) fn request(
        &mut self,
        shared: &mut Shared,
        now: Time,
        kind: ExchangeType,
        payloads: &[Payload<'_>],
        exchange: Exchange,
    ) {
        let header = self.header(kind, self.next_request, false);
        if let Some(datagrams) = self.seal(shared, &header, payloads) {
            self.send_request(shared, now, datagrams, exchange);
        }
    }

    /// Sends the datagrams of a request and repeats them until a response comes.
    pub(super) fn send_request(
        &mut self,
        shared: &mut Shared,
        now: Time,
        datagrams: Vec<Vec<u8>>,
        exchange: Exchange,
    ) {
        let message_id = self.next_request;
        self.next_request = self.next_request.saturating_add(1);
        self.outstanding = Some(Box::new(Outstanding {
            message_id,
            datagrams: datagrams.clone(),
            exchange,
            first_sent: now,
            attempt: 0,
            again_at: now + shared.retransmission(0),
        }));
        self.transmit_all(shared, now, datagrams);
    }

    /// Answers the request that is expected now.
    pub(super) fn respond(
        &mut self,
        shared: &mut Shared,
        now: Time,
        kind: ExchangeType,
        request: &[u8],
        payloads: &[Payload<'_>],
    ) {
        #[cfg(test)]
        shared.watched.note(payloads);
        let header = self.header(kind, self.expected_request, true);
        let Some(datagrams) = self.seal(shared, &header, payloads) else {
            return;
        };
        self.expected_request = self.expected_request.saturating_add(1);
        self.answered = Some(Answered {
            request: digest(request),
            response: datagrams.clone(),
        });
        self.reply(shared, now, datagrams);
    }

    pub(super) fn respond_notify(
        &mut self,
        shared: &mut Shared,
        now: Time,
        kind: ExchangeType,
        request: &[u8],
        notify: NotifyType,
        data: &[u8],
    ) {
        let payloads = [Payload::Notify(Notify::new(notify, data))];
        self.respond(shared, now, kind, request, &payloads);
    }

    /// Begins the next exchange that waits, if the window is open.
    pub(in crate::ike) fn next_task(&mut self, shared: &mut Shared, now: Time) {
        while self.outstanding.is_none()
            && self.asking.is_none()
            && matches!(self.state, State::Up | State::Deleting)
            && self.may_begin(self.tasks.front())
        {
            match self.tasks.pop_front() {
                None => return,
                Some(Task::Child(child)) => self.ask_for_child(shared, now, child, None),
                Some(Task::Pair(child, local, remote)) => {
                    self.ask_for_child(shared, now, child, Some((local, remote)));
                }
                Some(Task::RekeyIke) => self.rekey_ike(shared),
                Some(Task::RekeyChild(sa)) => self.rekey_child(shared, now, sa),
                Some(Task::DeleteChildren(spis)) => self.delete_children(shared, now, &spis),
                Some(Task::DeleteIke { refused }) => self.delete_ike(shared, now, refused),
                Some(Task::Liveness) => self.ask_for_life(shared, now),
                Some(Task::UpdateAddresses) => self.update_addresses(shared, now),
                Some(Task::CheckPath) => self.check_path(shared, now),
                Some(Task::TellAddresses) => self.tell_addresses(shared, now),
                Some(Task::AskForFresh) => self.ask_for_fresh(shared, now),
            }
        }
    }

    /// Whether the next exchange must not wait for what the peer does.
    fn may_begin(&self, next: Option<&Task>) -> bool {
        let peer_rekeys_ike =
            || matches!(&self.answering, Some(waiting) if matches!(waiting.what, ChildJob::Ike(_)));
        let undecided = matches!(self.succession, Succession::Undecided(_));
        match next {
            // RFC 7296 section 2.25.2: not while the peer makes a child.
            Some(Task::RekeyIke) => self.answering.is_none() && !undecided,
            Some(
                Task::Child(_) | Task::Pair(..) | Task::RekeyChild(_) | Task::DeleteChildren(_),
            ) => !undecided && !peer_rekeys_ike(),
            Some(
                Task::DeleteIke { .. }
                | Task::Liveness
                | Task::UpdateAddresses
                | Task::CheckPath
                | Task::TellAddresses
                | Task::AskForFresh,
            )
            | None => true,
        }
    }

    pub(super) fn push_task(&mut self, shared: &mut Shared, now: Time, task: Task) {
        self.tasks.push_back(task);
        self.next_task(shared, now);
    }

    /// Takes a message whose SPIs name this IKE SA and that is no IKE_SA_INIT request.
    pub(in crate::ike) fn handle_message(
        &mut self,
        shared: &mut Shared,
        now: Time,
        from: (SocketAddr, SocketAddr),
        bytes: &[u8],
        message: &Message<'_>,
    ) {
        let header = &message.header;
        // RFC 7296 section 3.1: the flag tells who started the IKE SA, not who started the exchange.
        if header.flags.initiator == self.initiator {
            return shared.refuse(Refusal::WrongSide);
        }
        if header.exchange == ExchangeType::IKE_SA_INIT {
            if header.flags.response && self.initiator {
                self.init_response(shared, now, from, bytes, message);
            }
            return;
        }
        let (encrypted, part) = match message.payloads.last() {
            Some(Payload::Encrypted(encrypted)) => (encrypted, None),
            // RFC 7383 section 2.3: nobody sends fragments unless both sides have said that they can.
            Some(Payload::EncryptedFragment { content, part }) if self.fragments.agreed => {
                (content, Some(*part))
            }
            _ => return self.unprotected(shared, message),
        };
        let (Some((_, theirs)), Some(suite)) = (self.directions(), self.suite.as_ref()) else {
            return shared.refuse(Refusal::TooEarly);
        };
        let arrival = Arrival {
            from,
            bytes,
            header,
        };
        let is_late = !self.is_in_window(header) || self.state == State::Lingering;
        let may_sync = part.is_none() && self.may_synchronize(header);
        if is_late && !may_sync && !self.is_last_request_again(header, part) {
            return self.out_of_window(shared, now, arrival);
        }
        let Ok(chain) = sk::open(bytes, encrypted, suite, theirs) else {
            return shared.refuse(Refusal::NotAuthentic);
        };
        // From here on the message is the peer's own.
        self.hear(shared, now);
        if may_sync && let Some(numbers) = Self::proposed(encrypted.first, &chain) {
            self.synchronize(shared, now, bytes, numbers);
            return self.next_task(shared, now);
        }
        if is_late && part.is_none() {
            return self.out_of_window(shared, now, arrival);
        }
        if is_late {
            return self.respond_again(shared, now, from);
        }
        self.handle_expected(shared, now, arrival, part, (encrypted.first, chain));
    }

    /// The peer lives, and so does this IKE SA.
    fn hear(&mut self, shared: &mut Shared, now: Time) {
        self.heard = now;
        if let Some(younger) = self.younger.take() {
            shared.follow_ups.push_back(FollowUp::Yields(*younger));
            self.not_replaced(now, SIMULTANEOUS);
        }
    }

    /// Takes an authentic message whose turn it is, or a fragment of it.
    fn handle_expected(
        &mut self,
        shared: &mut Shared,
        now: Time,
        arrival: Arrival<'_>,
        part: Option<Part>,
        (first, chain): Content,
    ) {
        let header = arrival.header;
        // It has overtaken the response to IKE_AUTH, which proves who the peer is; its repetition will be answered.
        if !header.flags.response && self.state == State::AuthSent {
            return shared.refuse(Refusal::TooEarly);
        }
        let content = match part {
            None => Some((first, chain)),
            Some(part) => self.fragments.take(header, part, first, chain),
        };
        let Some(content) = content else { return };
        if header.flags.response {
            self.handle_response(shared, now, header, &content);
        } else {
            self.take_request(shared, now, arrival, &content);
        }
        self.next_task(shared, now);
    }

    /// Answers a request, which tells where the peer is and what it has got of us.
    fn take_request(
        &mut self,
        shared: &mut Shared,
        now: Time,
        arrival: Arrival<'_>,
        content: &Content,
    ) {
        self.follow(shared, arrival.from);
        self.asked_from = arrival.from;
        self.made_by_last_answer = None;
        let known: Vec<_> = self.children.iter().map(|child| child.id).collect();
        self.handle_request(shared, now, arrival, content);
        // A further request proves that our last response has arrived, and what it agreed on is installed.
        for sa in known {
            shared.proved(sa);
        }
    }

    /// A message without protection proves nothing.
    // RFC 7296 section 2.4: it is a hint at most. Who deletes an IKE SA that the peer does not know need not go on.
    fn unprotected(&mut self, shared: &mut Shared, message: &Message<'_>) {
        let forgotten = message.payloads.iter().any(|payload| {
            matches!(payload, Payload::Notify(notify) if notify.kind == NotifyType::INVALID_IKE_SPI)
        });
        let asked = self.outstanding.as_ref().is_some_and(|outstanding| {
            matches!(outstanding.exchange, Exchange::DeleteIke)
                && MessageId(outstanding.message_id) == message.header.message_id
        });
        if forgotten && asked && message.header.flags.response {
            self.deleted(shared);
        } else {
            shared.refuse(Refusal::NotEncrypted);
        }
    }

    fn is_in_window(&self, header: &Header) -> bool {
        let MessageId(id) = header.message_id;
        if header.flags.response {
            self.outstanding
                .as_ref()
                .is_some_and(|outstanding| outstanding.message_id == id)
        } else {
            self.expected_request == id && self.answering.is_none()
        }
    }

    /// A repeated request gets the same response again, whatever has happened since.
    // RFC 7296 section 2.1: it is recognised by its bytes, so no key is needed; only what has its number is looked at.
    fn out_of_window(&mut self, shared: &mut Shared, now: Time, arrival: Arrival<'_>) {
        let is_repeated = self.may_be_last_request(arrival.header)
            && self
                .answered
                .as_ref()
                .is_some_and(|answered| answered.request == digest(arrival.bytes));
        if is_repeated {
            self.respond_again(shared, now, arrival.from);
        } else {
            shared.refuse(Refusal::OutOfWindow);
        }
    }

    /// Whether a fragment claims to begin the request that was answered last.
    // RFC 7383 section 2.6.1: the first fragment of a repeated request is answered again, the others are dropped. The peer
    // may have split it anew, so it is recognised by its number and must be authentic.
    fn is_last_request_again(&self, header: &Header, part: Option<Part>) -> bool {
        self.answered.is_some()
            && self.may_be_last_request(header)
            && part.is_some_and(|part| part.number == 1)
    }

    fn may_be_last_request(&self, header: &Header) -> bool {
        !header.flags.response && header.message_id.0.checked_add(1) == Some(self.expected_request)
    }

    fn respond_again(&mut self, shared: &mut Shared, now: Time, from: Path) {
        let response = self
            .answered
            .as_ref()
            .map(|answered| answered.response.clone());
        self.asked_from = from;
        self.reply(shared, now, response.unwrap_or_default());
    }

    /// Follows a peer whose NAT has given it another address or port.
    // RFC 7296 section 2.23: only on an authentic message, and only by the side that is not behind a NAT itself. The
    // first request after IKE_SA_INIT may come from port 4500. RFC 4555 section 3.8: with MOBIKE only UPDATE_SA_ADDRESSES
    // moves anything, so that any other request can be used to try a path.
    fn follow(&mut self, shared: &mut Shared, (local, remote): (SocketAddr, SocketAddr)) {
        if (local, remote) == (self.local, self.remote) {
            return;
        }
        let floats = self.state == State::AwaitAuth && remote.ip() == self.remote.ip();
        if floats || (self.nat.remote && !self.nat.local && !self.mobike.agreed) {
            self.local = local;
            self.remote = remote;
            self.tell_moved(shared);
        }
    }

    /// The data plane saw an authentic ESP packet from elsewhere.
    pub(in crate::ike) fn peer_moved(
        &mut self,
        shared: &mut Shared,
        now: Time,
        remote: SocketAddr,
    ) {
        let tells = self.nat.remote && !self.nat.local && self.esp_tells(now);
        if tells && self.remote != remote {
            self.remote = remote;
            self.tell_moved(shared);
        }
    }

    pub(super) fn tell_moved(&self, shared: &mut Shared) {
        let outer = self.outer(shared);
        for child in &self.children {
            shared.events.push_back(Event::Moved(child.id, outer));
        }
    }

    fn handle_request(
        &mut self,
        shared: &mut Shared,
        now: Time,
        arrival: Arrival<'_>,
        (first, chain): &Content,
    ) {
        let (kind, bytes) = (arrival.header.exchange, arrival.bytes);
        let payloads = match parse_payloads(*first, chain) {
            Ok(payloads) => payloads,
            Err(_) => {
                // RFC 7296 section 2.21.3: an authentic message that makes no sense ends the IKE SA.
                self.respond_notify(shared, now, kind, bytes, NotifyType::INVALID_SYNTAX, &[]);
                return self.break_off(shared, now);
            }
        };
        let sorted = match (kind, self.state) {
            (ExchangeType::IKE_AUTH, State::AwaitAuth) => AuthRequest::sort(payloads)
                .map(|request| self.auth_request(shared, now, bytes, &request)),
            (ExchangeType::CREATE_CHILD_SA, State::Up) => ChildRequest::sort(payloads)
                .map(|request| self.child_request(shared, now, bytes, &request)),
            (ExchangeType::INFORMATIONAL, State::Up | State::Deleting) => {
                Informational::sort(payloads)
                    .map(|request| self.informational(shared, now, bytes, &request))
            }
            // RFC 7296 section 2.25.2: while we delete the IKE SA nothing new is begun on it.
            (ExchangeType::CREATE_CHILD_SA, State::Deleting) => {
                self.respond_notify(shared, now, kind, bytes, NotifyType::TEMPORARY_FAILURE, &[]);
                Ok(())
            }
            _ => {
                self.respond_notify(shared, now, kind, bytes, NotifyType::INVALID_SYNTAX, &[]);
                Ok(())
            }
        };
        match sorted {
            Ok(()) => {}
            // RFC 7296 section 2.5: the whole message is refused, and the type named.
            Err(SortError::UnknownCritical(PayloadType(number))) => {
                let notify = NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD;
                self.respond_notify(shared, now, kind, bytes, notify, &[number]);
            }
            Err(SortError::Twice(_) | SortError::Missing(_)) => {
                self.respond_notify(shared, now, kind, bytes, NotifyType::INVALID_SYNTAX, &[]);
                self.break_off(shared, now);
            }
        }
    }

    fn handle_response(
        &mut self,
        shared: &mut Shared,
        now: Time,
        header: &Header,
        (first, chain): &Content,
    ) {
        let Some(outstanding) = self.outstanding.take() else {
            return;
        };
        let exchange = outstanding.exchange;
        let spi = exchange.spi();
        let Ok(payloads) = parse_payloads(*first, chain) else {
            self.abandon(shared, &exchange);
            return self.break_off(shared, now);
        };
        if !self.still_wants(&exchange) {
            return self.abandon(shared, &exchange);
        }
        if !exchange.may_be_answered_by(header.exchange) {
            self.abandon(shared, &exchange);
            return self.break_off(shared, now);
        }
        if self.take_answer(shared, now, exchange, payloads).is_err() {
            shared.release_pending(spi);
            self.break_off(shared, now);
        }
    }

    /// Whether there is a place for what a request of ours is to bring.
    fn still_wants(&self, exchange: &Exchange) -> bool {
        match exchange {
            Exchange::Auth(_) => self.state == State::AuthSent,
            // While the IKE SA is being deleted its children go with it.
            Exchange::RekeyIke(_) | Exchange::Child(_) => self.state == State::Up,
            Exchange::Init
            | Exchange::DeleteChildren(_)
            | Exchange::DeleteIke
            | Exchange::Liveness
            | Exchange::UpdateAddresses(_)
            | Exchange::CheckPath(_)
            | Exchange::TellAddresses
            | Exchange::AskForFresh => true,
        }
    }

    /// Sorts the payloads of a response, and hands them to what has asked.
    fn take_answer(
        &mut self,
        shared: &mut Shared,
        now: Time,
        exchange: Exchange,
        payloads: Vec<Payload<'_>>,
    ) -> Result<(), SortError> {
        match exchange {
            Exchange::Auth(pending) => {
                let response = AuthResponse::sort(payloads)?;
                self.auth_response(shared, now, pending, &response);
            }
            Exchange::RekeyIke(pending) => {
                let response = ChildResponse::sort(payloads)
                    .inspect_err(|_| self.give_up_heir(shared, &pending))?;
                self.heir_response(shared, now, pending, &response);
            }
            Exchange::Child(pending) => {
                let response = ChildResponse::sort(payloads)?;
                self.child_response(shared, now, pending, &response);
            }
            Exchange::DeleteIke => self.deleted(shared),
            Exchange::DeleteChildren(spis) => self.children_deleted(shared, now, &spis),
            Exchange::Liveness => {
                let response = Informational::sort(payloads)?;
                self.lives(shared, now, &response.notifies);
            }
            Exchange::UpdateAddresses(probe) => {
                let response = Informational::sort(payloads)?;
                self.update_answered(shared, now, &probe, &response.notifies);
            }
            Exchange::CheckPath(probe) => {
                let response = Informational::sort(payloads)?;
                self.path_answered(shared, now, &probe, &response.notifies);
            }
            // What answers the first is not encrypted, and what answers the others says nothing.
            Exchange::Init | Exchange::TellAddresses | Exchange::AskForFresh => {}
        }
        Ok(())
    }
}
