//! What `status` and `counters` show.

use std::{fs, path::Path};

use super::{
    convert,
    gateway::Gateway,
    reload::Asker,
    tunnels::{SaPair, Sends, TunnelState},
};
use crate::{
    api::{
        Request,
        model::{
            Child, Counter, DeviceChanged, Direction, Done, IkeSa, Interface, PeerAddress, Refused,
            Rekey, State, Status, Tunnel,
        },
    },
    config::{Peer, Role},
    dataplane::seam::{InterfaceStatus, Offload, OffloadReason, SaId, SaStats, TunnelId, XdpMode},
    ike::{
        config::{ChildName, PeerId},
        event::{self, Command, IkeInfo},
    },
};

impl Gateway {
    pub(super) async fn request(&mut self, request: Request) {
        let (outcome, answer) = match request {
            // Whoever asked and went away does not want the answer.
            Request::Status(answer) => return drop(answer.send(self.status().await)),
            Request::Counters(answer) => return drop(answer.send(self.counters().await)),
            Request::Reload(answer) => return self.reload(Asker::Client(answer)),
            Request::Up(name, answer) => (self.up(&name).await, answer),
            Request::Down(name, answer) => (self.down(&name), answer),
            Request::Rekey(name, what, answer) => (self.rekey(&name, what), answer),
            Request::Move(name, engine, answer) => (self.move_tunnel(&name, engine).await, answer),
        };
        self.answer(Asker::Client(answer), outcome);
    }

    /// Tells whoever wanted something changed what has become of it. That is written down before, so that it holds even if the
    /// daemon dies in the next moment.
    pub(super) fn answer(&mut self, asker: Asker, outcome: Result<Done, Refused>) {
        self.save();
        asker.tell(outcome);
    }

    async fn up(&mut self, name: &str) -> Result<Done, Refused> {
        let id = self.named(name)?;
        let Some(tunnel) = self.tunnels.get_mut(id) else {
            return Err(self.unknown(name));
        };
        let was_down = std::mem::replace(&mut tunnel.down, false);
        if matches!(tunnel.config.peer, Peer::Any) {
            if was_down {
                let now = self.now();
                self.endpoint
                    .handle_command(now, Command::Allow(PeerId(id.0)));
                return Ok(Done {
                    lines: vec![format!("{name} comes up when its peer starts it")],
                });
            }
            return Err(Refused {
                message: format!("tunnel {name} has no peer address"),
                remedy: "its peer starts it; wait for the peer, or configure `peer`".to_owned(),
            });
        }
        tunnel.raised = true;
        self.bring_up(id);
        Ok(Done {
            lines: vec![format!(
                "{name} is coming up; `ipsec-ctl status {name}` tells how far it is"
            )],
        })
    }

    fn down(&mut self, name: &str) -> Result<Done, Refused> {
        let id = self.named(name)?;
        let now = self.now();
        if let Some(tunnel) = self.tunnels.get_mut(id) {
            tunnel.down = true;
            tunnel.raised = false;
            tunnel.pending = false;
        }
        self.endpoint
            .handle_command(now, Command::Down(PeerId(id.0)));
        Ok(Done {
            lines: vec![format!("{name} is down; what it protects stays blocked")],
        })
    }

    fn rekey(&mut self, name: &str, what: Rekey) -> Result<Done, Refused> {
        let id = self.named(name)?;
        let peer = PeerId(id.0);
        if !self.endpoint.established().any(|(_, up, _)| up == peer) {
            return Err(Refused {
                message: format!("tunnel {name} is not up"),
                remedy: format!("bring it up with `ipsec-ctl up {name}`"),
            });
        }
        let (what, words) = match what {
            Rekey::Children => (event::Rekey::Children, "its children are"),
            Rekey::Ike => (event::Rekey::Ike, "its IKE SA is"),
        };
        let now = self.now();
        self.endpoint
            .handle_command(now, Command::Rekey(peer, what));
        Ok(Done {
            lines: vec![format!(
                "{name}: {words} being rekeyed; `ipsec-ctl status {name}` shows the SPIs"
            )],
        })
    }

