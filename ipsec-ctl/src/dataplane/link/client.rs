//! The daemon's end: finds the data plane of an instance, calls it, and ends it.

use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{
        Arc, Mutex as Lock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Mutex, mpsc, oneshot},
    time::{sleep, timeout},
};
use tracing::warn;

use super::{Answer, Call, Hello, Told, Welcome, frame, is_one_of_us, is_same_protocol};
use crate::dataplane::seam::{EngineConfig, Event, Reply, Request};

/// Events that wait for the daemon's loop.
const EVENT_QUEUE: usize = 1024;
/// Time after which a data plane that does not answer is taken for dead.
const PATIENCE: Duration = Duration::from_secs(20);
/// Time that a data plane has to end by itself.
const FAREWELL: Duration = Duration::from_secs(3);

/// Why there is no connection to a data plane.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// None runs.
    #[error("no data plane runs")]
    Nobody,
    /// One runs that is of another version, or has other settings: it has to be ended first.
    #[error("the data plane that runs as process {0} is of another version or has other settings")]
    Different(u32),
    /// Somebody else listens on its socket.
    #[error("a process of another user listens on the data plane's socket")]
    Stranger,
    /// The connection broke.
    #[error("the data plane cannot be spoken to: {0}")]
    Broken(#[from] io::Error),
    /// Its engines do not start.
    #[error("{step}: {reason}")]
    Failed {
        /// What was being done.
        step: String,
        /// What the kernel said.
        reason: String,
    },
}

type Waiting = Arc<Lock<HashMap<u64, oneshot::Sender<Reply>>>>;

/// A data plane in another process.
pub struct Remote {
    calls: Mutex<OwnedWriteHalf>,
    waiting: Waiting,
    next: AtomicU64,
    process: u32,
}

impl Remote {
    /// Attaches to the data plane that listens on `path`. Events come out of the receiver, which ends when the data plane does.
    ///
    /// # Errors
    ///
    /// [`ConnectError`].
    pub async fn attach(
        path: &Path,
        config: &EngineConfig,
    ) -> Result<(Self, mpsc::Receiver<Event>), ConnectError> {
        let (mut calls, process) = connect(path).await?;
        frame::write(&mut calls, &Hello::Calls(config.clone())).await?;
        match frame::read(&mut calls).await? {
            Some(Welcome::Attached) => {}
            Some(Welcome::OtherSettings) => return Err(ConnectError::Different(process)),
            Some(Welcome::Failed { step, reason }) => {
                return Err(ConnectError::Failed { step, reason });
            }
            None => return Err(ConnectError::Nobody),
        }
        let (mut events, _) = connect(path).await?;
        frame::write(&mut events, &Hello::Events).await?;
        let (sender, receiver) = mpsc::channel(EVENT_QUEUE);
        let (events, keep) = events.into_split();
        tokio::spawn(hear(events, keep, sender));
        let (answers, calls) = calls.into_split();
        let waiting = Waiting::default();
        tokio::spawn(collect(answers, Arc::clone(&waiting)));
        let remote = Self {
            calls: Mutex::new(calls),
            waiting,
            next: AtomicU64::new(0),
            process,
        };
        Ok((remote, receiver))
    }

    /// Its process id.
    pub fn process(&self) -> u32 {
        self.process
    }

    /// Makes a call; none if the data plane is gone. The future must not be dropped before it is done.
    pub async fn ask(&self, request: Request) -> Option<Reply> {
        let (reply, replied) = oneshot::channel();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.waiting).insert(number, reply);
        self.send(number, request).await.ok()?;
        match timeout(PATIENCE, replied).await {
            Ok(reply) => reply.ok(),
            Err(_) => {
                warn!("the data plane does not answer");
                None
            }
        }
    }

    /// Makes a call whose reply nobody waits for.
    pub async fn post(&self, request: Request) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        // Whether the data plane is gone is told by the end of its events.
        let _ = self.send(number, request).await;
    }

    async fn send(&self, number: u64, request: Request) -> io::Result<()> {
        let mut calls = self.calls.lock().await;
        frame::write(&mut *calls, &Call { number, request }).await
    }
}

/// Ends the data plane that listens on `path`, if one does, and waits until it has ended.
///
/// # Errors
///
/// It is another user's, or does not end.
pub async fn end(path: &Path) -> io::Result<bool> {
    let process = match connect(path).await {
        Ok((_, process)) | Err(ConnectError::Different(process)) => process,
        Err(ConnectError::Nobody) => return Ok(false),
        Err(error) => return Err(io::Error::other(error)),
    };
    let pid = Pid::from_raw(i32::try_from(process).map_err(io::Error::other)?);
    for (with, patience) in [(Signal::SIGTERM, FAREWELL), (Signal::SIGKILL, FAREWELL)] {
        match kill(pid, with) {
            Err(Errno::ESRCH) => return Ok(true),
            result => result?,
        }
        let begun = Instant::now();
        while begun.elapsed() < patience {
            if has_ended(process) {
                return Ok(true);
            }
            sleep(Duration::from_millis(5)).await;
        }
    }
    Err(io::Error::from(io::ErrorKind::TimedOut))
}

/// Whether a process has ended with all its threads, so that what it had open is free.
fn has_ended(process: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).map_or(0, Iterator::count);
    let is_zombie = std::fs::read_to_string(format!("/proc/{process}/stat"))
        .ok()
        .and_then(|stat| {
            Some(
                stat.rsplit_once(')')?
                    .1
                    .trim_start()
                    .starts_with(['Z', 'X']),
            )
        })
        .unwrap_or(true);
    tasks == 0 || (tasks == 1 && is_zombie)
}

async fn connect(path: &Path) -> Result<(UnixStream, u32), ConnectError> {
    let mut stream = UnixStream::connect(path)
        .await
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ConnectError::Nobody,
            _ => ConnectError::Broken(error),
        })?;
    if !is_one_of_us(&stream) {
        return Err(ConnectError::Stranger);
    }
    let process = stream
        .peer_cred()?
        .pid()
        .and_then(|pid| u32::try_from(pid).ok())
        .ok_or(ConnectError::Stranger)?;
    match timeout(PATIENCE, is_same_protocol(&mut stream)).await {
        Ok(Ok(true)) => Ok((stream, process)),
        Ok(Ok(false) | Err(_)) | Err(_) => Err(ConnectError::Different(process)),
    }
}

/// Hands replies to those who wait for them, until the data plane goes.
async fn collect(mut answers: OwnedReadHalf, waiting: Waiting) {
    while let Ok(Some(Answer { number, reply })) = frame::read(&mut answers).await {
        if let Some(asked) = lock(&waiting).remove(&number) {
            // Whoever asked has given up.
            let _ = asked.send(reply);
        }
    }
    lock(&waiting).clear();
}

/// Hands events to the daemon, as fast as it takes them, until the data plane goes. `_keep` holds the connection open.
async fn hear(mut input: OwnedReadHalf, _keep: OwnedWriteHalf, events: mpsc::Sender<Event>) {
    while let Ok(Some(event)) = frame::read::<Told>(&mut input).await {
        if events.send(event).await.is_err() {
            return;
        }
    }
}

fn lock(waiting: &Waiting) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Reply>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}
