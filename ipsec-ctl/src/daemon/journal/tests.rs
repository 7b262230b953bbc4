//! The journal in files: what is read back, what is cut off, what is not used.

use std::os::unix::fs::PermissionsExt;

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

#[test]
fn a_long_file_is_written_anew_with_all_that_there_is() {
    let Some((_folder, mut journal)) = journal() else {
        return;
    };
    let long = "x".repeat(100_000);
    journal.save(&step(&[(1, Some("one"))]));
    while !journal.wants_everything() {
        journal.save(&step(&[(2, Some(&long))]));
    }
    journal.save(&step(&[(1, Some("one")), (2, Some("two"))]));
    assert!(fs::metadata(&journal.path).unwrap().len() < 1000);
    journal.save(&step(&[(2, Some("after"))]));
    assert_eq!(read(&journal).unwrap(), ["one", "after"]);
    journal.discard();
    assert!(!journal.path.exists());
}

#[test]
fn a_journal_that_cannot_be_written_is_gone_and_does_not_tell_of_the_past() {
    let Some((folder, mut journal)) = journal() else {
        return;
    };
    journal.save(&step(&[(1, Some("one"))]));
    // A full file system is beyond a test; a file that takes no bytes does as well.
    let readable = File::open(&journal.path).unwrap();
    if let State::Kept { file, .. } = &mut journal.state {
        *file = readable;
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
