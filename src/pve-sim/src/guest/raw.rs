//! Which raw `lxc.*` keys a CT's config may carry: the list of PVE::LXC::Config. All others vanish at the next API write.

/// Keys that are taken with every value.
const EXACT: &[&str] = &[
    "lxc.apparmor.profile",
    "lxc.apparmor.allow_incomplete",
    "lxc.apparmor.allow_nesting",
    "lxc.apparmor.raw",
    "lxc.selinux.context",
    "lxc.include",
    "lxc.arch",
    "lxc.uts.name",
    "lxc.signal.halt",
    "lxc.signal.reboot",
    "lxc.signal.stop",
    "lxc.init.cmd",
    "lxc.init.cwd",
    "lxc.init.uid",
    "lxc.init.gid",
    "lxc.init.groups",
    "lxc.pty.max",
    "lxc.console.logfile",
    "lxc.console.path",
    "lxc.tty.max",
    "lxc.devtty.dir",
    "lxc.hook.autodev",
    "lxc.autodev",
    "lxc.kmsg",
    "lxc.mount.fstab",
    "lxc.mount.entry",
    "lxc.mount.auto",
    "lxc.rootfs.mount",
    "lxc.cap.drop",
    "lxc.cap.keep",
    "lxc.seccomp.profile",
    "lxc.seccomp.notify.proxy",
    "lxc.seccomp.notify.cookie",
    "lxc.idmap",
    "lxc.hook.pre-start",
    "lxc.hook.pre-mount",
    "lxc.hook.mount",
    "lxc.hook.start",
    "lxc.hook.stop",
    "lxc.hook.post-stop",
    "lxc.hook.clone",
    "lxc.hook.destroy",
    "lxc.hook.version",
    "lxc.log.level",
    "lxc.log.file",
    "lxc.start.auto",
    "lxc.start.delay",
    "lxc.start.order",
    "lxc.group",
    "lxc.environment",
    "lxc.environment.runtime",
    "lxc.environment.hooks",
    "lxc.sysctl.fs.mqueue",
    "lxc.sysctl.kernel.msgmax",
    "lxc.sysctl.kernel.msgmnb",
    "lxc.sysctl.kernel.msgmni",
    "lxc.sysctl.kernel.sem",
    "lxc.sysctl.kernel.shmall",
    "lxc.sysctl.kernel.shmmax",
    "lxc.sysctl.kernel.shmmni",
    "lxc.sysctl.kernel.shm_rmid_forced",
];

/// Names of before LXC 3.0, which it warns of and keeps.
const DEPRECATED: &[&str] = &[
    "lxc.aa_profile",
    "lxc.aa_allow_incomplete",
    "lxc.console",
    "lxc.devttydir",
    "lxc.haltsignal",
    "lxc.rebootsignal",
    "lxc.stopsignal",
    "lxc.id_map",
    "lxc.init_cmd",
    "lxc.loglevel",
    "lxc.logfile",
    "lxc.mount",
    "lxc.network.type",
    "lxc.network.flags",
    "lxc.network.link",
    "lxc.network.mtu",
    "lxc.network.name",
    "lxc.network.hwaddr",
    "lxc.network.ipv4",
    "lxc.network.ipv4.gateway",
    "lxc.network.ipv6",
    "lxc.network.ipv6.gateway",
    "lxc.network.script.up",
    "lxc.network.script.down",
    "lxc.pts",
    "lxc.se_context",
    "lxc.seccomp",
    "lxc.tty",
    "lxc.utsname",
];

/// Groups of keys.
const PREFIXES: &[&str] = &["lxc.limit.", "lxc.cgroup.", "lxc.cgroup2.", "lxc.prlimit.", "lxc.net."];

/// Key and value of a raw line: `key: value` or `key = value`. The value may be empty, and only the equals sign may have
/// blanks before it.
pub(super) fn line(line: &str) -> Option<(&str, &str)> {
    let (before, value) = line.split_at_checked(line.find([':', '='])?)?;
    let key = if value.starts_with('=') { before.trim_end() } else { before };
    let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-.".contains(&b);
    let well = key.strip_prefix("lxc.").is_some_and(|rest| !rest.is_empty() && rest.bytes().all(ok));
    well.then_some((key, value.get(1..)?.trim()))
}

/// Whether Proxmox VE keeps a raw key.
pub(super) fn is_allowed(key: &str) -> bool {
    EXACT.contains(&key) || DEPRECATED.contains(&key) || PREFIXES.iter().any(|p| key.starts_with(p))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_ephemeral_rootfs_net_sysctls_and_proc_are_not_kept() {
        for key in
            ["lxc.idmap", "lxc.include", "lxc.cgroup2.cpuset.cpus", "lxc.prlimit.nofile", "lxc.hook.mount"]
        {
            assert!(is_allowed(key), "{key}");
        }
        let not = [
            "lxc.namespace.clone",
            "lxc.ephemeral",
            "lxc.rootfs.path",
            "lxc.sysctl.net.core.somaxconn",
            "lxc.proc.oom_score_adj",
        ];
        for key in not {
            assert!(!is_allowed(key), "{key}");
        }
    }
}
