//! Rekeying of children, in both roles (RFC 7296 sections 1.3.3, 2.8 and 2.25.1).

use std::time::Duration;

use super::{
    Replaces, Rival, Standing,
    collision::{Decision, Ours, Theirs, decide},
    lowest,
};
use crate::ike::{
    config::ChildName,
    crypto::keys::{ChildKeys, Nonces},
    endpoint::{Origin, Shared},
    event::{ChildSaId, DownReason},
    exchange::Notifies,
    message::payload::{Notify, NotifyType},
    sa::{
        Exchange, IkeSa, SIMULTANEOUS, Task,
        child::{Agreed, ChildJob, ChildSa, Part, PendingChild, Sides},
    },
    time::Time,
};

/// Time that a peer has to delete what it has replaced, or what has turned out to be one too many.
const PEER_DELETES: Duration = Duration::from_secs(60);
/// Pause before a peer that could not rekey for now is asked again.
const AGAIN: Duration = Duration::from_secs(2);

/// The pair that a request of the peer replaces, and its line.
pub(in crate::ike::sa) type Replaced = (ChildSaId, ChildSaId);

impl IkeSa {
    /// Asks for another pair in the place of one that is in force.
    pub(in crate::ike::sa) fn rekey_child(
        &mut self,
        shared: &mut Shared,
        now: Time,
        sa: ChildSaId,
    ) {
        let Some(old) = self
            .children
            .iter()
            .find(|child| child.id == sa && child.standing == Standing::InForce)
            .cloned()
        else {
            return;
        };
        // The peer has been quicker, and our answer is being computed.
        if self.is_being_rekeyed(sa) {
            return;
        }
        let Some(config) = self
            .peer_config(shared)
            .and_then(|peer| peer.children.iter().find(|config| config.id == old.child))
            .cloned()
        else {
            return;
        };
        // RFC 7296 section 2.9.2: what is in force is the least that is offered.
        let mut pending = PendingChild::of(shared, &config, old.local, old.remote);
        pending.part = Part::Some;
        pending.replaces = Some(Replaces {
            sa,
            line: old.line,
            spi_in: old.spi_in,
            rival: None,
        });
        // The first child has had no group; its peer may take any of ours.
        let group = pending
            .groups()
            .copied()
            .find(|group| Some(*group) == old.group)
            .or_else(|| pending.first_group());
        self.begin_child(shared, now, pending, group);
    }

    /// Begins the rekeying of a pair, unless it is under way or not wanted any more.
    pub(in crate::ike::sa) fn wish_rekeyed(
        &mut self,
        shared: &mut Shared,
        now: Time,
        sa: ChildSaId,
    ) {
        // The peer may not have it yet, and would not know what is to be rekeyed.
        if shared.is_unproved(sa) {
            return self.rekey_at(sa, now + AGAIN);
        }
        let wanted = self.children.iter_mut().any(|child| {
            child.id == sa
                && child.standing == Standing::InForce
                && child.life.soft.take().is_some()
        });
        if wanted {
            self.push_task(shared, now, Task::RekeyChild(sa));
        }
    }

    /// What our requests under way are to replace.
    fn asked_to_replace(&mut self) -> impl Iterator<Item = &mut Replaces> {
        let waiting = self
            .asking
            .as_mut()
            .and_then(|waiting| match &mut waiting.what {
                ChildJob::Public(pending) | ChildJob::Agree(pending, _) => Some(pending),
                ChildJob::Answer(_) | ChildJob::Ike(_) => None,
            });
        let sent =
            self.outstanding
                .as_mut()
                .and_then(|outstanding| match &mut outstanding.exchange {
                    Exchange::Child(pending) => Some(pending),
                    Exchange::Init
                    | Exchange::Auth(_)
                    | Exchange::RekeyIke(_)
                    | Exchange::DeleteChildren(_)
                    | Exchange::DeleteIke
                    | Exchange::Liveness
                    | Exchange::UpdateAddresses(_)
                    | Exchange::CheckPath(_)
                    | Exchange::TellAddresses
                    | Exchange::AskForFresh => None,
                });
        [waiting, sent]
            .into_iter()
            .flatten()
            .filter_map(|pending| pending.replaces.as_mut())
    }

    /// The request of ours that is to replace a pair.
    fn asked_in_place_of(&mut self, sa: ChildSaId) -> Option<&mut Replaces> {
        self.asked_to_replace().find(|replaces| replaces.sa == sa)
    }

    fn asks_for_child(&self) -> bool {
        self.asking.is_some()
            || self
                .outstanding
                .as_ref()
                .is_some_and(|outstanding| matches!(outstanding.exchange, Exchange::Child(_)))
    }

