//! The data plane's side of the gateway: so far the protocol that the daemon will speak to an engine, in [`seam`].

pub mod routing;
pub mod seam;
pub mod xdp;
