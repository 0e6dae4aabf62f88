//! The seccomp profile `RuntimeDefault`: what containerd's default allows, as an OCI profile for these capabilities.

use serde_json::{Value, json};

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

/// The profile for a container with these capabilities (with `CAP_`) on this machine.
pub(super) fn runtime_default(capabilities: &[String]) -> Value {
    let has = |name: &str| capabilities.iter().any(|c| c == name);
    let arg = |index: u32, op: &str, value: u64, two: u64| json!({"index": index, "value": value, "valueTwo": two, "op": op});
    let allow = |names: &[&str], args: &[Value]| {
        let mut rule = json!({"names": names, "action": "SCMP_ACT_ALLOW"});
        if !args.is_empty() {
            rule["args"] = json!(args);
        }
        rule
    };
    let mut names: Vec<&str> = ALLOWED.split_whitespace().collect();
    for (capability, calls) in WITH_CAPABILITY {
        if has(capability) {
            names.extend(*calls);
        }
    }
    let architectures = match std::env::consts::ARCH {
        "x86_64" => {
            names.extend(["arch_prctl", "modify_ldt"]);
            json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"])
        }
        "aarch64" => {
            names.extend([
                "arm_fadvise64_64",
                "arm_sync_file_range",
                "sync_file_range2",
                "breakpoint",
                "cacheflush",
            ]);
            names.push("set_tls");
            json!(["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"])
        }
        "riscv64" => {
            names.push("riscv_flush_icache");
            json!(["SCMP_ARCH_RISCV64"])
        }
        _ => json!(["SCMP_ARCH_NATIVE"]),
    };
    names.sort_unstable();
    names.dedup();
    let mut rules = vec![allow(&names, &[])];
    for value in PERSONALITIES {
        rules.push(allow(&["personality"], &[arg(0, "SCMP_CMP_EQ", value, 0)]));
    }
    rules.push(allow(&["socket"], &[arg(0, "SCMP_CMP_LT", AF_ALG, 0)]));
    rules.push(allow(&["socket"], &[arg(0, "SCMP_CMP_EQ", AF_ALG + 1, 0)]));
    rules.push(allow(&["socket"], &[arg(0, "SCMP_CMP_GT", AF_VSOCK, 0)]));
    if !has("CAP_SYS_ADMIN") {
        rules.push(allow(&["clone"], &[arg(0, "SCMP_CMP_MASKED_EQ", NEW_NAMESPACES, 0)]));
        // The C library falls back to clone, whose flags a filter can see.
        rules.push(json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS}));
    }
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": architectures,
        "syscalls": rules,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn allowed(profile: &Value, call: &str) -> bool {
        let names = profile["syscalls"][0]["names"].as_array().unwrap();
        names.iter().any(|n| n == call)
    }

    #[test]
    fn it_is_an_oci_profile_and_capabilities_widen_it() {
        let plain = runtime_default(&[]);
        let _: oci_spec::runtime::LinuxSeccomp = serde_json::from_value(plain.clone()).unwrap();
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
        let admin = runtime_default(&["CAP_SYS_ADMIN".to_owned(), "CAP_SYS_CHROOT".to_owned()]);
        for call in ["mount", "unshare", "clone", "clone3", "chroot"] {
            assert!(allowed(&admin, call), "{call}");
        }
        assert!(!admin.to_string().contains("ERRNO\",\"errnoRet"));
    }
}