    /// Where we are with a pair, when the peer asks for something.
    fn position(&mut self, sa: ChildSaId) -> Ours {
        let standing = self
            .children
            .iter()
            .find(|child| child.id == sa)
            .map(|child| child.standing);
        match standing {
            None => Ours::Gone,
            Some(Standing::Closing | Standing::Redundant) => Ours::Closing,
            Some(Standing::Rekeyed) => Ours::Rekeyed,
            Some(Standing::InForce) => match self.asked_in_place_of(sa) {
                Some(_) => Ours::Asked,
                None => Ours::InForce,
            },
        }
    }

    /// Where we are with a pair that we have asked to replace, when the answer comes; `lowest` is the lower nonce of our
    /// exchange.
    fn position_at_answer(&self, shared: &Shared, replaces: &Replaces, lowest: &[u8]) -> Ours {
        let standing = self
            .children
            .iter()
            .find(|child| child.id == replaces.sa)
            .map(|child| child.standing);
        match (&replaces.rival, standing) {
            (Some(rival), _) => Ours::Contested {
                ours_is_lowest: lowest < rival.lowest.as_slice(),
            },
            (None, None) if shared.has_successor(replaces.sa, replaces.line) => Ours::Rekeyed,
            (None, None) => Ours::Gone,
            (None, Some(Standing::InForce)) => Ours::Asked,
            (None, Some(Standing::Rekeyed)) => Ours::Rekeyed,
            (None, Some(Standing::Closing | Standing::Redundant)) => Ours::Closing,
        }
    }

