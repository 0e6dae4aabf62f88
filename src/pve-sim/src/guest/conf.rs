//! A CT's configuration file, read and written as PVE::LXC::Config does: comments are the description, keys are sorted,
//! raw `lxc.*` lines outside the allow-list vanish, `[pve:pending]` and `[snapshot]` sections are kept.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::raw;
use crate::{schema::Schema, section::digest};

/// The keys of one section.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Keys {
    /// PVE's own keys.
    pub(crate) values: BTreeMap<String, String>,
    /// Raw keys in their order.
    pub(crate) raw: Vec<(String, String)>,
    /// Decoded, each line with its newline; empty if none.
    pub(crate) description: String,
}

/// A whole file.
#[derive(Debug, Clone, Default)]
pub(crate) struct CtConf {
    /// SHA-1 of the text that it was read from.
    pub(crate) digest: String,
    /// The main section: what is in force.
    pub(crate) main: Keys,
    /// Changes that wait for a restart; `delete` lists keys that will go.
    pub(crate) pending: Keys,
    /// Snapshots by name.
    pub(crate) snapshots: BTreeMap<String, Keys>,
}

/// The raw key that the key `env` is written as, a line for each variable.
const RUNTIME_ENV: &str = "lxc.environment.runtime";

enum Place {
    Main,
    Pending,
    Snapshot(String),
}

/// The section that a line opens. What has brackets and no section's name is no line at all.
fn section(line: &str) -> Option<Place> {
    let name = line.trim_end().strip_prefix('[')?.strip_suffix(']')?;
    if name.eq_ignore_ascii_case("pve:pending") {
        return Some(Place::Pending);
    }
    let well = name.len() > 1
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    well.then(|| Place::Snapshot(name.to_owned()))
}

impl CtConf {
    /// Reads a file's text, each line as `parse_pct_config` does. Those that it would not take are left out, with a warning in
    /// the log.
    pub(crate) fn parse(text: &str) -> Self {
        let mut conf = Self { digest: digest(text), ..Self::default() };
        let mut place = Place::Main;
        for line in text.lines() {
            if line.trim().is_empty() {
                continue;
            }
            if let Some(section) = section(line) {
                place = section;
                continue;
            }
            let pending = matches!(place, Place::Pending);
            let keys = match &place {
                Place::Main => &mut conf.main,
                Place::Pending => &mut conf.pending,
                Place::Snapshot(name) => conf.snapshots.entry(name.clone()).or_default(),
            };
            if keys.read_line(line, pending).is_none() {
                tracing::warn!(line, "unable to parse config");
            }
        }
        conf
    }

    /// The text to write.
    pub(crate) fn format(&self) -> String {
        let mut text = self.main.format();
        if self.pending != Keys::default() {
            text.push_str("\n[pve:pending]\n");
            text.push_str(&self.pending.format());
        }
        for (name, keys) in &self.snapshots {
            text.push_str(&format!("\n[{name}]\n"));
            text.push_str(&keys.format());
        }
        text
    }

