//! moxlet-init in a real unprivileged CT: life and death of containers, their logs, and commands run in them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod init_ct;

use std::{
    fs,
    time::{Duration, Instant},
};

use init_ct::{CAPS, Ct, content};
use moxlet_init_proto::{Error, ErrorClass, Event, ExecRequest, Status, read_exit_record};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn value<'a>(text: &'a str, key: &str) -> &'a str {
    text.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_else(|| panic!("{key} in {text}")).trim()
}

fn start_error(error: &Error) -> String {
    assert_eq!(error.class(), Some(ErrorClass::StartError), "{error}");
    error.to_string()
}

#[tokio::test]
async fn a_container_starts_exits_and_is_forgotten() {
    let ct = Ct::start().await;
    let mut events = ct.client.events().await.unwrap();
    let begun = Instant::now();
    let state =
        ct.client.create(ct.request("a1", &["sh", "-c", "echo out; echo err >&2; exit 42"])).await.unwrap();
    assert_eq!(state.status, Status::Created);
    assert!(state.pid.is_some());
    let created = begun.elapsed();
    ct.client.start("a1").await.unwrap();
    println!("create {created:?}, create and start {:?}", begun.elapsed());
    assert!(
        matches!(events.next().await.unwrap(), Some(Event::Started { container }) if container.id == "a1")
    );
    assert!(
        matches!(events.next().await.unwrap(), Some(Event::Exited { container }) if container.id == "a1")
    );
    assert_eq!(ct.exited("a1").await, (42, None));
    let log = fs::read_to_string(ct.log_path("a1")).unwrap();
    assert!(log.contains(" stdout F out\n") && log.contains(" stderr F err\n"), "{log}");
    let record = read_exit_record(&ct.shared.join("state/a1.json")).unwrap().unwrap();
    assert!(matches!(record.status, Status::Exited { code: 42, signal: None, .. }), "{record:?}");
    assert_eq!(ct.client.start("a1").await.unwrap_err().class(), Some(ErrorClass::InvalidState));
    ct.client.remove("a1").await.unwrap();
    assert_eq!(ct.client.remove("a1").await.unwrap_err().class(), Some(ErrorClass::NotFound));
    assert!(ct.client.list().await.unwrap().is_empty());
    assert_eq!(read_exit_record(&ct.shared.join("state/a1.json")).unwrap(), None);
    assert_eq!(ct.client.version(), moxlet_init_proto::VERSION);
}

#[tokio::test]
async fn a_killed_container_exits_137_and_a_created_one_can_be_removed() {
    let ct = Ct::start().await;
    ct.run(ct.request("b1", &["sleep", "1000"])).await;
    assert_eq!(ct.client.remove("b1").await.unwrap_err().class(), Some(ErrorClass::InvalidState));
    ct.client.signal("b1", 9, false).await.unwrap();
    assert_eq!(ct.exited("b1").await, (137, Some(9)));
    assert_eq!(ct.client.signal("b1", 9, false).await.unwrap_err().class(), Some(ErrorClass::InvalidState));
    ct.client.create(ct.request("b2", &["sleep", "1000"])).await.unwrap();
    ct.client.remove("b2").await.unwrap();
    ct.run(ct.request("b3", &["sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.1; done"])).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    ct.client.signal("b3", 15, true).await.unwrap();
    assert_eq!(ct.exited("b3").await, (7, None));
}

