//! Children that are agreed on: their keys, their life in the data plane, their end (RFC 7296 sections 1.4.1 and 2.17).

use ipsec_common::Spi;

use super::{Agreed, ChildJob, ChildSa};
use crate::ike::{
    config::ChildName,
    config::DpdMode,
    crypto::{
        ChildSuite,
        keys::{ChildKeys, Nonces},
    },
    endpoint::{Origin, Shared},
    event::{ChildSaId, ChildUp, DownReason},
    job::JobResult,
    message::{ExchangeType, Payload, payload::Delete},
    sa::{
        Exchange, IkeSa, Task,
        rekey::{Lifetime, Replaced, Standing},
    },
    time::Time,
};

impl IkeSa {
    /// A key exchange for a child is done.
    pub(in crate::ike::sa) fn child_computed(
        &mut self,
        shared: &mut Shared,
        now: Time,
        result: JobResult,
    ) {
        let waiting = [&mut self.asking, &mut self.answering]
            .into_iter()
            .find_map(|slot| slot.take_if(|waiting| waiting.job == result.id));
        match waiting.map(|waiting| waiting.what) {
            Some(ChildJob::Ike(job)) => self.ike_computed(shared, now, job, result),
            Some(ChildJob::Public(pending)) => {
                self.send_child(shared, now, pending, &result.public);
            }
            Some(ChildJob::Agree(pending, agreed)) => {
                self.secret_computed(shared, now, &pending, &agreed, &result);
            }
            Some(ChildJob::Answer(grant)) => self.grant_computed(shared, now, &grant, &result),
            None => {}
        }
        self.next_task(shared, now);
    }

    /// Keys of a child, from nonces of its own or from those of IKE_SA_INIT.
    pub(in crate::ike::sa) fn child_keys(
        &self,
        suite: &ChildSuite,
        secret: Option<&[u8]>,
        nonces: Option<Nonces<'_>>,
    ) -> Option<ChildKeys> {
        let (keys, ike) = self.keys.as_ref().zip(self.suite)?;
        let nonces = nonces.unwrap_or_else(|| self.nonces());
        Some(keys.child(ike.prf, secret, nonces, suite))
    }

    /// Hands a pair of SAs to the data plane, perhaps in the place of another; tells its name.
    pub(in crate::ike::sa) fn install(
        &mut self,
        shared: &mut Shared,
        now: Time,
        child: ChildName,
        agreed: &Agreed,
        keys: Option<ChildKeys>,
        (origin, replaces): (Origin, Option<Replaced>),
    ) -> Option<ChildSaId> {
        let (keys, peer) = keys.zip(self.peer)?;
        let (key_out, key_in) = match origin {
            Origin::Asked | Origin::Lost => (keys.initiator, keys.responder),
            Origin::Answered => (keys.responder, keys.initiator),
        };
        let lifetime = shared.child_lifetime(peer, child);
        let id = shared.next_child();
        let sa = ChildSa {
            id,
            child,
            line: replaces.map_or(id, |(_, line)| line),
            asked: origin != Origin::Answered,
            spi_in: agreed.spi_in,
            spi_out: agreed.spi_out,
            group: agreed.suite.group,
            local: agreed.local.clone(),
            remote: agreed.remote.clone(),
            inbound: 0,
            outbound: 0,
            life: Lifetime {
                soft: Some(now + shared.soft(lifetime, self.initiator)),
                hard: now + lifetime,
            },
            standing: Standing::InForce,
        };
        let up = ChildUp {
            peer,
            child,
            sa: id,
            ike: self.id,
            replaces: replaces.map(|(old, _)| old),
            spi_in: Spi(agreed.spi_in),
            spi_out: Spi(agreed.spi_out),
            suite: agreed.suite,
            key_in,
            key_out,
            local: agreed.local.clone(),
            remote: agreed.remote.clone(),
            outer: self.outer(shared),
            since: now,
        };
        if origin == Origin::Answered {
            self.made_by_last_answer = Some(id);
        }
        shared.install(now, up, sa.line, origin);
        self.children.push(sa);
        self.children_since = Some(now);
        self.child_failures = 0;
        Some(id)
    }

