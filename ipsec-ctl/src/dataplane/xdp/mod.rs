//! The `xdp` engine.

pub mod af_xdp;
