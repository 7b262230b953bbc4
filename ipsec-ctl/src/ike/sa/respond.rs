//! The responder's side of IKE_SA_INIT, once it was accepted, and of IKE_AUTH (RFC 7296 sections 1.2 and 2.15).

use std::{net::SocketAddr, time::Duration};

use super::{
    Closed, FollowUp, IkeSa, State,
    child::PendingChild,
    initiate::{NONCE_BYTES, check_psk, fragmentation_supported, id_body, nat_notifies},
    mobike,
    sync::sync_supported,
};
use crate::ike::{
    Identity,
    config::{NatPolicy, PeerConfig, Remote, Unique},
    crypto::{
        IkeSuite,
        auth::{self, Signed},
        ke::PrivateKey,
    },
    endpoint::{Shared, nat_hash},
    event::{DownReason, FailureReason, IkeSaId, Stage},
    exchange::{AuthRequest, InitRequest},
    job::JobResult,
    message::{
        ExchangeType, IkeSpi, Message, Payload,
        payload::{
            AuthMethod, Authentication, Identification, KeMethod, KeyExchange, Nonce, Notify,
            NotifyType,
        },
    },
    negotiate::proposals,
    time::Time,
};

/// Time that an initiator has to ask for all children.
const INITIATOR_FIRST: Duration = Duration::from_secs(10);

/// What it takes to accept an IKE_SA_INIT.
pub(in crate::ike) struct Accept<'a> {
    pub(in crate::ike) id: IkeSaId,
    pub(in crate::ike) local: SocketAddr,
    pub(in crate::ike) remote: SocketAddr,
    pub(in crate::ike) spi_i: IkeSpi,
    pub(in crate::ike) spi_r: IkeSpi,
    pub(in crate::ike) suite: IkeSuite,
    /// Number of the chosen proposal.
    pub(in crate::ike) number: u8,
    /// No peer at this address allows NAT detection.
    pub(in crate::ike) nat: NatPolicy,
    pub(in crate::ike) bytes: &'a [u8],
    pub(in crate::ike) request: &'a InitRequest<'a>,
}

/// Whether an identity is one that a configured peer may have.
fn is_expected(peer: &PeerConfig, identity: &Identity) -> bool {
    match (&peer.remote_id, &peer.remote) {
        (Some(expected), _) => expected == identity,
        (None, Remote::Anywhere) => true,
        (None, Remote::At(ways)) => ways
            .iter()
            .any(|way| Identity::from(way.remote) == *identity),
    }
}

impl IkeSa {
    /// Begins an IKE SA that a peer asked for.
    pub(in crate::ike) fn accept(shared: &mut Shared, now: Time, accept: &Accept<'_>) -> Self {
        let mut sa = Self {
            spi_i: accept.spi_i,
            spi_r: accept.spi_r,
            suite: Some(accept.suite),
            nonce_i: accept.request.nonce.bytes().to_vec(),
            nonce_r: shared.random_bytes(NONCE_BYTES),
            init_request: accept.bytes.to_vec(),
            // Kept until the response is written; the number of a proposal has no other place in the state.
            detours: u32::from(accept.number),
            ..Self::blank(accept.id, now, accept.local, accept.remote)
        };
        if accept.nat != NatPolicy::Forbid {
            sa.detect_nat(&accept.request.notifies);
        }
        sa.fragments.agreed = shared
            .peers_at(accept.remote.ip())
            .any(|peer| peer.fragment_size.is_some())
            && accept
                .request
                .notifies
                .has(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED);
        let private = PrivateKey::generate(accept.suite.group, &mut *shared.random);
        let public = accept.request.ke.public.to_vec();
        sa.job = Some(sa.queue_job(shared, private, Some(public), true));
        sa
    }

