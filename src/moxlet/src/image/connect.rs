//! The store that a command works on: an agent's, or one that this process opens. Either way it is spoken to by the same
//! service, in the second case within the process.

use std::{
    path::Path,
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use moxlet_agent::ImageStoreService;
use moxlet_cri::host::{image_store_client::ImageStoreClient, image_store_server::ImageStoreServer};
use moxlet_image::{ImageStore, Place, ZfsConfig, dataset_dir};
use tokio::task::JoinHandle;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint, Server, Uri},
};

use super::args::{RegistryArgs, StorageKind, StoreArgs};
use crate::socket;

/// Where the datasets of a store without an agent are mounted.
const ZFS_RUN_DIR: &str = "/run/moxlet-image";
/// The largest message either way, in bytes.
const MAX_MESSAGE: usize = 32 << 20;
/// Bytes on their way within the process.
const PIPE: usize = 1 << 20;

/// A store to work on.
pub(crate) struct Connection {
    pub(crate) client: ImageStoreClient<Channel>,
    own: Option<Own>,
    /// What it is, for errors.
    place: String,
}

/// A store that this process has opened.
struct Own {
    serving: JoinHandle<()>,
    store: Arc<ImageStore>,
}

impl Connection {
    /// Reaches the agent, or opens the store. Only a command that brings images makes a store that is not there.
    pub(crate) async fn open(
        args: &StoreArgs,
        registry: Option<&RegistryArgs>,
        images: &[String],
        may_make: bool,
    ) -> Result<Self> {
        args.check(registry)?;
        match &args.store {
            Some(dir) => {
                if !may_make {
                    must_be_there(args.storage(), dir)?;
                }
                Self::own(args.storage(), dir, registry, images).await
            }
            None => {
                let path = args.socket.path()?;
                let channel = socket::connect(&path).await?;
                Ok(Self {
                    client: client(channel),
                    own: None,
                    place: format!("the agent at {}", path.display()),
                })
            }
        }
    }

    async fn own(
        kind: StorageKind,
        dir: &Path,
        registry: Option<&RegistryArgs>,
        images: &[String],
    ) -> Result<Self> {
        need_root()?;
        let place = format!("the store {}", dir.display());
        let mut config = moxlet_image::Config::default();
        if let Some(args) = registry {
            config.registry_config_dir.clone_from(&args.hosts_dir);
            if args.plain_http {
                let hosts =
                    images.iter().map(|i| Ok(moxlet_image::Reference::parse(i)?.registry().to_owned()));
                config.plain_http_hosts = hosts.collect::<Result<_>>()?;
            }
        }
        let open =
            async { location(kind, dir)?.open().await?.images(config).await.map_err(anyhow::Error::from) };
        let store = open.await.with_context(|| format!("cannot open {place}"))?;
        let (ours, theirs) = tokio::io::duplex(PIPE);
        let service = ImageStoreServer::new(ImageStoreService::new(Arc::clone(&store)))
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        let serving = tokio::spawn(async move {
            let one = futures::stream::iter([Ok::<_, std::io::Error>(theirs)]);
            if let Err(error) = Server::builder().add_service(service).serve_with_incoming(one).await {
                tracing::error!(%error, "the store's service failed");
            }
        });
        let ours = Mutex::new(Some(ours));
        let connect = tower::service_fn(move |_: Uri| {
            let stream = ours.lock().ok().and_then(|mut s| s.take());
            async move { stream.map(TokioIo::new).ok_or_else(|| std::io::Error::other("the store is closed")) }
        });
        let channel = Endpoint::from_static("http://store.invalid").connect_with_connector(connect).await?;
        Ok(Self { client: client(channel), own: Some(Own { serving, store }), place })
    }

    /// Closes the store, if it is our own.
    pub(crate) async fn close(self) -> Result<()> {
        let Self { client, own, .. } = self;
        drop(client);
        if let Some(Own { serving, store }) = own {
            serving.await.context("the store's service failed")?;
            store.close().await?;
        }
        Ok(())
    }

    /// A failed call in words for the person at the terminal.
    pub(crate) fn failed(&self, status: &Status) -> anyhow::Error {
        match status.code() {
            Code::Unimplemented => {
                anyhow::anyhow!(
                    "{} does not know this command: is it of an older version? ({})",
                    self.place,
                    status.message()
                )
            }
            Code::Unavailable => anyhow::anyhow!("{} went away: {}", self.place, status.message()),
            _ => anyhow::anyhow!("{}", status.message().trim_start_matches("RegistryUnavailable: ")),
        }
    }
}

/// Where a store is that the command line names.
fn location(kind: StorageKind, store: &Path) -> Result<Place> {
    Ok(match kind {
        StorageKind::Overlay => Place::Overlay(std::path::absolute(store)?),
        StorageKind::Zfs => Place::Zfs(zfs_config(store.to_str().context("it is no dataset")?)),
    })
}

/// A mistyped directory must not become an empty store. A dataset is made where its parent exists, as by `zfs_dataset`.
fn must_be_there(kind: StorageKind, store: &Path) -> Result<()> {
    let (found, what) = match kind {
        StorageKind::Overlay => (store.join("images").try_exists(), "directory"),
        StorageKind::Zfs => return Ok(()),
    };
    match found {
        Ok(true) => Ok(()),
        Ok(false) => bail!(
            "there is no store in the {what} {}: `moxlet image pull` and `moxlet image import` make one",
            store.display()
        ),
        Err(e) => Err(e).with_context(|| format!("cannot look at the {what} {}", store.display())),
    }
}

/// How a store on a dataset is opened.
pub(super) fn zfs_config(dataset: &str) -> ZfsConfig {
    let run_dir = Path::new(ZFS_RUN_DIR).join(dataset_dir(dataset));
    ZfsConfig { dataset: dataset.to_owned(), run_dir, ids: None }
}

/// Stores are opened by root alone.
pub(super) fn need_root() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("a store is opened as root: layers have owners and devices (try: sudo moxlet image …)");
    }
    Ok(())
}

fn client(channel: Channel) -> ImageStoreClient<Channel> {
    ImageStoreClient::new(channel).max_decoding_message_size(MAX_MESSAGE)
}
