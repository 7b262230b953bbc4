//! What of this host stands in the way of a gateway: sysctls and features of the kernel, with what to do about each.

use std::{fs, io, path::Path};

use super::{bpf_fs, netfilter, sysctl};

/// Something that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is.
    pub what: String,
    /// What was found.
    pub found: String,
    /// What to do, if anything.
    pub remedy: Option<String>,
}

impl Finding {
    fn new(what: &str, found: impl Into<String>, remedy: Option<String>) -> Self {
        Self {
            what: what.to_owned(),
            found: found.into(),
            remedy,
        }
    }
}

/// Looks at everything. Nothing is changed.
pub fn findings(v6: bool) -> Vec<Finding> {
    let mut findings = vec![forwarding(
        "net.ipv4.ip_forward",
        &["net", "ipv4", "ip_forward"],
    )];
    if v6 {
        findings.push(forwarding(
            "net.ipv6.conf.all.forwarding",
            &["net", "ipv6", "conf", "all", "forwarding"],
        ));
    }
    findings.push(reverse_path());
    findings.push(feature(
        "/dev/net/tun",
        Path::new("/dev/net/tun"),
        "load the module: modprobe tun",
    ));
    findings.push(bpf_file_system());
    findings.push(nf_tables());
    findings.push(kernel());
    findings
}

/// Needed by the plaintext guard.
fn nf_tables() -> Finding {
    let name = "nf_tables";
    match netfilter::guard::is_supported() {
        Ok(true) => Finding::new(name, "there", None),
        Ok(false) => Finding::new(
            name,
            "missing",
            Some(
                "load the modules: modprobe -a nf_tables nft_fib_inet; without them plaintext that should have come \
                 through a tunnel is not refused"
                    .to_owned(),
            ),
        ),
        // Only root may ask, and asking is all that a check without root leaves out.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Finding::new(
            name,
            "not looked at: only root may ask the kernel",
            Some("check as root to know whether plaintext can be refused".to_owned()),
        ),
        Err(error) => unreadable(name, &error),
    }
}

/// Settings that a gateway needs, and the value.
const NEEDED: &[(&[&str], &str)] = &[
    (&["net", "ipv4", "ip_forward"], "1"),
    (&["net", "ipv6", "conf", "all", "forwarding"], "1"),
];

/// Sets what a gateway needs, and keeps what was there before in `originals`, for [`restore`]. Returns what was changed.
///
/// # Errors
///
/// Those of the file system; what was changed before stays changed and is kept.
pub fn manage(originals: &Path, v6: bool) -> io::Result<Vec<String>> {
    let mut changed = Vec::new();
    let mut kept = fs::read_to_string(originals).unwrap_or_default();
    for (parts, wanted) in NEEDED {
        if parts.contains(&"ipv6") && !v6 {
            continue;
        }
        let Ok(before) = sysctl::get(parts) else {
            continue;
        };
        if before == *wanted {
            continue;
        }
        let name = parts.join("/");
        // A daemon that was killed has kept the true original already.
        if !kept.lines().any(|line| line.starts_with(&name)) {
            kept.push_str(&format!("{name} {before}\n"));
            fs::write(originals, &kept)?;
        }
        sysctl::set(parts, wanted)?;
        changed.push(format!("{name} from {before} to {wanted}"));
    }
    Ok(changed)
}

/// Sets back what [`manage`] has changed. Returns what was set back.
///
/// # Errors
///
/// Those of the file system.
pub fn restore(originals: &Path) -> io::Result<Vec<String>> {
    let kept = match fs::read_to_string(originals) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut restored = Vec::new();
    for line in kept.lines() {
        let Some((name, value)) = line.split_once(' ') else {
            continue;
        };
        // The file is ours, and yet only what we set is ever set back.
        if let Some((parts, _)) = NEEDED.iter().find(|(parts, _)| parts.join("/") == name) {
            sysctl::set(parts, value)?;
            restored.push(format!("{name} to {value}"));
        }
    }
    fs::remove_file(originals)?;
    Ok(restored)
}

