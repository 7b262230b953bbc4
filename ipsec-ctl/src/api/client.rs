//! The commands' end of the control socket: one request for each connection, within a time limit.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Method, StatusCode, body::Bytes};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::model::{Counter, Done, Refused, Rekey, Status};
use crate::dataplane::seam::EngineChoice;

/// Time after which a daemon that does not answer is reported.
const PATIENCE: Duration = Duration::from_secs(30);
/// Largest answer, in bytes: some kilobytes for each of several thousand tunnels.
const LARGEST_ANSWER: usize = 64 << 20;

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no daemon answers on {path}: {cause}")]
    Connect {
        /// Path of the socket.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
    },
    /// The daemon refused.
    #[error("{}", .0.message)]
    Refused(Refused),
    /// The daemon is stopping, or is not ours.
    #[error("the daemon answered with status {0}")]
    Status(StatusCode),
    /// The exchange broke off.
    #[error("the daemon's answer broke off: {0}")]
    Broken(String),
    /// No answer in time.
    #[error("the daemon has not answered for {} s", PATIENCE.as_secs())]
    Timeout,
}

/// A client of the daemon behind one socket.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// A client of the daemon that listens on `path`; nothing is opened yet.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// The state of everything.
    ///
    /// # Errors
    ///
    /// [`ClientError`], as for all requests.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.ask(Method::GET, "/status").await
    }

    /// Counters of packets by reason.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn counters(&self) -> Result<Vec<Counter>, ClientError> {
        self.ask(Method::GET, "/counters").await
    }

    /// Brings a tunnel up.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn up(&self, tunnel: &str) -> Result<Done, ClientError> {
        self.ask(Method::POST, &format!("/tunnels/{}/up", escaped(tunnel)))
            .await
    }

    /// Takes a tunnel down.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn down(&self, tunnel: &str) -> Result<Done, ClientError> {
        self.ask(Method::POST, &format!("/tunnels/{}/down", escaped(tunnel)))
            .await
    }

    /// Rekeys a tunnel's children, or its IKE SA.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn rekey(&self, tunnel: &str, what: Rekey) -> Result<Done, ClientError> {
        let what = match what {
            Rekey::Children => "children",
            Rekey::Ike => "ike",
        };
        let target = format!("/tunnels/{}/rekey/{what}", escaped(tunnel));
        self.ask(Method::POST, &target).await
    }

    /// Has another engine carry a tunnel.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn move_to(&self, tunnel: &str, engine: EngineChoice) -> Result<Done, ClientError> {
        let engine = match engine {
            EngineChoice::Auto => "auto",
            EngineChoice::Xdp => "xdp",
            EngineChoice::Kernel => "kernel",
        };
        let target = format!("/tunnels/{}/move/{engine}", escaped(tunnel));
        self.ask(Method::POST, &target).await
    }

    /// Has the daemon read its configuration again.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn reload(&self) -> Result<Done, ClientError> {
        self.ask(Method::POST, "/reload").await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        target: &str,
    ) -> Result<T, ClientError> {
        tokio::time::timeout(PATIENCE, self.exchange(method, target))
            .await
            .map_err(|_| ClientError::Timeout)?
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        method: Method,
        target: &str,
    ) -> Result<T, ClientError> {
        let broken = |error: &dyn std::fmt::Display| ClientError::Broken(error.to_string());
        let stream =
            UnixStream::connect(&self.path)
                .await
                .map_err(|cause| ClientError::Connect {
                    path: self.path.clone(),
                    cause,
                })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| broken(&error))?;
        let request = hyper::Request::builder()
            .method(method)
            .uri(target)
            .header(hyper::header::HOST, "ipsec-ctl")
            .body(Empty::<Bytes>::new())
            .map_err(|error| broken(&error))?;
        let exchange = async {
            let response = sender
                .send_request(request)
                .await
                .map_err(|error| broken(&error))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), LARGEST_ANSWER)
                .collect()
                .await
                .map_err(|error| broken(&error))?
                .to_bytes();
            Ok((status, body))
        };
        let mut exchange = std::pin::pin!(exchange);
        // The connection makes progress only while somebody polls it. A server may close it as soon as it has answered.
        let (status, body) = tokio::select! {
            biased;
            result = &mut exchange => result?,
            ended = connection => {
                ended.map_err(|error| broken(&error))?;
                exchange.await?
            }
        };
        match status {
            StatusCode::OK => serde_json::from_slice(&body).map_err(|error| broken(&error)),
            StatusCode::CONFLICT => Err(ClientError::Refused(
                serde_json::from_slice(&body).map_err(|error| broken(&error))?,
            )),
            other => Err(ClientError::Status(other)),
        }
    }
}

