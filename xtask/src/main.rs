//! `cargo xtask`: everything one does with this project. This file only parses and dispatches.

fn main() {}
