//! The store that a command works on: an agent's, or one that this process opens. Either way it is spoken to by the same
//! service, in the second case within the process.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use moxlet_agent::ImageStoreService;
use moxlet_cri::host::{image_store_client::ImageStoreClient, image_store_server::ImageStoreServer};
use moxlet_image::{DirLock, ImageStore};
use moxlet_storage::{Driver, OverlayDriver, ZfsConfig, ZfsDriver};
use tokio::task::JoinHandle;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint, Server, Uri},
};

use super::args::{PlaceArgs, RegistryArgs, StorageKind};

/// Where an agent's socket is if nobody says.
const SOCKETS: [&str; 2] = ["/run/moxlet/agent.sock", "/var/lib/moxlet/run/agent.sock"];
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
    driver: Arc<dyn Driver>,
}

impl Connection {
    /// Reaches the agent, or opens the store.
    pub(crate) async fn open(
        place: &PlaceArgs,
        registry: Option<&RegistryArgs>,
        images: &[String],
    ) -> Result<Self> {
        match &place.store {
            Some(dir) => Self::own(place.storage, dir, registry, images).await,
            None => Self::agent(&socket(place)?).await,
        }
    }

    async fn agent(path: &Path) -> Result<Self> {
        let (path, shown) = (path.to_owned(), path.display().to_string());
        let connect = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let channel =
            Endpoint::from_static("http://agent.invalid").connect_with_connector(connect).await.with_context(|| {
                format!("no agent answers at {shown}: start it (`moxlet up` or `moxlet agent`), or name its socket with --socket")
            })?;
        Ok(Self { client: client(channel), own: None, place: format!("the agent at {shown}") })
    }

    async fn own(
        kind: StorageKind,
        dir: &Path,
        registry: Option<&RegistryArgs>,
        images: &[String],
    ) -> Result<Self> {
        need_root()?;
        let (driver, records, lock, place) = layers(kind, dir).await?;
        let mut config = moxlet_image::Config { dir: records, ..moxlet_image::Config::default() };
        if let Some(args) = registry {
            config.registry_config_dir.clone_from(&args.hosts_dir);
            if args.plain_http {
                let hosts =
                    images.iter().map(|i| Ok(moxlet_image::Reference::parse(i)?.registry().to_owned()));
                config.plain_http_hosts = hosts.collect::<Result<_>>()?;
            }
        }
        let store = ImageStore::open_locked(config, driver.clone(), lock).await?;
        let (ours, theirs) = tokio::io::duplex(PIPE);
        let service = ImageStoreServer::new(ImageStoreService::new(store))
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
        Ok(Self { client: client(channel), own: Some(Own { serving, driver }), place })
    }

    /// Closes the store, if it is our own.
    pub(crate) async fn close(self) -> Result<()> {
        let Self { client, own, .. } = self;
        drop(client);
        if let Some(Own { serving, driver }) = own {
            serving.await.context("the store's service failed")?;
            driver.close().await?;
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

/// Opens the layers of a store; where its records are, with the lock of that place, and what it is.
async fn layers(kind: StorageKind, store: &Path) -> Result<(Arc<dyn Driver>, PathBuf, DirLock, String)> {
    let place = format!("the store {}", store.display());
    let context = || format!("cannot open the layers of {place}");
    match kind {
        StorageKind::Overlay => {
            let dir = std::path::absolute(store).with_context(context)?;
            let records = dir.join("images");
            let at = records.clone();
            // First: a driver that is opened removes what another process may be making.
            let lock = tokio::task::spawn_blocking(move || DirLock::take(&at)).await??;
            let driver = OverlayDriver::open(&dir.join("storage")).await.with_context(context)?;
            Ok((Arc::new(driver), records, lock, place))
        }
        StorageKind::Zfs => {
            let dataset = store.to_str().with_context(|| format!("{place} is no dataset"))?.to_owned();
            let lock = lock_dataset(&dataset).await?;
            let config = zfs_config(&dataset);
            let driver = ZfsDriver::open(config).await.with_context(context)?;
            let records = driver.state_dir().join("images");
            Ok((Arc::new(driver), records, lock, place))
        }
    }
}

/// The lock of a store on a dataset.
pub(super) async fn lock_dataset(dataset: &str) -> Result<DirLock> {
    let name = dataset.to_owned();
    Ok(tokio::task::spawn_blocking(move || DirLock::of_dataset(&name)).await??)
}

/// How a store on a dataset is opened.
pub(super) fn zfs_config(dataset: &str) -> ZfsConfig {
    let run_dir = Path::new(ZFS_RUN_DIR).join(dataset.replace('/', "_"));
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

fn socket(place: &PlaceArgs) -> Result<PathBuf> {
    if let Some(path) = &place.socket {
        return Ok(path.clone());
    }
    let found = SOCKETS.iter().map(PathBuf::from).find(|p| p.exists());
    found.with_context(|| {
        format!(
            "no agent runs here (there is neither {}): start it, name its socket with --socket, or use a store of your \
             own with --store",
            SOCKETS.join(" nor ")
        )
    })
}
