//! The initiator's side of IKE_SA_INIT and IKE_AUTH (RFC 7296 sections 1.2, 2.6, 2.7 and 2.23).

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
};

use zeroize::Zeroizing;

use super::{
    Closed, Exchange, FollowUp, IkeSa, Nat, State, Task, child::PendingChild, mobike,
    rekey::Succession, sync::sync_supported,
};
use crate::ike::{
    Identity,
    config::{ChildName, NatPolicy, PeerConfig},
    crypto::{
        Group,
        auth::{self, Signed},
        ke::PrivateKey,
        keys::IkeKeys,
    },
    endpoint::{Shared, nat_hash},
    event::{DownReason, FailureReason, IkeSaId, Stage},
    exchange::{AuthResponse, InitResponse, Notifies},
    job::{Job, JobId, JobResult},
    message::{
        ExchangeType, IkeSpi, Message, MessageId, Payload,
        payload::{
            AuthMethod, Authentication, Identification, KeMethod, KeyExchange, Nonce, Notify,
            NotifyType,
        },
    },
    negotiate::proposals,
    time::Time,
};

/// Times that a responder may send us back to the start.
const MOST_DETOURS: u32 = 5;
/// Length of our nonces in bytes.
// RFC 7296 section 2.10: at least half of the PRF's key; 32 is enough for all.
pub(super) const NONCE_BYTES: usize = 32;

/// What it takes to start.
pub(in crate::ike) struct Start {
    pub(in crate::ike) id: IkeSaId,
    pub(in crate::ike) local: SocketAddr,
    pub(in crate::ike) remote: SocketAddr,
    pub(in crate::ike) spi: IkeSpi,
}

impl IkeSa {
    /// A blank one. Its SPIs and its side are the caller's to set.
    pub(super) fn blank(id: IkeSaId, now: Time, local: SocketAddr, remote: SocketAddr) -> Self {
        Self {
            id,
            peer: None,
            initiator: false,
            spi_i: IkeSpi(0),
            spi_r: IkeSpi(0),
            local,
            remote,
            state: State::Respond,
            nat: Nat::default(),
            established: None,
            begun: now,
            suite: None,
            keys: None,
            private: None,
            public: Vec::new(),
            peer_takes_childless: false,
            cookie: Vec::new(),
            detours: 0,
            nonce_i: Vec::new(),
            nonce_r: Vec::new(),
            lowest_nonce: Vec::new(),
            init_request: Vec::new(),
            init_response: Vec::new(),
            local_id: None,
            remote_id: None,
            next_request: 0,
            expected_request: 0,
            outstanding: None,
            answered: None,
            asked_from: (local, remote),
            fragments: super::fragments::Fragments::default(),
            sync: super::sync::Sync::default(),
            mobike: super::mobike::Mobike::default(),
            tasks: VecDeque::new(),
            job: None,
            asking: None,
            answering: None,
            packets: BTreeMap::new(),
            children: Vec::new(),
            children_at: None,
            children_since: None,
            made_by_last_answer: None,
            child_failures: 0,
            busy: None,
            heard: now,
            sent: now,
            younger: None,
            life: None,
            proof: None,
            succession: Succession::InForce,
        }
    }

    /// Begins an IKE SA with a configured peer.
    pub(in crate::ike) fn start(
        shared: &mut Shared,
        now: Time,
        peer: &PeerConfig,
        start: &Start,
    ) -> Self {
        let mut sa = Self {
            peer: Some(peer.id),
            initiator: true,
            spi_i: start.spi,
            nonce_i: shared.random_bytes(NONCE_BYTES),
            ..Self::blank(start.id, now, start.local, start.remote)
        };
        match peer
            .proposals
            .iter()
            .flat_map(|proposal| &proposal.groups)
            .next()
        {
            Some(group) => sa.begin_key_exchange(shared, *group),
            // The configuration refuses a proposal without a group.
            None => sa.state = State::Closed,
        }
        sa
    }

    fn begin_key_exchange(&mut self, shared: &mut Shared, group: Group) {
        let private = PrivateKey::generate(group, &mut *shared.random);
        self.private = Some(private.clone());
        self.state = State::Public;
        self.job = Some(self.queue_job(shared, private, None, true));
    }

    pub(super) fn queue_job(
        &self,
        shared: &mut Shared,
        private: PrivateKey,
        peer: Option<Vec<u8>>,
        public: bool,
    ) -> JobId {
        let id = shared.next_job();
        shared
            .jobs
            .push_back(Job::new(id, self.id, private, peer, public));
        id
    }

