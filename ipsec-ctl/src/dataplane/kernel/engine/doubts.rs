//! What may not be as it should be in the kernel, until somebody has looked.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};

use tokio::sync::Notify;

/// Something that is to be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Doubt {
    /// Whether all states are there.
    States,
    /// Whether all policies are there.
    Policies,
    /// Whether all devices are there and up.
    Devices,
    /// Whether the MSS of TCP is lowered to what devices take.
    Clamp,
    /// Whether anything is there that belongs to no tunnel.
    Leftovers,
}

/// All that is to be looked at.
#[derive(Debug, Default)]
pub(super) struct Doubts {
    open: Mutex<BTreeSet<Doubt>>,
    raised: Notify,
}

impl Doubts {
    pub(super) fn raise(&self, doubts: &[Doubt]) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.extend(doubts);
        drop(open);
        self.raised.notify_one();
    }

    /// Waits until there is one.
    pub(super) async fn wait(&self) {
        self.raised.notified().await;
    }

    /// All that there are, of which none is left.
    pub(super) fn take(&self) -> BTreeSet<Doubt> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *open)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_raised_twice_is_looked_at_once_and_nothing_is_forgotten() {
        let doubts = Doubts::default();
        doubts.raise(&[Doubt::Devices]);
        doubts.raise(&[Doubt::Devices, Doubt::States]);
        doubts.wait().await;
        assert_eq!(doubts.take(), [Doubt::States, Doubt::Devices].into());
        doubts.raise(&[Doubt::Clamp]);
        doubts.wait().await;
        assert_eq!(doubts.take(), [Doubt::Clamp].into());
        assert_eq!(doubts.take(), [].into());
    }
}
