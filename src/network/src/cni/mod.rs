//! Attaching a pod by CNI plugins: the exec protocol, a conflist's chain, and what was attached kept on disk for DEL.
//!
//! `<cache_dir>/<sandbox>.json` is written before the first ADD (an allotment may exist from then on), again with the
//! result, and removed after DEL; it holds the configuration that ADD used, so that DEL uses the same.

mod bridge;
mod masquerade;

use std::{
    fs,
    io::ErrorKind,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use moxlet_ids::SandboxId;
use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    Attachment, Error, Result,
    error::io,
    program::{self, Ended},
};

const INTERFACE: &str = "eth0";
const OWN_FILE: &str = "10-moxlet.conflist";
const TRY_AGAIN: u64 = 11;

/// Where plugins, configuration and memory lie, and what our own network is like.
#[derive(Debug, Clone)]
pub struct CniConfig {
    /// Where conflists are; the first by name is used. Ours is written here where `write_default` is set.
    pub conf_dir: PathBuf,
    /// Where plugins are, in the order of search.
    pub bin_dirs: Vec<PathBuf>,
    /// Where results are remembered for DEL.
    pub cache_dir: PathBuf,
    /// host-local's `dataDir` in our own conflist.
    pub ipam_dir: PathBuf,
    /// The range of our own network.
    pub pod_cidr: Option<String>,
    /// The bridge of our own network.
    pub bridge_name: String,
    /// The name of our own network.
    pub network_name: String,
    /// Whether pods' traffic leaves the host with the host's address.
    pub ip_masq: bool,
    /// Whether to write our own conflist.
    pub write_default: bool,
    /// How long one plugin call may take.
    pub timeout: Duration,
}

/// A conflist as far as it concerns its runner.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Conflist {
    name: String,
    #[serde(rename = "cniVersion", default = "old_version")]
    version: String,
    plugins: Vec<Map<String, Value>>,
}

fn old_version() -> String {
    "0.4.0".into()
}

/// What is kept of one attachment.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    conflist: Conflist,
    args: String,
    result: Option<Value>,
}

/// Runs CNI plugins.
#[derive(Debug)]
pub struct Cni {
    config: CniConfig,
    pod_cidr: RwLock<Option<String>>,
    /// One change of bridge and masquerading at a time.
    changing: tokio::sync::Mutex<()>,
}

impl Cni {
    /// Opens (and makes) the directories; writes our conflist if `write_default` and a pod CIDR are set.
    pub async fn new(config: CniConfig) -> Result<Self> {
        check_name("network name", &config.network_name, 64)?;
        check_name("bridge name", &config.bridge_name, 15)?;
        fs::create_dir_all(&config.cache_dir).map_err(io("create", &config.cache_dir))?;
        if config.write_default {
            fs::create_dir_all(&config.conf_dir).map_err(io("create", &config.conf_dir))?;
        }
        let cni = Self { config, pod_cidr: RwLock::new(None), changing: tokio::sync::Mutex::default() };
        // Without a word from the configuration the range of the last start stays, until the cluster says another.
        let cidr = cni.config.pod_cidr.clone().or_else(|| cni.written_cidr());
        if let Some(cidr) = cidr {
            cni.set_pod_cidr(&cidr).await?;
        }
        Ok(cni)
    }

