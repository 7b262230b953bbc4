//! Key exchanges as values: slow, so the caller computes them where they delay nobody.

use serde::{Deserialize, Serialize};

use super::{
    crypto::ke::{KeError, PrivateKey, SharedSecret},
    event::IkeSaId,
};

/// Names a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct JobId(pub u64);

/// A job. It yields the same whenever it is computed, so one that a dead process has left is computed again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// Its id, to hand back with the result.
    pub id: JobId,
    pub(super) ike: IkeSaId,
    private: PrivateKey,
    /// The peer's public value; none to compute only ours.
    peer: Option<Vec<u8>>,
    /// Whether our own public value is wanted.
    public: bool,
}

/// What a job yields.
#[derive(Debug)]
pub struct JobResult {
    pub(super) id: JobId,
    pub(super) ike: IkeSaId,
    /// Our public value, or empty.
    pub(super) public: Vec<u8>,
    pub(super) shared: Option<Result<SharedSecret, KeError>>,
}

impl Job {
    pub(super) fn new(
        id: JobId,
        ike: IkeSaId,
        private: PrivateKey,
        peer: Option<Vec<u8>>,
        public: bool,
    ) -> Self {
        Self {
            id,
            ike,
            private,
            peer,
            public,
        }
    }

    /// Whether it takes so long that others should not have to wait for it.
    pub fn is_slow(&self) -> bool {
        self.private.group().is_slow()
    }

    /// Computes it: from a tenth of a millisecond to a tenth of a second.
    pub fn run(self) -> JobResult {
        JobResult {
            id: self.id,
            ike: self.ike,
            public: if self.public {
                self.private.public()
            } else {
                Vec::new()
            },
            shared: self.peer.map(|peer| self.private.agree(&peer)),
        }
    }
}
