//! The pod's containers and what the agent can ask of them.

use std::{
    collections::HashMap,
    fs,
    io::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::OpenOptionsExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use moxlet_init_proto::{
    ContainerState, CreateRequest, Event, ExecRequest, MAX_CONTAINERS, StreamSet, valid_id,
};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::{
    Options, cgroup,
    console::Console,
    container::{Container, Phase, State},
    error::{Context, Error, Result},
    events::Bus,
    execs::{Exec, Execs},
    helper::{Note, Notes},
    log::{LogFile, Stream},
    output::{self, Source},
    reaper::Reaper,
    shell, spec,
    sys::{Wake, give_to, lock, now_ns, pipe, spawn_self, thread, trim_memory},
};

/// Bytes of a pipe of a container or exec, where the system allows it.
const PIPE: usize = 256 << 10;
/// Commands of [`Pod::exec`] that may run at one time, fewer than requests: each has a request that waits for its end.
const MAX_EXECS: usize = 192;
/// How long a port of the pod may take to accept.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a killed container may take to be gone.
const KILL: Duration = Duration::from_secs(10);

/// All that PID 1 knows.
pub(crate) struct Pod {
    pub(crate) options: Options,
    pub(crate) reaper: Reaper,
    pub(crate) bus: Bus,
    pub(crate) execs: Execs,
    pub(crate) console: Arc<Console>,
    /// `None`: being made.
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
    stopping: AtomicBool,
}

impl Pod {
    pub(crate) fn new(options: Options) -> Self {
        Self {
            options,
            reaper: Reaper::default(),
            bus: Bus::default(),
            execs: Execs::default(),
            console: Arc::new(Console::open()),
            containers: Mutex::default(),
            stopping: AtomicBool::new(false),
        }
    }

    fn get(&self, id: &str) -> Result<Arc<Container>> {
        let all = lock(&self.containers);
        all.get(id)
            .cloned()
            .flatten()
            .ok_or_else(|| Error::NotFound { kind: "container", id: id.chars().take(80).collect() })
    }

    fn runtime_root(&self) -> PathBuf {
        self.options.run.join("runtime")
    }

    /// Makes a container up to the moment before its command.
    pub(crate) fn create(self: &Arc<Self>, mut request: CreateRequest) -> Result<ContainerState> {
        let id = request.id.clone();
        if !valid_id(&id) {
            return Err(Error::Invalid(format!(
                "{:?} cannot be a container's id",
                id.chars().take(80).collect::<String>()
            )));
        }
        if self.stopping.load(Ordering::SeqCst) {
            return Err(Error::Invalid("the pod is being stopped".into()));
        }
        {
            let mut all = lock(&self.containers);
            if all.contains_key(&id) {
                return Err(Error::Exists(id));
            }
            if all.len() >= MAX_CONTAINERS {
                return Err(Error::Invalid(format!("a pod has at most {MAX_CONTAINERS} containers")));
            }
            all.insert(id.clone(), None);
        }
        let made = self.make(&mut request);
        drop(request);
        trim_memory();
        match made {
            Ok(container) => {
                let report = container.report();
                lock(&self.containers).insert(id, Some(container));
                Ok(report)
            }
            Err(e) => {
                self.clear(&id, None);
                lock(&self.containers).remove(&id);
                Err(e)
            }
        }
    }

    fn make(self: &Arc<Self>, request: &mut CreateRequest) -> Result<Arc<Container>> {
        let name = shell::name_in(&request.spec).unwrap_or(&request.id).to_owned();
        let prepared = spec::prepare(request)?;
        let bundle = self.options.run.join("bundles").join(&request.id);
        write_bundle(&bundle, &prepared.config)?;
        let log_name = request.log_path.as_ref().map(|p| p.display().to_string()).unwrap_or_default();
        let mut log = LogFile::open(request.log_path.take(), request.log_max_bytes, request.log_max_files)
            .context(format!("opening the log {log_name}"))?;
        log.show_on(&self.console, &name);
        let Streams { stdio, stdin, mut sources } = Streams::of(request, prepared.owner)?;
        let root = self.runtime_root();
        let mut notes = Notes::new(spawn_self("create", &[&bundle, &root, request.id.as_ref()], stdio)?);
        let (pid, master) = match notes.next()? {
            Some((Note::Pid(pid), master)) => (i32::try_from(pid).unwrap_or_default(), master),
            _ => {
                return Err(Error::Container(
                    "the process that creates containers ended without a word".into(),
                ));
            }
        };
        if let Some(master) = &master {
            let copy = master.try_clone().context("terminal")?;
            sources.push(Source { stream: Stream::Stdout, fd: copy, terminal: true });
        }
        let container = Arc::new(Container {
            id: request.id.clone(),
            name,
            pid,
            created_at_ns: now_ns(),
            bundle,
            cgroups_path: prepared.cgroups_path,
            owner: prepared.owner,
            shares_pids: prepared.shares_pids,
            wants_stdin: request.stdin,
            stdin_once: request.stdin_once,
            stop_signal: if (1..65).contains(&request.stop_signal) {
                request.stop_signal
            } else {
                libc::SIGTERM
            },
            stdin: Mutex::new(stdin),
            master,
            log: Mutex::new(log),
            readers: crate::attach::Readers::default(),
            wake: Wake::new()?,
            state: Mutex::new(State {
                phase: Phase::Created,
                started_at_ns: 0,
                exit: None,
                start_error: None,
                control: Some(notes),
            }),
            changed: Condvar::new(),
        });
        let (watched, read, pod) = (Arc::clone(&container), Arc::clone(&container), Arc::clone(self));
        self.reaper.watch(pid, move |exit| watched.died(exit));
        thread("output", move || output::run(&pod, &read, sources))?;
        Ok(container)
    }

    /// Executes a container's command.
    pub(crate) fn start(&self, id: &str) -> Result<ContainerState> {
        let container = self.get(id)?;
        let mut control = {
            let mut state = lock(&container.state);
            match (state.phase, state.control.take()) {
                (Phase::Created, Some(control)) => {
                    state.phase = Phase::Starting;
                    control
                }
                (phase, _) => return Err(container.not_in(phase, "a created one")),
            }
        };
        // libcontainer's way to say "go": connect, write, close.
        let socket = self.runtime_root().join(id).join("notify.sock");
        let go = UnixStream::connect(&socket).and_then(|mut s| s.write_all(b"start container"));
        let executed = match go.context("telling the container to start") {
            Ok(()) => loop {
                match control.next() {
                    Ok(Some(_)) => {}
                    Ok(None) => break Ok(()),
                    Err(e) => break Err(e),
                }
            },
            Err(e) => Err(e),
        };
        let report = {
            let mut state = lock(&container.state);
            match &executed {
                Ok(()) => state.started_at_ns = now_ns(),
                Err(e) => state.start_error = Some(e.to_string()),
            }
            ContainerState {
                id: container.id.clone(),
                status: moxlet_init_proto::Status::Running {
                    pid: u32::try_from(container.pid).unwrap_or_default(),
                    started_at_ns: state.started_at_ns,
                },
                pid: u32::try_from(container.pid).ok(),
                created_at_ns: container.created_at_ns,
            }
        };
        if executed.is_ok() {
            // Before the end of a short one can be told.
            self.console.say(&format!("{} runs", container.name));
            self.bus.publish(&Event::Started { container: report.clone() });
        } else {
            let _ = self.reaper.signal(container.pid, libc::SIGKILL);
        }
        lock(&container.state).phase = Phase::Running;
        container.wake.wake();
        match executed {
            Ok(()) => Ok(report),
            Err(e) => {
                container.wait_exited(Instant::now() + KILL);
                Err(e)
            }
        }
    }

    /// Signals a container's first process, or all of its PID namespace.
    pub(crate) fn signal(&self, id: &str, signal: i32, all: bool) -> Result<()> {
        if !(1..65).contains(&signal) {
            return Err(Error::Invalid(format!("{signal} is no signal")));
        }
        let container = self.get(id)?;
        if all {
            let others = if container.shares_pids {
                cgroup::processes(&container.cgroups_path)
            } else {
                namesakes(container.pid)
            };
            for pid in others {
                if pid != container.pid {
                    // SAFETY: a plain call. The PID was read this instant.
                    unsafe { libc::kill(pid, signal) };
                }
            }
        }
        match self.reaper.signal(container.pid, signal).context(format!("signal {signal}"))? {
            true => Ok(()),
            false => Err(container.not_in(Phase::Exited, "a process")),
        }
    }

    /// Runs another command in a container.
    pub(crate) fn exec(self: &Arc<Self>, request: &ExecRequest) -> Result<(String, StreamSet, Vec<OwnedFd>)> {
        let container = self.get(&request.id)?;
        let phase = lock(&container.state).phase;
        if phase != Phase::Running {
            return Err(container.not_in(phase, "a running one"));
        }
        if self.execs.running() >= MAX_EXECS {
            return Err(Error::Invalid(format!(
                "more than {MAX_EXECS} commands beside the containers' own run in the pod"
            )));
        }
        let mut set = StreamSet::default();
        let mut ours = Vec::new();
        let mut stdio = [Stdio::null(), Stdio::null(), Stdio::null()];
        if !request.tty {
            set = StreamSet {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: false,
            };
            if request.stdin {
                let (read, write) = pipe_of(container.owner)?;
                stdio[0] = read.into();
                ours.push(write);
            }
            for (at, wanted) in [(1, request.stdout), (2, request.stderr)] {
                if wanted {
                    let (read, write) = pipe_of(container.owner)?;
                    stdio[at] = write.into();
                    ours.push(read);
                }
            }
        }
        let pid = container.pid.to_string();
        let mut notes = Notes::new(spawn_self("exec", &[&container.bundle, pid.as_ref()], stdio)?);
        notes.send(request)?;
        let mut child = None;
        while let Some((note, fd)) = notes.next()? {
            // Two processes write notes: what came with the second may be received with the first.
            ours.extend(fd);
            if let Note::Pid(pid) = note {
                child = i32::try_from(pid).ok();
            }
        }
        set.terminal = request.tty;
        let Some(pid) = child.filter(|_| ours.len() == set.count()) else {
            return Err(Error::Container("the process that enters containers ended without a word".into()));
        };
        let (exec_id, exec) = self.execs.add(pid, &container.id);
        let (pod, id) = (Arc::clone(self), exec_id.clone());
        self.reaper.watch(pid, move |exit| pod.execs.finish(&id, &exec, exit.code));
        Ok((exec_id, set, ours))
    }

    /// Signals another command and what it started in its process group.
    pub(crate) fn signal_exec(&self, exec_id: &str, signal: i32) -> Result<()> {
        if !(1..65).contains(&signal) {
            return Err(Error::Invalid(format!("{signal} is no signal")));
        }
        let exec = self.execs.get(exec_id)?;
        match self.reaper.signal_group(exec.pid, signal).context(format!("signal {signal}"))? {
            true => Ok(()),
            false => Err(Error::NotFound { kind: "running exec", id: exec_id.chars().take(80).collect() }),
        }
    }

    /// Sets a terminal's size.
    pub(crate) fn resize(&self, id: &str, exec_id: Option<&str>, width: u16, height: u16) -> Result<()> {
        let container = self.get(id)?;
        let size = Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
        let none = || Error::Invalid(format!("{} has no terminal", exec_id.unwrap_or(id)));
        match exec_id {
            None => tcsetwinsize(container.master.as_ref().ok_or_else(none)?, size).context("resizing"),
            Some(name) => {
                let exec = self.execs.get(name)?;
                if exec.container != container.id || exec.ended() {
                    return Err(none());
                }
                // The caller has the master; any side sets the size.
                let terminal = terminal_of(&exec).ok_or_else(none)?;
                tcsetwinsize(terminal, size).context("resizing")
            }
        }
    }

    /// A container's input and copies of its output.
    pub(crate) fn attach(
        &self,
        id: &str,
        stdin: bool,
        stdout: bool,
        stderr: bool,
    ) -> Result<(StreamSet, Vec<OwnedFd>)> {
        let container = self.get(id)?;
        container.alive()?;
        let mut set = StreamSet::default();
        let mut fds = Vec::new();
        if stdin && container.wants_stdin {
            let mut held = lock(&container.stdin);
            let end = match (&container.master, container.stdin_once) {
                (Some(master), _) => Some(master.try_clone().context("attach")?),
                // The only write end goes out: its end is the end of the input.
                (None, true) => held.take(),
                (None, false) => held.as_ref().map(OwnedFd::try_clone).transpose().context("attach")?,
            };
            set.stdin = end.is_some();
            fds.extend(end);
        }
        if stdout {
            fds.push(container.readers.add(Stream::Stdout, || container.alive())?);
            set.stdout = true;
        }
        if stderr && container.master.is_none() {
            fds.push(container.readers.add(Stream::Stderr, || container.alive())?);
            set.stderr = true;
        }
        Ok((set, fds))
    }

    /// All containers that are made.
    pub(crate) fn list(&self) -> Vec<ContainerState> {
        let all: Vec<_> = lock(&self.containers).values().flatten().cloned().collect();
        all.iter().map(|c| c.report()).collect()
    }

    /// Forgets a container that does not run.
    pub(crate) fn remove(&self, id: &str) -> Result<()> {
        let container = self.get(id)?;
        let phase = lock(&container.state).phase;
        match phase {
            Phase::Exited => {}
            Phase::Created => {
                let _ = self.reaper.signal(container.pid, libc::SIGKILL);
                if !container.wait_exited(Instant::now() + KILL) {
                    return Err(Error::Container(format!("container {id:?} does not die")));
                }
            }
            Phase::Starting | Phase::Running => return Err(container.not_in(phase, "one that does not run")),
        }
        self.clear(id, Some(&container.cgroups_path));
        let _ = fs::remove_file(self.options.state.join(format!("{id}.json")));
        lock(&self.containers).remove(id);
        Ok(())
    }

    fn clear(&self, id: &str, cgroups_path: Option<&str>) {
        let _ = fs::remove_dir_all(self.options.run.join("bundles").join(id));
        let _ = fs::remove_dir_all(self.runtime_root().join(id));
        cgroup::remove(cgroups_path.unwrap_or(id));
    }

    /// Opens a log file anew.
    pub(crate) fn reopen_log(&self, id: &str) -> Result<()> {
        let container = self.get(id)?;
        let mut log = lock(&container.log);
        log.flush();
        log.reopen().context("opening the log")
    }

    /// A connection to a port of the pod's loopback.
    pub(crate) fn connect(port: u16) -> Result<OwnedFd> {
        let addresses: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let mut first = None;
        for address in addresses {
            match TcpStream::connect_timeout(&SocketAddr::new(address, port), CONNECT) {
                Ok(stream) => return Ok(stream.into()),
                Err(e) => first = first.or(Some(e)),
            }
        }
        Err(first.unwrap_or_else(|| std::io::ErrorKind::NotFound.into()))
            .context(format!("connecting to port {port} of the pod"))
    }

    /// Stops all containers: their stop signal, then SIGKILL. Nothing can be created any more.
    pub(crate) fn stop_all(&self, grace: Duration) {
        self.stopping.store(true, Ordering::SeqCst);
        let all: Vec<_> = lock(&self.containers).values().flatten().cloned().collect();
        for container in &all {
            let phase = lock(&container.state).phase;
            let signal = if phase == Phase::Created { libc::SIGKILL } else { container.stop_signal };
            let _ = self.reaper.signal(container.pid, signal);
        }
        let until = Instant::now() + grace.min(Duration::from_secs(86_400));
        let late: Vec<_> = all.iter().filter(|c| !c.wait_exited(until)).collect();
        for container in &late {
            let _ = self.reaper.signal(container.pid, libc::SIGKILL);
        }
        let until = Instant::now() + KILL;
        for container in late {
            container.wait_exited(until);
        }
    }
}

/// A pipe for a standard stream of this user and group.
fn pipe_of((uid, gid): (u32, u32)) -> Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe(PIPE)?;
    give_to(&write, uid, gid)?;
    Ok((read, write))
}

