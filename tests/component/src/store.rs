//! What an agent's store lies on: OverlayFS below its directory, or ZFS where `MOXLET_TEST_STORAGE` is `zfs`, in datasets below
//! the one that `MOXLET_TEST_ZFS` names. Tests that need a pool of their own make one in a file of the directory that
//! `MOXLET_TEST_ZFS_POOLS` names.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
};

use moxlet_agent::{Config, Storage};
use moxlet_storage::mounts;

/// `zfs` or `overlay`, which it is unless set.
const STORAGE: &str = "MOXLET_TEST_STORAGE";
/// The dataset below which stores are made.
const DATASET: &str = "MOXLET_TEST_ZFS";
/// The directory for the files of pools.
const POOLS: &str = "MOXLET_TEST_ZFS_POOLS";

/// What a store lies on.
#[derive(Debug, Clone)]
pub enum Bed {
    /// OverlayFS on whatever the directory of temporary files lies on.
    Overlay,
    /// OverlayFS on an ext4 of its own that keeps project quotas.
    OverlayWithQuota,
    /// A dataset of its own below this one.
    Zfs(String),
}

impl Bed {
    /// What the environment says.
    #[must_use]
    pub fn chosen() -> Self {
        match std::env::var(STORAGE).as_deref() {
            Err(_) | Ok("overlay") => Self::Overlay,
            Ok("zfs") => {
                Self::Zfs(dataset().unwrap_or_else(|| panic!("{STORAGE} is zfs, {DATASET} names no dataset")))
            }
            Ok(other) => panic!("{STORAGE} is {other:?}, neither overlay nor zfs"),
        }
    }

    /// All that keep a quota of containers and are here; what is not is said.
    #[must_use]
    pub fn all_with_quota() -> Vec<Self> {
        let overlay = ext4_keeps_quotas().then_some(Self::OverlayWithQuota);
        overlay.into_iter().chain(dataset_or_word().map(Self::Zfs)).collect()
    }

    /// Makes it for an agent on this directory.
    pub(crate) fn make(&self, root: &Path, number: u8) -> Storage {
        match self {
            Self::Overlay => Storage::Overlay,
            Self::OverlayWithQuota => {
                mount_ext4_with_quota(&image_beside(root), root).unwrap();
                Storage::Overlay
            }
            Self::Zfs(above) => Storage::Zfs(format!("{above}/agent-{}-{number}", std::process::id())),
        }
    }

    /// Takes away what was made, whatever is in it.
    pub(crate) fn unmake(&self, config: &Config) {
        match (self, &config.storage) {
            (Self::OverlayWithQuota, _) => {
                let _ = mounts::unmount(&config.root_dir);
                let _ = fs::remove_file(image_beside(&config.root_dir));
            }
            (_, Storage::Zfs(dataset)) => drop(run("zfs", &["destroy", "-R", dataset])),
            _ => {}
        }
    }
}

/// Past the capture of output: who reads the end of a run is to know what it did not cover.
pub fn announce(text: &str) {
    let _ = writeln!(std::io::stderr(), "tests: {text}");
}

fn dataset() -> Option<String> {
    std::env::var(DATASET).ok().filter(|d| !d.is_empty())
}

/// The dataset for tests of ZFS; where there is none, that is said once.
pub fn dataset_or_word() -> Option<String> {
    static SAID: Once = Once::new();
    let dataset = dataset();
    if dataset.is_none() {
        SAID.call_once(|| {
            announce(&format!("NOTHING IS RUN ON ZFS, since {DATASET} names no dataset (scripts/test lab does it in a guest)"));
        });
    }
    dataset
}

fn image_beside(root: &Path) -> PathBuf {
    root.with_extension("ext4")
}

/// Whether ext4 keeps project quotas here; that it does not is said.
#[must_use]
pub fn ext4_keeps_quotas() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let can = mount_ext4_with_quota(&dir.path().join("ext4.img"), &dir.path().join("ext4"));
    let _ = mounts::unmount(&dir.path().join("ext4"));
    if let Err(why) = &can {
        let what = "PROJECT QUOTAS ARE NOT RUN, since this kernel does not mount ext4 with them";
        announce(&format!("{what}: {}", why.lines().next().unwrap_or_default()));
    }
    can.is_ok()
}

/// Mounts a new ext4 with project quotas.
///
/// # Errors
/// Where the kernel cannot.
pub fn mount_ext4_with_quota(image: &Path, at: &Path) -> Result<(), String> {
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    File::create(image).unwrap().set_len(256 << 20).unwrap();
    fs::create_dir_all(at).unwrap();
    run("mkfs.ext4", &["-q", "-O", "quota,project", "-E", "quotatype=prjquota", &text(image)])?;
    run("mount", &["-o", "loop,prjquota", &text(image), &text(at)]).map(drop)
}

