//! `/bin/sh` of a CT's own root, which is this program: what `pct enter` and the console's shell end in. It lists the pod's
//! containers and enters one by way of PID 1, as `kubectl exec -it POD -c CONTAINER -- sh` would.

use std::{
    fs,
    io::{self, BufRead, IsTerminal, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::ExitCode,
    time::Duration,
};

use moxlet_init_proto::{ContainerState, Envelope, ExecRequest, Request, Response, Status, VERSION, frame};
use rustix::{
    event::{PollFd, PollFlags},
    termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr},
};

use crate::{
    console::clean,
    error::{Context, Error, Result},
    sys::{wait_ready, write_bounded},
};

const SOCKET: &str = "/run/moxlet/pod/run/init.sock";
const BUNDLES: &str = "/run/moxlet/bundles";
const PATIENCE: Duration = Duration::from_secs(30);
/// How often the terminal's size is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// What is run in a container.
const COMMAND: &str = "/bin/sh";

/// Whether this program was called as a shell.
pub(crate) fn is_wanted(program: Option<&str>) -> bool {
    std::process::id() != 1
        && program.is_some_and(|p| Path::new(p).file_name().is_some_and(|n| n == "sh" || n == "-sh"))
}

/// The shell.
pub(crate) fn main(args: &[String]) -> ExitCode {
    let done = match args {
        // A login shell has an argument of its own.
        [] => enter_one(),
        [only] if only == "-l" || only == "-i" => enter_one(),
        _ => Err(Error::Usage(
            "this is no shell: the CT is a pod's, commands run in its containers (kubectl exec, or `pct enter` and choose one)"
                .into(),
        )),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            eprintln!("moxlet: {e}");
            ExitCode::from(127)
        }
    }
}

fn ask(request: Request) -> Result<(Response, Vec<OwnedFd>)> {
    let stream = UnixStream::connect(SOCKET).context(format!("asking PID 1 at {SOCKET}"))?;
    let wait = matches!(request, Request::WaitExec { .. });
    stream.set_read_timeout((!wait).then_some(PATIENCE)).context("asking PID 1")?;
    frame::write(&stream, &Envelope { version: VERSION, request }, &[])?;
    let mut decoder = frame::Decoder::default();
    match frame::read::<Response>(&stream, &mut decoder)? {
        Some((Response::Error { message, .. }, _)) => Err(Error::Container(message)),
        Some(answer) => Ok(answer),
        None => Err(Error::Proto(moxlet_init_proto::Error::Closed)),
    }
}

fn unexpected() -> Error {
    Error::Invalid("PID 1 answered something else than was asked".into())
}

/// A container's name, from its bundle; its id where there is none.
fn name_of(id: &str) -> String {
    let text = fs::read(Path::new(BUNDLES).join(id).join("config.json")).unwrap_or_default();
    let spec: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    name_in(&spec).unwrap_or(id).to_owned()
}

/// The name that a spec notes.
pub(crate) fn name_in(spec: &serde_json::Value) -> Option<&str> {
    spec["annotations"]["io.kubernetes.cri.container-name"].as_str().filter(|n| !n.is_empty())
}

fn state_of(container: &ContainerState) -> String {
    match &container.status {
        Status::Created => "created".into(),
        Status::Running { .. } => "running".into(),
        Status::Exited { code, .. } => format!("exited ({code})"),
    }
}

/// Which of them is meant: by number, name or id.
fn chosen<'a>(all: &'a [(String, ContainerState)], word: &str) -> Option<&'a ContainerState> {
    let by_number = word.parse::<usize>().ok().and_then(|n| all.get(n.checked_sub(1)?));
    by_number.or_else(|| all.iter().find(|(name, c)| name == word || c.id == word)).map(|(_, c)| c)
}

fn enter_one() -> Result<u8> {
    let (Response::Containers { containers }, _) = ask(Request::List)? else { return Err(unexpected()) };
    let mut all: Vec<(String, ContainerState)> =
        containers.into_iter().map(|c| (name_of(&c.id), c)).collect();
    all.sort_by(|a, b| (&a.0, a.1.created_at_ns).cmp(&(&b.0, b.1.created_at_ns)));
    if all.is_empty() {
        println!("This pod has no containers yet.");
        return Ok(0);
    }
    println!("This CT is a Kubernetes pod. Its containers:");
    for (n, (name, container)) in all.iter().enumerate() {
        println!("  {}  {:<30} {}", n + 1, clean(name), state_of(container));
    }
    if !io::stdin().is_terminal() {
        return Ok(0);
    }
    print!("Enter which (number or name; nothing to leave)? ");
    let _ = io::stdout().flush();
    let mut word = String::new();
    io::stdin().lock().read_line(&mut word).context("reading the answer")?;
    let word = word.trim();
    if word.is_empty() {
        return Ok(0);
    }
    let container =
        chosen(&all, word).ok_or_else(|| Error::NotFound { kind: "container", id: word.into() })?;
    enter(&container.id)
}

