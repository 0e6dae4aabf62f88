//! The generated `/var/lib/lxc/ID/config`: Proxmox VE's own keys in its order, then the raw keys, the cpuset last.

use std::{collections::BTreeMap, fmt::Write, fs, path::Path};

use super::Ct;
use crate::{Error, Result, config::LxcBackend, error::io, guest::parse_pairs};

const SHARE: &str = "/usr/share/lxc/config";
const CGROUP: &str = "/sys/fs/cgroup/lxc";
const PERIOD: u64 = 100_000;
const RULES: &str = "rules.seccomp";
const APPARMOR_RAW: &str = "lxc.apparmor.raw";

/// What the generated config depends on besides the CT's.
pub(super) struct Host<'a> {
    /// Whether a file of LXC's own configuration is there.
    pub(super) exists: &'a dyn Fn(&str) -> bool,
    /// The MTU of a bridge; none if there is no such bridge.
    pub(super) bridge_mtu: &'a dyn Fn(&str) -> Option<u32>,
}

/// Writes the CT's config and its seccomp rules.
pub(super) fn write(backend: &LxcBackend, dir: &Path, ct: Ct<'_>) -> Result<()> {
    if let Some(own) = seccomp_rules(ct) {
        let common = Path::new(SHARE).join("common.seccomp");
        let mut rules = fs::read_to_string(&common).map_err(io("read", &common))?;
        rules.push_str(&own);
        let path = dir.join(RULES);
        fs::write(&path, rules).map_err(io("write", &path))?;
    }
    let path = dir.join("config");
    let bridge_mtu = |bridge: &str| {
        fs::read_to_string(Path::new("/sys/class/net").join(bridge).join("mtu")).ok()?.trim().parse().ok()
    };
    let host = Host { exists: &|path| Path::new(path).is_file(), bridge_mtu: &bridge_mtu };
    fs::write(&path, generate(backend, dir, ct, &host)?).map_err(io("write", &path))
}

/// The text, in the order of `PVE::LXC::update_lxc_config`.
pub(super) fn generate(backend: &LxcBackend, dir: &Path, ct: Ct<'_>, host: &Host<'_>) -> Result<String> {
    let (conf, vmid) = (ct.conf, ct.vmid);
    let need =
        |key: &str| conf.get(key).ok_or_else(|| Error::Backend(format!("missing '{key}' - internal error")));
    let mut lines = Lines::default();
    lines.add("lxc.cgroup.relative", "0");
    lines.add("lxc.cgroup.dir.monitor", format!("lxc.monitor/{vmid}"));
    lines.add("lxc.cgroup.dir.container", format!("lxc/{vmid}"));
    lines.add("lxc.cgroup.dir.container.inner", "ns");
    lines.add("lxc.arch", need("arch")?);
    let unprivileged = is_unprivileged(ct);
    let os = conf.get("ostype").unwrap_or("unmanaged");
    for kind in ["common", "userns"] {
        if kind == "common" || unprivileged {
            let own = format!("{SHARE}/{os}.{kind}.conf");
            lines.add("lxc.include", if (host.exists)(&own) { own } else { format!("{SHARE}/{kind}.conf") });
        }
    }
    // In place of the hook that Proxmox VE brings in by its own file among LXC's includes.
    lines.add("lxc.hook.pre-start", format!("{} ct-hook {}", backend.hook_program(), dir.display()));
    if seccomp_rules(ct).is_some() {
        lines.add("lxc.seccomp.profile", dir.join(RULES).display());
    }
    features(&mut lines, ct);
    let entrypoint = conf.get("entrypoint");
    if entrypoint.is_some_and(|program| program != "/sbin/init") {
        lines.add("lxc.mount.entry", "shm dev/shm tmpfs rw,nosuid,nodev,create=dir 0 0");
    }
    lines.add("lxc.monitor.unshare", "1");
    if unprivileged && !has_raw(ct, "lxc.idmap") {
        lines.add("lxc.idmap", "u 0 100000 65536");
        lines.add("lxc.idmap", "g 0 100000 65536");
    }
    console(&mut lines, ct);
    limits(&mut lines, ct);
    lines.add("lxc.rootfs.path", dir.join("rootfs").display());
    if let Some(entrypoint) = entrypoint {
        lines.add("lxc.init.cmd", entrypoint);
    }
    for (key, net) in &conf.main.values {
        if let Some(n) = key.strip_prefix("net").and_then(|n| n.parse().ok()) {
            network(&mut lines, vmid, n, net, host)?;
        }
    }
    // Proxmox VE has `lxc.environment.runtime`, which LXC knows only after 6.0.4.
    for pair in conf.get("env").unwrap_or("").split('\0').filter(|p| !p.is_empty()) {
        lines.add("lxc.environment", pair);
    }
    for (key, value) in &conf.main.raw {
        lines.add(key, value);
    }
    cpuset(&mut lines, ct);
    Ok(lines.0)
}

