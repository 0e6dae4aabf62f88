//! The agent's port for a node on another machine: TLS in which each side proves itself, and behind it the same services as on the
//! sockets. Which one a connection is for is said in the handshake (see [`moxlet_cri::link`]).

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use moxlet_cri::link::{Accepted, Acceptor, Protocol};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::sleep,
};
use tokio_rustls::server::TlsStream;
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tracing::{debug, info, warn};

use super::{
    Service,
    callers::{Callers, Turn},
    router,
};
use crate::{
    config::LinkSettings,
    error::{Error, Result},
    streaming::{Streaming, serve_connection},
    tasks::blocking,
};

/// Streaming connections at one time that are not upgraded yet.
const MAX_STREAMS: usize = 256;
/// A node that is gone without a word is noticed after this and half of it again.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// After a failed accept: usually no file descriptor is left.
const PAUSE: Duration = Duration::from_millis(50);

/// Serves until the agent stops.
///
/// # Errors
/// The certificates cannot be used, or the address is taken or not this host's.
pub(super) async fn serve(service: Service, link: &LinkSettings) -> Result<()> {
    let files = link.files.clone();
    let acceptor = blocking(move || Ok(Acceptor::new(files)?)).await?;
    let listener = listen(link.listen).await?;
    let (tasks, streaming) = (service.rooms.tasks.clone(), service.streaming.clone());
    let (to_grpc, connections) = mpsc::channel(1);
    let (served, stop) = (router(service, Some(KEEP_ALIVE)), tasks.stop.clone());
    tasks.spawn(async move {
        let connections = ReceiverStream::new(connections).map(Ok::<_, io::Error>);
        if let Err(error) = served.serve_with_incoming_shutdown(connections, stop.cancelled()).await {
            tracing::error!(%error, "the services on the agent's port failed");
        }
    });
    let (callers, streams) = (Arc::default(), Semaphore::new(MAX_STREAMS));
    tasks.spawn(accept(listener, Port { acceptor, callers, streaming, streams, to_grpc }));
    info!(address = %link.listen, "a node on another machine is served");
    Ok(())
}

async fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|e| {
        Error::io(
            format!(
                "the agent cannot listen on {address} (agent_listen); end what listens there (`ss -ltnp` names it), or \
                 choose another address"
            ),
            e,
        )
    })
}

/// Takes connections, all of them: none waits for another's handshake, and who has too many under way is hung up on.
async fn accept(listener: TcpListener, port: Port) {
    let tasks = port.streaming.tasks().clone();
    let port = Arc::new(port);
    loop {
        let accepted = tokio::select! {
            () = tasks.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                if let Some(turn) = port.callers.begin(peer.ip()) {
                    tasks.spawn(port.clone().connection(stream, peer, turn));
                }
            }
            Err(error) => {
                warn!(%error, "the agent's port cannot accept a connection");
                sleep(PAUSE).await;
            }
        }
    }
}

/// What connections have in common.
struct Port {
    acceptor: Acceptor,
    callers: Arc<Callers>,
    streaming: Arc<Streaming>,
    streams: Semaphore,
    to_grpc: mpsc::Sender<TlsStream<TcpStream>>,
}

impl Port {
    /// Shakes hands and passes the connection on to what it is for.
    async fn connection(self: Arc<Self>, stream: TcpStream, peer: SocketAddr, turn: Turn) {
        let stop = self.streaming.tasks().stop.clone();
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = self.acceptor.accept(stream) => accepted,
        };
        drop(turn);
        match accepted {
            Ok(Accepted { protocol: Protocol::Grpc, stream }) => drop(self.to_grpc.send(stream).await),
            Ok(Accepted { protocol: Protocol::Streams, stream }) => {
                let Ok(_slot) = self.streams.acquire().await else { return };
                serve_connection(self.streaming.clone(), stream).await;
            }
            Err(error) if self.callers.logs(peer.ip(), Instant::now()) => {
                warn!(%error, "a connection to the agent's port is refused");
            }
            Err(error) => debug!(%error, "a connection to the agent's port is refused"),
        }
    }
}
