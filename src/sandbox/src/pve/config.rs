//! The configuration of a pod's CT: what stands in `/etc/pve/lxc/ID.conf` and what in the file that it includes. Pure, so
//! that what gets into them can be tested.
//!
//! Proxmox VE reads only its own file, so everything that it acts upon stands there. What its next write would drop (raw
//! keys outside its list) and what is nobody's business but LXC's rides in the included file; see [`super::marker`].

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use moxlet_ids::Vmid;
use moxlet_pve::{
    NodeName, StorageId,
    config::{
        Arch, ConsoleMode, DiskSize, Features, IpConfig, LxcConfig, MacAddr, MountPoint, NetInterface,
        Startup, Volume,
    },
};
use sha2::{Digest as _, Sha256};

use crate::{
    Error, INIT_IN_CT, IdMap, Limits, Nic, NicAddress, Result, SandboxSpec,
    cgroup::{DEFAULT_PERIOD_US, memory, weight_of_shares},
    text::{check_args, check_hostname, invalid, mount_path, of_every_ct, plain_path},
};

/// Where the guard lies in the CT. It is no volume and not shared, so that Proxmox VE refuses to migrate, snapshot or clone
/// the CT before it has stopped it.
const GUARD_IN_CT: &str = "/run/moxlet-guard";
/// The tag of every CT of a pod.
const TAG: &str = "moxlet";
/// The map that Proxmox VE gives an unprivileged CT by itself.
const USUAL_MAP: IdMap = IdMap { host_base: 100_000, size: 65_536 };
/// Seconds that a host which goes down gives a CT beyond its pod's own grace.
const BEYOND_GRACE: u64 = 10;
/// The finest share of a core that is written.
const CPU_STEP: f64 = 10_000.0;

/// What the configuration depends on beside the spec.
#[derive(Debug)]
pub(super) struct Surroundings<'a> {
    /// This host.
    pub(super) node: &'a NodeName,
    /// The storage of the root volume.
    pub(super) storage: &'a StorageId,
    /// The root volume's name on it.
    pub(super) volume: &'a str,
    /// Its size in bytes.
    pub(super) root_bytes: u64,
    /// The file that is included.
    pub(super) include: &'a Path,
    /// The empty directory that is the guard.
    pub(super) guard: &'a Path,
    /// Memory of a pod without a limit, in bytes: what the host can give.
    pub(super) memory_bytes: u64,
    /// The host's processors.
    pub(super) cores: u32,
    /// Whether the CT is written as protected.
    pub(super) protection: bool,
}

fn property<T: std::str::FromStr>(what: &'static str, text: &str) -> Result<T>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|e: T::Err| invalid(what, text, &e.to_string()))
}

/// Proxmox VE takes a host name whose parts neither begin nor end with a dash.
fn check_labels(hostname: &str) -> Result<()> {
    let plain = hostname.trim_matches(['-', '.']).len() == hostname.len();
    if plain && hostname.split('.').all(|l| !l.is_empty() && !l.starts_with('-')) {
        return Ok(());
    }
    Err(invalid("hostname", hostname, "a part of it begins or ends with a dash, or is empty"))
}

/// The mount point that keeps Proxmox VE from migrating, snapshotting or cloning the CT.
fn guard(around: &Surroundings<'_>) -> Result<MountPoint> {
    let volume = Volume {
        ro: Some(true),
        ..Volume::new(property("guard directory", &plain_path("guard directory", around.guard)?)?)
    };
    Ok(MountPoint { path: property("guard", GUARD_IN_CT)?, backup: None, keepattrs: None, volume })
}