    pub(super) fn public_computed(&mut self, shared: &mut Shared, now: Time, result: JobResult) {
        self.public = result.public;
        self.send_init(shared, now);
    }

    /// Sends IKE_SA_INIT, with a cookie if the responder asked for one.
    fn send_init(&mut self, shared: &mut Shared, now: Time) {
        let Some((peer, group)) = self
            .peer_config(shared)
            .zip(self.private.as_ref().map(PrivateKey::group))
        else {
            return self.close(shared, DownReason::Operator, Closed::Wanted);
        };
        let offer = proposals::ike_offer(&peer.proposals);
        let policy = peer.nat;
        let fragments = peer.fragment_size.is_some();
        let source = match policy {
            // A hash that fits no address makes the peer believe in a NAT, hence in encapsulation.
            NatPolicy::Force => shared.random_bytes(20),
            NatPolicy::Auto | NatPolicy::Forbid => {
                nat_hash(self.spi_i, IkeSpi(0), self.local).to_vec()
            }
        };
        let destination = nat_hash(self.spi_i, IkeSpi(0), self.remote);
        let cookie = self.cookie.clone();
        let public = self.public.clone();
        let nonce = self.nonce_i.clone();
        let Ok(nonce) = Nonce::new(&nonce) else {
            return;
        };
        let mut payloads = Vec::new();
        // RFC 7296 section 2.6: the cookie comes first, all else unchanged.
        if !cookie.is_empty() {
            payloads.push(Payload::Notify(Notify::new(NotifyType::COOKIE, &cookie)));
        }
        payloads.extend([
            Payload::SecurityAssociation(offer),
            Payload::KeyExchange(KeyExchange {
                method: KeMethod(group.id()),
                public: &public,
            }),
            Payload::Nonce(nonce),
        ]);
        if policy != NatPolicy::Forbid {
            payloads.extend(nat_notifies(&source, &destination));
        }
        if fragments {
            payloads.push(fragmentation_supported());
        }
        let message = Message {
            header: self.header(ExchangeType::IKE_SA_INIT, 0, false),
            payloads,
        };
        let Ok(bytes) = message.emit() else { return };
        self.init_request.clone_from(&bytes);
        self.state = State::InitSent;
        // RFC 7296 section 2.2: IKE_SA_INIT has ID 0, however often it begins anew.
        self.next_request = 0;
        self.send_request(shared, now, vec![bytes], Exchange::Init);
    }

    pub(super) fn init_response(
        &mut self,
        shared: &mut Shared,
        now: Time,
        from: (SocketAddr, SocketAddr),
        bytes: &[u8],
        message: &Message<'_>,
    ) {
        if self.state != State::InitSent
            || message.header.message_id != MessageId(0)
            || from.1 != self.remote
        {
            return;
        }
        // Nothing of this is authentic, so what makes no sense is ignored: the true response may follow.
        match InitResponse::sort(message.payloads.clone()) {
            Ok(InitResponse::Notified(notifies)) => self.init_notified(shared, now, &notifies),
            Ok(InitResponse::Agreed {
                sa,
                ke,
                nonce,
                notifies,
            }) => {
                let Some(peer) = self.peer_config(shared) else {
                    return self.close(shared, DownReason::Operator, Closed::Wanted);
                };
                let policy = peer.nat;
                let fragments = peer.fragment_size.is_some();
                let chosen = proposals::choose_ike(&peer.proposals, &sa, Some(ke.method.0))
                    .map(|(suite, _)| suite)
                    .filter(|suite| {
                        sa.proposals.len() == 1
                            && suite.group.id() == ke.method.0
                            && self.private.as_ref().map(PrivateKey::group) == Some(suite.group)
                    });
                let Some(suite) = chosen else { return };
                if message.header.spi_r == IkeSpi(0) {
                    return;
                }
                let Some(private) = self.private.take() else {
                    return;
                };
                self.suite = Some(suite);
                self.spi_r = message.header.spi_r;
                self.peer_takes_childless = notifies.has(NotifyType::CHILDLESS_IKEV2_SUPPORTED);
                self.nonce_r = nonce.bytes().to_vec();
                self.init_response = bytes.to_vec();
                self.outstanding = None;
                self.fragments.agreed =
                    fragments && notifies.has(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED);
                if policy != NatPolicy::Forbid {
                    self.detect_nat(&notifies);
                }
                self.state = State::Agree;
                let public = ke.public.to_vec();
                self.job = Some(self.queue_job(shared, private, Some(public), false));
            }
            Err(_) => {}
        }
    }

