//! What becomes of SAs when another daemon comes: the kernel counts in its states, and this engine knows which are its own.

use std::collections::HashMap;

use super::{Everything, Inner};
use crate::{
    dataplane::{
        seam::{Before, Event, Ledger, LifetimeKind, Rejected, SaSpec},
        xdp::slow::monotonic_seconds,
    },
    net::xfrm::{StateId, StateStatus},
};

impl Inner {
    /// An SA that this engine has stays. States that another process has left are never taken over.
    pub(super) async fn resume(
        &self,
        all: &mut Everything,
        spec: &SaSpec,
        before: Before,
    ) -> Result<Ledger, Rejected> {
        let known = all.sas.get(&spec.id).filter(|sa| {
            (sa.tunnel, sa.direction, sa.spi) == (spec.tunnel, spec.direction, spec.spi)
        });
        let Some(ledger) = known.map(|sa| sa.ledger.clone()) else {
            let is_over = spec
                .lifetime
                .expires
                .is_some_and(|at| at <= monotonic_seconds());
            return match before {
                // What this engine has had since, it has still.
                Before::InDoubt(at) if self.since + 1 < at && !is_over => {
                    self.install(all, spec).await
                }
                Before::InDoubt(_) | Before::Installed => Err(Rejected::Uncounted),
            };
        };
        self.move_outer(all, spec.id, spec.outer)?;
        Ok(ledger)
    }

    /// Reports the SAs that near their end by volume. The kernel does so once for each, and the daemon that it told may have died
    /// of hearing it.
    pub(super) fn report_again(&self, all: &Everything) {
        if all.sas.is_empty() {
            return;
        }
        let states = match self.xfrm.states() {
            Ok(states) => states,
            Err(error) => return tracing::warn!(%error, "IPsec states cannot be listed"),
        };
        let states: HashMap<StateId, &StateStatus> =
            states.iter().map(|state| (state.id, state)).collect();
        for (id, sa) in &all.sas {
            let near = states.get(&sa.state).is_some_and(|state| {
                state.packets >= sa.lifetime.soft_packets || state.bytes >= sa.lifetime.soft_bytes
            });
            if near {
                self.lodge.send(Event::Lifetime {
                    sa: *id,
                    kind: LifetimeKind::Soft,
                });
            }
        }
    }
}
