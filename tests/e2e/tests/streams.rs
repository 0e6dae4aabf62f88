//! What flows between kubectl and a container: logs, exec, attach, cp, port-forward; over SPDY and over WebSocket.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::Duration,
};

use moxlet_tests_e2e::{Cluster, Kubectl, LONG, Namespace, busybox, container, eventually};
use serde_json::json;

const IDLE: &str = "trap 'exit 0' TERM; while true; do sleep 1 & wait $!; done";
/// kubectl's switches between its two transports.
const TRANSPORTS: [&str; 2] = ["true", "false"];

/// kubectl on a terminal of its own, made by script(1); `keys` are typed once it runs.
fn on_a_terminal(ns: &Namespace, size: &str, args: &str, keys: &str) -> String {
    let cluster = Cluster::get();
    let line = format!("stty {size}; exec {} -n {} {args}", cluster.kubectl.display(), ns.name);
    let mut child = Command::new("script")
        .args(["-qefc", &line, "/dev/null"])
        .env("KUBECONFIG", &cluster.kubeconfig)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let keys = keys.to_owned();
    let typist = thread::spawn(move || {
        for line in keys.split_inclusive('\n') {
            thread::sleep(Duration::from_millis(1500));
            drop(stdin.write_all(line.as_bytes()));
        }
        // The terminal is kept until the program has ended by itself.
        thread::sleep(Duration::from_secs(5));
    });
    let mut text = String::new();
    let mut bytes = Vec::new();
    drop(child.stdout.take().unwrap().read_to_end(&mut bytes));
    text.push_str(&String::from_utf8_lossy(&bytes));
    drop(child.wait());
    drop(typist.join());
    text
}

#[test]
fn logs_by_tail_time_bytes_and_container() {
    let ns = Namespace::new("logs");
    let first = container(
        "first",
        "for i in 1 2 3 4 5; do echo line $i; done; sleep 3; echo late; sleep 1000",
        json!({}),
    );
    ns.pod_with(
        "talk",
        json!({"containers": [first, container("second", "echo other >&2; sleep 1000", json!({}))]}),
    );
    ns.wait_ready("talk");
    eventually("the late line", || {
        let text = ns.kubectl(&["logs", "talk", "-c", "first"]).ok();
        if text == "line 1\nline 2\nline 3\nline 4\nline 5\nlate\n" { Ok(()) } else { Err(text) }
    });
    let logs = |more: &[&str]| ns.kubectl(&[&["logs", "talk", "-c", "first"], more].concat()).ok();
    assert_eq!(logs(&["--tail=2"]), "line 5\nlate\n");
    assert_eq!(logs(&["--tail=0"]), "");
    assert_eq!(logs(&["--limit-bytes=9"]), "line 1\nli");
    let stamped = logs(&["--timestamps", "--tail=1"]);
    let (stamp, rest) = stamped.split_once(' ').unwrap();
    assert!(stamp.ends_with('Z') && stamp.contains('T') && rest == "late\n", "{stamped}");
    assert_eq!(logs(&[&format!("--since-time={stamp}")]), "late\n");
    assert!(logs(&["--since=10m"]).starts_with("line 1\n"));
    assert_eq!(ns.kubectl(&["logs", "talk", "-c", "second"]).ok(), "other\n");
    assert!(ns.kubectl(&["logs", "talk", "-c", "third"]).fails().contains("third"));
}

#[test]
fn followed_logs_come_as_they_are_written_and_end_with_the_container() {
    let ns = Namespace::new("follow");
    ns.pod_with("ticks", json!({"restartPolicy": "Never", "containers": [busybox("for i in 1 2 3 4; do echo $i; sleep 1; done")]}));
    ns.until("ticks", "started", LONG, |pod| (pod["status"]["phase"] != "Pending").then_some(()));
    assert_eq!(ns.kubectl(&["logs", "-f", "ticks"]).ok(), "1\n2\n3\n4\n");
}

#[test]
fn previous_logs_are_those_of_the_container_before() {
    let ns = Namespace::new("previous");
    let script = "n=$(cat /data/n 2>/dev/null || echo 0); echo run $n; echo $((n+1)) > /data/n; [ $n -ge 1 ] && sleep 1000; exit 1";
    let main = container("main", script, json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]}));
    ns.pod_with("again", json!({"containers": [main], "volumes": [{"name": "data", "emptyDir": {}}]}));
    ns.until("again", "second run", LONG, |pod| {
        let status = &pod["status"]["containerStatuses"][0];
        (status["restartCount"] == 1 && status["state"]["running"].is_object()).then_some(())
    });
    assert_eq!(ns.kubectl(&["logs", "again", "--previous"]).ok(), "run 0\n");
    assert_eq!(ns.logs("again"), "run 1\n");
}

