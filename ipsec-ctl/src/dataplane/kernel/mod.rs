//! The kernel's own ESP (XFRM) as a data plane.

pub mod algorithms;
pub mod probe;
