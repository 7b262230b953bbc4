//! What becomes of SAs when another daemon comes: the kernel counts in its states, and this engine knows which are its own.

use super::{Everything, Inner};
use crate::dataplane::{
    seam::{Before, Ledger, Rejected, SaSpec},
    xdp::slow::monotonic_seconds,
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
}
