//! The streaming server over its sockets, before an init that runs its commands on this machine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Write;

use moxlet_ids::{Digest, SandboxId};
use moxlet_init_proto::client::Client as InitClient;
use moxlet_stream::{Offer, client::Client};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use super::{fake_init::FakeInit, *};
use crate::{
    fake,
    ledger::{ContainerRecord, Exit, SandboxRecord},
    rooms::Rooms,
    state::{MAX_EXECS, Sandbox},
};

const LIMIT: Duration = Duration::from_secs(30);
const PLAIN: Offer = Offer { stdin: false, stdout: true, stderr: true, tty: false };

/// A server before a pod with one running container.
struct Place {
    _dir: TempDir,
    rooms: Rooms,
    streaming: Arc<Streaming>,
    init: Arc<FakeInit>,
    container: Arc<Container>,
    sandbox: Arc<Sandbox>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.rooms.tasks.stop.cancel();
    }
}

async fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let (rooms, _) = fake::rooms(dir.path(), Arc::default()).await;
    let socket = dir.path().join("init.sock");
    let init = FakeInit::listen(&socket);
    let mut record = SandboxRecord::new(SandboxId::random(), "uid-1".parse().unwrap(), 1);
    (record.namespace, record.name) = ("default".to_owned(), "web".to_owned());
    let sandbox = Sandbox::new(record);
    sandbox.set_client(Some(InitClient::new(&socket)));
    rooms.state.insert_sandbox(sandbox.clone());
    let image: Digest = format!("sha256:{}", "0".repeat(64)).parse().unwrap();
    let record = ContainerRecord::new(moxlet_ids::ContainerId::random(), sandbox.id.clone(), image, 1);
    let container = Container::new(record);
    container.state.send_replace(RunState::Running { started_at_ns: 1 });
    rooms.state.insert_container(container.clone());
    let streaming = Streaming::start(
        rooms.state.clone(),
        rooms.tasks.clone(),
        dir.path().join("run/stream.sock"),
        rooms.config.stream_listen,
    )
    .unwrap();
    Place { _dir: dir, rooms, streaming, init, container, sandbox }
}

impl Place {
    fn exec_request(&self, command: &[&str], offer: Offer) -> v1::ExecRequest {
        v1::ExecRequest {
            container_id: self.container.id.to_string(),
            cmd: command.iter().map(|c| (*c).to_owned()).collect(),
            tty: offer.tty,
            stdin: offer.stdin,
            stdout: offer.stdout,
            stderr: offer.stderr,
        }
    }

    /// Asks at the unix socket as the node does; gives the connection and the answer's first line.
    async fn ask(&self, url: &str, protocol: &str) -> (tokio::net::UnixStream, String) {
        let path = url.strip_prefix("http://").unwrap();
        let path = &path[path.find('/').unwrap()..];
        let mut stream = tokio::net::UnixStream::connect(&self.streaming.socket).await.unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
             X-Stream-Protocol-Version: {protocol}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(stream.read_u8().await.unwrap());
        }
        let answer = String::from_utf8(answer).unwrap();
        (stream, answer.lines().next().unwrap().to_owned())
    }

    async fn exec(&self, command: &[&str], offer: Offer) -> (Client, moxlet_stream::client::Command) {
        let url = self.streaming.exec(self.exec_request(command, offer)).await.unwrap().url;
        let (stream, answer) = self.ask(&url, "v4.channel.k8s.io").await;
        assert!(answer.contains("101"), "{answer}");
        let mut client = Client::new(stream).unwrap();
        let command = client.command(offer).await.unwrap();
        (client, command)
    }

    /// Runs a command to its end: output, error output, status.
    async fn run(&self, command: &[&str]) -> (String, String, String) {
        let (_client, mut streams) = self.exec(command, PLAIN).await;
        let (mut out, mut err) = (String::new(), String::new());
        streams.stdout.take().unwrap().read_to_string(&mut out).await.unwrap();
        streams.stderr.take().unwrap().read_to_string(&mut err).await.unwrap();
        (out, err, streams.status().await.unwrap())
    }

    fn sync(&self, command: &[&str], timeout: i64) -> v1::ExecSyncRequest {
        let cmd = command.iter().map(|c| (*c).to_owned()).collect();
        v1::ExecSyncRequest { container_id: self.container.id.to_string(), cmd, timeout }
    }

    fn end(&self) {
        self.container.state.send_replace(RunState::Exited(Exit {
            code: 0,
            reason: "Completed".to_owned(),
            message: String::new(),
            started_at_ns: 1,
            finished_at_ns: 2,
        }));
    }
}