fn forwarding(name: &str, parts: &[&str]) -> Finding {
    match sysctl::get(parts) {
        Ok(value) if value == "0" => Finding::new(
            name,
            "0: this host does not forward",
            Some(format!("sysctl -w {name}=1, and a line in /etc/sysctl.d/")),
        ),
        Ok(value) => Finding::new(name, value, None),
        Err(error) => unreadable(name, &error),
    }
}

/// Strict filtering works, for the routes back to what tunnels protect lead into them; it is told for what surprises it
/// may hold with asymmetric routes.
fn reverse_path() -> Finding {
    let name = "net.ipv4.conf.all.rp_filter";
    match sysctl::get(&["net", "ipv4", "conf", "all", "rp_filter"]) {
        Ok(value) => Finding::new(name, value, None),
        Err(error) => unreadable(name, &error),
    }
}

fn unreadable(name: &str, error: &io::Error) -> Finding {
    Finding::new(name, error.to_string(), None)
}

fn feature(name: &str, path: &Path, remedy: &str) -> Finding {
    if path.exists() {
        Finding::new(name, "there", None)
    } else {
        Finding::new(name, "missing", Some(remedy.to_owned()))
    }
}

fn bpf_file_system() -> Finding {
    let name = "BPF file system";
    match bpf_fs::is_mounted() {
        Ok(true) => Finding::new(name, "there", None),
        Ok(false) => Finding::new(name, "not mounted; `ipsec-ctl run` mounts it", None),
        Err(error) => Finding::new(
            name,
            error.desc(),
            Some("a kernel with CONFIG_BPF_SYSCALL; without it there is no fast path".to_owned()),
        ),
    }
}

/// The newest thing that the fast path uses are neighbours that the kernel keeps (NTF_EXT_MANAGED).
const OLDEST: (u32, u32) = (5, 16);

fn kernel() -> Finding {
    let release = sysctl::get(&["kernel", "osrelease"]).unwrap_or_default();
    let old = version(&release).is_some_and(|version| version < OLDEST);
    Finding::new(
        "kernel",
        release,
        old.then(|| {
            let (major, minor) = OLDEST;
            format!("too old for the fast path, which needs Linux {major}.{minor} or later")
        }),
    )
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(['.', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_number_and_not_as_text() {
        assert_eq!(version("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(version("6.1.0-13-amd64"), Some((6, 1)));
        assert!(version("6.18.0") > Some(OLDEST));
        assert!(version("5.9.0") < Some(OLDEST));
        assert_eq!(version("odd"), None);
    }

    #[test]
    fn what_was_changed_is_set_back_once() {
        if !nix::unistd::geteuid().is_root() {
            crate::skip::skip("sysctls need root");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let originals = folder.path().join("originals");
        // The namespace, and with it every setting, ends with the thread.
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let forward = || sysctl::get(&["net", "ipv4", "ip_forward"]).unwrap();
            sysctl::set(&["net", "ipv4", "ip_forward"], "0").unwrap();
            assert_eq!(manage(&originals, false).unwrap().len(), 1);
            assert_eq!(forward(), "1");
            assert!(
                manage(&originals, false).unwrap().is_empty(),
                "nothing is left to do"
            );
            assert_eq!(restore(&originals).unwrap().len(), 1);
            assert_eq!(forward(), "0");
            assert!(restore(&originals).unwrap().is_empty());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn whatever_stands_in_the_way_comes_with_a_remedy() {
        for finding in findings(true) {
            let bad = ["0:", "missing", "not looked at"]
                .iter()
                .any(|word| finding.found.starts_with(word));
            assert_eq!(
                bad,
                finding.remedy.is_some() && finding.what != "kernel",
                "{finding:?}"
            );
        }
    }
}
