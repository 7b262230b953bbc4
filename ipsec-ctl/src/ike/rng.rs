//! Randomness as a parameter, so that a simulation can be repeated from its seed.

use ring::rand::SecureRandom;

/// A source of unpredictable bytes.
pub trait Random {
    /// Fills `bytes`.
    fn fill(&mut self, bytes: &mut [u8]);

    /// A number.
    fn number(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.fill(&mut bytes);
        u64::from_be_bytes(bytes)
    }
}

/// The operating system's source.
#[derive(Debug)]
pub struct SystemRandom(ring::rand::SystemRandom);

impl SystemRandom {
    /// Opens it.
    pub fn new() -> Self {
        Self(ring::rand::SystemRandom::new())
    }
}

impl Default for SystemRandom {
    fn default() -> Self {
        Self::new()
    }
}

impl Random for SystemRandom {
    fn fill(&mut self, bytes: &mut [u8]) {
        // Linux has getrandom(2) since 3.17 and it does not fail once seeded; to go on without randomness would be
        // worse than to stop.
        assert!(
            self.0.fill(bytes).is_ok(),
            "the operating system has no random numbers"
        );
    }
}
