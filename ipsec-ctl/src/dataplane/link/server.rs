//! The data plane's end: engines that outlive the daemons that speak to them.
//!
//! One daemon is attached at a time; one that comes later takes the place of the one before it. With none attached packets go on under
//! the SAs in force, and the newest events wait.

use std::{collections::VecDeque, io, time::Duration};

use tokio::{
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tracing::{debug, info, warn};

use super::{Answer, Call, Hello, Told, Welcome, frame, is_one_of_us, is_same_protocol};
use crate::dataplane::{
    engines::Engines,
    seam::{EngineConfig, Event},
    xdp::slow::monotonic_seconds,
};

/// Time that a visitor has to say what it wants.
const PATIENCE: Duration = Duration::from_secs(5);
/// Time after which a data plane that no daemon has started gives up.
const UNWANTED: Duration = Duration::from_secs(30);
/// How often the ends of SAs are looked at.
const TICK: Duration = Duration::from_secs(1);
/// Events that wait for the next daemon; older ones are let go.
const KEPT: usize = 1024;

/// Why a data plane does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Signals cannot be caught.
    #[error("signals cannot be caught: {0}")]
    Signals(io::Error),
}

/// A connection that has said what it wants.
struct Visitor {
    stream: UnixStream,
    hello: Hello,
}

/// Engines that run.
struct Running {
    config: EngineConfig,
    engines: Engines,
    /// To whoever tells events.
    listeners: mpsc::Sender<OwnedWriteHalf>,
}

/// The daemon that makes calls.
struct Attached {
    calls: mpsc::Receiver<Call>,
    answers: OwnedWriteHalf,
}

/// Serves daemons until SIGTERM, or until nobody has wanted anything for half a minute.
///
/// # Errors
///
/// [`ServeError`].
pub async fn serve(listener: UnixListener) -> Result<(), ServeError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Signals)?;
    let (visits, mut visitors) = mpsc::channel(4);
    tokio::spawn(receive(listener, visits));
    let mut running: Option<Running> = None;
    let mut attached: Option<Attached> = None;
    let unwanted = sleep(UNWANTED);
    tokio::pin!(unwanted);
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            Some(Visitor { stream, hello }) = visitors.recv() => match hello {
                Hello::Calls(config) => {
                    if let Some(daemon) = attach(&mut running, config, stream).await {
                        attached = Some(daemon);
                    }
                }
                Hello::Events => if let Some(running) = &running {
                    let (_, listener) = stream.into_split();
                    let _ = running.listeners.send(listener).await;
                }
            },
            call = next(&mut attached) => {
                if !answer(running.as_ref(), &mut attached, call).await {
                    attached = None;
                    info!("the daemon has gone; packets go on");
                }
            }
            _ = ticks.tick() => if let Some(running) = &running {
                running.engines.expire(monotonic_seconds()).await;
            },
            () = &mut unwanted, if running.is_none() => break,
            _ = terminate.recv() => break,
        }
    }
    if let Some(running) = running {
        running.engines.stop().await;
        info!("the data plane ends, and no packet goes through a tunnel any more");
    }
    Ok(())
}

/// Takes connections, and lets those in that are from the same user and speak as we do.
async fn receive(listener: UnixListener, visits: mpsc::Sender<Visitor>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let visits = visits.clone();
                tokio::spawn(async move {
                    match timeout(PATIENCE, ask(stream)).await {
                        Ok(Ok(Some(visitor))) => drop(visits.send(visitor).await),
                        Ok(Ok(None)) => {}
                        Ok(Err(error)) => debug!(%error, "a visitor was not understood"),
                        Err(_) => debug!("a visitor said nothing"),
                    }
                });
            }
            Err(error) => {
                warn!(%error, "a connection was lost");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn ask(mut stream: UnixStream) -> io::Result<Option<Visitor>> {
    if !is_one_of_us(&stream) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    // One of another version looks who we are and ends us.
    if !is_same_protocol(&mut stream).await? {
        return Ok(None);
    }
    let hello = frame::read(&mut stream).await?;
    Ok(hello.map(|hello| Visitor { stream, hello }))
}

/// Starts the engines if they do not run yet, and makes the visitor the daemon that is listened to.
async fn attach(
    running: &mut Option<Running>,
    config: EngineConfig,
    mut stream: UnixStream,
) -> Option<Attached> {
    let welcome = match running {
        Some(running) if running.config == config => Welcome::Attached,
        Some(_) => Welcome::OtherSettings,
        None => match Engines::start(config.clone()).await {
            Ok((engines, events)) => {
                let (listeners, waiting) = mpsc::channel(1);
                tokio::spawn(tell(events, waiting));
                *running = Some(Running {
                    config,
                    engines,
                    listeners,
                });
                Welcome::Attached
            }
            Err(error) => Welcome::Failed {
                step: error.step.to_owned(),
                reason: error.source.to_string(),
            },
        },
    };
    frame::write(&mut stream, &welcome).await.ok()?;
    match welcome {
        Welcome::Attached => {
            let (input, answers) = stream.into_split();
            let (sender, calls) = mpsc::channel(64);
            tokio::spawn(listen(input, sender));
            Some(Attached { calls, answers })
        }
        Welcome::OtherSettings | Welcome::Failed { .. } => None,
    }
}

/// Reads calls until the daemon goes.
async fn listen(mut input: OwnedReadHalf, calls: mpsc::Sender<Call>) {
    loop {
        match frame::read(&mut input).await {
            Ok(Some(call)) => {
                if calls.send(call).await.is_err() {
                    return;
                }
            }
            Ok(None) => return,
            Err(error) => return warn!(%error, "a call was not understood"),
        }
    }
}

async fn next(attached: &mut Option<Attached>) -> Option<Call> {
    match attached {
        Some(daemon) => daemon.calls.recv().await,
        None => std::future::pending().await,
    }
}

/// Answers a call; false if the daemon is gone.
async fn answer(
    running: Option<&Running>,
    attached: &mut Option<Attached>,
    call: Option<Call>,
) -> bool {
    let (Some(running), Some(daemon), Some(Call { number, request })) = (running, attached, call)
    else {
        return false;
    };
    let reply = running.engines.ask(request).await;
    frame::write(&mut daemon.answers, &Answer { number, reply })
        .await
        .is_ok()
}

/// Tells events to the daemon that listens, and keeps the newest while none does.
async fn tell(mut events: mpsc::Receiver<Event>, mut listeners: mpsc::Receiver<OwnedWriteHalf>) {
    let mut kept: VecDeque<Told> = VecDeque::new();
    let mut listener: Option<OwnedWriteHalf> = None;
    loop {
        if let (Some(to), Some(event)) = (&mut listener, kept.front()) {
            tokio::select! {
                told = frame::write(to, event) => match told {
                    Ok(()) => drop(kept.pop_front()),
                    Err(_) => listener = None,
                },
                Some(other) = listeners.recv() => listener = Some(other),
            }
            continue;
        }
        tokio::select! {
            Some(other) = listeners.recv() => listener = Some(other),
            event = events.recv() => match event {
                Some(event) => {
                    if kept.len() >= KEPT {
                        kept.pop_front();
                    }
                    kept.push_back(event);
                }
                None => return,
            },
        }
    }
}
