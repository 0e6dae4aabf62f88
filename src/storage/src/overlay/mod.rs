//! The OverlayFS driver: extracted layers as lower directories, an upper directory for each container.
//!
//! ```text
//! <dir>/layers/<hex of the chain ID>/    finished layers, ids unshifted
//! <dir>/usage/<hex of the chain ID>      what each takes
//! <dir>/mapped/<base>-<size>/            the whole of layers/ once more, idmapped: one mount for each map, on demand
//! <dir>/roots/<container id>/            root.json, upper/ and work/ (owned by the map's root)
//! <dir>/tmp/                             drafts and what is being removed; emptied by open
//! ```
//!
//! A root with a quota is a project of the file system, whose id stands in root.json.
//!
//! `roots` is the life of a root, `stack` puts mounts together, `quota` keeps project quotas, `probe` tells whether a file system will do.
//!
//! OverlayFS itself cannot be idmapped, but its lower layers can; the upper directory simply belongs to the
//! container's root. The directory is 0700: layers hold setuid files that no user of the host may run.

mod probe;
mod quota;
mod roots;
mod stack;

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use moxlet_ids::{ChainId, ContainerId};

use crate::{
    Driver, FsUsage, IdMap, LayerDraft, LayerView, RootOptions, TakenLayer, Usage, WhiteoutStyle,
    error::{Attempt, Error, LayerUser, Result},
    idmap, mounts, tree,
};
use quota::Quotas;
use roots::{Root, read_root};

/// The kernel's bound on lower layers (`OVL_MAX_STACK`).
const MAX_LAYERS: usize = 500;
/// Layers and roots on OverlayFS.
#[derive(Debug, Clone)]
pub struct OverlayDriver {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    /// The roots on disk. Its lock also keeps a layer from going while a root on it comes.
    roots: Mutex<HashMap<ContainerId, Root>>,
    /// Held while a map's mount is made.
    mapping: Mutex<()>,
    /// Layers that somebody reads, and how many do.
    views: Mutex<HashMap<ChainId, usize>>,
    /// Where stacks of layers were mounted.
    shown: Mutex<HashMap<PathBuf, Vec<ChainId>>>,
    /// Where the file system keeps project quotas.
    quotas: Option<Quotas>,
    /// Projects of roots that are just being made. Its lock is held while a project is chosen.
    choosing: Mutex<HashSet<u32>>,
}

impl OverlayDriver {
    /// Opens the store in a directory, which is made if missing, and removes what was left half-made in it.
    ///
    /// # Errors
    /// A file system that cannot hold one, a record of a newer version, or what the system says.
    pub async fn open(dir: &Path) -> Result<Self> {
        let dir = dir.to_owned();
        let inner = blocking(move || Inner::open(&dir)).await?;
        Ok(Self { inner: Arc::new(inner) })
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(&self.inner);
        blocking(move || work(&inner)).await
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Stopped)?
}