fn enter(id: &str) -> Result<u8> {
    let size = tcgetwinsize(io::stdin()).ok();
    let term = std::env::var("TERM").unwrap_or_else(|_| "linux".into());
    let request = ExecRequest {
        id: id.to_owned(),
        args: vec![COMMAND.to_owned()],
        env: [("TERM".to_owned(), term)].into(),
        tty: true,
        stdin: true,
        stdout: true,
        width: size.map_or(0, |s| s.ws_col),
        height: size.map_or(0, |s| s.ws_row),
        ..ExecRequest::default()
    };
    let (Response::Execed { exec_id, .. }, mut fds) = ask(Request::Exec(Box::new(request)))? else {
        return Err(unexpected());
    };
    let master = fds.pop().ok_or_else(unexpected)?;
    {
        let _raw = Raw::set()?;
        copy(&master, id, &exec_id);
    }
    drop(master);
    let (Response::ExecExited { code }, _) = ask(Request::WaitExec { exec_id })? else {
        return Err(unexpected());
    };
    Ok(u8::try_from(code).unwrap_or(255))
}

/// The terminal without echo, line editing and signals, until it is dropped.
struct Raw(Termios);

impl Raw {
    fn set() -> Result<Self> {
        let before = tcgetattr(io::stdin()).context("the terminal")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).context("the terminal")?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Both ways, until the other end is gone.
fn copy(master: &OwnedFd, id: &str, exec_id: &str) {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let mut buffer = vec![0; 16 << 10];
    let mut size = tcgetwinsize(&stdin).ok();
    let mut input = true;
    loop {
        let mut fds = vec![PollFd::new(master, PollFlags::IN)];
        if input {
            fds.push(PollFd::new(&stdin, PollFlags::IN));
        }
        wait_ready(&mut fds, Some(LOOK));
        let ready: Vec<bool> = fds.iter().map(|f| !f.revents().is_empty()).collect();
        drop(fds);
        if ready.first() == Some(&true) {
            match rustix::io::read(master, &mut buffer) {
                Ok(n) if n > 0 => {
                    if write_bounded(stdout.as_fd(), &buffer[..n], PATIENCE).is_err() {
                        return;
                    }
                }
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                // The last one that had it open is gone.
                _ => return,
            }
        }
        if ready.get(1) == Some(&true) {
            match rustix::io::read(&stdin, &mut buffer) {
                Ok(n) if n > 0 => input = write_bounded(master, &buffer[..n], PATIENCE).is_ok(),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                _ => return,
            }
        }
        let now = tcgetwinsize(&stdin).ok();
        if let Some(now) = now
            && size.is_none_or(|s| (s.ws_col, s.ws_row) != (now.ws_col, now.ws_row))
        {
            size = Some(now);
            let exec_id = Some(exec_id.to_owned());
            let _ =
                ask(Request::ResizeTty { id: id.to_owned(), exec_id, width: now.ws_col, height: now.ws_row });
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn it_is_a_shell_only_by_that_name() {
        assert!(is_wanted(Some("/bin/sh")) && is_wanted(Some("sh")) && is_wanted(Some("-sh")));
        assert!(!is_wanted(Some("/sbin/moxlet-init")) && !is_wanted(None) && !is_wanted(Some("/bin/bash")));
    }

    #[test]
    fn a_container_is_chosen_by_number_name_or_id() {
        let one =
            |id: &str| ContainerState { id: id.into(), pid: None, created_at_ns: 0, status: Status::Created };
        let all = [("web".to_owned(), one("aa")), ("log".to_owned(), one("bb"))];
        assert_eq!(chosen(&all, "1").unwrap().id, "aa");
        assert_eq!(chosen(&all, "log").unwrap().id, "bb");
        assert_eq!(chosen(&all, "bb").unwrap().id, "bb");
        for none in ["0", "3", "x", ""] {
            assert!(chosen(&all, none).is_none());
        }
    }

    #[test]
    fn a_name_is_read_from_the_spec() {
        let spec = serde_json::json!({"annotations": {"io.kubernetes.cri.container-name": "web"}});
        assert_eq!(name_in(&spec), Some("web"));
        assert_eq!(name_in(&serde_json::json!({})), None);
    }
}
