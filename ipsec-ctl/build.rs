//! Hands the XDP program's object to the compiler, or an empty one where `cargo xtask build` has not made it yet.
//!
//! So a plain `cargo build`, clippy and rust-analyzer need no BPF toolchain; what they build has no fast path and says so.

use std::{env, fs, io, path::Path};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=IPSEC_XDP_OBJECT");
    let out = env::var_os("OUT_DIR").ok_or(io::ErrorKind::NotFound)?;
    let embedded = Path::new(&out).join("ipsec-ebpf.o");
    // A missing file named in `rerun-if-changed` would rebuild everything every time: xtask touches this one instead.
    match env::var_os("IPSEC_XDP_OBJECT").filter(|object| Path::new(object).exists()) {
        Some(object) => {
            println!("cargo::rerun-if-changed={}", Path::new(&object).display());
            fs::copy(object, embedded).map(|_bytes| ())
        }
        None => fs::write(embedded, []),
    }
}
