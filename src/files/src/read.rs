//! Reading within bounds: a file that somebody else can write must not fill the memory of a daemon.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

/// Reads a stream to its end, which must come within `max` bytes.
///
/// # Errors
/// [`io::ErrorKind::FileTooLarge`] where there is more; otherwise what the reader says.
pub fn read_to_bound(reader: impl Read, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("is larger than {max} bytes")));
    }
    Ok(bytes)
}

/// Reads a whole file of at most `max` bytes. Links are followed: not for a path that a container can change.
///
/// # Errors
/// As [`read_to_bound`], and where the file cannot be opened.
pub fn read_bounded(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    read_to_bound(File::open(path)?, max)
}

/// Reads a whole text file of at most `max` bytes. Links are followed: not for a path that a container can change.
///
/// # Errors
/// As [`read_bounded`]; [`io::ErrorKind::InvalidData`] where it is not UTF-8.
pub fn read_text_bounded(path: &Path, max: u64) -> io::Result<String> {
    String::from_utf8(read_bounded(path, max)?)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "is not UTF-8"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_file_at_the_bound_is_read_and_one_beyond_it_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, "four").unwrap();
        assert_eq!(read_text_bounded(&path, 4).unwrap(), "four");
        assert_eq!(read_bounded(&path, 3).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        std::fs::write(&path, [0xff]).unwrap();
        assert_eq!(read_text_bounded(&path, 4).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
