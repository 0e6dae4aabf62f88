//! PID 1's own life: signals, the socket, one thread a request.

use std::{
    fs,
    os::{
        fd::AsFd,
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use moxlet_init_proto::{Envelope, Request, Response, VERSION, frame};
use rustix::event::{PollFd, PollFlags};

use crate::{
    Options, cgroup,
    error::{Context, Error, Result},
    pod::Pod,
    sys::{frugal_memory, loopback_up, thread, wait_ready},
};

/// Requests at one time that may take long; each is a thread.
const MAX_LONG: usize = 256;
/// Further requests, which are short or end the pod: they get through whatever the others do.
const RESERVED: usize = 32;
/// How long a caller may take for its request and for taking the answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs until told to stop.
pub(crate) fn run(options: Options) -> Result<()> {
    frugal_memory();
    // SAFETY: plain calls, before any thread.
    unsafe {
        libc::umask(0o022);
        // Where this is not PID 1 (a test), orphans come here all the same.
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    }
    let signals = block_signals();
    cgroup::hand_down();
    // Not fatal: who runs this elsewhere (a test without privileges) has a loopback of its own.
    if let Err(e) = loopback_up() {
        eprintln!("moxlet-init: {e}");
    }
    for dir in [&options.run, &options.state] {
        fs::create_dir_all(dir).context(format!("making {}", dir.display()))?;
    }
    let listener = listen(&options)?;
    let grace = options.grace;
    let pod = Arc::new(Pod::new(options));
    pod.console.say("the pod is ready for its containers");
    let server = Arc::clone(&pod);
    thread("accept", move || accept(&server, &listener))?;
    let mut stopping = false;
    loop {
        let mut signal = 0;
        // SAFETY: a valid set and pointer.
        if unsafe { libc::sigwait(&raw const signals, &raw mut signal) } != 0 {
            continue;
        }
        if signal == libc::SIGCHLD {
            pod.reaper.reap();
        } else if !stopping {
            stopping = true;
            let pod = Arc::clone(&pod);
            thread("stop", move || stop(&pod, grace))?;
        }
    }
}

/// Stops the containers and ends this process, and with it the CT.
fn stop(pod: &Pod, grace: Duration) {
    pod.console.say("the pod is being stopped");
    pod.stop_all(grace);
    let _ = fs::remove_file(&pod.options.socket);
    std::process::exit(0);
}

fn block_signals() -> libc::sigset_t {
    // SAFETY: the set is initialised before use; before any thread, so that all inherit it.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGPWR, libc::SIGRTMIN() + 3] {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        set
    }
}

fn listen(options: &Options) -> Result<UnixListener> {
    let path = &options.socket;
    let _ = fs::remove_file(path);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).context(format!("making {}", dir.display()))?;
    }
    // Bound under another name, so that whoever finds the socket finds it ready.
    let draft = path.with_extension("new");
    let _ = fs::remove_file(&draft);
    let listener = UnixListener::bind(&draft).context(format!("listening at {}", path.display()))?;
    fs::set_permissions(&draft, fs::Permissions::from_mode(0o600)).context("protecting the socket")?;
    fs::rename(&draft, path).context(format!("listening at {}", path.display()))?;
    Ok(listener)
}