#[test]
fn logs_reach_across_rotated_files() {
    let ns = Namespace::new("rotated");
    // 25 MB where a file is rotated at 10 MiB.
    let log = ns.output_of("big", json!({"containers": [busybox("seq -f '%099.0f' 1 250000 2>/dev/null || i=0; while [ ${i:-250000} -lt 250000 ]; do i=$((i+1)); printf '%099d\\n' $i; done")]}));
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.len(), 250_000);
    for (i, line) in lines.iter().enumerate() {
        assert_eq!(line.trim_start_matches('0'), (i + 1).to_string());
    }
    assert_eq!(ns.kubectl(&["logs", "big", "--tail=1"]).ok().trim().trim_start_matches('0'), "250000");
}

#[test]
fn a_line_of_a_megabyte_comes_out_whole() {
    let ns = Namespace::new("longline");
    let log = ns
        .output_of("long", json!({"containers": [busybox("head -c 1000000 /dev/zero | tr '\\0' x; echo")]}));
    assert_eq!(log.len(), 1_000_001);
    assert!(log.trim_end().bytes().all(|b| b == b'x'));
}

#[test]
fn exec_gives_the_exit_code_and_keeps_the_streams_apart() {
    let ns = Namespace::new("exec");
    ns.running("box", IDLE);
    for websockets in TRANSPORTS {
        let call = |script: &str| {
            ns.call(&["exec", "box", "--", "sh", "-c", script])
                .env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websockets)
                .run()
        };
        let done = call("echo out; echo err >&2; exit 42");
        assert_eq!(
            (done.code, done.text().as_str()),
            (42, "out\n"),
            "websockets={websockets}: {}",
            done.stderr
        );
        assert!(done.stderr.starts_with("err\n"), "{}", done.stderr);
        assert_eq!(call("true").code, 0);
        assert_eq!(call("kill -9 $$").code, 137);
        let missing = ns
            .call(&["exec", "box", "--", "/no/such"])
            .env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websockets)
            .run()
            .fails();
        assert!(missing.contains("/no/such"), "{missing}");
    }
}

#[test]
fn exec_takes_commands_as_long_as_a_kubelet_does() {
    let ns = Namespace::new("long-command");
    ns.running("box", IDLE);
    for websockets in TRANSPORTS {
        for length in [60_000, 70_000, 100_000] {
            let argument = "x".repeat(length);
            let done = ns
                .call(&["exec", "box", "--", "sh", "-c", "printf %s \"$1\" | wc -c", "sh", &argument])
                .env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websockets)
                .run();
            assert_eq!(done.text().trim(), length.to_string(), "websockets={websockets}: {}", done.stderr);
        }
    }
}