/// Runs a program; what it printed.
///
/// # Errors
/// What it complained of.
pub fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let out = Command::new(program).args(args).env("LC_ALL", "C").output();
    let out = out.map_err(|e| format!("{program}: {e}"))?;
    if out.status.success() {
        return Ok(String::from_utf8(out.stdout).unwrap());
    }
    Err(format!("{program} {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim()))
}

/// `zfs` with these arguments, which has to succeed.
pub fn zfs(args: &[&str]) -> String {
    run("zfs", args).unwrap()
}

/// A pool of a test's own in a file; it goes with it.
pub struct Pool {
    /// Its name.
    pub name: String,
    file: PathBuf,
}

impl Pool {
    /// None where no directory for such files is named, which is said.
    #[must_use]
    pub fn create() -> Option<Self> {
        static SAID: Once = Once::new();
        let Some(dir) = std::env::var_os(POOLS).filter(|d| !d.is_empty()).map(PathBuf::from) else {
            SAID.call_once(|| {
                announce(&format!("NOTHING IS RUN ON A SECOND POOL, since {POOLS} names no directory (scripts/test lab does)"));
            });
            return None;
        };
        fs::create_dir_all(&dir).unwrap();
        Some(Self::create_in(&dir, &[]))
    }

    /// A pool in a sparse file of this directory.
    #[must_use]
    pub fn create_in(dir: &Path, options: &[&str]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("moxlet-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let file = dir.join(&name);
        File::create(&file).unwrap().set_len(256 << 20).unwrap();
        let mut args = vec!["create", "-O", "mountpoint=none", "-O", "compression=off"];
        args.extend(options);
        args.extend([name.as_str(), file.to_str().unwrap()]);
        run("zpool", &args).unwrap();
        Self { name, file }
    }

    /// Imports the pool after an export.
    pub fn import(&self) {
        let file = self.file.to_str().unwrap();
        run("zpool", &["import", "-N", "-d", file, &self.name]).unwrap();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = run("zpool", &["destroy", "-f", &self.name]);
        let _ = fs::remove_file(&self.file);
    }
}

fn below(dataset: &str, group: &str) -> Vec<String> {
    let group = format!("{dataset}/{group}");
    // There is no such dataset before the agent has made it, and after that is destroyed.
    let all = run("zfs", &["list", "-H", "-o", "name", "-d", "1", "-r", &group]).unwrap_or_default();
    all.lines().filter_map(|name| name.strip_prefix(&group)?.strip_prefix('/')).map(str::to_owned).collect()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

/// The roots of containers that lie in an agent's store.
#[must_use]
pub fn roots(config: &Config) -> Vec<String> {
    match &config.storage {
        Storage::Overlay => names(&config.root_dir.join("storage/roots")),
        Storage::Zfs(dataset) => below(dataset, "roots"),
    }
}

/// What is half-made in it.
#[must_use]
pub fn unfinished(config: &Config) -> Vec<String> {
    match &config.storage {
        Storage::Overlay => names(&config.root_dir.join("storage/tmp"))
            .into_iter()
            .filter(|n| !n.starts_with("empty-"))
            .collect(),
        Storage::Zfs(dataset) => below(dataset, "drafts"),
    }
}

/// What sandboxes have left in a store on ZFS; on OverlayFS that are files, which are looked for elsewhere.
pub(crate) fn traces(config: &Config) -> Vec<String> {
    if config.storage == Storage::Overlay {
        return Vec::new();
    }
    let all = roots(config).into_iter().chain(unfinished(config));
    all.map(|name| format!("dataset {name}")).collect()
}

/// What is mounted for the store itself.
#[must_use]
pub fn mounts(config: &Config) -> Vec<PathBuf> {
    let dir = config.root_dir.join("storage");
    let mounted = mounts::mounted_below(&config.root_dir).unwrap();
    mounted.into_iter().filter(|path| path.starts_with(&dir)).collect()
}

/// Makes what a crash could leave: a root of a container that nobody knows, of this id, and something half-made.
pub fn make_stray(config: &Config, id: &str) {
    match &config.storage {
        Storage::Overlay => {
            let (storage, own) = (config.root_dir.join("storage"), roots(config).remove(0));
            let (own, stray) = (storage.join("roots").join(own), storage.join("roots").join(id));
            fs::create_dir_all(stray.join("upper")).unwrap();
            fs::copy(own.join("root.json"), stray.join("root.json")).unwrap();
            fs::create_dir_all(storage.join("tmp/layer-1/deep")).unwrap();
        }
        Storage::Zfs(dataset) => {
            let own = zfs(&[
                "get",
                "-H",
                "-o",
                "value",
                "dev.moxlet:ids",
                &format!("{dataset}/roots/{}", roots(config)[0]),
            ]);
            let ids = format!("dev.moxlet:ids={}", own.trim());
            let make = |name: &str, properties: &[&str]| {
                let mark = format!("dev.moxlet:owner=moxlet:{name}");
                let mut args = vec!["create", "-u", "-o", "mountpoint=legacy", "-o", &mark];
                args.extend(properties.iter().flat_map(|p| ["-o", *p]));
                let path = format!("{dataset}/{name}");
                args.push(&path);
                zfs(&args);
            };
            let root = ["dev.moxlet:top=-", "dev.moxlet:map=100000-65536", "dev.moxlet:quota=-", &ids];
            make(&format!("roots/{id}"), &root);
            make("drafts/layer-1", &[]);
        }
    }
}

/// Removes a container's root, which is not mounted, behind the agent's back.
pub fn remove_root(config: &Config, id: &str) {
    match &config.storage {
        Storage::Overlay => fs::remove_dir_all(config.root_dir.join("storage/roots").join(id)).unwrap(),
        Storage::Zfs(dataset) => drop(zfs(&["destroy", &format!("{dataset}/roots/{id}")])),
    }
}
