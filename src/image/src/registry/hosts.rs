//! Settings of registries as containerd's users know them: a directory with one directory a registry, in which
//! `hosts.toml` names mirrors and how each is spoken to, or Docker's certificate files lie.
//!
//! Differing from containerd, a file that cannot be read stops the pull and is named, and so does a key that is not known:
//! a mirror or a CA that is left out without a word sends a pull where nobody wants it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use reqwest::{
    Url,
    header::{HeaderMap, HeaderName, HeaderValue},
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use crate::{Error, Result};

const MAX_FILE: u64 = 1 << 20;
/// Mirrors of one registry.
const MAX_HOSTS: usize = 32;
/// Registries whose settings are checked at once.
const MAX_REGISTRIES: usize = 4096;
const MAX_HEADERS: usize = 32;
/// What is certain to be the longest wait that somebody wants.
const MAX_DIAL: Duration = Duration::from_secs(600);

/// What a host may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// Manifests by digest, and blobs.
    pub(super) pull: bool,
    /// What a tag stands for.
    pub(super) resolve: bool,
    pub(super) push: bool,
}

impl Capabilities {
    pub(super) const ALL: Self = Self { pull: true, resolve: true, push: true };
}

/// How one host is spoken to.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Host {
    /// Its address with the path of its API; none where it is the registry itself.
    pub(super) api: Option<Url>,
    pub(super) can: Capabilities,
    /// Files of CA certificates, in addition to the system's.
    pub(super) ca: Vec<PathBuf>,
    /// Files of client certificates with their keys, which may be in the same file.
    pub(super) client: Vec<(PathBuf, Option<PathBuf>)>,
    pub(super) skip_verify: bool,
    /// Whether anything is said about TLS.
    pub(super) tls: bool,
    pub(super) headers: HeaderMap,
    pub(super) dial_timeout: Option<Duration>,
    pub(super) proxy: Option<Url>,
}

impl Default for Host {
    fn default() -> Self {
        Self {
            api: None,
            can: Capabilities::ALL,
            ca: Vec::new(),
            client: Vec::new(),
            skip_verify: false,
            tls: false,
            headers: HeaderMap::new(),
            dial_timeout: None,
            proxy: None,
        }
    }
}

/// What the directory says about a registry.
#[derive(Debug, Default)]
pub(super) struct Hosts {
    /// In the order in which they are tried; the last one is the registry, or what stands for it.
    pub(super) hosts: Vec<Host>,
    /// Whether it is said for all registries that have no directory of their own.
    pub(super) for_all: bool,
}

/// Reads what there is for a registry (`host` or `host:port`); none where there is nothing.
///
/// # Errors
/// [`Error::Settings`]: a file that cannot be read or has an error, with its line.
pub(super) fn load(root: &Path, registry: &str) -> Result<Option<Hosts>> {
    let mut names = Vec::new();
    if let Some((host, port)) = registry.rsplit_once(':').filter(|(_, port)| !port.contains(']')) {
        names.push(format!("{host}_{port}_"));
    }
    names.push(registry.to_owned());
    names.push("_default".to_owned());
    for name in names {
        let dir = root.join(&name);
        match std::fs::metadata(&dir) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(settings(&dir, None, format!("it cannot be read: {e}"))),
            Ok(_) => return Ok(Some(Hosts { hosts: load_dir(&dir)?, for_all: name == "_default" })),
        }
    }
    Ok(None)
}

/// What is wrong with the settings of any registry below that directory.
#[must_use]
pub fn check_registry_config(root: &Path) -> Vec<Error> {
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        Err(e) => return vec![settings(root, None, format!("it cannot be read: {e}"))],
    };
    let dirs = entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| p.is_dir());
    let mut dirs: Vec<_> = dirs.take(MAX_REGISTRIES).collect();
    dirs.sort();
    dirs.iter().filter_map(|dir| load_dir(dir).err()).collect()
}

fn load_dir(dir: &Path) -> Result<Vec<Host>> {
    let file = dir.join("hosts.toml");
    let bytes = match super::tls::read_file(&file, MAX_FILE) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(settings(&file, None, format!("it cannot be read: {e}"))),
    };
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(vec![certificates(dir)?]);
    }
    let text =
        std::str::from_utf8(&bytes).map_err(|_| settings(&file, None, "it is not UTF-8".to_owned()))?;
    parse(text, dir).map_err(|wrong| {
        let line = wrong.at.map(|at| text.bytes().take(at).filter(|b| *b == b'\n').count() + 1);
        settings(&file, line, wrong.reason)
    })
}

fn settings(path: &Path, line: Option<usize>, reason: String) -> Error {
    Error::Settings { path: path.to_owned(), line, reason }
}