#[tokio::test]
async fn commands_of_a_pod_are_bounded_and_leave_room_for_its_stop() {
    let place = place().await;
    let mut slots: Vec<_> = std::iter::from_fn(|| place.sandbox.exec_slot().ok()).collect();
    assert_eq!(slots.len(), MAX_EXECS);
    let refused =
        exec_sync(&place.rooms.state, &place.rooms.tasks, place.sync(&["true"], 0)).await.unwrap_err();
    assert_eq!(tonic::Status::from(refused).code(), tonic::Code::ResourceExhausted);
    let (_, _, status) = place.run(&["true"]).await;
    assert!(status.contains("commands run in sandbox"), "{status}");
    slots.pop();
    assert_eq!(
        exec_sync(&place.rooms.state, &place.rooms.tasks, place.sync(&["true"], 0)).await.unwrap().exit_code,
        0
    );
    let ran = place.run(&["echo", "a"]).await;
    assert_eq!(ran.0, "a\n", "each gives its room back");
}

#[tokio::test]
async fn requests_are_judged_before_there_is_a_url() {
    let place = place().await;
    let request = |offer| place.exec_request(&["true"], offer);
    let refused = |offer| place.streaming.exec(request(offer));
    assert!(matches!(refused(Offer { tty: true, ..PLAIN }).await, Err(Error::Invalid(_))));
    assert!(matches!(refused(Offer::default()).await, Err(Error::Invalid(_))));
    let unknown = v1::ExecRequest { container_id: "nobody".to_owned(), ..request(PLAIN) };
    assert!(matches!(place.streaming.exec(unknown).await, Err(Error::NotFound(_))));
    place.end();
    let error = refused(PLAIN).await.unwrap_err();
    assert!(matches!(&error, Error::State(text) if text.contains("exited")), "{error}");
}

#[tokio::test]
async fn a_url_is_good_once_and_for_its_own_kind() {
    let place = place().await;
    let url = place.streaming.exec(place.exec_request(&["true"], PLAIN)).await.unwrap().url;
    assert!(url.starts_with("http://127.0.0.1:"), "{url}");
    let (_stream, answer) = place.ask(&url.replace("/exec/", "/attach/"), "v4.channel.k8s.io").await;
    assert!(answer.contains("404"), "{answer}");
    let url = place.streaming.exec(place.exec_request(&["true"], PLAIN)).await.unwrap().url;
    let (_stream, answer) = place.ask(&url, "v4.channel.k8s.io").await;
    assert!(answer.contains("101"), "{answer}");
    let (_stream, answer) = place.ask(&url, "v4.channel.k8s.io").await;
    assert!(answer.contains("404"), "{answer}");
}

#[test]
fn urls_that_nobody_uses_are_bounded() {
    let tokens = Tokens::default();
    let pending = Pending::PortForward(v1::PortForwardRequest::default());
    for _ in 0..MAX_TOKENS {
        tokens.put(pending.clone()).unwrap();
    }
    assert!(tokens.put(pending.clone()).is_err());
    for (since, _) in tokens.0.lock().values_mut() {
        *since = Instant::now().checked_sub(TOKEN_LIFE).unwrap();
    }
    let token = tokens.put(pending.clone()).unwrap();
    assert_eq!(tokens.0.lock().len(), 1);
    assert_eq!(tokens.take(&format!("/portforward/{token}")), Some(pending));
}

