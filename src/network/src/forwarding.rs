//! The host's `net.ipv4.ip_forward`: CNI's bridge switches it on and leaves it so; whoever takes Moxlet off the host
//! wants it as it was.

use std::{fs, io::ErrorKind, path::Path};

use crate::{Result, error::io};

const SWITCH: &str = "/proc/sys/net/ipv4/ip_forward";

/// Writes the present value to `record` unless something is recorded already.
pub fn record(record: &Path) -> Result<()> {
    record_from(Path::new(SWITCH), record)
}

/// Gives the host the recorded value back and removes the record; without one nothing.
pub fn restore(record: &Path) -> Result<()> {
    restore_to(Path::new(SWITCH), record)
}

fn record_from(switch: &Path, record: &Path) -> Result<()> {
    if record.exists() {
        return Ok(());
    }
    let value = fs::read_to_string(switch).map_err(io("read", switch))?;
    // Lost in a power cut, it would be recorded anew as 1, which by then is ours.
    moxlet_files::replace(record, value.as_bytes(), 0o644).map_err(io("write", record))
}

fn restore_to(switch: &Path, record: &Path) -> Result<()> {
    let value = match fs::read_to_string(record) {
        Ok(value) => value,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io("read", record)(e)),
    };
    if value.trim() == "0" {
        fs::write(switch, "0").map_err(io("write", switch))?;
    }
    fs::remove_file(record).map_err(io("remove", record))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_first_value_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let (switch, kept) = (dir.path().join("switch"), dir.path().join("kept"));
        fs::write(&switch, "0\n").unwrap();
        record_from(&switch, &kept).unwrap();
        fs::write(&switch, "1\n").unwrap();
        record_from(&switch, &kept).unwrap();
        restore_to(&switch, &kept).unwrap();
        assert_eq!(fs::read_to_string(&switch).unwrap(), "0");
        assert!(!kept.exists());
        restore_to(&switch, &kept).unwrap();
    }
}