#[tokio::test]
async fn a_command_that_cannot_be_executed_is_a_start_error() {
    let ct = Ct::start().await;
    for (id, command, words) in [
        ("c1", "foo", "exec: \"foo\": executable file not found in $PATH"),
        ("c2", "/foo", "exec: \"/foo\": stat /foo: no such file or directory"),
        ("c3", "/bin/plain", "exec: \"/bin/plain\": permission denied"),
    ] {
        ct.client.create(ct.request(id, &[command])).await.unwrap();
        assert_eq!(start_error(&ct.client.start(id).await.unwrap_err()), words);
        assert_eq!(ct.exited(id).await.0, 128);
        let record = read_exit_record(&ct.shared.join(format!("state/{id}.json"))).unwrap().unwrap();
        assert!(matches!(record.status, Status::Exited { code: 128, message: Some(m), .. } if m == words));
        ct.client.remove(id).await.unwrap();
    }
    let mut bad = ct.request("c4", &["true"]);
    bad.spec["mounts"][0]["source"] = json!("/nowhere");
    bad.spec["mounts"][0]["type"] = json!("bind");
    bad.spec["mounts"][0]["options"] = json!(["bind"]);
    let error = ct.client.create(bad).await.unwrap_err();
    assert_eq!(error.class(), Some(ErrorClass::Internal), "{error}");
    assert!(ct.client.list().await.unwrap().is_empty());
    let left = format!("/proc/{}/root/run/moxlet", ct.pid);
    assert_eq!(fs::read_dir(format!("{left}/bundles")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(format!("{left}/runtime")).unwrap().count(), 0);
}

#[tokio::test]
async fn start_and_exec_are_confined_alike() {
    let ct = Ct::start().await;
    let mut bits = 0_u64;
    for cap in CAPS {
        let numbers = [
            ("CHOWN", 0),
            ("DAC_OVERRIDE", 1),
            ("FOWNER", 3),
            ("FSETID", 4),
            ("KILL", 5),
            ("SETGID", 6),
            ("SETUID", 7),
            ("SETPCAP", 8),
            ("NET_BIND_SERVICE", 10),
            ("NET_RAW", 13),
            ("SYS_CHROOT", 18),
            ("MKNOD", 27),
            ("AUDIT_WRITE", 29),
            ("SETFCAP", 31),
        ];
        bits |= 1 << numbers.iter().find(|(n, _)| format!("CAP_{n}") == cap).unwrap().1;
    }
    for (id, no_new_privileges, user) in
        [("d1", false, 0), ("d2", true, 0), ("d3", true, 1000), ("d4", false, 1000)]
    {
        let mut request = ct.request(id, &["sh", "-c", "cat /proc/self/status; sleep 1000"]);
        request.spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        request.spec["process"]["user"] = json!({"uid": user, "gid": user, "additionalGids": [10, 20]});
        if user != 0 {
            request.spec["process"]["capabilities"] = json!({"bounding": CAPS});
        }
        ct.run(request).await;
        let deadline = Instant::now() + Duration::from_secs(10);
        while !ct.log(id).contains("ctxt_switches:") && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let (code, executed, err) = ct.exec(id, &["cat", "/proc/self/status"]).await;
        assert_eq!(code, 0, "{err}");
        for status in [&ct.log(id), &executed] {
            assert_eq!(value(status, "Seccomp:"), "2");
            assert_eq!(value(status, "NoNewPrivs:"), if no_new_privileges { "1" } else { "0" });
            let effective = u64::from_str_radix(value(status, "CapEff:"), 16).unwrap();
            assert_eq!(effective, if user == 0 { bits } else { 0 }, "{id}");
            assert_eq!(u64::from_str_radix(value(status, "CapBnd:"), 16).unwrap(), bits);
            assert_eq!(value(status, "Uid:"), format!("{user}\t{user}\t{user}\t{user}"));
            assert_eq!(value(status, "Groups:"), "10 20");
            assert_eq!(value(status, "SigIgn:"), "0000000000000000");
            assert_eq!(value(status, "SigBlk:"), "0000000000000000");
        }
    }
    let (_, masked, _) = ct
        .exec(
            "d1",
            &[
                "sh",
                "-c",
                "cat /proc/keys | head -c 9; echo x >/proc/sys/kernel/domainname; hostname; ls /sys/firmware",
            ],
        )
        .await;
    assert_eq!(masked, "test\n", "masked, read-only, the CT's name");
    let (_, _, err) = ct.exec("d1", &["sh", "-c", "echo 1 >/proc/sys/kernel/domainname"]).await;
    assert!(err.contains("Read-only file system"), "{err}");
    let mine = ct.exec("d1", &["cat", "/proc/self/cgroup"]).await.1;
    assert_eq!(mine, ct.exec("d1", &["cat", "/proc/1/cgroup"]).await.1, "the same cgroups");
    let host = ct.client.list().await.unwrap().into_iter().find(|c| c.id == "d1").unwrap().pid.unwrap();
    let seen = fs::read_to_string(format!("/proc/{}/root/proc/{host}/cgroup", ct.pid)).unwrap();
    assert!(seen.contains("/d1\n"), "{seen}");
}

/// A program that does `clone(flags)` by itself and exits with the error's number.
fn clone_program(flags: u32) -> Vec<u8> {
    let mut code = vec![0xb8, 56, 0, 0, 0, 0xbf];
    code.extend(flags.to_le_bytes());
    // xor esi/edx/r10/r8; syscall; neg eax; mov edi, eax; mov eax, 60 (exit); syscall
    code.extend([
        0x31, 0xf6, 0x31, 0xd2, 0x4d, 0x31, 0xd2, 0x4d, 0x31, 0xc0, 0x0f, 0x05, 0xf7, 0xd8, 0x89, 0xc7, 0xb8,
        60, 0, 0, 0, 0x0f, 0x05,
    ]);
    let size = (0x78 + code.len()) as u64;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0x3e, 0, 1, 0, 0, 0];
    elf.extend(0x40_0078_u64.to_le_bytes());
    elf.extend(0x40_u64.to_le_bytes());
    elf.extend(0_u64.to_le_bytes());
    elf.extend([0, 0, 0, 0, 0x40, 0, 0x38, 0, 1, 0, 0x40, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [0, 0x40_0000, 0x40_0000, size, size, 0x1000_u64] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

#[tokio::test]
async fn the_seccomp_profile_holds_in_start_and_exec() {
    use std::os::unix::fs::PermissionsExt;
    let ct = Ct::start().await;
    // EPERM for a new user namespace; a plain fork is allowed (0 in the child, minus its PID in the parent).
    for (id, flags, refused) in [("ee1", 0x1000_0011, true), ("ee2", 0x11, false)] {
        let request = ct.request(id, &["/bin/probe"]);
        let probe = ct.shared.join("rootfs").join(id).join("bin/probe");
        fs::write(&probe, clone_program(flags)).unwrap();
        fs::set_permissions(&probe, fs::Permissions::from_mode(0o755)).unwrap();
        ct.run(request).await;
        assert_eq!(ct.exited(id).await.0 == 1, refused, "start {id}");
        let holder = format!("{id}f");
        ct.run(ct.request(&holder, &["sleep", "1000"])).await;
        let probe = ct.shared.join("rootfs").join(&holder).join("bin/probe");
        fs::write(&probe, clone_program(flags)).unwrap();
        fs::set_permissions(&probe, fs::Permissions::from_mode(0o755)).unwrap();
        for turn in ["compiled", "kept"] {
            assert_eq!(ct.exec(&holder, &["/bin/probe"]).await.0 == 1, refused, "exec {id}, filter {turn}");
        }
    }
}

#[tokio::test]
async fn mounts_root_and_limits_are_as_asked() {
    let ct = Ct::start().await;
    let mut request = ct.request(
        "e1",
        &["sh", "-c", "touch /x; echo new >/tmp/file; cat /vol/hello; touch /vol/y; sleep 1000"],
    );
    fs::create_dir(ct.shared.join("vol")).unwrap();
    fs::write(ct.shared.join("vol/hello"), "hello\n").unwrap();
    request.spec["root"]["readonly"] = json!(true);
    request.spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 128}]);
    let mounts = request.spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/home", "type": "bind", "source": "/run/moxlet/pod/vol", "options": ["rbind", "ro", "rprivate"]}));
    mounts.push(
        json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=1m"]}),
    );
    ct.run(request).await;
    let (_, out, err) =
        ct.exec("e1", &["sh", "-c", "ulimit -n; cat /home/hello /tmp/file; touch /x; touch /home/y"]).await;
    assert_eq!(out, "64\nhello\nnew\n");
    assert_eq!(err.matches("Read-only file system").count(), 2, "{err}");
}