    /// A key of the main section.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.main.values.get(key).map(String::as_str)
    }

    /// The `lock:` key.
    pub(crate) fn lock(&self) -> Option<&str> {
        self.get("lock")
    }

    /// What the UI calls the CT.
    pub(crate) fn name(&self, vmid: u32) -> String {
        self.get("hostname").map_or_else(|| format!("CT{vmid}"), str::to_owned)
    }

    /// Memory in bytes; missing means 512 MiB.
    pub(crate) fn memory(&self) -> u64 {
        self.get("memory").and_then(|m| m.parse::<u64>().ok()).unwrap_or(512).saturating_mul(1024 * 1024)
    }

    /// Swap in bytes; missing means none, whatever the schema says of a default.
    pub(crate) fn swap(&self) -> u64 {
        self.get("swap").and_then(|m| m.parse::<u64>().ok()).unwrap_or(0).saturating_mul(1024 * 1024)
    }

    /// Whether a boolean key is set.
    pub(crate) fn flag(&self, key: &str) -> bool {
        self.get(key).and_then(crate::schema::parse_boolean) == Some(1)
    }

    /// The keys that pending changes delete, with the mark of those to be forced.
    pub(crate) fn pending_deletes(&self) -> Vec<(String, bool)> {
        let list = self.pending.values.get("delete").map_or("", String::as_str);
        list.split([',', ' ', ';'])
            .filter(|k| !k.is_empty())
            .map(|k| k.strip_prefix('!').map_or_else(|| (k.to_owned(), false), |k| (k.to_owned(), true)))
            .collect()
    }

    /// Puts pending changes in force, as a start of the CT does.
    pub(crate) fn apply_pending(&mut self) -> bool {
        if self.pending == Keys::default() {
            return false;
        }
        for (key, _) in self.pending_deletes() {
            self.main.values.remove(&key);
        }
        let pending = std::mem::take(&mut self.pending);
        self.main.values.extend(pending.values.into_iter().filter(|(k, _)| k != "delete"));
        true
    }
}

impl Keys {
    /// Takes a line; none if Proxmox VE warns of it and goes on.
    fn read_line(&mut self, line: &str, pending: bool) -> Option<()> {
        if let Some(comment) = line.strip_prefix('#') {
            self.description.push_str(&decode_text(comment));
            self.description.push('\n');
            return Some(());
        }
        if let Some((key, value)) = raw::line(line) {
            if key == RUNTIME_ENV {
                let env = self.values.entry("env".to_owned()).or_default();
                if !env.is_empty() {
                    env.push('\0');
                }
                env.push_str(value);
                return Some(());
            }
            return raw::is_allowed(key).then(|| self.raw.push((key.to_owned(), value.to_owned())));
        }
        let (key, value) = line.split_once(':').map(|(key, value)| (key, value.trim()))?;
        let stem = key.trim_end_matches(|c: char| c.is_ascii_digit());
        let well = stem.starts_with(|c: char| c.is_ascii_lowercase())
            && stem.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        if !well || value.is_empty() || (key == "delete" && !pending) {
            return None;
        }
        if key == "description" {
            self.description.push_str(&decode_text(value));
        } else {
            self.values.insert(key.to_owned(), value.to_owned());
        }
        Some(())
    }

    fn format(&self) -> String {
        let mut text = String::new();
        for line in self.description.lines() {
            text.push_str(&format!("#{}\n", encode_text(line)));
        }
        for (key, value) in self.values.iter().filter(|(key, _)| *key != "env") {
            text.push_str(&format!("{key}: {value}\n"));
        }
        let env = self.values.get("env").map_or("", String::as_str);
        for variable in env.split('\0').filter(|v| !v.is_empty()) {
            text.push_str(&format!("{RUNTIME_ENV}: {variable}\n"));
        }
        for (key, value) in &self.raw {
            text.push_str(&format!("{key}: {value}\n"));
        }
        text
    }

    /// As the API shows them: integers and booleans as numbers, everything else as text.
    pub(crate) fn to_json(&self) -> Value {
        let mut out = json!({});
        for (key, value) in &self.values {
            out[key] = typed(key, value);
        }
        if !self.description.is_empty() {
            out["description"] = json!(self.description);
        }
        if !self.raw.is_empty() {
            out["lxc"] = json!(self.raw.iter().map(|(k, v)| json!([k, v])).collect::<Vec<_>>());
        }
        out
    }
}

/// A value with its type of the schema, as `check_type` gives it.
fn typed(key: &str, value: &str) -> Value {
    const INTEGERS: [&str; 6] = ["cores", "cpuunits", "memory", "swap", "tty", "snaptime"];
    const BOOLEANS: [&str; 6] = ["onboot", "template", "unprivileged", "protection", "debug", "console"];
    if INTEGERS.contains(&key)
        && let Ok(n) = value.parse::<i64>()
    {
        return json!(n);
    }
    if BOOLEANS.contains(&key)
        && let Some(b) = crate::schema::parse_boolean(value)
    {
        return json!(b);
    }
    json!(value)
}

