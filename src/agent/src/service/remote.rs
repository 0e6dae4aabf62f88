//! The agent's port for a node on another machine: TLS in which each side proves itself, and behind it the same services as on the
//! sockets. Which one a connection is for is said in the handshake (see [`moxlet_cri::link`]).

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use moxlet_cri::link::{Accepted, Acceptor, Protocol};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::sleep,
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tracing::{info, warn};

use super::{Service, router};
use crate::{
    config::LinkSettings,
    error::{Error, Result},
    streaming::Streaming,
};

/// Connections that shake hands at one time; what comes from strangers is bounded by it.
const MAX_HANDSHAKES: usize = 64;
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
    let acceptor = Acceptor::new(link.files.clone())?;
    let listener = listen(link.listen).await?;
    let (core, streaming) = (service.core.clone(), service.streaming.clone());
    let (to_grpc, connections) = mpsc::channel(1);
    let (served, stop) = (router(service, Some(KEEP_ALIVE)), core.stop.clone());
    core.tasks.spawn(async move {
        let connections = ReceiverStream::new(connections).map(Ok::<_, io::Error>);
        if let Err(error) = served.serve_with_incoming_shutdown(connections, stop.cancelled()).await {
            tracing::error!(%error, "the services on the agent's port failed");
        }
    });
    core.tasks.spawn(accept(listener, Arc::new(acceptor), streaming, to_grpc));
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

/// Takes connections; none waits for another's handshake.
async fn accept(
    listener: TcpListener,
    acceptor: Arc<Acceptor>,
    streaming: Arc<Streaming>,
    to_grpc: mpsc::Sender<tokio_rustls::server::TlsStream<TcpStream>>,
) {
    let core = streaming.core().clone();
    let (handshakes, streams) =
        (Arc::new(Semaphore::new(MAX_HANDSHAKES)), Arc::new(Semaphore::new(MAX_STREAMS)));
    loop {
        let Ok(turn) = handshakes.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            () = core.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "the agent's port cannot accept a connection");
                sleep(PAUSE).await;
                continue;
            }
        };
        let (acceptor, streaming, streams) = (acceptor.clone(), streaming.clone(), streams.clone());
        let (to_grpc, stop) = (to_grpc.clone(), core.stop.clone());
        core.tasks.spawn(async move {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = acceptor.accept(stream) => accepted,
            };
            drop(turn);
            match accepted {
                Ok(Accepted { protocol: Protocol::Grpc, stream }) => drop(to_grpc.send(stream).await),
                Ok(Accepted { protocol: Protocol::Streams, stream }) => {
                    let Ok(_slot) = streams.acquire().await else { return };
                    streaming.serve_connection(stream).await;
                }
                Err(error) => warn!(%error, "a connection to the agent's port is refused"),
            }
        });
    }
}
