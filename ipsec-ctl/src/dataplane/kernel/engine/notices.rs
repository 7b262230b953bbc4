//! What the kernel reports unasked: packets that ask for SAs, SAs that end or whose peer moves, and what others do to what is ours.

use std::sync::Arc;

use tokio::sync::mpsc::UnboundedReceiver;

use super::{Everything, Inner, NO_IF_ID, doubts::Doubt, tunnel::Tunnel};
use crate::{
    dataplane::{
        kernel::host,
        seam::{Event, Flow, LifetimeKind, TunnelId},
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