/// Whether a key may stand in a CT's config, by the parameters of the API's PUT.
pub(crate) fn is_option(schema: &Schema, key: &str) -> bool {
    schema.find("PUT", "/nodes/n/lxc/100/config").is_some_and(|m| {
        m.method.properties.contains_key(key)
            && !matches!(key, "node" | "vmid" | "digest" | "delete" | "revert")
    }) || matches!(key, "unprivileged")
}

/// PVE::Tools::encode_text: control characters, `"`, `%`, `:`, `!` and all beyond ASCII are percent-encoded.
pub(crate) fn encode_text(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b' ' | 0x23..=0x24 | 0x26..=0x39 | 0x3b..=0x7e => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// PVE::Tools::decode_text.
pub(crate) fn decode_text(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TEXT: &str = "# first: line\nmemory: 256\narch: amd64\nlxc.idmap: u 0 100000 65536\nlxc.include = /x/100-a.conf\n\
        lxc.namespace.share.net: /x\nlxc.rootfs.path: /y\n\n[pve:pending]\nmemory: 512\n\n[snap1]\n#why\narch: amd64\nmemory: 128\nsnaptime: 5\n";

    #[test]
    fn a_write_sorts_keys_and_drops_raw_keys_outside_the_allow_list() {
        let conf = CtConf::parse(TEXT);
        assert_eq!(
            conf.format(),
            "# first%3A line\narch: amd64\nmemory: 256\nlxc.idmap: u 0 100000 65536\nlxc.include: /x/100-a.conf\n\
             \n[pve:pending]\nmemory: 512\n\n[snap1]\n#why\narch: amd64\nmemory: 128\nsnaptime: 5\n"
        );
    }

    #[test]
    fn comments_become_the_description_and_survive_a_write() {
        let conf = CtConf::parse(TEXT);
        assert_eq!(conf.main.description, " first: line\n");
        assert_eq!(CtConf::parse(&conf.format()).main.description, " first: line\n");
        assert_eq!(conf.main.to_json()["lxc"][0][0], "lxc.idmap");
    }

    #[test]
    fn a_line_that_is_none_is_passed_over_and_an_empty_raw_value_is_one() {
        let conf = CtConf::parse(
            "memory: 1\nlxc.cap.drop:\nnonsense\nfoo-bar: 1\nMemory: 2\nswap:\ndelete: memory\nlxc.Cap.keep: x\n\
             lxc.cap.keep : x\n[no section]\nlxc.utsname = web\ncores = 2\n[Snap-1]\nmemory: 3\n[PVE:pending]\ndelete: memory\n",
        );
        assert_eq!(
            conf.format(),
            "memory: 1\nlxc.cap.drop: \nlxc.utsname: web\n\n[pve:pending]\ndelete: memory\n\n[Snap-1]\nmemory: 3\n"
        );
    }

    #[test]
    fn the_environment_is_a_raw_line_for_each_variable() {
        let text = "memory: 1\nlxc.environment.runtime: A=1\nlxc.environment.runtime: B=2\nlxc.cap.drop: \n";
        let conf = CtConf::parse(text);
        assert_eq!(conf.get("env"), Some("A=1\0B=2"));
        assert_eq!(conf.format(), text);
    }

    #[test]
    fn a_start_puts_pending_changes_in_force() {
        let mut conf =
            CtConf::parse("memory: 1\nnameserver: 1.1.1.1\n[pve:pending]\ndelete: nameserver\nmemory: 2\n");
        assert!(conf.apply_pending());
        assert_eq!(conf.format(), "memory: 2\n");
    }
}