    fn init_notified(&mut self, shared: &mut Shared, now: Time, notifies: &Notifies<'_>) {
        if self.detours >= MOST_DETOURS {
            return;
        }
        if let Some(cookie) = notifies.find(NotifyType::COOKIE) {
            // RFC 7296 section 2.6: 1 to 64 bytes.
            if (1..=64).contains(&cookie.data.len()) {
                self.detours += 1;
                self.cookie = cookie.data.to_vec();
                self.send_init(shared, now);
            }
            return;
        }
        if notifies.has(NotifyType::INVALID_KE_PAYLOAD) {
            if let Some(group) = self.wanted_group(shared, notifies)
                && self.private.as_ref().map(PrivateKey::group) != Some(group)
            {
                self.detours += 1;
                self.outstanding = None;
                self.begin_key_exchange(shared, group);
            }
            return;
        }
        let Some(error) = notifies.error() else {
            return;
        };
        let (reason, detail) = if error == NotifyType::NO_PROPOSAL_CHOSEN {
            let offered = self
                .peer_config(shared)
                .map(|peer| proposals::describe(&proposals::ike_offer(&peer.proposals)))
                .unwrap_or_default();
            (
                FailureReason::PeerRefusedProposals,
                format!("we offered {offered}"),
            )
        } else {
            (FailureReason::PeerError, error.to_string())
        };
        self.fail(shared, Stage::Init, reason, detail);
        self.close(shared, DownReason::Protocol, Closed::Failed);
    }

    /// The group that the peer asks for instead, if it is among those that we offer for an IKE SA.
    pub(super) fn wanted_group(&self, shared: &Shared, notifies: &Notifies<'_>) -> Option<Group> {
        let ours = &self.peer_config(shared)?.proposals;
        proposals::wanted_group(notifies, ours.iter().flat_map(|proposal| &proposal.groups))
    }

    /// Compares the hashes of addresses that the peer sent with those that we see.
    // RFC 7296 section 2.23: without these notifies there is no detection, hence no encapsulation.
    pub(super) fn detect_nat(&mut self, notifies: &Notifies<'_>) {
        let mut sources = notifies.all(NotifyType::NAT_DETECTION_SOURCE_IP).peekable();
        let Some(destination) = notifies.find(NotifyType::NAT_DETECTION_DESTINATION_IP) else {
            return;
        };
        if sources.peek().is_none() {
            return;
        }
        let (spi_i, spi_r) = if self.initiator {
            (self.spi_i, self.spi_r)
        } else {
            (self.spi_i, IkeSpi(0))
        };
        let remote = nat_hash(spi_i, spi_r, self.remote);
        let local = nat_hash(spi_i, spi_r, self.local);
        self.nat = Nat {
            supported: true,
            remote: !sources.any(|source| source.data == remote),
            local: destination.data != local,
        };
    }

    pub(super) fn agreed_as_initiator(
        &mut self,
        shared: &mut Shared,
        now: Time,
        result: JobResult,
    ) {
        if !self.derive_keys(shared, result) {
            return;
        }
        // RFC 7296 section 2.23: with a NAT in between, everything moves to port 4500 from here on.
        if self.encapsulates(shared) || self.leaves_ike_port(shared) {
            self.local.set_port(shared.config.nat_port);
            self.remote.set_port(crate::ike::endpoint::NAT_PORT);
        }
        self.send_auth(shared, now);
    }

    /// Derives the keys, or gives up on a public value that is not valid.
    pub(super) fn derive_keys(&mut self, shared: &mut Shared, result: JobResult) -> bool {
        match (self.suite, result.shared) {
            (Some(suite), Some(Ok(secret))) => {
                let keys = IkeKeys::derive(&suite, &secret, self.nonces(), self.spi_i, self.spi_r);
                self.keys = Some(keys);
                true
            }
            (_, error) => {
                let detail = match error {
                    Some(Err(error)) => error.to_string(),
                    _ => String::new(),
                };
                self.fail(shared, Stage::Init, FailureReason::BadMessage, detail);
                self.close(shared, DownReason::Protocol, Closed::Failed);
                false
            }
        }
    }

