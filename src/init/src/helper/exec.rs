//! `moxlet-init exec CONTROL BUNDLE PID`: another command in a container. libcontainer's own exec sets no seccomp filter, so
//! this is done here, in runc's order: cgroup, namespaces, fork into the PID namespace, terminal, limits, user, capabilities,
//! filter, command.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
};

use libcontainer::{apparmor, capabilities, syscall::syscall::create_syscall};
use moxlet_init_proto::ExecRequest;
use oci_spec::runtime::{LinuxCapabilities, Process, Spec};
use rustix::{
    process::{Pid, PidfdFlags, pidfd_open},
    termios::{Winsize, tcsetwinsize},
};

use super::{Control, Note, command, filter::Filter, own};

/// Whose fault it is: the command's (a StartError) or ours.
enum Failure {
    Start(String),
    Internal(String),
}

fn internal(what: &str) -> impl FnOnce(io::Error) -> Failure + '_ {
    move |e| Failure::Internal(format!("{what}: {e}"))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The role's main function.
pub(crate) fn main(mut args: impl Iterator<Item = String>) -> ExitCode {
    let Some(control) = Control::from_arg(args.next()) else { return ExitCode::FAILURE };
    crate::sys::reset_signals();
    let (Some(bundle), Some(pid)) =
        (args.next().map(PathBuf::from), args.next().and_then(|p| p.parse().ok()))
    else {
        control.fail("the exec helper lacks arguments", false);
        return ExitCode::FAILURE;
    };
    match run(control, &bundle, pid) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            report(control, failure);
            ExitCode::FAILURE
        }
    }
}

fn report(control: Control, failure: Failure) {
    match failure {
        Failure::Start(message) => control.fail(message, true),
        Failure::Internal(message) => control.fail(message, false),
    }
}

fn run(control: Control, bundle: &Path, pid: i32) -> Result<(), Failure> {
    let request: ExecRequest = control.receive().map_err(|e| Failure::Internal(e.to_string()))?;
    let spec = Spec::load(bundle.join("config.json"))
        .map_err(|e| Failure::Internal(format!("the container's spec: {e}")))?;
    let target = Pid::from_raw(pid).ok_or_else(|| Failure::Internal("no PID".into()))?;
    let pidfd =
        pidfd_open(target, PidfdFlags::empty()).map_err(|e| internal("the container's process")(e.into()))?;
    let profile = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
    let filter = profile.map(|p| Filter::of(bundle, p)).transpose().map_err(Failure::Internal)?;
    crate::cgroup::join(pid).map_err(internal("joining the container's cgroup"))?;
    // As killable as the container: raising is always allowed, lowering is not and not needed.
    if let Ok(score) = fs::read(format!("/proc/{pid}/oom_score_adj")) {
        let _ = fs::write("/proc/self/oom_score_adj", score);
    }
    // Nothing in the container may look into this process.
    // SAFETY: a plain call.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) };
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    // SAFETY: a valid descriptor.
    check(unsafe { libc::setns(pidfd.as_raw_fd(), namespaces) })
        .map_err(internal("entering the container"))?;
    drop(pidfd);
    // SAFETY: this process has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(internal("fork")(io::Error::last_os_error())),
        0 => {
            let failure = match enter(control, &request, &spec, filter.as_ref()) {
                Ok(reason) => Failure::Start(reason),
                Err(failure) => failure,
            };
            report(control, failure);
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(127) }
        }
        child => {
            control.note(&Note::Pid(u32::try_from(child).unwrap_or_default()), &[]);
            Ok(())
        }
    }
}