#[test]
fn exec_takes_stdin_to_its_end() {
    let ns = Namespace::new("stdin");
    ns.running("box", IDLE);
    let input: Vec<u8> = (0..3_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for websockets in TRANSPORTS {
        let done = ns
            .call(&["exec", "-i", "box", "--", "cat"])
            .env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", websockets)
            .stdin(input.clone())
            .run();
        assert_eq!(done.code, 0, "{}", done.stderr);
        assert!(done.stdout == input, "websockets={websockets}: {} bytes came back", done.stdout.len());
    }
}

#[test]
fn exec_on_a_terminal_has_its_size_and_follows_it() {
    let ns = Namespace::new("terminal");
    ns.running("box", IDLE);
    let size = on_a_terminal(&ns, "cols 123 rows 45", "exec -it box -- sh -c 'sleep 1; stty size; tty'", "");
    assert!(size.contains("45 123") && size.contains("/dev/pts/"), "{size}");
    let typed = on_a_terminal(&ns, "cols 80 rows 24", "exec -it box -- sh", "echo $((6*7))\nexit 0\n");
    assert!(typed.contains("42"), "{typed}");
    // The local terminal is resized while the command runs.
    let cluster = Cluster::get();
    let resize = format!(
        "stty cols 80 rows 24; t=$(tty); (sleep 3; stty -F $t cols 77 rows 33) & exec {} -n {} exec -it box -- sh -c 'sleep 6; stty size'",
        cluster.kubectl.display(),
        ns.name
    );
    let out = Command::new("script")
        .args(["-qefc", &resize, "/dev/null"])
        .env("KUBECONFIG", &cluster.kubeconfig)
        .stdin(Stdio::piped())
        .output()
        .unwrap();
    assert!(
        String::from_utf8_lossy(&out.stdout).contains("33 77"),
        "{}",
        String::from_utf8_lossy(&out.stdout)
    );
}

#[test]
fn attach_reads_what_is_written_and_writes_what_is_read() {
    let ns = Namespace::new("attach");
    let main = container(
        "main",
        "echo ready; while read line; do echo got $line; [ $line = end ] && exit 0; done",
        json!({"stdin": true}),
    );
    ns.pod_with("reader", json!({"restartPolicy": "Never", "containers": [main]}));
    ns.wait_ready("reader");
    let done = ns.call(&["attach", "-i", "reader"]).stdin("one\nend\n").run();
    assert!(
        done.text().contains("got one") && done.text().contains("got end"),
        "{}{}",
        done.text(),
        done.stderr
    );
    ns.wait_phase("reader", "Succeeded");
    assert_eq!(ns.logs("reader"), "ready\ngot one\ngot end\n");
}

#[test]
fn run_with_a_terminal_attaches_and_removes_the_pod() {
    let ns = Namespace::new("run");
    let overrides = json!({"spec": {"tolerations": moxlet_tests_e2e::tolerations()}}).to_string();
    let args = format!(
        "run -it --rm shell --restart=Never --image={} --overrides='{overrides}' -- sh",
        Cluster::get().image("busybox")
    );
    let text = on_a_terminal(&ns, "cols 80 rows 24", &args, "\necho $((6*7))\nexit\n");
    assert!(text.contains("42"), "{text}");
    ns.wait_gone("shell");
}

#[test]
fn a_hundred_megabytes_are_copied_both_ways() {
    let ns = Namespace::new("cp");
    ns.running("box", IDLE);
    let dir = tempfile::tempdir().unwrap();
    let (there, back) = (dir.path().join("there"), dir.path().join("back"));
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .take(100_000_000 / 8)
    .flatten()
    .collect();
    std::fs::write(&there, &bytes).unwrap();
    ns.kubectl(&["cp", there.to_str().unwrap(), "box:/root/data"]).ok();
    ns.kubectl(&["cp", "box:/root/data", back.to_str().unwrap()]).ok();
    assert!(std::fs::read(&back).unwrap() == bytes, "the bytes differ");
}

/// A `kubectl port-forward` and its local port; its output stays open, for it ends when it cannot write.
struct Forward(Child, u16, #[expect(dead_code, reason = "keeps the pipe open")] BufReader<ChildStdout>);

impl Forward {
    fn new(ns: &Namespace, pod: &str, port: u16, websockets: &str) -> Self {
        let mut child = ns
            .call(&["port-forward", pod, &format!(":{port}")])
            .env("KUBECTL_PORT_FORWARD_WEBSOCKETS", websockets)
            .spawn();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        let local = line.split(':').nth(1).and_then(|l| l.split(' ').next()).and_then(|p| p.parse().ok());
        let Some(local) = local else {
            drop(child.kill());
            panic!("port-forward said: {line}");
        };
        Self(child, local, output)
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn get(port: u16) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

#[test]
fn fifty_connections_are_forwarded_side_by_side() {
    let ns = Namespace::new("forward");
    ns.pod("web", json!({"name": "main", "image": Cluster::get().image("web")}));
    ns.wait_ready("web");
    for websockets in TRANSPORTS {
        let forward = Forward::new(&ns, "web", 80, websockets);
        let port = forward.1;
        let threads: Vec<_> = (0..50).map(|_| thread::spawn(move || get(port))).collect();
        for thread in threads {
            let text = thread.join().unwrap().unwrap();
            assert!(text.contains("200 OK") && text.contains("Moxlet"), "websockets={websockets}: {text}");
        }
    }
}

#[test]
fn a_forwarded_connection_can_be_closed_by_halves() {
    let ns = Namespace::new("half");
    // nc answers only once its input has ended.
    ns.running("echo", "while true; do nc -l -p 7000 -e sh -c 'wc -c'; done");
    for websockets in TRANSPORTS {
        // kubectl gives up where nobody listens yet: 7000 is 1B58 there.
        eventually("a listener", || {
            let sockets = ns.exec("echo", "cat /proc/net/tcp /proc/net/tcp6").text();
            if sockets.contains(":1B58 ") { Ok(()) } else { Err(sockets) }
        });
        let forward = Forward::new(&ns, "echo", 7000, websockets);
        let count = eventually("the count of what was sent", || {
            let mut stream = TcpStream::connect(("127.0.0.1", forward.1)).map_err(|e| e.to_string())?;
            stream.set_read_timeout(Some(Duration::from_secs(10))).map_err(|e| e.to_string())?;
            stream.write_all(&[b'x'; 100_000]).map_err(|e| e.to_string())?;
            stream.shutdown(std::net::Shutdown::Write).map_err(|e| e.to_string())?;
            let mut text = String::new();
            stream.read_to_string(&mut text).map_err(|e| e.to_string())?;
            if text.trim().is_empty() { Err("nothing".to_owned()) } else { Ok(text) }
        });
        assert_eq!(count.trim(), "100000", "websockets={websockets}");
    }
}

#[test]
fn a_port_where_nobody_listens_is_an_error_that_says_so() {
    let ns = Namespace::new("refusedport");
    ns.running("box", IDLE);
    let mut forward = Forward::new(&ns, "box", 81, "true");
    drop(get(forward.1));
    // kubectl says what went wrong and gives up.
    eventually("the end of kubectl", || match forward.0.try_wait() {
        Ok(Some(_)) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let mut text = String::new();
    drop(forward.0.stderr.take().unwrap().read_to_string(&mut text));
    assert!(text.contains("failed to connect to port 81"), "{text}");
}

#[test]
fn exec_into_a_pod_that_is_not_there_is_not_found() {
    assert!(
        Kubectl::new(Some("default"), &["exec", "nobody", "--", "true"]).run().fails().contains("not found")
    );
}
