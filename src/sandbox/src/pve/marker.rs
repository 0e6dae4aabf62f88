//! Which CTs are ours: a CT whose main section includes a file `<vmid>-<pod uid>.conf` of our directory, whose VMID is in our
//! range, and whose file, host and record agree. Whatever differs is foreign and is never touched.
//!
//! Notes and tags can be edited by anybody and are copied by a clone, as is the line that includes the file. But its name holds
//! the VMID, so that a copy under another one is not ours; on another host, or after the pod is gone, a copy does not find it;
//! and one that finds it is kept from starting by the hook in it (see [`super::config`]).

use std::{
    fs,
    io::{ErrorKind, Write as _},
    path::{Path, PathBuf},
};

use moxlet_ids::{PodUid, SandboxId, Vmid};
use moxlet_pve::{NodeName, config::LxcConfig};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, error::io, process::read_bounded};

const MAX: u64 = 64 << 10;
const PREFIX: &str = "# moxlet: ";
const VERSION: u32 = 1;

/// What the first line of an included file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark {
    version: u32,
    pub(super) vmid: Vmid,
    pub(super) uid: PodUid,
    pub(super) sandbox: SandboxId,
    pub(super) node: NodeName,
}

impl Mark {
    pub(super) fn new(vmid: Vmid, uid: PodUid, sandbox: SandboxId, node: NodeName) -> Self {
        Self { version: VERSION, vmid, uid, sandbox, node }
    }

    /// Where its file is.
    pub(super) fn path(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{}-{}.conf", self.vmid, self.uid))
    }

    /// Writes the file. Written again it is the same; one of another sandbox stops it.
    pub(super) fn write(&self, dir: &Path, text: &str) -> Result<PathBuf> {
        let path = self.path(dir);
        if let Some(there) = read(&path)?
            && there != *self
        {
            let reason = format!("{} is the mark of sandbox {}", path.display(), there.sandbox);
            return Err(Error::Foreign { vmid: self.vmid, reason });
        }
        let line = serde_json::to_string(self).map_err(|e| io("write", &path)(e.into()))?;
        let draft = path.with_extension("new");
        let write = || {
            let mut file = fs::File::create(&draft)?;
            writeln!(file, "{PREFIX}{line}")?;
            writeln!(
                file,
                "# Made by Moxlet with the CT of this number and removed with it. Do not edit, move or copy it."
            )?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&draft, &path)?;
            fs::File::open(dir)?.sync_all()
        };
        write().map_err(io("write", &path))?;
        Ok(path)
    }

    /// Removes the file. Idempotent.
    pub(super) fn remove(&self, dir: &Path) -> Result<()> {
        for path in [self.path(dir), self.path(dir).with_extension("new")] {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(io("remove", path)(e)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether a CT of this configuration is the one marked; the reason if not.
    pub(super) fn agrees(&self, dir: &Path, config: &LxcConfig) -> Result<(), String> {
        let path = self.path(dir);
        let included: Vec<&str> =
            config.lxc.iter().filter(|(k, _)| k == "lxc.include").map(|(_, v)| v.as_str()).collect();
        if !included.iter().any(|i| Path::new(i) == path) {
            return Err(format!("its configuration does not include {}", path.display()));
        }
        match read(&path) {
            Ok(Some(there)) if there == *self => Ok(()),
            Ok(Some(_)) => {
                Err(format!("{} says something else than the record of the sandbox", path.display()))
            }
            Ok(None) => Err(format!("{} is missing", path.display())),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Whether a configuration includes a file of ours, of whatever CT: a copy of one, or one that was left behind.
pub(super) fn resembles(dir: &Path, config: &LxcConfig) -> bool {
    config.lxc.iter().any(|(key, value)| key == "lxc.include" && Path::new(value).parent() == Some(dir))
}

/// Reads the mark of an included file; none if there is no file.
fn read(path: &Path) -> Result<Option<Mark>> {
    let text = match read_bounded(path, MAX) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io("read", path)(e)),
    };
    let line = text.lines().next().and_then(|l| l.strip_prefix(PREFIX)).unwrap_or_default();
    let mark = serde_json::from_str(line).map_err(|e| io("understand the first line of", path)(e.into()))?;
    Ok(Some(mark))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn mark(vmid: u32, sandbox: &str) -> Mark {
        Mark::new(
            Vmid::new(vmid).unwrap(),
            "u-1".parse().unwrap(),
            sandbox.parse().unwrap(),
            "pve1".parse().unwrap(),
        )
    }

    fn including(path: &Path) -> LxcConfig {
        LxcConfig { lxc: vec![("lxc.include".into(), path.display().to_string())], ..LxcConfig::default() }
    }

    #[test]
    fn a_ct_is_ours_only_if_file_and_record_agree() {
        let dir = tempfile::tempdir().unwrap();
        let own = mark(100, "ab");
        let path = own.write(dir.path(), "lxc.signal.halt = SIGTERM\n").unwrap();
        assert!(path.ends_with("100-u-1.conf"));
        assert_eq!(own.agrees(dir.path(), &including(&path)), Ok(()));
        // A clone: the same raw lines under another number.
        assert!(
            mark(101, "ab").agrees(dir.path(), &including(&path)).unwrap_err().contains("does not include")
        );
        // A record of another sandbox of the same pod.
        assert!(
            mark(100, "cd").agrees(dir.path(), &including(&path)).unwrap_err().contains("something else")
        );
        assert!(own.agrees(dir.path(), &LxcConfig::default()).is_err());
        assert!(resembles(dir.path(), &including(&path)) && !resembles(dir.path(), &LxcConfig::default()));
        own.remove(dir.path()).unwrap();
        own.remove(dir.path()).unwrap();
        assert!(own.agrees(dir.path(), &including(&path)).unwrap_err().contains("missing"));
    }

    #[test]
    fn the_mark_of_another_sandbox_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        mark(100, "ab").write(dir.path(), "").unwrap();
        mark(100, "ab").write(dir.path(), "").unwrap();
        assert!(matches!(mark(100, "cd").write(dir.path(), ""), Err(Error::Foreign { .. })));
        fs::write(dir.path().join("100-u-1.conf"), "nonsense").unwrap();
        assert!(mark(100, "ab").write(dir.path(), "").is_err());
    }
}
