//! Bind mounts with shifted ids: they are copies, whose life is their own.

use std::{fs, path::Path, process::Command};

use moxlet_storage::{
    IdMap,
    idmap::{BindOptions, Namespace, ReadOnly},
    mounts,
};

/// A shared directory of the host's with a tmpfs below it, and the directory below which copies are mounted.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        for name in ["source", "pods"] {
            mounts::make_shared_dir(&host.path(name)).unwrap();
        }
        host.mount_tmpfs("source/below");
        for name in ["pods/copy", "source/later"] {
            fs::create_dir(host.path(name)).unwrap();
        }
        host
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn mount_tmpfs(&self, name: &str) {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        run("mount", &["-t", "tmpfs", "tmpfs", path.to_str().unwrap()]);
    }

    fn bind(&self, options: BindOptions) {
        let namespace = Namespace::new(IdMap::default()).unwrap();
        namespace
            .bind(&self.path("source"), &self.path("pods/copy"), BindOptions { recursive: true, ..options })
            .unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for name in ["pods", "source"] {
            let _ = mounts::unmount_all_below(&self.path(name));
            let _ = mounts::unmount(&self.path(name));
        }
    }
}

fn run(program: &str, args: &[&str]) {
    assert!(Command::new(program).args(args).status().unwrap().success(), "{program} {args:?}");
}

fn is_mounted(path: &Path) -> bool {
    mounts::is_mounted(path).unwrap()
}

#[test]
fn what_the_host_has_mounted_below_a_source_stays_when_a_copy_goes() {
    let host = Host::new();
    host.bind(BindOptions::default());
    assert!(is_mounted(&host.path("pods/copy/below")));
    mounts::unmount_all_below(&host.path("pods")).unwrap();
    assert!(!is_mounted(&host.path("pods/copy")));
    assert!(is_mounted(&host.path("source/below")), "the host's own mount is gone");
}

#[test]
fn what_the_host_mounts_below_a_source_later_does_not_appear_in_a_copy() {
    let host = Host::new();
    host.bind(BindOptions::default());
    host.mount_tmpfs("source/later");
    assert!(is_mounted(&host.path("source/later")) && !is_mounted(&host.path("pods/copy/later")));
}

#[test]
fn a_copy_that_an_older_version_left_in_the_sources_group_is_taken_down_alone() {
    let host = Host::new();
    let (source, copy) = (host.path("source"), host.path("pods/copy"));
    run("mount", &["--rbind", source.to_str().unwrap(), copy.to_str().unwrap()]);
    mounts::unmount_all_below(&host.path("pods")).unwrap();
    assert!(!is_mounted(&copy) && is_mounted(&host.path("source/below")));
}

#[test]
fn a_read_only_copy_leaves_mounts_below_it_writable_unless_they_are_asked_for_too() {
    for (read_only, below) in [(ReadOnly::Top, true), (ReadOnly::Recursive, false)] {
        let host = Host::new();
        host.bind(BindOptions { read_only, ..BindOptions::default() });
        // Only to ids of the map.
        fs::set_permissions(host.path("source/below"), std::os::unix::fs::PermissionsExt::from_mode(0o777))
            .unwrap();
        let writable = |name: &str| {
            let path = std::ffi::CString::new(host.path(name).to_str().unwrap()).unwrap();
            let stat = rustix::fs::statvfs(path.as_c_str()).unwrap();
            !stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY)
        };
        assert!(!writable("pods/copy") && writable("source"));
        assert_eq!(writable("pods/copy/below"), below, "{read_only:?}");
    }
}

#[test]
fn nothing_of_a_copy_for_data_can_be_executed_or_gain_rights() {
    use rustix::fs::StatVfsMountFlags as Flags;
    let host = Host::new();
    host.bind(BindOptions::data());
    for name in ["pods/copy", "pods/copy/below"] {
        let flags = rustix::fs::statvfs(host.path(name)).unwrap().f_flag;
        assert!(flags.contains(Flags::NOSUID | Flags::NODEV | Flags::NOEXEC), "{name}: {flags:?}");
    }
}