    /// Sends IKE_AUTH, with the first child that is wanted now.
    fn send_auth(&mut self, shared: &mut Shared, now: Time) {
        let Some(peer) = self.peer_config(shared).cloned() else {
            return self.close(shared, DownReason::Operator, Closed::Wanted);
        };
        let id = peer.identity_at(self.local.ip());
        let (kind, data) = id.to_wire();
        let Some(proof) = self.prove_as_initiator(&peer.psk, &id_body(kind.0, &data)) else {
            return self.close(shared, DownReason::Operator, Closed::Wanted);
        };
        let first = self.first_child(shared, &peer);
        let spi = first.as_ref().map(|pending| pending.spi_in.to_be_bytes());
        let expected = peer.remote_id.as_ref().map(Identity::to_wire);
        let mut payloads = vec![Payload::IdInitiator(Identification { kind, data: &data })];
        if let Some((kind, data)) = &expected {
            payloads.push(Payload::IdResponder(Identification { kind: *kind, data }));
        }
        payloads.push(Payload::Authentication(Authentication {
            method: AuthMethod::SHARED_KEY,
            data: &proof,
        }));
        if shared.is_first_contact(peer.id) {
            payloads.push(Payload::Notify(Notify::new(
                NotifyType::INITIAL_CONTACT,
                &[],
            )));
        }
        if let (Some(pending), Some(spi)) = (&first, &spi) {
            payloads.extend(pending.first_payloads(spi));
        }
        payloads.push(sync_supported());
        let mobike = self.offer_mobike(shared);
        payloads.extend(mobike::payloads(&mobike));
        self.local_id = Some(id);
        self.state = State::AuthSent;
        self.next_request = 1;
        let exchange = Exchange::Auth(first.clone());
        self.request(shared, now, ExchangeType::IKE_AUTH, &payloads, exchange);
    }

    /// The proof that we know the PSK; none without keys.
    fn prove_as_initiator(&self, psk: &[u8], id: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (suite, keys) = self.suite.zip(self.keys.as_ref())?;
        let signed = Signed {
            message: &self.init_request,
            nonce: &self.nonce_r,
            sk_p: &keys.sk_pi,
            id,
        };
        Some(auth::psk(suite.prf, psk, &signed))
    }

    /// The child that IKE_AUTH asks for, unless all of them wait or the tunnel's IKE SA is to begin without.
    fn first_child(&mut self, shared: &mut Shared, peer: &PeerConfig) -> Option<PendingChild> {
        let mut children = peer.children.iter();
        let child = children
            .find(|child| !shared.is_dormant(peer.id, child.id))
            .filter(|_| !(peer.childless && self.peer_takes_childless))?;
        let (local, remote) = (child.local.clone(), child.remote.clone());
        let packet = self.packets.remove(&child.id);
        Some(PendingChild::of(shared, child, local, remote).asked_for_by(packet))
    }

    pub(super) fn auth_response(
        &mut self,
        shared: &mut Shared,
        now: Time,
        pending: Option<PendingChild>,
        response: &AuthResponse<'_>,
    ) {
        let (id_r, proof, child, notifies) = match response {
            AuthResponse::Refused(error) => {
                let (reason, detail) = if *error == NotifyType::AUTHENTICATION_FAILED {
                    (FailureReason::PeerRefusedAuth, self.our_identity())
                } else {
                    (FailureReason::PeerError, error.to_string())
                };
                shared.release_pending(pending.map(|pending| pending.spi_in));
                self.fail(shared, Stage::Auth, reason, detail);
                return self.close(shared, DownReason::Protocol, Closed::Failed);
            }
            AuthResponse::Proof {
                id_r,
                auth,
                child,
                notifies,
            } => (id_r, auth, child, notifies),
        };
        let identity = Identity::from_wire(id_r.kind, id_r.data);
        if let Err(detail) = self.verify_responder(shared, &identity, id_r, proof) {
            shared.release_pending(pending.map(|pending| pending.spi_in));
            self.fail(shared, Stage::Auth, FailureReason::WeRefusedAuth, detail);
            // RFC 7296 section 2.21.2: the responder believes in this IKE SA and must be told.
            self.state = State::Deleting;
            self.begun = now;
            self.tasks.clear();
            self.tasks.push_back(Task::DeleteIke { refused: true });
            shared.follow_ups.push_back(FollowUp::Closed {
                peer: self.peer,
                why: Closed::Failed,
            });
            return;
        }
        self.remote_id = Some(identity);
        self.sync.agreed = notifies.has(NotifyType::IKEV2_MESSAGE_ID_SYNC_SUPPORTED);
        self.agree_on_mobike(shared, notifies);
        self.come_up(shared, now, false);
        self.peer_limits_proof(shared, now, notifies);
        let first = pending.as_ref().map(|pending| pending.child);
        if let Some(pending) = pending {
            match child {
                Some(offer) => self.first_child_agreed(shared, now, pending, offer),
                None => self.child_refused(shared, now, pending, notifies),
            }
        }
        self.ask_for_the_others(shared, first);
        self.forget_first_exchanges();
    }

