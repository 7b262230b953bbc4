//! Hands the XDP program's object to the compiler, or an empty one where `cargo xtask build` has not made it yet.
//!
//! So a plain `cargo build`, clippy and rust-analyzer need no BPF toolchain; what they build has no fast path and says so.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

/// Where the values are defined that daemon and data plane exchange.
const PROTOCOL: [&str; 6] = [
    "src/dataplane/seam",
    "src/dataplane/link",
    "src/dataplane/routing/mod.rs",
    "src/esp/suite.rs",
    "../ipsec-common/src",
    "Cargo.toml",
];

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=IPSEC_XDP_OBJECT");
    println!("cargo::rustc-env=IPSEC_XDP_PROTOCOL={:016x}", protocol()?);
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

/// A number that is another one whenever those values are: the FNV-1a hash of their sources.
fn protocol() -> io::Result<u64> {
    let mut files = Vec::new();
    for path in PROTOCOL {
        println!("cargo::rerun-if-changed={path}");
        collect(Path::new(path), &mut files)?;
    }
    files.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for file in files {
        for byte in fs::read(file)? {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    Ok(hash)
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            collect(&entry?.path(), files)?;
        }
    } else {
        files.push(path.to_owned());
    }
    Ok(())
}