    pub(super) fn agreed_as_responder(
        &mut self,
        shared: &mut Shared,
        now: Time,
        mut result: JobResult,
    ) {
        self.public = std::mem::take(&mut result.public);
        if !self.derive_keys(shared, result) {
            return;
        }
        let Some(suite) = self.suite else { return };
        let number = u8::try_from(self.detours).unwrap_or(1);
        let source = if shared.forces_nat(self.remote.ip()) {
            shared.random_bytes(20)
        } else {
            nat_hash(self.spi_i, self.spi_r, self.local).to_vec()
        };
        let destination = nat_hash(self.spi_i, self.spi_r, self.remote);
        let (public, nonce) = (self.public.clone(), self.nonce_r.clone());
        let Ok(nonce) = Nonce::new(&nonce) else {
            return;
        };
        let mut payloads = vec![
            Payload::SecurityAssociation(proposals::ike_answer(&suite, number)),
            Payload::KeyExchange(KeyExchange {
                method: KeMethod(suite.group.id()),
                public: &public,
            }),
            Payload::Nonce(nonce),
        ];
        if self.nat.supported {
            payloads.extend(nat_notifies(&source, &destination));
        }
        if self.fragments.agreed {
            payloads.push(fragmentation_supported());
        }
        // RFC 6023 section 3: only to a responder that says so an initiator may send IKE_AUTH without a child.
        payloads.push(Payload::Notify(Notify::new(
            NotifyType::CHILDLESS_IKEV2_SUPPORTED,
            &[],
        )));
        let message = Message {
            header: self.header(ExchangeType::IKE_SA_INIT, 0, true),
            payloads,
        };
        let Ok(bytes) = message.emit() else { return };
        self.init_response.clone_from(&bytes);
        self.expected_request = 1;
        self.state = State::AwaitAuth;
        self.transmit(shared, now, bytes);
    }

    pub(super) fn auth_request(
        &mut self,
        shared: &mut Shared,
        now: Time,
        bytes: &[u8],
        request: &AuthRequest<'_>,
    ) {
        let identity = Identity::from_wire(request.id_i.kind, request.id_i.data);
        let wanted = request
            .id_r
            .as_ref()
            .map(|id| Identity::from_wire(id.kind, id.data));
        let peer = match self
            .authenticate(shared, &identity, wanted.as_ref(), request)
            .and_then(|peer| self.is_unique(shared, peer, &identity, request))
        {
            Ok(peer) => peer,
            Err((reason, detail)) => {
                self.fail(shared, Stage::Auth, reason, detail);
                self.respond_notify(
                    shared,
                    now,
                    ExchangeType::IKE_AUTH,
                    bytes,
                    NotifyType::AUTHENTICATION_FAILED,
                    &[],
                );
                return self.close_with_response(shared, now, DownReason::Protocol, Closed::Failed);
            }
        };
        self.peer = Some(peer.id);
        self.remote_id = Some(identity);
        let ours = peer.identity_at(self.local.ip());
        self.local_id = Some(ours.clone());
        let initial_contact = request.notifies.has(NotifyType::INITIAL_CONTACT);
        self.agree_on_mobike(shared, &request.notifies);
        self.come_up(shared, now, initial_contact);
        self.answer_auth(shared, now, bytes, &peer, &ours, request);
        self.forget_first_exchanges();
        // Those that the initiator does not bring in time are ours to ask for, if we are to keep the tunnel up.
        self.children_at = Some(now + INITIATOR_FIRST);
    }

