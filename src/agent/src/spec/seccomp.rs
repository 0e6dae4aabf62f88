//! The seccomp profile `RuntimeDefault`: what containerd's default allows, as an OCI profile for these capabilities.

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompBuilder,
    LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
};

use super::oci;
use crate::error::Result;

/// Calls that any container may make.
const ALLOWED: &str = include_str!("syscalls.txt");

/// Calls that need a capability anyway: allowed where the container has it.
const WITH_CAPABILITY: &[(&str, &[&str])] = &[
    ("CAP_BPF", &["bpf"]),
    ("CAP_DAC_READ_SEARCH", &["open_by_handle_at"]),
    ("CAP_PERFMON", &["perf_event_open"]),
    (
        "CAP_SYS_ADMIN",
        &[
            "bpf",
            "clone",
            "clone3",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "perf_event_open",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "syslog",
            "umount",
            "umount2",
            "unshare",
        ],
    ),
    ("CAP_SYS_BOOT", &["reboot"]),
    ("CAP_SYS_CHROOT", &["chroot"]),
    ("CAP_SYS_MODULE", &["delete_module", "init_module", "finit_module"]),
    ("CAP_SYS_NICE", &["get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"]),
    ("CAP_SYS_PACCT", &["acct"]),
    ("CAP_SYS_PTRACE", &["kcmp", "pidfd_getfd", "process_madvise"]),
    ("CAP_SYS_RAWIO", &["iopl", "ioperm"]),
    ("CAP_SYS_TIME", &["settimeofday", "stime", "clock_settime", "clock_settime64"]),
    ("CAP_SYS_TTY_CONFIG", &["vhangup"]),
    ("CAP_SYSLOG", &["syslog"]),
];

/// Personalities that do no harm: Linux, 32-bit Linux, each with its `uname26`, and the question for the present one.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];
/// `CLONE_NEW*` without the time namespace, which `clone` cannot make.
const NEW_NAMESPACES: u64 = 0x7e02_0000;
const ENOSYS: u32 = 38;
/// Socket families that know no network namespace: `AF_ALG` reaches into the kernel, `AF_VSOCK` to the hypervisor.
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;

/// A condition on a call's argument.
fn arg(operator: LinuxSeccompOperator, value: u64) -> Result<LinuxSeccompArg> {
    oci(LinuxSeccompArgBuilder::default().index(0_usize).op(operator).value(value).value_two(0_u64).build())
}

/// A rule that allows these calls, under a condition if there is one.
fn allow(names: &[&str], condition: Option<LinuxSeccompArg>) -> Result<LinuxSyscall> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let rule = LinuxSyscallBuilder::default().names(names).action(LinuxSeccompAction::ScmpActAllow);
    oci(match condition {
        Some(condition) => rule.args(vec![condition]).build(),
        None => rule.build(),
    })
}

/// The calls that any container of these capabilities may make on this machine, and the machine's architectures.
fn calls(capabilities: &[String]) -> (Vec<&'static str>, Vec<Arch>) {
    let mut names: Vec<&str> = ALLOWED.split_whitespace().collect();
    for (capability, calls) in WITH_CAPABILITY {
        if capabilities.iter().any(|c| c == capability) {
            names.extend(*calls);
        }
    }
    let architectures = match std::env::consts::ARCH {
        "x86_64" => {
            names.extend(["arch_prctl", "modify_ldt"]);
            vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32]
        }
        "aarch64" => {
            names.extend(["arm_fadvise64_64", "arm_sync_file_range", "sync_file_range2"]);
            names.extend(["breakpoint", "cacheflush", "set_tls"]);
            vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm]
        }
        "riscv64" => {
            names.push("riscv_flush_icache");
            vec![Arch::ScmpArchRiscv64]
        }
        _ => vec![Arch::ScmpArchNative],
    };
    names.sort_unstable();
    names.dedup();
    (names, architectures)
}

/// The profile for a container with these capabilities (with `CAP_`) on this machine.
///
/// # Errors
/// Never in practice: the parts are constants.
pub(super) fn runtime_default(capabilities: &[String]) -> Result<LinuxSeccomp> {
    use LinuxSeccompOperator::{ScmpCmpEq, ScmpCmpGt, ScmpCmpLt, ScmpCmpMaskedEq};
    let (names, architectures) = calls(capabilities);
    let mut rules = vec![allow(&names, None)?];
    for value in PERSONALITIES {
        rules.push(allow(&["personality"], Some(arg(ScmpCmpEq, value)?))?);
    }
    for (operator, family) in [(ScmpCmpLt, AF_ALG), (ScmpCmpEq, AF_ALG + 1), (ScmpCmpGt, AF_VSOCK)] {
        rules.push(allow(&["socket"], Some(arg(operator, family)?))?);
    }
    if !capabilities.iter().any(|c| c == "CAP_SYS_ADMIN") {
        rules.push(allow(&["clone"], Some(arg(ScmpCmpMaskedEq, NEW_NAMESPACES)?))?);
        // The C library falls back to clone, whose flags a filter can see.
        let not_there = LinuxSyscallBuilder::default().names(vec!["clone3".to_owned()]);
        rules.push(oci(not_there.action(LinuxSeccompAction::ScmpActErrno).errno_ret(ENOSYS).build())?);
    }
    oci(LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .default_errno_ret(1_u32)
        .architectures(architectures)
        .syscalls(rules)
        .build())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn allowed(profile: &LinuxSeccomp, call: &str) -> bool {
        profile.syscalls().as_ref().unwrap()[0].names().iter().any(|n| n == call)
    }

    #[test]
    fn it_is_an_oci_profile_and_capabilities_widen_it() {
        let plain = runtime_default(&[]).unwrap();
        for call in [
            "mount",
            "unshare",
            "bpf",
            "keyctl",
            "io_uring_setup",
            "userfaultfd",
            "clone",
            "clone3",
            "chroot",
        ] {
            assert!(!allowed(&plain, call), "{call}");
        }
        for call in ["read", "execve", "openat2", "futex_waitv", "rseq", "ptrace"] {
            assert!(allowed(&plain, call), "{call}");
        }
        let admin = runtime_default(&["CAP_SYS_ADMIN".to_owned(), "CAP_SYS_CHROOT".to_owned()]).unwrap();
        for call in ["mount", "unshare", "clone", "clone3", "chroot"] {
            assert!(allowed(&admin, call), "{call}");
        }
        assert!(admin.syscalls().iter().flatten().all(|rule| rule.errno_ret().is_none()));
    }
}
