//! The journal in files: what is read back, what is cut off, what is not used.

use std::os::unix::fs::PermissionsExt;

use nix::time::{ClockId, clock_gettime};

use super::*;

fn owner() -> Owner {
    Owner::here((500, 4500)).unwrap()
}

/// A journal in memory, or none where this machine has no tmpfs for it.
fn journal() -> Option<(tempfile::TempDir, Journal)> {
    let folder = tempfile::tempdir_in("/dev/shm").ok()?;
    let journal = Journal::at(folder.path().join("x.journal"), owner());
    journal.is_kept().then_some((folder, journal))
}

fn step(parts: &[(u64, Option<&str>)]) -> Changes {
    let key = |number| Key::Pair(ChildSaId(number));
    let part = |text: &str| Wiped::from(text.as_bytes().to_vec());
    parts
        .iter()
        .map(|(number, text)| (key(*number), text.map(part)))
        .collect()
}

fn texts(contents: &Contents) -> Vec<String> {
    let text = |bytes: &Zeroizing<Vec<u8>>| String::from_utf8(bytes.to_vec()).unwrap();
    contents.values().map(text).collect()
}

fn read(journal: &Journal) -> Result<Vec<String>, Unusable> {
    let contents = Journal::at(journal.path.clone(), journal.owner.clone()).read()?;
    Ok(contents
        .map(|contents| texts(&contents))
        .unwrap_or_default())
}