#[tokio::test]
async fn long_lines_are_parts_and_logs_rotate() {
    let ct = Ct::start().await;
    let (code, text) =
        ct.output("f1", &["sh", "-c", "head -c 40000 /dev/zero | tr '\\0' x; echo; printf end"]).await;
    assert_eq!(code, 0);
    assert_eq!(text, format!("{}\nend", "x".repeat(40000)));
    let raw = fs::read_to_string(ct.log_path("f1")).unwrap();
    assert_eq!(raw.lines().map(|l| l.split(' ').nth(2).unwrap()).collect::<String>(), "PPFP");
    let mut request = ct.request("f2", &["seq", "1", "20000"]);
    request.log_max_bytes = 200_000;
    request.log_max_files = 3;
    ct.run(request).await;
    ct.exited("f2").await;
    let mut files: Vec<_> =
        fs::read_dir(ct.shared.join("logs")).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|f| f.file_name().unwrap().to_str().unwrap().starts_with("f2.log."));
    files.sort();
    files.push(ct.log_path("f2"));
    assert_eq!(files.len(), 3, "{files:?}");
    let all: Vec<u8> = files.iter().flat_map(|f| content(&fs::read(f).unwrap())).collect();
    let numbers: Vec<u32> = String::from_utf8(all).unwrap().lines().map(|l| l.parse().unwrap()).collect();
    assert!(numbers.windows(2).all(|w| w[0] + 1 == w[1]) && numbers.last() == Some(&20000));
    assert!(files.iter().all(|f| fs::metadata(f).unwrap().len() <= 200_000));
}