impl Inner {
    fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).attempt("create", dir)?;
        // Option texts hold these paths and must not depend on where we are.
        let dir = fs::canonicalize(dir).attempt("look at", dir)?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).attempt("set the mode of", &dir)?;
        for name in ["layers", "usage", "mapped", "roots", "tmp"] {
            let path = dir.join(name);
            make_dir(&path, 0o700)?;
        }
        let tmp = dir.join("tmp");
        probe::check(&dir, &tmp)?;
        let quotas = Quotas::find(&dir)?;
        let inner = Self {
            dir,
            roots: Mutex::default(),
            mapping: Mutex::default(),
            views: Mutex::default(),
            shown: Mutex::default(),
            quotas,
            choosing: Mutex::default(),
        };
        for entry in names(&tmp)? {
            let path = tmp.join(entry);
            if let Err(error) = inner.remove_leftover(&path) {
                tracing::warn!(path = %path.display(), %error, "could not remove what was left half-made");
            }
        }
        let mut roots = HashMap::new();
        for name in names(&inner.dir.join("roots"))? {
            let Ok(id) = name.parse::<ContainerId>() else { continue };
            match read_root(&inner.root_dir(&id)) {
                Ok(root) => {
                    roots.insert(id, root);
                }
                Err(error @ Error::TooNew { .. }) => return Err(error),
                // After a power cut; its container is gone with the machine's memory.
                Err(error) => {
                    tracing::warn!(container = %id, %error, "a container's root is damaged and is removed");
                    tree::remove(&inner.root_dir(&id), &tmp)?;
                }
            }
        }
        *inner.roots() = roots;
        Ok(inner)
    }

    fn roots(&self) -> MutexGuard<'_, HashMap<ContainerId, Root>> {
        lock(&self.roots)
    }

    fn tmp(&self) -> PathBuf {
        self.dir.join("tmp")
    }

    fn layer_dir(&self, chain: &ChainId) -> PathBuf {
        self.dir.join("layers").join(chain.digest().hex())
    }

    fn root_dir(&self, id: &ContainerId) -> PathBuf {
        self.dir.join("roots").join(id.as_str())
    }

    fn usage_file(&self, chain: &ChainId) -> PathBuf {
        self.dir.join("usage").join(chain.digest().hex())
    }

    fn begin_layer(&self, parent: Option<&ChainId>) -> Result<LayerDraft> {
        let path = tree::unique(&self.tmp(), "layer");
        make_dir(&path, 0o755)?;
        let (tree, scratch) = (path.clone(), self.tmp());
        let undo = move || {
            if let Err(error) = tree::remove(&tree, &scratch) {
                tracing::warn!(path = %tree.display(), %error, "an unfinished layer stays until the next start");
            }
        };
        Ok(LayerDraft { parent: parent.cloned(), path, undo: Some(Box::new(undo)) })
    }

    fn commit_layer(&self, mut draft: LayerDraft, chain: &ChainId, usage: Usage) -> Result<()> {
        let target = self.layer_dir(chain);
        if target.exists() {
            return Ok(());
        }
        // Without a word of the caller's it is looked up when somebody asks.
        if usage != Usage::default() {
            let note = self.usage_file(chain);
            fs::write(&note, format!("{} {}", usage.bytes, usage.inodes)).attempt("write", note)?;
        }
        // One flush of the file system costs less than one for each of ten thousand files.
        let fd = fs::File::open(&draft.path).attempt("open", &draft.path)?;
        rustix::fs::syncfs(&fd).attempt("flush", &draft.path)?;
        match fs::rename(&draft.path, &target) {
            Ok(()) => draft.undo = None,
            // Another one finished the same layer meanwhile.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EEXIST | libc::ENOTEMPTY)) => return Ok(()),
            Err(e) => return Err(e).attempt("put in place", target),
        }
        sync_dir(&self.dir.join("layers"))
    }

    /// Who reads a layer. To be asked with the roots locked.
    fn reader_of(&self, chain: &ChainId) -> Result<Option<LayerUser>> {
        if lock(&self.views).contains_key(chain) {
            return Ok(Some(LayerUser::View));
        }
        let mut shown = lock(&self.shown);
        for (target, layers) in std::mem::take(&mut *shown) {
            if mounts::is_mounted(&target)? {
                shown.insert(target, layers);
            }
        }
        Ok(shown.values().any(|layers| layers.contains(chain)).then_some(LayerUser::View))
    }

    fn open_layer(self: &Arc<Self>, chain: &ChainId) -> Result<LayerView> {
        let path = self.layer_dir(chain);
        let _roots = self.roots();
        if !path.is_dir() {
            return Err(Error::LayerNotFound(chain.clone()));
        }
        *lock(&self.views).entry(chain.clone()).or_default() += 1;
        let (inner, of) = (Arc::clone(self), chain.clone());
        let release = move || {
            let mut views = lock(&inner.views);
            if let Some(count) = views.get_mut(&of) {
                *count -= 1;
                if *count == 0 {
                    views.remove(&of);
                }
            }
        };
        Ok(LayerView { path, release: Some(Box::new(release)) })
    }

    fn take_layer(&self, chain: &ChainId) -> Result<TakenLayer> {
        let aside = {
            let roots = self.roots();
            if let Some(by) = self.reader_of(chain)? {
                return Err(Error::LayerInUse { layer: chain.clone(), by });
            }
            if let Some((by, _)) = roots.iter().find(|(_, r)| r.layers.contains(chain)) {
                return Err(Error::LayerInUse { layer: chain.clone(), by: LayerUser::Root(by.clone()) });
            }
            tree::set_aside(&self.layer_dir(chain), &self.tmp())?
        };
        let _ = fs::remove_file(self.usage_file(chain));
        Ok(match aside {
            Some(aside) => TakenLayer::new(chain.clone(), move || tree::finish(&aside)),
            None => TakenLayer::gone(chain.clone()),
        })
    }

    /// What a layer takes; looked up in its directory where the note of it is missing or damaged.
    fn layer_usage(&self, chain: &ChainId) -> Result<Usage> {
        let note = self.usage_file(chain);
        let known = fs::read_to_string(&note).ok().and_then(|text| {
            let (bytes, inodes) = text.split_once(' ')?;
            Some(Usage { bytes: bytes.parse().ok()?, inodes: inodes.parse().ok()? })
        });
        if let Some(known) = known {
            return Ok(known);
        }
        let usage = tree::usage(&self.layer_dir(chain))?;
        fs::write(&note, format!("{} {}", usage.bytes, usage.inodes)).attempt("write", note)?;
        Ok(usage)
    }

    fn layers_usage(&self) -> Result<Usage> {
        let mut sum = Usage::default();
        for chain in self.layers()? {
            let usage = self.layer_usage(&chain)?;
            sum.bytes = sum.bytes.saturating_add(usage.bytes);
            sum.inodes = sum.inodes.saturating_add(usage.inodes);
        }
        Ok(sum)
    }

    fn layers(&self) -> Result<Vec<ChainId>> {
        let names = names(&self.dir.join("layers"))?;
        Ok(names.into_iter().filter_map(|n| format!("sha256:{n}").parse().ok()).collect())
    }

    /// The directory where all layers appear with a map's ids; mounted by the first who asks.
    fn mapped(&self, map: IdMap) -> Result<PathBuf> {
        let path = self.dir.join("mapped").join(format!("{}-{}", map.host_base, map.size));
        let _one = lock(&self.mapping);
        if !mounts::is_mounted(&path)? {
            make_dir(&path, 0o700)?;
            idmap::Namespace::new(map)?.bind(
                &self.dir.join("layers"),
                &path,
                idmap::BindOptions { read_only: idmap::ReadOnly::Top, ..idmap::BindOptions::default() },
            )?;
        }
        Ok(path)
    }

    fn mount_layers(&self, layers: &[ChainId], target: &Path) -> Result<()> {
        let _roots = self.roots();
        if let Some(missing) = layers.iter().find(|l| !self.layer_dir(l).is_dir()) {
            return Err(Error::LayerNotFound(missing.clone()));
        }
        let Some(place) = stack::place_for(target)? else { return Ok(()) };
        // Without an upper directory the kernel wants two lower ones.
        let mount = stack::merge(&self.lower(&self.dir.join("layers"), layers, 2)?, None)?;
        stack::put(&mount, &place, target)?;
        lock(&self.shown).insert(target.to_owned(), layers.to_vec());
        Ok(())
    }

    /// The directories of layers below `dir`, and empty ones below them to make up a number.
    fn lower(&self, dir: &Path, layers: &[ChainId], least: usize) -> Result<Vec<PathBuf>> {
        let mut lower = Vec::with_capacity(layers.len().max(least));
        for n in layers.len()..least {
            let empty = self.tmp().join(format!("empty-{n}"));
            make_dir(&empty, 0o755)?;
            lower.push(empty);
        }
        lower.extend(layers.iter().map(|layer| dir.join(layer.digest().hex())));
        Ok(lower)
    }
}

