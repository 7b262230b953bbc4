//! What each key of the configuration means: the one source of `docs/configuration.md`.

use std::fmt::Write;

/// A table of the file and the keys in it.
pub(super) struct Section {
    /// As it is written in the file.
    pub(super) header: &'static str,
    /// What it is.
    text: &'static str,
    /// Its keys.
    pub(super) keys: &'static [Key],
}

/// One key.
pub(super) struct Key {
    /// Its name.
    pub(super) name: &'static str,
    /// Values it takes.
    values: &'static str,
    /// What holds without it; empty if it must be there.
    default: &'static str,
    /// What it does.
    text: &'static str,
}

const fn key(
    name: &'static str,
    values: &'static str,
    default: &'static str,
    text: &'static str,
) -> Key {
    Key {
        name,
        values,
        default,
        text,
    }
}

pub(super) const SECTIONS: &[Section] = &[
    Section {
        header: "top of the file",
        text: "Settings of the whole gateway. All are optional.",
        keys: &[
            key(
                "instance",
                "1 to 32 letters, digits, hyphens",
                "`\"default\"`",
                "Names this gateway, so that several can share a kernel.",
            ),
            key(
                "interfaces",
                "list of interface names",
                "every suitable one",
                "Interfaces that the XDP program attaches to.",
            ),
            key(
                "engine",
                "`\"xdp\"`, `\"kernel\"`, `\"auto\"`",
                "`\"xdp\"`",
                "What carries the tunnels: XDP and AF_XDP, the kernel's own ESP, or the first that this machine has (docs/engines.md).",
            ),
            key(
                "mark",
                "number above 0",
                "`0x4958`",
                "Firewall mark of our own packets. It keeps them out of the tunnels.",
            ),
            key(
                "sysctl",
                "`\"report\"`, `\"manage\"`",
                "`\"report\"`",
                "Whether sysctls that stand in the way are only told, or set.",
            ),
            key(
                "control_socket",
                "path",
                "`/run/ipsec-xdp/INSTANCE.sock`",
                "The socket on which the daemon is asked and told.",
            ),
            key(
                "workers",
                "number from 1",
                "what queues and processors allow",
                "Threads of the fast path.",
            ),
            key(
                "busy_poll",
                "`true`, `false`",
                "`false`",
                "Workers poll without sleeping: less latency for a processor each.",
            ),
        ],
    },
    Section {
        header: "[ports]",
        text: "UDP ports that we listen on. Peers expect the defaults.",
        keys: &[
            key("ike", "port", "`500`", "IKE."),
            key(
                "nat_traversal",
                "port",
                "`4500`",
                "IKE and ESP in UDP (RFC 3948).",
            ),
        ],
    },
    Section {
        header: "[limits]",
        text: "What protects the responder from strangers (RFC 7296 section 2.6).",
        keys: &[
            key(
                "cookie_threshold",
                "number",
                "`32`",
                "Half-open IKE SAs from which on a cookie is demanded.",
            ),
            key(
                "half_open",
                "number from 1",
                "`4096`",
                "Half-open IKE SAs in all.",
            ),
            key(
                "half_open_per_source",
                "number from 1",
                "`16`",
                "Half-open IKE SAs from one address.",
            ),
        ],
    },
    Section {
        header: "[[tunnel]]",
        text: "One tunnel: an IKE peer and its children. Repeat for each.",
        keys: &[
            key("name", "text", "", "Names the tunnel in commands and logs."),
            key(
                "peer",
                "address, DNS name, list of these, or `\"any\"`",
                "",
                "Where the peer is: the primary first, then those to fall back to; `\"any\"` for one that calls from anywhere and is known by its identity. See below.",
            ),
            key(
                "local",
                "address",
                "the kernel's choice",
                "Our outer address.",
            ),
            key(
                "local_id",
                "address, name, mailbox, `keyid:TEXT`",
                "our outer address",
                "Our identity. `fqdn:` and `rfc822:` in front decide where the kind is unclear.",
            ),
            key(
                "remote_id",
                "as `local_id`",
                "one of the peer's addresses; any for `peer = \"any\"`",
                "The identity the peer must prove.",
            ),
            key(
                "psk_file",
                "path",
                "",
                "File with the pre-shared key: a line of text, or `0x` and hex digits. Only its owner may read it. A relative path starts at the configuration's folder.",
            ),
            key(
                "role",
                "`\"initiate\"`, `\"on-demand\"`, `\"respond\"`",
                "`\"initiate\"`; `\"respond\"` for `peer = \"any\"`",
                "Who starts the tunnel: we, at once and for ever; we, at the first packet; the peer.",
            ),
            key(
                "ike",
                "list of proposals",
                "AES-GCM and ChaCha20-Poly1305, then AES-CBC; x25519, NIST curves, MODP",
                "IKE proposals in order of preference.",
            ),
            key(
                "nat",
                "`\"auto\"`, `\"force\"`, `\"forbid\"`",
                "`\"auto\"`",
                "ESP in UDP: if a NAT is found, always, or never.",
            ),
            key(
                "fragment_size",
                "`0`, or bytes from 576",
                "`1200`",
                "Longest IP datagram of IKE before a message is split (RFC 7383), if the peer can, too; `0` splits none.",
            ),
            key(
                "keepalive",
                "duration from 1s",
                "`\"20s\"`",
                "Interval of NAT keep-alives.",
            ),
            key(
                "mobike",
                "`true`, `false`",
                "`true`",
                "Whether addresses may change while the IKE SA is up, where the peer can, too (MOBIKE, RFC 4555): see [Addresses that change](#addresses-that-change).",
            ),
            key(
                "return_routability",
                "`true`, `false`",
                "`true`",
                "Whether a peer that moves must show that it receives at its new address before ESP goes there. Without it the move takes a round trip less, and a peer can direct what we send it to others. libreswan, as the side that moves, sends no such proof: its tunnels need `false`.",
            ),
            key(
                "childless",
                "`true`, `false`",
                "`false`",
                "As initiator, bring the IKE SA up without a child where the peer can (RFC 6023), and ask for every child by itself: the first one, too, has a key exchange of its own then. As responder such a peer is always served.",
            ),
            key(
                "dpd",
                "table: `mode`, `interval`, `retries` or `timeout`",
                "`{ mode = \"on-demand\", interval = \"20s\", retries = 3 }`",
                "Whether a peer that is not heard from for `interval` is asked if it lives: `\"on-demand\"`, while we send to it; `\"periodic\"`, always; `\"off\"`. It is dead after `retries` intervals without an answer, or after `timeout` (at least 5s).",
            ),
            key(
                "unique",
                "`\"replace\"`, `\"keep\"`, `\"never\"`",
                "`\"replace\"`",
                "What becomes of a peer's IKE SA when the same identity starts another: it goes; it stays, and one from another address is refused unless it says INITIAL_CONTACT; both stay, whatever INITIAL_CONTACT says.",
            ),
            key(
                "lifetime",
                "duration from 60s",
                "`\"24h\"`",
                "Lifetime of the IKE SA.",
            ),
            key(
                "reauth",
                "`true`, `false`",
                "`false`",
                "Before its lifetime ends the IKE SA is rekeyed in place; with `true` a fresh one comes up beside it, whose peer proves its identity anew, whatever was rekeyed since. A peer that we cannot call is asked to begin it (RFC 4478), and loses the tunnel if it does not.",
            ),
            key(
                "device",
                "interface name",
                "the tunnel's name",
                "Name of the tunnel's device.",
            ),
            key(
                "mtu",
                "bytes from 576; 1280 with IPv6",
                "from the SAs and the path",
                "Fixed MTU of the device.",
            ),
            key(
                "engine",
                "`\"xdp\"`, `\"kernel\"`, `\"auto\"`",
                "as for the whole gateway",
                "What carries this tunnel.",
            ),
            key(
                "mode",
                "`\"tunnel\"`, `\"transport\"`",
                "`\"tunnel\"`",
                "Whether packets travel inside others between the gateways, or as they are between this host and the peer, whose addresses the selectors then are. `\"transport\"` needs `engine = \"kernel\"`, has no device and crosses no NAT.",
            ),
            key(
                "policy_based",
                "`true`, `false`",
                "`false`",
                "Whether IPsec policies of the whole host alone carry the tunnel: from and to its selectors, without a device and without routes of ours. Needs `engine = \"kernel\"`. See [Policies alone](#policies-alone).",
            ),
            key(
                "fast_path",
                "`\"auto\"`, `\"on\"`, `\"off\"`",
                "`\"auto\"`",
                "Whether XDP and AF_XDP carry the tunnel, past netfilter and tc: unless there are rules they would bypass, always, never.",
            ),
            key(
                "offload",
                "`\"off\"`, `\"auto\"`, `\"crypto\"`, `\"packet\"`",
                "`\"off\"`",
                "What the network card that carries the peer does of the kernel engine's ESP: nothing; its cryptography if it can; its cryptography; all of it. What the card declines the kernel does, and `status` tells why.",
            ),
            key(
                "df",
                "`\"copy\"`, `\"set\"`, `\"clear\"`",
                "`\"copy\"`",
                "Don't-fragment bit of the outer IPv4 header.",
            ),
            key(
                "clamp_mss",
                "`true`, `false`",
                "`true`",
                "Lowers the MSS in TCP SYNs to what the tunnel carries.",
            ),
            key(
                "copy_dscp",
                "`true`, `false`",
                "`true`",
                "Copies the DSCP to the outer header.",
            ),
            key(
                "routes",
                "`\"selectors\"`, `\"routed\"`, `\"manual\"`",
                "`\"selectors\"`",
                "Who installs routes: we, from the remote selectors; likewise, with plaintext refused by route instead of by selector; somebody else, and no plaintext is refused.",
            ),
            key(
                "address",
                "list of address/length",
                "none",
                "Addresses of the device, for routing protocols.",
            ),
            key(
                "bypass",
                "list of prefixes",
                "none",
                "Prefixes that may go and come in the clear though a remote selector covers them.",
            ),
        ],
    },
    Section {
        header: "[[tunnel.child]]",
        text: "One child of the tunnel above it: what it carries. At least one.",
        keys: &[
            key("name", "text", "", "Names the child within its tunnel."),
            key(
                "local",
                "list of selectors",
                "",
                "Our side: `\"10.1.0.0/24\"`, `\"10.1.0.5-10.1.0.9\"`, with a protocol and ports behind if wanted: `\"10.1.0.0/24 tcp 443\"`.",
            ),
            key("remote", "list of selectors", "", "The peer's side."),
            key(
                "esp",
                "list of proposals",
                "AES-GCM and ChaCha20-Poly1305, then AES-CBC",
                "ESP proposals in order of preference; a group in one asks for PFS.",
            ),
            key(
                "on_dead",
                "`\"restart\"`, `\"trap\"`, `\"clear\"`",
                "by role: `\"restart\"`, on demand `\"trap\"`, responding `\"clear\"`",
                "What becomes of the child when the peer is dead: it is started again at once; by the next packet; by the peer. What it protects stays blocked meanwhile.",
            ),
            key(
                "lifetime",
                "duration from 60s",
                "`\"8h\"`",
                "Lifetime of an SA.",
            ),
            key(
                "lifetime_bytes",
                "volume from 1MiB",
                "none",
                "Volume an SA may carry: `\"100GiB\"`.",
            ),
            key(
                "lifetime_packets",
                "number from 1",
                "what the sequence number allows",
                "Packets an SA may carry.",
            ),
            key(
                "replay_window",
                "`0`, or 32 to 4096",
                "`4096`",
                "Anti-replay window in packets; `0` accepts replays.",
            ),
        ],
    },
];