#[tokio::test]
async fn fifty_megabytes_of_output_lose_no_line_and_init_stays_small() {
    let ct = Ct::start().await;
    let idle = ct.init_status_kb("VmRSS:");
    let begun = Instant::now();
    ct.run(ct.request("bb1", &["seq", "10000000", "15600000"])).await;
    ct.exited("bb1").await;
    println!("50 MB in {:?}", begun.elapsed());
    let text = content(&fs::read(ct.log_path("bb1")).unwrap());
    assert_eq!(text.len(), 5_600_001 * 9);
    assert!(
        text.split(|b| *b == b'\n')
            .zip(10_000_000_u32..)
            .all(|(l, n)| l.is_empty() || l == n.to_string().as_bytes())
    );
    println!(
        "VmRSS idle {idle} kB, after {} kB, highest {} kB",
        ct.init_status_kb("VmRSS:"),
        ct.init_status_kb("VmHWM:")
    );
    assert!(ct.init_status_kb("VmHWM:") < 4096);
}

#[tokio::test]
async fn a_terminal_is_logged_attached_and_resized() {
    let ct = Ct::start().await;
    let mut request = ct.request(
        "ab1",
        &["sh", "-c", "tty; stty size; read line; stty size; echo got $line; ls -l /dev/console | head -c 1"],
    );
    request.tty = true;
    request.stdin = true;
    ct.client.create(request).await.unwrap();
    let mut streams = ct.client.attach("ab1", true, true, true).await.unwrap();
    assert!(streams.stderr.is_none());
    ct.client.resize_tty("ab1", None, 100, 40).await.unwrap();
    ct.client.start("ab1").await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    ct.client.resize_tty("ab1", None, 90, 30).await.unwrap();
    streams.stdin.as_mut().unwrap().write_all(b"word\n").await.unwrap();
    let mut seen = String::new();
    streams.stdout.unwrap().read_to_string(&mut seen).await.unwrap();
    assert_eq!(ct.exited("ab1").await.0, 0);
    assert_eq!(
        seen,
        "/dev/console\r\n40 100\r\nword\r\n30 90\r\ngot word\r\nc"
            .replace("/dev/console", seen.lines().next().unwrap().trim_end())
    );
    assert!(seen.starts_with("/dev/"), "{seen}");
    assert!(ct.log("ab1").contains("got word\r\n"));
}

#[tokio::test]
async fn input_ends_with_the_first_attached_one_if_asked() {
    let ct = Ct::start().await;
    let mut request = ct.request("ac1", &["cat"]);
    (request.stdin, request.stdin_once) = (true, true);
    ct.run(request).await;
    let mut streams = ct.client.attach("ac1", true, true, true).await.unwrap();
    let mut second = ct.client.attach("ac1", true, true, false).await.unwrap();
    assert!(second.stdin.is_none());
    streams.stdin.take().unwrap().write_all(b"first").await.unwrap();
    assert_eq!(ct.exited("ac1").await.0, 0);
    for reader in [streams.stdout.as_mut().unwrap(), second.stdout.as_mut().unwrap()] {
        let mut text = String::new();
        reader.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "first");
    }
    let mut request = ct.request("ac2", &["cat"]);
    request.stdin = true;
    ct.run(request).await;
    for word in ["one\n", "two\n"] {
        let mut streams = ct.client.attach("ac2", true, true, false).await.unwrap();
        streams.stdin.take().unwrap().write_all(word.as_bytes()).await.unwrap();
        let mut echo = vec![0; word.len()];
        streams.stdout.unwrap().read_exact(&mut echo).await.unwrap();
        assert_eq!(echo, word.as_bytes());
    }
    ct.client.signal("ac2", 9, false).await.unwrap();
    ct.exited("ac2").await;
    assert_eq!(
        ct.client.attach("ac2", true, true, false).await.unwrap_err().class(),
        Some(ErrorClass::InvalidState)
    );
}

