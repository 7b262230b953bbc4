//! Configurations as users write them, right and wrong.

use std::path::PathBuf;

use super::{
    reference::SECTIONS,
    secret::{KeyFileError, Secret},
    *,
};

const OFFICE: &str = r#"
[[tunnel]]
name = "office"
peer = "203.0.113.9"
psk_file = "office.psk"

[[tunnel.child]]
name = "net"
local = ["10.1.0.0/24"]
remote = ["10.2.0.0/24", "10.9.0.1-10.9.0.7 tcp 443"]
"#;

fn read(text: &str) -> Result<Config, ConfigErrors> {
    parse("test.toml", text, &|_| Ok(Secret::new(b"key".to_vec())))
}

/// All messages of a refusal.
fn refusal(text: &str) -> Vec<String> {
    read(text)
        .expect_err("must be refused")
        .messages()
        .map(str::to_owned)
        .collect()
}

/// The one message of a refusal, for `OFFICE` with `from` replaced by `to`.
fn refusal_with(from: &str, to: &str) -> String {
    assert!(OFFICE.contains(from));
    let messages = refusal(&OFFICE.replace(from, to));
    assert_eq!(messages.len(), 1, "{messages:?}");
    messages.concat()
}

fn rendered(errors: ConfigErrors) -> String {
    let mut page = String::new();
    miette::NarratableReportHandler::new()
        .render_report(&mut page, &errors)
        .unwrap();
    page
}

#[test]
fn a_site_to_site_tunnel_takes_few_lines_and_gets_sensible_defaults() {
    let config = read(OFFICE).unwrap();
    let [tunnel] = config.tunnels.as_slice() else {
        panic!("one tunnel")
    };
    assert_eq!(tunnel.device, "office");
    assert_eq!(tunnel.role, Role::Initiate);
    assert!(tunnel.clamp_mss);
    let [child] = tunnel.children.as_slice() else {
        panic!("one child")
    };
    assert_eq!(child.replay_window, 4096);
    let [net, web] = child.remote.as_slice() else {
        panic!("two selectors")
    };
    assert_eq!(
        net.addresses,
        ("10.2.0.0".parse().unwrap(), "10.2.0.255".parse().unwrap())
    );
    assert_eq!((web.protocol, web.ports), (6, (443, 443)));
    assert_eq!(
        config.control_socket,
        PathBuf::from("/run/ipsec-xdp/default.sock")
    );
}

#[test]
fn the_same_file_twice_leaves_a_reload_nothing_to_do() {
    assert_eq!(read(OFFICE).unwrap(), read(OFFICE).unwrap());
    assert_ne!(
        read(OFFICE).unwrap(),
        read(&OFFICE.replace("10.1.0.0", "10.3.0.0")).unwrap()
    );
}

#[test]
fn a_misspelt_key_is_answered_with_the_right_one() {
    let error = read(&OFFICE.replace("psk_file", "psk_fiel")).unwrap_err();
    let page = rendered(error);
    assert!(page.contains("unknown field `psk_fiel`"), "{page}");
    assert!(page.contains("did you mean `psk_file`?"), "{page}");
}

#[test]
fn a_value_of_another_kind_is_answered_with_how_one_is_written() {
    for (line, help) in [
        ("ike = \"aes256-sha512-ecp521\"", "in brackets"),
        ("local_id = 5", "quotes"),
        ("mobike = \"yes\"", "true or false"),
        ("replay_window = \"big\"", "whole number"),
    ] {
        let file = if line.starts_with("replay") {
            format!("{OFFICE}\n{line}\n")
        } else {
            OFFICE.replace("psk_file", &format!("{line}\npsk_file"))
        };
        let page = rendered(read(&file).unwrap_err());
        assert!(page.contains(help), "{page}");
    }
}

#[test]
fn a_secret_in_the_file_is_refused_with_the_way_out() {
    let page = rendered(read(&OFFICE.replace("psk_file", "psk")).unwrap_err());
    assert!(page.contains("holds no secrets"), "{page}");
}

#[test]
fn every_problem_is_reported_at_once_and_at_its_line() {
    let text = OFFICE
        .replace("10.1.0.0/24", "10.1.0.5/24")
        .replace("203.0.113.9", "nowhere");
    assert_eq!(
        refusal(&text),
        [
            "`nowhere` is not an address or a DNS name",
            "`10.1.0.5/24` has bits set behind its length"
        ]
    );
    let page = rendered(read(&text).unwrap_err());
    assert!(page.contains("line 4") && page.contains("line 9"), "{page}");
    assert!(page.contains("write \"10.1.0.0/24\""), "{page}");
}

