//! Which raw `lxc.*` keys a CT's config may carry: the list of PVE::LXC::Config. All others vanish at the next API write.

/// Keys that are taken with every value.
const EXACT: &[&str] = &[
    "lxc.include",
    "lxc.arch",
    "lxc.apparmor.profile",
    "lxc.apparmor.allow_incomplete",
    "lxc.apparmor.allow_nesting",
    "lxc.apparmor.raw",
    "lxc.selinux.context",
    "lxc.signal.halt",
    "lxc.signal.reboot",
    "lxc.signal.stop",
    "lxc.init.cmd",
    "lxc.init.uid",
    "lxc.init.gid",
    "lxc.init.cwd",
    "lxc.pty.max",
    "lxc.console.logfile",
    "lxc.console.path",
    "lxc.tty.max",
    "lxc.tty.dir",
    "lxc.hook.autodev",
    "lxc.autodev",
    "lxc.autodev.tmpfs.size",
    "lxc.hook.version",
    "lxc.mount.fstab",
    "lxc.mount.entry",
    "lxc.mount.auto",
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
    "lxc.hook.start-host",
    "lxc.log.level",
    "lxc.log.file",
    "lxc.start.auto",
    "lxc.start.delay",
    "lxc.start.order",
    "lxc.group",
    "lxc.environment",
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

/// Groups of keys.
const PREFIXES: &[&str] =
    &["lxc.cgroup.", "lxc.cgroup2.", "lxc.prlimit.", "lxc.net.", "lxc.sysctl.fs.mqueue."];

/// Whether Proxmox VE keeps a raw key.
pub(crate) fn is_allowed(key: &str) -> bool {
    EXACT.contains(&key) || PREFIXES.iter().any(|p| key.len() > p.len() && key.starts_with(p))
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