/// Writes what the process that creates a container reads.
fn write_bundle(bundle: &Path, config: &[u8]) -> Result<()> {
    fs::create_dir_all(bundle).context(format!("making {}", bundle.display()))?;
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let open = options.open(bundle.join("config.json"));
    open.and_then(|mut file| file.write_all(config)).context("writing the bundle")
}

/// A container's standard streams: its own ends and ours. With a terminal there are none but that.
struct Streams {
    stdio: [Stdio; 3],
    stdin: Option<OwnedFd>,
    sources: Vec<Source>,
}

impl Streams {
    fn of(request: &CreateRequest, owner: (u32, u32)) -> Result<Self> {
        if request.tty {
            let stdio = [Stdio::null(), Stdio::null(), Stdio::null()];
            return Ok(Self { stdio, stdin: None, sources: Vec::new() });
        }
        let (input, stdin) = if request.stdin {
            let (read, write) = pipe_of(owner)?;
            (Stdio::from(read), Some(write))
        } else {
            (Stdio::null(), None)
        };
        let (out_read, out_write) = pipe_of(owner)?;
        let (err_read, err_write) = pipe_of(owner)?;
        let sources = vec![
            Source { stream: Stream::Stdout, fd: out_read, terminal: false },
            Source { stream: Stream::Stderr, fd: err_read, terminal: false },
        ];
        Ok(Self { stdio: [input, Stdio::from(out_write), Stdio::from(err_write)], stdin, sources })
    }
}

/// All processes in the PID namespace of a process; none if that is PID 1's own.
fn namesakes(pid: i32) -> Vec<i32> {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let wanted = namespace(&pid.to_string());
    if wanted.is_none() || wanted == namespace("self") {
        return Vec::new();
    }
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let names = entries.filter_map(|e| e.file_name().into_string().ok());
    names.filter(|n| namespace(n) == wanted).filter_map(|n| n.parse().ok()).collect()
}

fn terminal_of(exec: &Exec) -> Option<OwnedFd> {
    (0..3).find_map(|n| {
        let file = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
            .open(format!("/proc/{}/fd/{n}", exec.pid))
            .ok()?;
        rustix::termios::isatty(file.as_fd()).then(|| file.into())
    })
}