#[test]
fn values_that_cannot_work_are_refused() {
    let child = "name = \"net\"";
    for (from, to, message) in [
        (
            "name = \"office\"",
            "name = \"a-name-that-no-device-has\"",
            "the kernel would not take this one",
        ),
        ("[\"10.1.0.0/24\"]", "[]", "`local` is empty"),
        (
            "[\"10.1.0.0/24\"]",
            "[\"2001:db8::/64\"]",
            "an address family that the other lacks",
        ),
        (
            "10.1.0.0/24",
            "10.1.0.9-10.1.0.1",
            "the range ends before it starts",
        ),
        (
            "tcp 443",
            "icmp 443",
            "ports mean nothing for protocol `icmp`",
        ),
        ("tcp 443", "tpc 443", "`tpc` is not a protocol"),
        (
            "203.0.113.9\"",
            "any\"\nrole = \"initiate\"",
            "cannot be started from here",
        ),
        (
            "203.0.113.9\"",
            "203.0.113.9\"\nlocal = \"2001:db8::1\"",
            "one end of the tunnel is IPv4",
        ),
        (
            "203.0.113.9\"",
            "203.0.113.9\"\nike = [\"3des-md5-modp1024\"]",
            "`3des` is refused",
        ),
        (
            "203.0.113.9\"",
            "203.0.113.9\"\nmtu = 400",
            "the MTU is too small",
        ),
        (
            "203.0.113.9\"",
            "203.0.113.9\"\nlifetime = \"5\"",
            "not a duration",
        ),
        (
            "203.0.113.9\"",
            "203.0.113.9\"\nlifetime = \"5s\"",
            "too short a time",
        ),
        (
            "203.0.113.9\"",
            "203.0.113.9\"\nbypass = [\"10.2.0.1/24\"]",
            "bits set behind its length",
        ),
        (
            child,
            "name = \"net\"\nreplay_window = 9999",
            "the replay window is out of range",
        ),
        (
            child,
            "name = \"net\"\nlifetime_bytes = \"many\"",
            "not a volume",
        ),
        (
            "[[tunnel]]",
            "mark = 0\n[[tunnel]]",
            "the mark must not be 0",
        ),
        (
            "[[tunnel]]",
            "instance = \"a/b\"\n[[tunnel]]",
            "becomes a folder name",
        ),
        (
            "[[tunnel]]",
            "[ports]\nike = 4500\n[[tunnel]]",
            "cannot share a port",
        ),
        (
            "[[tunnel]]",
            "workers = 0\n[[tunnel]]",
            "must be at least 1",
        ),
    ] {
        let found = refusal_with(from, to);
        assert!(found.contains(message), "{to}: {found}");
    }
}

