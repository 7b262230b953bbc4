//! The plaintext guard's table, made in network namespaces.

use super::*;

fn pair(source: [u8; 4], destination: [u8; 4]) -> Pair<Ipv4Addr> {
    let range = |[a, b, c, _]: [u8; 4]| Range {
        first: [a, b, c, 0].into(),
        last: [a, b, c, 255].into(),
    };
    Pair {
        source: range(source),
        destination: range(destination),
    }
}

/// Runs in a network namespace of its own, which ends with the thread; not at all without root.
fn apart(work: impl FnOnce() + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        crate::skip::skip("network namespaces need root");
        return;
    }
    let apart = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        work();
    });
    apart.join().unwrap();
}

#[test]
fn the_table_is_made_replaced_and_removed() {
    apart(|| {
        assert_eq!(dropped().unwrap(), None);
        remove().unwrap();
        let guard = Guard {
            tunnels: ["one".to_owned()].into(),
            routed: ["two".to_owned()].into(),
            without_devices: true,
            v4: vec![pair([10, 2, 0, 0], [10, 1, 0, 0])],
            v6: vec![Pair {
                source: Range {
                    first: Ipv6Addr::UNSPECIFIED,
                    last: Ipv6Addr::from_bits(u128::MAX),
                },
                destination: Range {
                    first: Ipv6Addr::LOCALHOST,
                    last: Ipv6Addr::LOCALHOST,
                },
            }],
            ports: [500, 4500],
        };
        install(&guard).unwrap();
        assert_eq!(dropped().unwrap(), Some(0));
        assert!(!super::super::foreign_chains().unwrap(), "it is our own");
        install(&guard).unwrap();
        remove().unwrap();
        assert_eq!(dropped().unwrap(), None);
    });
}

#[test]
fn a_thousand_tunnels_fit_into_one_step() {
    apart(|| {
        let number = |index: u32| {
            let [.., high, low] = index.to_be_bytes();
            (high, low)
        };
        let guard = Guard {
            tunnels: (0..1000).map(|index| format!("t{index}")).collect(),
            v4: (0..4000)
                .map(number)
                .map(|(high, low)| pair([10, high, low, 0], [172, 16, 0, 0]))
                .collect(),
            ..Guard::default()
        };
        let start = std::time::Instant::now();
        install(&guard).unwrap();
        install(&guard).unwrap();
        assert_eq!(dropped().unwrap(), Some(0));
        eprintln!("twice 4,000 prefixes in {:?}", start.elapsed());
    });
}

#[test]
fn what_the_kernel_refuses_is_an_error_and_changes_nothing() {
    apart(|| {
        let guard = Guard {
            v4: vec![pair([10, 2, 0, 0], [10, 1, 0, 0])],
            ..Guard::default()
        };
        install(&guard).unwrap();
        let mut across = guard.v4[0];
        across.source.first = [10, 2, 0, 128].into();
        across.source.last = [10, 3, 0, 0].into();
        let overlapping = Guard {
            v4: vec![guard.v4[0], across],
            ..Guard::default()
        };
        install(&overlapping).unwrap_err();
        assert_eq!(dropped().unwrap(), Some(0));
    });
}
