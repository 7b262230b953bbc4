//! A tunnel that goes from this engine to another, or comes from there, has a device in both for a while: one whose routes lead
//! into it, and one aside.

use super::{Engine, repair::clamp};
use crate::dataplane::{
    routing::Place,
    seam::{Direction, Rejected, SaId, TunnelId},
};

impl Engine {
    /// The name of a tunnel's device, and its index.
    pub async fn device(&self, id: TunnelId) -> Option<(String, u32)> {
        let everything = self.inner.state.lock().await;
        let tunnel = everything.tunnels.get(&id)?;
        Some((tunnel.spec.device.clone(), tunnel.ifindex))
    }

    /// The SAs of a tunnel.
    pub async fn sas_of(&self, id: TunnelId) -> Vec<(SaId, Direction)> {
        let everything = self.inner.state.lock().await;
        let of_it = everything.sas.iter().filter(|(_, sa)| sa.tunnel == id);
        of_it.map(|(sa, one)| (*sa, one.direction)).collect()
    }

    /// Notes that a device has another name, and whether the tunnel's routes lead into it. Aside it leaves ESP in UDP to the other
    /// engine, but for what comes without.
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
        let mut everything = self.inner.state.lock().await;
        let all = &mut *everything;
        let tunnel = all.tunnels.get_mut(&id).ok_or(Rejected::UnknownTunnel)?;
        tunnel.place = place;
        device.clone_into(&mut tunnel.spec.device);
        if place == Place::Aside {
            let sas = all.sas.values_mut();
            for sa in sas.filter(|sa| sa.tunnel == id && sa.direction == Direction::Inbound) {
                // The socket of its peer would take what the other engine is sent.
                if let Some(pair) = sa.pair() {
                    all.sockets.leave(pair);
                    sa.outer.encap = None;
                }
            }
        }
        clamp(all);
        Ok(())
    }
}
