//! The policies of the whole host, which tunnels without a device share: several may want one for the same packets, and the
//! kernel has room for one.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    dataplane::{
        kernel::host,
        seam::{Rejected, TunnelId},
    },
    net::xfrm::{Action, Policy, PolicyDirection, Selector, Xfrm},
};

/// What tells a policy apart in the kernel.
pub(super) type Key = (PolicyDirection, Selector);

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// By whom each is wanted.
    wanted: BTreeMap<Key, BTreeMap<TunnelId, Policy>>,
    /// What each tunnel wants.
    of: BTreeMap<TunnelId, BTreeSet<Key>>,
    /// What the kernel has.
    there: BTreeMap<Key, Policy>,
}

impl Shared {
    /// Notes what the kernel has, among policies of others and of interfaces. Returns whether that was known.
    pub(super) fn note(&mut self, policies: &[Policy]) -> bool {
        let ours = policies.iter().filter(|policy| host::is_ours(policy));
        let there = ours.map(|policy| (policy.key(), *policy)).collect();
        let known = self.there == there;
        self.there = there;
        known
    }

    /// What the kernel has in a place, as far as we know.
    pub(super) fn at(&self, key: &Key) -> Option<&Policy> {
        self.there.get(key)
    }

    /// Whether another tunnel has packets that a tunnel wants to have, too. What stays in the clear may be the same.
    pub(super) fn is_taken(&self, tunnel: TunnelId, policies: &BTreeSet<Policy>) -> bool {
        let has = |policy: &Policy| policy.action != Action::Pass;
        policies.iter().filter(|policy| has(policy)).any(|policy| {
            let wanted = self.wanted.get(&policy.key()).into_iter().flatten();
            wanted
                .into_iter()
                .any(|(other, theirs)| *other != tunnel && has(theirs))
        })
    }

    /// Whether the kernel protects the packets of a policy.
    pub(super) fn is_protected(&self, policy: &Policy) -> bool {
        let there = self.there.get(&policy.key());
        there.is_some_and(|there| matches!(there.action, Action::Protect(_)))
    }

    /// Notes what a tunnel wants now, and has the kernel do it: what is to be set first, so that there is no gap.
    pub(super) fn want(
        &mut self,
        tunnel: TunnelId,
        policies: &BTreeSet<Policy>,
        xfrm: &Xfrm,
    ) -> Result<(), Rejected> {
        let mut keys = self.of.remove(&tunnel).unwrap_or_default();
        for key in &keys {
            if let Some(by) = self.wanted.get_mut(key) {
                by.remove(&tunnel);
            }
        }
        for policy in policies {
            let by = self.wanted.entry(policy.key()).or_default();
            by.insert(tunnel, *policy);
        }
        let wanted: BTreeSet<Key> = policies.iter().map(Policy::key).collect();
        keys.extend(&wanted);
        self.of.insert(tunnel, wanted);
        let done = self.bring_about(&keys, xfrm);
        for key in &keys {
            if self.wanted.get(key).is_some_and(BTreeMap::is_empty) {
                self.wanted.remove(key);
            }
        }
        done
    }

    /// Puts back what others have removed or changed.
    pub(super) fn restore(&mut self, xfrm: &Xfrm) -> Result<(), Rejected> {
        let keys: BTreeSet<Key> = self.wanted.keys().copied().collect();
        self.bring_about(&keys, xfrm)
    }

    /// Takes away what a former life has left and no tunnel wants.
    pub(super) fn remove_leftovers(&mut self, xfrm: &Xfrm) -> Result<(), Rejected> {
        let keys: BTreeSet<Key> = self.there.keys().copied().collect();
        self.bring_about(&keys, xfrm)
    }

    /// Of several policies for the same packets the one that would be asked first.
    fn winner(&self, key: &Key) -> Option<Policy> {
        let by = self.wanted.get(key)?;
        by.values().min_by_key(|policy| policy.priority).copied()
    }

    fn bring_about(&mut self, keys: &BTreeSet<Key>, xfrm: &Xfrm) -> Result<(), Rejected> {
        let mut unwanted = Vec::new();
        for key in keys {
            match (self.winner(key), self.there.get(key)) {
                (Some(wanted), Some(there)) if wanted == *there => {}
                (Some(wanted), Some(_)) => {
                    xfrm.set_policy(&wanted)?;
                    self.there.insert(*key, wanted);
                }
                (Some(wanted), None) => {
                    add(&wanted, xfrm)?;
                    self.there.insert(*key, wanted);
                }
                (None, Some(there)) => unwanted.push(*there),
                (None, None) => {}
            }
        }
        for policy in unwanted {
            xfrm.remove_policy(&policy)?;
            self.there.remove(&policy.key());
        }
        Ok(())
    }
}

/// Sets a policy where others may have one for the same packets, which is theirs.
fn add(policy: &Policy, xfrm: &Xfrm) -> Result<(), Rejected> {
    match xfrm.add_policy(policy) {
        Err(error) if error.errno == Some(libc::EEXIST) => Err(Rejected::by_kernel(
            &error.step,
            &"another program has set one for the same packets",
        )),
        other => other.map_err(Rejected::from),
    }
}