    pub(super) fn named(&self, name: &str) -> Result<TunnelId, Refused> {
        self.tunnels.find(name).ok_or_else(|| self.unknown(name))
    }

    pub(super) fn unknown(&self, name: &str) -> Refused {
        let known: Vec<&str> = self
            .tunnels
            .iter()
            .map(|(_, tunnel)| tunnel.config.name.as_str())
            .collect();
        Refused {
            message: format!("there is no tunnel `{name}`"),
            remedy: format!("the daemon knows these: {}", known.join(", ")),
        }
    }

    async fn counters(&self) -> Vec<Counter> {
        self.engine
            .counters()
            .await
            .into_iter()
            .map(|(reason, packets)| Counter {
                name: reason.name().to_owned(),
                kind: format!("{:?}", reason.kind()).to_lowercase(),
                packets,
                meaning: reason.meaning().to_owned(),
            })
            .collect()
    }

    async fn status(&self) -> Status {
        let stats = self.engine.sa_stats().await;
        let established: Vec<(PeerId, IkeInfo)> = self
            .endpoint
            .established()
            .map(|(_, peer, info)| (peer, info))
            .collect();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            instance: self.config.instance.clone(),
            uptime_seconds: self.started.elapsed().as_secs(),
            memory_bytes: resident_bytes(),
            interfaces: self
                .engine
                .interfaces()
                .await
                .into_iter()
                .map(|interface| Interface {
                    fast_path: interface_words(&interface),
                    name: interface.name,
                })
                .collect(),
            tunnels: self
                .tunnels
                .iter()
                .map(|(id, tunnel)| {
                    // The newest IKE SA is the one that counts; an older one is about to go.
                    let ike = established
                        .iter()
                        .rev()
                        .find(|(peer, _)| peer.0 == id.0)
                        .map(|(_, info)| info);
                    self.tunnel_status(id, tunnel, ike, &stats)
                })
                .collect(),
        }
    }

    fn tunnel_status(
        &self,
        id: TunnelId,
        tunnel: &TunnelState,
        ike: Option<&IkeInfo>,
        stats: &[SaStats],
    ) -> Tunnel {
        let connecting = self.endpoint.is_connecting(PeerId(id.0));
        let state = match (tunnel.down, ike, connecting) {
            (true, _, _) => State::Down,
            (false, Some(_), _) if tunnel.carries() => State::Up,
            (false, Some(_), _) | (false, None, true) => State::Connecting,
            (false, None, false) => State::Waiting,
        };
        Tunnel {
            name: tunnel.config.name.clone(),
            state,
            device: match tunnel.policies {
                None => tunnel.config.device.clone(),
                Some(reason) => format!("none, policies alone ({})", reason.name()),
            },
            mtu: tunnel.mtu,
            device_changed: tunnel
                .device_changed
                .map(|(from, to)| DeviceChanged { from, to }),
            peer: tunnel.config.peer.to_string(),
            addresses: addresses(tunnel, ike),
            role: match tunnel.config.role {
                Role::Initiate => "initiate",
                Role::OnDemand => "on-demand",
                Role::Respond => "respond",
            }
            .to_owned(),
            last_failure: tunnel.failure.clone(),
            fast_path: tunnel.config.fast_path,
            ike: ike.map(|info| self.ike_status(info)),
            children: (0..)
                .zip(&tunnel.config.children)
                .map(|(number, child)| {
                    self.child_status(tunnel, ChildName(number), child, state, stats)
                })
                .collect(),
        }
    }

    fn ike_status(&self, info: &IkeInfo) -> IkeSa {
        IkeSa {
            initiator_spi: info.spi_i.to_string(),
            responder_spi: info.spi_r.to_string(),
            initiator: info.initiator,
            suite: info.suite.to_string(),
            local: info.local,
            remote: info.remote,
            local_id: info.local_id.to_string(),
            remote_id: info.remote_id.to_string(),
            nat: convert::nat_words(info).to_owned(),
            mobike: info.mobike,
            age_seconds: (self.now() - info.since).as_secs(),
            next_request: info.next_request,
            expected_request: info.expected_request,
        }
    }

    fn child_status(
        &self,
        tunnel: &TunnelState,
        name: ChildName,
        config: &crate::config::Child,
        state: State,
        stats: &[SaStats],
    ) -> Child {
        let words = |selectors: &[ipsec_common::TrafficSelector]| {
            selectors.iter().map(ToString::to_string).collect()
        };
        // The newest pair that sends; one that only waits to is shown if there is no other.
        let in_force = |pair: &&SaPair| pair.child == name && pair.is_in_force();
        let pair = tunnel
            .pairs
            .values()
            .rfind(|pair| in_force(pair) && pair.sends == Sends::Now)
            .or_else(|| tunnel.pairs.values().rfind(in_force));
        let Some(pair) = pair else {
            return Child {
                name: config.name.clone(),
                state: if state == State::Up {
                    State::Waiting
                } else {
                    state
                },
                local: words(&config.local),
                remote: words(&config.remote),
                suite: None,
                age_seconds: None,
                encapsulated: false,
                inbound: None,
                outbound: None,
                inbound_nic: None,
                outbound_nic: None,
            };
        };
        let nic = |sa| self.tunnels.ledger(sa)?.nic.clone();
        Child {
            name: config.name.clone(),
            state: State::Up,
            local: words(&pair.local),
            remote: words(&pair.remote),
            suite: Some(pair.suite.to_string()),
            age_seconds: Some((self.now() - pair.since).as_secs()),
            encapsulated: pair.outer.encapsulated,
            inbound: self.direction(pair.ours.id, pair.spi_in.0, stats),
            outbound: self.direction(pair.theirs.id, pair.spi_out.0, stats),
            inbound_nic: nic(pair.ours.id),
            outbound_nic: nic(pair.theirs.id),
        }
    }

    fn direction(&self, sa: SaId, spi: u32, stats: &[SaStats]) -> Option<Direction> {
        let stats = stats.iter().find(|stats| stats.sa == sa)?;
        let ledger = self.tunnels.ledger(sa);
        Some(Direction {
            spi,
            offload: ledger.map_or(Offload::Declined(OffloadReason::NoXdp), |ledger| {
                ledger.offload
            }),
            fast: stats.fast,
            slow: stats.slow,
            sequence: stats.sequence,
            replayed: stats.replayed,
            forged: stats.forged,
        })
    }
}

