//! Small wrappers around system calls: time, pipes, wake-ups, children of this same binary.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::Path,
    process::{Command, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
    pipe::{PipeFlags, fcntl_setpipe_size, pipe_with},
};

use crate::error::{Context, Result};

/// Nanoseconds since 1970.
pub(crate) fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// A pipe (read end, write end), larger than usual where the system lets us.
pub(crate) fn pipe(size: usize) -> Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).context("making a pipe")?;
    let _ = fcntl_setpipe_size(&write, size);
    Ok((read, write))
}

/// Gives a pipe to a user: whoever opens it by name (`/dev/stdout`) is asked for rights as with any file.
pub(crate) fn give_to(pipe: &OwnedFd, uid: u32, gid: u32) -> Result<()> {
    let owner = rustix::fs::Uid::from_raw(uid);
    rustix::fs::fchown(pipe, Some(owner), Some(rustix::fs::Gid::from_raw(gid)))
        .context("giving a pipe to its user")
}

/// Something to be woken by.
#[derive(Debug)]
pub(crate) struct Wake(OwnedFd);

impl Wake {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("making an eventfd")?))
    }

    pub(crate) fn wake(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub(crate) fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.0
    }
}

/// Waits until one of the descriptors is ready; `false` after the time is over.
pub(crate) fn wait_ready(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> bool {
    let limit = limit.and_then(|d| Timespec::try_from(d).ok());
    loop {
        match poll(fds, limit.as_ref()) {
            Err(Errno::INTR) => {}
            Ok(n) => return n > 0,
            Err(_) => return false,
        }
    }
}

/// Writes all bytes to a possibly non-blocking descriptor, waiting at most `limit` each time it is full.
pub(crate) fn write_bounded(fd: impl AsFd, mut bytes: &[u8], limit: Duration) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(&fd, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                if !wait_ready(&mut [PollFd::new(&fd, PollFlags::OUT)], Some(limit)) {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Starts this binary again in another role, with a control socket whose number is its first argument.
///
/// The child is not waited for here: the reaper takes it.
pub(crate) fn spawn_self(role: &str, args: &[&Path], stdio: [Stdio; 3]) -> Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair().context("making a control socket")?;
    ours.set_read_timeout(Some(Duration::from_secs(60))).context("control socket")?;
    let number = theirs.as_raw_fd();
    let [stdin, stdout, stderr] = stdio;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("moxlet-init").arg(role).arg(number.to_string()).args(args).env_clear().current_dir("/");
    command.stdin(stdin).stdout(stdout).stderr(stderr);
    // SAFETY: one async-signal-safe call between fork and exec.
    unsafe {
        command.pre_exec(move || match libc::fcntl(number, libc::F_SETFD, 0) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    command.spawn().context(format!("starting the {role} helper"))?;
    Ok(ours)
}

/// What a container must not inherit: ignored signals (the C library's wrapper refuses two of its own) and a signal mask.
pub(crate) fn reset_signals() {
    // The kernel's `struct sigaction` with the default action, which is zero in all fields.
    let default = [0_u64; 4];
    // SAFETY: valid pointers of the size that the kernel reads; nothing else runs in this process.
    unsafe {
        for signal in 1..=64 {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null_mut::<u64>(), 8);
        }
        let mut empty = std::mem::zeroed();
        libc::sigemptyset(&raw mut empty);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const empty, std::ptr::null_mut());
    }
}

/// Sets the loopback interface up: nobody else does in a network namespace that was made empty.
pub(crate) fn loopback_up() -> Result<()> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)
        .context("loopback")?;
    // SAFETY: an all-zero request is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or_default();
    // SAFETY: the request names an interface and its flags.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).context("setting the loopback interface up"),
    }
}

/// One arena and nothing kept: threads here are short-lived and memory counts.
pub(crate) fn frugal_memory() {
    // SAFETY: plain calls.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
    }
}

/// Gives free memory back after something large.
pub(crate) fn trim_memory() {
    // SAFETY: a plain call.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Starts a thread with a small stack.
pub(crate) fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .stack_size(256 << 10)
        .spawn(run)
        .context("starting a thread")?;
    Ok(())
}

/// A poisoned lock is taken all the same: a request that panicked must not stop PID 1.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