/// Renders the reference page, `docs/configuration.md`.
pub fn markdown() -> String {
    let mut page = String::from(INTRODUCTION);
    for Section { header, text, keys } in SECTIONS {
        let title = if header.starts_with('[') {
            format!("`{header}`")
        } else {
            format!("The {header}")
        };
        // Writing into a String cannot fail.
        let _ = write!(
            page,
            "\n## {title}\n\n{text}\n\n| Key | Values | Default | Meaning |\n|---|---|---|---|\n"
        );
        for Key {
            name,
            values,
            default,
            text,
        } in *keys
        {
            let default = if default.is_empty() {
                "must be given"
            } else {
                default
            };
            let _ = writeln!(page, "| `{name}` | {values} | {default} | {text} |");
        }
    }
    page.push_str(PEERS);
    page.push_str(POLICIES);
    page.push_str(MOVES);
    page.push_str(PROPOSALS);
    page
}

const INTRODUCTION: &str = "\
# Configuration

One TOML file. `ipsec-ctl check FILE` validates it, shows every problem with its line and the remedy, and changes
nothing. This page is made from the text in the code (`ipsec-ctl/src/config/reference.rs`).

```toml
[[tunnel]]
name = \"office\"
peer = \"203.0.113.9\"
psk_file = \"office.psk\"

[[tunnel.child]]
name = \"net\"
local = [\"10.1.0.0/24\"]
remote = [\"10.2.0.0/24\"]
```

