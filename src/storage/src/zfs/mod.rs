//! The ZFS driver: a snapshot for each layer, a clone for each container.
//!
//! ```text
//! <dataset>/layers/<hex of the chain ID>            a layer with all below it, a clone of its parent; snapshot @layer,
//!                                                   and @layer-1 and on of the same where many roots are cloned from it
//! <dataset>/shifted/<base>-<size>/<hex>             the same with the ids of a map; only where idmapped mounts are unknown
//! <dataset>/roots/<container id>                    a clone of the top layer (or of its shifted copy), with refquota
//! <dataset>/drafts/<unique>                         what is being made or is still busy; emptied by open
//! <dataset>/state                                   what others keep with the store; mounted at <run_dir>/state
//! <run_dir>/{drafts,views,state}/                   mount points
//! <run_dir>/commands.lock                           held by each program that runs
//! ```
//!
//! All datasets have a legacy mount point and are mounted by us alone. What they are is said by user properties
//! (`dev.moxlet:*`); one without our mark is never touched. Every step that counts is one ZFS operation, which is whole or
//! not at all: a clone with its properties, a rename into place, a destroy. [`ZfsDriver::open`] removes what lies between.
//!
//! | room | what it does |
//! |---|---|
//! | `cli` | the `zfs` program |
//! | `health` | whether the pool answers |
//! | `names` | names and properties of datasets |
//! | `index` | what is here, in memory |
//! | `open` | from what is on disk to the index |
//! | `layers`, `roots` | their lives |
//! | `shift` | trees with other ids, for want of idmapped mounts |
//! | `attach` | mounting, without programs |
//! | `transfer` | layers to another pool |

mod attach;
mod cli;
mod health;
mod index;
mod layers;
mod names;
mod open;
mod roots;
mod shift;
mod transfer;

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::Duration,
};

use async_trait::async_trait;
use moxlet_ids::{ChainId, ContainerId};

use crate::{
    Driver, FsUsage, LayerDraft, LayerView, RootOptions, TakenLayer, Usage, WhiteoutStyle,
    error::{Attempt, Error, Result},
    mounts, tree,
};
pub use attach::mount_dataset;
use cli::Cli;
use index::Index;
use names::{Kind, Snapshot};

/// Where the ids of a container's root are shifted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdStyle {
    /// At the mount: the root is a clone of the layer itself.
    Idmapped,
    /// On disk: the root is a clone of a copy of the layer whose ids were changed once for each map.
    Shifted,
}

/// How a store is set up.
#[derive(Debug, Clone)]
pub struct ZfsConfig {
    /// The store's dataset, such as `rpool/moxlet`. It is made if missing; the one above it must be there.
    pub dataset: String,
    /// A directory for mount points; made if missing.
    pub run_dir: PathBuf,
    /// Where ids are shifted; without, whatever kernel and OpenZFS can do.
    pub ids: Option<IdStyle>,
}

/// Layers and roots on ZFS.
#[derive(Debug, Clone)]
pub struct ZfsDriver {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    cli: Cli,
    dataset: String,
    run_dir: PathBuf,
    ids: IdStyle,
    namespaces: attach::Namespaces,
    index: Mutex<Index>,
    turns: Turns,
}

/// How often and with which pause a busy dataset is tried again.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(20);

impl ZfsDriver {
    /// Opens the store on a dataset and brings what a crash left half-made to an end.
    ///
    /// # Errors
    /// A dataset that cannot hold a store, one in its place that is not ours, a record of a newer version, or what ZFS and
    /// the system say.
    pub async fn open(config: ZfsConfig) -> Result<Self> {
        Self::open_at(config, open::Missing::IsMade).await
    }

    /// The same for a store that has to be there already.
    ///
    /// # Errors
    /// As [`Self::open`], or [`Error::NoStore`].
    pub async fn open_existing(config: ZfsConfig) -> Result<Self> {
        Self::open_at(config, open::Missing::IsRefused).await
    }

    async fn open_at(config: ZfsConfig, missing: open::Missing) -> Result<Self> {
        let dataset = config.dataset.clone();
        let caller = Caller::default();
        let waits = caller.waits();
        let opened = blocking(move || open::open(config, missing, &waits));
        let inner = health::unless_stalled(&[&dataset], "open the store", opened).await?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// A directory on a dataset of the store, for records that belong to it: they travel with the pool.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.inner.state_dir()
    }

