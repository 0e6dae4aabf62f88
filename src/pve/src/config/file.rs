//! `/etc/pve/lxc/ID.conf`: the configuration as it lies in the cluster file system (`PVE::LXC::Config::parse_pct_config`
//! and `write_pct_config`).
//!
//! Comments at the top are the description, `lxc.*` lines come last, and after the main section there may be others:
//! `[pve:pending]` and one for each snapshot, which repeat the keys. Only the main section is read.
//!
//! Proxmox VE takes every file: of a line that it cannot read it warns, and uses the rest. So no line makes a file
//! unreadable here either; such a line is kept as it is, where Proxmox VE's next write drops it.

use std::{borrow::Cow, fmt::Write};

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
    /// Where the first of them begins in the text; its end without any.
    pub main_len: usize,
}

/// Why a configuration cannot be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    /// Too long.
    #[error("the configuration has {0} bytes, a file of the cluster file system has at most {MAX_FILE}")]
    TooLong(usize),
    /// A key or value that would become more than its own line, or another line.
    #[error(
        "{key:?} cannot be written: its key is none or its value is empty, begins or ends with a blank, or has a line break"
    )]
    Value {
        /// The key, or the whole line, cut to 120 characters.
        key: String,
    },
}

impl LxcConfig {
    /// Reads a configuration file's main section. A line of no known form is kept in `unread`.
    ///
    /// # Errors
    /// The file is too long.
    pub fn from_file(text: &str) -> Result<ConfigFile, InvalidConfig> {
        if text.len() > MAX_FILE {
            return Err(InvalidConfig::TooLong(text.len()));
        }
        let mut file = ConfigFile { config: Self::default(), sections: Vec::new(), main_len: 0 };
        let mut description: Option<String> = None;
        for whole in text.split_inclusive('\n') {
            let line = whole.strip_suffix('\n').unwrap_or(whole);
            let line = Line::read(line.strip_suffix('\r').unwrap_or(line));
            if let Line::Section(name) = line {
                file.sections.push(name.to_owned());
            }
            if !file.sections.is_empty() {
                continue;
            }
            file.main_len += whole.len();
            match line {
                Line::Blank | Line::Section(_) => {}
                Line::Comment(text) => {
                    let notes = description.get_or_insert_default();
                    notes.push_str(&decode(text));
                    notes.push('\n');
                }
                Line::Key("description", text) => description.get_or_insert_default().push_str(&decode(text)),
                Line::Key(key, value) => file.config.put(key, value),
                Line::Raw(key, value) => file.config.lxc.push((key.to_owned(), value.to_owned())),
                Line::Unread(line) => file.config.unread.push(line.to_owned()),
            }
        }
        file.config.description = description;
        Ok(file)
    }

    /// Writes a configuration file: description, keys in their order, raw lines, then those that could not be read.
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
        let cannot = |text: &str| InvalidConfig::Value { key: text.chars().take(120).collect() };
        let pairs = self.pairs().into_iter().filter(|(key, _)| key != "description");
        for (key, value) in pairs.chain(self.lxc.iter().cloned()) {
            let line = format!("{key}: {value}");
            let well =
                matches!(Line::read(&line), Line::Key(k, v) | Line::Raw(k, v) if k == key && v == value);
            if !well || line.contains(BREAKS) {
                return Err(cannot(&key));
            }
            out.push_str(&line);
            out.push('\n');
        }
        for line in &self.unread {
            if !matches!(Line::read(line), Line::Unread(_)) || line.contains('\n') {
                return Err(cannot(line));
            }
            out.push_str(line);
            out.push('\n');
        }
        if out.len() > MAX_FILE { Err(InvalidConfig::TooLong(out.len())) } else { Ok(out) }
    }
}

/// What a value must not have to stay on its line in every reader's eyes.
const BREAKS: &[char] = &['\n', '\r', '\0'];

/// What a line is to `parse_pct_config`.
enum Line<'a> {
    Blank,
    Section(&'a str),
    Comment(&'a str),
    /// A key of Proxmox VE's; its value is not empty.
    Key(&'a str, &'a str),
    /// A key of LXC's; an empty value is one, such as that which clears a list.
    Raw(&'a str, &'a str),
    /// Proxmox VE warns of it and goes on.
    Unread(&'a str),
}

impl<'a> Line<'a> {
    fn read(line: &'a str) -> Self {
        let bare = line.trim_matches(BLANKS);
        if bare.is_empty() {
            return Self::Blank;
        }
        if let Some(name) = section(line) {
            return Self::Section(name);
        }
        if let Some(comment) = line.strip_prefix('#') {
            return Self::Comment(comment);
        }
        let read = if line.starts_with("lxc.") { raw(line) } else { key(line) };
        read.unwrap_or(Self::Unread(line))
    }
}

/// What Perl's `\s` is in a text of bytes.
const BLANKS: &[char] = &[' ', '\t', '\r', '\x0b', '\x0c'];

/// The section of changes that wait for a start.
const PENDING: &str = "pve:pending";

/// The name of the section that a line opens. Other texts in brackets open none: Proxmox VE warns of them, and what follows belongs
/// to the section before.
fn section(line: &str) -> Option<&str> {
    let name = line.trim_end_matches(BLANKS).strip_prefix('[')?.strip_suffix(']')?;
    let well = name.len() > 1
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    if name.eq_ignore_ascii_case(PENDING) { Some(PENDING) } else { well.then_some(name) }
}

/// `lxc.key: value` or `lxc.key = value`; only the equals sign may have blanks before it.
fn raw(line: &str) -> Option<Line<'_>> {
    let (before, value) = line.split_at_checked(line.find([':', '='])?)?;
    let key = if value.starts_with('=') { before.trim_end_matches(BLANKS) } else { before };
    let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-.".contains(&b);
    let well = key.len() > "lxc.".len() && key.bytes().all(ok);
    well.then_some(Line::Raw(key, value.get(1..)?.trim_matches(BLANKS)))
}

/// `key: value`, where the key is lowercase letters and underscores, then digits.
fn key(line: &str) -> Option<Line<'_>> {
    let (key, value) = line.split_once(':')?;
    let stem = key.trim_end_matches(|c: char| c.is_ascii_digit());
    let well = stem.starts_with(|c: char| c.is_ascii_lowercase())
        && stem.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    let value = value.trim_matches(BLANKS);
    (well && !value.is_empty()).then_some(Line::Key(key, value))
}

/// `PVE::Tools::decode_text`.
fn decode(text: &str) -> Cow<'_, str> {
    percent_decode_str(text).decode_utf8_lossy()
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
