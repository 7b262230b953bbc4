//! INFORMATIONAL: deletion, errors, liveness (RFC 7296 sections 1.4 and 2.4).

use ipsec_common::Spi;

use super::{Closed, Exchange, FollowUp, IkeSa, Packet, State, Task, mobike, rekey::Succession};
use crate::ike::{
    config::ChildName,
    endpoint::Shared,
    event::{DownReason, FailureReason, Stage},
    exchange::Informational,
    message::{
        ExchangeType, Payload,
        payload::{Delete, Notify, NotifyType},
    },
    time::Time,
};

impl IkeSa {
    pub(super) fn informational(
        &mut self,
        shared: &mut Shared,
        now: Time,
        bytes: &[u8],
        request: &Informational<'_>,
    ) {
        let kind = ExchangeType::INFORMATIONAL;
        // RFC 7296 section 2.21.2: the initiator could not verify our proof.
        if request.notifies.has(NotifyType::AUTHENTICATION_FAILED) {
            self.fail(
                shared,
                Stage::Auth,
                FailureReason::PeerRefusedAuth,
                String::new(),
            );
        }
        if request.deletes.contains(&Delete::IkeSa) {
            self.respond(shared, now, kind, bytes, &[]);
            return self.deleted_by_peer(shared, now);
        }
        let named: Vec<u32> = request
            .deletes
            .iter()
            .flat_map(|delete| match delete {
                Delete::Esp(spis) => spis.iter().map(|spi| spi.0).collect(),
                Delete::IkeSa | Delete::Other { .. } => Vec::new(),
            })
            .collect();
        let ours = self.deleted_by_name(shared, now, &named);
        let delete_ours = Payload::Delete(Delete::Esp(ours.iter().copied().map(Spi).collect()));
        let addresses = self.addresses_asked(shared, now, request);
        self.peer_limits_proof(shared, now, &request.notifies);
        let mut payloads = mobike::payloads(&addresses);
        // RFC 7296 section 1.4.1: the answer to a Delete names the other half of each pair.
        if !ours.is_empty() {
            payloads.push(delete_ours);
        }
        self.respond(shared, now, kind, bytes, &payloads);
    }

    fn deleted_by_peer(&mut self, shared: &mut Shared, now: Time) {
        // RFC 7296 section 2.8.1: of two made at once, the peer deletes its own, and our request is still under way.
        if let (State::Up, Succession::Undecided(of)) = (self.state, self.succession) {
            let (from, to) = (self.id, of);
            return shared.follow_ups.push_back(FollowUp::Returns { from, to });
        }
        let why = if self.state == State::Up {
            Closed::Lost
        } else {
            Closed::Wanted
        };
        self.close_with_response(shared, now, DownReason::PeerDeleted, why);
    }

    /// The peer has confirmed our Delete.
    pub(super) fn deleted(&mut self, shared: &mut Shared) {
        self.state = State::Closed;
        if let Some(outstanding) = self.outstanding.take() {
            shared.release_pending(outstanding.exchange.spi());
        }
        shared.follow_ups.push_back(FollowUp::Closed {
            peer: self.peer,
            why: Closed::Wanted,
        });
    }

    pub(super) fn delete_ike(&mut self, shared: &mut Shared, now: Time, refused: bool) {
        let mut payloads = Vec::new();
        if refused {
            payloads.push(Payload::Notify(Notify::new(
                NotifyType::AUTHENTICATION_FAILED,
                &[],
            )));
        }
        payloads.push(Payload::Delete(Delete::IkeSa));
        let kind = ExchangeType::INFORMATIONAL;
        self.request(shared, now, kind, &payloads, Exchange::DeleteIke);
    }

    /// An authentic message made no sense: the two sides disagree about the protocol or about the state.
    pub(super) fn break_off(&mut self, shared: &mut Shared, now: Time) {
        self.fail(
            shared,
            Stage::Auth,
            FailureReason::BadMessage,
            "an authentic message makes no sense".to_owned(),
        );
        let why = if self.established.is_some() {
            Closed::Lost
        } else {
            Closed::Failed
        };
        self.close_with_response(shared, now, DownReason::Protocol, why);
    }

    /// The packet that asks for a child is told to the peer with it.
    pub(in crate::ike) fn note_packet(&mut self, child: ChildName, packet: Option<Packet>) {
        self.packets.extend(packet.map(|packet| (child, packet)));
    }

    /// A child that traffic asks for.
    pub(in crate::ike) fn acquire(
        &mut self,
        shared: &mut Shared,
        now: Time,
        child: ChildName,
        packet: Option<Packet>,
    ) {
        let refused = self.child_failures > 0 && self.children_at.is_some_and(|at| at > now);
        if self.state == State::Up && !refused && !self.is_busy_with(child) {
            self.note_packet(child, packet);
            self.push_task(shared, now, Task::Child(child));
        }
    }
}
