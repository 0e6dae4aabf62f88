//! `/etc/pve/lxc/ID.conf`: the configuration as it lies in the cluster file system (`PVE::LXC::Config::parse_pct_config`
//! and `write_pct_config`).
//!
//! Comments at the top are the description, `lxc.*` lines come last, and after the main section there may be others:
//! `[pve:pending]` and one for each snapshot, which repeat the keys. Only the main section is read.

use std::fmt::Write;

use percent_encoding::percent_decode_str;

use super::LxcConfig;

/// The most that the cluster file system takes for a file.
const MAX_FILE: usize = 1 << 20;

/// What is read from a configuration file.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfigFile {
    /// The main section.
    pub config: LxcConfig,
    /// The names of the sections after it: `pve:pending` and snapshots.
    pub sections: Vec<String>,
}

/// Why a configuration cannot be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    /// Too long.
    #[error("the configuration has {0} bytes, a file of the cluster file system has at most {MAX_FILE}")]
    TooLong(usize),
    /// A line that is none.
    #[error("line {line} of the configuration is none: {text:?}")]
    Line {
        /// Which, from 1.
        line: usize,
        /// The line, cut to 120 characters.
        text: String,
    },
    /// A key or value that would become more than its own line, or another line.
    #[error(
        "{key:?} cannot be written: its key or value is empty, begins or ends with a blank, or has a control character"
    )]
    Value {
        /// The key, cut to 120 characters.
        key: String,
    },
}

impl LxcConfig {
    /// Reads a configuration file's main section.
    ///
    /// # Errors
    /// The file is too long, or has a line of no known form.
    pub fn from_file(text: &str) -> Result<ConfigFile, InvalidConfig> {
        if text.len() > MAX_FILE {
            return Err(InvalidConfig::TooLong(text.len()));
        }
        let mut file = ConfigFile { config: Self::default(), sections: Vec::new() };
        let mut description: Option<String> = None;
        for (i, line) in text.lines().enumerate() {
            if let Some(name) = line.trim_end().strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
                file.sections.push(name.to_owned());
            }
            if !file.sections.is_empty() || line.trim().is_empty() {
                continue;
            }
            if let Some(comment) = line.strip_prefix('#') {
                let notes = description.get_or_insert_default();
                notes.push_str(&percent_decode_str(comment).decode_utf8_lossy());
                notes.push('\n');
                continue;
            }
            let (key, value) = split(line)
                .ok_or_else(|| InvalidConfig::Line { line: i + 1, text: line.chars().take(120).collect() })?;
            if key.starts_with("lxc.") {
                file.config.lxc.push((key.to_owned(), value.to_owned()));
            } else {
                file.config.put(key, value);
            }
        }
        if description.is_some() {
            file.config.description = description;
        }
        Ok(file)
    }

    /// Writes a configuration file: description, keys in their order, raw lines.
    ///
    /// # Errors
    /// A key or value would not stay on its line, or the whole is too long.
    pub fn to_file(&self) -> Result<String, InvalidConfig> {
        let mut out = String::new();
        for line in self.description.iter().flat_map(|d| d.lines()) {
            out.push('#');
            encode(line, &mut out);
            out.push('\n');
        }
        let pairs = self.pairs().into_iter().filter(|(key, _)| key != "description");
        for (key, value) in pairs.chain(self.lxc.iter().cloned()) {
            let well = split(&format!("{key}: {value}")).is_some_and(|(k, v)| k == key && v == value);
            if !well || value.chars().any(char::is_control) {
                return Err(InvalidConfig::Value { key: key.chars().take(120).collect() });
            }
            // Writing to a String does not fail.
            let _ = writeln!(out, "{key}: {value}");
        }
        if out.len() > MAX_FILE { Err(InvalidConfig::TooLong(out.len())) } else { Ok(out) }
    }
}

/// `key: value`; raw keys may have `=` in place of the colon.
fn split(line: &str) -> Option<(&str, &str)> {
    let raw = line.starts_with("lxc.");
    let at = line.find(|c| c == ':' || (raw && c == '='))?;
    let (key, value) = (line.get(..at)?.trim_end(), line.get(at + 1..)?.trim());
    let ok = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-' || (raw && b == b'.');
    let begins = key.starts_with(|c: char| c.is_ascii_lowercase());
    (begins && key.bytes().all(ok) && !value.is_empty()).then_some((key, value))
}

/// As `PVE::Tools::encode_text`, and `%` besides, which that leaves alone although its counterpart decodes it.
fn encode(text: &str, out: &mut String) {
    for byte in text.bytes() {
        if (0x20..=0x7e).contains(&byte) && byte != b':' && byte != b'%' {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
}
