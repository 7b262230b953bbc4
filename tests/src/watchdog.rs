//! An end for tests that hang: what their processes wait for is told, and the test fails.
//!
//! Tests bound what they wait for, but nothing bounds a system call that never returns.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use anyhow::{Context, anyhow};

/// Does some work in a thread of its own, which is left to itself if it takes longer than `limit`.
///
/// # Errors
///
/// Those of the work; it took longer: what each thread of this program and its children waits for.
pub(crate) fn watched<T: Send + 'static>(
    name: &str,
    limit: Duration,
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let (done, waiting) = mpsc::channel();
    let worker = thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            // Nobody waits any more for what took too long.
            let _ = done.send(work());
        })
        .context("a thread for the test")?;
    match waiting.recv_timeout(limit) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => Err(anyhow!(
            "it has run for {} s:\n{}",
            limit.as_secs(),
            report()
        )),
        Err(RecvTimeoutError::Disconnected) => match worker.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => Err(anyhow!("it has ended without a result")),
        },
    }
}

/// What each thread of this program and its descendants is doing, as the kernel tells it; those of a process that do the same are
/// told together.
fn report() -> String {
    let mut lines = Vec::new();
    for process in descendants(std::process::id()) {
        let folder = PathBuf::from(format!("/proc/{process}"));
        let command = fs::read(folder.join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        lines.push(format!("process {process}: {command}"));
        for (threads, doing) in doings(&folder.join("task")) {
            lines.push(format!("  {}: {doing}", threads.join(", ")));
        }
    }
    lines.join("\n")
}

/// Names of the threads in a folder of the kernel, by what they do.
fn doings(tasks: &Path) -> Vec<(Vec<String>, String)> {
    let mut doings: Vec<(Vec<String>, String)> = Vec::new();
    for task in fs::read_dir(tasks).into_iter().flatten().flatten() {
        let told = |what: &str| told(&task.path(), what);
        let mut doing = format!(
            "waits in {}, system call {}",
            told("wchan"),
            told("syscall")
        );
        for frame in told("stack").lines() {
            doing.push_str("\n    ");
            doing.push_str(frame);
        }
        match doings.iter_mut().find(|(_, known)| *known == doing) {
            Some((threads, _)) => threads.push(told("comm")),
            None => doings.push((vec![told("comm")], doing)),
        }
    }
    doings
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
        let seven = watched("work", Duration::from_secs(60), || Ok(7));
        assert_eq!(seven.unwrap(), 7);
    }

    #[test]
    fn what_hangs_is_left_to_itself_and_fails_with_what_it_waits_for() {
        let (_never, waiting) = mpsc::channel::<()>();
        let result = watched("hanging-work", Duration::from_millis(50), move || {
            Ok(waiting.recv()?)
        });
        let told = result.unwrap_err().to_string();
        assert!(told.contains("hanging-work"), "{told}");
    }

    #[test]
    #[should_panic(expected = "seven")]
    fn what_panics_panics_here() {
        let work = || -> anyhow::Result<()> { panic!("seven") };
        let _ = watched("work", Duration::from_secs(60), work);
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