#[tokio::test]
async fn a_reader_that_sleeps_is_dropped_and_the_log_goes_on() {
    let ct = Ct::start().await;
    let mut request = ct.request("ad1", &["sh", "-c", "read go; seq 1000000 1400000; sleep 1000"]);
    request.stdin = true;
    ct.run(request).await;
    let mut streams = ct.client.attach("ad1", true, true, false).await.unwrap();
    streams.stdin.as_mut().unwrap().write_all(b"go\n").await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(15);
    while !ct.log("ad1").ends_with("1400000\n") {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut rest = Vec::new();
    streams.stdout.unwrap().read_to_end(&mut rest).await.unwrap();
    assert!(!rest.is_empty() && rest.len() < 3_200_008);
}

#[tokio::test]
async fn execs_have_streams_codes_and_errors() {
    let ct = Ct::start().await;
    ct.run(ct.request("ae1", &["sleep", "1000"])).await;
    assert_eq!(
        ct.exec("ae1", &["sh", "-c", "echo out; echo err >&2; exit 3"]).await,
        (3, "out\n".into(), "err\n".into())
    );
    assert_eq!(ct.exec("ae1", &["sh", "-c", "kill -9 $$"]).await.0, 137);
    assert_eq!(ct.exec("ae1", &["sh", "-c", "echo $COLOUR $HOME $PATH"]).await.1, "red /root /bin\n");
    let request = |args: &[&str]| ExecRequest {
        id: "ae1".into(),
        args: args.iter().map(|a| (*a).into()).collect(),
        ..ExecRequest::default()
    };
    let missing = ct.client.exec(request(&["foo"])).await.unwrap_err();
    assert_eq!(start_error(&missing), "exec: \"foo\": executable file not found in $PATH");
    let nowhere =
        ct.client.exec(ExecRequest { cwd: Some("/nowhere".into()), ..request(&["true"]) }).await.unwrap_err();
    assert!(start_error(&nowhere).contains("no such file or directory"), "{nowhere}");
    let mut with_input = request(&["cat"]);
    (with_input.stdin, with_input.stdout) = (true, true);
    let mut exec = ct.client.exec(with_input).await.unwrap();
    let data: Vec<u8> = (0..4_000_000_u32).map(|n| (n % 251) as u8).collect();
    let (mut stdin, mut stdout) = (exec.streams.stdin.take().unwrap(), exec.streams.stdout.take().unwrap());
    let mut back = Vec::new();
    let write = async {
        stdin.write_all(&data).await.unwrap();
        drop(stdin);
    };
    let (_, read) = tokio::join!(write, stdout.read_to_end(&mut back));
    read.unwrap();
    assert!(back == data);
    assert_eq!(ct.client.wait_exec(&exec.exec_id).await.unwrap(), 0);
    assert_eq!(ct.client.wait_exec(&exec.exec_id).await.unwrap_err().class(), Some(ErrorClass::NotFound));
    let mut times: Vec<_> = Vec::new();
    for _ in 0..20 {
        let begun = Instant::now();
        let exec = ct.client.exec(request(&["true"])).await.unwrap();
        assert_eq!(ct.client.wait_exec(&exec.exec_id).await.unwrap(), 0);
        times.push(begun.elapsed());
    }
    times.sort();
    println!("exec true: median {:?}, slowest {:?}", times[10], times[19]);
}

#[tokio::test]
async fn an_exec_with_a_terminal_is_resized() {
    let ct = Ct::start().await;
    ct.run(ct.request("af1", &["sleep", "1000"])).await;
    let request = ExecRequest {
        id: "af1".into(),
        args: ["sh", "-c", "tty; stty size; read x; stty size; exit 5"].map(String::from).to_vec(),
        tty: true,
        stdin: true,
        stdout: true,
        width: 70,
        height: 20,
        ..ExecRequest::default()
    };
    let exec = ct.client.exec(request).await.unwrap();
    let mut terminal = exec.streams.terminal.unwrap();
    let mut text = vec![0; 18];
    terminal.read_exact(&mut text).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&text), "/dev/pts/0\r\n20 70\r");
    ct.client.resize_tty("af1", Some(&exec.exec_id), 71, 21).await.unwrap();
    terminal.write_all(b"\n").await.unwrap();
    let mut rest = String::new();
    terminal.read_to_string(&mut rest).await.unwrap();
    assert!(rest.contains("21 71"), "{rest:?}");
    assert_eq!(ct.client.wait_exec(&exec.exec_id).await.unwrap(), 5);
}