#[tokio::test]
async fn other_machines_cannot_reach_it() {
    assert!(matches!(server::listen_tcp("0.0.0.0:0".parse().unwrap()), Err(Error::Invalid(_))));
    assert!(
        server::listen_tcp("[::1]:0".parse().unwrap()).is_ok()
            || server::listen_tcp("127.0.0.1:0".parse().unwrap()).is_ok()
    );
    let place = place().await;
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(&place.streaming.socket).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn outputs_and_exit_code_reach_the_client() {
    let place = place().await;
    let (out, err, status) = place.run(&["sh", "-c", "echo out; echo err >&2; exit 7"]).await;
    assert_eq!((out.as_str(), err.as_str()), ("out\n", "err\n"));
    assert!(status.contains(r#""message":"7""#), "{status}");
    let (_, _, status) = place.run(&["true"]).await;
    assert!(status.contains("Success"), "{status}");
    let (_, _, status) = place.run(&["/no/such/command"]).await;
    assert!(status.contains("error executing command in container: /no/such/command"), "{status}");
}

#[tokio::test]
async fn the_end_of_the_input_is_seen_by_the_command() {
    let place = place().await;
    let (_client, mut streams) = place.exec(&["cat"], Offer { stdin: true, ..PLAIN }).await;
    let mut stdin = streams.stdin.take().unwrap();
    stdin.write_all(b"hello").await.unwrap();
    stdin.shutdown().await.unwrap();
    let mut out = String::new();
    streams.stdout.take().unwrap().read_to_string(&mut out).await.unwrap();
    assert_eq!(out, "hello");
    assert!(streams.status().await.unwrap().contains("Success"));
}

#[tokio::test]
async fn a_terminal_has_its_size_from_the_start_and_is_resized() {
    let place = place().await;
    let offer = Offer { stdin: true, stdout: true, stderr: false, tty: true };
    let script = "stty size; read x; stty size; echo got $x; exit 5";
    let (_client, mut streams) = place.exec(&["sh", "-c", script], offer).await;
    let mut resize = streams.resize.take().unwrap();
    resize.write_all(br#"{"Width":81,"Height":25}"#).await.unwrap();
    let (mut stdin, mut stdout) = (streams.stdin.take().unwrap(), streams.stdout.take().unwrap());
    let mut out = String::new();
    let mut buffer = [0; 1024];
    while !out.contains("25 81") {
        let count = timeout(LIMIT, stdout.read(&mut buffer)).await.unwrap().unwrap();
        assert!(count > 0, "{out}");
        out.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
    }
    resize.write_all(br#"{"Width":90,"Height":30}"#).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    stdin.write_all(b"it\n").await.unwrap();
    // The client's end of input ends nothing at a terminal.
    stdin.shutdown().await.unwrap();
    stdout.read_to_string(&mut out).await.unwrap();
    assert!(out.contains("30 90") && out.contains("got it"), "{out}");
    assert!(streams.status().await.unwrap().contains(r#""message":"5""#));
}

#[tokio::test]
async fn all_of_a_large_output_comes_before_the_status() {
    const SIZE: usize = 100 << 20;
    let place = place().await;
    let since = Instant::now();
    let (_client, mut streams) = place.exec(&["head", "-c", "104857600", "/dev/zero"], PLAIN).await;
    let mut stdout = streams.stdout.take().unwrap();
    let (mut buffer, mut read) = (vec![0; 256 << 10], 0);
    loop {
        match stdout.read(&mut buffer).await.unwrap() {
            0 => break,
            count => read += count,
        }
    }
    println!("{:.0} MB/s through exec", SIZE as f64 / since.elapsed().as_secs_f64() / 1e6);
    assert_eq!(read, SIZE);
    assert!(streams.status().await.unwrap().contains("Success"));
}

#[tokio::test]
async fn a_daemon_that_a_command_leaves_does_not_keep_its_client() {
    let place = place().await;
    let run = place.run(&["sh", "-c", "sleep 5 & echo started"]);
    let (out, _, status) = timeout(Duration::from_secs(4), run).await.unwrap();
    assert_eq!(out, "started\n");
    assert!(status.contains("Success"), "{status}");
}

#[tokio::test]
async fn a_command_whose_client_goes_sees_its_pipes_closed() {
    let place = place().await;
    for command in [&["cat"][..], &["sh", "-c", "exec cat >/dev/null"][..]] {
        let (client, streams) = place.exec(command, Offer { stdin: true, ..PLAIN }).await;
        drop((client, streams));
    }
    let ended = async {
        while !place.init.commands.lock().values_mut().all(|c| c.try_wait().unwrap().is_some()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LIMIT, ended).await.unwrap();
}

#[tokio::test]
async fn an_attached_client_gets_all_output_and_the_end() {
    let place = place().await;
    let request = v1::AttachRequest {
        container_id: place.container.id.to_string(),
        stdin: true,
        tty: false,
        stdout: true,
        stderr: false,
    };
    let url = place.streaming.attach(request).await.unwrap().url;
    let (stream, _) = place.ask(&url, "v4.channel.k8s.io").await;
    let mut client = Client::new(stream).unwrap();
    let offer = Offer { stdin: true, stdout: true, stderr: false, tty: false };
    let mut streams = client.command(offer).await.unwrap();
    let mut stdin = streams.stdin.take().unwrap();
    stdin.write_all(b"in").await.unwrap();
    stdin.shutdown().await.unwrap();
    let ends = async {
        loop {
            let ends = std::mem::take(&mut *place.init.attached.lock());
            if !ends.is_empty() {
                return ends;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let mut ends = timeout(LIMIT, ends).await.unwrap();
    let (mut output, mut input) = (ends.pop().unwrap(), ends.pop().unwrap());
    let got = tokio::task::spawn_blocking(move || {
        let mut got = String::new();
        std::io::Read::read_to_string(&mut input, &mut got).unwrap();
        got
    });
    assert_eq!(got.await.unwrap(), "in");
    output.write_all(b"last words").unwrap();
    drop(output);
    place.end();
    let mut out = String::new();
    streams.stdout.take().unwrap().read_to_string(&mut out).await.unwrap();
    assert_eq!(out, "last words");
    assert!(streams.status().await.unwrap().contains("Success"));
}

#[tokio::test]
async fn ports_are_forwarded_in_parallel_and_a_closed_one_is_named() {
    let place = place().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let request = v1::PortForwardRequest { pod_sandbox_id: place.sandbox.id.to_string(), port: vec![] };
    let url = place.streaming.port_forward(request).await.unwrap().url;
    let (stream, _) = place.ask(&url, "portforward.k8s.io").await;
    let mut client = Client::new(stream).unwrap();
    let mut open = Vec::new();
    for id in 0..20 {
        open.push(client.forward(port, id).await.unwrap());
    }
    for (mut data, mut error) in open {
        data.write_all(b"ping").await.unwrap();
        data.shutdown().await.unwrap();
        let (mut back, mut said) = (String::new(), String::new());
        data.read_to_string(&mut back).await.unwrap();
        error.read_to_string(&mut said).await.unwrap();
        assert_eq!((back.as_str(), said.as_str()), ("ping", ""));
    }
    let (_data, mut error) = client.forward(closed, 99).await.unwrap();
    let mut said = String::new();
    error.read_to_string(&mut said).await.unwrap();
    let expected = format!("failed to connect to port {closed} in pod default/web: connection refused");
    assert!(said.contains(&expected), "{said}");
}

#[tokio::test]
async fn exec_sync_collects_bounds_and_gives_up() {
    let place = place().await;
    let ran = exec_sync(
        &place.rooms.state,
        &place.rooms.tasks,
        place.sync(&["sh", "-c", "echo a; echo b >&2; exit 3"], 0),
    )
    .await
    .unwrap();
    assert_eq!((ran.exit_code, &*ran.stdout, &*ran.stderr), (3, &b"a\n"[..], &b"b\n"[..]));
    let ran = exec_sync(
        &place.rooms.state,
        &place.rooms.tasks,
        place.sync(&["head", "-c", "20000000", "/dev/zero"], 20),
    )
    .await
    .unwrap();
    assert_eq!((ran.exit_code, ran.stdout.len()), (0, 16 << 20));
    let error =
        exec_sync(&place.rooms.state, &place.rooms.tasks, place.sync(&["sleep", "60"], 1)).await.unwrap_err();
    assert!(matches!(&error, Error::Timeout(text) if text.contains("sleep 60")), "{error}");
    let error = exec_sync(&place.rooms.state, &place.rooms.tasks, place.sync(&["/no/such/command"], 1))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("/no/such/command"), "{error}");
    // What the test itself started.
    for child in place.init.commands.lock().values_mut() {
        let _ = child.kill();
    }
}

#[test]
fn ports_of_the_request_stand_in_for_those_of_the_query() {
    let with =
        |uri: &str, ports: &[i32]| sessions::with_ports(&uri.parse().unwrap(), ports).map(|u| u.to_string());
    assert_eq!(with("/portforward/x", &[80, 443]).as_deref(), Some("/portforward/x?port=80&port=443"));
    assert_eq!(with("/portforward/x?port=1", &[80]), None);
    assert_eq!(with("/portforward/x", &[]), None);
}
