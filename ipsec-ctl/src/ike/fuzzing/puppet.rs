//! A peer that says what it is told to: it brings an IKE SA up honestly, from either side, and then seals whatever it is given.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use ipsec_common::TrafficSelector;
use zeroize::Zeroizing;

use crate::ike::{
    Endpoint, Identity,
    config::{
        ChildConfig, ChildName, DpdMode, EndpointConfig, Mode, NatPolicy, OnDead, PeerConfig,
        PeerId, Role, Unique,
    },
    crypto::{
        Group, IkeSuite,
        auth::{self, Signed},
        ke::PrivateKey,
        keys::{IkeKeys, Nonces, SkKeys},
        sk,
    },
    event::{Command, Event},
    exchange::{AuthRequest, InitRequest, InitResponse},
    message::{
        ExchangeType, Flags, Header, IkeSpi, Message, MessageId, Payload, PayloadType,
        parse_payloads,
        payload::{
            AuthMethod, Authentication, Identification, KeMethod, KeyExchange, Nonce, Notify,
            NotifyType, TrafficSelectors,
        },
    },
    negotiate::proposals,
    rng::Random,
    time::Time,
};

/// Address of the endpoint.
pub const OURS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 500);
/// Address of its peer.
pub const THEIRS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2)), 500);

const SECRET: &[u8] = b"a secret that both know";
const SPI: IkeSpi = IkeSpi(0x1122_3344_5566_7788);
const CHILD_SPI: [u8; 4] = [0xc0, 0xff, 0xee, 0x01];

/// Numbers that repeat, so that a finding does.
pub struct Counter(pub u64);

impl Random for Counter {
    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            *byte = self.0.to_be_bytes()[0];
        }
    }
}

fn any() -> TrafficSelector {
    TrafficSelector {
        protocol: 0,
        ports: (0, u16::MAX),
        addresses: (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::BROADCAST.into()),
    }
}

/// What the endpoint knows of its peer.
///
/// # Panics
///
/// Never: the proposals are good.
pub fn peer(role: Role) -> PeerConfig {
    PeerConfig {
        id: PeerId(1),
        name: "peer".to_owned(),
        remote: THEIRS.ip().into(),
        local: None,
        local_id: None,
        remote_id: None,
        psk: Zeroizing::new(SECRET.to_vec()),
        role,
        proposals: vec!["aes256gcm16-prfsha256-x25519".parse().expect("a proposal")],
        nat: NatPolicy::Auto,
        fragment_size: Some(1280),
        mobike: true,
        return_routability: true,
        childless: false,
        reauth: false,
        keepalive: Duration::from_secs(20),
        dpd_mode: DpdMode::OnDemand,
        dpd_interval: Duration::from_secs(10),
        unique: Unique::Replace,
        dpd_timeout: Duration::from_secs(60),
        lifetime: Duration::from_secs(3600),
        children: vec![ChildConfig {
            id: ChildName(0),
            name: "child".to_owned(),
            local: vec![any()],
            remote: vec![any()],
            proposals: vec!["aes256gcm16".parse().expect("a proposal")],
            lifetime: Duration::from_secs(600),
            on_dead: OnDead::Restart,
            mode: Mode::Tunnel,
        }],
    }
}

/// The endpoint, its clock, and what it has sent and told.
pub struct Bench {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// Where its peer's datagrams come from.
    pub theirs: SocketAddr,
    /// The time.
    pub now: Time,
    /// Datagrams that it has sent since they were last taken.
    pub sent: Vec<Vec<u8>>,
    /// What it has told since that was last taken.
    pub events: Vec<Event>,
}

impl Bench {
    /// An endpoint with one peer and room for so many half-open IKE SAs.
    pub fn new(half_open: u32, role: Role) -> Self {
        let config = EndpointConfig {
            ike_port: 500,
            nat_port: 4500,
            cookie_threshold: half_open,
            half_open,
            half_open_per_source: half_open,
        };
        let mut bench = Self {
            endpoint: Endpoint::new(config, Box::new(Counter(7))),
            theirs: THEIRS,
            now: Time::default(),
            sent: Vec::new(),
            events: Vec::new(),
        };
        bench.command(Command::SetPeer(Box::new(peer(role))));
        bench
    }

    /// Tells the endpoint to do something.
    pub fn command(&mut self, command: Command) {
        self.endpoint.handle_command(self.now, command);
        self.drain();
    }

    /// Delivers a datagram of the peer; returns what it is answered with.
    pub fn deliver(&mut self, datagram: &[u8]) -> Vec<Vec<u8>> {
        self.drain();
        self.sent.clear();
        self.endpoint
            .handle_datagram(self.now, OURS, self.theirs, datagram);
        self.drain();
        std::mem::take(&mut self.sent)
    }

    /// Lets time pass.
    pub fn wait(&mut self, time: Duration) {
        self.now = self.now + time;
        if self
            .endpoint
            .poll_timeout()
            .is_some_and(|at| at <= self.now)
        {
            self.endpoint.handle_timeout(self.now);
            self.drain();
        }
    }