#[tokio::test]
async fn orphans_are_reaped_and_ports_are_reached() {
    let ct = Ct::start().await;
    let mut request = ct.request("ba1", &["sh", "-c", "(sleep 0.2 &); (sleep 0.2 &); nc -l -p 8080 -e cat"]);
    // Without a PID namespace of its own the orphans are PID 1's.
    request.spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "cgroup"}]);
    ct.run(request).await;
    assert!(ct.client.connect_port(81).await.is_err());
    tokio::time::sleep(Duration::from_millis(600)).await;
    let mut stream = ct.client.connect_port(8080).await.unwrap();
    stream.write_all(b"ping").await.unwrap();
    let mut echo = [0; 4];
    stream.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"ping");
    let zombies = fs::read_dir(format!("/proc/{}/root/proc", ct.pid))
        .unwrap()
        .filter_map(|e| fs::read_to_string(e.unwrap().path().join("stat")).ok())
        .filter(|s| s.rsplit(") ").next().unwrap().starts_with('Z'))
        .count();
    assert_eq!(zombies, 0);
}

#[tokio::test]
async fn a_signal_to_init_stops_all_and_leaves_records() {
    for signal in [number("TERM"), number("PWR"), number("INT"), number("RTMIN+3")] {
        let ct = Ct::start().await;
        ct.run(ct.request("e1", &["sh", "-c", "trap 'exit 9' TERM; while :; do sleep 0.1; done"])).await;
        ct.run(ct.request("e2", &["sleep", "1000"])).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        let begun = Instant::now();
        kill(ct.pid, signal);
        while fs::metadata(format!("/proc/{}", ct.pid)).is_ok() {
            assert!(begun.elapsed() < Duration::from_secs(10), "signal {signal}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let code = |id: &str| match read_exit_record(&ct.shared.join(format!("state/{id}.json")))
            .unwrap()
            .unwrap()
            .status
        {
            Status::Exited { code, .. } => code,
            other => panic!("{other:?}"),
        };
        assert_eq!((code("e1"), code("e2")), (9, 137));
    }
}

#[tokio::test]
async fn shutdown_is_a_request_too() {
    let ct = Ct::start().await;
    ct.run(ct.request("f1", &["sleep", "1000"])).await;
    ct.client.shutdown(Duration::from_millis(200)).await.unwrap();
    assert!(read_exit_record(&ct.shared.join("state/f1.json")).unwrap().is_some());
}

fn number(name: &str) -> i32 {
    match name {
        "INT" => 2,
        "TERM" => 15,
        "PWR" => 30,
        _ => 37,
    }
}

fn kill(pid: u32, signal: i32) {
    let done =
        std::process::Command::new("kill").arg(format!("-{signal}")).arg(pid.to_string()).status().unwrap();
    assert!(done.success());
}

#[tokio::test]
async fn a_user_opens_its_standard_streams_by_name_and_has_a_home() {
    let ct = Ct::start().await;
    let script =
        "echo one >/dev/stdout && echo two >/dev/stderr && echo three >/proc/self/fd/1; echo HOME=$HOME";
    let mut request = ct.request("ac1", &["sh", "-c", &format!("{script}; sleep 1000")]);
    // The image's passwd has no line for this one.
    request.spec["process"]["user"] = json!({"uid": 12345, "gid": 2000});
    request.spec["process"]["capabilities"] = json!({"bounding": CAPS});
    ct.run(request).await;
    let deadline = Instant::now() + Duration::from_secs(10);
    while !ct.log("ac1").contains("HOME=") && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut lines: Vec<String> = ct.log("ac1").lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["HOME=/", "one", "three", "two"]);
    let (code, out, err) = ct.exec("ac1", &["sh", "-c", script]).await;
    assert_eq!((code, out.as_str(), err.as_str()), (0, "one\nthree\nHOME=/\n", "two\n"));
}

#[tokio::test]
async fn what_a_container_in_the_pods_pid_namespace_leaves_ends_with_it() {
    let ct = Ct::start().await;
    let mut request = ct.request("ad1", &["sh", "-c", "sleep 1234 & sleep 1234 & sleep 1; exit 5"]);
    request.spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "cgroup"}]);
    ct.run(request).await;
    assert_eq!(ct.exited("ad1").await, (5, None));
    let left = || {
        let processes = fs::read_dir(format!("/proc/{}/root/proc", ct.pid)).unwrap().flatten();
        processes
            .filter(|p| fs::read(p.path().join("cmdline")).is_ok_and(|c| c == b"sleep\x001234\0"))
            .count()
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    while left() > 0 && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(left(), 0);
}