    /// The children that IKE_AUTH had no place for.
    fn ask_for_the_others(&mut self, shared: &Shared, first: Option<ChildName>) {
        let others = self
            .peer_config(shared)
            .map(|peer| {
                peer.children
                    .iter()
                    .map(|child| child.id)
                    .collect::<Vec<_>>()
            })
            .unwrap_or_default();
        for id in others {
            if Some(id) != first && !self.is_dormant(shared, id) {
                self.tasks.push_back(Task::Child(id));
            }
        }
    }

    /// Whether a child waits for traffic or for the peer since the peer was dead.
    pub(super) fn is_dormant(&self, shared: &Shared, child: crate::ike::config::ChildName) -> bool {
        self.peer.is_some_and(|peer| shared.is_dormant(peer, child))
    }

    fn our_identity(&self) -> String {
        self.local_id
            .as_ref()
            .map_or_else(String::new, |id| format!("we are {id}"))
    }

    fn verify_responder(
        &self,
        shared: &Shared,
        identity: &Identity,
        id_r: &Identification<'_>,
        proof: &Authentication<'_>,
    ) -> Result<(), String> {
        let (Some(peer), Some(suite), Some(keys)) =
            (self.peer_config(shared), self.suite, self.keys.as_ref())
        else {
            return Err("the tunnel was removed".to_owned());
        };
        let expected = peer
            .remote_id
            .clone()
            .unwrap_or_else(|| Identity::from(self.remote.ip()));
        if *identity != expected {
            return Err(format!(
                "the peer is {identity}, and remote_id expects {expected}"
            ));
        }
        let signed = Signed {
            message: &self.init_response,
            nonce: &self.nonce_i,
            sk_p: &keys.sk_pr,
            id: &id_body(id_r.kind.0, id_r.data),
        };
        check_psk(suite.prf, &peer.psk, &signed, proof, identity)
    }

    /// Everything that both sides do once the peer is known to be who it says.
    pub(super) fn come_up(&mut self, shared: &mut Shared, now: Time, initial_contact: bool) {
        self.state = State::Up;
        self.established = Some(now);
        self.begin_proof(shared, now);
        self.set_lifetime(shared, now);
        if let (Some(peer), Some(info)) = (self.peer, self.info()) {
            shared.announce(peer, self.id, info);
            shared.follow_ups.push_back(FollowUp::Authenticated {
                ike: self.id,
                peer,
                initial_contact,
            });
        }
    }

    pub(super) fn peer_config<'a>(&self, shared: &'a Shared) -> Option<&'a PeerConfig> {
        shared.peer(self.peer?)
    }

    pub(super) fn fail(
        &self,
        shared: &mut Shared,
        stage: Stage,
        reason: FailureReason,
        detail: String,
    ) {
        shared.fail(self.peer, self.remote, stage, reason, detail);
    }
}

/// Whether the proof is that of the PSK; else why not, for people.
pub(super) fn check_psk(
    prf: crate::ike::crypto::Prf,
    psk: &[u8],
    signed: &Signed<'_>,
    proof: &Authentication<'_>,
    identity: &Identity,
) -> Result<(), String> {
    if proof.method != AuthMethod::SHARED_KEY {
        return Err(format!(
            "{identity} authenticates by method {} and not with a PSK",
            proof.method.0
        ));
    }
    if auth::psk_matches(prf, psk, signed, proof.data) {
        Ok(())
    } else {
        Err(format!(
            "wrong PSK for ID {identity}, or the peer uses another"
        ))
    }
}

/// The body of an ID payload, which both sides sign.
pub(super) fn id_body(kind: u8, data: &[u8]) -> Vec<u8> {
    [&[kind, 0, 0, 0], data].concat()
}

/// Tells the peer that messages may be split (RFC 7383 section 2.3).
pub(super) fn fragmentation_supported() -> Payload<'static> {
    Payload::Notify(Notify::new(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED, &[]))
}

/// The notifies of NAT detection.
pub(super) fn nat_notifies<'a>(source: &'a [u8], destination: &'a [u8]) -> [Payload<'a>; 2] {
    [
        Payload::Notify(Notify::new(NotifyType::NAT_DETECTION_SOURCE_IP, source)),
        Payload::Notify(Notify::new(
            NotifyType::NAT_DETECTION_DESTINATION_IP,
            destination,
        )),
    ]
}
