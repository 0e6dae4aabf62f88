//! CRI's streaming server: `Exec`, `Attach` and `PortForward` answer with a URL that is good once, and for a minute; whoever
//! asks there gets the streams, over SPDY or WebSocket.
//!
//! Two listeners serve the same paths: a unix socket for the node, which may be spoken to by root only, and a loopback TCP
//! port for other clients of the CRI socket such as crictl, which take the URL as it stands. On that port the token is the
//! only guard, so it cannot be guessed and cannot be used twice. A node on another machine comes by the agent's own port.

mod copy;
mod exec_sync;
#[cfg(test)]
mod fake_init;
mod server;
mod sessions;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use moxlet_cri::v1;
use parking_lot::Mutex;

use crate::{
    error::{Error, Result},
    state::{Container, RunState, State},
    tasks::Tasks,
};

pub(crate) use exec_sync::exec_sync;
pub(crate) use server::{listen_unix, serve_connection};

/// How long a URL may wait for its client.
const TOKEN_LIFE: Duration = Duration::from_secs(60);
/// URLs that wait at one time.
const MAX_TOKENS: usize = 1000;

/// What waits behind a URL; the ids are full ones.
#[derive(Debug, Clone, PartialEq)]
enum Pending {
    Exec(v1::ExecRequest),
    Attach(v1::AttachRequest),
    PortForward(v1::PortForwardRequest),
}

impl Pending {
    fn kind(&self) -> &'static str {
        match self {
            Self::Exec(_) => "exec",
            Self::Attach(_) => "attach",
            Self::PortForward(_) => "portforward",
        }
    }
}

/// The requests that wait for their clients.
#[derive(Debug, Default)]
struct Tokens(Mutex<HashMap<String, (Instant, Pending)>>);

impl Tokens {
    fn put(&self, pending: Pending) -> Result<String> {
        let mut all = self.0.lock();
        if all.len() >= MAX_TOKENS {
            all.retain(|_, (since, _)| since.elapsed() < TOKEN_LIFE);
        }
        if all.len() >= MAX_TOKENS {
            return Err(Error::Exhausted(format!(
                "{MAX_TOKENS} streaming requests wait for their clients already"
            )));
        }
        let token = hex::encode(rand::random::<[u8; 16]>());
        all.insert(token.clone(), (Instant::now(), pending));
        Ok(token)
    }

    /// Takes what waits at `/<kind>/<token>`.
    fn take(&self, path: &str) -> Option<Pending> {
        let (kind, token) = path.strip_prefix('/')?.split_once('/')?;
        let (since, pending) = self.0.lock().remove(token)?;
        (since.elapsed() < TOKEN_LIFE && pending.kind() == kind).then_some(pending)
    }
}

/// The streaming server.
pub(crate) struct Streaming {
    state: Arc<State>,
    tasks: Tasks,
    socket: PathBuf,
    /// The TCP listener's address.
    address: Option<SocketAddr>,
    tokens: Tokens,
}

impl Streaming {
    /// Listens, and serves until the agent stops.
    ///
    /// # Errors
    /// An address that is not of this machine alone, or one that cannot be listened at.
    pub(crate) fn start(
        state: Arc<State>,
        tasks: Tasks,
        socket: PathBuf,
        listen: Option<SocketAddr>,
    ) -> Result<Arc<Self>> {
        let unix = server::listen_unix(&socket)?;
        let tcp = listen.map(server::listen_tcp).transpose()?;
        let address = tcp.as_ref().map(|(_, address)| *address);
        let streaming = Arc::new(Self { state, tasks, socket, address, tokens: Tokens::default() });
        streaming.tasks.spawn(server::serve(streaming.clone(), unix));
        if let Some((tcp, _)) = tcp {
            streaming.tasks.spawn(server::serve(streaming.clone(), tcp));
        }
        Ok(streaming)
    }

    /// Where its tasks are.
    pub(crate) fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    /// Where the node finds it on the same host: `unix:///…`.
    pub(crate) fn endpoint(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// `Exec`.
    pub(crate) async fn exec(&self, mut request: v1::ExecRequest) -> Result<v1::ExecResponse> {
        let container = running(&self.state, &request.container_id)?;
        check_streams(request.tty, request.stdin, request.stdout, request.stderr)?;
        if request.cmd.is_empty() {
            return Err(Error::Invalid("no command is given to execute".to_owned()));
        }
        request.container_id = container.id.to_string();
        Ok(v1::ExecResponse { url: self.url(Pending::Exec(request))? })
    }

    /// `Attach`.
    pub(crate) async fn attach(&self, mut request: v1::AttachRequest) -> Result<v1::AttachResponse> {
        let container = running(&self.state, &request.container_id)?;
        check_streams(request.tty, request.stdin, request.stdout, request.stderr)?;
        request.container_id = container.id.to_string();
        Ok(v1::AttachResponse { url: self.url(Pending::Attach(request))? })
    }

    /// `PortForward`.
    pub(crate) async fn port_forward(
        &self,
        mut request: v1::PortForwardRequest,
    ) -> Result<v1::PortForwardResponse> {
        let sandbox = self.state.sandbox(&request.pod_sandbox_id)?;
        sandbox.client()?;
        if let Some(port) = request.port.iter().find(|p| !(1..=65_535).contains(*p)) {
            return Err(Error::Invalid(format!("{port} is no port")));
        }
        request.pod_sandbox_id = sandbox.id.to_string();
        Ok(v1::PortForwardResponse { url: self.url(Pending::PortForward(request))? })
    }

    fn url(&self, pending: Pending) -> Result<String> {
        let kind = pending.kind();
        let host = self.address.map_or_else(|| "localhost".to_owned(), |a| a.to_string());
        Ok(format!("http://{host}/{kind}/{}", self.tokens.put(pending)?))
    }
}

/// The container of a request, which must run.
fn running(state: &State, id: &str) -> Result<Arc<Container>> {
    if id.is_empty() {
        return Err(Error::Invalid("missing required container_id".to_owned()));
    }
    let container = state.container(id)?;
    let is = match container.run_state() {
        RunState::Running { .. } => return Ok(container),
        RunState::Created => "created",
        RunState::Exited(_) => "exited",
    };
    Err(Error::State(format!("container {} is not running: it is {is}", container.id)))
}

/// As every CRI runtime judges them.
fn check_streams(tty: bool, stdin: bool, stdout: bool, stderr: bool) -> Result<()> {
    if tty && stderr {
        return Err(Error::Invalid("tty and stderr cannot both be true".to_owned()));
    }
    if !(stdin || stdout || stderr) {
        return Err(Error::Invalid("one of stdin, stdout, or stderr must be set".to_owned()));
    }
    Ok(())
}
