//! Running programs: output captured, time bounded, failures told with what the program said.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};

/// Longest that a program may take.
const PATIENCE: Duration = Duration::from_secs(40);
/// Names how many times slower than others this machine is, which is set where instructions are interpreted.
const SLOWER: &str = "IPSEC_TESTS_SLOWER";

/// How many times longer than elsewhere things may take here.
pub fn slower() -> u32 {
    let told = std::env::var(SLOWER).ok();
    told.and_then(|times| times.parse().ok()).unwrap_or(1)
}

/// Runs a program and returns what it printed.
///
/// # Errors
///
/// It cannot be started, or fails; the error holds what it wrote to stderr.
pub fn run<S: AsRef<OsStr>>(program: &str, arguments: &[S]) -> anyhow::Result<String> {
    let mut command = Command::new(program);
    command.args(arguments);
    checked(&mut command)
}

/// Runs a prepared command and returns what it printed.
///
/// # Errors
///
/// As for [`run`].
pub fn checked(command: &mut Command) -> anyhow::Result<String> {
    let shown = format!("{command:?}");
    let output = output(command)?;
    ensure!(
        output.status.success(),
        "{shown}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a prepared command whatever its exit status.
///
/// # Errors
///
/// It cannot be started, or does not end in time.
pub fn output(command: &mut Command) -> anyhow::Result<Output> {
    let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .spawn()
        .with_context(|| format!("{command:?} cannot be started"))?;
    let patience = PATIENCE * slower();
    let end = Instant::now() + patience;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > end {
            child.kill()?;
            child.wait()?;
            bail!("{command:?} did not end within {patience:?}");
        }
        thread::sleep(Duration::from_millis(2));
    };
    Ok(Output {
        status,
        stdout: contents(&mut stdout)?,
        stderr: contents(&mut stderr)?,
    })
}

fn contents(file: &mut File) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Runs a line such as `ip link set lo up`, split at blanks.
///
/// # Errors
///
/// As for [`run`].
pub fn line(text: &str) -> anyhow::Result<String> {
    let mut words = text.split_whitespace();
    let program = words.next().context("an empty command")?;
    run(program, &words.collect::<Vec<_>>())
}

/// Where a program is, among the folders of `PATH` and those for administrators.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

/// Asks again and again until there is an answer.
///
/// # Errors
///
/// There was none within `patience`; the error says what was waited for and what the last attempt said.
pub fn wait_for<T>(
    what: &str,
    patience: Duration,
    mut attempt: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let patience = patience * slower();
    let end = Instant::now() + patience;
    loop {
        let last = match attempt() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => "not yet".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        if Instant::now() >= end {
            bail!("waited {patience:?} for {what}: {last}");
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// The end of a log file, for the message of a failed test.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
