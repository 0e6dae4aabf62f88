//! The memory of a CT of Proxmox VE: how much its configuration says for a pod's limit, and the change of one that runs.
//!
//! Proxmox VE writes `memory.max` in whole MiB and `memory.high` a little below it, from where on the kernel throttles.

use std::path::Path;

use super::{read, write};
use crate::Result;

const MIB: u64 = 1 << 20;
/// The least memory that Proxmox VE takes, in MiB.
const LEAST: u64 = 16;
/// `memory.high` is this many 1024ths of `memory.max` (`PVE::LXC::CGroup`).
pub(crate) const HIGH_SHARE: u64 = 1016;

/// Memory in MiB of which `memory.high`, too, is at least the pod's limit in bytes; without a limit `all`, in bytes.
pub(crate) fn mib(limit: Option<u64>, all: u64) -> u64 {
    let with_high = |bytes: u64| {
        let bytes = u128::from(bytes) * 1024;
        let mib = bytes.div_ceil(u128::from(HIGH_SHARE) * u128::from(MIB));
        u64::try_from(mib).unwrap_or(u64::MAX / MIB)
    };
    limit.map_or(all / MIB, with_high).max(LEAST)
}

/// Gives the CT with this cgroup memory for a limit of so many bytes in place of what it has. At no time is `memory.high` above
/// `memory.max`.
pub(super) fn resize(dir: &Path, limit: u64) -> Result<()> {
    let max = mib(Some(limit), 0).saturating_mul(MIB);
    let high = u128::from(max) * u128::from(HIGH_SHARE) / 1024;
    // "max" is no number and above all.
    let now = read(&dir.join("memory.max"))?.trim().parse().unwrap_or(u64::MAX);
    let (max_file, high_file) = (("memory.max", max.to_string()), ("memory.high", high.to_string()));
    for (file, value) in if max < now { [high_file, max_file] } else { [max_file, high_file] } {
        write(&dir.join(file), &value)?;
    }
    let swap = dir.join("memory.swap.max");
    // A kernel without swap accounting has no such file.
    if swap.exists() { write(&swap, "0") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use std::fs;

    use super::*;
    use crate::Error;

    #[test]
    fn memory_high_is_never_above_memory_max() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path();
        let missing = |error: Error| match error {
            Error::Cgroup { path, .. } => path.file_name().unwrap().to_owned(),
            other => panic!("{other}"),
        };
        let max = || fs::read_to_string(dir.join("memory.max")).unwrap();
        // What is written second is what is missed where both cannot be; of memory.high there is no file.
        fs::write(dir.join("memory.max"), (32 << 20).to_string()).unwrap();
        assert_eq!(missing(resize(dir, 63 << 20).unwrap_err()), "memory.high");
        assert_eq!(max(), (64 << 20).to_string(), "raised first");
        assert_eq!(missing(resize(dir, 31 << 20).unwrap_err()), "memory.high");
        assert_eq!(max(), (64 << 20).to_string(), "lowered last");
    }
}