/// `/etc/pve/lxc/ID.conf`, complete and without a lock.
pub(super) fn render(spec: &SandboxSpec, around: &Surroundings<'_>) -> Result<LxcConfig> {
    check_hostname(&spec.hostname)?;
    check_labels(&spec.hostname)?;
    let volume = format!("{}:{}", around.storage, around.volume);
    let rootfs = Volume {
        size: Some(DiskSize::from_bytes(around.root_bytes)),
        ..Volume::new(property("root volume", &volume)?)
    };
    let cpulimit = cpulimit(&spec.limits);
    let mut config = LxcConfig {
        arch: arch(),
        cmode: Some(ConsoleMode::Console),
        console: Some(true),
        cores: cpulimit.map(|limit| whole_cores(limit).min(around.cores.max(1))),
        cpulimit,
        cpuunits: cpuunits(&spec.limits),
        description: Some(description(spec, around.node, &[])),
        entrypoint: Some(entrypoint(&spec.init_args)?),
        features: Some(Features { nesting: Some(true), ..Features::default() }),
        hostname: Some(spec.hostname.clone()),
        memory: Some(memory::mib(spec.limits.memory_bytes, around.memory_bytes)),
        onboot: Some(false),
        ostype: Some("unmanaged".to_owned()),
        protection: around.protection.then_some(true),
        rootfs: Some(rootfs),
        startup: Some(Startup { down: Some(down_seconds(spec)), ..Startup::default() }),
        swap: Some(0),
        tags: tags(spec)?,
        unprivileged: Some(true),
        ..LxcConfig::default()
    };
    config.mp.insert(0, guard(around)?);
    for (number, nic) in spec.nics.iter().enumerate() {
        let number = u16::try_from(number).ok().filter(|n| *n < 32);
        let number = number.ok_or_else(|| {
            invalid("network interfaces", &spec.nics.len().to_string(), "there are more than 32")
        })?;
        config.net.insert(number, interface(spec, nic, number)?);
    }
    let mut raw = |key: &str, value: String| config.lxc.push((key.to_owned(), value));
    raw("lxc.include", plain_path("include file", around.include)?);
    if spec.map != USUAL_MAP {
        for kind in ["u", "g"] {
            raw("lxc.idmap", format!("{kind} 0 {} {}", spec.map.host_base, spec.map.size));
        }
    }
    Ok(config)
}

/// The text of the included file below its mark, for the CT of this number.
pub(super) fn include_text(spec: &SandboxSpec, vmid: Vmid) -> Result<String> {
    let mut text = String::new();
    let mut put = |key: &str, value: &str| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{key} = {value}");
    };
    put("lxc.hook.pre-start", &hook(spec, vmid)?);
    // None of lxcfs' files over those of /proc, which all CTs of Proxmox VE have by LXC's common configuration: the containers
    // have a /proc of their own, and only mounts and the time to make them would come of it.
    put("lxc.hook.mount", "");
    for (key, value) in of_every_ct(spec, "cgroup:mixed")? {
        put(&key, &value);
    }
    if let Some(pids) = spec.limits.pids.filter(|p| *p > 0) {
        put("lxc.cgroup2.pids.max", &pids.to_string());
    }
    Ok(text)
}

/// What lets no CT of another number start with this file: a copy of the CT finds it while the pod lives. LXC runs it by a shell
/// on the host, as root, before it mounts anything, and behind Proxmox VE's own hook, which sees to the CT's volumes and stands in a file
/// that is included before. It is the program that the CT's own PID 1 is, so that it is there for as long as the CT can start;
/// without it nothing starts.
fn hook(spec: &SandboxSpec, vmid: Vmid) -> Result<String> {
    mount_path("init binary", &spec.init_binary)?;
    let program = spec.init_binary.display().to_string();
    if program.contains('\'') {
        return Err(invalid("init binary", &program, "it has a quote"));
    }
    Ok(format!("'{program}' check-ct {vmid}"))
}

/// The notes: for people. `containers` are those that the pod has so far.
pub(super) fn description(spec: &SandboxSpec, node: &NodeName, containers: &[String]) -> String {
    notes(
        &Named {
            namespace: &spec.pod_namespace,
            name: &spec.pod_name,
            uid: spec.pod_uid.as_str(),
            attempt: spec.attempt,
            sandbox: spec.id.as_str(),
        },
        node,
        containers,
    )
}

