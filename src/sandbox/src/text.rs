//! What gets into the configuration of a CT: what every engine writes, and checks that keep each value on its line and in
//! its word.

use std::{collections::BTreeMap, path::Path};

use crate::{Error, INIT_IN_CT, POD_DIR_IN_CT, Result, SandboxSpec};

/// A value that cannot be used.
pub(crate) fn invalid(what: impl Into<String>, value: &str, reason: &str) -> Error {
    Error::Invalid { what: what.into(), value: value.chars().take(200).collect(), reason: reason.into() }
}

/// A path as a mount entry wants it (`fstab(5)`: blanks as octal).
pub(crate) fn mount_path(what: &str, path: &Path) -> Result<String> {
    let Some(text) = path.to_str() else {
        return Err(invalid(what, &path.to_string_lossy(), "it is not UTF-8"));
    };
    if !path.is_absolute() || text.chars().any(char::is_control) {
        return Err(invalid(what, text, "it is not an absolute path without control characters"));
    }
    Ok(text.replace('\\', "\\134").replace(' ', "\\040").replace('#', "\\043"))
}

/// A path as the value of a key of its own.
pub(crate) fn plain_path(what: &str, path: &Path) -> Result<String> {
    let text = mount_path(what, path)?;
    if text.contains('\\') {
        return Err(invalid(what, &path.to_string_lossy(), "it has a blank, # or backslash"));
    }
    Ok(text)
}

pub(crate) fn check_hostname(name: &str) -> Result<()> {
    let ok = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    if name.is_empty() || name.len() > 63 || !name.chars().all(ok) {
        return Err(invalid("hostname", name, "it is not 1 to 63 letters, digits, dashes or dots"));
    }
    Ok(())
}

pub(crate) fn check_sysctl(name: &str, value: &str) -> Result<()> {
    let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.len() > 253 || !name.chars().all(ok) || name.contains("..") {
        return Err(invalid("sysctl", name, "it is not a dotted name"));
    }
    let namespaced = name.starts_with("net.")
        || name.starts_with("fs.mqueue.")
        || name.starts_with("kernel.shm")
        || name.starts_with("kernel.msg")
        || name == "kernel.sem";
    if !namespaced {
        return Err(invalid("sysctl", name, "only sysctls of a pod's own namespaces can be set"));
    }
    if value.is_empty() || value.len() > 1024 || value.chars().any(char::is_control) {
        return Err(invalid(
            format!("value of sysctl {name}"),
            value,
            "it is empty, too long or not one line",
        ));
    }
    Ok(())
}

/// Bounds of what becomes moxlet-init's command line.
pub(crate) fn check_args(args: &[String]) -> Result<()> {
    for arg in args {
        if arg.len() > 4096 || arg.contains('\0') {
            return Err(invalid("init argument", arg, "it is too long or has a NUL"));
        }
    }
    if args.len() > 64 {
        return Err(invalid("init arguments", &args.len().to_string(), "there are more than 64"));
    }
    Ok(())
}

/// The pod's sysctls, and what container runtimes set in the network namespace of every pod: a server that is not root may listen on
/// port 80, and ping needs no capability. Both reach no further than the pod's own namespace.
fn sysctls(spec: &SandboxSpec) -> BTreeMap<String, String> {
    let mut all = BTreeMap::from([
        ("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned()),
        // The groups that the CT has.
        ("net.ipv4.ping_group_range".to_owned(), format!("0 {}", spec.map.size.saturating_sub(1))),
    ]);
    all.extend(spec.sysctls.iter().map(|(name, value)| (name.clone(), value.clone())));
    all
}

/// What every CT of a pod has, whichever engine makes it.
pub(crate) fn of_every_ct(spec: &SandboxSpec, cgroup: &str) -> Result<Vec<(String, String)>> {
    let init = mount_path("init binary", &spec.init_binary)?;
    let shared = mount_path("shared directory", &spec.shared_dir)?;
    let fixed = [
        ("lxc.signal.halt", "SIGTERM".to_owned()),
        // /proc stays whole: a pod's containers mount their own, and mask and protect it themselves.
        ("lxc.mount.auto", format!("proc:rw sys:mixed {cgroup}")),
        ("lxc.mount.entry", "tmpfs run tmpfs rw,nosuid,nodev,mode=755,size=64m 0 0".to_owned()),
        ("lxc.mount.entry", "tmpfs tmp tmpfs rw,nosuid,nodev,mode=1777,size=16m 0 0".to_owned()),
        ("lxc.mount.entry", format!("{init} {} none bind,ro 0 0", &INIT_IN_CT[1..])),
        ("lxc.mount.entry", format!("{shared} {} none rbind,rslave,create=dir 0 0", &POD_DIR_IN_CT[1..])),
        ("lxc.pty.max", "1024".to_owned()),
    ];
    let mut pairs: Vec<_> = fixed.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    for (name, value) in &sysctls(spec) {
        check_sysctl(name, value)?;
        pairs.push((format!("lxc.sysctl.{name}"), value.clone()));
    }
    Ok(pairs)
}
