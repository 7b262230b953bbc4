//! Reading the configuration again: only what changed is touched, and nothing at all if the file has a mistake.

use tracing::{info, warn};

use super::{convert, gateway::Gateway};
use crate::{
    api::model::{Done, Refused},
    config::{self, Config, Role, Tunnel},
    dataplane::seam::{self, TunnelId},
    ike::{
        config::PeerId,
        event::{Command, Rekey},
    },
};

impl Gateway {
    pub(super) async fn reload_on_signal(&mut self) {
        match self.reload().await {
            Ok(done) => done.lines.iter().for_each(|line| info!("reload: {line}")),
            Err(refused) => warn!("reload refused: {}; {}", refused.message, refused.remedy),
        }
    }

    pub(super) async fn reload(&mut self) -> Result<Done, Refused> {
        let fresh = config::load(&self.path).map_err(|errors| Refused {
            message: format!(
                "{errors}: {}",
                errors.messages().collect::<Vec<_>>().join("; ")
            ),
            remedy: format!("`ipsec-ctl check {}` shows the lines", self.path.display()),
        })?;
        let mut lines = Vec::new();
        if differs_globally(&self.config, &fresh) {
            lines.push(
                "settings of the whole gateway differ: they take effect at the next start"
                    .to_owned(),
            );
        }
        let known: Vec<(TunnelId, Tunnel)> = self
            .tunnels
            .iter()
            .map(|(id, tunnel)| (id, tunnel.config.clone()))
            .collect();
        for (id, old) in &known {
            if !fresh.tunnels.iter().any(|tunnel| tunnel.name == old.name) {
                self.remove_tunnel(*id).await;
                lines.push(format!("{} removed", old.name));
            }
        }
        for tunnel in &fresh.tunnels {
            match known.iter().find(|(_, old)| old.name == tunnel.name) {
                None => {
                    lines.push(match self.add_tunnel(tunnel.clone()).await {
                        Ok(()) => format!("{} added", tunnel.name),
                        Err(cause) => format!("{} could not be added: {cause}", tunnel.name),
                    });
                }
                Some((_, old)) if old == tunnel => {}
                Some((id, old)) => {
                    lines.push(match self.change_tunnel(*id, old, tunnel).await {
                        Ok(()) => format!("{} changed", tunnel.name),
                        Err(cause) => format!("{} could not be changed: {cause}", tunnel.name),
                    });
                }
            }
        }
        self.config.tunnels = fresh.tunnels;
        if lines.is_empty() {
            lines.push("nothing has changed".to_owned());
        }
        Ok(Done { lines })
    }

    async fn remove_tunnel(&mut self, id: TunnelId) {
        let now = self.now();
        self.endpoint
            .handle_command(now, Command::RemovePeer(PeerId(id.0)));
        self.drain().await;
        if let Err(cause) = self.engine.command(seam::Command::RemoveTunnel(id)).await {
            warn!(%cause, "a tunnel could not be removed");
        }
        self.tunnels.remove(id);
    }

    /// Changes a tunnel in place where its SAs can stay, else takes it down and starts it anew.
    async fn change_tunnel(
        &mut self,
        id: TunnelId,
        old: &Tunnel,
        new: &Tunnel,
    ) -> Result<(), seam::Rejected> {
        if !is_same_negotiation(old, new) {
            self.remove_tunnel(id).await;
            return self.add_tunnel(new.clone()).await;
        }
        let (places, elsewhere) = self
            .tunnels
            .get(id)
            .map(|tunnel| (tunnel.places.clone(), tunnel.elsewhere.clone()))
            .unwrap_or_default();
        let spec = convert::tunnel_spec(id, new, &places, &elsewhere);
        self.engine
            .command(seam::Command::SetTunnel(Box::new(spec)))
            .await?;
        let now = self.now();
        self.endpoint.handle_command(
            now,
            Command::SetPeer(Box::new(convert::peer_config(id, new, &places))),
        );
        if old.offload != new.offload {
            // What a card does for an SA is decided when the SA is installed.
            let rekey = Command::Rekey(PeerId(id.0), Rekey::Children);
            self.endpoint.handle_command(now, rekey);
        }
        if let Some(tunnel) = self.tunnels.get_mut(id) {
            tunnel.config = new.clone();
        }
        if new.role == Role::Initiate && old.role != Role::Initiate {
            self.bring_up(id);
        }
        Ok(())
    }
}

/// Whether SAs that were negotiated under the old configuration are good under the new one, too.
fn is_same_negotiation(old: &Tunnel, new: &Tunnel) -> bool {
    old.peer == new.peer
        && old.local == new.local
        && old.local_id == new.local_id
        && old.remote_id == new.remote_id
        && old.psk == new.psk
        && old.ike == new.ike
        && old.nat == new.nat
        && old.device == new.device
        && old.engine == new.engine
        && old.mode == new.mode
        && old.children == new.children
}

fn differs_globally(old: &Config, new: &Config) -> bool {
    let settings = |config: &Config| Config {
        tunnels: Vec::new(),
        ..config.clone()
    };
    settings(old) != settings(new)
}
