//! An end for tests that hang: what their processes wait for is told, and their program fails.
//!
//! Tests bound what they wait for, but nothing bounds a system call that never returns.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

/// Does some work, and ends this program if that takes longer than `limit`.
pub(crate) fn watched<T>(name: &str, limit: Duration, work: impl FnOnce() -> T) -> T {
    let (done, waiting) = mpsc::channel::<()>();
    let name = name.to_owned();
    thread::spawn(move || {
        if waiting.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            eprintln!("{name} has run for {} s:\n{}", limit.as_secs(), report());
            std::process::exit(101);
        }
    });
    let result = work();
    drop(done);
    result
}

/// What each thread of this program and its descendants is doing, as the kernel tells it.
fn report() -> String {
    let mut lines = Vec::new();
    for process in descendants(std::process::id()) {
        let folder = PathBuf::from(format!("/proc/{process}"));
        let command = fs::read(folder.join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        lines.push(format!("process {process}: {command}"));
        for task in fs::read_dir(folder.join("task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let told = |what: &str| told(&task.path(), what);
            let (name, wait, call) = (told("comm"), told("wchan"), told("syscall"));
            lines.push(format!("  {name}: waits in {wait}, system call {call}"));
            lines.extend(told("stack").lines().map(|frame| format!("    {frame}")));
        }
    }
    lines.join("\n")
}

fn told(task: &Path, what: &str) -> String {
    let text = fs::read_to_string(task.join(what)).unwrap_or_default();
    text.trim_end().to_owned()
}

/// A process and all that it started, directly or not.
fn descendants(root: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|process| Some((process, parent(process)?)))
        .collect();
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        let children = parents.iter().filter(|(_, of)| *of == parent);
        found.extend(children.map(|(process, _)| *process));
        next += 1;
    }
    found
}

fn parent(process: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name before it, in brackets, may hold anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn what_ends_in_time_is_let_be() {
        assert_eq!(watched("work", Duration::from_secs(60), || 7), 7);
    }

    #[test]
    fn what_a_hanging_child_waits_for_is_told() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let report = report();
        child.kill().unwrap();
        child.wait().unwrap();
        let cat = report.split_once(&format!("process {}: ", child.id()));
        assert!(
            cat.is_some_and(|(_, rest)| rest.contains("waits in")),
            "{report}"
        );
    }
}
