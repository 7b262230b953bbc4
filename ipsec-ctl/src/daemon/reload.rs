//! Reading the configuration again: only what changed is touched, and nothing at all if the file has a mistake.
//!
//! The files are read beside the daemon's loop: a disk that does not answer delays nobody but whoever asked.

use std::{path::PathBuf, sync::Arc, time::Duration};

use ring::digest;
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task::spawn_blocking,
    time::timeout,
};
use tracing::{info, warn};

use super::{convert, gateway::Gateway};
use crate::{
    api::model::{Done, Refused},
    config::{self, Child, Config, Role, Tunnel},
    dataplane::seam::{self, TunnelId},
    ike::{
        config::PeerId,
        event::{Command, Rekey},
    },
};

/// Time in which the files of a configuration have to be read; less than a client waits.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where the outcome of a reload goes.
#[derive(Debug)]
pub(super) enum Asker {
    /// A client.
    Client(oneshot::Sender<Result<Done, Refused>>),
    /// Whoever sent SIGHUP has only the log.
    Signal,
}

impl Asker {
    pub(super) fn tell(self, outcome: Result<Done, Refused>) {
        match (self, outcome) {
            // A client that has gone does not want the answer.
            (Self::Client(answer), outcome) => drop(answer.send(outcome)),
            (Self::Signal, Ok(done)) => {
                done.lines.iter().for_each(|line| info!("reload: {line}"));
            }
            (Self::Signal, Err(refused)) => {
                warn!("reload refused: {}; {}", refused.message, refused.remedy);
            }
        }
    }
}

/// A configuration that has been read, or why not.
#[derive(Debug)]
pub(super) struct Read {
    asker: Asker,
    result: Result<Config, Refused>,
}

/// Reads configurations, one at a time.
#[derive(Debug)]
pub(super) struct Reader {
    permit: Arc<Semaphore>,
    patience: Duration,
    read: mpsc::UnboundedSender<Read>,
}

impl Reader {
    /// What was read arrives at the receiver.
    pub(super) fn new() -> (Self, mpsc::UnboundedReceiver<Read>) {
        let (read, results) = mpsc::unbounded_channel();
        let reader = Self {
            permit: Arc::new(Semaphore::new(1)),
            patience: PATIENCE,
            read,
        };
        (reader, results)
    }

    /// Begins to read a file and the key files that it names.
    pub(super) fn begin(&self, path: PathBuf, asker: Asker) {
        let Ok(permit) = Arc::clone(&self.permit).try_acquire_owned() else {
            return asker.tell(Err(Refused {
                message: "the files are still being read for an earlier reload".to_owned(),
                remedy: "wait for it; if it does not end, look at the disk of the configuration and of the key files"
                    .to_owned(),
            }));
        };
        let (read, patience) = (self.read.clone(), self.patience);
        tokio::spawn(async move {
            let file = path.clone();
            // A read that hangs cannot be interrupted, so the permit stays with it and not with whoever waits.
            let task = spawn_blocking(move || {
                let result = config::load(&file);
                drop(permit);
                result
            });
            let result = match timeout(patience, task).await {
                Ok(Ok(result)) => result.map_err(|errors| Refused {
                    message: format!(
                        "{errors}: {}",
                        errors.messages().collect::<Vec<_>>().join("; ")
                    ),
                    remedy: format!("`ipsec-ctl check {}` shows the lines", path.display()),
                }),
                Ok(Err(cause)) => Err(Refused {
                    message: format!("the configuration could not be read: {cause}"),
                    remedy: "look into the daemon's log".to_owned(),
                }),
                Err(_) => Err(Refused {
                    message: format!(
                        "{} or a key file that it names could not be read within {} s; nothing was changed",
                        path.display(),
                        patience.as_secs()
                    ),
                    remedy: "look at the disk that they are on, then reload again".to_owned(),
                }),
            };
            // A daemon that stops does not want to know.
            let _ = read.send(Read { asker, result });
        });
    }
}

impl Gateway {
    /// Begins to read the configuration again.
    pub(super) fn reload(&self, asker: Asker) {
        self.reader.begin(self.path.clone(), asker);
    }

    /// A configuration was read.
    pub(super) async fn reloaded(&mut self, read: Read) {
        let outcome = match read.result {
            Ok(fresh) => Ok(self.take_over(fresh).await),
            Err(refused) => Err(refused),
        };
        self.answer(read.asker, outcome);
    }

