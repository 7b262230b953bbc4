//! What a process of ours may do: the capabilities that its role needs, and no way to more.
//!
//! Capabilities belong to threads: this is done before any but the first is started.

use caps::{CapSet, Capability, CapsHashSet, errors::CapsError};
use nix::sys::prctl::set_no_new_privs;

/// What a process is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Negotiates, and starts the data plane if it has to.
    Daemon,
    /// Carries packets.
    DataPlane,
    /// Does both in one process.
    Both,
}

/// What it takes to carry packets, and so what may be handed on to the process that does.
const CARRY: [Capability; 6] = [
    // Devices, routes, firewall marks, nf_tables, XDP, XFRM.
    Capability::CAP_NET_ADMIN,
    // Raw sockets and AF_XDP.
    Capability::CAP_NET_RAW,
    // UDP ports 500 and 4500.
    Capability::CAP_NET_BIND_SERVICE,
    // Programs and maps, without the limits that the verifier has for strangers.
    Capability::CAP_BPF,
    Capability::CAP_PERFMON,
    // Packet memory stays where it is.
    Capability::CAP_IPC_LOCK,
];

/// What it takes to negotiate.
const NEGOTIATE: [Capability; 2] = [
    // Sysctls, and asking for routes by mark.
    Capability::CAP_NET_ADMIN,
    // Configuration and keys that an operator has in his own folder.
    Capability::CAP_DAC_READ_SEARCH,
];

/// Why privileges could not be given up.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// The kernel refused to change capabilities.
    #[error(transparent)]
    Capabilities(#[from] CapsError),
    /// The kernel refused to forbid new privileges.
    #[error("no_new_privs: {0}")]
    NoNewPrivileges(#[from] nix::Error),
}

/// Gives up all that the role does not need, for this thread and what it starts.
///
/// # Errors
///
/// [`PrivilegeError`]; some may have been given up already.
pub fn limit(role: Role) -> Result<(), PrivilegeError> {
    let had = caps::read(None, CapSet::Permitted)?;
    let of = |wanted: &[Capability]| -> CapsHashSet {
        // A container may have taken some away: what needs them will say so.
        wanted
            .iter()
            .copied()
            .filter(|capability| had.contains(capability))
            .collect()
    };
    let (carry, negotiate) = (of(&CARRY), of(&NEGOTIATE));
    let both: CapsHashSet = carry.union(&negotiate).copied().collect();
    let (may, does) = match role {
        // Nobody can start a process that may do more.
        Role::Daemon => (both, negotiate),
        Role::DataPlane => (carry.clone(), carry),
        Role::Both => (both.clone(), both),
    };
    // Who cannot do this has parents that did, or a container; without new privileges it bounds nothing further.
    if had.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::read(None, CapSet::Bounding)? {
            if !may.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &does)?;
    caps::set(None, CapSet::Permitted, &may)?;
    set_no_new_privs()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_up_is_gone_for_good() {
        // Capabilities are a thread's own, and this one ends.
        let ended = std::thread::spawn(|| {
            let had = caps::read(None, CapSet::Permitted).unwrap();
            if !had.contains(&Capability::CAP_SETPCAP) {
                return;
            }
            limit(Role::Daemon).unwrap();
            let wanted: CapsHashSet = CARRY.into_iter().chain(NEGOTIATE).collect();
            let all: CapsHashSet = wanted.intersection(&had).copied().collect();
            assert_eq!(caps::read(None, CapSet::Permitted).unwrap(), all);
            assert_eq!(caps::read(None, CapSet::Bounding).unwrap(), all);
            let does = caps::read(None, CapSet::Effective).unwrap();
            assert!(does.iter().all(|one| NEGOTIATE.contains(one)), "{does:?}");
            assert!(nix::sys::prctl::get_no_new_privs().unwrap());
            caps::raise(None, CapSet::Permitted, Capability::CAP_SYS_ADMIN).unwrap_err();
        });
        ended.join().unwrap();
    }
}
