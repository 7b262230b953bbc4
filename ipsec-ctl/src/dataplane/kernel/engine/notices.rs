//! What the kernel reports unasked: packets that ask for SAs, SAs that end or whose peer moves, and what others do to what is ours.

use std::{sync::Arc, time::Duration};

use tokio::{sync::mpsc::UnboundedReceiver, time::sleep};

use super::{Everything, Inner, NO_IF_ID, doubts::Doubt, sa::Sa, tunnel::Tunnel};
use crate::{
    dataplane::{
        kernel::host,
        seam::{Event, Flow, LifetimeKind, TunnelId},
        xdp::strays::Stray,
    },
    net::{
        watch::Fallen,
        xfrm::{Notice, Policy, PortMask, Selector, StateId, Watch},
    },
};

/// Follows the kernel's notifications until the engine stops.
pub(super) async fn listen(
    inner: Arc<Inner>,
    mut notices: Watch,
    mut fallen: UnboundedReceiver<Fallen>,
) {
    let mut strays = inner.lodge.strays();
    loop {
        tokio::select! {
            noticed = notices.next() => match noticed {
                Ok(noticed) => for notice in noticed {
                    inner.notice(notice).await;
                },
                Err(error) => {
                    tracing::error!(%error, "the kernel's IPsec is not watched any more");
                    return;
                }
            },
            // What was too much comes again. The lodge, which reports, lives as long as this.
            stray = strays.recv() => if let Ok(stray) = stray {
                inner.look_for_peer(stray).await;
            },
            link = fallen.recv() => match link {
                Some(Fallen::Link(index)) => inner.link_fell(index).await,
                Some(Fallen::Any) => inner.doubts.raise(&[Doubt::Devices]),
                None => {
                    tracing::error!("links are not watched any more");
                    return;
                }
            },
        }
    }
}

impl Inner {
    /// Lets the kernel open what comes from where a peer may be now: it tells of a genuine packet, by [`Notice::Moved`].
    async fn look_for_peer(self: &Arc<Self>, stray: Stray) {
        /// Enough for one genuine packet, and for what the daemon makes of it.
        const TRIAL: Duration = Duration::from_secs(5);
        let (local, remote) = (stray.local, stray.remote);
        // Its socket would have to take what the other engine opens.
        if self.lodge.has_peer_at(local.ip(), remote) {
            return;
        }
        let mut everything = self.state.lock().await;
        let is_its = |sa: &Sa| sa.spi == stray.spi && sa.pair().is_some_and(|pair| pair.0 == local);
        if !everything.sas.values().any(is_its) {
            return;
        }
        match everything.sockets.try_out((local, remote), &self.lodge) {
            Ok(false) => return,
            Ok(true) => {}
            Err(error) => {
                return tracing::debug!(%error, %remote, "a peer that may be there is not looked for");
            }
        }
        let inner = Arc::clone(self);
        tokio::spawn(async move {
            sleep(TRIAL).await;
            let mut everything = inner.state.lock().await;
            everything.sockets.end_trial((local, remote));
        });
    }

    async fn notice(&self, notice: Notice) {
        let mut everything = self.state.lock().await;
        let all = &mut *everything;
        let sa_of = |all: &Everything, id: &StateId| {
            let found = all.sas.iter().find(|(_, sa)| sa.state == *id);
            found.map(|(id, _)| *id)
        };
        match notice {
            Notice::Acquire { reqid, packet } => self.acquire(all, reqid, &packet),
            Notice::Expired { id, hard } => {
                let Some(sa) = sa_of(all, &id) else { return };
                if hard {
                    let _ = self.remove(all, sa);
                }
                let kind = if hard {
                    LifetimeKind::Hard
                } else {
                    LifetimeKind::Soft
                };
                self.lodge.send(Event::Lifetime { sa, kind });
            }
            Notice::Moved { id, source } => {
                if let Some(sa) = sa_of(all, &id) {
                    self.lodge.send(Event::PeerMoved { sa, remote: source });
                }
            }
            // What we have removed ourselves is not ours any more.
            Notice::StateRemoved(id) => {
                if sa_of(all, &id).is_some() {
                    self.doubts.raise(&[Doubt::States]);
                }
            }
            Notice::StatesFlushed => self.doubts.raise(&[Doubt::States]),
            Notice::PolicySet(policy) => {
                if all.is_strange(&policy) {
                    self.doubts.raise(&[Doubt::Policies]);
                }
            }
            Notice::PolicyRemoved(policy) => {
                if all.misses(&policy) {
                    self.doubts.raise(&[Doubt::Policies]);
                }
            }
            // At once: what tunnels without a device protect is open until then.
            Notice::PoliciesFlushed => self.restore_policies(all),
            Notice::Overrun => {
                tracing::warn!(
                    "notifications of the kernel's IPsec were lost: all of it is looked at"
                );
                self.doubts
                    .raise(&[Doubt::States, Doubt::Policies, Doubt::Devices]);
            }
        }
    }

    /// A packet asks for an SA.
    fn acquire(&self, all: &Everything, reqid: u32, packet: &Selector) {
        let of = |(id, tunnel): (&TunnelId, &Tunnel)| {
            // Otherwise others have removed the state of an SA, which is seen to elsewhere.
            let child = tunnel.child_of(reqid)?;
            tunnel.waits_for_packets(child).then_some((*id, child))
        };
        let Some((tunnel, child)) = all.tunnels.iter().find_map(of) else {
            return;
        };
        let port = |port: PortMask| if port.mask == 0 { 0 } else { port.port };
        self.lodge.send(Event::Acquire {
            tunnel,
            child,
            flow: Flow {
                source: packet.source.addr(),
                destination: packet.destination.addr(),
                protocol: packet.protocol,
                source_port: port(packet.source_port),
                destination_port: port(packet.destination_port),
            },
        });
    }
}

impl Everything {
    /// Whether a policy that was set is none of ours, though it is in the place of one of ours, or has a number of ours.
    fn is_strange(&self, policy: &Policy) -> bool {
        if policy.if_id == NO_IF_ID {
            let there = self.shared.at(&policy.key());
            return there.map_or_else(|| host::is_ours(policy), |there| there != policy);
        }
        let tunnel = self.with_number(policy.if_id);
        tunnel.is_some_and(|tunnel| !tunnel.policies.contains(policy))
    }

    /// Whether one of our tunnels wants a policy that is gone.
    fn misses(&self, policy: &Policy) -> bool {
        if policy.if_id == NO_IF_ID {
            return self.shared.at(&policy.key()).is_some();
        }
        let tunnel = self.with_number(policy.if_id);
        tunnel.is_some_and(|tunnel| {
            let mut wanted = tunnel.policies.iter();
            wanted.any(|wanted| wanted.key() == policy.key())
        })
    }

    fn with_number(&self, if_id: u32) -> Option<&Tunnel> {
        let mut tunnels = self.tunnels.values();
        tunnels.find(|tunnel| tunnel.has_device() && tunnel.if_id == if_id)
    }
}
