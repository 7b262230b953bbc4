//! A tunnel that goes from this engine to another, or comes from there, has a device in both for a while: one whose routes lead
//! into it, and one aside.

use super::Engine;
use crate::dataplane::{
    routing::Place,
    seam::{Direction, Rejected, SaId, TunnelId, TunnelSpec},
};

impl Engine {
    /// Whether the tunnel is this engine's.
    pub async fn has_tunnel(&self, id: TunnelId) -> bool {
        self.device(id).await.is_some()
    }

    /// The name of a tunnel's device, and its index.
    pub async fn device(&self, id: TunnelId) -> Option<(String, u32)> {
        let control = self.inner.control.lock().await;
        let configured = control.tunnels.get(&id)?;
        Some((configured.spec.device.clone(), configured.tunnel.ifindex))
    }

    /// The SAs of a tunnel.
    pub fn sas_of(&self, id: TunnelId) -> Vec<(SaId, Direction)> {
        let cores = self.inner.tables.cores();
        let of_it = cores.iter().filter(|core| core.tunnel == id);
        of_it.map(|core| (core.id, core.direction)).collect()
    }

    /// Whether the SA is this engine's.
    pub fn has_sa(&self, id: SaId) -> bool {
        let tables = &self.inner.tables;
        tables.inbound_by_id(id).is_some() || tables.outbound_by_id(id).is_some()
    }

    /// Creates a tunnel whose routes lead into a device of another engine, or changes what differs from before.
    ///
    /// # Errors
    ///
    /// [`Rejected`].
    pub async fn set_tunnel_aside(&self, spec: TunnelSpec) -> Result<(), Rejected> {
        self.inner.set_tunnel(spec, Place::Aside).await
    }

    /// Notes that a device has another name, and whether the tunnel's routes lead into it. Aside it ends with the process.
    ///
    /// # Errors
    ///
    /// [`Rejected`].
    pub async fn put_tunnel(
        &self,
        id: TunnelId,
        place: Place,
        device: &str,
    ) -> Result<(), Rejected> {
        let mut control = self.inner.control.lock().await;
        let configured = control
            .tunnels
            .get_mut(&id)
            .ok_or(Rejected::UnknownTunnel)?;
        configured.place = place;
        device.clone_into(&mut configured.spec.device);
        let persists = configured.tun.persist(place == Place::InUse);
        persists.map_err(|error| Rejected::by_kernel("keep the TUN device", &error))
    }
}