fn has_raw(ct: Ct<'_>, key: &str) -> bool {
    ct.conf.main.raw.iter().any(|(k, _)| k == key)
}

fn is_unprivileged(ct: Ct<'_>) -> bool {
    ct.conf.flag("unprivileged") || has_raw(ct, "lxc.idmap")
}

/// What `features` says.
struct Features(BTreeMap<String, String>);

impl Features {
    fn of(ct: Ct<'_>) -> Self {
        Self(parse_pairs(ct.conf.get("features").unwrap_or(""), ""))
    }

    fn has(&self, feature: &str) -> bool {
        self.0.get(feature).and_then(|value| crate::schema::parse_boolean(value)) == Some(1)
    }
}

/// The rules beyond LXC's common ones (`make_seccomp_config`); none for a CT that has a profile of its own, or LXC's. Those of
/// the feature `mknod` are left out: the program that they notify is not simulated.
fn seccomp_rules(ct: Ct<'_>) -> Option<String> {
    if has_raw(ct, "lxc.seccomp.profile") || !is_unprivileged(ct) {
        return None;
    }
    let keyctl = if Features::of(ct).has("keyctl") { "" } else { "keyctl errno 38\n" };
    Some(format!(
        "ioctl errno 1 [1,0x9400,SCMP_CMP_MASKED_EQ,0xff00]\n{keyctl}socket errno 97 [0,38,SCMP_CMP_EQ]\n"
    ))
}

/// AppArmor (`make_apparmor_config`), and what else the features bring.
fn features(lines: &mut Lines, ct: Ct<'_>) {
    let features = Features::of(ct);
    if !has_raw(ct, "lxc.apparmor.profile") {
        lines.add("lxc.apparmor.profile", "generated");
        lines.add(APPARMOR_RAW, "allow mqueue,");
        if features.has("nesting") {
            lines.add("lxc.apparmor.allow_nesting", "1");
            lines.add(APPARMOR_RAW, "allow userns,");
        } else {
            lines.add(APPARMOR_RAW, "deny mount -> /proc/,");
            lines.add(APPARMOR_RAW, "deny mount -> /sys/,");
        }
        let kinds = features.0.get("mount").map_or("", String::as_str);
        for kind in kinds.split(';').filter(|kind| !kind.is_empty()) {
            lines.add(APPARMOR_RAW, format!("mount fstype={kind},"));
        }
    }
    if features.has("fuse") {
        lines.add(APPARMOR_RAW, "mount fstype=fuse,");
        lines.add("lxc.mount.entry", "/dev/fuse dev/fuse none bind,create=file 0 0");
    }
    if is_unprivileged(ct) && !features.has("force_rw_sys") {
        lines.add("lxc.mount.auto", "sys:mixed");
    }
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
        lines.add("lxc.cgroup2.devices.deny", "c 5:1 rwm");
    }
    lines.add("lxc.tty.max", ct.conf.get("tty").and_then(|t| t.parse::<u32>().ok()).unwrap_or(2));
    lines.add("lxc.environment", "TERM=linux");
    lines.add("lxc.uts.name", ct.conf.name(ct.vmid));
}

