//! The data plane: everything that touches a packet. The daemon talks to it through [`seam`] alone.

pub mod routing;
pub mod seam;