/// Docker's files: `*.crt` are CAs, `*.cert` client certificates with a `*.key` of the same name.
fn certificates(dir: &Path) -> Result<Host> {
    let mut host = Host::default();
    let failed = |e: std::io::Error| settings(dir, None, format!("it cannot be read: {e}"));
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        files.push(entry.map_err(failed)?.path());
    }
    files.sort();
    for file in &files {
        match file.extension().and_then(|e| e.to_str()) {
            Some("crt") => host.ca.push(file.clone()),
            Some("cert") => {
                let key = file.with_extension("key");
                if !files.contains(&key) {
                    return Err(settings(file, None, format!("its key {} is missing", key.display())));
                }
                host.client.push((file.clone(), Some(key)));
            }
            Some("key") if !files.contains(&file.with_extension("cert")) => {
                return Err(settings(file, None, "a .cert file of the same name is missing".to_owned()));
            }
            _ => {}
        }
    }
    host.tls = !host.ca.is_empty() || !host.client.is_empty();
    Ok(host)
}

/// What is wrong and where in the text.
struct Wrong {
    at: Option<usize>,
    reason: String,
}

fn wrong<T>(at: usize, reason: impl Into<String>) -> std::result::Result<T, Wrong> {
    Err(Wrong { at: Some(at), reason: reason.into() })
}

type Read<T> = std::result::Result<T, Wrong>;
type Value<'i> = Spanned<DeValue<'i>>;

fn parse(text: &str, dir: &Path) -> Read<Vec<Host>> {
    let table = DeTable::parse(text)
        .map_err(|e| Wrong { at: e.span().map(|s| s.start), reason: e.message().trim().to_owned() })?;
    let (mut server, mut mirrors) = (Host::default(), Vec::new());
    let mut server_name: Option<(usize, String)> = None;
    let mut override_path = false;
    for (key, value) in table.get_ref() {
        match key.get_ref().as_ref() {
            "server" => server_name = Some((value.span().start, string(value, "server")?)),
            "host" => {
                for (name, value) in sub_table(value, "host")? {
                    let (mut host, mut override_path) = (Host::default(), false);
                    for (key, value) in sub_table(value, name.get_ref())? {
                        set(&mut host, &mut override_path, key, value, dir)?;
                    }
                    let (at, name) = (name.span().start, name.get_ref().to_string());
                    host.api = Some(address(at, &name, override_path)?);
                    mirrors.push((at, host));
                }
            }
            _ => set(&mut server, &mut override_path, key, value, dir)?,
        }
    }
    if let Some((at, name)) = server_name.filter(|(_, name)| !name.is_empty()) {
        server.api = Some(address(at, &name, override_path)?);
    }
    if mirrors.len() > MAX_HOSTS {
        return Err(Wrong { at: None, reason: format!("it has more than {MAX_HOSTS} hosts") });
    }
    // The parser sorts by name; what counts is the order in the file.
    mirrors.sort_by_key(|(at, _)| *at);
    Ok(mirrors.into_iter().map(|(_, host)| host).chain([server]).collect())
}

fn set(
    host: &mut Host,
    override_path: &mut bool,
    key: &Spanned<std::borrow::Cow<'_, str>>,
    value: &Value<'_>,
    dir: &Path,
) -> Read<()> {
    let name = key.get_ref().as_ref();
    let at = value.span().start;
    match name {
        "capabilities" => host.can = capabilities(value)?,
        "ca" => {
            host.ca = strings(value, name)?.into_iter().map(|file| dir.join(file)).collect();
            host.tls = true;
        }
        "client" => {
            host.client = pairs(value, dir)?;
            host.tls = true;
        }
        "skip_verify" => {
            host.skip_verify = boolean(value, name)?;
            host.tls = true;
        }
        "override_path" => *override_path = boolean(value, name)?,
        "header" => host.headers = headers(value)?,
        "dial_timeout" => {
            let text = string(value, name)?;
            match go_duration(&text) {
                Some(time) if time > Duration::ZERO && time <= MAX_DIAL => host.dial_timeout = Some(time),
                _ => return wrong(at, format!("dial_timeout: {text:?} is no time like \"5s\", at most 10m")),
            }
        }
        "proxy" => host.proxy = Some(proxy(at, &string(value, name)?)?),
        _ => {
            let reason = format!(
                "unknown key {name:?}; known are server, host, capabilities, ca, client, skip_verify, override_path, \
                 header, dial_timeout and proxy"
            );
            return wrong(key.span().start, reason);
        }
    }
    Ok(())
}

/// The address of an API: `https` where no scheme is said, `/v2` behind the path unless that is overridden.
fn address(at: usize, text: &str, override_path: bool) -> Read<Url> {
    let full = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let bad = |reason: &str| wrong(at, format!("{text:?} is no address of a registry: {reason}"));
    let Ok(mut url) = Url::parse(&full) else { return bad("it cannot be read") };
    if !matches!(url.scheme(), "http" | "https") {
        return bad("neither http nor https");
    }
    if !url.username().is_empty() || url.password().is_some() {
        // The text itself would be in the log.
        return wrong(at, "an address with a user or password: credentials belong into config.json");
    }
    if url.query().is_some() || url.fragment().is_some() {
        return bad("it has a query or fragment");
    }
    if matches!(url.host_str(), Some("docker.io" | "index.docker.io")) && url.port().is_none() {
        let _ = url.set_host(Some("registry-1.docker.io"));
    }
    let mut path = url.path().trim_end_matches('/').to_owned();
    if !override_path && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    path.push('/');
    url.set_path(&path);
    Ok(url)
}

