//! The host's subordinate id ranges: where `newuidmap` is installed LXC goes through it, and it wants the CTs' range
//! for root in `/etc/subuid` and `/etc/subgid`.

use std::{fs, io::Write as _, os::unix::fs::OpenOptionsExt as _, path::Path};

use crate::{Error, IdMap, Result, error::io, process::read_bounded};

const LARGEST: u64 = 1024 * 1024;

/// Makes sure that root may hand out `map`; adds the missing line if `write`, else says which line is missing.
/// Returns whether a line was added.
pub fn ensure(map: IdMap, write: bool) -> Result<bool> {
    let mut added = false;
    for file in ["/etc/subuid", "/etc/subgid"] {
        added |= ensure_in(Path::new(file), map, write)?;
    }
    Ok(added)
}

fn ensure_in(path: &Path, map: IdMap, write: bool) -> Result<bool> {
    let text = match read_bounded(path, LARGEST) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(io("read", path)(e)),
    };
    if covers(&text, map) {
        return Ok(false);
    }
    let line = format!("root:{}:{}\n", map.host_base, map.size);
    if !write {
        return Err(Error::Host(format!("add the line `{}` to {}", line.trim(), path.display())));
    }
    let gap = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o644)
        .open(path)
        .and_then(|mut file| file.write_all(format!("{gap}{line}").as_bytes()))
        .map_err(io("write", path))?;
    tracing::info!(file = %path.display(), line = line.trim(), "added the CTs' id range");
    Ok(true)
}

fn covers(text: &str, map: IdMap) -> bool {
    let (first, end) = (u64::from(map.host_base), u64::from(map.host_base) + u64::from(map.size));
    text.lines().any(|line| {
        let mut fields = line.trim().split(':');
        let (Some("root" | "0"), Some(start), Some(count), None) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            return false;
        };
        match (start.parse::<u64>(), count.parse::<u64>()) {
            (Ok(start), Ok(count)) => start <= first && end <= start.saturating_add(count),
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_missing_range_is_added_once_or_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("subuid");
        let map = IdMap { host_base: 100_000, size: 65536 };
        let error = ensure_in(&path, map, false).unwrap_err().to_string();
        assert!(error.contains("root:100000:65536"), "{error}");
        fs::write(&path, "someone:100000:65536").unwrap();
        assert!(ensure_in(&path, map, true).unwrap());
        assert!(!ensure_in(&path, map, true).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "someone:100000:65536\nroot:100000:65536\n");
    }

    #[test]
    fn a_larger_range_covers() {
        let map = IdMap { host_base: 100_000, size: 65536 };
        assert!(covers("root:0:4294967295\n", map));
        assert!(!covers("root:100000:65535\nroot:x:y\nroot:1\n", map));
    }
}
