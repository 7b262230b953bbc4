//! IKE_SA_INIT requests: cheap to send, so they are judged before anything is remembered (RFC 7296 sections 2.6, 2.7).

use std::net::SocketAddr;

use super::{Endpoint, Refusal, unprotected::notify};
use crate::ike::{
    config::{NatPolicy, PeerConfig},
    crypto::{IkeProposal, IkeSuite},
    event::{FailureReason, Stage},
    exchange::InitRequest,
    message::{Header, IkeSpi, Message, MessageId, payload::NotifyType},
    negotiate::proposals,
    sa::{Accept, IkeSa, State},
    time::Time,
};

/// Where a request comes from, where it came to, and what its sender calls the IKE SA that it wants.
#[derive(Clone, Copy)]
struct Caller {
    local: SocketAddr,
    remote: SocketAddr,
    spi: IkeSpi,
}

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
        let caller = Caller {
            local,
            remote,
            spi: spi_i,
        };
        if !self.is_welcome(now, caller, &request) || !self.is_known(now, caller, &request) {
            return;
        }
        let Some((suite, number)) = self.choose_suite(now, caller, &request) else {
            return;
        };
        let accept = Accept {
            id: self.shared.next_ike(),
            local,
            remote,
            spi_i,
            spi_r: self.shared.allocate_ike_spi(),
            suite,
            number,
            nat: self.nat_policy_at(remote),
            bytes,
            request: &request,
        };
        let sa = IkeSa::accept(&mut self.shared, now, &accept);
        self.insert(Box::new(sa));
    }

    fn answer_init(&mut self, caller: Caller, kind: NotifyType, data: &[u8]) {
        let answer = notify(caller.local, caller.remote, caller.spi, kind, data);
        self.shared.transmits.extend(answer);
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
    fn is_welcome(&mut self, now: Time, caller: Caller, request: &InitRequest<'_>) -> bool {
        let (remote, spi) = (caller.remote, caller.spi);
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
                    .is_good(random, now, (remote, spi, nonce), cookie.data)
            });
        if !good {
            let cookie = self.cookies.issue(random, now, remote, spi, nonce);
            self.answer_init(caller, NotifyType::COOKIE, &cookie);
            self.shared.refuse(Refusal::CookieDemanded);
        }
        good
    }

    /// Whether a peer is configured where the request comes from.
    fn is_known(&mut self, now: Time, caller: Caller, request: &InitRequest<'_>) -> bool {
        let remote = caller.remote;
        if self.shared.peers_at(remote.ip()).next().is_some() {
            return true;
        }
        let detail = format!("it offers {}", proposals::describe(&request.sa));
        if self.complaints.allows(now) {
            let reason = FailureReason::UnknownPeer;
            self.shared.fail(None, remote, Stage::Init, reason, detail);
        }
        self.shared.refuse(Refusal::UnknownPeer);
        self.answer_init(caller, NotifyType::NO_PROPOSAL_CHOSEN, &[]);
        false
    }

    /// What is chosen of the offer, with its number there, if a peer that may be the caller takes any of it. A caller that
    /// has guessed another group is told which.
    fn choose_suite(
        &mut self,
        now: Time,
        caller: Caller,
        request: &InitRequest<'_>,
    ) -> Option<(IkeSuite, u8)> {
        let remote = caller.remote;
        let group = request.ke.method.0;
        let chosen = self
            .shared
            .peers_at(remote.ip())
            .find_map(|peer| proposals::choose_ike(&peer.proposals, &request.sa, Some(group)));
        let Some((suite, number)) = chosen else {
            if self.complaints.allows(now) {
                self.refuse_offer(remote, request);
            }
            self.shared.refuse(Refusal::NoProposal);
            self.answer_init(caller, NotifyType::NO_PROPOSAL_CHOSEN, &[]);
            return None;
        };
        if suite.group.id() != group {
            let wanted = suite.group.id().to_be_bytes();
            self.answer_init(caller, NotifyType::INVALID_KE_PAYLOAD, &wanted);
            return None;
        }
        Some((suite, number))
    }

    /// Who the caller is comes later: NAT detection is done unless all peers that it may be forbid it.
    fn nat_policy_at(&self, remote: SocketAddr) -> NatPolicy {
        let forbidden = |peer: &PeerConfig| peer.nat == NatPolicy::Forbid;
        if self.shared.peers_at(remote.ip()).all(forbidden) {
            NatPolicy::Forbid
        } else {
            NatPolicy::Auto
        }
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
