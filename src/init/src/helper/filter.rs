//! A container's seccomp filter for exec. libseccomp takes some 10 ms to compile a usual profile, several times what all the
//! rest of an exec takes: it is done once a container and kept as BPF in its bundle. Says the same as libcontainer's, which
//! the container itself was started under.

use std::{
    fs::{self, File},
    io::{self, Read, Seek},
    path::Path,
};

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall, error::SeccompError,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};

/// The kernel's own bound of a filter's length in instructions.
const MAX_INSTRUCTIONS: usize = 4096;
const INSTRUCTION: usize = size_of::<libc::sock_filter>();

/// A filter as the kernel takes it.
pub(super) struct Filter {
    program: Vec<u8>,
    flags: libc::c_ulong,
}

impl Filter {
    /// From the bundle, or compiled and put there.
    pub(super) fn of(bundle: &Path, profile: &LinuxSeccomp) -> Result<Self, String> {
        let kept = bundle.join("filter.bpf");
        let program = match fs::read(&kept) {
            Ok(program) => program,
            Err(_) => {
                let draft = bundle.join(format!("filter.{}", std::process::id()));
                let program = compile(profile, &draft)?;
                // Another exec may do the same just now: either file is whole.
                let _ = fs::rename(&draft, &kept);
                program
            }
        };
        if program.is_empty()
            || program.len() % INSTRUCTION != 0
            || program.len() / INSTRUCTION > MAX_INSTRUCTIONS
        {
            return Err(format!("seccomp filter: {} bytes are no program", program.len()));
        }
        let mut flags = 0;
        for flag in profile.flags().iter().flatten() {
            flags |= match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
                // The process has one thread, and no listener.
                LinuxSeccompFilterFlag::SeccompFilterFlagTsync
                | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
            };
        }
        Ok(Self { program, flags })
    }

    /// Puts this process under the filter.
    pub(super) fn load(&self) -> io::Result<()> {
        let instructions: Vec<libc::sock_filter> = self
            .program
            .chunks_exact(INSTRUCTION)
            // SAFETY: any eight bytes are an instruction; the kernel checks the program.
            .map(|bytes| unsafe { bytes.as_ptr().cast::<libc::sock_filter>().read_unaligned() })
            .collect();
        let length =
            u16::try_from(instructions.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        let program = libc::sock_fprog { len: length, filter: instructions.as_ptr().cast_mut() };
        // SAFETY: the program points to as many instructions as it says.
        match unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, self.flags, &raw const program)
        } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn compile(profile: &LinuxSeccomp, draft: &Path) -> Result<Vec<u8>, String> {
    let context = context(profile).map_err(|e| format!("seccomp filter: {e}"))?;
    let mut program = Vec::new();
    let write = || -> io::Result<File> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(draft)?;
        context.export_bpf(&file).map_err(io::Error::other)?;
        Ok(file)
    };
    write()
        .and_then(|mut file| {
            file.rewind()?;
            file.take((MAX_INSTRUCTIONS * INSTRUCTION) as u64 + 1).read_to_end(&mut program)
        })
        .map_err(|e| format!("seccomp filter: {e}"))?;
    Ok(program)
}

fn context(profile: &LinuxSeccomp) -> Result<ScmpFilterContext, SeccompError> {
    let default = action(profile.default_action(), profile.default_errno_ret());
    let mut context = ScmpFilterContext::new(default)?;
    for arch in profile.architectures().iter().flatten() {
        context.add_arch(architecture(*arch))?;
    }
    for rule in profile.syscalls().iter().flatten() {
        let wanted = action(rule.action(), rule.errno_ret());
        if wanted == default {
            continue;
        }
        let comparisons: Vec<_> = rule.args().iter().flatten().map(comparison).collect();
        let indices: Vec<_> = rule.args().iter().flatten().map(LinuxSeccompArg::index).collect();
        let repeated = indices.iter().enumerate().any(|(at, index)| indices[..at].contains(index));
        for name in rule.names() {
            // Not known to this libseccomp: then the default action holds.
            let Ok(call) = ScmpSyscall::from_name(name) else { continue };
            if repeated {
                // One argument can be compared once a rule; as runc, each comparison is a rule then.
                for one in &comparisons {
                    context.add_rule_conditional(wanted, call, std::slice::from_ref(one))?;
                }
            } else {
                context.add_rule_conditional(wanted, call, &comparisons)?;
            }
        }
    }
    Ok(context)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> ScmpAction {
    let errno = errno.and_then(|e| i32::try_from(e).ok()).unwrap_or(libc::EPERM);
    match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(u16::try_from(errno).unwrap_or(1)),
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActNotify => ScmpAction::Notify,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
    }
}

fn comparison(arg: &LinuxSeccompArg) -> ScmpArgCompare {
    let operator = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => ScmpCompareOp::NotEqual,
        LinuxSeccompOperator::ScmpCmpLt => ScmpCompareOp::Less,
        LinuxSeccompOperator::ScmpCmpLe => ScmpCompareOp::LessOrEqual,
        LinuxSeccompOperator::ScmpCmpEq => ScmpCompareOp::Equal,
        LinuxSeccompOperator::ScmpCmpGe => ScmpCompareOp::GreaterEqual,
        LinuxSeccompOperator::ScmpCmpGt => ScmpCompareOp::Greater,
        // As libcontainer reads it, for which `spec::prepare` has exchanged the two values.
        LinuxSeccompOperator::ScmpCmpMaskedEq => ScmpCompareOp::MaskedEqual(arg.value_two().unwrap_or(0)),
    };
    ScmpArgCompare::new(u32::try_from(arg.index()).unwrap_or(u32::MAX), operator, arg.value())
}

fn architecture(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}
