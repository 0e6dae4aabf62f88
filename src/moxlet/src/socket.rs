//! The socket of this host's agent: which one it is, and a channel to it.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use clap::Args;
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, sync::Mutex};
use tonic::transport::{Channel, Endpoint, Uri};

/// Where an agent's socket is if nobody says.
const SOCKETS: [&str; 2] = ["/run/moxlet/agent.sock", "/var/lib/moxlet/run/agent.sock"];
/// The variable that names it.
const VARIABLE: &str = "MOXLET_SOCKET";

/// Which agent.
#[derive(Debug, Args, Default)]
pub(crate) struct SocketArgs {
    /// Socket of the agent [env: MOXLET_SOCKET] [default: /run/moxlet/agent.sock, else /var/lib/moxlet/run/agent.sock]
    // Not by the parser's `env`, with which the variable would count as an option that excludes --store.
    #[arg(long, value_name = "PATH", global = true)]
    pub(crate) socket: Option<PathBuf>,
}

impl SocketArgs {
    /// Where the socket is.
    ///
    /// # Errors
    /// Nobody says, and there is none where it usually is.
    pub(crate) fn path(&self) -> Result<PathBuf> {
        let variable = || std::env::var_os(VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(path) = self.socket.clone().or_else(variable) {
            return Ok(path);
        }
        // One that may not be looked at is there: the connection says what is missing.
        let there = |p: &PathBuf| p.try_exists().unwrap_or(true);
        SOCKETS.iter().map(PathBuf::from).find(there).with_context(|| {
            format!(
                "no agent runs here (there is neither {}): start it, or name its socket with --socket or {VARIABLE}",
                SOCKETS.join(" nor ")
            )
        })
    }
}

/// A channel to the agent at that socket.
///
/// # Errors
/// Nobody listens there, or this user may not connect.
pub(crate) async fn connect(path: &Path) -> Result<Channel> {
    let first = UnixStream::connect(path).await.map_err(|e| unreachable(path, &e))?;
    let (path, first) = (path.to_owned(), Arc::new(Mutex::new(Some(first))));
    let connect = tower::service_fn(move |_: Uri| {
        let (path, first) = (path.clone(), Arc::clone(&first));
        async move {
            let stream = match first.lock().await.take() {
                Some(stream) => stream,
                None => UnixStream::connect(path).await?,
            };
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    let endpoint = Endpoint::from_static("http://agent.invalid");
    endpoint.connect_with_connector(connect).await.context("what listens at the socket does not speak gRPC")
}

/// Why nobody can be reached at a socket, and what to do.
fn unreachable(path: &Path, error: &std::io::Error) -> anyhow::Error {
    let path = path.display();
    let root = rustix::process::geteuid().is_root();
    match error.kind() {
        ErrorKind::PermissionDenied if !root => {
            anyhow::anyhow!(
                "{path}: permission denied; the agent's socket is root's: run as root (try: sudo moxlet …)"
            )
        }
        ErrorKind::NotFound => anyhow::anyhow!(
            "{path} does not exist: start the agent (`moxlet up` or `moxlet agent`), or name its socket with --socket or {VARIABLE}"
        ),
        ErrorKind::ConnectionRefused => anyhow::anyhow!(
            "no agent answers at {path}: it was stopped; start it (`moxlet up` or `moxlet agent`)"
        ),
        _ => anyhow::anyhow!("cannot connect to {path}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn a_socket_that_cannot_be_reached_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let error = connect(&path).await.unwrap_err().to_string();
        assert!(error.contains("does not exist") && error.contains("agent.sock"), "{error}");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let error = connect(&path).await.unwrap_err().to_string();
        assert!(error.contains("it was stopped"), "{error}");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        assert!(connect(&path).await.is_err());
    }

    #[test]
    fn without_root_a_denied_socket_is_no_missing_agent() {
        let denied = unreachable(Path::new("/run/x"), &ErrorKind::PermissionDenied.into()).to_string();
        assert!(denied.to_lowercase().contains("permission denied"), "{denied}");
    }
}