/// In the container, as its root: becomes the command. Returns why it could not be executed.
fn enter(
    control: Control,
    request: &ExecRequest,
    spec: &Spec,
    filter: Option<&Filter>,
) -> Result<String, Failure> {
    let process =
        spec.process().as_ref().ok_or_else(|| Failure::Internal("the spec has no process".into()))?;
    // SAFETY: a plain call.
    check(unsafe { libc::setsid() }).map_err(internal("setsid"))?;
    if request.tty {
        terminal(control, request, process).map_err(internal("making a terminal"))?;
    }
    limits(process)?;
    if let Some(profile) = process.apparmor_profile()
        && apparmor::is_enabled().unwrap_or(false)
    {
        apparmor::apply_profile(profile)
            .map_err(|e| Failure::Internal(format!("AppArmor profile {profile}: {e}")))?;
    }
    // SAFETY: a plain call.
    unsafe { libc::umask(process.user().umask().unwrap_or(0o022)) };
    let no_new_privileges = process.no_new_privileges().unwrap_or(false);
    if no_new_privileges {
        // SAFETY: a plain call.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
            .map_err(internal("no_new_privs"))?;
    } else {
        // Without no_new_privs a filter needs CAP_SYS_ADMIN, which goes next.
        set_filter(filter)?;
    }
    let cwd = request.cwd.as_ref().map_or_else(|| process.cwd().clone(), PathBuf::from);
    let early = std::env::set_current_dir(&cwd);
    become_user(process)?;
    set_capabilities(process.capabilities().as_ref())?;
    if early.is_err() {
        std::env::set_current_dir(&cwd).map_err(|e| {
            Failure::Start(format!("chdir to cwd ({:?}) set in config.json failed: {}", cwd, plain(&e)))
        })?;
    }
    let mut env = command::environment(process.env().as_ref().map_or(&[], Vec::as_slice));
    env.extend(request.env.iter().map(|(k, v)| (k.clone(), v.clone())));
    if request.tty {
        env.entry("TERM".into()).or_insert_with(|| "xterm".into());
    }
    if !env.contains_key("HOME") {
        env.insert("HOME".into(), command::home(process.user().uid()));
    }
    if no_new_privileges {
        set_filter(filter)?;
    }
    Ok(command::execute(&request.args, &env))
}

fn plain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT) => "no such file or directory".into(),
        Some(libc::EACCES | libc::EPERM) => "permission denied".into(),
        Some(libc::ENOTDIR) => "not a directory".into(),
        _ => error.to_string(),
    }
}

/// A terminal of the container's own devpts; its master goes to PID 1.
fn terminal(control: Control, request: &ExecRequest, process: &Process) -> io::Result<()> {
    // SAFETY: a valid string; the result is checked.
    let master = unsafe {
        own(libc::open(c"/dev/pts/ptmx".as_ptr(), libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC))
    }?;
    let unlocked: libc::c_int = 0;
    // SAFETY: the request takes a pointer to an int.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) })?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the request takes open flags and returns a descriptor.
    let slave: OwnedFd = unsafe { own(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags)) }?;
    if request.width > 0 && request.height > 0 {
        tcsetwinsize(
            &master,
            Winsize { ws_row: request.height, ws_col: request.width, ws_xpixel: 0, ws_ypixel: 0 },
        )?;
    }
    // As runc: the user owns its terminal, the group stays.
    // SAFETY: a valid descriptor.
    let _ = unsafe { libc::fchown(slave.as_raw_fd(), process.user().uid(), u32::MAX) };
    // SAFETY: a valid descriptor.
    check(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) })?;
    for standard in 0..3 {
        // SAFETY: a valid descriptor; the standard streams are this process's own.
        check(unsafe { libc::dup2(slave.as_raw_fd(), standard) })?;
    }
    control.note(&Note::Terminal, &[master.as_fd()]);
    Ok(())
}

fn limits(process: &Process) -> Result<(), Failure> {
    let syscall = create_syscall();
    for limit in process.rlimits().iter().flatten() {
        syscall
            .set_rlimit(limit)
            .map_err(|e| Failure::Internal(format!("resource limit {:?}: {e}", limit.typ())))?;
    }
    Ok(())
}

fn become_user(process: &Process) -> Result<(), Failure> {
    let user = process.user();
    let groups = user.additional_gids().clone().unwrap_or_default();
    // SAFETY: plain calls; the array is valid for its length. KEEPCAPS: what stays permitted is decided next.
    unsafe {
        check(libc::setgroups(groups.len(), groups.as_ptr())).map_err(internal("setgroups"))?;
        check(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0)).map_err(internal("keeping capabilities"))?;
        check(libc::setresgid(user.gid(), user.gid(), user.gid())).map_err(internal("setgid"))?;
        check(libc::setresuid(user.uid(), user.uid(), user.uid())).map_err(internal("setuid"))?;
        check(libc::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0)).map_err(internal("keeping capabilities"))
    }
}

fn set_capabilities(wanted: Option<&LinuxCapabilities>) -> Result<(), Failure> {
    let syscall = create_syscall();
    let failed = |e: libcontainer::syscall::SyscallError| Failure::Internal(format!("capabilities: {e}"));
    capabilities::reset_effective(syscall.as_ref()).map_err(failed)?;
    // A container without a list has all, as in libcontainer.
    wanted.map_or(Ok(()), |caps| capabilities::drop_privileges(caps, syscall.as_ref()).map_err(failed))
}

fn set_filter(filter: Option<&Filter>) -> Result<(), Failure> {
    filter.map_or(Ok(()), |f| f.load().map_err(internal("loading the seccomp filter")))
}
