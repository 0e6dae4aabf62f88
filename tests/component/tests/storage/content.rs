//! A small real layer application: what an image's layer brings and removes, as a driver wants it.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown, lchown, symlink},
    path::Path,
    thread,
};

use moxlet_storage::{IdMap, WhiteoutStyle};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, makedev, mknodat, setxattr};

/// One entry of a layer.
pub(crate) enum Change {
    Dir(&'static str),
    /// Path, content, owner.
    File(&'static str, &'static str, u32),
    Link(&'static str, &'static str),
    HardLink(&'static str, &'static str),
    /// Removes what is below.
    Gone(&'static str),
    /// Removes all that is below in a directory.
    Opaque(&'static str),
}

/// Applies a layer to a draft.
pub(crate) fn apply(dir: &Path, style: WhiteoutStyle, changes: &[Change]) {
    for change in changes {
        match change {
            Change::Dir(path) => fs::create_dir_all(dir.join(path)).unwrap(),
            Change::File(path, text, owner) => {
                // A new file, not a new content of the old one.
                let _ = fs::remove_file(dir.join(path));
                write(&dir.join(path), text, *owner);
            }
            Change::Link(to, path) => {
                symlink(to, dir.join(path)).unwrap();
                lchown(dir.join(path), Some(0), Some(0)).unwrap();
            }
            Change::HardLink(from, path) => fs::hard_link(dir.join(from), dir.join(path)).unwrap(),
            Change::Gone(path) => whiteout(&dir.join(path), style),
            Change::Opaque(path) => opaque(&dir.join(path), style),
        }
    }
}

fn whiteout(path: &Path, style: WhiteoutStyle) {
    match style {
        WhiteoutStyle::Overlay => {
            mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), makedev(0, 0)).unwrap();
        }
        WhiteoutStyle::Apply if path.symlink_metadata().unwrap().is_dir() => {
            fs::remove_dir_all(path).unwrap();
        }
        WhiteoutStyle::Apply => fs::remove_file(path).unwrap(),
    }
}

fn opaque(path: &Path, style: WhiteoutStyle) {
    match style {
        WhiteoutStyle::Overlay => {
            fs::create_dir_all(path).unwrap();
            setxattr(path, "trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
        }
        WhiteoutStyle::Apply => {
            for entry in fs::read_dir(path).unwrap() {
                whiteout(&entry.unwrap().path(), style);
            }
        }
    }
}

pub(crate) fn write(path: &Path, text: &str, owner: u32) {
    fs::write(path, text).unwrap();
    chown(path, Some(owner), Some(owner)).unwrap();
}

pub(crate) fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// `cap_net_raw+ep` as the kernel stores it for the host's root (version 2 of `security.capability`).
pub(crate) fn net_raw() -> Vec<u8> {
    let mut value = 0x0200_0001_u32.to_le_bytes().to_vec();
    value.extend_from_slice(&(1_u32 << 13).to_le_bytes());
    value.extend_from_slice(&[0; 12]);
    value
}

/// An extended attribute.
pub(crate) fn attribute(path: &Path, name: &str) -> Vec<u8> {
    let mut value = vec![0; 1024];
    let length = rustix::fs::getxattr(path, name, &mut value).unwrap();
    value.truncate(length);
    value
}

/// Bytes that no file system makes smaller.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed.to_le_bytes()
    };
    let mut bytes: Vec<u8> = std::iter::repeat_with(&mut next).take(length.div_ceil(8)).flatten().collect();
    bytes.truncate(length);
    bytes
}

/// Does something as the root of a container: the host's own root has no id in its file system, and can make nothing there.
pub(crate) fn as_root_of<T: Send>(map: IdMap, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            // Of this thread alone, which ends with the work.
            #[allow(unsafe_code)]
            // SAFETY: both calls take a number and nothing else.
            unsafe {
                libc::setfsgid(map.host_base);
                libc::setfsuid(map.host_base);
            }
            work()
        });
        worker.join().unwrap()
    })
}
