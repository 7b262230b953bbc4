//! What `check` says of tunnels without a device.

use std::fmt::Write;

use crate::config::{Config, ConfigErrors, parse, secret::Secret};

/// A tunnel with a line of its own; each has another peer.
struct Given<'a> {
    lines: &'a str,
    local: &'a str,
    remote: &'a str,
}

fn given<'a>(lines: &'a str, local: &'a str, remote: &'a str) -> Given<'a> {
    Given {
        lines,
        local,
        remote,
    }
}

fn read(tunnels: &[Given<'_>]) -> Result<Config, ConfigErrors> {
    let mut text = String::new();
    for (number, tunnel) in (1..).zip(tunnels) {
        let Given {
            lines,
            local,
            remote,
        } = tunnel;
        write!(
            text,
            "[[tunnel]]\nname = \"t{number}\"\npeer = \"203.0.113.{number}\"\npsk_file = \"key\"\n{lines}\n\
             [[tunnel.child]]\nname = \"net\"\nlocal = [\"{local}\"]\nremote = [\"{remote}\"]\n"
        )
        .unwrap();
    }
    parse("test.toml", &text, &|_| Ok(Secret::new(b"key".to_vec())))
}

fn refusal(tunnels: &[Given<'_>]) -> String {
    let errors = read(tunnels).unwrap_err();
    errors.messages().collect::<Vec<_>>().join("; ")
}

const ALONE: &str = "engine = \"kernel\"\npolicy_based = true";
const KERNEL: &str = "engine = \"kernel\"";

#[test]
fn policies_lead_the_kernels_esp_alone_and_need_nothing_that_a_device_has() {
    let config = read(&[given(ALONE, "10.1.0.0/24", "10.2.0.0/24")]).unwrap();
    assert!(config.tunnels[0].policy_based);
    let off = read(&[given("policy_based = false", "10.1.0.0/24", "10.2.0.0/24")]).unwrap();
    assert!(!off.tunnels[0].policy_based);
    for engine in ["xdp", "auto"] {
        let lines = format!("engine = \"{engine}\"\npolicy_based = true");
        let found = refusal(&[given(&lines, "10.1.0.0/24", "10.2.0.0/24")]);
        assert!(found.contains("only the kernel's ESP"), "{found}");
    }
    for (line, word) in [
        ("device = \"x\"", "`device`"),
        ("mtu = 1400", "`mtu`"),
        ("address = [\"10.9.0.1/24\"]", "`address`"),
        ("routes = \"selectors\"", "`routes`"),
        ("mode = \"transport\"", "no device anyway"),
    ] {
        let lines = format!("{ALONE}\n{line}");
        let found = refusal(&[given(&lines, "10.1.0.0/24", "10.2.0.0/24")]);
        assert!(found.contains(word), "{found}");
    }
}

#[test]
fn without_a_device_the_two_sides_of_a_child_must_differ() {
    for everything in ["0.0.0.0/0", "::/0", "10.0.0.0/8"] {
        let found = refusal(&[given(ALONE, everything, everything)]);
        assert!(found.contains("are the same"), "{found}");
        read(&[given(KERNEL, everything, everything)]).unwrap();
    }
    read(&[given(ALONE, "10.1.0.0/24", "0.0.0.0/0")]).unwrap();
    read(&[given(ALONE, "0.0.0.0/0", "10.2.0.0/24")]).unwrap();
}

#[test]
fn two_tunnels_by_policies_alone_have_other_selectors_and_the_more_specific_one_is_no_matter() {
    read(&[
        given(ALONE, "10.1.0.0/24", "10.0.0.0/8"),
        given(ALONE, "10.1.0.0/24", "10.2.0.0/16"),
    ])
    .unwrap();
    let found = refusal(&[
        given(ALONE, "10.1.0.0/24", "10.2.0.0/16"),
        given(ALONE, "10.1.0.0/24", "10.2.0.0/16"),
    ]);
    assert!(found.contains("room for one policy"), "{found}");
    assert_eq!(found.matches("room for one").count(), 1, "{found}");
    // With 0.0.0.0/0 on both sides each is refused by itself, and the two together.
    let found = refusal(&[
        given(ALONE, "0.0.0.0/0", "0.0.0.0/0"),
        given(ALONE, "0.0.0.0/0", "0.0.0.0/0"),
    ]);
    assert_eq!(found.matches("are the same").count(), 2, "{found}");
    assert!(found.contains("room for one policy"), "{found}");
}

#[test]
fn policies_do_not_take_what_is_routed_into_a_device() {
    for with_device in ["engine = \"kernel\"", "engine = \"xdp\""] {
        let found = refusal(&[
            given(with_device, "10.1.0.0/24", "0.0.0.0/0"),
            given(ALONE, "10.1.0.0/24", "10.2.0.0/16"),
        ]);
        assert!(found.contains("before any route"), "{found}");
        read(&[
            given(with_device, "10.1.0.0/24", "10.3.0.0/16"),
            given(ALONE, "10.1.0.0/24", "10.2.0.0/16"),
        ])
        .unwrap();
    }
}