    /// Attaches a sandbox's network namespace. Where it fails nothing stays attached.
    pub async fn add(&self, sandbox: &SandboxId, netns: &Path, ns: &str, name: &str) -> Result<Attachment> {
        for (what, value) in [("pod namespace", ns), ("pod name", name)] {
            check_name(what, value, 253)?;
        }
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={ns};K8S_POD_NAME={name};K8S_POD_INFRA_CONTAINER_ID={sandbox}"
        );
        let mut kept = Kept { conflist: self.load()?, args, result: None };
        if let Some(range) = self.pod_cidr().and_then(|cidr| bridge::Range::parse(&cidr)) {
            bridge::ensure(&self.config.bridge_name, range).await?;
        }
        self.keep(sandbox, &kept)?;
        let added = self.add_chain(sandbox, netns, &mut kept).await;
        if added.is_err()
            && let Err(error) = self.del(sandbox, Some(netns)).await
        {
            tracing::warn!(%sandbox, %error, "a half-made attachment could not be removed; it is tried again later");
        }
        added
    }

    async fn add_chain(&self, sandbox: &SandboxId, netns: &Path, kept: &mut Kept) -> Result<Attachment> {
        self.run(sandbox, "ADD", Some(netns), &loopback(), &kept.conflist, &kept.args, None, "lo").await?;
        for plugin in &kept.conflist.plugins {
            let previous = kept.result.as_ref();
            let result = self
                .run(sandbox, "ADD", Some(netns), plugin, &kept.conflist, &kept.args, previous, INTERFACE)
                .await?;
            kept.result = Some(result);
        }
        let attachment = attachment_of(kept.result.as_ref().unwrap_or(&Value::Null))?;
        self.keep(sandbox, kept)?;
        Ok(attachment)
    }

    /// Detaches it and releases its addresses. Idempotent; without a namespace where that is gone.
    pub async fn del(&self, sandbox: &SandboxId, netns: Option<&Path>) -> Result<()> {
        let Some(kept) = self.kept(sandbox)? else { return Ok(()) };
        let netns = netns.filter(|path| path.exists());
        for plugin in kept.conflist.plugins.iter().rev() {
            let result = kept.result.as_ref();
            self.run(sandbox, "DEL", netns, plugin, &kept.conflist, &kept.args, result, INTERFACE).await?;
        }
        match fs::remove_file(self.file(sandbox)) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(io("remove", self.file(sandbox))(e)),
            _ => Ok(()),
        }
    }

    /// Asks the plugins whether the attachment is still as they made it.
    pub async fn check(&self, sandbox: &SandboxId, netns: &Path) -> Result<()> {
        let Some(kept) = self.kept(sandbox)? else {
            return Err(Error::NotAttached(sandbox.to_string()));
        };
        for plugin in &kept.conflist.plugins {
            let result = kept.result.as_ref();
            self.run(sandbox, "CHECK", Some(netns), plugin, &kept.conflist, &kept.args, result, INTERFACE)
                .await?;
        }
        Ok(())
    }

    /// Whether a pod could be attached now; the error says why not.
    pub async fn ready(&self) -> Result<()> {
        for plugin in &self.load()?.plugins {
            self.find(kind(plugin))?;
            if let Some(ipam) = plugin.get("ipam").and_then(|i| i.get("type")).and_then(Value::as_str) {
                self.find(ipam)?;
            }
        }
        self.find("loopback")?;
        if self.config.write_default && self.config.ip_masq && !masquerade::is_possible() {
            return Err(Error::Masquerade {
                cidr: "the pods' range".into(),
                said: "there is neither nft nor iptables".into(),
            });
        }
        Ok(())
    }

    /// Sets the range of our own network; pods that have an address keep it.
    pub async fn set_pod_cidr(&self, cidr: &str) -> Result<()> {
        check_cidr(cidr)?;
        let _changing = self.changing.lock().await;
        if !self.config.write_default || self.pod_cidr().as_deref() == Some(cidr) {
            return Ok(());
        }
        self.set_ranges(cidr).await?;
        let conflist = json!({
            "cniVersion": "1.0.0",
            "name": self.config.network_name,
            "plugins": [{
                "type": "bridge",
                "bridge": self.config.bridge_name,
                "isGateway": false,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": self.config.ipam_dir,
                    "ranges": [[{"subnet": cidr}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }],
        });
        write_json(&self.config.conf_dir.join(OWN_FILE), &conflist)?;
        *self.pod_cidr.write() = Some(cidr.to_owned());
        Ok(())
    }

    /// What was attached and not detached yet, from disk: our own records and host-local's allotments.
    pub async fn attached(&self) -> Result<Vec<SandboxId>> {
        attached(&self.config)
    }

    /// What a sandbox was attached with, from disk.
    pub async fn attachment(&self, sandbox: &SandboxId) -> Result<Option<Attachment>> {
        self.kept(sandbox)?.and_then(|kept| kept.result).map(|result| attachment_of(&result)).transpose()
    }

    /// Removes the bridge and masquerading of our own network. Refused while a sandbox is attached.
    ///
    /// # Errors
    /// [`Error::Attached`], or a program failed.
    pub async fn remove_bridge(&self) -> Result<()> {
        take_down(&self.config).await
    }

    /// Puts back what somebody took from our own network on the host: the bridge, the range's gateway, masquerading (a firewall
    /// that is loaded anew flushes all rules). Whether masquerading was missing.
    ///
    /// # Errors
    /// A program failed, or the bridge is somebody else's by now.
    pub async fn restore(&self) -> Result<bool> {
        let _changing = self.changing.lock().await;
        let Some(range) = self.pod_cidr().filter(|_| self.config.write_default) else { return Ok(false) };
        let Some(range) = bridge::Range::parse(&range) else { return Ok(false) };
        bridge::ensure(&self.config.bridge_name, range).await?;
        if !self.config.ip_masq {
            return Ok(false);
        }
        let ranges = self.ranges(range).await?;
        if masquerade::is_set(&self.config.bridge_name, &ranges).await? {
            return Ok(false);
        }
        masquerade::set(&self.config.bridge_name, &ranges).await?;
        Ok(true)
    }

    /// Brings bridge and masquerading in line with the present range and those that attached pods still have.
    async fn set_ranges(&self, cidr: &str) -> Result<()> {
        let name = &self.config.bridge_name;
        let Some(range) = bridge::Range::parse(cidr) else { return check_cidr(cidr) };
        let in_use = self.ranges(range).await?;
        if bridge::owner(name)? == bridge::Owner::Moxlet {
            bridge::mark(name).await?;
            for (address, other) in bridge::addresses(name) {
                if address == other.gateway() && !in_use.contains(&other.to_string()) {
                    bridge::drop_gateway(name, address, other).await?;
                }
            }
        }
        bridge::ensure(name, range).await?;
        if self.config.ip_masq {
            masquerade::set(name, &in_use).await?;
        }
        Ok(())
    }

    /// The present range, and those of the bridge's gateways in which a pod has an address.
    async fn ranges(&self, range: bridge::Range) -> Result<Vec<String>> {
        let mut addresses: Vec<IpAddr> = Vec::new();
        for id in self.attached().await? {
            addresses.extend(self.attachment(&id).await.ok().flatten().into_iter().flat_map(|a| a.ips));
        }
        let used = |other: &bridge::Range| {
            addresses.iter().any(|ip| matches!(ip, IpAddr::V4(v4) if other.contains(*v4)))
        };
        let others = bridge::addresses(&self.config.bridge_name).into_iter().map(|(_, other)| other);
        let others = others.filter(|other| *other != range && used(other));
        Ok(std::iter::once(range).chain(others).map(|range| range.to_string()).collect())
    }

    /// The range in our own conflist, if there is one.
    fn written_cidr(&self) -> Option<String> {
        let bytes =
            fs::read(self.config.conf_dir.join(OWN_FILE)).ok().filter(|_| self.config.write_default)?;
        let list: Conflist = serde_json::from_slice(&bytes).ok()?;
        let range = list.plugins.first()?.get("ipam")?.get("ranges")?.get(0)?.get(0)?;
        Some(range.get("subnet")?.as_str()?.to_owned())
    }

    fn pod_cidr(&self) -> Option<String> {
        self.pod_cidr.read().clone()
    }

    fn file(&self, sandbox: &SandboxId) -> PathBuf {
        self.config.cache_dir.join(format!("{sandbox}.json"))
    }

    fn keep(&self, sandbox: &SandboxId, kept: &Kept) -> Result<()> {
        write_json(&self.file(sandbox), kept)
    }

    /// The record of an attachment; where only host-local knows of one, a record that releases it.
    fn kept(&self, sandbox: &SandboxId) -> Result<Option<Kept>> {
        let path = self.file(sandbox);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|e| Error::BadConfig { path, reason: e.to_string() }),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                // Only an allotment without a record of ours can be left; without a configuration there is none.
                Ok(self.load().ok().map(|conflist| Kept {
                    conflist,
                    args: "IgnoreUnknown=1".into(),
                    result: None,
                }))
            }
            Err(e) => Err(io("read", path)(e)),
        }
    }

    fn load(&self) -> Result<Conflist> {
        let dir = &self.config.conf_dir;
        let none = |reason: &str| Error::NoConfig { dir: dir.clone(), reason: reason.into() };
        let path = if self.config.write_default {
            if self.pod_cidr().is_none() {
                return Err(none(
                    "the pods' address range is not known yet: the cluster allots one (Node.spec.podCIDR), or set pod_cidr",
                ));
            }
            dir.join(OWN_FILE)
        } else {
            let entries = fs::read_dir(dir).map_err(io("list", dir))?;
            let found = entries.flatten().map(|e| e.path());
            let known = |p: &PathBuf| p.extension().is_some_and(|x| x == "conflist");
            found.filter(known).min().ok_or_else(|| none("there is no .conflist file"))?
        };
        let bad = |reason: String| Error::BadConfig { path: path.clone(), reason };
        let bytes = fs::read(&path).map_err(io("read", &path))?;
        let list: Conflist = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
        if list.plugins.is_empty() || list.plugins.len() > 32 {
            return Err(bad("it has no plugins, or more than 32".into()));
        }
        if let Some(name) =
            list.plugins.iter().map(kind).find(|k| k.is_empty() || k.contains('/') || k.starts_with('.'))
        {
            return Err(bad(format!("{name:?} is no plugin type")));
        }
        Ok(list)
    }

    fn find(&self, plugin: &str) -> Result<PathBuf> {
        let dirs = &self.config.bin_dirs;
        dirs.iter().map(|dir| dir.join(plugin)).find(|path| path.is_file()).ok_or_else(|| Error::NoPlugin {
            plugin: plugin.into(),
            dirs: dirs.iter().map(|d| d.display().to_string()).collect::<Vec<_>>().join(", "),
        })
    }

    #[expect(clippy::too_many_arguments, reason = "the protocol's own parameters")]
    async fn run(
        &self,
        sandbox: &SandboxId,
        command: &'static str,
        netns: Option<&Path>,
        plugin: &Map<String, Value>,
        list: &Conflist,
        args: &str,
        previous: Option<&Value>,
        interface: &str,
    ) -> Result<Value> {
        let conf = configured(plugin, list, previous);
        let name = kind(plugin).to_owned();
        let program = self.find(&name)?;
        let path = self.config.bin_dirs.iter().map(|d| d.display().to_string()).collect::<Vec<_>>().join(":");
        let spawned = |source| Error::Spawn { plugin: name.clone(), source };
        let mut plugin = program::command(&program);
        plugin
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", sandbox.as_str())
            .env("CNI_NETNS", netns.unwrap_or(Path::new("")))
            .env("CNI_IFNAME", interface)
            .env("CNI_ARGS", args)
            .env("CNI_PATH", path);
        let limit = self.config.timeout;
        let ended = program::talk(plugin, conf.to_string().as_bytes(), limit).await.map_err(spawned)?;
        let Some(ended) = ended else {
            let (sandbox, seconds) = (sandbox.to_string(), limit.as_secs());
            return Err(Error::Timeout { plugin: name, command, sandbox, seconds });
        };
        let answer: Option<Value> = serde_json::from_slice(&ended.stdout).ok();
        if !ended.status.success() {
            let (code, message) = failure(answer.as_ref(), &ended);
            return Err(Error::Plugin { plugin: name, command, sandbox: sandbox.to_string(), code, message });
        }
        match (command, answer) {
            ("ADD", None) => Err(Error::BadResult { plugin: name, reason: "it is not JSON".into() }),
            (_, answer) => Ok(answer.unwrap_or(Value::Null)),
        }
    }
}