#[test]
fn a_peer_may_be_a_list_of_addresses_and_names() {
    let with = |peer: &str| OFFICE.replace("\"203.0.113.9\"", peer);
    let config = read(&with(
        r#"["203.0.113.9", "GW.example.com.", "2001:db8::9"]"#,
    ))
    .unwrap();
    assert_eq!(
        config.tunnels[0].peer.to_string(),
        "203.0.113.9, gw.example.com, 2001:db8::9"
    );
    assert!(config.tunnels[0].peer.has_names());
    for (peer, message) in [
        ("[]", "a peer has 1 to 8 addresses and names"),
        (
            "[\"any\", \"192.0.2.1\"]",
            "`any` is not an address or a DNS name",
        ),
        ("\"203.0.113.999\"", "`203.0.113.999` is not an address"),
        (
            "[\"a.example\", \"A.example\"]",
            "`a.example` is listed twice",
        ),
        (
            "[\"203.0.113.9\", \"2001:db8::9\"]\nlocal = \"192.0.2.1\"",
            "one end of the tunnel is IPv4",
        ),
    ] {
        let messages = refusal(&with(peer)).concat();
        assert!(messages.contains(message), "{peer}: {messages}");
    }
    // Tunnels that share a place need something else to tell them apart.
    let twin = with(r#"["198.51.100.1", "203.0.113.9"]"#).replace("\"office\"", "\"twin\"");
    assert_eq!(
        refusal(&format!("{OFFICE}{twin}")),
        ["these tunnels cannot be told apart: same addresses, same identities"]
    );
}

#[test]
fn the_time_until_a_peer_is_dead_is_said_once() {
    let with = |dpd: &str| {
        OFFICE.replace(
            "\"203.0.113.9\"",
            &format!("\"203.0.113.9\"\ndpd = {{ {dpd} }}"),
        )
    };
    let dpd = |text: &str| read(&with(text)).unwrap().tunnels[0].dpd;
    let seconds = |text: &str| dpd(text).timeout.as_secs();
    assert_eq!(seconds("mode = \"periodic\""), 60);
    assert_eq!(seconds("interval = \"10s\", retries = 5"), 50);
    assert_eq!(seconds("interval = \"2s\", timeout = \"30s\""), 30);
    assert_eq!(seconds("interval = \"1s\", retries = 1"), 5);
    assert_eq!(dpd("mode = \"off\"").mode, DpdMode::Off);
    let message = refusal(&with("retries = 3, timeout = \"9s\"")).concat();
    assert!(message.contains("say the same thing twice"), "{message}");
}

#[test]
fn a_child_of_a_responder_cannot_be_started_when_the_peer_is_dead() {
    let text = OFFICE
        .replace("psk_file", "role = \"respond\"\npsk_file")
        .replace("name = \"net\"", "name = \"net\"\non_dead = \"trap\"");
    assert!(
        refusal(&text)
            .concat()
            .contains("cannot be started again from here")
    );
}

#[test]
fn a_tunnel_without_children_is_refused() {
    let text = OFFICE.split("[[tunnel.child]]").next().unwrap_or_default();
    assert_eq!(
        refusal(text),
        ["tunnel `office` has no child, so there is nothing it could carry"]
    );
}

#[test]
fn tunnels_that_cannot_be_told_apart_are_refused() {
    let twin = |name: &str, extra: &str| {
        OFFICE.replace("name = \"office\"", &format!("name = \"{name}\"\n{extra}"))
    };
    assert_eq!(
        refusal(&format!("{OFFICE}{OFFICE}")),
        ["two tunnels have the same name"]
    );
    assert_eq!(
        refusal(&format!("{OFFICE}{}", twin("b", "device = \"office\""))),
        ["two tunnels would share one device"]
    );
    let message = refusal(&format!("{OFFICE}{}", twin("b", "")));
    assert_eq!(
        message,
        ["these tunnels cannot be told apart: same addresses, same identities"]
    );
    assert!(
        read(&format!(
            "{OFFICE}{}",
            twin("b", "remote_id = \"b.example\"")
        ))
        .is_ok()
    );
}

#[test]
fn a_key_file_that_fails_is_named_with_its_remedy() {
    let exposed = |path: &Path| {
        Err(KeyFileError::Exposed {
            path: path.to_owned(),
            mode: 0o644,
        })
    };
    let page = rendered(parse("test.toml", OFFICE, &exposed).unwrap_err());
    assert!(page.contains("can be read by others (mode 0644)"), "{page}");
    assert!(page.contains("chmod 600 office.psk"), "{page}");
}

#[test]
fn keys_never_show() {
    let secret = parse("test.toml", OFFICE, &|_| {
        Ok(Secret::new(b"hunter2".to_vec()))
    })
    .unwrap();
    assert!(!format!("{secret:?}").contains("hunter2"));
}

/// serde names every key it would have taken: the reference must name the same ones.
#[test]
fn the_reference_has_every_key_and_no_other() {
    let probes = [
        "nonsense = 1".to_owned(),
        "[ports]\nnonsense = 1".to_owned(),
        "[limits]\nnonsense = 1".to_owned(),
        "[[tunnel]]\nnonsense = 1".to_owned(),
        "[[tunnel]]\n[[tunnel.child]]\nnonsense = 1".to_owned(),
    ];
    for (probe, section) in probes.iter().zip(SECTIONS) {
        let message = refusal(probe).concat();
        let mut expected: Vec<&str> = message.split('`').skip(3).step_by(2).collect();
        expected.retain(|name| !matches!(*name, "ports" | "limits" | "tunnel" | "child"));
        let documented: Vec<&str> = section.keys.iter().map(|key| key.name).collect();
        assert_eq!(expected, documented, "{}", section.header);
    }
}

#[test]
fn the_reference_page_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, reference_markdown()).unwrap();
    }
    let page = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(
        page,
        reference_markdown(),
        "run the tests once with UPDATE_DOCS=1"
    );
}
