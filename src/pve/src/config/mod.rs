//! The configuration of a CT, typed: as the API answers it, as the API takes it, and as it lies in `/etc/pve/lxc/ID.conf`.
//!
//! Nothing is lost on the way through: keys that this version does not know, and values that it cannot read, are kept
//! as text in [`LxcConfig::unknown`], lines that are none in [`LxcConfig::unread`].

mod file;
mod mount;
mod net;
mod options;
mod property;

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde_json::Value;

pub use file::{ConfigFile, InvalidConfig};
pub use mount::{Device, DiskSize, MountPoint, Volume};
pub use net::{Family, IpConfig, MacAddr, NetInterface};
pub use options::{Arch, ConsoleMode, Features, Startup};
pub use property::Extra;

use crate::{Tag, lenient};

/// The configuration of a CT (`pve-container`'s `$confdesc`). What is `None` or empty is not written; the server then
/// has its default.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LxcConfig {
    /// The architecture.
    pub arch: Option<Arch>,
    /// What the console shows; the server's default is `tty`.
    pub cmode: Option<ConsoleMode>,
    /// Whether there is /dev/console.
    pub console: Option<bool>,
    /// How many cores the CT sees; all if there is none.
    pub cores: Option<u32>,
    /// At most so many cores' time.
    pub cpulimit: Option<f64>,
    /// The CPU weight.
    pub cpuunits: Option<u32>,
    /// Whether the start is logged in full.
    pub debug: Option<bool>,
    /// The notes.
    pub description: Option<String>,
    /// Devices that are passed in, by their number.
    pub dev: BTreeMap<u16, Device>,
    /// What is run as PID 1 (9.1 and later).
    pub entrypoint: Option<String>,
    /// The environment of PID 1, parted by NULs (9.1 and later).
    pub env: Option<String>,
    /// What is allowed beyond the usual.
    pub features: Option<Features>,
    /// A script that is run at the start and the end.
    pub hookscript: Option<String>,
    /// The host name.
    pub hostname: Option<String>,
    /// Who works on it: `backup`, `create`, `migrate`, ….
    pub lock: Option<String>,
    /// Memory in MiB; the server's default is 512.
    pub memory: Option<u64>,
    /// Mount points, by their number.
    pub mp: BTreeMap<u16, MountPoint>,
    /// DNS servers.
    pub nameserver: Option<String>,
    /// Network interfaces, by their number.
    pub net: BTreeMap<u16, NetInterface>,
    /// Whether it starts with its host.
    pub onboot: Option<bool>,
    /// How the guest is set up: `debian`, …; `unmanaged` leaves it alone.
    pub ostype: Option<String>,
    /// Whether CT and disks are safe from removal.
    pub protection: Option<bool>,
    /// The root file system.
    pub rootfs: Option<Volume>,
    /// DNS search domains.
    pub searchdomain: Option<String>,
    /// When it comes up and goes down with its host.
    pub startup: Option<Startup>,
    /// Swap in MiB; the server's default is 512.
    pub swap: Option<u64>,
    /// Tags.
    pub tags: Vec<Tag>,
    /// Whether it is a template.
    pub template: Option<bool>,
    /// The time zone.
    pub timezone: Option<String>,
    /// How many ttys.
    pub tty: Option<u8>,
    /// Whether its root is none on the host.
    pub unprivileged: Option<bool>,
    /// Volumes that belong to it and are not used.
    pub unused: BTreeMap<u16, String>,
    /// Raw `lxc.*` lines, in their order. The API shows them and takes none; see the module `file` for writing them.
    pub lxc: Vec<(String, String)>,
    /// All else, as text.
    pub unknown: BTreeMap<String, String>,
    /// Lines of a file that are none to Proxmox VE either, in their order. Only in what was read from a file.
    pub unread: Vec<String>,
    /// What a change is guarded with: SHA-1 of the file. Only in answers of the API.
    pub digest: Option<String>,
}

impl LxcConfig {
    /// A configuration as the API answers it: an object of scalars, and `lxc`, a list of pairs.
    #[must_use]
    pub fn from_answer(fields: &serde_json::Map<String, Value>) -> Self {
        let mut config = Self::default();
        for (key, value) in fields {
            match value {
                Value::Array(lines) if key == "lxc" => {
                    for line in lines {
                        if let (Some(key), Some(value)) = (line[0].as_str(), line[1].as_str()) {
                            config.lxc.push((key.to_owned(), value.to_owned()));
                        }
                    }
                }
                Value::String(text) => config.put(key, text),
                Value::Bool(flag) => config.put(key, &u8::from(*flag).to_string()),
                Value::Null => {}
                other => config.put(key, &other.to_string()),
            }
        }
        config
    }

    /// Sets a key from its text. What cannot be read as what it should be goes to `unknown`.
    pub fn put(&mut self, key: &str, text: &str) {
        // Of a key that stands there twice the last holds.
        match self.try_put(key, text) {
            Some(()) => self.unknown.remove(key),
            None => self.unknown.insert(key.to_owned(), text.to_owned()),
        };
    }