/// Who a CT is for.
#[derive(Debug)]
pub(super) struct Named<'a> {
    pub(super) namespace: &'a str,
    pub(super) name: &'a str,
    pub(super) uid: &'a str,
    pub(super) attempt: u32,
    pub(super) sandbox: &'a str,
}

/// The notes of a CT.
pub(super) fn notes(pod: &Named<'_>, node: &NodeName, containers: &[String]) -> String {
    // Markdown in the web interface: nothing in a name may begin something there.
    let plain =
        |s: &str| s.chars().filter(|c| !c.is_control() && !"`<>".contains(*c)).take(300).collect::<String>();
    let (namespace, name) = (plain(pod.namespace), plain(pod.name));
    let mut text = format!(
        "**Pod {namespace}/{name}**, made by Moxlet; delete the pod, not this container.\n\n\
         - namespace: `{namespace}`\n- name: `{name}`\n- UID: `{}`\n- attempt: {}\n- sandbox: `{}`\n- node: `{node}`\n",
        pod.uid, pod.attempt, pod.sandbox
    );
    if !containers.is_empty() {
        let names: Vec<String> = containers.iter().take(64).map(|c| format!("`{}`", plain(c))).collect();
        let _ = writeln!(text, "- containers: {}", names.join(", "));
    }
    text
}

fn tags(spec: &SandboxSpec) -> Result<Vec<moxlet_pve::Tag>> {
    let namespace = format!("ns-{}", spec.pod_namespace);
    [TAG, &namespace].into_iter().map(|tag| property("tag", tag)).collect()
}

fn arch() -> Option<Arch> {
    match std::env::consts::ARCH {
        "aarch64" => Some(Arch::Arm64),
        "riscv64" => Some(Arch::Riscv64),
        _ => Some(Arch::Amd64),
    }
}

/// LXC splits the command at blanks.
fn entrypoint(args: &[String]) -> Result<String> {
    check_args(args)?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:@%+".contains(c);
    let mut text = INIT_IN_CT.to_owned();
    for arg in args {
        if arg.is_empty() || !arg.chars().all(plain) {
            return Err(invalid("init argument", arg, "it is empty or has a blank, a quote or the like"));
        }
        text.push(' ');
        text.push_str(arg);
    }
    Ok(text)
}

/// The share of the host's time in cores, if it is bounded.
fn cpulimit(limits: &Limits) -> Option<f64> {
    let quota = limits.cpu_quota_us.filter(|q| *q > 0)?;
    let period = limits.cpu_period_us.filter(|p| *p > 0).unwrap_or(DEFAULT_PERIOD_US);
    #[allow(clippy::cast_precision_loss)]
    let cores = quota as f64 / period as f64;
    // 8192 is the most that Proxmox VE takes; more than any host has is no limit.
    Some(((cores * CPU_STEP).round().max(1.0) / CPU_STEP).min(8192.0))
}

fn cpuunits(limits: &Limits) -> Option<u32> {
    let shares = limits.cpu_shares.filter(|s| *s > 0)?;
    Some(u32::try_from(weight_of_shares(shares)).unwrap_or(10_000))
}