fn make_dir(path: &Path, mode: u32) -> Result<()> {
    match fs::DirBuilder::new().mode(mode).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        // The umask must not decide who can enter a container's root.
        Ok(()) => {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).attempt("set the mode of", path)
        }
        Err(e) => Err(e).attempt("create", path),
    }
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).attempt("list", dir)? {
        if let Ok(name) = entry.attempt("list", dir)?.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn sync_dir(dir: &Path) -> Result<()> {
    fs::File::open(dir).and_then(|d| d.sync_all()).attempt("flush", dir)
}

#[async_trait]
impl Driver for OverlayDriver {
    fn whiteouts(&self) -> WhiteoutStyle {
        WhiteoutStyle::Overlay
    }

    async fn has_layer(&self, chain: &ChainId) -> Result<bool> {
        Ok(self.inner.layer_dir(chain).is_dir())
    }

    async fn begin_layer(&self, parent: Option<&ChainId>) -> Result<LayerDraft> {
        self.inner.begin_layer(parent)
    }

    async fn commit_layer(&self, draft: LayerDraft, chain: &ChainId, usage: Usage) -> Result<()> {
        let chain = chain.clone();
        self.run(move |inner| inner.commit_layer(draft, &chain, usage)).await
    }

    async fn open_layer(&self, chain: &ChainId) -> Result<LayerView> {
        self.inner.open_layer(chain)
    }

    async fn take_layer(&self, chain: &ChainId) -> Result<TakenLayer> {
        let chain = chain.clone();
        self.run(move |inner| inner.take_layer(&chain)).await
    }

    async fn layers(&self) -> Result<Vec<ChainId>> {
        self.run(Inner::layers).await
    }

    async fn layer_usage(&self, chain: &ChainId) -> Result<Usage> {
        let chain = chain.clone();
        self.run(move |inner| match inner.layer_dir(&chain).exists() {
            true => inner.layer_usage(&chain),
            false => Ok(Usage::default()),
        })
        .await
    }

    async fn layers_usage(&self) -> Result<Usage> {
        self.run(Inner::layers_usage).await
    }

    async fn mount_layers(&self, layers: &[ChainId], target: &Path) -> Result<()> {
        let (layers, target) = (layers.to_vec(), target.to_owned());
        self.run(move |inner| inner.mount_layers(&layers, &target)).await
    }

    async fn create_root(&self, id: &ContainerId, layers: &[ChainId], options: RootOptions) -> Result<()> {
        let (id, layers) = (id.clone(), layers.to_vec());
        self.run(move |inner| inner.create_root(&id, &layers, options)).await
    }

    async fn mount_root(&self, id: &ContainerId, target: &Path) -> Result<()> {
        let (id, target) = (id.clone(), target.to_owned());
        self.run(move |inner| inner.mount_root(&id, &target)).await
    }

    async fn unmount_root(&self, _id: &ContainerId, target: &Path) -> Result<()> {
        let target = target.to_owned();
        self.run(move |_| mounts::unmount(&target)).await
    }

    async fn remove_root(&self, id: &ContainerId) -> Result<()> {
        let id = id.clone();
        self.run(move |inner| inner.remove_root(&id)).await
    }

    async fn roots(&self) -> Result<Vec<ContainerId>> {
        Ok(self.inner.roots().keys().cloned().collect())
    }

    async fn root_layers(&self, id: &ContainerId) -> Result<Vec<ChainId>> {
        Ok(self.inner.root(id)?.layers)
    }

    async fn root_usage(&self, id: &ContainerId) -> Result<Usage> {
        self.inner.root(id)?;
        let path = self.inner.root_dir(id).join("upper");
        blocking(move || tree::usage(&path)).await
    }

    async fn fs_usage(&self) -> Result<FsUsage> {
        self.run(|inner| {
            let stat = rustix::fs::statvfs(&inner.dir).attempt("look at", &inner.dir)?;
            Ok(FsUsage {
                used_bytes: stat.f_blocks.saturating_sub(stat.f_bfree).saturating_mul(stat.f_frsize),
                inodes_used: stat.f_files.saturating_sub(stat.f_ffree),
                capacity_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
                available_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
                inodes: stat.f_files,
                inodes_free: stat.f_ffree,
                mountpoint: inner.dir.clone(),
            })
        })
        .await
    }

    async fn close(&self) -> Result<()> {
        self.run(|inner| mounts::unmount_all_below(&inner.dir.join("mapped"))).await
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::os::unix::fs::{MetadataExt, chown};

    use moxlet_ids::Digest;
    use rustix::fs::{CWD, Mode};

    use super::*;

    async fn layer(driver: &OverlayDriver, name: &str, fill: impl FnOnce(&Path)) -> ChainId {
        let chain = ChainId::base(&Digest::of(name.as_bytes()));
        let draft = driver.begin_layer(None).await.unwrap();
        fill(draft.path());
        driver.commit_layer(draft, &chain, Usage::default()).await.unwrap();
        chain
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_root_shifts_ids_and_honours_whiteouts() {
        let dir = tempfile::tempdir().unwrap();
        let driver = OverlayDriver::open(&dir.path().join("s")).await.unwrap();
        let mut chains = vec![
            layer(&driver, "a", |p| {
                fs::write(p.join("root"), "r").unwrap();
                fs::write(p.join("nobody"), "n").unwrap();
                chown(p.join("nobody"), Some(65534), Some(65534)).unwrap();
                fs::write(p.join("gone"), "g").unwrap();
            })
            .await,
            layer(&driver, "b", |p| {
                let dev = rustix::fs::makedev(0, 0);
                let kind = rustix::fs::FileType::CharacterDevice;
                rustix::fs::mknodat(CWD, p.join("gone"), kind, Mode::empty(), dev).unwrap();
            })
            .await,
        ];
        for n in 0..130 {
            chains.push(
                layer(&driver, &n.to_string(), |p| fs::write(p.join(format!("l{n}")), "x").unwrap()).await,
            );
        }
        let id = ContainerId::random();
        driver.create_root(&id, &chains, IdMap::default().into()).await.unwrap();
        driver.create_root(&id, &chains, IdMap::default().into()).await.unwrap();
        let target = dir.path().join("t");
        driver.mount_root(&id, &target).await.unwrap();
        driver.mount_root(&id, &target).await.unwrap();
        let seen = (
            fs::metadata(target.join("root")).map(|m| m.uid()).ok(),
            fs::metadata(target.join("nobody")).map(|m| m.gid()).ok(),
            target.join("gone").exists(),
            target.join("l129").exists(),
            fs::metadata(&target).map(|m| m.uid()).ok(),
            fs::write(target.join("root"), "changed").is_ok(),
            driver.root_usage(&id).await.unwrap().inodes,
        );
        let busy = driver.remove_layer(&chains[0]).await;
        driver.unmount_root(&id, &target).await.unwrap();
        driver.unmount_root(&id, &target).await.unwrap();
        driver.remove_root(&id).await.unwrap();
        driver.remove_root(&id).await.unwrap();
        driver.remove_layer(&chains[0]).await.unwrap();
        driver.close().await.unwrap();
        assert_eq!(seen, (Some(100_000), Some(165_534), false, true, Some(100_000), true, 1));
        assert!(matches!(busy, Err(Error::LayerInUse { .. })));
        assert!(mounts::mounted_below(dir.path()).unwrap().is_empty());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_empty_root_mounts_and_leftovers_go_at_open() {
        let dir = tempfile::tempdir().unwrap();
        let driver = OverlayDriver::open(dir.path()).await.unwrap();
        fs::create_dir_all(dir.path().join("tmp/layer-x/deep")).unwrap();
        let id = ContainerId::random();
        driver.create_root(&id, &[], IdMap::default().into()).await.unwrap();
        let driver = OverlayDriver::open(dir.path()).await.unwrap();
        assert!(!dir.path().join("tmp/layer-x").exists());
        assert_eq!(driver.roots().await.unwrap(), std::slice::from_ref(&id));
        let target = dir.path().join("t");
        let mounted = driver.mount_root(&id, &target).await;
        driver.unmount_root(&id, &target).await.unwrap();
        driver.close().await.unwrap();
        mounted.unwrap();
    }
}
