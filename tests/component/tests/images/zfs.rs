//! The commands on a store on ZFS, where `MOXLET_TEST_ZFS` names a dataset to make some below.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use moxlet_storage::mounts;
use moxlet_tests_component::{program, store::dataset_or_word};

use crate::support::{docker_archive, failed, succeeded, text, tool};

/// A dataset, below which stores are made.
pub(crate) struct Parent(pub(crate) String);

impl Parent {
    /// None where there is no ZFS, which is said past the capture of output.
    pub(crate) fn from_env() -> Option<Self> {
        dataset_or_word().map(Self)
    }

    /// A store that is not there yet.
    pub(crate) fn store(&self) -> ZfsStore {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("images-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::Builder::new().prefix("moxlet-images-").tempdir().unwrap();
        ZfsStore { dataset: format!("{}/{name}", self.0), dir }
    }
}

/// A store on a dataset, which goes with it.
pub(crate) struct ZfsStore {
    pub(crate) dataset: String,
    dir: tempfile::TempDir,
}

impl ZfsStore {
    /// A place for files of the test.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `moxlet image --store … --storage zfs`, not started yet.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.args(["image", "--store", &self.dataset, "--storage", "zfs"]).args(args);
        command.env_remove("MOXLET_SOCKET").stdin(Stdio::null());
        command
    }

    fn try_run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What a command prints; it has to succeed.
    pub(crate) fn run(&self, args: &[&str]) -> String {
        succeeded(args, &self.try_run(args))
    }

    /// What a command complains of; it has to fail with status 1.
    pub(crate) fn complaint(&self, args: &[&str]) -> String {
        failed(args, &self.try_run(args))
    }

    /// All datasets and snapshots of the store with what identifies them.
    pub(crate) fn datasets(&self) -> Vec<String> {
        let args = ["list", "-H", "-t", "all", "-r", "-o", "name,guid,origin", &self.dataset];
        tool("zfs", &args).lines().map(str::to_owned).collect()
    }

    fn below(&self, group: &str) -> Vec<String> {
        let group = format!("{}/{group}", self.dataset);
        let names = tool("zfs", &["list", "-H", "-d", "1", "-r", "-o", "name", &group]);
        names.lines().filter(|name| *name != group).map(str::to_owned).collect()
    }

    /// The datasets of layers.
    pub(crate) fn layers(&self) -> Vec<String> {
        self.below("layers")
    }

    /// The datasets of what is half-made.
    pub(crate) fn drafts(&self) -> Vec<String> {
        self.below("drafts")
    }
}

impl Drop for ZfsStore {
    fn drop(&mut self) {
        let _ = mounts::unmount_all_below(self.dir.path());
        let _ = Command::new("zfs").args(["destroy", "-R", &self.dataset]).stderr(Stdio::null()).status();
    }
}

#[test]
fn an_image_lives_its_whole_life_on_a_dataset() {
    let Some(parent) = Parent::from_env() else { return };
    let store = parent.store();
    let archive = store.path("a.tar");
    fs::write(&archive, docker_archive("made:1", 3, 4, 100_000)).unwrap();
    let id = store.run(&["import", text(&archive)]);
    assert_eq!(store.run(&["list", "-q"]), id);
    assert!(store.run(&["verify"]).contains("ok       docker.io/library/made:1 (3 of 3 layers compared)"));

    let target = store.path("seen");
    store.run(&["mount", "made:1", text(&target)]);
    assert_eq!(fs::metadata(target.join("layer2/file3")).unwrap().len(), 100_000);
    assert!(fs::write(target.join("x"), "x").is_err());
    let refused = store.complaint(&["rm", "made:1"]);
    assert!(refused.contains(text(&target)), "{refused}");
    let spared = store.complaint(&["gc", "--high", "0", "--low", "0", "--min-age", "0s"]);
    assert!(spared.contains("is in use, pinned or too young"), "{spared}");
    store.run(&["umount", text(&target)]);
    assert!(!target.join("layer2").exists());

    store.run(&["tag", "made:1", "second:1"]);
    assert!(store.run(&["rm", "second:1"]).starts_with("untagged"));
    let out = store.path("out.tar");
    store.run(&["export", "made:1", "-o", text(&out)]);
    assert_eq!(store.run(&["rm", &id]), format!("removed {id}"));
    assert!(store.layers().is_empty(), "{:?}", store.layers());

    assert_eq!(store.run(&["import", text(&out)]), id, "the export is the same image");
    // No pool is ever quite empty, which the command says; the image goes.
    let gone = store.try_run(&["gc", "--high", "0", "--low", "0", "--min-age", "0s"]);
    let gone = String::from_utf8(gone.stdout).unwrap();
    assert!(gone.contains(&id), "{gone}");
    assert!(store.layers().is_empty() && store.drafts().is_empty());
    assert_eq!(mounts::mounted_below(store.dir.path()).unwrap(), Vec::<PathBuf>::new());
}

#[test]
fn a_dataset_that_is_full_is_named_and_the_import_goes_through_once_there_is_space() {
    let Some(parent) = Parent::from_env() else { return };
    let store = parent.store();
    let archive = store.path("a.tar");
    fs::write(&archive, docker_archive("made:1", 2, 8, 1_000_000)).unwrap();
    assert_eq!(store.run(&["list", "-q"]), "");
    tool("zfs", &["set", "quota=6M", &store.dataset]);
    let complaint = store.complaint(&["import", text(&archive)]);
    assert!(complaint.to_lowercase().contains("quota"), "{complaint}");
    tool("zfs", &["set", "quota=none", &store.dataset]);
    assert_eq!(store.run(&["list", "-q"]), "");
    assert!(store.layers().is_empty() && store.drafts().is_empty());
    store.run(&["import", text(&archive)]);
    assert!(store.run(&["verify"]).starts_with("ok"));
}
