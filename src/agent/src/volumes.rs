//! Volumes of pods: directories below `<root_dir>/volumes/<pod uid>/<name>`, ids unshifted; a container's mount shifts them.
//!
//! Secrets are files, so `Files` lie on a tmpfs of their own and are replaced as a whole, as the kubelet's atomic writer does:
//!
//! ```text
//! <volume>/..<time>/a/b     what is in it now
//! <volume>/..data           link to that directory, replaced by rename
//! <volume>/a                link to ..data/a
//! ```
//! The directories are 0700 up to the pod's own, so that no user of the host reads what is in a volume.

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink},
    path::{Component, Path, PathBuf},
};

use moxlet_cri::host::{self, VolumeKind};
use moxlet_ids::PodUid;
use moxlet_storage::{IdMap, mounts};
use parking_lot::Mutex;
use rustix::mount::{MountFlags, mount};

use crate::{
    beneath,
    clock::now_ns,
    deletions::Deletions,
    error::{Error, Result},
};

/// Files of one volume; an object of the cluster has at most 1 MiB.
const MAX_FILES: usize = 4096;
/// Bytes of one volume's files.
const MAX_BYTES: usize = 8 << 20;

/// The volumes of a host.
pub(crate) struct Volumes {
    dir: PathBuf,
    map: IdMap,
    /// One change at a time.
    change: Mutex<()>,
    deletions: Deletions,
}

impl Volumes {
    /// Opens or makes the directory.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn open(dir: PathBuf, map: IdMap) -> Result<Self> {
        make_dir(&dir, 0o700)?;
        let deletions = Deletions::open(dir.join(".del"))?;
        Ok(Self { dir, map, change: Mutex::default(), deletions })
    }

    /// Whether a path is that of a volume, or in one.
    pub(crate) fn owns(&self, path: &Path) -> bool {
        path.starts_with(&self.dir)
    }

    /// Makes a volume or brings it up to date; returns where it is.
    ///
    /// # Errors
    /// A name or file that makes no sense, or what the system says.
    pub(crate) fn apply(&self, request: &host::ApplyVolumeRequest) -> Result<PathBuf> {
        let uid: PodUid = request.pod_uid.parse()?;
        let name = &request.name;
        let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
        if name.is_empty() || name.len() > 253 || name.starts_with('.') || !name.bytes().all(plain) {
            return Err(Error::Invalid(format!("{name:?} is no name of a volume")));
        }
        let group = match request.fs_group {
            None => None,
            Some(group) if self.map.host_id(group).is_some() => Some(group),
            Some(group) => {
                let last = self.map.size - 1;
                return Err(Error::Refused(format!("fsGroup {group}: a CT's ids end at {last}")));
            }
        };
        check_files(&request.files)?;
        let _guard = self.change.lock();
        let of_pod = self.dir.join(uid.as_str());
        make_dir(&of_pod, 0o700)?;
        let path = of_pod.join(name);
        match request.kind() {
            VolumeKind::EmptyDir => empty_dir(&path, group)?,
            VolumeKind::EmptyDirMemory => {
                make_dir(&path, 0o700)?;
                if !mounts::is_mounted(&path)? {
                    tmpfs(&path, (request.size_bytes > 0).then_some(request.size_bytes), 0o777)?;
                    own(&path, group, 0o777)?;
                }
            }
            VolumeKind::Files => {
                make_dir(&path, 0o755)?;
                if !mounts::is_mounted(&path)? {
                    tmpfs(&path, None, 0o755)?;
                }
                write_files(&path, &request.files, group)?;
            }
            VolumeKind::PlainFiles => {
                make_dir(&path, 0o755)?;
                for file in &request.files {
                    write_in_place(&path, file)?;
                }
            }
            VolumeKind::Unspecified => return Err(Error::Invalid("the volume has no kind".into())),
        }
        Ok(path)
    }

    /// Removes all volumes of a pod; their files are deleted afterwards, so that no other pod waits for that. Idempotent.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn remove_pod(&self, uid: &PodUid) -> Result<()> {
        let _guard = self.change.lock();
        let of_pod = self.dir.join(uid.as_str());
        mounts::unmount_all_below(&of_pod)?;
        self.deletions.take(&of_pod)
    }

    /// The pods that have a volume.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn pods(&self) -> Result<BTreeSet<PodUid>> {
        let names = self.entries(&self.dir)?;
        Ok(names.iter().filter_map(|p| p.file_name()?.to_str()?.parse().ok()).collect())
    }

    fn entries(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        let failed = |e| Error::io(format!("cannot list {}", dir.display()), e);
        let entries: std::io::Result<Vec<_>> =
            fs::read_dir(dir).map_err(failed)?.map(|e| e.map(|e| e.path())).collect();
        Ok(entries.map_err(failed)?.into_iter().filter(|p| p.file_name() != Some(".del".as_ref())).collect())
    }
}