    async fn take_over(&mut self, fresh: Config) -> Done {
        let mut lines = Vec::new();
        if differs_globally(&self.config, &fresh) {
            lines.push(
                "settings of the whole gateway differ: they take effect at the next start"
                    .to_owned(),
            );
        }
        let known: Vec<(TunnelId, Tunnel)> = self
            .tunnels
            .iter()
            .map(|(id, tunnel)| (id, tunnel.config.clone()))
            .collect();
        for (id, old) in &known {
            if !fresh.tunnels.iter().any(|tunnel| tunnel.name == old.name) {
                self.remove_tunnel(*id).await;
                lines.push(format!("{} removed", old.name));
            }
        }
        for tunnel in &fresh.tunnels {
            match known.iter().find(|(_, old)| old.name == tunnel.name) {
                None => {
                    lines.push(match self.add_tunnel(tunnel.clone()).await {
                        Ok(()) => format!("{} added", tunnel.name),
                        Err(cause) => format!("{} could not be added: {cause}", tunnel.name),
                    });
                }
                Some((_, old)) if old == tunnel => {}
                Some((id, old)) => {
                    let changed = match self.change_tunnel(*id, old, tunnel).await {
                        Err(seam::Rejected::Immovable) => self.start_anew(*id, tunnel).await,
                        other => other,
                    };
                    lines.push(match changed {
                        Ok(()) => format!("{} changed", tunnel.name),
                        Err(cause) => format!("{} could not be changed: {cause}", tunnel.name),
                    });
                }
            }
        }
        self.config.tunnels = fresh.tunnels;
        if lines.is_empty() {
            lines.push("nothing has changed".to_owned());
        }
        Done { lines }
    }

    /// Has another engine carry a tunnel, until a reload wants it otherwise.
    pub(super) async fn move_tunnel(
        &mut self,
        name: &str,
        engine: seam::EngineChoice,
    ) -> Result<Done, Refused> {
        let id = self.named(name)?;
        let Some(old) = self.tunnels.get(id).map(|tunnel| tunnel.config.clone()) else {
            return Err(self.unknown(name));
        };
        let new = Tunnel {
            engine,
            ..old.clone()
        };
        self.change_tunnel(id, &old, &new)
            .await
            .map_err(|cause| Refused {
                message: format!("tunnel {name} stays where it is: {cause}"),
                remedy: "`ipsec-ctl probe` shows what this machine has for each engine".to_owned(),
            })?;
        Ok(Done {
            lines: vec![format!(
                "{name} is with the engine that was asked for as soon as its children are rekeyed; `ipsec-ctl status {name}` shows what \
                 carries them. At a reload and at the next start the configuration decides again"
            )],
        })
    }

    async fn remove_tunnel(&mut self, id: TunnelId) {
        let now = self.now();
        self.endpoint
            .handle_command(now, Command::RemovePeer(PeerId(id.0)));
        self.drain().await;
        if let Err(cause) = self.engine.command(seam::Command::RemoveTunnel(id)).await {
            warn!(%cause, "a tunnel could not be removed");
        }
        self.tunnels.remove(id);
    }

    /// Takes a tunnel down and starts it as it is configured now.
    async fn start_anew(&mut self, id: TunnelId, new: &Tunnel) -> Result<(), seam::Rejected> {
        self.remove_tunnel(id).await;
        self.add_tunnel(new.clone()).await
    }

    /// Changes a tunnel in place where its SAs can stay, else takes it down and starts it anew.
    async fn change_tunnel(
        &mut self,
        id: TunnelId,
        old: &Tunnel,
        new: &Tunnel,
    ) -> Result<(), seam::Rejected> {
        if !is_same_negotiation(old, new) {
            return self.start_anew(id, new).await;
        }
        let (places, elsewhere) = self
            .tunnels
            .get(id)
            .map(|tunnel| (tunnel.places.clone(), tunnel.elsewhere.clone()))
            .unwrap_or_default();
        let spec = convert::tunnel_spec(id, new, &places, &elsewhere);
        self.engine
            .command(seam::Command::SetTunnel(Box::new(spec)))
            .await?;
        self.set_carrier(id).await;
        let now = self.now();
        self.endpoint.handle_command(
            now,
            Command::SetPeer(Box::new(convert::peer_config(id, new, &places))),
        );
        if old.offload != new.offload {
            // What a card does for an SA is decided when the SA is installed.
            let rekey = Command::Rekey(PeerId(id.0), Rekey::Children);
            self.endpoint.handle_command(now, rekey);
        }
        if let Some(tunnel) = self.tunnels.get_mut(id) {
            tunnel.config = new.clone();
        }
        if new.role == Role::Initiate && old.role != Role::Initiate {
            self.bring_up(id);
        }
        Ok(())
    }
}

/// Whether SAs that were negotiated under the old configuration are good under the new one, too.
fn is_same_negotiation(old: &Tunnel, new: &Tunnel) -> bool {
    terms(old) == terms(new)
}

