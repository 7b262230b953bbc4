//! An endpoint that strangers send datagrams to: it neither panics nor lets half-open IKE SAs pile up.
//!
//! The input is a row of datagrams, each after its length in two bytes.
#![no_main]

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use ipsec_common::TrafficSelector;
use ipsec_ctl::ike::{
    Endpoint,
    config::{ChildConfig, ChildName, EndpointConfig, NatPolicy, PeerConfig, PeerId, Role},
    event::Command,
    rng::Random,
    time::Time,
};
use libfuzzer_sys::fuzz_target;
use zeroize::Zeroizing;

const HALF_OPEN: u32 = 8;
const OURS: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));

/// Numbers that repeat, so that a finding does.
struct Counter(u64);

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

fn peer() -> PeerConfig {
    PeerConfig {
        id: PeerId(1),
        name: "peer".to_owned(),
        remote: Some(PEER),
        local: None,
        local_id: None,
        remote_id: None,
        psk: Zeroizing::new(b"secret".to_vec()),
        role: Role::Initiate,
        proposals: vec!["aes256gcm16-prfsha256-x25519".parse().expect("a proposal")],
        nat: NatPolicy::Auto,
        fragment_size: Some(1200),
        keepalive: Duration::from_secs(20),
        childless: false,
        dpd_interval: Duration::from_secs(10),
        dpd_timeout: Duration::from_secs(60),
        lifetime: Duration::from_secs(3600),
        children: vec![ChildConfig {
            id: ChildName(0),
            name: "child".to_owned(),
            local: vec![any()],
            remote: vec![any()],
            proposals: vec!["aes256gcm16".parse().expect("a proposal")],
            lifetime: Duration::from_secs(600),
        }],
    }
}

fn drain(endpoint: &mut Endpoint, now: Time) {
    while endpoint.poll_event().is_some() {}
    while endpoint.poll_transmit().is_some() {}
    while let Some(job) = endpoint.poll_job() {
        endpoint.handle_job(now, job.run());
    }
}

fuzz_target!(|input: &[u8]| {
    let config = EndpointConfig {
        ike_port: 500,
        nat_port: 4500,
        cookie_threshold: HALF_OPEN,
        half_open: HALF_OPEN,
        half_open_per_source: HALF_OPEN,
    };
    let mut endpoint = Endpoint::new(config, Box::new(Counter(7)));
    let mut now = Time::default();
    endpoint.handle_command(now, Command::SetPeer(Box::new(peer())));
    endpoint.handle_command(now, Command::Up(PeerId(1), (OURS, 500).into()));
    drain(&mut endpoint, now);
    let mut rest = input;
    while let Some((length, behind)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(behind.len());
        let (datagram, behind) = behind.split_at(length);
        rest = behind;
        now = now + Duration::from_millis(100);
        endpoint.handle_datagram(now, (OURS, 500).into(), (PEER, 500).into(), datagram);
        drain(&mut endpoint, now);
        if endpoint.poll_timeout().is_some_and(|at| at <= now) {
            endpoint.handle_timeout(now);
            drain(&mut endpoint, now);
        }
        assert!(endpoint.half_open() <= HALF_OPEN as usize);
        assert_eq!(endpoint.established().count(), 0, "nobody has the secret");
    }
});
