//! A store of a test's own, and archives to fill it with.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use moxlet_ids::Digest;
use moxlet_storage::mounts;
use moxlet_tests_component::program;
use serde_json::json;

/// A directory with a store; whatever is mounted below it goes with it.
pub(crate) struct Store {
    dir: tempfile::TempDir,
}

impl Store {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::Builder::new().prefix("moxlet-images-").tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `moxlet image --store …`, not started yet.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.args(["image", "--store"]).arg(self.path("store")).args(args).env_remove("MOXLET_SOCKET");
        command
    }

    pub(crate) fn try_run(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().unwrap()
    }

    /// What a command prints; it has to succeed.
    pub(crate) fn run(&self, args: &[&str]) -> String {
        succeeded(args, &self.try_run(args))
    }

    /// What a command complains of; it has to fail with status 1.
    pub(crate) fn complaint(&self, args: &[&str]) -> String {
        failed(args, &self.try_run(args))
    }

    /// Names of a directory of the store.
    pub(crate) fn names(&self, dir: &str) -> Vec<String> {
        let mut all: Vec<String> = fs::read_dir(self.path("store").join(dir))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        all.sort();
        all
    }

    /// What a crash or a failure has left, after an opening.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        for dir in ["storage/tmp", "images/tmp"] {
            left.extend(self.names(dir).into_iter().map(|n| format!("{dir}/{n}")));
        }
        let records = self.names("images/images").len();
        if records == 0 {
            left.extend(self.names("storage/layers").into_iter().map(|n| format!("layer {n} of no image")));
            left.extend(self.names("images/layers").into_iter().map(|n| format!("tape {n} of no image")));
            left.extend(self.names("images/configs").into_iter().map(|n| format!("config {n} of no image")));
        }
        for mount in mounts::mounted_below(self.dir.path()).unwrap() {
            if mount != self.path("store") {
                left.push(format!("mount {}", mount.display()));
            }
        }
        left
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = mounts::unmount_all_below(self.dir.path());
    }
}

pub(crate) fn succeeded(args: &[&str], output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {error}");
    String::from_utf8(output.stdout.clone()).unwrap().trim().to_owned()
}

pub(crate) fn failed(args: &[&str], output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
    error
}

/// Waits for a condition, with a limit.
pub(crate) fn until(mut condition: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if condition() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("it never came to be");
}

/// Runs another program, which has to succeed; what it prints.
pub(crate) fn tool(name: &str, args: &[&str]) -> String {
    let output = Command::new(name).args(args).output().unwrap();
    succeeded(&[name], &output)
}

/// A tar archive.
pub(crate) fn tar(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(0);
        tar.append_data(&mut header, name, content.as_slice()).unwrap();
    }
    tar.into_inner().unwrap()
}

/// Bytes that no compression makes smaller.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

/// An archive as `docker save` writes it, of an image with layers of `files` files of `size` bytes each.
pub(crate) fn docker_archive(tag: &str, layers: usize, files: usize, size: usize) -> Vec<u8> {
    let (mut members, mut names, mut diff_ids) = (Vec::new(), Vec::new(), Vec::new());
    for layer in 0..layers {
        let file = |n: usize| {
            let seed = ((layer * files + n + 1) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (format!("layer{layer}/file{n}"), noise(seed, size))
        };
        let archive = tar(&(0..files).map(file).collect::<Vec<_>>());
        diff_ids.push(Digest::of(&archive).to_string());
        names.push(format!("{layer}/layer.tar"));
        members.push((format!("{layer}/layer.tar"), archive));
    }
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = json!({
        "architecture": architecture, "os": "linux", "config": { "Cmd": ["/bin/sh"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": [tag], "Layers": names }]);
    members.push(("config.json".into(), config.to_string().into_bytes()));
    members.push(("manifest.json".into(), manifest.to_string().into_bytes()));
    tar(&members)
}

/// Such an image in the registry, under this name; its id.
pub(crate) fn pushed(name: &str, layers: usize, files: usize, size: usize) -> String {
    let store = Store::new();
    let path = store.path("image.tar");
    fs::write(&path, docker_archive("made:1", layers, files, size)).unwrap();
    let id = store.run(&["import", text(&path)]);
    store.run(&["push", "made:1", name]);
    id
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
