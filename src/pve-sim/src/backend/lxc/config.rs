//! The generated `/var/lib/lxc/ID/config`: Proxmox VE's own keys in its order, then the raw keys, the cpuset last.

use std::{fmt::Write, fs, path::Path};

use super::Ct;
use crate::{Error, Result, config::LxcBackend, error::io, guest::parse_pairs};

const SHARE: &str = "/usr/share/lxc/config";
const CGROUP: &str = "/sys/fs/cgroup/lxc";
const PERIOD: u64 = 100_000;

/// Writes the CT's config and its seccomp rules.
pub(super) fn write(backend: &LxcBackend, dir: &Path, ct: Ct<'_>) -> Result<()> {
    let rules = dir.join("rules.seccomp");
    let common = Path::new(SHARE).join("common.seccomp");
    fs::copy(&common, &rules).map_err(io("copy", &common))?;
    let path = dir.join("config");
    let text = generate(backend, dir, ct, |path| Path::new(path).is_file())?;
    fs::write(&path, text).map_err(io("write", &path))
}

/// The text. `exists` tells whether a file of LXC's own configuration is there.
pub(super) fn generate(
    backend: &LxcBackend,
    dir: &Path,
    ct: Ct<'_>,
    exists: impl Fn(&str) -> bool,
) -> Result<String> {
    let (conf, vmid) = (ct.conf, ct.vmid);
    let need =
        |key: &str| conf.get(key).ok_or_else(|| Error::Backend(format!("missing '{key}' - internal error")));
    let mut lines = Lines::default();
    lines.add("lxc.cgroup.relative", "0");
    lines.add("lxc.cgroup.dir.monitor", format!("lxc.monitor/{vmid}"));
    lines.add("lxc.cgroup.dir.container", format!("lxc/{vmid}"));
    lines.add("lxc.cgroup.dir.container.inner", "ns");
    lines.add("lxc.arch", need("arch")?);
    let custom_idmap = conf.main.raw.iter().any(|(key, _)| key == "lxc.idmap");
    let unprivileged = conf.flag("unprivileged");
    let os = conf.get("ostype").unwrap_or("unmanaged");
    for kind in ["common", "userns"] {
        if kind == "common" || unprivileged || custom_idmap {
            let own = format!("{SHARE}/{os}.{kind}.conf");
            lines.add("lxc.include", if exists(&own) { own } else { format!("{SHARE}/{kind}.conf") });
        }
    }
    // In place of the hook that Proxmox VE brings in by its own file among LXC's includes.
    lines.add("lxc.hook.pre-start", format!("{} ct-hook {}", backend.hook_program(), dir.display()));
    lines.add("lxc.seccomp.profile", dir.join("rules.seccomp").display());
    let features = parse_pairs(conf.get("features").unwrap_or(""), "");
    let has = |feature: &str| features.get(feature).is_some_and(|v| v == "1");
    lines.add("lxc.apparmor.profile", "generated");
    if has("nesting") {
        lines.add("lxc.apparmor.allow_nesting", "1");
        lines.add("lxc.mount.auto", "sys:mixed");
    }
    if has("fuse") {
        lines.add("lxc.mount.entry", "/dev/fuse dev/fuse none bind,create=file 0 0");
    }
    let entrypoint = conf.get("entrypoint");
    if entrypoint.is_some() {
        lines.add("lxc.mount.entry", "tmpfs dev/shm tmpfs rw,nosuid,nodev,create=dir 0 0");
    }
    lines.add("lxc.monitor.unshare", "1");
    if unprivileged && !custom_idmap {
        lines.add("lxc.idmap", "u 0 100000 65536");
        lines.add("lxc.idmap", "g 0 100000 65536");
    }
    console(&mut lines, ct);
    limits(&mut lines, ct);
    lines.add("lxc.rootfs.path", dir.join("rootfs").display());
    if let Some(entrypoint) = entrypoint {
        lines.add("lxc.init.cmd", entrypoint);
    }
    for n in 0..32 {
        if let Some(net) = conf.get(&format!("net{n}")) {
            network(&mut lines, vmid, n, net)?;
        }
    }
    for pair in conf.get("env").unwrap_or("").split('\0').filter(|p| !p.is_empty()) {
        lines.add("lxc.environment", pair);
    }
    for (key, value) in &conf.main.raw {
        lines.add(key, value);
    }
    cpuset(&mut lines, ct);
    Ok(lines.0)
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, key: &str, value: impl std::fmt::Display) {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "{key} = {value}");
    }
}