    fn drain(&mut self) {
        loop {
            if let Some(event) = self.endpoint.poll_event() {
                self.events.push(event);
            } else if let Some(transmit) = self.endpoint.poll_transmit() {
                self.sent.push(transmit.bytes);
            } else if let Some(job) = self.endpoint.poll_job() {
                self.endpoint.handle_job(self.now, job.run());
            } else {
                return;
            }
        }
    }
}

/// The peer, once its IKE SA is up.
pub struct Puppet {
    /// It has started the IKE SA.
    initiator: bool,
    suite: IkeSuite,
    keys: IkeKeys,
    spi_i: IkeSpi,
    spi_r: IkeSpi,
    random: Counter,
}

impl Puppet {
    /// Brings an IKE SA with one child up, and tells in IKE_AUTH what it supports.
    pub fn connect(bench: &mut Bench, supports: &[NotifyType]) -> Option<Self> {
        let config = peer(Role::Respond);
        let mut random = Counter(99);
        let private = PrivateKey::generate(Group::Curve25519, &mut random);
        let (public, nonce) = (private.public(), [5; 32]);
        let init = Message {
            header: header((SPI, IkeSpi(0)), true, ExchangeType::IKE_SA_INIT, 0, false),
            payloads: vec![
                Payload::SecurityAssociation(proposals::ike_offer(&config.proposals)),
                Payload::KeyExchange(KeyExchange {
                    method: KeMethod(Group::Curve25519.id()),
                    public: &public,
                }),
                Payload::Nonce(Nonce::new(&nonce).ok()?),
                notify(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED),
            ],
        }
        .emit()
        .ok()?;
        let answers = bench.deliver(&init);
        let message = Message::parse(answers.first()?).ok()?;
        let answer = InitResponse::sort(message.payloads.clone()).ok()?;
        let InitResponse::Agreed {
            sa,
            ke,
            nonce: nonce_r,
            ..
        } = answer
        else {
            return None;
        };
        let (suite, _) = proposals::choose_ike(&config.proposals, &sa, None)?;
        let spi_r = message.header.spi_r;
        let secret = private.agree(ke.public).ok()?;
        let nonces = Nonces {
            initiator: &nonce,
            responder: nonce_r.bytes(),
        };
        let keys = IkeKeys::derive(&suite, &secret, nonces, SPI, spi_r);
        let mut puppet = Self {
            initiator: true,
            suite,
            keys,
            spi_i: SPI,
            spi_r,
            random,
        };
        let auth = puppet.auth(&init, nonce_r.bytes(), &config, supports)?;
        bench.deliver(&auth);
        Some(puppet)
    }

    /// Lets the endpoint bring an IKE SA with one child up, and tells in the answer to IKE_AUTH what it supports.
    pub fn answer(bench: &mut Bench, supports: &[NotifyType]) -> Option<Self> {
        let config = peer(Role::Respond);
        let mut random = Counter(99);
        bench.command(Command::Up(config.id, OURS));
        let init = bench.sent.pop()?;
        let message = Message::parse(&init).ok()?;
        let request = InitRequest::sort(message.payloads.clone()).ok()?;
        let (suite, number) =
            proposals::choose_ike(&config.proposals, &request.sa, Some(request.ke.method.0))?;
        let private = PrivateKey::generate(suite.group, &mut random);
        let (public, nonce) = (private.public(), [6; 32]);
        let spi_i = message.header.spi_i;
        let response = Message {
            header: header((spi_i, SPI), false, ExchangeType::IKE_SA_INIT, 0, true),
            payloads: vec![
                Payload::SecurityAssociation(proposals::ike_answer(&suite, number)),
                Payload::KeyExchange(KeyExchange {
                    method: KeMethod(suite.group.id()),
                    public: &public,
                }),
                Payload::Nonce(Nonce::new(&nonce).ok()?),
            ],
        }
        .emit()
        .ok()?;
        let secret = private.agree(request.ke.public).ok()?;
        let nonces = Nonces {
            initiator: request.nonce.bytes(),
            responder: &nonce,
        };
        let keys = IkeKeys::derive(&suite, &secret, nonces, spi_i, SPI);
        let mut puppet = Self {
            initiator: false,
            suite,
            keys,
            spi_i,
            spi_r: SPI,
            random,
        };
        let asked = bench.deliver(&response);
        let auth = puppet.answer_auth(asked.first()?, &response, nonces.initiator, supports)?;
        bench.deliver(&auth);
        Some(puppet)
    }

