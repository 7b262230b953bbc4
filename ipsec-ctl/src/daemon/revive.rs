//! What the daemon does when the data plane's process has died: it starts another and puts in what was in the old one.
//!
//! The SAs go on counting where the old one has stopped, for the words that they count in outlive it. An SA of which that is
//! not known must not send again: it is deleted, and its child negotiated anew.

use std::time::Duration;

use tokio::time::sleep;
use tracing::{error, info, warn};

use super::{convert, gateway::Gateway};
use crate::{
    dataplane::seam::{self, TunnelId},
    ike::event::{ChildSaId, Command},
};

/// Pause after an attempt that failed.
const PAUSE: Duration = Duration::from_secs(1);

impl Gateway {
    /// Starts a data plane in place of one that has died. Devices, routes and backstops have outlived it, so that meanwhile
    /// nothing leaves in the clear.
    pub(super) async fn revive(&mut self) {
        warn!("the data plane has died; another one is started");
        match self.supervisor.attach(false).await {
            Ok((engine, events)) => {
                self.engine = engine;
                self.events = events;
                self.equip().await;
                info!("the data plane runs again");
            }
            Err(cause) => {
                error!(%cause, "the data plane cannot be started");
                sleep(PAUSE).await;
            }
        }
    }

    /// Sets up in an empty data plane what the daemon knows.
    async fn equip(&mut self) {
        let tunnels: Vec<TunnelId> = self.tunnels.iter().map(|(id, _)| id).collect();
        for &id in &tunnels {
            let Some(tunnel) = self.tunnels.get(id) else {
                continue;
            };
            let spec = convert::tunnel_spec(id, &tunnel.config, &tunnel.places, &tunnel.elsewhere);
            let name = tunnel.config.name.clone();
            let command = seam::Command::SetTunnel(Box::new(spec));
            if let Err(cause) = self.engine.command(command).await {
                warn!(tunnel = name, %cause, "the tunnel could not be set up again");
            }
        }
        let lost = self.resume_all().await;
        let now = self.now();
        for sa in lost {
            self.endpoint.handle_command(now, Command::Lost(sa));
        }
        for id in tunnels {
            self.set_carrier(id).await;
        }
        let _ = self.engine.command(seam::Command::Configured).await;
    }

    /// Has the data plane go on with all SAs; returns the pairs that it cannot go on with.
    pub(super) async fn resume_all(&mut self) -> Vec<ChildSaId> {
        let mut specs: Vec<(ChildSaId, seam::SaSpec)> = Vec::new();
        for (_, tunnel) in self.tunnels.iter() {
            for (sa, pair) in &tunnel.pairs {
                specs.extend(pair.installed().map(|spec| (*sa, spec.clone())));
            }
        }
        // Of several outbound SAs of a child the one that was installed last sends.
        specs.sort_by_key(|(_, spec)| spec.id);
        let mut lost = Vec::new();
        for (sa, spec) in specs {
            let id = spec.id;
            match self
                .engine
                .command(seam::Command::Resume(
                    Box::new(spec),
                    seam::Before::Installed,
                ))
                .await
            {
                Ok(Some(ledger)) => self.tunnels.note_ledger(ledger),
                Ok(None) => {}
                Err(cause) => {
                    info!(sa = id.0, %cause, "an SA cannot go on; its child is negotiated anew");
                    lost.push(sa);
                }
            }
        }
        lost.dedup();
        lost
    }
}