/// What SAs are negotiated under, as a digest: they are good as long as it stays the same.
pub(super) fn terms(tunnel: &Tunnel) -> Vec<u8> {
    let Tunnel {
        name: _,
        peer,
        local,
        local_id,
        remote_id,
        psk,
        role: _,
        ike,
        nat,
        keepalive: _,
        fragment_size: _,
        childless: _,
        mobike: _,
        return_routability: _,
        dpd: _,
        unique: _,
        lifetime: _,
        reauth: _,
        device,
        mtu: _,
        engine: _,
        mode,
        policy_based,
        fast_path: _,
        offload: _,
        df: _,
        clamp_mss: _,
        copy_dscp: _,
        routes: _,
        address: _,
        bypass: _,
        children,
    } = tunnel;
    let mut context = digest::Context::new(&digest::SHA256);
    let secret = digest::digest(&digest::SHA256, psk.expose());
    context.update(secret.as_ref());
    let who = format!(
        "{peer:?} {local:?} {local_id:?} {remote_id:?} {ike:?} {nat:?} {device:?} {mode:?} {policy_based}"
    );
    context.update(who.as_bytes());
    for child in children {
        let Child {
            name,
            local,
            remote,
            esp,
            on_dead,
            lifetime,
            lifetime_bytes,
            lifetime_packets,
            replay_window,
        } = child;
        let what = format!(
            "{name:?} {local:?} {remote:?} {esp:?} {on_dead:?} {lifetime:?} {lifetime_bytes:?} {lifetime_packets:?} {replay_window}"
        );
        context.update(what.as_bytes());
    }
    context.finish().as_ref().to_vec()
}

fn differs_globally(old: &Config, new: &Config) -> bool {
    let settings = |config: &Config| Config {
        tunnels: Vec::new(),
        ..config.clone()
    };
    settings(old) != settings(new)
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write, path::Path};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    /// A configuration whose key file is a FIFO: reading it blocks until somebody writes.
    fn blocked(folder: &Path) -> (PathBuf, PathBuf) {
        let (file, key) = (folder.join("gateway.toml"), folder.join("key"));
        let text = "[[tunnel]]\nname = \"office\"\npeer = \"203.0.113.9\"\npsk_file = \"key\"\n\
            [[tunnel.child]]\nname = \"net\"\nlocal = [\"10.1.0.0/24\"]\nremote = [\"10.2.0.0/24\"]\n";
        fs::write(&file, text).unwrap();
        mkfifo(&key, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        (file, key)
    }

    fn asker() -> (Asker, oneshot::Receiver<Result<Done, Refused>>) {
        let (answer, answered) = oneshot::channel();
        (Asker::Client(answer), answered)
    }

    /// Opening the FIFO waits for its reader, which this thread must not hold up.
    async fn write(key: &Path) {
        let key = key.to_owned();
        let writing = spawn_blocking(move || {
            let mut file = fs::File::options().write(true).open(key).unwrap();
            file.write_all(b"a key").unwrap();
        });
        writing.await.unwrap();
    }

    #[tokio::test]
    async fn a_key_file_that_cannot_be_read_delays_nobody_but_another_reload() {
        let folder = tempfile::tempdir().unwrap();
        let (file, key) = blocked(folder.path());
        let (reader, mut read) = Reader::new();
        reader.begin(file.clone(), Asker::Signal);
        let (second, answered) = asker();
        reader.begin(file, second);
        let refused = answered.await.unwrap().unwrap_err();
        assert!(refused.message.contains("still being read"), "{refused:?}");
        assert!(read.try_recv().is_err(), "the first waits for its key");
        write(&key).await;
        let config = read.recv().await.unwrap().result.unwrap();
        assert_eq!(config.tunnels.len(), 1);
    }

    #[tokio::test]
    async fn a_reload_whose_files_are_not_read_in_time_changes_nothing_and_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let (file, key) = blocked(folder.path());
        let (mut reader, mut read) = Reader::new();
        reader.patience = Duration::from_millis(1);
        reader.begin(file.clone(), Asker::Signal);
        let refused = read.recv().await.unwrap().result.unwrap_err();
        assert!(
            refused.message.contains("nothing was changed"),
            "{refused:?}"
        );
        write(&key).await;
        // Once the disk answers, a reload is possible again.
        reader.patience = PATIENCE;
        fs::remove_file(&key).unwrap();
        let _ = reader.permit.acquire().await.unwrap();
        reader.begin(file, Asker::Signal);
        let refused = read.recv().await.unwrap().result.unwrap_err();
        assert!(refused.message.contains("cannot be read"), "{refused:?}");
    }
}