/// `memory.high` is a little below `memory.max`, so that reclaim sets in before the killer does: by 8 parts of 1024, and from
/// 16 GiB on by 128 MiB (`calculate_memory_constraints`).
fn memory_high(max: u64) -> u64 {
    if max >= 16 << 30 { max - (128 << 20) } else { max / 1024 * 1016 }
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
    let given = has_raw(ct, "lxc.cgroup2.cpuset.cpus");
    let cores = ct.conf.get("cores").and_then(|c| c.parse::<usize>().ok());
    let there = std::thread::available_parallelism().map_or(1, usize::from);
    if let Some(cores) = cores
        && !given
    {
        lines.add("lxc.cgroup2.cpuset.cpus", format!("0-{}", cores.clamp(1, there) - 1));
    }
}

fn network(lines: &mut Lines, vmid: u32, n: u32, net: &str, host: &Host<'_>) -> Result<()> {
    let parts = parse_pairs(net, "name");
    let part = |key: &str| parts.get(key).map(String::as_str);
    let is = |key: &str| part(key).and_then(crate::schema::parse_boolean) == Some(1);
    let bridge = part("bridge").unwrap_or("");
    let of_bridge = (host.bridge_mtu)(bridge).filter(|_| !bridge.is_empty());
    let of_bridge = of_bridge.ok_or_else(|| Error::Backend(format!("bridge '{bridge}' does not exist")))?;
    let mtu = part("mtu").and_then(|mtu| mtu.parse().ok()).filter(|mtu| *mtu != 0).unwrap_or(of_bridge);
    if mtu > of_bridge {
        let why = format!("net{n}: MTU size '{mtu}' is bigger than bridge MTU '{of_bridge}'");
        return Err(Error::Backend(why));
    }
    let mut add = |key: &str, value: &str| lines.add(&format!("lxc.net.{n}.{key}"), value);
    add("type", "veth");
    add("veth.pair", &format!("veth{vmid}i{n}"));
    for key in ["hwaddr", "name"] {
        if let Some(value) = part(key) {
            add(key, value);
        }
    }
    add("mtu", &mtu.to_string());
    // Proxmox VE leaves these to a script of the interface; the effect is the same.
    add("link", bridge);
    if let Some(tag) = part("tag") {
        add("veth.vlan.id", tag);
    }
    if !is("host-managed") || is("link_down") {
        return Ok(());
    }
    if part("ip6") == Some("auto") {
        let why = format!("net{n}: SLAAC is not supported for host-managed network configuration");
        return Err(Error::Backend(why));
    }
    for (address, gateway, family) in [("ip", "gw", "ipv4"), ("ip6", "gw6", "ipv6")] {
        if let Some(address) = part(address).filter(|a| !matches!(*a, "dhcp" | "manual")) {
            add(&format!("{family}.address"), address);
        }
        if let Some(gateway) = part(gateway) {
            add(&format!("{family}.gateway"), gateway);
        }
    }
    add("flags", "up");
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

    fn text(conf: &str) -> Result<String> {
        let conf = CtConf::parse(conf);
        let ct = Ct { node: "pve1", vmid: 100, conf: &conf };
        let backend = LxcBackend { hook: Some("/usr/bin/pve-sim".into()), ..LxcBackend::default() };
        let host = Host { exists: &|_| false, bridge_mtu: &|bridge| (bridge == "vmbr0").then_some(1500) };
        generate(&backend, Path::new("/var/lib/lxc/100"), ct, &host)
    }

    const ROOT: &str = "arch: amd64\nostype: unmanaged\nrootfs: local-zfs:subvol-100-disk-0,size=1G\n";

    #[test]
    fn own_keys_come_first_in_their_order_then_raw_keys_then_the_cpuset() {
        let text = text(
            "arch: amd64\ncores: 1\ncpulimit: 1.5\nentrypoint: /sbin/moxlet-init\nfeatures: nesting=1\nhostname: web\nmemory: 64\n\
             net0: name=eth0,bridge=vmbr0,hwaddr=BC:24:11:00:00:01,ip=10.0.0.2/24,gw=10.0.0.1,host-managed=1,type=veth\n\
             ostype: unmanaged\ncmode: console\nrootfs: local-zfs:subvol-100-disk-0,size=1G\nswap: 0\nunprivileged: 1\n\
             lxc.signal.halt: SIGTERM\nlxc.include: /x/100-u.conf\n",
        )
        .unwrap();
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
lxc.apparmor.raw = allow mqueue,
lxc.apparmor.allow_nesting = 1
lxc.apparmor.raw = allow userns,
lxc.mount.auto = sys:mixed
lxc.mount.entry = shm dev/shm tmpfs rw,nosuid,nodev,create=dir 0 0
lxc.monitor.unshare = 1
lxc.idmap = u 0 100000 65536
lxc.idmap = g 0 100000 65536
lxc.tty.max = 2
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
lxc.net.0.hwaddr = BC:24:11:00:00:01
lxc.net.0.name = eth0
lxc.net.0.mtu = 1500
lxc.net.0.link = vmbr0
lxc.net.0.ipv4.address = 10.0.0.2/24
lxc.net.0.ipv4.gateway = 10.0.0.1
lxc.net.0.flags = up
lxc.signal.halt = SIGTERM
lxc.include = /x/100-u.conf
lxc.cgroup2.cpuset.cpus = 0-0
";
        assert_eq!(text, expected);
    }

    #[test]
    fn what_a_ct_has_of_its_own_takes_the_place_of_the_generated_profiles() {
        let own = text(&format!(
            "{ROOT}unprivileged: 1\nfeatures: nesting=1\nlxc.apparmor.profile: unconfined\nlxc.seccomp.profile: /x\n"
        ));
        let own = own.unwrap();
        assert!(
            !own.contains("generated") && !own.contains("allow_nesting") && !own.contains("rules.seccomp"),
            "{own}"
        );
        let privileged = text(ROOT).unwrap();
        assert!(!privileged.contains("seccomp") && !privileged.contains("sys:mixed"), "{privileged}");
        assert!(privileged.contains("lxc.apparmor.raw = deny mount -> /sys/,\n"), "{privileged}");
        assert!(
            privileged.contains("memory.max = 536870912\n") && privileged.contains("swap.max = 0\n"),
            "{privileged}"
        );
    }

    #[test]
    fn the_rules_for_system_calls_follow_the_feature_keyctl() {
        let rules = |conf: &str| seccomp_rules(Ct { node: "pve1", vmid: 100, conf: &CtConf::parse(conf) });
        let all = rules("unprivileged: 1\n").unwrap();
        assert!(
            all.contains("\nkeyctl errno 38\n") && all.ends_with("socket errno 97 [0,38,SCMP_CMP_EQ]\n"),
            "{all}"
        );
        assert!(!rules("unprivileged: 1\nfeatures: keyctl=1\n").unwrap().contains("keyctl"));
        assert!(rules("lxc.idmap: u 0 100000 65536\n").is_some());
        assert_eq!(rules("memory: 64\n"), None);
    }

    #[test]
    fn much_memory_has_128_mib_above_high() {
        assert_eq!(memory_high(64 << 20), 66_584_576);
        assert_eq!(memory_high((16 << 30) - (1 << 20)), ((16 << 30) - (1 << 20)) / 1024 * 1016);
        assert_eq!(memory_high(16 << 30), (16 << 30) - (128 << 20));
        assert_eq!(memory_high(64 << 30), (64 << 30) - (128 << 20));
    }

    #[test]
    fn a_nic_fits_its_bridge_and_is_up_only_if_the_host_manages_it() {
        let with = |net: &str| text(&format!("{ROOT}net0: name=eth0,{net}\n"));
        let plain = with("bridge=vmbr0,ip=10.0.0.2/24").unwrap();
        assert!(plain.contains("lxc.net.0.mtu = 1500\n") && !plain.contains("flags"), "{plain}");
        assert!(with("bridge=vmbr0,mtu=1400").unwrap().contains("lxc.net.0.mtu = 1400\n"));
        let down = with("bridge=vmbr0,ip=10.0.0.2/24,host-managed=1,link_down=1").unwrap();
        assert!(!down.contains("ipv4") && !down.contains("flags"), "{down}");
        for (net, why) in [
            ("bridge=vmbr0,mtu=9000", "bigger than bridge MTU '1500'"),
            ("bridge=vmbr9", "bridge 'vmbr9' does not exist"),
            ("bridge=vmbr0,host-managed=1,ip6=auto", "SLAAC"),
        ] {
            let error = with(net).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
