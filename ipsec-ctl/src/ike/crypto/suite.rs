//! What two peers agreed on: one algorithm of each kind.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::transform::{Encryption, Esn, Group, Integrity, Prf};

/// Algorithms of an IKE SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IkeSuite {
    /// Cipher.
    pub encryption: Encryption,
    /// Integrity algorithm; none with an AEAD cipher.
    pub integrity: Option<Integrity>,
    /// Pseudorandom function.
    pub prf: Prf,
    /// Key exchange group.
    pub group: Group,
}

/// Algorithms of a CHILD SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildSuite {
    /// Cipher.
    pub encryption: Encryption,
    /// Integrity algorithm; none with an AEAD cipher.
    pub integrity: Option<Integrity>,
    /// Size of sequence numbers.
    pub esn: Esn,
    /// Group of a key exchange of its own, for perfect forward secrecy.
    pub group: Option<Group>,
}

impl fmt::Display for IkeSuite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.encryption)?;
        match self.integrity {
            Some(integrity) => {
                write!(f, "-{integrity}")?;
                if integrity.prf() != self.prf {
                    write!(f, "-{}", self.prf)?;
                }
            }
            None => write!(f, "-{}", self.prf)?,
        }
        write!(f, "-{}", self.group)
    }
}

impl fmt::Display for ChildSuite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.encryption)?;
        if let Some(integrity) = self.integrity {
            write!(f, "-{integrity}")?;
        }
        if let Some(group) = self.group {
            write!(f, "-{group}")?;
        }
        if self.esn == Esn::Yes {
            write!(f, "-{}", self.esn)?;
        }
        Ok(())
    }
}