    /// Where the ids of new roots are shifted.
    #[must_use]
    pub fn id_style(&self) -> IdStyle {
        self.inner.ids
    }

    /// How many `zfs` programs this driver has run.
    #[must_use]
    pub fn commands_run(&self) -> u64 {
        self.inner.cli.runs()
    }

    /// Brings layers, in whatever order they are named, to another store, usually on another pool, which shares there what is
    /// shared here. Those that are there already are left alone, so that it can be run again after an interruption. Returns
    /// those it has brought.
    ///
    /// # Errors
    /// What ZFS says; the layers that came before the failure are there. A layer goes only with or after its parent.
    pub async fn copy_layers_to(&self, other: &Self, layers: &[ChainId]) -> Result<Vec<ChainId>> {
        let (inner, other, layers) = (Arc::clone(&self.inner), Arc::clone(&other.inner), layers.to_vec());
        let datasets = [inner.dataset.clone(), other.dataset.clone()];
        let copied = blocking(move || transfer::copy(&inner, &other, &layers));
        health::unless_stalled(&[&datasets[0], &datasets[1]], "copy layers", copied).await
    }

    /// Works on the store; `what` is said of it where the pool hangs.
    async fn run<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce(&Arc<Inner>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(&self.inner);
        health::unless_stalled(&[&self.inner.dataset], what, blocking(move || work(&inner))).await
    }
}

/// Somebody who waits for work that cannot be ended.
#[derive(Default)]
struct Caller(Arc<()>);

/// Whether the caller waits still.
struct Waits(Weak<()>);

impl Caller {
    fn waits(&self) -> Waits {
        Waits(Arc::downgrade(&self.0))
    }
}

impl Waits {
    fn still(&self) -> bool {
        self.0.strong_count() > 0
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Stopped)?
}

impl Inner {
    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_dir(&self) -> PathBuf {
        self.run_dir.join("state")
    }

    /// The full name of a dataset of ours.
    fn name(&self, kind: &Kind) -> String {
        match kind {
            Kind::Top => self.dataset.clone(),
            other => format!("{}/{}", self.dataset, other.path()),
        }
    }

    fn layer_snapshot(&self, chain: &ChainId) -> String {
        Snapshot::FIRST.of(&self.name(&Kind::Layer(chain.clone())))
    }

    /// Destroys a dataset, with our own snapshots of it if it has any. One that is gone is destroyed already.
    fn destroy(&self, dataset: &str) -> Result<()> {
        match self.destroy_one(dataset) {
            Err(Error::DatasetHasDependents(_)) => {}
            done => return done,
        }
        self.destroy_snapshots(dataset)?;
        self.destroy_one(dataset)
    }

    /// Destroys our own snapshots of a dataset: all of them, or none where one has a clone or is mounted, or where the dataset
    /// has something that is not ours.
    fn destroy_snapshots(&self, dataset: &str) -> Result<()> {
        let args = ["list", "-H", "-t", "all", "-d", "1", "-r", "-o", "name", dataset];
        let rows = match self.cli.table(&args) {
            Err(Error::NoSuchDataset(_)) => return Ok(()),
            rows => rows?,
        };
        let mut ours = Vec::new();
        for name in rows.iter().filter_map(|row| row.first()).filter(|name| *name != dataset) {
            let snapshot = name.strip_prefix(dataset).and_then(|rest| rest.strip_prefix('@'));
            match snapshot.and_then(Snapshot::of_name) {
                Some(snapshot) => ours.push(snapshot.to_string()),
                None => {
                    let what = "what it belongs to cannot be removed";
                    return Err(Error::Foreign { dataset: name.clone(), what });
                }
            }
        }
        // All of them or none: ZFS takes a list.
        if ours.is_empty() {
            return Ok(());
        }
        self.destroy_one(&format!("{dataset}@{}", ours.join(",")))
    }

    /// Destroys a dataset without snapshots whose place is needed. One in which somebody still has a file open goes out of
    /// sight, and is destroyed when it can be; `below` is the layer that it stands on until then.
    fn discard(&self, dataset: &str, below: Option<ChainId>) -> Result<()> {
        match self.destroy_one(dataset) {
            Err(Error::DatasetBusy(..)) => {}
            done => return done,
        }
        self.set_aside(dataset, below)
    }

