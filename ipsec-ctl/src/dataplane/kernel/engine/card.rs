//! States on network cards: asked for where a tunnel wants it, and carried by the kernel alone where a card declines.

use super::{Everything, Inner};
use crate::{
    dataplane::seam::{Direction, Nic, NicOffload, NicReason, Outer, Rejected, SaId},
    net::{
        netlink::NetlinkError,
        xfrm::{OnCard, State},
    },
};

impl Inner {
    /// Adds a state, on the card of the interface that carries the peer if that is wanted and the card takes it. Tells
    /// what the card does, and leaves in the state what it was added with.
    pub(super) async fn add_state(
        &self,
        state: &mut State,
        direction: Direction,
        wanted: NicOffload,
        outer: &Outer,
    ) -> Result<Option<Nic>, NetlinkError> {
        let packet = match wanted {
            NicOffload::Off => return self.xfrm.add_state(state).map(|()| None),
            NicOffload::Auto | NicOffload::Crypto => false,
            NicOffload::Packet => true,
        };
        let mark = Some(self.lodge.mark());
        let way = self.netlink.way(outer.remote, Some(outer.local), mark);
        let Ok(Some(way)) = way.await else {
            self.xfrm.add_state(state)?;
            return Ok(Some(declined(NicReason::NoDevice, String::new())));
        };
        state.card = Some(OnCard {
            device: way.device,
            inbound: direction == Direction::Inbound,
            packet,
        });
        match self.xfrm.add_state(state) {
            Ok(()) => {
                // Of a card that has no such thing the kernel takes no notice.
                let added = self.xfrm.state(&state.id())?;
                if added.and_then(|added| added.card).is_none() {
                    state.card = None;
                    return Ok(Some(declined(NicReason::Unsupported, String::new())));
                }
                Ok(Some(if packet { Nic::Packet } else { Nic::Crypto }))
            }
            Err(error) if error.errno == Some(libc::EEXIST) => Err(error),
            Err(error) => {
                // There is no state yet: the keys are still in no other one.
                state.card = None;
                self.xfrm.add_state(state)?;
                Ok(Some(declined(NicReason::Refused, error.reason)))
            }
        }
    }

    /// Has the kernel alone carry an SA, whose card does not take the policies. No packet has met it yet.
    pub(super) fn take_from_card(
        &self,
        all: &mut Everything,
        id: SaId,
        state: &mut State,
        words: String,
    ) -> Result<(), Rejected> {
        let Some(sa) = all.sas.get_mut(&id) else {
            return Err(Rejected::UnknownSa);
        };
        self.xfrm.remove_state(&sa.state)?;
        state.card = None;
        self.xfrm.add_state(state)?;
        sa.card = None;
        sa.ledger.nic = Some(declined(NicReason::PoliciesRefused, words));
        Ok(())
    }
}

fn declined(reason: NicReason, words: String) -> Nic {
    Nic::Declined { reason, words }
}
