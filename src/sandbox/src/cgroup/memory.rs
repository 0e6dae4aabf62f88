//! The memory of a CT of Proxmox VE: how much its configuration says for a pod's limit, and the change of one that runs.
//!
//! Proxmox VE writes `memory.max` in whole MiB and `memory.high` a little below it, from where on the kernel throttles.

use std::path::Path;

use super::{read, write};
use crate::Result;

const MIB: u64 = 1 << 20;
/// The least memory that Proxmox VE takes, in MiB.
const LEAST: u64 = 16;
/// `memory.high` is this many 1024ths of `memory.max` …
const HIGH_SHARE: u64 = 1016;
/// … and from so many MiB on …
const LARGE: u64 = 16 << 10;
/// … these many MiB below it (`PVE::LXC::Config::calculate_memory_constraints`).
const LARGE_MARGIN: u64 = 128;

/// The bytes of `memory.high` of a CT with so many MiB.
pub(crate) fn high(mib: u64) -> u64 {
    if mib >= LARGE { (mib - LARGE_MARGIN).saturating_mul(MIB) } else { mib * 1024 * HIGH_SHARE }
}

/// Memory in MiB of which `memory.high`, too, is at least the pod's limit in bytes; without a limit `all`, in bytes.
pub(crate) fn mib(limit: Option<u64>, all: u64) -> u64 {
    let with_high = |bytes: u64| {
        let small = (u128::from(bytes) * 1024).div_ceil(u128::from(HIGH_SHARE) * u128::from(MIB));
        match u64::try_from(small) {
            Ok(small) if small < LARGE => small,
            _ => (bytes.div_ceil(MIB) + LARGE_MARGIN).max(LARGE),
        }
    };
    limit.map_or(all / MIB, with_high).max(LEAST)
}

/// Gives the CT with this cgroup memory for a limit of so many bytes in place of what it has. At no time is `memory.high` above
/// `memory.max`.
pub(super) fn resize(dir: &Path, limit: u64) -> Result<()> {
    let mib = mib(Some(limit), 0);
    let (max, high) = (mib.saturating_mul(MIB), high(mib));
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
    fn memory_high_is_where_proxmox_ve_sets_it() {
        for (mib, bytes) in [
            (16, 16 * 1_040_384),
            ((16 << 10) - 1, ((16 << 10) - 1) * 1_040_384),
            (16 << 10, (16_256) << 20),
            (65_536, 65_408 << 20),
        ] {
            assert_eq!(high(mib), bytes, "{mib} MiB");
        }
        // As little as holds a limit.
        for limit in [1, 16_255 << 20, (16_256 << 20) - 1, 16_256 << 20, (16_256 << 20) + 1, 1 << 40] {
            let least = mib(Some(limit), 0);
            assert!(high(least) >= limit && (least <= LEAST || high(least - 1) < limit), "{limit}: {least}");
        }
    }

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