    /// Takes a busy dataset out of sight.
    fn set_aside(&self, dataset: &str, below: Option<ChainId>) -> Result<()> {
        let aside = tree::unique(Path::new("drafts"), "gone");
        let aside = format!("{}/{}", self.dataset, aside.display());
        self.cli.zfs(&["rename", dataset, &aside])?;
        tracing::info!(dataset, aside, "what was removed is still busy and goes later");
        self.index().gone.insert(aside, below);
        Ok(())
    }

    /// Destroys a dataset or snapshot that nothing depends on; a busy one is tried again for a while.
    fn destroy_one(&self, dataset: &str) -> Result<()> {
        let mut pause = PAUSE;
        for _ in 0..TRIES {
            match self.cli.zfs(&["destroy", dataset]) {
                Err(Error::DatasetBusy(..)) => {
                    thread::sleep(pause);
                    pause *= 2;
                }
                Err(Error::NoSuchDataset(_)) => return Ok(()),
                done => return done.map(drop),
            }
        }
        match self.cli.zfs(&["destroy", dataset]) {
            Err(Error::NoSuchDataset(_)) => Ok(()),
            done => done.map(drop),
        }
    }

    fn usage(&self, datasets: &[Kind]) -> Result<u64> {
        let names: Vec<String> = datasets.iter().map(|k| self.name(k)).collect();
        let mut args = vec!["list", "-H", "-p", "-o", "used"];
        args.extend(names.iter().map(String::as_str));
        let mut sum = 0_u64;
        for row in self.cli.table(&args)? {
            sum = sum.saturating_add(number(&row, 0, &args)?);
        }
        Ok(sum)
    }

    /// Its clones of other layers have what they changed counted as their own.
    fn layer_usage(&self, chain: &ChainId) -> Result<Usage> {
        let Some(inodes) = self.index().layers.get(chain).map(|l| l.inodes) else {
            return Ok(Usage::default());
        };
        Ok(Usage { bytes: self.usage(&[Kind::Layer(chain.clone())])?, inodes })
    }

    fn layers_usage(&self) -> Result<Usage> {
        let bytes = self.usage(&[Kind::Group("layers".into()), Kind::Group("shifted".into())])?;
        let inodes = self.index().layers.values().fold(0_u64, |sum, l| sum.saturating_add(l.inodes));
        Ok(Usage { bytes, inodes })
    }

    /// Of the whole pool, or of what a quota leaves of it.
    fn fs_usage(&self) -> Result<FsUsage> {
        let pool = self.dataset.split('/').next().unwrap_or(&self.dataset);
        let args = ["list", "-H", "-p", "-o", "name,used,available", &self.dataset, pool];
        // Sorted by name, whatever the order that they were asked for in.
        let rows = self.cli.table(&args)?;
        let of = |name: &str| {
            let row = rows.iter().find(|row| row.first().is_some_and(|n| n == name));
            let row = row.ok_or_else(|| unexpected(&args, &rows))?;
            Ok::<_, Error>((number(row, 1, &args)?, number(row, 2, &args)?))
        };
        let (used, available) = of(&self.dataset)?;
        let (pool_used, pool_available) = of(pool)?;
        let used = if available < pool_available { used } else { pool_used };
        let inodes_used = {
            let index = self.index();
            index.layers.values().fold(0_u64, |sum, l| sum.saturating_add(l.inodes))
        };
        Ok(FsUsage {
            used_bytes: used,
            inodes_used,
            capacity_bytes: used.saturating_add(available),
            available_bytes: available,
            inodes: 0,
            inodes_free: 0,
            mountpoint: self.state_dir(),
        })
    }

    fn close(&self) -> Result<()> {
        self.retry_gone();
        mounts::unmount_all_below(&self.run_dir)?;
        mounts::unmount(&self.run_dir)
    }
}

/// A number in a row of a table.
fn number(row: &[String], at: usize, args: &[&str]) -> Result<u64> {
    row.get(at).and_then(|text| text.parse().ok()).ok_or_else(|| unexpected(args, &[row.to_vec()]))
}

fn unexpected(args: &[&str], rows: &[Vec<String>]) -> Error {
    let line = rows.iter().map(|row| row.join(" ")).collect::<Vec<_>>().join("; ");
    Error::BadOutput { command: format!("zfs {}", args.join(" ")), line: line.chars().take(500).collect() }
}

/// One at a time for each name.
#[derive(Debug, Default)]
struct Turns {
    taken: Mutex<HashSet<String>>,
    freed: Condvar,
}

struct Turn<'a>(&'a Turns, String);