fn console(lines: &mut Lines, ct: Ct<'_>) {
    let without = ct.conf.get("console").and_then(crate::schema::parse_boolean) == Some(0);
    if without {
        lines.add("lxc.console.path", "none");
    }
    let ttys = match ct.conf.get("cmode") {
        Some("console" | "shell") => 0,
        _ if without => 0,
        _ => ct.conf.get("tty").and_then(|t| t.parse::<u32>().ok()).unwrap_or(2),
    };
    lines.add("lxc.tty.max", ttys);
    lines.add("lxc.environment", "TERM=linux");
    lines.add("lxc.uts.name", ct.conf.name(ct.vmid));
}

/// `memory.high` is a little below `memory.max`, so that reclaim sets in before the killer does.
fn memory_high(max: u64) -> u64 {
    max / 1024 * 1016
}

fn limits(lines: &mut Lines, ct: Ct<'_>) {
    let max = ct.conf.memory();
    lines.add("lxc.cgroup2.memory.max", max);
    lines.add("lxc.cgroup2.memory.high", memory_high(max));
    lines.add("lxc.cgroup2.memory.swap.max", ct.conf.swap());
    if let Some(quota) = quota(ct) {
        lines.add("lxc.cgroup2.cpu.max", format!("{quota} {PERIOD}"));
    }
    if let Some(weight) = weight(ct) {
        lines.add("lxc.cgroup2.cpu.weight", weight);
    }
}

fn quota(ct: Ct<'_>) -> Option<u64> {
    let limit = ct.conf.get("cpulimit")?.parse::<f64>().ok()?;
    (limit.is_finite() && limit > 0.0).then_some((limit * PERIOD as f64) as u64)
}

fn weight(ct: Ct<'_>) -> Option<u64> {
    ct.conf.get("cpuunits")?.parse::<u64>().ok().map(|units| units.clamp(1, 10_000))
}

fn cpuset(lines: &mut Lines, ct: Ct<'_>) {
    let given = ct.conf.main.raw.iter().any(|(key, _)| key == "lxc.cgroup2.cpuset.cpus");
    let cores = ct.conf.get("cores").and_then(|c| c.parse::<usize>().ok());
    let there = std::thread::available_parallelism().map_or(1, usize::from);
    if let Some(cores) = cores
        && !given
    {
        lines.add("lxc.cgroup2.cpuset.cpus", format!("0-{}", cores.clamp(1, there) - 1));
    }
}

fn network(lines: &mut Lines, vmid: u32, n: u32, net: &str) -> Result<()> {
    let parts = parse_pairs(net, "name");
    let part = |key: &str| parts.get(key).map(String::as_str);
    let mut add = |key: &str, value: &str| lines.add(&format!("lxc.net.{n}.{key}"), value);
    add("type", "veth");
    add("veth.pair", &format!("veth{vmid}i{n}"));
    if let Some(bridge) = part("bridge") {
        if !Path::new("/sys/class/net").join(bridge).exists() && !cfg!(test) {
            return Err(Error::Backend(format!("bridge '{bridge}' does not exist")));
        }
        // Proxmox VE leaves this to a script of the interface; the effect is the same.
        add("link", bridge);
    }
    if let Some(tag) = part("tag") {
        add("veth.vlan.id", tag);
    }
    if let Some(hwaddr) = part("hwaddr") {
        add("hwaddr", hwaddr);
    }
    add("name", part("name").unwrap_or("eth0"));
    if let Some(mtu) = part("mtu") {
        add("mtu", mtu);
    }
    if part("host-managed") == Some("1") {
        add("flags", "up");
        for (address, gateway, family) in [("ip", "gw", "ipv4"), ("ip6", "gw6", "ipv6")] {
            if let Some(address) = part(address).filter(|a| a.contains('/')) {
                add(&format!("{family}.address"), address);
                if let Some(gateway) = part(gateway) {
                    add(&format!("{family}.gateway"), gateway);
                }
            }
        }
    }
    Ok(())
}

