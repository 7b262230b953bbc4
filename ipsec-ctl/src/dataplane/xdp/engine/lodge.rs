//! What this engine does for the tunnels of another one: it has the sockets, the routes and the XDP program.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipsec_common::Spi;
use tokio::sync::broadcast;

use super::{Engine, Inner};
use crate::dataplane::{
    routing::RoutingSpec,
    seam::{Event, Rejected, TunnelId},
    xdp::strays::Stray,
};

/// The engine as a host of tunnels that another engine carries. Cheap to clone.
#[derive(Clone)]
pub struct Lodge(Arc<Inner>);

impl Engine {
    /// The engine as a host.
    pub fn lodge(&self) -> Lodge {
        Lodge(Arc::clone(&self.inner))
    }

    /// Whether there is a fast path at all.
    pub fn has_fast_path(&self) -> bool {
        self.inner.fast().interfaces().is_some()
    }
}

impl Lodge {
    /// Sends an event to the daemon.
    pub fn send(&self, event: Event) {
        self.0.events.send(event);
    }

    /// Firewall mark of all that is sent.
    pub fn mark(&self) -> u32 {
        self.0.config.mark
    }

    /// Lets IKE and ESP of all sockets pass whatever the IPsec policies of the whole host say.
    ///
    /// # Errors
    ///
    /// What the kernel refused.
    pub fn pass_policies(&self) -> io::Result<()> {
        self.0.slow.sockets.pass_policies()
    }

    /// Routes into a tunnel's device, with the backstops behind them, from now on.
    ///
    /// # Errors
    ///
    /// [`Rejected::Kernel`].
    pub async fn set_routes(
        &self,
        id: TunnelId,
        device: &str,
        ifindex: u32,
        routing: &RoutingSpec,
    ) -> Result<(), Rejected> {
        for peer in &routing.peers {
            self.0.fast().know_peer(*peer);
        }
        let mut control = self.0.control.lock().await;
        control.routing.set(id.0, device, Some(ifindex), routing);
        // At once: the first packet may come before the keeper does.
        control.routing.protect(id.0).await?;
        self.0.dirty.notify_one();
        Ok(())
    }

    /// From now on packets of a tunnel may come out of these devices, too.
    pub async fn expect_beside(&self, id: TunnelId, names: Vec<String>) {
        let mut control = self.0.control.lock().await;
        control.routing.expect_beside(id.0, names);
    }

    /// Lets all routes that lead into one device of a tunnel lead into another, in one step each.
    pub async fn hand_over_routes(&self, id: TunnelId, from: u32, to: u32) {
        let mut control = self.0.control.lock().await;
        if let Err(error) = control.routing.hand_over(id.0, from, to).await {
            tracing::warn!(%error, "not all routes follow a tunnel");
        }
        self.0.fast().set_wary(&control.routing.wary());
        self.0.dirty.notify_one();
    }

    /// Forgets a tunnel's routes.
    pub async fn remove_routes(&self, id: TunnelId) {
        self.0.control.lock().await.routing.remove(id.0);
        self.0.dirty.notify_one();
    }

    /// Lets IKE from an address pass, as that of a peer that is up.
    pub fn know_peer(&self, peer: IpAddr) {
        self.0.fast().know_peer(peer);
    }

    /// Lets the ESP of an inbound SA pass to the kernel: the program does not take it for that of a stranger, nor does the
    /// slow path, whose raw sockets get a copy.
    pub fn pass(&self, spi: Spi, local: IpAddr) {
        self.0.tables.pass(spi, local);
        self.0.fast().pass(spi, local);
        self.ignore_passed();
    }

    /// Ends [`Self::pass`].
    pub fn pass_no_more(&self, spi: Spi, local: IpAddr) {
        self.0.fast().pass_no_more(spi, local);
        self.0.tables.pass_no_more(spi, local);
        self.ignore_passed();
    }

    /// Reports of ESP in UDP for SAs of [`Self::pass`] that has come by the sockets of all peers.
    pub fn strays(&self) -> broadcast::Receiver<Stray> {
        self.0.slow.strays.listen()
    }

    /// Whether a peer whose ESP this engine opens is there.
    pub fn has_peer_at(&self, local: IpAddr, remote: SocketAddr) -> bool {
        self.0.tables.has_peer_at(local, remote)
    }

    /// Spares the raw sockets what the kernel opens. Our SPIs are told apart by their numbers alone: no other SA of ours has one of
    /// these.
    fn ignore_passed(&self) {
        if let Err(error) = self.0.slow.sockets.ignore(&self.0.tables.passed()) {
            tracing::debug!(%error, "the kernel's ESP reaches the raw sockets");
        }
    }
}