fn make_dir(path: &Path, mode: u32) -> Result<()> {
    match fs::DirBuilder::new().mode(mode).create(path) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(|e| Error::io(format!("cannot make {}", path.display()), e)),
    }
}

fn check_files(files: &[host::VolumeFile]) -> Result<()> {
    let bytes: usize = files.iter().map(|f| f.data.len()).sum();
    if files.len() > MAX_FILES || bytes > MAX_BYTES {
        return Err(Error::Invalid(format!("a volume has at most {MAX_FILES} files and {MAX_BYTES} bytes")));
    }
    for file in files {
        let path = beneath::relative(&file.path)
            .map_err(|_| Error::Invalid(format!("{:?} is no path in a volume", file.path)))?;
        if path.iter().next().is_some_and(|first| first.to_string_lossy().starts_with("..")) {
            return Err(Error::Invalid(format!(
                "{:?}: a path in a volume must not begin with ..",
                file.path
            )));
        }
    }
    Ok(())
}

/// Any user may write, as in the kubelet's emptyDir.
fn empty_dir(path: &Path, group: Option<u32>) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    // Complete at once: a crash leaves none that looks complete and has the wrong owner.
    let fresh =
        path.with_file_name(format!(".new-{}", path.file_name().unwrap_or_default().to_string_lossy()));
    make_dir(&fresh, 0o777)?;
    own(&fresh, group, 0o777)?;
    fs::rename(&fresh, path).map_err(|e| Error::io(format!("cannot make {}", path.display()), e))
}

/// Mode and group of a volume's directory: with a group, its files belong to that group (the kubelet's fsGroup).
fn own(path: &Path, group: Option<u32>, mode: u32) -> Result<()> {
    let mode = if group.is_some() { mode | 0o2070 } else { mode };
    chown(path, Some(0), Some(group.unwrap_or(0)))
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .map_err(|e| Error::io(format!("cannot own {}", path.display()), e))
}

fn tmpfs(path: &Path, size: Option<u64>, mode: u32) -> Result<()> {
    let mut options = format!("mode={mode:o}");
    if let Some(size) = size {
        options.push_str(&format!(",size={size}"));
    }
    let failed = |e: std::io::Error| Error::io(format!("cannot mount a tmpfs at {}", path.display()), e);
    let options = std::ffi::CString::new(options).map_err(|e| failed(e.into()))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("moxlet", path, "tmpfs", flags, Some(options.as_c_str())).map_err(|e| failed(e.into()))
}

/// A file that is mounted by itself: written in place, so that a running container sees the change.
fn write_in_place(dir: &Path, file: &host::VolumeFile) -> Result<()> {
    let path = dir.join(&file.path);
    if file.path.contains('/') {
        return Err(Error::Invalid(format!("{:?}: a plain file lies in the volume itself", file.path)));
    }
    // A container has the file itself mounted, never its directory: it cannot put a link in its place.
    let written = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(file.mode & 0o777)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(&path)
        .and_then(|mut f| f.write_all(&file.data));
    written.map_err(|e| Error::io(format!("cannot write {}", path.display()), e))
}