impl Turns {
    fn take(&self, name: String) -> Turn<'_> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        while !taken.insert(name.clone()) {
            taken = self.freed.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        Turn(self, name)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
        self.0.freed.notify_all();
    }
}

/// Makes a directory that nobody but root gets into; one that is there is as good.
fn make_private_dir(path: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).attempt("create", path)
}

#[async_trait]
impl Driver for ZfsDriver {
    fn whiteouts(&self) -> WhiteoutStyle {
        WhiteoutStyle::Apply
    }

    async fn has_layer(&self, chain: &ChainId) -> Result<bool> {
        Ok(self.inner.index().layers.contains_key(chain))
    }

    async fn begin_layer(&self, parent: Option<&ChainId>) -> Result<LayerDraft> {
        let parent = parent.cloned();
        self.run("begin a layer", move |inner| layers::begin(inner, parent)).await
    }

    async fn commit_layer(&self, draft: LayerDraft, chain: &ChainId, usage: Usage) -> Result<()> {
        let chain = chain.clone();
        self.run("store a layer", move |inner| layers::commit(inner, draft, &chain, usage)).await
    }

    async fn open_layer(&self, chain: &ChainId) -> Result<LayerView> {
        let chain = chain.clone();
        self.run("open a layer", move |inner| layers::view(inner, &chain)).await
    }

    /// Nothing is left to do after that: ZFS destroys a dataset at once, whatever is in it, and frees its blocks in the
    /// background.
    async fn take_layer(&self, chain: &ChainId) -> Result<TakenLayer> {
        let (chain, taken) = (chain.clone(), TakenLayer::gone(chain.clone()));
        self.run("remove a layer", move |inner| layers::remove(inner, &chain)).await.map(|()| taken)
    }

    async fn layers(&self) -> Result<Vec<ChainId>> {
        Ok(self.inner.index().top_first())
    }

    async fn layer_usage(&self, chain: &ChainId) -> Result<Usage> {
        let chain = chain.clone();
        self.run("measure a layer", move |inner| inner.layer_usage(&chain)).await
    }

    async fn layers_usage(&self) -> Result<Usage> {
        self.run("measure the layers", |inner| inner.layers_usage()).await
    }

    async fn mount_layers(&self, layers: &[ChainId], target: &Path) -> Result<()> {
        let (layers, target) = (layers.to_vec(), target.to_owned());
        self.run("mount layers", move |inner| layers::mount(inner, &layers, &target)).await
    }

    async fn create_root(&self, id: &ContainerId, layers: &[ChainId], options: RootOptions) -> Result<()> {
        let (id, layers) = (id.clone(), layers.to_vec());
        let caller = Caller::default();
        let waits = caller.waits();
        self.run("make a root", move |inner| inner.create_root(&id, &layers, options, &waits)).await
    }

    async fn mount_root(&self, id: &ContainerId, target: &Path) -> Result<()> {
        let (id, target) = (id.clone(), target.to_owned());
        self.run("mount a root", move |inner| inner.mount_root(&id, &target)).await
    }

    async fn unmount_root(&self, _id: &ContainerId, target: &Path) -> Result<()> {
        let target = target.to_owned();
        self.run("unmount a root", move |_| mounts::unmount(&target)).await
    }

    async fn remove_root(&self, id: &ContainerId) -> Result<()> {
        let id = id.clone();
        self.run("remove a root", move |inner| inner.remove_root(&id)).await
    }

    async fn roots(&self) -> Result<Vec<ContainerId>> {
        Ok(self.inner.index().roots.keys().cloned().collect())
    }

    async fn root_layers(&self, id: &ContainerId) -> Result<Vec<ChainId>> {
        let index = self.inner.index();
        let root = index.roots.get(id).ok_or_else(|| Error::RootNotFound(id.clone()))?;
        Ok(index.stack(root.top.as_ref()))
    }

    async fn root_usage(&self, id: &ContainerId) -> Result<Usage> {
        let id = id.clone();
        self.run("measure a root", move |inner| inner.root_usage(&id)).await
    }

    async fn fs_usage(&self) -> Result<FsUsage> {
        self.run("measure the store", |inner| inner.fs_usage()).await
    }

    async fn stalled(&self) -> Error {
        health::stalled(&[&self.inner.dataset], "write to the store").await
    }

    async fn close(&self) -> Result<()> {
        self.run("close the store", |inner| inner.close()).await
    }
}