/// Puts changed limits in place of the old ones; what is `None` stays. Whether anything is different now.
pub(super) fn resize(config: &mut LxcConfig, limits: &Limits, all: u64, cores: u32) -> bool {
    let before = (config.memory, config.cpulimit, config.cores, config.cpuunits);
    if limits.memory_bytes.is_some() {
        config.memory = Some(memory::mib(limits.memory_bytes, all));
    }
    if limits.cpu_quota_us.is_some() {
        config.cpulimit = cpulimit(limits);
        config.cores = config.cpulimit.map(|limit| whole_cores(limit).min(cores.max(1)));
    }
    if let Some(units) = cpuunits(limits) {
        config.cpuunits = Some(units);
    }
    before != (config.memory, config.cpulimit, config.cores, config.cpuunits)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn whole_cores(limit: f64) -> u32 {
    limit.ceil().clamp(1.0, 8192.0) as u32
}

fn down_seconds(spec: &SandboxSpec) -> u32 {
    let seconds = spec.stop_grace.as_secs().saturating_add(BEYOND_GRACE);
    u32::try_from(seconds).unwrap_or(u32::MAX)
}

fn interface(spec: &SandboxSpec, nic: &Nic, number: u16) -> Result<NetInterface> {
    let mac = nic.mac.map_or_else(|| mac_of(spec, number), Ok)?;
    if nic.mtu.is_some_and(|mtu| mtu < 64) {
        return Err(invalid("MTU", &nic.mtu.unwrap_or(0).to_string(), "it is below 64"));
    }
    let (ip, gw) = address(nic.ipv4.as_ref());
    let (ip6, gw6) = address(nic.ipv6.as_ref());
    Ok(NetInterface {
        bridge: Some(property("bridge", &nic.bridge)?),
        firewall: nic.firewall.then_some(true),
        gw,
        gw6,
        // With `ostype: unmanaged` nobody else sets address and gateway.
        host_managed: Some(true),
        hwaddr: Some(mac),
        ip,
        ip6,
        mtu: nic.mtu,
        tag: nic.vlan,
        kind: Some(property("kind", "veth")?),
        ..NetInterface::new(property("interface", &nic.name)?)
    })
}

fn address<A: Copy>(given: Option<&NicAddress<A>>) -> (Option<IpConfig<A>>, Option<A>) {
    match given {
        None => (None, None),
        Some(NicAddress::Dhcp) => (Some(IpConfig::Dhcp), None),
        Some(NicAddress::Static { address, prefix, gateway }) => {
            (Some(IpConfig::Static { address: *address, prefix: *prefix }), *gateway)
        }
    }
}

/// A locally administered address that the same sandbox always gets.
fn mac_of(spec: &SandboxSpec, number: u16) -> Result<MacAddr> {
    let hash = Sha256::new().chain_update(spec.id.as_str()).chain_update(number.to_be_bytes()).finalize();
    let mut bytes = [0x02; 6];
    for (to, from) in bytes.iter_mut().skip(1).zip(hash.iter()) {
        *to = *from;
    }
    MacAddr::new(bytes).ok_or_else(|| Error::Host("a MAC address was a group's".into()))
}

/// Where the parts of the engine lie.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    /// Records of the CTs, one file each.
    pub(super) records: PathBuf,
    /// Included files.
    pub(super) includes: PathBuf,
    /// The guard: an empty directory.
    pub(super) guard: PathBuf,
}