fn attached(config: &CniConfig) -> Result<Vec<SandboxId>> {
    let mut ids: Vec<SandboxId> = Vec::new();
    let cached = fs::read_dir(&config.cache_dir).map_err(io("list", &config.cache_dir))?;
    ids.extend(cached.flatten().filter_map(|e| e.file_name().to_str()?.strip_suffix(".json")?.parse().ok()));
    if let Ok(allotted) = fs::read_dir(config.ipam_dir.join(&config.network_name)) {
        let named = allotted
            .flatten()
            .filter(|e| e.file_name().to_str().is_some_and(|name| name.parse::<IpAddr>().is_ok()));
        ids.extend(
            named.filter_map(|e| fs::read_to_string(e.path()).ok()?.lines().next()?.trim().parse().ok()),
        );
    }
    ids.sort();
    ids.dedup();
    Ok(ids)
}

/// Takes our own network from the host, bridge and masquerading, without a runner of plugins. Idempotent.
///
/// # Errors
/// [`Error::Attached`] while a sandbox is attached, or a program failed.
pub async fn take_down(config: &CniConfig) -> Result<()> {
    // Without its directory nobody was ever attached.
    if config.cache_dir.exists()
        && let Some(id) = attached(config)?.first()
    {
        return Err(Error::Attached(id.to_string()));
    }
    masquerade::clear(&config.bridge_name).await?;
    bridge::remove(&config.bridge_name).await
}