/// Writes the limits of a running CT to its cgroup.
pub(super) fn apply_limits(ct: Ct<'_>) -> Result<()> {
    let dir = Path::new(CGROUP).join(ct.vmid.to_string());
    let set = |file: &str, value: String| {
        let path = dir.join(file);
        fs::write(&path, value).map_err(io("write", &path))
    };
    let max = ct.conf.memory();
    // `high` first when it falls, last when it rises: it never is above `max` for long, and never matters if it is.
    set("memory.high", memory_high(max).to_string())?;
    set("memory.max", max.to_string())?;
    set("memory.swap.max", ct.conf.swap().to_string())?;
    set("cpu.max", quota(ct).map_or_else(|| format!("max {PERIOD}"), |q| format!("{q} {PERIOD}")))?;
    set("cpu.weight", weight(ct).unwrap_or(100).to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::guest::CtConf;

    #[test]
    fn own_keys_come_first_in_their_order_then_raw_keys_then_the_cpuset() {
        let conf = CtConf::parse(
            "arch: amd64\ncores: 1\ncpulimit: 1.5\nentrypoint: /sbin/moxlet-init\nfeatures: nesting=1\nhostname: web\nmemory: 64\n\
             net0: name=eth0,bridge=vmbr0,hwaddr=BC:24:11:00:00:01,ip=10.0.0.2/24,gw=10.0.0.1,host-managed=1,type=veth\n\
             ostype: unmanaged\ncmode: console\nrootfs: local-zfs:subvol-100-disk-0,size=1G\nswap: 0\nunprivileged: 1\n\
             lxc.signal.halt: SIGTERM\nlxc.include: /x/100-u.conf\n",
        );
        let ct = Ct { node: "pve1", vmid: 100, conf: &conf };
        let backend = LxcBackend { hook: Some("/usr/bin/pve-sim".into()), ..LxcBackend::default() };
        let text = generate(&backend, Path::new("/var/lib/lxc/100"), ct, |_| false).unwrap();
        let expected = "\
lxc.cgroup.relative = 0
lxc.cgroup.dir.monitor = lxc.monitor/100
lxc.cgroup.dir.container = lxc/100
lxc.cgroup.dir.container.inner = ns
lxc.arch = amd64
lxc.include = /usr/share/lxc/config/common.conf
lxc.include = /usr/share/lxc/config/userns.conf
lxc.hook.pre-start = /usr/bin/pve-sim ct-hook /var/lib/lxc/100
lxc.seccomp.profile = /var/lib/lxc/100/rules.seccomp
lxc.apparmor.profile = generated
lxc.apparmor.allow_nesting = 1
lxc.mount.auto = sys:mixed
lxc.mount.entry = tmpfs dev/shm tmpfs rw,nosuid,nodev,create=dir 0 0
lxc.monitor.unshare = 1
lxc.idmap = u 0 100000 65536
lxc.idmap = g 0 100000 65536
lxc.tty.max = 0
lxc.environment = TERM=linux
lxc.uts.name = web
lxc.cgroup2.memory.max = 67108864
lxc.cgroup2.memory.high = 66584576
lxc.cgroup2.memory.swap.max = 0
lxc.cgroup2.cpu.max = 150000 100000
lxc.rootfs.path = /var/lib/lxc/100/rootfs
lxc.init.cmd = /sbin/moxlet-init
lxc.net.0.type = veth
lxc.net.0.veth.pair = veth100i0
lxc.net.0.link = vmbr0
lxc.net.0.hwaddr = BC:24:11:00:00:01
lxc.net.0.name = eth0
lxc.net.0.flags = up
lxc.net.0.ipv4.address = 10.0.0.2/24
lxc.net.0.ipv4.gateway = 10.0.0.1
lxc.signal.halt = SIGTERM
lxc.include = /x/100-u.conf
lxc.cgroup2.cpuset.cpus = 0-0
";
        assert_eq!(text, expected);
    }
}
