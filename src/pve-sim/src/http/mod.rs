//! The HTTPS server of one host: connections, requests as pveproxy takes them, answers as it gives them.

mod answering;
mod body;
mod loosen;
mod pass;
mod request;

use std::{net::SocketAddr, sync::Arc, time::Duration};

pub(crate) use body::Body;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{Error, Result, sim::Sim, tls::HostTls};

/// How long a connection may take for its TLS handshake.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a connection may be without a request, as pveproxy has it (`PVE::APIServer::AnyEvent`).
const IDLE: Duration = Duration::from_secs(5);

/// One host's server.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    pub(crate) sim: Arc<Sim>,
    /// The host that it is.
    pub(crate) host: String,
    pub(crate) tls: Arc<HostTls>,
    pub(crate) stop: CancellationToken,
}

/// The connection is closed without an answer.
#[derive(Debug, thiserror::Error)]
#[error("the connection is dropped")]
pub(crate) struct Dropped;

impl Server {
    /// Listens.
    pub(crate) async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr)> {
        let listener =
            TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })?;
        let address = listener.local_addr().map_err(|source| Error::Listen { address, source })?;
        Ok((listener, address))
    }

    /// Serves until stopped; every connection is a task of the tracker.
    pub(crate) async fn serve(self, listener: TcpListener, tracker: TaskTracker) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.stop.cancelled() => return,
            };
            match accepted {
                Ok((stream, _)) => {
                    let server = self.clone();
                    tracker.spawn(async move {
                        let stop = server.stop.clone();
                        tokio::select! {
                            () = server.connection(stream) => {}
                            () = stop.cancelled() => {}
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    async fn connection(self, stream: TcpStream) {
        if self.sim.faults.is_offline(&self.host) {
            return;
        }
        let _ = stream.set_nodelay(true);
        let acceptor = TlsAcceptor::from(self.tls.config());
        let stream = match tokio::time::timeout(PATIENCE, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake"),
            Err(_) => return,
        };
        let service = service_fn(|request| answering::answer(self.clone(), request));
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE)
            .title_case_headers(true)
            .serve_connection(TokioIo::new(stream), service)
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "connection");
        }
    }
}
