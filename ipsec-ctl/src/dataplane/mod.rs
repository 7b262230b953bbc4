//! The data plane: the protocol that the daemon speaks ([`seam`]), the door it comes in by ([`plane`]), and what is behind.

mod device;
pub mod engines;
pub mod kernel;
pub mod link;
mod pace;
pub mod plane;
pub mod probe;
pub mod routing;
pub mod seam;
pub mod xdp;