/// What a plugin is given: its own configuration and what it is part of.
fn configured(plugin: &Map<String, Value>, list: &Conflist, previous: Option<&Value>) -> Value {
    let mut conf = plugin.clone();
    conf.insert("name".into(), list.name.clone().into());
    conf.insert("cniVersion".into(), list.version.clone().into());
    if let Some(previous) = previous {
        conf.insert("prevResult".into(), previous.clone());
    }
    Value::Object(conf)
}

/// The code and the words of a plugin that failed.
fn failure(answer: Option<&Value>, ended: &Ended) -> (u64, String) {
    let code = answer.and_then(|a| a.get("code")).and_then(Value::as_u64).unwrap_or(0);
    let said = |key| answer.and_then(|a| a.get(key)).and_then(Value::as_str).unwrap_or_default();
    let text = format!("{} {}", said("msg"), said("details"));
    let mut message: String = text.trim().chars().take(1000).collect();
    if message.is_empty() {
        message = ended.said();
    }
    if code == TRY_AGAIN {
        message.push_str(" (try again later)");
    }
    (code, message)
}

fn kind(plugin: &Map<String, Value>) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn loopback() -> Map<String, Value> {
    Map::from_iter([("type".to_owned(), Value::from("loopback"))])
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let bytes = serde_json::to_vec(value).map_err(|e| io("write", path)(e.into()))?;
    moxlet_files::replace(path, &bytes, 0o644).map_err(io("write", path))
}