#[test]
fn steps_add_up_and_only_root_can_read_them() {
    let Some((_folder, mut journal)) = journal() else {
        return;
    };
    assert!(matches!(journal.read(), Ok(None)));
    journal.save(&step(&[(1, Some("one")), (2, Some("two"))]));
    journal.save(&step(&[(1, Some("uno")), (3, Some("three"))]));
    journal.save(&step(&[(2, None)]));
    assert_eq!(read(&journal).unwrap(), ["uno", "three"]);
    let mode = fs::metadata(&journal.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    fs::set_permissions(&journal.path, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(matches!(read(&journal), Err(Unusable::Exposed)));
}

#[test]
fn wherever_a_death_cuts_the_file_off_whole_steps_are_left() {
    let Some((_folder, mut journal)) = journal() else {
        return;
    };
    journal.save(&step(&[(1, Some("one"))]));
    let first = fs::metadata(&journal.path).unwrap().len();
    journal.save(&step(&[(1, Some("two")), (2, Some("two, too"))]));
    let whole = fs::read(&journal.path).unwrap();
    for length in usize::try_from(first).unwrap()..whole.len() {
        let contents = replay(&whole[..length], &journal.owner).unwrap();
        assert_eq!(texts(&contents), ["one"], "{length} bytes");
    }
    let contents = replay(&whole, &journal.owner).unwrap();
    assert_eq!(texts(&contents), ["two", "two, too"]);
}

#[test]
fn no_bit_of_a_whole_step_changes_unnoticed() {
    let Some((_folder, mut journal)) = journal() else {
        return;
    };
    journal.save(&step(&[(1, Some("one"))]));
    journal.save(&step(&[(1, Some("two"))]));
    journal.save(&step(&[(1, Some("three"))]));
    let whole = fs::read(&journal.path).unwrap();
    for place in 0..whole.len() {
        let mut changed = whole.clone();
        changed[place] ^= 0x10;
        let read = replay(&changed, &journal.owner);
        assert!(
            read.is_err(),
            "byte {place}: {:?}",
            read.map(|contents| texts(&contents))
        );
    }
}

#[test]
fn what_another_boot_or_version_has_left_is_not_used() {
    let Some((_folder, mut journal)) = journal() else {
        return;
    };
    journal.save(&step(&[(1, Some("one"))]));
    let others = [
        Owner {
            boot: "another".to_owned(),
            ..owner()
        },
        Owner {
            format: FORMAT + 1,
            ..owner()
        },
        Owner {
            ports: (500, 4501),
            ..owner()
        },
    ];
    for other in others {
        let found = Journal::at(journal.path.clone(), other).read();
        assert!(matches!(found, Err(Unusable::Foreign)), "{found:?}");
    }
    fs::write(&journal.path, b"something else").unwrap();
    assert!(matches!(read(&journal), Err(Unusable::Foreign)));
}

/// The state of a daemon, and how it is saved.
#[derive(Default)]
struct Daemon {
    parts: BTreeMap<u64, String>,
}

impl Daemon {
    /// One step: parts that get another content, or none.
    fn changes(&mut self, journal: &mut Journal, parts: &[(u64, Option<&str>)]) {
        for (number, text) in parts {
            match text {
                Some(text) => self.parts.insert(*number, (*text).to_owned()),
                None => self.parts.remove(number),
            };
        }
        journal.save(&step(parts));
        journal.renew(|after| {
            let from = match after {
                Some(Key::Pair(ChildSaId(last))) => last + 1,
                _ => 0,
            };
            let after = self.parts.range(from..);
            after.map(|(number, text)| {
                let part = Wiped::from(text.as_bytes().to_vec());
                (Key::Pair(ChildSaId(*number)), Ok(part))
            })
        });
    }

    fn texts(&self) -> Vec<String> {
        self.parts.values().cloned().collect()
    }
}

fn lengths(journal: &Journal) -> [u64; 2] {
    let length = |path: &Path| fs::metadata(path).map_or(0, |file| file.len());
    [length(&journal.path), length(&beside(&journal.path))]
}

#[test]
fn a_long_file_is_written_anew_in_pieces_and_after_each_step_there_is_all_that_there_should_be() {
    let Some((_folder, mut journal)) = journal() else {
        return;
    };
    journal.limits = Limits {
        growth: 10_000,
        piece: 500,
    };
    let mut daemon = Daemon::default();
    let (mut renewals, mut under_way, mut number) = (0, 0, 7_u64);
    for turn in 0..2000 {
        // Parts come, change and go in no order, before and behind what is copied.
        number = number.wrapping_mul(6_364_136_223_846_793_005) + 1;
        let (one, other) = (number >> 33 & 0xff, number >> 44 & 0xff);
        let text = format!("{turn}").repeat(1 + usize::try_from(one % 40).unwrap());
        let before = lengths(&journal);
        let parts = [(one, Some(text.as_str())), (other, None)];
        daemon.changes(
            &mut journal,
            if one == other { &parts[..1] } else { &parts },
        );
        let after = lengths(&journal);
        // What the step has changed, one piece, a part that goes beyond, and what holds them together.
        let most = 2 * text.len() as u64 + 500 + 160 + 500;
        if after[0] < before[0] {
            renewals += 1;
            assert_eq!(after[1], 0, "it is in its place");
            assert!(after[0] < before[1] + most, "{before:?} {after:?}");
        } else {
            let written = after[0] - before[0] + after[1] - before[1];
            assert!(written < most, "{written} bytes at once");
        }
        under_way += usize::from(after[1] > 0);
        assert_eq!(read(&journal).unwrap(), daemon.texts(), "turn {turn}");
        let mode = |path: &Path| fs::metadata(path).map_or(0o600, |file| file.mode());
        assert_eq!(mode(&beside(&journal.path)) & 0o777, 0o600);
    }
    assert!(renewals > 5, "{renewals}");
    assert!(under_way > 10 * renewals, "{under_way} for {renewals}");
}

/// How long this thread has had a processor.
fn worked() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .unwrap()
        .into()
}

// What is kept of as many tunnels as that, and how long a step takes at most: the figures are for whoever changes this.
#[test]
fn with_ten_thousand_tunnels_no_step_waits_for_more_than_a_piece() {
    let Some((_folder, mut journal)) = journal() else {
        return;
    };
    let mut daemon = Daemon::default();
    let text = "x".repeat(3000);
    let all: Vec<(u64, Option<&str>)> = (0..10_000).map(|number| (number, Some(&*text))).collect();
    let begun = worked();
    daemon.changes(&mut journal, &all);
    let whole = worked() - begun;
    let (mut longest, mut most, mut number) = (Duration::ZERO, 0, 0);
    let mut renewed = false;
    while !renewed {
        number = (number + 1) % 10_000;
        let before = lengths(&journal);
        let begun = worked();
        daemon.changes(&mut journal, &[(number, Some(&text))]);
        longest = longest.max(worked() - begun);
        let after = lengths(&journal);
        renewed = after[0] < before[0];
        if !renewed {
            most = most.max(after[0] - before[0] + after[1] - before[1]);
        }
    }
    eprintln!("all at once: {whole:?}; the longest step: {longest:?}, {most} bytes");
    assert!(most < 100_000, "{most} bytes");
    assert_eq!(read(&journal).unwrap().len(), 10_000);
}

/// A journal whose renewal has begun and has not come to its end.
fn half_renewed() -> Option<(tempfile::TempDir, Journal, Daemon)> {
    let (folder, mut journal) = journal()?;
    journal.limits = Limits {
        growth: 1000,
        piece: 100,
    };
    let mut daemon = Daemon::default();
    let text = "x".repeat(90);
    for number in 0..20 {
        daemon.changes(&mut journal, &[(number, Some(&text))]);
    }
    while lengths(&journal)[1] == 0 {
        daemon.changes(&mut journal, &[(3, Some("three"))]);
    }
    Some((folder, journal, daemon))
}

#[test]
fn a_journal_that_is_being_written_anew_goes_as_a_whole() {
    let Some((folder, mut journal, _)) = half_renewed() else {
        return;
    };
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    journal.discard();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn what_a_daemon_has_left_half_written_is_not_looked_at_by_the_next_one() {
    let Some((_folder, journal, mut daemon)) = half_renewed() else {
        return;
    };
    let mut next = Journal::at(journal.path.clone(), owner());
    assert_eq!(read(&next).unwrap(), daemon.texts());
    assert!(next.wants_everything());
    let all: Vec<(u64, Option<&str>)> = daemon
        .parts
        .iter()
        .map(|(number, text)| (*number, Some(text.as_str())))
        .collect();
    next.save(&step(&all));
    assert_eq!(lengths(&next)[1], 0);
    daemon.changes(&mut next, &[(3, Some("drei"))]);
    assert_eq!(read(&next).unwrap(), daemon.texts());
}

#[test]
fn a_journal_that_cannot_be_written_anew_grows_and_is_tried_again() {
    let Some((_folder, mut journal, mut daemon)) = half_renewed() else {
        return;
    };
    let readable = File::open(&journal.path).unwrap();
    if let State::Kept {
        renewal: Some(renewal),
        ..
    } = &mut journal.state
    {
        renewal.cannot_write(readable);
    }
    daemon.changes(&mut journal, &[(3, Some("drei"))]);
    assert_eq!(lengths(&journal)[1], 0, "what was begun is removed");
    assert_eq!(read(&journal).unwrap(), daemon.texts());
    let renewed = (0..1000).any(|_| {
        let [before, _] = lengths(&journal);
        daemon.changes(&mut journal, &[(3, Some("three"))]);
        assert_eq!(read(&journal).unwrap(), daemon.texts());
        lengths(&journal)[0] < before
    });
    assert!(renewed);
}

#[test]
fn a_journal_that_cannot_be_written_is_gone_and_does_not_tell_of_the_past() {
    let Some((folder, mut journal)) = journal() else {
        return;
    };
    journal.save(&step(&[(1, Some("one"))]));
    // A full file system is beyond a test; a file that takes no bytes does as well.
    let readable = File::open(&journal.path).unwrap();
    if let State::Kept { records, .. } = &mut journal.state {
        records.file = readable;
    }
    journal.save(&step(&[(1, Some("two"))]));
    assert!(matches!(read(&journal), Ok(texts) if texts.is_empty()));
    assert!(
        !journal.wants_everything(),
        "it waits before it tries again"
    );
    journal.save(&step(&[(1, Some("three"))]));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn no_journal_is_kept_on_a_disk() {
    let mut journal = Journal::at(PathBuf::from("/proc/x.journal"), owner());
    assert!(!journal.is_kept());
    journal.save(&step(&[(1, Some("one"))]));
    assert!(matches!(journal.read(), Ok(None)));
}
