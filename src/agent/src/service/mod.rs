//! The gRPC services of an agent, on its unix socket and on a port for a node elsewhere: CRI's RuntimeService and ImageService, and
//! `moxlet.host.v1`.
//!
//! A file a service; each method checks its request and calls the part that does the work.

mod callers;
mod conditions;
mod host;
mod images;
mod info;
mod remote;
mod runtime;
mod store;

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, stream};
use moxlet_cri::{
    host::{host_service_server::HostServiceServer, image_store_server::ImageStoreServer},
    v1::{image_service_server::ImageServiceServer, runtime_service_server::RuntimeServiceServer},
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{
    Response, Status,
    transport::{Server, server::Router},
};
use tracing::{error, info};

use crate::{
    error::Result,
    rooms::Rooms,
    streaming::{Streaming, listen_unix},
};

pub use store::ImageStoreService;

/// The largest request that is read, in bytes: a volume's files are at most half of it.
const MAX_REQUEST: usize = 16 << 20;
/// Items of a chunk of CRI's `Stream…` lists.
const CHUNK: usize = 64;

/// What CRI's services and the host service know.
#[derive(Clone)]
pub(crate) struct Service {
    rooms: Rooms,
    streaming: Arc<Streaming>,
}

/// An answer in parts.
type Parts<T> = Pin<Box<dyn Stream<Item = std::result::Result<T, Status>> + Send>>;

/// A list as CRI streams it: chunks, at least one.
fn in_chunks<I, T>(mut items: Vec<I>, wrap: impl Fn(Vec<I>) -> T) -> Response<Parts<T>>
where
    T: Send + 'static,
{
    let mut parts = Vec::new();
    loop {
        let rest = items.split_off(items.len().min(CHUNK));
        parts.push(Ok(wrap(items)));
        if rest.is_empty() {
            break;
        }
        items = rest;
    }
    Response::new(Box::pin(stream::iter(parts)))
}

/// Whether all labels of a selector are there.
fn selected<'a>(
    selector: &std::collections::HashMap<String, String>,
    mut label: impl FnMut(&str) -> Option<&'a String>,
) -> bool {
    selector.iter().all(|(key, value)| label(key) == Some(value))
}

/// The services; `keep_alive` is how often a client that says nothing is asked whether it is there.
fn router(service: Service, keep_alive: Option<Duration>) -> Router {
    Server::builder()
        .http2_keepalive_interval(keep_alive)
        .http2_keepalive_timeout(keep_alive.map(|k| k / 2))
        .add_service(RuntimeServiceServer::new(service.clone()).max_decoding_message_size(MAX_REQUEST))
        .add_service(ImageServiceServer::new(service.clone()).max_decoding_message_size(MAX_REQUEST))
        .add_service(
            ImageStoreServer::new(ImageStoreService::new(service.rooms.images.clone()))
                .max_decoding_message_size(MAX_REQUEST),
        )
        .add_service(HostServiceServer::new(service).max_decoding_message_size(MAX_REQUEST))
}

/// Serves until the agent stops.
///
/// # Errors
/// The socket cannot be made, or the port for a node elsewhere cannot be served.
pub(crate) async fn serve(rooms: &Rooms, streaming: Arc<Streaming>) -> Result<()> {
    let path = rooms.config.cri_socket.clone();
    let listener = listen_unix(&path)?;
    let service = Service { rooms: rooms.clone(), streaming };
    if let Some(link) = &rooms.config.link {
        remote::serve(service.clone(), link).await?;
    }
    let stop = rooms.tasks.stop.clone();
    rooms.tasks.spawn(async move {
        let served = router(service, None);
        // Streams (logs, events) end by the same token, so that nobody is waited for.
        let served = served.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled());
        if let Err(error) = served.await {
            error!(%error, "the CRI socket failed");
        }
        let _ = std::fs::remove_file(&path);
    });
    info!(socket = %rooms.config.cri_socket.display(), "CRI is served");
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use futures::StreamExt;

    use super::*;

    #[tokio::test]
    async fn a_list_comes_in_chunks_and_an_empty_one_as_one() {
        let count = async |n: usize| {
            in_chunks(vec![0; n], |c| c.len()).into_inner().map(|c| c.unwrap()).collect::<Vec<_>>().await
        };
        assert_eq!(count(0).await, [0]);
        assert_eq!(count(64).await, [64]);
        assert_eq!(count(130).await, [64, 64, 2]);
    }
}