The file holds no secrets. Durations are a number with `s`, `m`, `h` or `d`. Unknown keys are errors. Two tunnels need
different names and devices, and must differ in peer, identities or local address.
";

const PEERS: &str = "
## Peers

`peer = [\"203.0.113.9\", \"gw.example.com\", \"2001:db8::9\"]` is tried in this order. After an attempt that failed, for
whichever reason, the next address follows at once; after the last one there is a pause that grows to a minute. Every
new start, after a failure of the whole list or the end of an IKE SA, begins with the primary; an IKE SA that is up stays
where it is. `status` shows the address in use and why the others failed.

A name may have up to 8 addresses, in the order of the system's resolver. Names are looked up before the first attempt,
again after each round of attempts that failed and when an IKE SA ends, and every five minutes; what is not known within
5 seconds is taken from the last answer. With a remote selector of 0.0.0.0/0 the name server must be reached by a
more specific route, or through `bypass`.

A peer that starts may come from any of its addresses; one none of whose names is resolved, from anywhere. Its identity
decides; without `remote_id` that is one of its addresses.

| On a FortiGate | Here |
|---|---|
| `set dpd disable`, `on-demand`, `on-idle` | `dpd.mode` `\"off\"`, `\"on-demand\"`, `\"periodic\"` |
| `set dpd-retryinterval 20`, `set dpd-retrycount 3` | `dpd.interval`, `dpd.retries` |
| `set auto-negotiate enable` | `role = \"initiate\"`, `on_dead = \"restart\"` |
| `set auto-negotiate disable` | `role = \"on-demand\"`, `on_dead = \"trap\"` |
| `set passive-mode enable` | `role = \"respond\"`, `on_dead = \"clear\"` |
| `set remotegw-ddns` | a name in `peer` |
| `set enforce-unique-id replace`, `keep-old`, `disable` | `unique` `\"replace\"`, `\"keep\"`, `\"never\"` |
";

