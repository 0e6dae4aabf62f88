//! The configuration folder as a mount of its own, which nobody can write to without quorum, whoever it is: as pmxcfs.
//!
//! pmxcfs says EACCES where this says EROFS. What a killed simulator leaves mounted, the next one takes over.

use std::{
    io::{Error, ErrorKind, Result},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::{
    fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx},
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount},
};

/// How often, and at what intervals, it is tried to make it read-only: somebody may just be writing.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(10);

/// A directory that is bound onto itself until this is dropped.
#[derive(Debug)]
pub(crate) struct Mounted {
    dir: PathBuf,
}

impl Mounted {
    /// Mounts the directory, or takes over what is mounted there, writable.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        if !is_mount(dir)? {
            mount_bind(dir, dir)?;
        }
        let this = Self { dir: dir.to_owned() };
        this.set_writable(true)?;
        Ok(this)
    }

    /// Lets everybody write, or nobody.
    pub(crate) fn set_writable(&self, writable: bool) -> Result<()> {
        let mode = if writable { MountFlags::empty() } else { MountFlags::RDONLY };
        for _ in 0..TRIES {
            match mount_remount(&self.dir, MountFlags::BIND | mode, c"") {
                Err(Errno::BUSY) => thread::sleep(PAUSE),
                done => return Ok(done?),
            }
        }
        Err(Error::new(
            ErrorKind::ResourceBusy,
            format!("{} is being written to all the time", self.dir.display()),
        ))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.dir, UnmountFlags::DETACH) {
            tracing::warn!(dir = %self.dir.display(), %error, "cannot unmount the configuration folder");
        }
    }
}

fn is_mount(dir: &Path) -> Result<bool> {
    let found = statx(CWD, dir, AtFlags::empty(), StatxFlags::BASIC_STATS)?;
    Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}