impl Layout {
    pub(super) fn below(dir: &Path) -> Self {
        Self { records: dir.join("ct"), includes: dir.join("include"), guard: dir.join("guard") }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::{
        collections::BTreeMap,
        net::{Ipv4Addr, Ipv6Addr},
        time::Duration,
    };

    use proptest::{option, prelude::*};

    use super::*;

    pub(in crate::pve) fn spec() -> SandboxSpec {
        SandboxSpec {
            id: "ab".parse().unwrap(),
            pod_namespace: "default".into(),
            pod_name: "web-0".into(),
            pod_uid: "u-1".parse().unwrap(),
            attempt: 0,
            hostname: "web-0".into(),
            map: IdMap::default(),
            shared_dir: "/var/lib/moxlet/pods/ab".into(),
            init_binary: "/var/lib/moxlet/init/0/moxlet-init".into(),
            init_args: vec!["--grace".into(), "30".into()],
            limits: Limits {
                memory_bytes: Some(100 << 20),
                cpu_quota_us: Some(150_000),
                cpu_period_us: None,
                cpu_shares: Some(512),
                pids: Some(100),
            },
            sysctls: BTreeMap::from([("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())]),
            stop_grace: Duration::from_secs(30),
            nics: vec![Nic {
                name: "eth0".into(),
                bridge: "vmbr0".into(),
                mac: None,
                ipv4: Some(NicAddress::Static {
                    address: Ipv4Addr::new(10, 0, 0, 5),
                    prefix: 24,
                    gateway: Some(Ipv4Addr::new(10, 0, 0, 1)),
                }),
                ipv6: None,
                mtu: Some(1400),
                vlan: Some(7),
                firewall: false,
            }],
        }
    }

    fn number() -> Vmid {
        Vmid::new(1_000_000).unwrap()
    }

    fn with(check: impl FnOnce(&Surroundings<'_>)) {
        let (node, storage) = ("pve1".parse().unwrap(), "local-zfs".parse().unwrap());
        check(&Surroundings {
            node: &node,
            storage: &storage,
            volume: "subvol-1000000-disk-0",
            root_bytes: 64 << 20,
            include: Path::new("/var/lib/moxlet/pve/include/1000000-u-1.conf"),
            guard: Path::new("/var/lib/moxlet/pve/guard"),
            memory_bytes: 8 << 30,
            cores: 4,
            protection: false,
        });
    }

    #[test]
    fn a_pod_becomes_the_configuration_that_an_administrator_expects() {
        with(|around| {
            let text = render(&spec(), around).unwrap().to_file().unwrap();
            let (notes, keys): (Vec<&str>, Vec<&str>) = text.lines().partition(|l| l.starts_with('#'));
            let mac = text.split("hwaddr=").nth(1).unwrap().split(',').next().unwrap();
            assert!(mac.starts_with("02:"), "{mac}");
            assert_eq!(
                keys.join("\n"),
                format!(
                    "arch: amd64\ncmode: console\nconsole: 1\ncores: 2\ncpulimit: 1.5\ncpuunits: 20\n\
                     entrypoint: /sbin/moxlet-init --grace 30\nfeatures: nesting=1\nhostname: web-0\nmemory: 101\n\
                     mp0: /var/lib/moxlet/pve/guard,mp=/run/moxlet-guard,ro=1\n\
                     net0: name=eth0,bridge=vmbr0,gw=10.0.0.1,host-managed=1,hwaddr={mac},ip=10.0.0.5/24,mtu=1400,tag=7,type=veth\n\
                     onboot: 0\nostype: unmanaged\nrootfs: local-zfs:subvol-1000000-disk-0,size=64M\nstartup: down=40\nswap: 0\n\
                     tags: moxlet;ns-default\nunprivileged: 1\nlxc.include: /var/lib/moxlet/pve/include/1000000-u-1.conf"
                )
            );
            let notes = notes.join("\n");
            for word in ["default/web-0", "u-1", "pve1"] {
                assert!(notes.contains(word), "{notes}");
            }
            assert_eq!(render(&spec(), around).unwrap(), render(&spec(), around).unwrap());
        });
    }

    #[test]
    fn what_is_not_proxmox_ves_business_is_in_the_included_file() {
        let text = include_text(&spec(), number()).unwrap();
        assert!(text.contains("lxc.signal.halt = SIGTERM\n"));
        let hook = "lxc.hook.pre-start = '/var/lib/moxlet/init/0/moxlet-init' check-ct 1000000\n";
        assert!(text.contains(hook), "{text}");
        // No value: whatever hooks of this kind there are go.
        assert!(text.contains("lxc.hook.mount = \n"), "{text}");
        assert!(text.contains("/var/lib/moxlet/pods/ab run/moxlet/pod none rbind,rslave,create=dir 0 0\n"));
        assert!(text.contains(" sbin/moxlet-init none bind,ro 0 0\n"));
        assert!(text.contains("lxc.sysctl.net.ipv4.ip_unprivileged_port_start = 0\n"));
        assert!(text.contains("lxc.cgroup2.pids.max = 100\n"));
    }

    #[test]
    fn memory_is_always_written_and_high_enough() {
        assert_eq!(memory::mib(None, 8 << 30), 8192);
        assert_eq!(memory::mib(Some(1), 8 << 30), 16);
        assert_eq!(memory::mib(Some(100 << 20), 8 << 30), 101);
    }

    #[test]
    fn another_id_map_is_written_and_the_usual_one_is_left_to_proxmox_ve() {
        with(|around| {
            let mut other = spec();
            other.map = IdMap { host_base: 200_000, size: 65_536 };
            let text = render(&other, around).unwrap().to_file().unwrap();
            assert!(text.contains("lxc.idmap: u 0 200000 65536\nlxc.idmap: g 0 200000 65536\n"));
        });
    }

    #[test]
    fn dhcp_has_neither_address_nor_gateway() {
        with(|around| {
            let mut dhcp = spec();
            dhcp.nics[0].ipv4 = Some(NicAddress::Dhcp);
            dhcp.nics[0].ipv6 =
                Some(NicAddress::Static { address: Ipv6Addr::LOCALHOST, prefix: 64, gateway: None });
            let text = render(&dhcp, around).unwrap().to_file().unwrap();
            assert!(text.contains(",ip=dhcp,ip6=::1/64,") && !text.contains("gw="), "{text}");
        });
    }

    #[test]
    fn what_could_become_another_word_or_line_is_refused_by_name() {
        with(|around| {
            let refused = |change: &dyn Fn(&mut SandboxSpec), word: &str| {
                let mut bad = spec();
                change(&mut bad);
                let error =
                    render(&bad, around).and_then(|_| include_text(&bad, number())).unwrap_err().to_string();
                assert!(error.contains(word), "{error}");
            };
            refused(&|s| s.hostname = "-a".into(), "hostname");
            refused(&|s| s.hostname = "a\nb".into(), "hostname");
            refused(&|s| s.init_args = vec!["a b".into()], "init argument");
            refused(&|s| s.nics[0].bridge = "vmbr0,tag=1".into(), "bridge");
            refused(&|s| s.pod_namespace = "a;b".into(), "tag");
            refused(&|s| s.shared_dir = "/a\nb".into(), "shared directory");
            refused(&|s| s.init_binary = "/a'; b '".into(), "init binary");
            refused(&|s| s.nics = vec![s.nics[0].clone(); 33], "interfaces");
        });
    }

    proptest! {
        #[test]
        fn memory_high_is_never_below_the_limit(limit in 1u64..1 << 50) {
            let mib = memory::mib(Some(limit), 0);
            prop_assert!(memory::high(mib) >= limit, "{} {}", mib, limit);
        }

        #[test]
        fn every_configuration_is_read_back_as_it_was_written(
            name in "[a-z]([a-z0-9-]{0,20}[a-z0-9])?",
            memory in option::of(1u64..1 << 45),
            quota in option::of(-1i64..100_000_000),
            period in option::of(1000u64..1_000_000),
            shares in option::of(0u64..300_000),
            pod in "\\PC{0,40}",
        ) {
            with(|around| {
                let mut any = spec();
                any.hostname.clone_from(&name);
                any.pod_name.clone_from(&pod);
                any.limits = Limits { memory_bytes: memory, cpu_quota_us: quota, cpu_period_us: period, cpu_shares: shares, pids: None };
                let config = render(&any, around).unwrap();
                let text = config.to_file().unwrap();
                let read = LxcConfig::from_file(&text).unwrap();
                assert!(read.sections.is_empty() && read.config.unknown.is_empty(), "{text}");
                assert_eq!(read.config.pairs(), config.pairs());
                assert_eq!(text.lines().filter(|l| l.starts_with("lxc.")).count(), 1);
            });
        }
    }
}