/// Replaces the content of a volume at once.
fn write_files(dir: &Path, files: &[host::VolumeFile], group: Option<u32>) -> Result<()> {
    let failed = |e: std::io::Error| Error::io(format!("cannot write the volume {}", dir.display()), e);
    if is_current(dir, files) {
        return Ok(());
    }
    let now = now_ns();
    let fresh_name = format!("..{now}");
    let fresh = dir.join(&fresh_name);
    let written = write_tree(&fresh, files, group).and_then(|()| {
        let next = dir.join("..data_tmp");
        let _ = fs::remove_file(&next);
        symlink(&fresh_name, &next)?;
        fs::rename(&next, dir.join("..data"))
    });
    if let Err(e) = written {
        let _ = fs::remove_dir_all(&fresh);
        return Err(failed(e));
    }
    let wanted: BTreeSet<&str> = files.iter().filter_map(|f| f.path.split('/').next()).collect();
    for name in &wanted {
        let link = dir.join(name);
        if link.symlink_metadata().is_err() {
            symlink(Path::new("..data").join(name), &link).map_err(failed)?;
        }
    }
    for entry in fs::read_dir(dir).map_err(failed)?.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("..") {
            // Names of files never begin so: it is what a former replacement left.
            if name != "..data" && name != fresh_name.as_str() {
                let _ = fs::remove_dir_all(entry.path());
            }
        } else if !wanted.contains(name.as_ref()) {
            let _ = fs::remove_file(entry.path());
        }
    }
    let mode = if group.is_some() { 0o2775 } else { 0o755 };
    chown(dir, Some(0), Some(group.unwrap_or(0)))
        .and_then(|()| fs::set_permissions(dir, fs::Permissions::from_mode(mode)))
        .map_err(failed)
}