/// Where the peer is, one line for each address or name that is not resolved.
fn addresses(tunnel: &TunnelState, ike: Option<&IkeInfo>) -> Vec<PeerAddress> {
    let mut addresses = Vec::new();
    for place in &tunnel.places {
        let host = place.host.to_string();
        match &place.ways {
            Ok(ways) => addresses.extend(ways.iter().map(|way| PeerAddress {
                host: host.clone(),
                address: Some(way.remote),
                in_use: ike.is_some_and(|ike| ike.remote.ip() == way.remote),
                failure: tunnel.failed.get(&way.remote).cloned(),
            })),
            Err(why) => addresses.push(PeerAddress {
                host,
                address: None,
                in_use: false,
                failure: Some(why.clone()),
            }),
        }
    }
    addresses
}

/// How packets are taken from an interface, in words.
fn interface_words(interface: &InterfaceStatus) -> String {
    let xdp = match interface.xdp {
        None => {
            let reason = interface.reason.map(OffloadReason::name);
            return format!("slow path only ({})", reason.unwrap_or("no reason given"));
        }
        Some(XdpMode::Native) => "native XDP",
        Some(XdpMode::Generic) => "generic XDP",
    };
    let copy = if interface.zero_copy {
        "zero-copy"
    } else {
        "copy mode"
    };
    format!("{xdp}, AF_XDP in {copy} on {} queue(s)", interface.queues)
}

/// Resident memory of this process, or 0 where /proc does not tell.
fn resident_bytes() -> u64 {
    fs::read_to_string(Path::new("/proc/self/status"))
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("VmRSS:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        })
        .unwrap_or(0)
        * 1024
}
