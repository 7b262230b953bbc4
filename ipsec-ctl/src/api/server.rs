//! The daemon's end of the control socket.

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt, net::UnixStream as Probe},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{Path as Segment, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::UnixListener,
    sync::{Semaphore, mpsc, oneshot},
    time::{sleep, timeout},
};
use tracing::warn;

use super::{
    Request,
    model::{Done, Refused, Rekey},
};
use crate::dataplane::seam::EngineChoice;

/// Clients that are served at the same time; further ones wait to be let in.
const CLIENTS: usize = 128;
/// Time that a client has to say what it wants.
const HEADERS: Duration = Duration::from_secs(5);
/// Time that a client has in all; one that does not read its answer gives its place up then.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why the control socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A daemon answers on it already.
    #[error("another daemon listens on {0}")]
    InUse(PathBuf),
    /// The operating system refused.
    #[error("the control socket {path} cannot be opened: {cause}")]
    Open {
        /// Its path.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
    },
}

/// Opens the control socket at `path`, mode 0600, in place of one that a dead daemon left.
///
/// # Errors
///
/// [`ServerError`], with nothing changed.
pub fn open(path: &Path) -> Result<UnixListener, ServerError> {
    let failed = |cause| ServerError::Open {
        path: path.to_owned(),
        cause,
    };
    if Probe::connect(path).is_ok() {
        return Err(ServerError::InUse(path.to_owned()));
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(failed(cause)),
        _ => {}
    }
    // Nobody may connect between the creation of the socket and the change of its mode.
    let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    nix::sys::stat::umask(before);
    let listener = listener.map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Serves for ever; requests go to the daemon through `requests`. However many clients are stuck, the daemon waits for none.
pub async fn serve(listener: UnixListener, requests: mpsc::Sender<Request>) {
    let routes = Router::new()
        .route("/status", get(status))
        .route("/counters", get(counters))
        .route("/tunnels/{name}/up", post(up))
        .route("/tunnels/{name}/down", post(down))
        .route("/tunnels/{name}/rekey/{what}", post(rekey))
        .route("/tunnels/{name}/move/{engine}", post(move_to))
        .route("/reload", post(reload))
        .with_state(requests);
    let clients = Arc::new(Semaphore::new(CLIENTS));
    // The semaphore is never closed.
    while let Ok(place) = Arc::clone(&clients).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => TokioIo::new(stream),
            Err(cause) => {
                warn!(%cause, "a client of the control socket was lost");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let routes = TowerToHyperService::new(routes.clone());
        tokio::spawn(async move {
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADERS)
                .serve_connection(stream, routes);
            // A client that breaks off or takes too long harms itself only.
            let _ = timeout(PATIENCE, served).await;
            drop(place);
        });
    }
}

type Requests = State<mpsc::Sender<Request>>;

/// Hands a request to the daemon and waits for its answer.
async fn ask<T>(
    requests: &mpsc::Sender<Request>,
    request: impl FnOnce(oneshot::Sender<T>) -> Request,
) -> Result<T, Response> {
    let (answer, answered) = oneshot::channel();
    let stopping = || StatusCode::SERVICE_UNAVAILABLE.into_response();
    requests
        .send(request(answer))
        .await
        .map_err(|_| stopping())?;
    answered.await.map_err(|_| stopping())
}

fn rendered(result: Result<Done, Refused>) -> Response {
    match result {
        Ok(done) => Json(done).into_response(),
        Err(refused) => (StatusCode::CONFLICT, Json(refused)).into_response(),
    }
}

async fn status(State(requests): Requests) -> Result<Response, Response> {
    ask(&requests, Request::Status)
        .await
        .map(|status| Json(status).into_response())
}

async fn counters(State(requests): Requests) -> Result<Response, Response> {
    ask(&requests, Request::Counters)
        .await
        .map(|counters| Json(counters).into_response())
}

async fn up(
    State(requests): Requests,
    Segment(name): Segment<String>,
) -> Result<Response, Response> {
    ask(&requests, |answer| Request::Up(name, answer))
        .await
        .map(rendered)
}

async fn down(
    State(requests): Requests,
    Segment(name): Segment<String>,
) -> Result<Response, Response> {
    ask(&requests, |answer| Request::Down(name, answer))
        .await
        .map(rendered)
}

async fn rekey(
    State(requests): Requests,
    Segment((name, what)): Segment<(String, Rekey)>,
) -> Result<Response, Response> {
    ask(&requests, |answer| Request::Rekey(name, what, answer))
        .await
        .map(rendered)
}

async fn move_to(
    State(requests): Requests,
    Segment((name, engine)): Segment<(String, EngineChoice)>,
) -> Result<Response, Response> {
    ask(&requests, |answer| Request::Move(name, engine, answer))
        .await
        .map(rendered)
}

async fn reload(State(requests): Requests) -> Result<Response, Response> {
    ask(&requests, Request::Reload).await.map(rendered)
}