fn check_name(what: &'static str, value: &str, max: usize) -> Result<()> {
    let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if value.is_empty() || value.len() > max || value.starts_with(['.', '-']) || !value.chars().all(ok) {
        let value = value.chars().take(80).collect();
        return Err(Error::Invalid {
            what,
            value,
            reason: "it is empty, too long or has a character that is not allowed",
        });
    }
    Ok(())
}

/// IPv4 `a.b.c.d/len` that leaves room for pods.
fn check_cidr(cidr: &str) -> Result<()> {
    let ok = cidr.split_once('/').is_some_and(|(address, length)| {
        address.parse::<std::net::Ipv4Addr>().is_ok()
            && length.parse::<u8>().is_ok_and(|l| (8..=30).contains(&l))
    });
    if ok {
        return Ok(());
    }
    let value = cidr.chars().take(80).collect();
    Err(Error::Invalid { what: "pod CIDR", value, reason: "it is not an IPv4 range from /8 to /30" })
}

/// Reads a result of CNI 0.3 to 1.0.
fn attachment_of(result: &Value) -> Result<Attachment> {
    let bad = |reason: &str| Error::BadResult { plugin: "chain".into(), reason: reason.into() };
    let list = |key| result.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let ips: Vec<IpAddr> = list("ips")
        .iter()
        .filter_map(|ip| ip.get("address")?.as_str()?.split('/').next()?.parse().ok())
        .take(16)
        .collect();
    if ips.is_empty() {
        return Err(bad("it has no address"));
    }
    let text = |v: &Value, key: &str| v.get(key).and_then(Value::as_str).map(str::to_owned);
    let mac = list("interfaces")
        .iter()
        .find(|i| {
            text(i, "name").as_deref() == Some(INTERFACE) && text(i, "sandbox").is_some_and(|s| !s.is_empty())
        })
        .and_then(|i| text(i, "mac"));
    Ok(Attachment { ips, interface: INTERFACE.into(), mac })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_result_is_read() {
        let result = json!({"interfaces": [{"name": "br"}, {"name": "eth0", "mac": "aa", "sandbox": "/x"}],
            "ips": [{"address": "10.0.0.2/24"}]});
        let got = attachment_of(&result).unwrap();
        assert_eq!((got.ips, got.mac), (vec![IpAddr::from([10, 0, 0, 2])], Some("aa".into())));
        assert!(attachment_of(&Value::Null).is_err());
    }

    #[test]
    fn ranges_and_names_are_checked() {
        assert!(check_cidr("10.0.0.0/24").is_ok());
        for bad in ["10.0.0.0", "10.0.0.0/31", "x/24", "10.0.0.0/24; flush ruleset"] {
            assert!(check_cidr(bad).is_err(), "{bad}");
        }
        assert!(check_name("pod name", "a;CNI=1", 253).is_err());
    }
}
