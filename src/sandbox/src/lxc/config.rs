//! The LXC configuration of a pod's CT as text: pure, so that what gets into it can be tested.

use std::{fmt::Write as _, path::Path};

use crate::{
    Result, SandboxSpec,
    text::{check_args, check_hostname, of_every_ct, plain_path},
};

/// What the configuration depends on beside the spec.
#[derive(Debug)]
pub(super) struct Surroundings<'a> {
    /// The CTs' common root directory.
    pub(super) root: &'a Path,
    /// Where liblxc writes its errors of this CT.
    pub(super) log: &'a Path,
    /// Whether the host has cgroup v1 controllers.
    pub(super) cgroup_v1: bool,
    /// Limits as configuration keys and values.
    pub(super) limits: Vec<(String, String)>,
    /// Whether the CT gets an AppArmor profile.
    pub(super) apparmor: bool,
}

/// The configuration file's text.
pub(super) fn render(spec: &SandboxSpec, around: &Surroundings<'_>) -> Result<String> {
    check_hostname(&spec.hostname)?;
    let one_line = |s: &str| s.chars().filter(|c| !c.is_control()).take(300).collect::<String>();
    let mut text = format!(
        "# Pod {}/{} (UID {}, attempt {}); written by Moxlet, changes are lost.\n",
        one_line(&spec.pod_namespace),
        one_line(&spec.pod_name),
        spec.pod_uid,
        spec.attempt,
    );
    let mut put = |key: &str, value: &str| {
        let _ = writeln!(text, "{key} = {value}");
    };
    put("lxc.uts.name", &spec.hostname);
    put("lxc.rootfs.path", &format!("dir:{}", plain_path("root directory", around.root)?));
    put("lxc.rootfs.options", "ro");
    for kind in ["u", "g"] {
        put("lxc.idmap", &format!("{kind} 0 {} {}", spec.map.host_base, spec.map.size));
    }
    // CNI attaches the pod after the start: only a namespace made by liblxc belongs to the CT's user namespace.
    put("lxc.net.0.type", "empty");
    // Under a cgroup namespace liblxc mounts v1 hierarchies only when forced.
    let cgroup = if around.cgroup_v1 { "cgroup:mixed:force" } else { "cgroup:mixed" };
    put("lxc.autodev", "1");
    put("lxc.tty.max", "0");
    put("lxc.console.path", "none");
    put("lxc.log.level", "ERROR");
    put("lxc.log.file", &plain_path("log file", around.log)?);
    if around.apparmor {
        put("lxc.apparmor.profile", "generated");
        put("lxc.apparmor.allow_nesting", "1");
    }
    for (key, value) in of_every_ct(spec, cgroup)? {
        put(&key, &value);
    }
    for (key, value) in &around.limits {
        put(key, value);
    }
    check_args(&spec.init_args)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use super::*;
    use crate::{IdMap, Limits};

    fn spec() -> SandboxSpec {
        SandboxSpec {
            id: "ab".parse().unwrap(),
            pod_namespace: "default".into(),
            pod_name: "web-0".into(),
            pod_uid: "u-1".parse().unwrap(),
            attempt: 0,
            hostname: "web-0".into(),
            map: IdMap { host_base: 100_000, size: 65536 },
            shared_dir: "/var/lib/moxlet/pods/a b".into(),
            init_binary: "/var/lib/moxlet/init".into(),
            init_args: vec![],
            limits: Limits::default(),
            sysctls: BTreeMap::from([("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())]),
            stop_grace: std::time::Duration::from_secs(30),
            nics: Vec::new(),
        }
    }

    fn around(cgroup_v1: bool) -> Surroundings<'static> {
        Surroundings {
            root: Path::new("/r"),
            log: Path::new("/l"),
            cgroup_v1,
            limits: vec![("lxc.cgroup2.pids.max".into(), "9".into())],
            apparmor: !cgroup_v1,
        }
    }

    #[test]
    fn a_configuration_per_cgroup_version() {
        let v1 = render(&spec(), &around(true)).unwrap();
        assert!(v1.contains("lxc.mount.auto = proc:rw sys:mixed cgroup:mixed:force\n"));
        assert!(v1.contains("lxc.idmap = u 0 100000 65536\nlxc.idmap = g 0 100000 65536\n"));
        assert!(
            v1.contains("= /var/lib/moxlet/pods/a\\040b run/moxlet/pod none rbind,rslave,create=dir 0 0\n")
        );
        assert!(v1.contains("lxc.sysctl.net.ipv4.ip_unprivileged_port_start = 0\n"));
        assert!(!v1.contains("apparmor"));
        let v2 = render(&spec(), &around(false)).unwrap();
        assert!(v2.contains("sys:mixed cgroup:mixed\n"));
        assert!(v2.contains("lxc.apparmor.allow_nesting = 1\n"));
        assert!(v2.contains("lxc.cgroup2.pids.max = 9\n"));
    }

    #[test]
    fn nothing_can_add_a_line() {
        let mut bad = spec();
        bad.hostname = "a\nlxc.idmap = u 0 0 1".into();
        assert!(render(&bad, &around(true)).is_err());
        let mut bad = spec();
        bad.sysctls.insert("net.x".into(), "1\nlxc.hook.start = /x".into());
        assert!(render(&bad, &around(true)).is_err());
        let mut bad = spec();
        bad.shared_dir = "/a\nb".into();
        assert!(render(&bad, &around(true)).is_err());
        let mut odd = spec();
        odd.pod_name = "x\nlxc.hook.start = /x".into();
        let text = render(&odd, &around(true)).unwrap();
        assert!(!text.lines().any(|l| l.starts_with("lxc.hook")));
    }

    #[test]
    fn a_pod_listens_on_low_ports_without_root_unless_it_says_otherwise() {
        let mut plain = spec();
        plain.sysctls = BTreeMap::new();
        let text = render(&plain, &around(true)).unwrap();
        assert!(text.contains("lxc.sysctl.net.ipv4.ip_unprivileged_port_start = 0\n"));
        assert!(text.contains("lxc.sysctl.net.ipv4.ping_group_range = 0 65535\n"));
        plain.sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "1024".into());
        let text = render(&plain, &around(true)).unwrap();
        let found: Vec<_> = text.lines().filter(|l| l.contains("unprivileged_port")).collect();
        assert_eq!(found, ["lxc.sysctl.net.ipv4.ip_unprivileged_port_start = 1024"]);
    }

    #[test]
    fn a_sysctl_of_the_host_is_refused_by_name() {
        let mut bad = spec();
        bad.sysctls = BTreeMap::from([("vm.swappiness".into(), "1".into())]);
        let error = render(&bad, &around(true)).unwrap_err().to_string();
        assert!(error.contains("vm.swappiness"), "{error}");
    }
}