    fn try_put(&mut self, key: &str, text: &str) -> Option<()> {
        fn some<T: FromStr>(to: &mut Option<T>, text: &str) -> Option<()> {
            *to = Some(text.parse().ok()?);
            Some(())
        }
        fn flag(to: &mut Option<bool>, text: &str) -> Option<()> {
            *to = Some(lenient::parse_bool(text)?);
            Some(())
        }
        fn numbered<T: FromStr>(to: &mut BTreeMap<u16, T>, number: u16, text: &str) -> Option<()> {
            to.insert(number, text.parse().ok()?);
            Some(())
        }
        if let Some((stem, number)) = indexed(key) {
            match stem {
                "dev" => return numbered(&mut self.dev, number, text),
                "mp" => return numbered(&mut self.mp, number, text),
                "net" => return numbered(&mut self.net, number, text),
                "unused" => return numbered(&mut self.unused, number, text),
                _ => {}
            }
        }
        match key {
            "arch" => some(&mut self.arch, text),
            "cmode" => some(&mut self.cmode, text),
            "console" => flag(&mut self.console, text),
            "cores" => some(&mut self.cores, text),
            "cpulimit" => {
                some(&mut self.cpulimit, text).filter(|()| self.cpulimit.is_some_and(f64::is_finite))
            }
            "cpuunits" => some(&mut self.cpuunits, text),
            "debug" => flag(&mut self.debug, text),
            "description" => some(&mut self.description, text),
            "digest" => some(&mut self.digest, text),
            "entrypoint" => some(&mut self.entrypoint, text),
            "env" => some(&mut self.env, text),
            "features" => some(&mut self.features, text),
            "hookscript" => some(&mut self.hookscript, text),
            "hostname" => some(&mut self.hostname, text),
            "lock" => some(&mut self.lock, text),
            "memory" => some(&mut self.memory, text),
            "nameserver" => some(&mut self.nameserver, text),
            "onboot" => flag(&mut self.onboot, text),
            "ostype" => some(&mut self.ostype, text),
            "protection" => flag(&mut self.protection, text),
            "rootfs" => some(&mut self.rootfs, text),
            "searchdomain" => some(&mut self.searchdomain, text),
            "startup" => some(&mut self.startup, text),
            "swap" => some(&mut self.swap, text),
            "tags" => self.put_tags(text),
            "template" => flag(&mut self.template, text),
            "timezone" => some(&mut self.timezone, text),
            "tty" => some(&mut self.tty, text),
            "unprivileged" => flag(&mut self.unprivileged, text),
            _ => None,
        }
    }

    fn put_tags(&mut self, text: &str) -> Option<()> {
        let parts = text.split([';', ',', ' ']).filter(|t| !t.is_empty());
        self.tags = parts.map(|t| t.parse().ok()).collect::<Option<_>>()?;
        Some(())
    }

    /// All keys that are set, with their texts, sorted as the server sorts them; without `lxc` and `digest`.
    #[must_use]
    pub fn pairs(&self) -> Vec<(String, String)> {
        let mut out = BTreeMap::new();
        let mut put = |key: &str, value: Option<String>| {
            if let Some(value) = value {
                out.insert(key.to_owned(), value);
            }
        };
        fn text(value: Option<&impl fmt::Display>) -> Option<String> {
            value.map(ToString::to_string)
        }
        fn flag(value: Option<bool>) -> Option<String> {
            value.map(|v| u8::from(v).to_string())
        }
        put("arch", text(self.arch.as_ref()));
        put("cmode", text(self.cmode.as_ref()));
        put("console", flag(self.console));
        put("cores", text(self.cores.as_ref()));
        put("cpulimit", text(self.cpulimit.as_ref()));
        put("cpuunits", text(self.cpuunits.as_ref()));
        put("debug", flag(self.debug));
        put("description", self.description.clone());
        put("entrypoint", self.entrypoint.clone());
        put("env", self.env.clone());
        put("features", text(self.features.as_ref()).filter(|f| !f.is_empty()));
        put("hookscript", self.hookscript.clone());
        put("hostname", self.hostname.clone());
        put("lock", self.lock.clone());
        put("memory", text(self.memory.as_ref()));
        put("nameserver", self.nameserver.clone());
        put("onboot", flag(self.onboot));
        put("ostype", self.ostype.clone());
        put("protection", flag(self.protection));
        put("rootfs", text(self.rootfs.as_ref()));
        put("searchdomain", self.searchdomain.clone());
        put("startup", text(self.startup.as_ref()).filter(|s| !s.is_empty()));
        put("swap", text(self.swap.as_ref()));
        let tags: Vec<&str> = self.tags.iter().map(Tag::as_str).collect();
        put("tags", Some(tags.join(";")).filter(|t| !t.is_empty()));
        put("template", flag(self.template));
        put("timezone", self.timezone.clone());
        put("tty", text(self.tty.as_ref()));
        put("unprivileged", flag(self.unprivileged));
        for (number, device) in &self.dev {
            put(&format!("dev{number}"), Some(device.to_string()));
        }
        for (number, mount) in &self.mp {
            put(&format!("mp{number}"), Some(mount.to_string()));
        }
        for (number, net) in &self.net {
            put(&format!("net{number}"), Some(net.to_string()));
        }
        for (number, volume) in &self.unused {
            put(&format!("unused{number}"), Some(volume.clone()));
        }
        for (key, value) in &self.unknown {
            put(key, Some(value.clone()));
        }
        out.into_iter().collect()
    }
}

/// `net0` is `net` and 0.
fn indexed(key: &str) -> Option<(&str, u16)> {
    let stem = key.trim_end_matches(|c: char| c.is_ascii_digit());
    let number = key.get(stem.len()..)?;
    let plain = number == "0" || !number.starts_with('0');
    if !plain || stem.is_empty() {
        return None;
    }
    Some((stem, number.parse().ok()?))
}

#[cfg(test)]
mod tests;
