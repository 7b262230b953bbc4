//! IKE_SA_INIT requests: cheap to send, so they are judged before anything is remembered (RFC 7296 sections 2.6, 2.7).

use std::net::SocketAddr;

use super::{Endpoint, Refusal, unprotected::notify};
use crate::ike::{
    config::{NatPolicy, PeerConfig},
    crypto::IkeProposal,
    event::{FailureReason, Stage},
    exchange::InitRequest,
    message::{Header, IkeSpi, Message, MessageId, payload::NotifyType},
    negotiate::proposals,
    sa::{Accept, IkeSa, State},
    time::Time,
};

impl Endpoint {
    pub(super) fn init_request(
        &mut self,
        now: Time,
        local: SocketAddr,
        remote: SocketAddr,
        bytes: &[u8],
        message: Message<'_>,
    ) {
        let Header {
            spi_i,
            spi_r,
            message_id,
            ..
        } = message.header;
        if spi_i == IkeSpi(0) || spi_r != IkeSpi(0) || message_id != MessageId(0) {
            return self.shared.refuse(Refusal::Malformed);
        }
        if let Some(id) = self.index.answer_to(&(remote, spi_i)) {
            return self.repeated_init(now, id, bytes);
        }
        let header = message.header;
        let request = match InitRequest::sort(message.payloads) {
            Ok(request) => request,
            Err(error) => return self.bad_init(now, local, remote, &header, error),
        };
        if !self.is_welcome(now, local, remote, spi_i, &request) {
            return;
        }
        let reply = |kind, data: &[u8]| notify(local, remote, spi_i, kind, data);
        if self.shared.peers_at(remote.ip()).next().is_none() {
            let detail = format!("it offers {}", proposals::describe(&request.sa));
            if self.complaints.allows(now) {
                self.shared.fail(
                    None,
                    remote,
                    Stage::Init,
                    FailureReason::UnknownPeer,
                    detail,
                );
            }
            self.shared.refuse(Refusal::UnknownPeer);
            return self
                .shared
                .transmits
                .extend(reply(NotifyType::NO_PROPOSAL_CHOSEN, &[]));
        }
        let chosen = self.shared.peers_at(remote.ip()).find_map(|peer| {
            proposals::choose_ike(&peer.proposals, &request.sa, Some(request.ke.method.0))
        });
        let Some((suite, number)) = chosen else {
            if self.complaints.allows(now) {
                self.refuse_offer(remote, &request);
            }
            self.shared.refuse(Refusal::NoProposal);
            return self
                .shared
                .transmits
                .extend(reply(NotifyType::NO_PROPOSAL_CHOSEN, &[]));
        };
        if suite.group.id() != request.ke.method.0 {
            let wanted = suite.group.id().to_be_bytes();
            return self
                .shared
                .transmits
                .extend(reply(NotifyType::INVALID_KE_PAYLOAD, &wanted));
        }
        let forbidden = |peer: &PeerConfig| peer.nat == NatPolicy::Forbid;
        let nat = if self.shared.peers_at(remote.ip()).all(forbidden) {
            NatPolicy::Forbid
        } else {
            NatPolicy::Auto
        };
        let accept = Accept {
            id: self.shared.next_ike(),
            local,
            remote,
            spi_i,
            spi_r: self.shared.allocate_ike_spi(),
            suite,
            number,
            nat,
            bytes,
            request: &request,
        };
        let sa = IkeSa::accept(&mut self.shared, now, &accept);
        self.insert(Box::new(sa));
    }

    /// A repeated request gets the same response again, if there is one already.
    fn repeated_init(&mut self, now: Time, id: crate::ike::event::IkeSaId, bytes: &[u8]) {
        if let Some(sa) = self.sas.get_mut(&id)
            && sa.init_request == bytes
            && sa.state == State::AwaitAuth
        {
            sa.repeat_init_response(&mut self.shared, now);
        }
    }

    /// Whether there is room for another half-open IKE SA, and whether the initiator is where it says.
    fn is_welcome(
        &mut self,
        now: Time,
        local: SocketAddr,
        remote: SocketAddr,
        spi_i: IkeSpi,
        request: &InitRequest<'_>,
    ) -> bool {
        let (all, same) = self.index.half_open(remote.ip());
        let config = &self.shared.config;
        if all >= config.half_open || same >= config.half_open_per_source {
            self.shared.refuse(Refusal::TooManyHalfOpen);
            return false;
        }
        if all < config.cookie_threshold {
            return true;
        }
        let nonce = request.nonce.bytes();
        let random = &mut *self.shared.random;
        let good = request
            .notifies
            .find(NotifyType::COOKIE)
            .is_some_and(|cookie| {
                self.cookies
                    .is_good(random, now, (remote, spi_i, nonce), cookie.data)
            });
        if !good {
            let cookie = self.cookies.issue(random, now, remote, spi_i, nonce);
            self.shared
                .transmits
                .extend(notify(local, remote, spi_i, NotifyType::COOKIE, &cookie));
            self.shared.refuse(Refusal::CookieDemanded);
        }
        good
    }

    /// Tells the operator what was offered and what comes nearest to it.
    fn refuse_offer(&mut self, remote: SocketAddr, request: &InitRequest<'_>) {
        // A gateway may have a thousand tunnels with one address; the first tell enough.
        let peers: Vec<&PeerConfig> = self.shared.peers_at(remote.ip()).take(8).collect();
        let ours: Vec<IkeProposal> = peers
            .iter()
            .flat_map(|peer| peer.proposals.clone())
            .collect();
        let policy: Vec<String> = ours.iter().map(ToString::to_string).collect();
        let detail = format!(
            "the peer offers {}; here are {}; {}",
            proposals::describe(&request.sa),
            policy.join(", "),
            proposals::nearest_ike(&ours, &request.sa)
        );
        let peer = match peers.as_slice() {
            [only] => Some(only.id),
            _ => None,
        };
        self.shared.fail(
            peer,
            remote,
            Stage::Init,
            FailureReason::WeRefusedProposals,
            detail,
        );
    }
}
