//! An init for tests: it runs the commands on this machine, with real pipes and terminals.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::HashMap,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use moxlet_init_proto::{Envelope, ErrorClass, ExecRequest, Request, Response, StreamSet, frame};
use parking_lot::Mutex;
use rustix::{pty, termios};

/// An init without a CT.
#[derive(Default)]
pub(super) struct FakeInit {
    pub(super) commands: Mutex<HashMap<String, Child>>,
    /// The other ends of an attached client's streams.
    pub(super) attached: Mutex<Vec<UnixStream>>,
}

impl FakeInit {
    pub(super) fn listen(path: &Path) -> Arc<Self> {
        let init = Arc::new(Self::default());
        let listener = UnixListener::bind(path).unwrap();
        let own = init.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let init = own.clone();
                std::thread::spawn(move || {
                    let mut decoder = frame::Decoder::default();
                    let Ok(Some((envelope, _))) = frame::read::<Envelope>(&stream, &mut decoder) else {
                        return;
                    };
                    let (response, fds) = init.answer(envelope.request);
                    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                    let _ = frame::write(&stream, &response, &borrowed);
                });
            }
        });
        init
    }

    fn answer(&self, request: Request) -> (Response, Vec<OwnedFd>) {
        let error = |class, message: String| (Response::Error { class, message }, Vec::new());
        match request {
            Request::Exec(request) if request.tty => self.terminal(&request),
            Request::Exec(request) => {
                let end = |wanted| if wanted { Stdio::piped() } else { Stdio::null() };
                let spawned = Command::new(&request.args[0])
                    .args(&request.args[1..])
                    .stdin(end(request.stdin))
                    .stdout(end(request.stdout))
                    .stderr(end(request.stderr))
                    .spawn();
                let mut child = match spawned {
                    Ok(child) => child,
                    Err(e) => return error(ErrorClass::StartError, format!("{}: {e}", request.args[0])),
                };
                let fds = [
                    child.stdin.take().map(OwnedFd::from),
                    child.stdout.take().map(OwnedFd::from),
                    child.stderr.take().map(OwnedFd::from),
                ];
                let streams = StreamSet {
                    stdin: request.stdin,
                    stdout: request.stdout,
                    stderr: request.stderr,
                    terminal: false,
                };
                let mut all = self.commands.lock();
                let exec_id = format!("exec-{}", all.len());
                all.insert(exec_id.clone(), child);
                (Response::Execed { exec_id, streams }, fds.into_iter().flatten().collect())
            }
            Request::WaitExec { exec_id } => loop {
                let ended = self.commands.lock().get_mut(&exec_id).unwrap().try_wait().unwrap();
                if let Some(status) = ended {
                    let code = std::os::unix::process::ExitStatusExt::signal(&status)
                        .map_or(status.code(), |s| Some(128 + s));
                    return (Response::ExecExited { code: code.unwrap() }, Vec::new());
                }
                std::thread::sleep(Duration::from_millis(2));
            },
            Request::Attach { stdin, stdout, stderr, .. } => {
                let mut fds = Vec::new();
                for _ in 0..[stdin, stdout, stderr].iter().filter(|w| **w).count() {
                    let (ours, theirs) = UnixStream::pair().unwrap();
                    self.attached.lock().push(ours);
                    fds.push(theirs.into());
                }
                (Response::Attached { streams: StreamSet { stdin, stdout, stderr, terminal: false } }, fds)
            }
            Request::Connect { port } => match std::net::TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => (Response::Done, vec![stream.into()]),
                Err(_) => error(ErrorClass::Internal, "connection refused".into()),
            },
            _ => error(ErrorClass::Unsupported, "not here".into()),
        }
    }

    /// Runs a command at a terminal.
    fn terminal(&self, request: &ExecRequest) -> (Response, Vec<OwnedFd>) {
        let master = pty::openpt(pty::OpenptFlags::RDWR | pty::OpenptFlags::NOCTTY).unwrap();
        pty::grantpt(&master).unwrap();
        pty::unlockpt(&master).unwrap();
        let (ws_col, ws_row) = (request.width, request.height);
        termios::tcsetwinsize(&master, termios::Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 })
            .unwrap();
        let name = pty::ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let slave = std::fs::OpenOptions::new().read(true).write(true).open(name).unwrap();
        let end = || Stdio::from(slave.try_clone().unwrap());
        let mut command = Command::new(&request.args[0]);
        let child =
            command.args(&request.args[1..]).stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        let mut all = self.commands.lock();
        let exec_id = format!("exec-{}", all.len());
        all.insert(exec_id.clone(), child);
        let streams = StreamSet { terminal: true, ..StreamSet::default() };
        (Response::Execed { exec_id, streams }, vec![master])
    }
}