    /// Ends all children at once.
    pub(in crate::ike::sa) fn drop_children(&mut self, shared: &mut Shared, reason: DownReason) {
        for child in std::mem::take(&mut self.children) {
            shared.drop_pair(child.id, child.spi_in, reason);
        }
        shared.end_lingering(self.id);
    }

    /// Ends the children that `which` picks; returns our SPIs of them. Those that others have replaced linger.
    pub(in crate::ike::sa) fn end_children(
        &mut self,
        shared: &mut Shared,
        now: Time,
        reason: DownReason,
        which: impl Fn(&ChildSa) -> bool,
    ) -> Vec<u32> {
        let (gone, kept): (Vec<ChildSa>, _) = std::mem::take(&mut self.children)
            .into_iter()
            .partition(|child| which(child));
        self.children = kept;
        for child in &gone {
            shared.uninstall(now, child.id, child.spi_in, reason);
        }
        gone.iter().map(|child| child.spi_in).collect()
    }

    pub(in crate::ike::sa) fn delete_children(
        &mut self,
        shared: &mut Shared,
        now: Time,
        spis: &[u32],
    ) {
        let payloads = [Payload::Delete(Delete::Esp(
            spis.iter().copied().map(Spi).collect(),
        ))];
        let kind = ExchangeType::INFORMATIONAL;
        let exchange = Exchange::DeleteChildren(spis.to_vec());
        self.request(shared, now, kind, &payloads, exchange);
    }

    /// What the data plane has carried tells whether the peer lives.
    pub(in crate::ike) fn traffic(
        &mut self,
        shared: &mut Shared,
        now: Time,
        sa: ChildSaId,
        inbound: u64,
        outbound: u64,
    ) {
        let Some(child) = self.children.iter_mut().find(|child| child.id == sa) else {
            return;
        };
        let sends = outbound > child.outbound;
        if inbound > child.inbound {
            self.heard = now;
            shared.proved(sa);
        }
        child.inbound = inbound;
        child.outbound = outbound;
        // RFC 7296 section 2.4: liveness is of interest only while there is traffic to lose.
        if let (true, Some(peer)) = (sends, self.peer_config(shared))
            && peer.dpd_mode != DpdMode::Off
            && now - self.heard >= peer.dpd_interval
        {
            self.ask_if_alive(shared, now);
        }
    }

    /// A pair cannot go on, though nobody wants it to end. While the peer may not have our answer that has made it, it would take
    /// a Delete for one of a pair that it does not know, and install the pair afterwards: then all of the IKE SA ends.
    pub(in crate::ike) fn lost(&mut self, shared: &mut Shared, now: Time, sa: ChildSaId) {
        if self.made_by_last_answer == Some(sa) {
            self.delete(shared, now, DownReason::Expired);
        } else {
            self.volume_reached(shared, now, sa, true);
        }
    }

    /// The data plane has reached a limit by volume.
    pub(in crate::ike) fn volume_reached(
        &mut self,
        shared: &mut Shared,
        now: Time,
        sa: ChildSaId,
        hard: bool,
    ) {
        if !hard {
            return self.wish_rekeyed(shared, now, sa);
        }
        self.expire_children(shared, now, |child| child.id == sa);
    }

    /// Ends the children that `which` picks, for they are at their limit.
    pub(in crate::ike::sa) fn expire_children(
        &mut self,
        shared: &mut Shared,
        now: Time,
        which: impl Fn(&ChildSa) -> bool,
    ) {
        let in_force = |child: &ChildSa| which(child) && child.standing == Standing::InForce;
        // What has ended comes back with a fresh IKE SA alone, which the peer begins when this one is gone.
        if self.is_left_to_peer() && self.children.iter().any(in_force) {
            return self.delete(shared, now, DownReason::Expired);
        }
        let spis = self.end_children(shared, now, DownReason::Expired, which);
        if spis.is_empty() {
            return;
        }
        self.push_task(shared, now, Task::DeleteChildren(spis));
        self.child_lost(shared, now);
    }
}