    /// The pair that a request of the peer is to replace, or the notify that refuses it.
    pub(in crate::ike::sa) fn rekeyed_by_peer<'a>(
        &mut self,
        shared: &mut Shared,
        notifies: &Notifies<'a>,
    ) -> Result<Option<Replaced>, Notify<'a>> {
        let Some(notify) = notifies.find(NotifyType::REKEY_SA).copied() else {
            return Ok(None);
        };
        // RFC 7296 section 1.3.3: it names the SPI that the peer receives on.
        let replaced = self
            .children
            .iter()
            .find(|child| child.spi_out.to_be_bytes() == notify.spi)
            .map(|child| (child.id, child.line));
        if let Some((sa, _)) = replaced {
            self.withdraw(shared, sa);
        }
        let ours = replaced.map_or(Ours::Gone, |(sa, _)| self.position(sa));
        match decide(ours, Theirs::Rekeys) {
            Decision::Answer | Decision::AnswerAndCompare => Ok(replaced),
            Decision::SayBusy => Err(Notify::new(NotifyType::TEMPORARY_FAILURE, &[])),
            // It may be the pair whose answer we are waiting for.
            Decision::SayNone if self.asks_for_child() => {
                Err(Notify::new(NotifyType::TEMPORARY_FAILURE, &[]))
            }
            Decision::SayNone
            | Decision::End
            | Decision::EndUnnamed
            | Decision::Ignore
            | Decision::Use
            | Decision::GiveUp
            | Decision::Yield
            | Decision::AskLater
            | Decision::StartOver
            | Decision::Reauthenticate => Err(Notify {
                kind: NotifyType::CHILD_SA_NOT_FOUND,
                data: &[],
                ..notify
            }),
        }
    }

    /// Takes back a request that was not sent yet: the peer has been quicker.
    fn withdraw(&mut self, shared: &mut Shared, sa: ChildSaId) {
        let unsent = self.asking.take_if(|waiting| {
            matches!(&waiting.what, ChildJob::Public(pending)
                if pending.replaces.as_ref().is_some_and(|replaces| replaces.sa == sa))
        });
        if let Some(unsent) = unsent {
            shared.release_pending(unsent.what.spi());
        }
    }

    /// We agree to what the peer wants in the place of a pair: if we want the same, nonces will tell which of both stays.
    pub(in crate::ike::sa) fn note_rival(&mut self, replaced: Replaced, nonces: Nonces<'_>) {
        if let Some(replaces) = self.asked_in_place_of(replaced.0) {
            replaces.rival = Some(Rival {
                sa: None,
                lowest: lowest(nonces.initiator, nonces.responder),
            });
        }
    }

    /// Whether our answer to a request of the peer to replace a pair is being computed.
    fn is_being_rekeyed(&self, sa: ChildSaId) -> bool {
        self.answering.as_ref().is_some_and(|waiting| {
            matches!(&waiting.what, ChildJob::Answer(grant)
                if grant.replaces.is_some_and(|(old, _)| old == sa))
        })
    }

    /// What the peer wanted in the place of a pair has not come about.
    pub(in crate::ike::sa) fn forget_rival(&mut self, now: Time, replaced: Option<Replaced>) {
        let Some((sa, _)) = replaced else { return };
        match self.asked_in_place_of(sa) {
            Some(replaces) => replaces.rival = None,
            None => self.rekey_at(sa, now + AGAIN),
        }
    }

    /// Whether a pair can still be replaced by what the peer asked for some time ago.
    pub(in crate::ike::sa) fn still_replaceable(&self, replaced: Option<Replaced>) -> bool {
        replaced.is_none_or(|(sa, _)| {
            self.children.iter().any(|child| {
                child.id == sa && matches!(child.standing, Standing::InForce | Standing::Rekeyed)
            })
        })
    }

    /// What the peer wanted in the place of a pair is installed.
    pub(in crate::ike::sa) fn replaced_by_peer(
        &mut self,
        now: Time,
        replaced: Option<Replaced>,
        new: Option<ChildSaId>,
    ) {
        let Some((sa, _)) = replaced else { return };
        match self.asked_in_place_of(sa) {
            Some(Replaces {
                rival: Some(rival), ..
            }) => rival.sa = new,
            Some(_) | None => self.leave_pair_to_peer(now, sa, Standing::Rekeyed),
        }
    }

    /// The peer is to delete a pair. If it never does, we do.
    fn leave_pair_to_peer(&mut self, now: Time, sa: ChildSaId, standing: Standing) {
        for child in self.children.iter_mut().filter(|child| child.id == sa) {
            child.standing = standing;
            child.life.shorten(now + PEER_DELETES);
        }
    }

    /// The peer has agreed to a child of ours, perhaps in the place of another.
    pub(in crate::ike::sa) fn child_agreed(
        &mut self,
        shared: &mut Shared,
        now: Time,
        pending: &PendingChild,
        agreed: &Agreed,
        keys: Option<ChildKeys>,
    ) {
        let child = pending.child;
        let Some(replaces) = &pending.replaces else {
            if let Some(twin) = self.twin(false, child, agreed.sides()) {
                let how = (Origin::Lost, Some((twin.id, twin.line)));
                let new = self.install(shared, now, child, agreed, keys, how);
                return new
                    .into_iter()
                    .for_each(|new| self.delete_replaced(shared, new));
            }
            self.install(shared, now, child, agreed, keys, (Origin::Asked, None));
            return self.ask_for_pairs_left(pending, agreed);
        };
        let replaced = Some((replaces.sa, replaces.line));
        let lowest = lowest(&pending.nonce, &agreed.nonce);
        let ours = self.position_at_answer(shared, replaces, &lowest);
        if decide(ours, Theirs::Agrees) == Decision::Use {
            self.install(shared, now, child, agreed, keys, (Origin::Asked, replaced));
            if let Some(rival) = replaces.rival.as_ref().and_then(|rival| rival.sa) {
                self.leave_pair_to_peer(now, rival, Standing::Redundant);
                shared.redundant(rival);
            }
            self.delete_replaced(shared, replaces.sa);
        } else {
            let new = self.install(shared, now, child, agreed, keys, (Origin::Lost, replaced));
            if let Some(new) = new {
                self.delete_replaced(shared, new);
            }
            self.leave_pair_to_peer(now, replaces.sa, Standing::Rekeyed);
        }
    }

    /// What is in force for the same child and traffic as a pair that was made from scratch, asked for by the side that it was
    /// not: both have missed it at once. Only where ours is the one that goes.
    // RFC 7296 section 2.8 allows several pairs for the same traffic, and knows no rule for those that nobody wants. Both
    // sides know who has begun the IKE SA; what that side has asked for stays, and the other side deletes its own.
    fn twin(&self, asked: bool, child: ChildName, sides: Sides<'_>) -> Option<&ChildSa> {
        if self.initiator {
            return None;
        }
        let mut children = self.children.iter();
        children.find(|other| other.asked == asked && other.is_for(child, sides))
    }

    /// What we have asked for goes if the peer has asked for the same from scratch, and has begun the IKE SA.
    pub(in crate::ike::sa) fn yield_to_twin(
        &mut self,
        shared: &mut Shared,
        new: Option<ChildSaId>,
    ) {
        let mut children = self.children.iter();
        let new = children.find(|child| Some(child.id) == new && child.id == child.line);
        let ours = new.and_then(|new| self.twin(true, new.child, (&new.local, &new.remote)));
        if let Some(ours) = ours.map(|ours| ours.id) {
            self.delete_replaced(shared, ours);
        }
    }

    /// Deletes a pair whose traffic another carries. It receives until the peer has confirmed, and some time longer.
    fn delete_replaced(&mut self, shared: &mut Shared, sa: ChildSaId) {
        let Some(child) = self.children.iter_mut().find(|child| child.id == sa) else {
            return;
        };
        child.standing = Standing::Closing;
        child.life.soft = None;
        let spi_in = child.spi_in;
        shared.stop_sending(sa);
        self.tasks.push_back(Task::DeleteChildren(vec![spi_in]));
    }

    /// The peer has confirmed a Delete of ours.
    pub(in crate::ike::sa) fn children_deleted(
        &mut self,
        shared: &mut Shared,
        now: Time,
        spis: &[u32],
    ) {
        self.end_children(shared, now, DownReason::Rekeyed, |child| {
            child.standing == Standing::Closing && spis.contains(&child.spi_in)
        });
    }

    /// The peer does not agree to another pair in the place of one; tells whether that is all there is to say about it.
    pub(in crate::ike::sa) fn rekey_refused(
        &mut self,
        shared: &mut Shared,
        now: Time,
        replaces: &Replaces,
        error: Option<NotifyType>,
    ) -> bool {
        let theirs = match error {
            Some(NotifyType::TEMPORARY_FAILURE) if self.is_only_busy() => Theirs::IsBusy,
            Some(NotifyType::CHILD_SA_NOT_FOUND) => Theirs::HasNone,
            Some(_) | None => Theirs::Refuses,
        };
        let ours = self.position_at_answer(shared, replaces, &[]);
        match decide(ours, theirs) {
            Decision::Yield => {
                self.leave_pair_to_peer(now, replaces.sa, Standing::Rekeyed);
                true
            }
            Decision::AskLater => {
                self.rekey_at(replaces.sa, now + AGAIN + shared.jitter(AGAIN));
                true
            }
            Decision::StartOver => {
                self.start_over(shared, now, replaces.sa);
                true
            }
            Decision::Reauthenticate => false,
            Decision::Answer
            | Decision::AnswerAndCompare
            | Decision::SayBusy
            | Decision::SayNone
            | Decision::End
            | Decision::EndUnnamed
            | Decision::Ignore
            | Decision::Use
            | Decision::GiveUp => true,
        }
    }

    fn rekey_at(&mut self, sa: ChildSaId, at: Time) {
        for child in &mut self.children {
            if child.id == sa && child.standing == Standing::InForce {
                child.life.soft = Some(at);
            }
        }
    }

    /// The peer does not know a pair any more: it is forgotten, and a new one is asked for.
    fn start_over(&mut self, shared: &mut Shared, now: Time, sa: ChildSaId) {
        let old = self.children.iter().find(|child| child.id == sa).cloned();
        self.end_children(shared, now, DownReason::PeerDeleted, |child| child.id == sa);
        let Some(old) = old else {
            return self.child_lost(shared, now);
        };
        let config = self
            .peer_config(shared)
            .and_then(|peer| peer.children.iter().find(|config| config.id == old.child))
            .cloned();
        if let Some(config) = config {
            let mut pending = PendingChild::of(shared, &config, old.local, old.remote);
            pending.part = Part::Some;
            let group = pending.first_group();
            self.begin_child(shared, now, pending, group);
        }
    }

    /// The peer cannot rekey a pair, which stays in force: a fresh IKE SA is to take the place of this one.
    pub(in crate::ike::sa) fn cannot_rekey(
        &mut self,
        shared: &mut Shared,
        now: Time,
        replaces: &Replaces,
    ) {
        if !self.children.iter().any(|child| child.id == replaces.sa) {
            return self.child_failed(shared, now);
        }
        if self.may_be_one_of_two(shared, now) {
            return self.rekey_at(replaces.sa, now + SIMULTANEOUS);
        }
        self.ask_for_replacement(shared, now);
    }

    /// The peer deletes pairs, named by what it receives on; returns those of our SPIs that the answer names.
    pub(in crate::ike::sa) fn deleted_by_name(
        &mut self,
        shared: &mut Shared,
        now: Time,
        named: &[u32],
    ) -> Vec<u32> {
        let gone: Vec<ChildSaId> = self
            .children
            .iter()
            .filter(|child| named.contains(&child.spi_out))
            .map(|child| child.id)
            .collect();
        let mut to_name = Vec::new();
        for sa in gone {
            let ours = self.position(sa);
            let replaced = self
                .children
                .iter()
                .any(|child| child.id == sa && shared.has_successor(sa, child.line));
            // Its successor is under way: what was sent on it before is still received.
            if ours == Ours::Asked {
                shared.stop_sending(sa);
            }
            self.forget_rival_pair(sa);
            let reason = if replaced {
                DownReason::Rekeyed
            } else {
                DownReason::PeerDeleted
            };
            let spis = self.end_children(shared, now, reason, |child| child.id == sa);
            if decide(ours, Theirs::Deletes) == Decision::End {
                to_name.extend(spis);
            }
            if !replaced {
                self.child_lost(shared, now);
            }
        }
        to_name
    }

    /// The peer has deleted a pair; if that was its answer to a request of ours, ours stands alone now.
    fn forget_rival_pair(&mut self, sa: ChildSaId) {
        for replaces in self.asked_to_replace() {
            let named = |rival: &mut Rival| rival.sa == Some(sa);
            let _ = replaces.rival.take_if(named);
        }
    }
}