/// Percent-encodes what may not stand in one segment of a path (RFC 3986 section 3.3).
fn escaped(segment: &str) -> String {
    segment
        .bytes()
        .map(|byte| {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::api::{Request, server};

    /// A daemon that knows one tunnel, `head office/1`.
    async fn answer_all(mut requests: mpsc::Receiver<Request>) {
        while let Some(request) = requests.recv().await {
            match request {
                Request::Up(name, answer) if name == "head office/1" => answer
                    .send(Ok(Done {
                        lines: vec![format!("{name} is coming up")],
                    }))
                    .unwrap(),
                Request::Up(name, answer) => answer
                    .send(Err(Refused {
                        message: format!("no tunnel `{name}`"),
                        remedy: "there is `head office/1`".to_owned(),
                    }))
                    .unwrap(),
                Request::Rekey(name, what, answer) => answer
                    .send(Ok(Done {
                        lines: vec![format!("{name}: {what:?}")],
                    }))
                    .unwrap(),
                Request::Move(name, engine, answer) => answer
                    .send(Ok(Done {
                        lines: vec![format!("{name}: {engine:?}")],
                    }))
                    .unwrap(),
                Request::Counters(answer) => answer.send(Vec::new()).unwrap(),
                // Dropping the answer is what a daemon that is stopping does.
                Request::Status(_) | Request::Down(..) | Request::Reload(_) => {}
            }
        }
    }

    #[tokio::test]
    async fn requests_reach_the_daemon_and_answers_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/control.sock");
        let listener = server::open(&path).unwrap();
        let (sender, requests) = mpsc::channel(1);
        tokio::spawn(server::serve(listener, sender));
        tokio::spawn(answer_all(requests));

        let client = Client::new(&path);
        assert_eq!(
            client.up("head office/1").await.unwrap().lines,
            ["head office/1 is coming up"]
        );
        let error = client.up("branch").await.unwrap_err();
        assert!(matches!(error, ClientError::Refused(_)), "{error}");
        assert_eq!(error.to_string(), "no tunnel `branch`");
        let rekeyed = client.rekey("head office/1", Rekey::Ike).await.unwrap();
        assert_eq!(rekeyed.lines, ["head office/1: Ike"]);
        let moved = client.move_to("head office/1", EngineChoice::Kernel).await;
        assert_eq!(moved.unwrap().lines, ["head office/1: Kernel"]);
        assert_eq!(client.counters().await.unwrap(), []);
        let error = client.reload().await.unwrap_err();
        assert!(
            matches!(error, ClientError::Status(StatusCode::SERVICE_UNAVAILABLE)),
            "{error}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn clients_that_are_stuck_give_their_places_up() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let listener = server::open(&path).unwrap();
        let (sender, requests) = mpsc::channel(1);
        tokio::spawn(server::serve(listener, sender));
        tokio::spawn(answer_all(requests));
        // Some say nothing, some stop in the middle of a word, some do not read what they asked for.
        let mut stuck = Vec::new();
        for words in ["", "GET /coun", "GET /counters HTTP/1.1\r\nHost: x\r\n\r\n"] {
            for _ in 0..100 {
                let mut stream = UnixStream::connect(&path).await.unwrap();
                stream.write_all(words.as_bytes()).await.unwrap();
                stuck.push(stream);
            }
        }
        assert_eq!(Client::new(&path).counters().await.unwrap(), []);
        // Those that are cut off are told so, and none of them holds its place for good.
        let mut first = stuck.swap_remove(0);
        let mut words = String::new();
        let _ = first.read_to_string(&mut words).await;
        assert!(words.is_empty() || words.contains("408"), "{words}");
    }

    #[tokio::test]
    async fn the_socket_is_its_owners_alone_and_replaces_only_a_dead_one() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let first = server::open(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(
            server::open(&path),
            Err(server::ServerError::InUse(_))
        ));
        drop(first);
        server::open(&path).unwrap();
    }

    #[tokio::test]
    async fn a_missing_daemon_is_named_by_its_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("absent.sock");
        let error = Client::new(&path).status().await.unwrap_err();
        assert!(matches!(error, ClientError::Connect { .. }));
        assert!(error.to_string().contains("absent.sock"));
    }
}