    fn answer_auth(
        &mut self,
        request: &[u8],
        init: &[u8],
        nonce: &[u8],
        supports: &[NotifyType],
    ) -> Option<Vec<u8>> {
        let config = peer(Role::Respond);
        let child = config.children.first()?;
        let choice = self
            .open(request, |_, payloads| {
                let offer = AuthRequest::sort(payloads).ok()?.child?;
                proposals::choose_child(&child.proposals, &offer.sa, true)
            })
            .flatten()?;
        let (kind, data) = Identity::from(THEIRS.ip()).to_wire();
        let proof = self.proof(init, nonce, kind.0, &data);
        let mut payloads = vec![
            Payload::IdResponder(Identification { kind, data: &data }),
            Payload::Authentication(Authentication {
                method: AuthMethod::SHARED_KEY,
                data: &proof,
            }),
            Payload::SecurityAssociation(proposals::child_answer(
                &choice.suite,
                choice.number,
                &CHILD_SPI,
            )),
            Payload::TsInitiator(TrafficSelectors::new(&child.remote)),
            Payload::TsResponder(TrafficSelectors::new(&child.local)),
        ];
        payloads.extend(supports.iter().map(|kind| notify(*kind)));
        self.seal(ExchangeType::IKE_AUTH, 1, true, &payloads)
    }

    /// The proof of its identity.
    fn proof(&self, init: &[u8], nonce: &[u8], kind: u8, data: &[u8]) -> Vec<u8> {
        let signed = Signed {
            message: init,
            nonce,
            sk_p: if self.initiator {
                &self.keys.sk_pi
            } else {
                &self.keys.sk_pr
            },
            id: &[&[kind, 0, 0, 0], data].concat(),
        };
        auth::psk(self.suite.prf, SECRET, &signed).to_vec()
    }

    fn auth(
        &mut self,
        init: &[u8],
        nonce: &[u8],
        config: &PeerConfig,
        supports: &[NotifyType],
    ) -> Option<Vec<u8>> {
        let (kind, data) = Identity::from(THEIRS.ip()).to_wire();
        let proof = self.proof(init, nonce, kind.0, &data);
        let child = config.children.first()?;
        let mut payloads = vec![
            Payload::IdInitiator(Identification { kind, data: &data }),
            Payload::Authentication(Authentication {
                method: AuthMethod::SHARED_KEY,
                data: &proof,
            }),
            Payload::SecurityAssociation(proposals::child_offer(
                &child.proposals,
                &CHILD_SPI,
                true,
            )),
            Payload::TsInitiator(TrafficSelectors::new(&child.remote)),
            Payload::TsResponder(TrafficSelectors::new(&child.local)),
        ];
        payloads.extend(supports.iter().map(|kind| notify(*kind)));
        self.seal(ExchangeType::IKE_AUTH, 1, false, &payloads)
    }

    fn header(&self, exchange: ExchangeType, id: u32, response: bool) -> Header {
        let spis = (self.spi_i, self.spi_r);
        header(spis, self.initiator, exchange, id, response)
    }

    /// Seals a message.
    pub fn seal(
        &mut self,
        exchange: ExchangeType,
        id: u32,
        response: bool,
        payloads: &[Payload<'_>],
    ) -> Option<Vec<u8>> {
        let header = self.header(exchange, id, response);
        let keys = keys_of(&self.keys, self.initiator);
        sk::seal(&header, payloads, &self.suite, keys, &mut self.random).ok()
    }

    /// Seals a message in fragments of at most so many bytes.
    pub fn seal_split(
        &mut self,
        exchange: ExchangeType,
        id: u32,
        payloads: &[Payload<'_>],
        most: usize,
    ) -> Option<Vec<Vec<u8>>> {
        let header = self.header(exchange, id, false);
        let (keys, random) = (keys_of(&self.keys, self.initiator), &mut self.random);
        sk::seal_split(&header, payloads, &self.suite, keys, random, most).ok()
    }

    /// Opens a message of the endpoint, and hands its header and payloads to `look`.
    pub fn open<T>(
        &self,
        bytes: &[u8],
        look: impl FnOnce(&Header, Vec<Payload<'_>>) -> T,
    ) -> Option<T> {
        let message = Message::parse(bytes).ok()?;
        let Some(Payload::Encrypted(encrypted)) = message.payloads.last() else {
            return None;
        };
        let theirs = keys_of(&self.keys, !self.initiator);
        let chain = sk::open(bytes, encrypted, &self.suite, theirs).ok()?;
        let payloads = parse_payloads(encrypted.first, &chain).ok()?;
        Some(look(&message.header, payloads))
    }
}

/// A notify without data.
pub fn notify(kind: NotifyType) -> Payload<'static> {
    Payload::Notify(Notify::new(kind, &[]))
}

/// The keys of what one side sends.
fn keys_of(keys: &IkeKeys, initiator: bool) -> &SkKeys {
    if initiator {
        &keys.initiator
    } else {
        &keys.responder
    }
}

fn header(
    (spi_i, spi_r): (IkeSpi, IkeSpi),
    initiator: bool,
    exchange: ExchangeType,
    id: u32,
    response: bool,
) -> Header {
    Header {
        spi_i,
        spi_r,
        first: PayloadType::NONE,
        minor: 0,
        exchange,
        flags: Flags {
            initiator,
            version: false,
            response,
        },
        message_id: MessageId(id),
    }
}