    /// Finds the configured peer whose identity and PSK fit, among those that may be at this address.
    fn authenticate(
        &self,
        shared: &Shared,
        identity: &Identity,
        wanted: Option<&Identity>,
        request: &AuthRequest<'_>,
    ) -> Result<PeerConfig, (FailureReason, String)> {
        let (Some(suite), Some(keys)) = (self.suite, self.keys.as_ref()) else {
            return Err((FailureReason::BadMessage, String::new()));
        };
        let Some(proof) = &request.auth else {
            let detail = format!("{identity} wants EAP, and the tunnels have PSKs");
            return Err((FailureReason::WeRefusedAuth, detail));
        };
        let answer = proposals::ike_answer(&suite, 1);
        let known: Vec<&PeerConfig> = shared
            .peers_at(self.remote.ip())
            .filter(|peer| {
                is_expected(peer, identity)
                    && wanted.is_none_or(|wanted| *wanted == peer.identity_at(self.local.ip()))
                    && proposals::choose_ike(&peer.proposals, &answer, None).is_some()
            })
            .collect();
        let signed = Signed {
            message: &self.init_request,
            nonce: &self.nonce_r,
            sk_p: &keys.sk_pi,
            id: &id_body(request.id_i.kind.0, request.id_i.data),
        };
        let mut last = None;
        for peer in known {
            match check_psk(suite.prf, &peer.psk, &signed, proof, identity) {
                Ok(()) if shared.is_held(peer.id) => {
                    let detail =
                        "the tunnel was taken down here, until it is brought up again".to_owned();
                    return Err((FailureReason::WeRefusedAuth, detail));
                }
                Ok(()) => return Ok(peer.clone()),
                Err(why) => last = Some(why),
            }
        }
        Err(match last {
            Some(why) => (FailureReason::WeRefusedAuth, why),
            None => (
                FailureReason::UnknownPeer,
                format!(
                    "it is {identity}{}",
                    wanted.map_or_else(String::new, |wanted| format!(" and asks for {wanted}"))
                ),
            ),
        })
    }

    /// Refuses an identity that is up from elsewhere already, where the configuration keeps the one that came first.
    // RFC 7296 section 2.4: INITIAL_CONTACT says that the one that came first is gone.
    fn is_unique(
        &self,
        shared: &mut Shared,
        peer: PeerConfig,
        identity: &Identity,
        request: &AuthRequest<'_>,
    ) -> Result<PeerConfig, (FailureReason, String)> {
        if peer.unique != Unique::Keep || request.notifies.has(NotifyType::INITIAL_CONTACT) {
            return Ok(peer);
        }
        let Some(other) = shared.present_elsewhere(peer.id, identity, self.remote.ip()) else {
            return Ok(peer);
        };
        let (ike, address) = (other.ike, other.address);
        let detail = format!("{identity} is up from {address} already, and unique = \"keep\"");
        shared.follow_ups.push_back(FollowUp::Doubt(ike));
        Err((FailureReason::WeRefusedAuth, detail))
    }

    fn answer_auth(
        &mut self,
        shared: &mut Shared,
        now: Time,
        bytes: &[u8],
        peer: &PeerConfig,
        ours: &Identity,
        request: &AuthRequest<'_>,
    ) {
        let (Some(suite), Some(keys)) = (self.suite, self.keys.clone()) else {
            return;
        };
        let (kind, data) = ours.to_wire();
        let proof = auth::psk(
            suite.prf,
            &peer.psk,
            &Signed {
                message: &self.init_response,
                nonce: &self.nonce_i,
                sk_p: &keys.sk_pr,
                id: &id_body(kind.0, &data),
            },
        );
        let answer = request
            .child
            .as_ref()
            .map(|offer| self.accept_first_child(shared, now, offer));
        let mut payloads = vec![
            Payload::IdResponder(Identification { kind, data: &data }),
            Payload::Authentication(Authentication {
                method: AuthMethod::SHARED_KEY,
                data: &proof,
            }),
        ];
        // RFC 6311 section 4.2: only who has heard of it is told.
        self.sync.agreed = request
            .notifies
            .has(NotifyType::IKEV2_MESSAGE_ID_SYNC_SUPPORTED);
        if self.sync.agreed {
            payloads.push(sync_supported());
        }
        let mobike = if self.mobike.agreed {
            self.offer_mobike(shared)
        } else {
            Vec::new()
        };
        payloads.extend(mobike::payloads(&mobike));
        let spi = PendingChild::spi_of(answer.as_ref());
        if let Some(answer) = &answer {
            PendingChild::answer_payloads(answer, &spi, &mut payloads);
        }
        self.respond(shared, now, ExchangeType::IKE_AUTH, bytes, &payloads);
    }
}
