//! Section configuration files (`type: id`, then indented `key value` lines): storage.cfg, HA resources and rules.

use std::collections::BTreeMap;

use sha1::{Digest, Sha1};

/// One section.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Section {
    pub(crate) kind: String,
    pub(crate) id: String,
    pub(crate) keys: BTreeMap<String, String>,
}

/// Parses a file; lines of no known form are passed over.
pub(crate) fn parse(text: &str) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    for line in text.lines() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        if line.starts_with([' ', '\t']) {
            let trimmed = line.trim();
            let (key, value) = trimmed.split_once(char::is_whitespace).unwrap_or((trimmed, "1"));
            if let Some(section) = sections.last_mut() {
                section.keys.insert(key.to_owned(), value.trim().to_owned());
            }
        } else if let Some((kind, id)) = line.split_once(':') {
            sections.push(Section { kind: kind.trim().into(), id: id.trim().into(), keys: BTreeMap::new() });
        }
    }
    sections
}

/// Writes a file.
pub(crate) fn format(sections: &[Section]) -> String {
    let mut text = String::new();
    for section in sections {
        text.push_str(&format!("{}: {}\n", section.kind, section.id));
        for (key, value) in &section.keys {
            text.push_str(&format!("\t{key} {value}\n"));
        }
        text.push('\n');
    }
    text
}

/// The digest of a configuration file's text.
pub(crate) fn digest(text: &str) -> String {
    hex::encode(Sha1::digest(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let text = "zfspool: local-zfs\n\tcontent rootdir,images\n\tpool rpool/data\n\n";
        let sections = parse(text);
        assert_eq!(sections[0].keys["pool"], "rpool/data");
        assert_eq!(format(&sections), text);
    }
}