/// A place among a bounded number of requests.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(taken: &Arc<AtomicUsize>, most: usize) -> Result<Self> {
        if taken.fetch_add(1, Ordering::SeqCst) >= most {
            taken.fetch_sub(1, Ordering::SeqCst);
            return Err(Error::Container(format!("more than {most} requests at one time")));
        }
        Ok(Self(Arc::clone(taken)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn accept(pod: &Arc<Pod>, listener: &UnixListener) {
    let (all, long) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    loop {
        let Ok((stream, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(50));
            continue;
        };
        let place = match Place::take(&all, MAX_LONG + RESERVED) {
            Ok(place) => place,
            Err(error) => {
                let _ = frame::write(&stream, &error.response(), &[]);
                continue;
            }
        };
        let (pod, long) = (Arc::clone(pod), Arc::clone(&long));
        let _ = thread("request", move || {
            let _place = place;
            serve(&pod, stream, &long);
        });
    }
}

/// Whether a request is short, or ends something: it needs no place among the long ones.
fn is_short(request: &Request) -> bool {
    matches!(
        request,
        Request::Hello
            | Request::Signal { .. }
            | Request::SignalExec { .. }
            | Request::List
            | Request::Remove { .. }
            | Request::Events
            | Request::Shutdown { .. }
    )
}

fn serve(pod: &Arc<Pod>, stream: UnixStream, long: &Arc<AtomicUsize>) {
    let _ = stream.set_read_timeout(Some(PATIENCE));
    let _ = stream.set_write_timeout(Some(PATIENCE));
    let mut decoder = frame::Decoder::default();
    let request = match frame::read::<Envelope>(&stream, &mut decoder) {
        Ok(Some((envelope, _))) => envelope.request,
        Ok(None) => return,
        Err(e) => {
            let _ = frame::write(&stream, &Error::Invalid(e.to_string()).response(), &[]);
            return;
        }
    };
    drop(decoder);
    let _place = if is_short(&request) {
        None
    } else {
        match Place::take(long, MAX_LONG) {
            Ok(place) => Some(place),
            Err(error) => {
                let _ = frame::write(&stream, &error.response(), &[]);
                return;
            }
        }
    };
    if let Request::Events = request {
        // The bus keeps the stream.
        let _ = stream.try_clone().context("event stream").and_then(|s| pod.bus.subscribe(s)).map_err(|e| {
            let _ = frame::write(&stream, &e.response(), &[]);
        });
        return;
    }
    let shutdown = matches!(request, Request::Shutdown { .. });
    let (response, fds) = answer(pod, request, &stream).unwrap_or_else(|e| (e.response(), Vec::new()));
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let _ = frame::write(&stream, &response, &borrowed);
    if shutdown {
        drop(stream);
        stop(pod, Duration::ZERO);
    }
}

type Answer = (Response, Vec<std::os::fd::OwnedFd>);

fn answer(pod: &Arc<Pod>, request: Request, caller: &UnixStream) -> Result<Answer> {
    let plain = |response| Ok((response, Vec::new()));
    match request {
        Request::Hello => plain(Response::Hello { version: VERSION }),
        Request::Create(request) => plain(Response::Container { container: pod.create(*request)? }),
        Request::Start { id } => plain(Response::Container { container: pod.start(&id)? }),
        Request::Signal { id, signal, all } => {
            pod.signal(&id, signal, all)?;
            plain(Response::Done)
        }
        Request::Exec(request) => {
            let (exec_id, streams, fds) = pod.exec(&request)?;
            Ok((Response::Execed { exec_id, streams }, fds))
        }
        Request::ResizeTty { id, exec_id, width, height } => {
            pod.resize(&id, exec_id.as_deref(), width, height)?;
            plain(Response::Done)
        }
        Request::Attach { id, stdin, stdout, stderr } => {
            let (streams, fds) = pod.attach(&id, stdin, stdout, stderr)?;
            Ok((Response::Attached { streams }, fds))
        }
        Request::WaitExec { exec_id } => {
            let exec = pod.execs.get(&exec_id)?;
            let code =
                exec.wait(|| !hung_up(caller)).ok_or(Error::Proto(moxlet_init_proto::Error::Closed))?;
            pod.execs.forget(&exec_id);
            plain(Response::ExecExited { code })
        }
        Request::SignalExec { exec_id, signal } => {
            pod.signal_exec(&exec_id, signal)?;
            plain(Response::Done)
        }
        Request::List => plain(Response::Containers { containers: pod.list() }),
        Request::Remove { id } => {
            pod.remove(&id)?;
            plain(Response::Done)
        }
        Request::ReopenLog { id } => {
            pod.reopen_log(&id)?;
            plain(Response::Done)
        }
        Request::Connect { port } => Ok((Response::Done, vec![Pod::connect(port)?])),
        Request::Shutdown { grace_ms } => {
            pod.stop_all(Duration::from_millis(grace_ms));
            plain(Response::Done)
        }
        Request::Events | Request::Unknown => Err(Error::Unsupported),
    }
}

fn hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    wait_ready(&mut fds, Some(Duration::ZERO))
        && fds[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn ask(socket: &std::path::Path, request: Request) -> UnixStream {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        frame::write(&stream, &Envelope { version: VERSION, request }, &[]).unwrap();
        stream
    }

    fn answered(stream: &UnixStream) -> Response {
        frame::read(stream, &mut frame::Decoder::default()).unwrap().unwrap().0
    }

    #[test]
    fn a_signal_gets_through_when_all_other_requests_wait() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("init.sock");
        let pod = Arc::new(Pod::new(Options {
            socket: socket.clone(),
            run: dir.path().join("run"),
            state: dir.path().join("state"),
            grace: Duration::ZERO,
        }));
        let listener = listen(&pod.options).unwrap();
        let server = Arc::clone(&pod);
        thread("accept", move || accept(&server, &listener)).unwrap();
        let (exec_id, _exec) = pod.execs.add(1, "c");
        let wait = || ask(&socket, Request::WaitExec { exec_id: exec_id.clone() });
        let waiting: Vec<_> = (0..MAX_LONG).map(|_| wait()).collect();
        // Which of those that were sent at one time is refused is open.
        let mut fds: Vec<_> = waiting.iter().collect();
        let late = wait();
        fds.push(&late);
        let mut polled: Vec<_> = fds.iter().map(|s| PollFd::new(*s, PollFlags::IN)).collect();
        assert!(wait_ready(&mut polled, Some(Duration::from_secs(30))), "one is too many");
        let refused: Vec<_> = polled.iter().zip(&fds).filter(|(p, _)| !p.revents().is_empty()).collect();
        assert_eq!(refused.len(), 1);
        let Response::Error { message, .. } = answered(refused[0].1) else { panic!("it is answered") };
        assert!(message.contains("256 requests"), "{message}");
        let signal = Request::Signal { id: "c".into(), signal: 15, all: false };
        for _ in 0..2 {
            let Response::Error { message, .. } = answered(&ask(&socket, signal.clone())) else { panic!() };
            assert!(message.contains("is not known"), "{message}");
        }
        assert!(matches!(answered(&ask(&socket, Request::List)), Response::Containers { .. }));
    }
}
