//! The API's listener: TLS with the certificate of the moment, the caller's certificate if it has one, and a bound on the
//! number of connections and on how long a client may take to say what it wants.

use std::{sync::Arc, time::Duration};

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use rustls::{ServerConfig, crypto::ring, server::WebPkiClientVerifier};
use tokio::{net::TcpListener, net::TcpStream, sync::Semaphore, time::timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

use super::{
    auth::{User, user_from_certificate},
    head::{self, Rewound},
};
use crate::{Error, Result, identity::Identity};

/// Connections at one time, upgraded ones apart.
const MAX_CONNECTIONS: usize = 1024;
/// How long a handshake, or the head of a request, may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The largest head of a request in bytes: a command of some length is in its path.
const MAX_HEAD: usize = 1 << 20;
/// After a failed accept: usually no file descriptor is left.
const PAUSE: Duration = Duration::from_millis(50);
/// How long requests may go on once the node stops.
const AT_THE_END: Duration = Duration::from_secs(2);

/// TLS as the kubelet does it: a certificate of the caller is asked for and not demanded.
///
/// # Errors
/// A CA of the callers that cannot be used.
pub(super) fn acceptor(identity: &Identity) -> Result<TlsAcceptor> {
    let failed = |reason: String| Error::Certificate { what: "serve TLS", reason };
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| failed(e.to_string()))?;
    let builder = match identity.client_ca() {
        Some(roots) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                .allow_unauthenticated()
                .build()
                .map_err(|e| failed(format!("the CA of the callers: {e}")))?;
            builder.with_client_cert_verifier(verifier)
        }
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(identity.serving());
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Accepts until the token is cancelled; requests that run then get a moment to end.
pub(super) async fn serve(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    routes: Router,
    tasks: TaskTracker,
    stop: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let (acceptor, routes, stop) = (acceptor.clone(), routes.clone(), stop.clone());
                tasks.spawn(async move {
                    if let Err(error) = connection(stream, &acceptor, routes, &stop).await {
                        debug!(%peer, error, "a connection to the kubelet API ended");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                warn!(%error, "the kubelet API cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn connection(
    stream: TcpStream,
    acceptor: &TlsAcceptor,
    routes: Router,
    stop: &CancellationToken,
) -> std::result::Result<(), String> {
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    let handshake = timeout(PATIENCE, acceptor.accept(stream)).await;
    let stream =
        handshake.map_err(|_| "the TLS handshake took too long".to_owned())?.map_err(|e| e.to_string())?;
    let caller: Option<User> = match stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()) {
        Some(certificate) => {
            let user = user_from_certificate(certificate);
            Some(user.ok_or("the client certificate names nobody")?)
        }
        None => None,
    };
    let mut stream = stream;
    let (head, query) = timeout(PATIENCE, head::read(&mut stream))
        .await
        .map_err(|_| "the head of a request took too long".to_owned())?
        .map_err(|e| e.to_string())?;
    let stream = Rewound::new(head, stream);
    let service = TowerToHyperService::new(routes.layer(Extension(caller)).layer(Extension(query)));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut served = std::pin::pin!(served);
    tokio::select! {
        done = served.as_mut() => return done.map_err(|e| e.to_string()),
        () = stop.cancelled() => {}
    }
    served.as_mut().graceful_shutdown();
    // A log that is followed would never end.
    let _ = timeout(AT_THE_END, served).await;
    Ok(())
}