fn proxy(at: usize, text: &str) -> Read<Url> {
    let Ok(url) = Url::parse(text) else { return wrong(at, "proxy: it is no absolute address") };
    match url.scheme() {
        "http" | "https" if matches!(url.path(), "" | "/") && url.query().is_none() => Ok(url),
        "socks5" | "socks5h" => wrong(at, "proxy: SOCKS is not supported, only http and https"),
        _ => wrong(at, "proxy: it is no http or https address without a path"),
    }
}

fn capabilities(value: &Value<'_>) -> Read<Capabilities> {
    let names = array(value, "capabilities")?;
    if names.is_empty() {
        return Ok(Capabilities::ALL);
    }
    let mut can = Capabilities { pull: false, resolve: false, push: false };
    for name in names {
        let text = string(name, "capabilities")?;
        match text.to_ascii_lowercase().as_str() {
            "pull" => can.pull = true,
            "resolve" => can.resolve = true,
            "push" => can.push = true,
            "dial" => {}
            _ => {
                return wrong(
                    name.span().start,
                    format!("unknown capability {text:?}: pull, resolve or push"),
                );
            }
        }
    }
    Ok(can)
}

fn pairs(value: &Value<'_>, dir: &Path) -> Read<Vec<(PathBuf, Option<PathBuf>)>> {
    let DeValue::Array(items) = value.get_ref() else {
        return Ok(vec![(dir.join(string(value, "client")?), None)]);
    };
    let mut pairs = Vec::new();
    for item in items.iter() {
        if !matches!(item.get_ref(), DeValue::Array(_)) {
            pairs.push((dir.join(string(item, "client")?), None));
            continue;
        }
        match strings(item, "client")?.as_slice() {
            [cert, key] => {
                let key = Some(key).filter(|k| !k.is_empty());
                pairs.push((dir.join(cert), key.map(|k| dir.join(k))));
            }
            _ => return wrong(item.span().start, "client: a pair is a certificate and its key"),
        }
    }
    Ok(pairs)
}

fn headers(value: &Value<'_>) -> Read<HeaderMap> {
    let mut headers = HeaderMap::new();
    for (key, value) in sub_table(value, "header")? {
        let Ok(name) = HeaderName::try_from(key.get_ref().as_ref()) else {
            return wrong(key.span().start, format!("header: {:?} is no name of one", key.get_ref()));
        };
        for text in strings(value, key.get_ref())? {
            let Ok(mut text) = HeaderValue::try_from(text) else {
                return wrong(value.span().start, format!("header: {name} has a value that none can have"));
            };
            text.set_sensitive(true);
            headers.append(name.clone(), text);
        }
        if headers.len() > MAX_HEADERS {
            return wrong(key.span().start, format!("header: more than {MAX_HEADERS}"));
        }
    }
    Ok(headers)
}

fn sub_table<'a, 'i>(value: &'a Value<'i>, name: &str) -> Read<&'a DeTable<'i>> {
    match value.get_ref() {
        DeValue::Table(table) => Ok(table),
        _ => wrong(value.span().start, format!("{name} is not a table")),
    }
}

fn array<'a, 'i>(value: &'a Value<'i>, name: &str) -> Read<&'a [Value<'i>]> {
    match value.get_ref() {
        DeValue::Array(items) => Ok(items),
        _ => wrong(value.span().start, format!("{name} is not a list")),
    }
}

fn string(value: &Value<'_>, name: &str) -> Read<String> {
    match value.get_ref() {
        DeValue::String(text) => Ok(text.to_string()),
        _ => wrong(value.span().start, format!("{name} is not a string")),
    }
}

/// One or several.
fn strings(value: &Value<'_>, name: &str) -> Read<Vec<String>> {
    match value.get_ref() {
        DeValue::Array(items) => items.iter().map(|item| string(item, name)).collect(),
        _ => Ok(vec![string(value, name)?]),
    }
}

fn boolean(value: &Value<'_>, name: &str) -> Read<bool> {
    match value.get_ref() {
        DeValue::Boolean(value) => Ok(*value),
        _ => wrong(value.span().start, format!("{name} is neither true nor false")),
    }
}

/// Go's way to write a time: `1m30s`, `1.5s`, `300ms`.
fn go_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut sum = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let number: f64 = number.parse().ok()?;
        let units =
            [("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
        let (unit, factor) = units.into_iter().find(|(unit, _)| tail.starts_with(unit))?;
        sum += number * factor;
        rest = tail.get(unit.len()..)?;
    }
    Duration::try_from_secs_f64(sum).ok()
}

#[cfg(test)]
mod tests;