fn write_tree(fresh: &Path, files: &[host::VolumeFile], group: Option<u32>) -> std::io::Result<()> {
    let group = group.unwrap_or(0);
    let shared = group != 0;
    let dir_mode = if shared { 0o2775 } else { 0o755 };
    let make = |path: &Path| -> std::io::Result<()> {
        match fs::DirBuilder::new().mode(0o755).create(path) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
            other => other?,
        }
        lchown(path, Some(0), Some(group))?;
        fs::set_permissions(path, fs::Permissions::from_mode(dir_mode))
    };
    make(fresh)?;
    for file in files {
        let mut at = fresh.to_owned();
        let path = Path::new(&file.path);
        for part in path.parent().into_iter().flat_map(Path::components) {
            if let Component::Normal(name) = part {
                at.push(name);
                make(&at)?;
            }
        }
        let path = fresh.join(path);
        let mut out = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        out.write_all(&file.data)?;
        lchown(&path, Some(0), Some(group))?;
        // With fsGroup the group may read whatever the owner may.
        let mode = file.mode & 0o777 | if shared { 0o440 } else { 0 };
        out.set_permissions(fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Whether the volume has exactly these files already.
fn is_current(dir: &Path, files: &[host::VolumeFile]) -> bool {
    let data = dir.join("..data");
    let same = |file: &host::VolumeFile| {
        let path = data.join(&file.path);
        fs::metadata(&path).is_ok_and(|m| {
            m.is_file() && m.size() == file.data.len() as u64 && m.mode() & file.mode == file.mode & 0o777
        }) && fs::read(&path).is_ok_and(|bytes| bytes == file.data)
    };
    data.exists() && files.iter().all(same) && count(&data, 0) == files.len()
}

fn count(dir: &Path, depth: usize) -> usize {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries
        .flatten()
        .map(|e| if e.path().is_dir() && depth < 64 { count(&e.path(), depth + 1) } else { 1 })
        .sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn volumes() -> (tempfile::TempDir, Volumes) {
        let dir = tempfile::tempdir().unwrap();
        let volumes = Volumes::open(dir.path().join("volumes"), IdMap::default()).unwrap();
        (dir, volumes)
    }

    fn request(kind: VolumeKind, files: &[(&str, &str)]) -> host::ApplyVolumeRequest {
        host::ApplyVolumeRequest {
            pod_uid: "uid-1".into(),
            name: "v".into(),
            kind: kind as i32,
            files: files
                .iter()
                .map(|(path, data)| host::VolumeFile {
                    path: (*path).into(),
                    data: data.as_bytes().to_vec(),
                    mode: 0o644,
                })
                .collect(),
            ..host::ApplyVolumeRequest::default()
        }
    }

    #[test]
    fn files_are_replaced_as_a_whole_and_old_ones_go() {
        let (_dir, volumes) = volumes();
        let path = volumes.apply(&request(VolumeKind::Files, &[("a", "1"), ("d/b", "2")])).unwrap();
        let first = fs::read_link(path.join("..data")).unwrap();
        assert_eq!(fs::read_to_string(path.join("d/b")).unwrap(), "2");
        assert_eq!(volumes.apply(&request(VolumeKind::Files, &[("a", "1"), ("d/b", "2")])).unwrap(), path);
        assert_eq!(fs::read_link(path.join("..data")).unwrap(), first, "nothing changed");
        volumes.apply(&request(VolumeKind::Files, &[("a", "3")])).unwrap();
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "3");
        assert!(!path.join("d").exists() && path.join("d").symlink_metadata().is_err());
        assert!(!path.join(&first).exists());
        let uid = "uid-1".parse().unwrap();
        assert_eq!(volumes.pods().unwrap(), BTreeSet::from([PodUid::clone(&uid)]));
        volumes.remove_pod(&uid).unwrap();
        volumes.remove_pod(&uid).unwrap();
        assert!(volumes.pods().unwrap().is_empty() && !path.exists());
    }

    #[test]
    fn pods_do_not_wait_until_the_files_of_another_are_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let mut volumes = Volumes::open(dir.path().join("volumes"), IdMap::default()).unwrap();
        let endless = |_: &Path, _: &Path| loop {
            std::thread::park();
        };
        volumes.deletions = Deletions::with(dir.path().join("volumes/.del"), endless).unwrap();
        for uid in ["uid-1", "uid-2"] {
            let asked =
                host::ApplyVolumeRequest { pod_uid: uid.into(), ..request(VolumeKind::EmptyDir, &[]) };
            let path = volumes.apply(&asked).unwrap();
            fs::write(path.join("file"), "").unwrap();
            volumes.remove_pod(&uid.parse().unwrap()).unwrap();
            assert!(volumes.pods().unwrap().is_empty() && !path.exists());
        }
    }

    #[test]
    fn a_group_owns_its_volume_and_an_id_beyond_the_map_is_refused() {
        let (_dir, volumes) = volumes();
        let mut asked = request(VolumeKind::EmptyDir, &[]);
        asked.fs_group = Some(2000);
        let path = volumes.apply(&asked).unwrap();
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((meta.gid(), meta.mode() & 0o7777), (2000, 0o2777));
        asked.fs_group = Some(70_000);
        assert!(volumes.apply(&asked).unwrap_err().to_string().contains("fsGroup 70000"));
        volumes.remove_pod(&"uid-1".parse().unwrap()).unwrap();
    }

    #[test]
    fn paths_that_leave_the_volume_or_are_the_writers_own_are_refused() {
        let (_dir, volumes) = volumes();
        for bad in ["../x", "/etc/passwd", "a/../../x", "..data", "..data/x", ""] {
            assert!(volumes.apply(&request(VolumeKind::Files, &[(bad, "x")])).is_err(), "{bad}");
        }
        volumes.remove_pod(&"uid-1".parse().unwrap()).unwrap();
    }

    #[test]
    fn a_plain_file_keeps_its_place_when_it_changes() {
        let (_dir, volumes) = volumes();
        let path = volumes.apply(&request(VolumeKind::PlainFiles, &[("hosts", "1")])).unwrap().join("hosts");
        let inode = fs::metadata(&path).unwrap().ino();
        volumes.apply(&request(VolumeKind::PlainFiles, &[("hosts", "22")])).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
        assert_eq!(fs::read_to_string(&path).unwrap(), "22");
    }
}