const POLICIES: &str = "
## Policies alone

With `policy_based = true` the packets that go into a tunnel are those that its selectors name, whatever the routes say; a packet
for which there is no route goes nowhere, as ever. So the host's own routes must lead there, for which its default route is enough. What no SA
protects is blocked, both ways. Of all tunnels without a device, and of their children, the one with the most specific selectors has a
packet: remote addresses first, then protocol and ports, then local addresses; what it has no SA for is blocked, and no less specific tunnel gets it.

What is within the tunnel's own `local` or its `bypass` stays in the clear, and so does what never leaves its link (multicast and broadcast
of the link, IPv6's neighbour discovery), even if a remote selector covers it: `local = [\"10.1.0.0/24\"]` with `remote = [\"0.0.0.0/0\"]` leaves the LAN as it is. Refused are

- a child whose local and remote selectors are the same, such as 0.0.0.0/0 on both sides: nothing would tell the sides apart;
- two tunnels without a device that have the same selectors for their packets;
- a remote selector that overlaps with one of a tunnel with a device: policies would take its packets before any route;
- `device`, `mtu`, `address` and `routes`, which have no meaning without a device.
";

const MOVES: &str = "
## Addresses that change

With `mobike = true` on both sides, the side that started the tunnel goes to another address when the kernel would send its
packets to the peer from one: an address has come or gone, or another route leads to the peer. IKE and ESP SAs stay, and
so do the packets but for those of the moment. It enters and leaves NAT with a move, and tries the peer's other addresses, of which the
peer has told, when this one is silent. The side that was called moves only if its address is gone. With `local` an address
is fixed and nothing moves away from it.

The peer is told of this host's other addresses, without loopback, link-local ones, those inside of the tunnel's local
selectors, and those of tunnel devices; of none with `local`.

A peer without MOBIKE gets a fresh IKE SA from the new address as soon as the old one is gone. Whoever starts goes to UDP 4500 after
IKE_SA_INIT even where there is no NAT (RFC 4555 section 3.3); a firewall must let it through.
";

const PROPOSALS: &str = "
## Proposals

Algorithms joined by hyphens. Several of a kind are alternatives, the preferred one first.

| Kind | Names |
|---|---|
| cipher | `aes128gcm16` `aes256gcm16` `chacha20poly1305` `aes128` `aes192` `aes256` |
| integrity, with `aes128` to `aes256` only | `sha256` `sha384` `sha512` |
| PRF, IKE only; that of the integrity algorithm if not given | `prfsha256` `prfsha384` `prfsha512` |
| group; in ESP proposals for PFS | `x25519` `ecp256` `ecp384` `ecp521` `modp2048` `modp3072` `modp4096` `modp6144` `modp8192` |
| sequence numbers, ESP only; `noesn` if not given | `esn` `noesn` |

`aes256-sha512-ecp521` and `aes256gcm16-prfsha384-x25519` are IKE proposals, `aes256-sha512` and
`aes256gcm16-x25519-esn` ESP proposals. DES, 3DES, MD5, SHA-1 and groups below 2048 bits are refused (RFC 8247, RFC 8221).
";
