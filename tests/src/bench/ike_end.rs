//! An IKE endpoint of ours behind a socket, in one thread: what answers and what asks in the measurement of set-ups.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use anyhow::Context;
use ipsec_ctl::ike::{
    Endpoint, Identity,
    config::{DpdMode, EndpointConfig, NatPolicy, PeerConfig, PeerId, Remote, Role, Unique},
    event::{Command, Event},
    rng::SystemRandom,
    time::Time,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::gateway::PSK;

const IKE_PORT: u16 = 500;
/// Longest IKE message that is exchanged here, and more.
const LONGEST: usize = 4096;
/// Datagrams taken before others have their turn.
const BATCH: usize = 64;
/// Longest sleep.
const NAP: Duration = Duration::from_millis(50);

/// The endpoint and its socket.
pub(super) struct IkeEnd {
    endpoint: Endpoint,
    socket: UdpSocket,
    local: SocketAddr,
    start: Instant,
    /// IKE SAs that have come up.
    pub(super) up: usize,
    /// What went wrong last.
    pub(super) failure: Option<String>,
}

impl IkeEnd {
    /// At that address of the namespace of the thread. Demands no cookies.
    ///
    /// # Errors
    ///
    /// The port is taken.
    pub(super) fn open(address: IpAddr) -> anyhow::Result<Self> {
        let local = SocketAddr::new(address, IKE_PORT);
        let socket = UdpSocket::bind(local).with_context(|| local.to_string())?;
        socket.set_nonblocking(true)?;
        let config = EndpointConfig {
            ike_port: IKE_PORT,
            nat_port: 4500,
            cookie_threshold: u32::MAX,
            half_open: u32::MAX,
            half_open_per_source: u32::MAX,
        };
        Ok(Self {
            endpoint: Endpoint::new(config, Box::new(SystemRandom::new())),
            socket,
            local,
            start: Instant::now(),
            up: 0,
            failure: None,
        })
    }

    /// Lets whoever knows the key come up.
    ///
    /// # Errors
    ///
    /// There is no such suite.
    pub(super) fn answer(&mut self, suite: &str) -> anyhow::Result<()> {
        let peer = peer(PeerId(0), suite, Remote::Anywhere, Role::Respond)?;
        self.tell(Command::SetPeer(Box::new(PeerConfig {
            local_id: Some(identity("hub")?),
            ..peer
        })));
        Ok(())
    }

    /// Begins an IKE SA with a peer, under an identity of that number.
    ///
    /// # Errors
    ///
    /// There is no such suite.
    pub(super) fn ask(&mut self, number: u32, suite: &str, remote: IpAddr) -> anyhow::Result<()> {
        let id = PeerId(number);
        let peer = peer(id, suite, remote.into(), Role::OnDemand)?;
        self.tell(Command::SetPeer(Box::new(PeerConfig {
            local_id: Some(identity(&format!("host{number}"))?),
            remote_id: Some(identity("hub")?),
            ..peer
        })));
        self.tell(Command::Up(id, self.local));
        Ok(())
    }

    /// Does what there is to do, and sleeps a little if that is nothing.
    ///
    /// # Errors
    ///
    /// The socket breaks.
    pub(super) fn turn(&mut self) -> anyhow::Result<()> {
        let mut buffer = [0; LONGEST];
        let mut taken = 0;
        while taken < BATCH
            && let Ok((length, remote)) = self.socket.recv_from(&mut buffer)
        {
            let now = self.now();
            self.endpoint
                .handle_datagram(now, self.local, remote, &buffer[..length]);
            self.drain();
            taken += 1;
        }
        if self
            .endpoint
            .poll_timeout()
            .is_some_and(|at| at <= self.now())
        {
            let now = self.now();
            self.endpoint.handle_timeout(now);
            self.drain();
        }
        if taken == 0 {
            let mut waits = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            poll(&mut waits, PollTimeout::try_from(NAP)?)?;
        }
        Ok(())
    }

    fn tell(&mut self, command: Command) {
        let now = self.now();
        self.endpoint.handle_command(now, command);
        self.drain();
    }

    fn drain(&mut self) {
        loop {
            while let Some(event) = self.endpoint.poll_event() {
                match event {
                    Event::IkeUp(_) => self.up += 1,
                    Event::Failed(failure) => self.failure = Some(format!("{failure:?}")),
                    Event::IkeDown { reason, .. } => self.failure = Some(format!("{reason:?}")),
                    Event::IkeRekeyed(_)
                    | Event::ChildUp(_)
                    | Event::Outbound(_)
                    | Event::OutboundDown(_)
                    | Event::ChildDown { .. }
                    | Event::Moved(..)
                    | Event::Exhausted(_)
                    | Event::Unreachable(_) => {}
                }
            }
            while let Some(transmit) = self.endpoint.poll_transmit() {
                // What a full socket loses is sent again.
                let _ = self.socket.send_to(&transmit.bytes, transmit.remote);
            }
            let Some(job) = self.endpoint.poll_job() else {
                return;
            };
            let result = job.run();
            let now = self.now();
            self.endpoint.handle_job(now, result);
        }
    }

    fn now(&self) -> Time {
        Time(self.start.elapsed())
    }
}

fn identity(name: &str) -> anyhow::Result<Identity> {
    format!("{name}.example")
        .parse()
        .map_err(|error| anyhow::anyhow!("{name}: {error}"))
}

/// A peer without children (RFC 6023), so that nothing but IKE is measured.
fn peer(id: PeerId, suite: &str, remote: Remote, role: Role) -> anyhow::Result<PeerConfig> {
    let proposal = suite
        .parse()
        .map_err(|error| anyhow::anyhow!("{suite}: {error}"))?;
    Ok(PeerConfig {
        id,
        name: "peer".to_owned(),
        remote,
        local: None,
        local_id: None,
        remote_id: None,
        psk: PSK.as_bytes().to_vec().into(),
        role,
        proposals: vec![proposal],
        nat: NatPolicy::Auto,
        fragment_size: None,
        keepalive: Duration::from_secs(20),
        dpd_mode: DpdMode::Off,
        dpd_interval: Duration::from_secs(10),
        dpd_timeout: Duration::from_secs(60),
        childless: true,
        mobike: false,
        return_routability: false,
        unique: Unique::Never,
        lifetime: Duration::from_secs(86_400),
        reauth: false,
        children: vec![],
    })
}
