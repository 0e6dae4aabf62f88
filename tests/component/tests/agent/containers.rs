//! The life of a container, its log, and commands run in it.

use std::time::{Duration, Instant};

use moxlet_cri::{annotations, host, v1};
use moxlet_tests_component::{
    host::{Host, container, sleeper},
    pve,
    wait::until,
};
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn a_container_lives_and_nothing_is_left_of_its_pod() {
    let host = Host::start().await;
    let pod = host.pod("life").await;
    let ready = host.pod_status(&pod.id).await.unwrap();
    assert_eq!(ready.state(), v1::PodSandboxState::SandboxReady);
    let range = if pve::is_engine() { "10.10." } else { "10.248." };
    assert!(ready.network.unwrap().ip.starts_with(range));

    let mut config = container("main", "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.1; done");
    config.envs = vec![v1::KeyValue { key: "COLOUR".into(), value: b"red".to_vec() }];
    let id = host.create(&pod, config).await.unwrap();
    let made = host.status(&id).await.unwrap();
    assert_eq!(made.state(), v1::ContainerState::ContainerCreated);
    assert!(made.created_at > 0 && made.started_at == 0 && made.image_id.starts_with("sha256:"), "{made:?}");
    host.start_container(&id).await.unwrap();
    let runs = host.status(&id).await.unwrap();
    assert_eq!(runs.state(), v1::ContainerState::ContainerRunning);
    assert!(runs.started_at >= runs.created_at && runs.finished_at == 0, "{runs:?}");

    let done =
        host.exec(&id, &["sh", "-c", "echo out $COLOUR; echo err >&2; hostname; exit 3"]).await.unwrap();
    assert_eq!(done, (3, "out red\nlife\n".to_owned(), "err\n".to_owned()));
    until("the container's first words", async || match host.log(&id).await {
        log if log == "up\n" => Ok(()),
        log => Err(log),
    })
    .await;
    let stats = host.runtime().container_stats(v1::ContainerStatsRequest { container_id: id.clone() }).await;
    let stats = stats.unwrap().into_inner().stats.unwrap();
    let number = |v: Option<v1::UInt64Value>| v.map_or(0, |v| v.value);
    assert!(number(stats.cpu.unwrap().usage_core_nano_seconds) > 0);
    assert!(number(stats.memory.unwrap().working_set_bytes) > 0);
    let of_pod =
        host.runtime().pod_sandbox_stats(v1::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() }).await;
    let of_pod = of_pod.unwrap().into_inner().stats.unwrap().linux.unwrap();
    assert_eq!(of_pod.containers.len(), 1);
    assert!(number(of_pod.process.unwrap().process_count) >= 2, "the init and the container");
    let interface = of_pod.network.unwrap().default_interface.unwrap();
    assert_eq!(interface.name, "eth0");
    // Both are of the time since somebody asked before, or since the container was made.
    until("a rate and a measurement", async || {
        let request = v1::ContainerStatsRequest { container_id: id.clone() };
        let stats = host.runtime().container_stats(request).await.unwrap().into_inner().stats.unwrap();
        match (stats.cpu.unwrap().usage_nano_cores, &stats.writable_layer) {
            (Some(_), Some(_)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let verbose = v1::ContainerStatusRequest { container_id: id.clone(), verbose: true };
    let info = host.runtime().container_status(verbose).await.unwrap().into_inner().info;
    assert!(info["info"].contains(&pod.id) && !info["info"].contains("COLOUR"), "{info:?}");
    let verbose = v1::PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: true };
    let info = host.runtime().pod_sandbox_status(verbose).await.unwrap().into_inner().info;
    assert!(info["info"].contains("\"pid\":"), "{info:?}");

    host.stop_container(&id, 10).await.unwrap();
    let ended = host.status(&id).await.unwrap();
    assert_eq!((ended.state(), ended.exit_code), (v1::ContainerState::ContainerExited, 7));
    assert_eq!(ended.reason, "Error");
    assert!(ended.finished_at >= ended.started_at && ended.started_at == runs.started_at, "{ended:?}");
    assert_eq!(host.log(&id).await, "up\nbye\n");
    host.stop_container(&id, 10).await.unwrap();
    host.remove_container(&id).await.unwrap();
    assert_eq!(host.status(&id).await.unwrap_err().code(), Code::NotFound);
    host.stop_pod(&pod.id).await.unwrap();
    assert_eq!(host.pod_status(&pod.id).await.unwrap().state(), v1::PodSandboxState::SandboxNotready);
    host.remove_pod(&pod.id).await.unwrap();
    assert_eq!(host.pod_status(&pod.id).await.unwrap_err().code(), Code::NotFound);
    host.nothing_is_left().await;
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_is_missing_is_a_start_error_that_names_it() {
    let host = Host::start().await;
    let pod = host.pod("missing").await;
    let mut config = container("main", "");
    config.command = vec!["/no/such-command".into()];
    let id = host.create(&pod, config).await.unwrap();
    let error = host.start_container(&id).await.unwrap_err();
    assert!(error.message().contains("/no/such-command"), "{error:?}");
    let status = host.status(&id).await.unwrap();
    assert_eq!((status.state(), status.exit_code), (v1::ContainerState::ContainerExited, 128));
    assert_eq!(status.reason, "StartError");
    assert!(status.message.contains("/no/such-command"), "{}", status.message);
    assert!(status.finished_at > 0);
    assert!(host.start_container(&id).await.is_err(), "it is started once");
    host.remove_container(&id).await.unwrap();
    let id = host.run(&pod, sleeper("main")).await;
    assert_eq!(host.status(&id).await.unwrap().state(), v1::ContainerState::ContainerRunning);
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_ignores_its_stop_signal_is_killed_after_its_grace() {
    let host = Host::start().await;
    let pod = host.pod("stubborn").await;
    let id = host.run(&pod, container("main", "trap '' TERM; echo up; while :; do sleep 0.1; done")).await;
    until("the trap", async || if host.log(&id).await.is_empty() { Err("no log".into()) } else { Ok(()) })
        .await;
    let begun = Instant::now();
    host.stop_container(&id, 1).await.unwrap();
    assert!(
        (Duration::from_secs(1)..Duration::from_secs(8)).contains(&begun.elapsed()),
        "{:?}",
        begun.elapsed()
    );
    let status = host.status(&id).await.unwrap();
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stop_signal_of_the_request_is_sent() {
    let host = Host::start().await;
    let pod = host.pod("signal").await;
    let mut config =
        container("main", "trap 'exit 41' USR1; trap 'exit 42' TERM; echo up; while :; do sleep 0.1; done");
    config.stop_signal = v1::Signal::Sigusr1 as i32;
    let id = host.run(&pod, config).await;
    until("the traps", async || if host.log(&id).await.is_empty() { Err("no log".into()) } else { Ok(()) })
        .await;
    host.stop_container(&id, 10).await.unwrap();
    assert_eq!(host.status(&id).await.unwrap().exit_code, 41);
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_of_a_pod_share_network_and_shm_and_not_their_roots_and_processes() {
    let host = Host::start().await;
    let pod = host.pod("shared").await;
    let one = host
        .run(
            &pod,
            container("one", "echo mine >/file; echo ours >/dev/shm/file; exec nc -ll -p 8080 -e echo hello"),
        )
        .await;
    let two = host.run(&pod, sleeper("two")).await;
    let seen = until("a neighbour's port", async || {
        let (code, out, err) =
            host.exec(&two, &["sh", "-c", "nc -w 2 127.0.0.1 8080 </dev/null"]).await.unwrap();
        if code == 0 && !out.is_empty() { Ok(out) } else { Err(format!("{code} {out} {err}")) }
    })
    .await;
    assert_eq!(seen.trim(), "hello");
    assert_eq!(host.sh(&two, "cat /dev/shm/file; ls /file 2>&1 | grep -c 'No such'").await, "ours\n1");
    assert_eq!(host.sh(&two, "ps | grep -c '[n]c -ll' || true").await, "0");
    assert_eq!(host.sh(&one, "cat /etc/hostname").await, "shared");
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_see_one_another_where_the_pod_shares_processes() {
    let host = Host::start().await;
    let mut config = host.pod_config("together");
    let options = v1::NamespaceOption { pid: v1::NamespaceMode::Pod as i32, ..Default::default() };
    let security =
        v1::LinuxSandboxSecurityContext { namespace_options: Some(options.clone()), ..Default::default() };
    config.linux = Some(v1::LinuxPodSandboxConfig { security_context: Some(security), ..Default::default() });
    let pod = host.try_pod(config).await.unwrap();
    let shared = |mut config: v1::ContainerConfig| {
        let security = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
        security.namespace_options = Some(options.clone());
        config
    };
    host.run(&pod, shared(container("one", "exec sleep 4242"))).await;
    let two = host.run(&pod, shared(sleeper("two"))).await;
    assert_eq!(host.sh(&two, "ps | grep -c '[s]leep 4242'").await, "1");
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_without_a_word_of_namespaces_ends_at_once_by_a_signal_that_it_does_not_handle() {
    let host = Host::start().await;
    let pod = host.pod("plain").await;
    let mut config = container("main", "exec sleep 1000");
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options = None;
    let id = host.run(&pod, config).await;
    let begun = Instant::now();
    host.stop_container(&id, 600).await.unwrap();
    // Process 1 of a namespace would lose the signal and be killed after the 600 s.
    assert_eq!(host.status(&id).await.unwrap().exit_code, 143, "{:?}", begun.elapsed());
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_memory_limit_that_nothing_starts_with_is_named() {
    let host = Host::start().await;
    let pod = host.pod("small").await;
    let mut config = sleeper("main");
    config.linux.as_mut().unwrap().resources =
        Some(v1::LinuxContainerResources { memory_limit_in_bytes: 1, ..Default::default() });
    let id = host.create(&pod, config).await.unwrap();
    let error = host.start_container(&id).await.unwrap_err().to_string();
    assert!(error.contains("memory limit of 1 bytes"), "{error}");
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_a_container_leaves_what_the_host_has_mounted_below_its_mounts() {
    use moxlet_storage::mounts;
    let host = Host::start().await;
    let pod = host.pod("mounts").await;
    let dir = tempfile::tempdir().unwrap();
    mounts::make_shared_dir(dir.path()).unwrap();
    let below = dir.path().join("below");
    std::fs::create_dir(&below).unwrap();
    rustix::mount::mount("t", &below, "tmpfs", rustix::mount::MountFlags::empty(), None::<&std::ffi::CStr>)
        .unwrap();
    std::fs::write(below.join("file"), "theirs").unwrap();
    let mut config = sleeper("main");
    config.mounts = vec![v1::Mount {
        host_path: dir.path().display().to_string(),
        container_path: "/data".into(),
        readonly: true,
        ..v1::Mount::default()
    }];
    let id = host.run(&pod, config).await;
    let seen = host.sh(&id, "cat /data/below/file; touch /data/x 2>&1 | grep -c Read-only; grep -c '/data.*nodev' /proc/mounts").await;
    host.stop_container(&id, 0).await.unwrap();
    host.remove_container(&id).await.unwrap();
    let stays = mounts::is_mounted(&below).unwrap();
    mounts::unmount_all_below(dir.path()).unwrap();
    mounts::unmount(dir.path()).unwrap();
    assert!(stays, "the host's own mount is gone");
    assert_eq!(seen, "theirs1\n2");
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_has_a_bound_of_processes_and_may_listen_on_low_ports() {
    let host = Host::start().await;
    let pod = host.pod("bounds").await;
    let id = host.run(&pod, sleeper("main")).await;
    assert_eq!(
        host.sh(&id, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range")
            .await,
        "0\n0\t65535"
    );
    // Proxmox VE names its cgroups by VMID; what it is given is in its engine's own tests.
    if !pve::is_engine() {
        let bound = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"]
            .into_iter()
            .find_map(|root| std::fs::read_to_string(format!("{root}/lxc.payload.{}/pids.max", pod.id)).ok());
        assert_eq!(bound.unwrap().trim(), "4096");
    }
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_termination_message_is_read_while_and_after_it_runs() {
    let host = Host::start().await;
    let pod = host.pod("message").await;
    let mut config = container(
        "main",
        "echo first >/dev/my-message; sleep 1; head -c 5000 /dev/zero | tr '\\0' x >/dev/my-message",
    );
    config.annotations =
        [(annotations::TERMINATION_MESSAGE_PATH.to_owned(), "/dev/my-message".to_owned())].into();
    let id = host.run(&pod, config).await;
    let message = async || {
        let request = host::TerminationMessageRequest { container_id: id.clone() };
        String::from_utf8(host.service().termination_message(request).await.unwrap().into_inner().data)
            .unwrap()
    };
    until("the first message", async || match message().await {
        text if text == "first\n" => Ok(()),
        text => Err(text),
    })
    .await;
    host.exited(&id).await;
    assert_eq!(message().await, "x".repeat(4096), "as much as a pod's status takes");
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_outlives_its_container_as_a_file_until_that_is_removed() {
    let host = Host::start().await;
    let pod = host.pod("logs").await;
    let id = host.run(&pod, container("main", "seq 1 5; echo oops >&2")).await;
    host.exited(&id).await;
    let by_id = host::StreamLogsRequest { container_id: id.clone(), ..Default::default() };
    let of = |stream: &str| host::StreamLogsRequest { stream: Some(stream.into()), ..by_id.clone() };
    assert_eq!(host.logs(of("stdout")).await.unwrap(), "1\n2\n3\n4\n5\n");
    assert_eq!(host.logs(of("stderr")).await.unwrap(), "oops\n");
    let tail = host::StreamLogsRequest { tail_lines: Some(2), ..by_id.clone() };
    assert_eq!(host.logs(tail).await.unwrap().lines().count(), 2);
    let asked = host::StreamLogsRequest { follow: true, ..by_id.clone() };
    assert_eq!(host.logs(asked).await.unwrap().lines().count(), 6, "a follower of an ended container ends");
    let stamped = host::StreamLogsRequest { timestamps: true, ..of("stderr") };
    let stamped = host.logs(stamped).await.unwrap();
    assert!(stamped.starts_with("20") && stamped.ends_with("Z oops\n"), "{stamped}");
    let path = host.status(&id).await.unwrap().log_path;
    assert!(std::fs::read_to_string(&path).unwrap().contains(" stderr F oops\n"));
    host.remove_container(&id).await.unwrap();
    assert!(!std::path::Path::new(&path).exists());
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_container_of_a_name_and_attempt_is_refused() {
    let host = Host::start().await;
    let pod = host.pod("twice").await;
    let id = host.run(&pod, sleeper("main")).await;
    let error = host.create(&pod, sleeper("main")).await.unwrap_err();
    assert!(error.message().contains(&id) && error.message().contains("main"), "{error:?}");
    let mut again = sleeper("main");
    again.metadata.as_mut().unwrap().attempt = 1;
    again.log_path = "main/1.log".into();
    host.run(&pod, again).await;
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_exist_is_removed_and_stopped_and_has_no_status() {
    let host = Host::start().await;
    let id = "0123456789abcdef0123456789abcdef";
    host.stop_container(id, 1).await.unwrap();
    host.remove_container(id).await.unwrap();
    host.stop_pod(id).await.unwrap();
    host.remove_pod(id).await.unwrap();
    assert_eq!(host.status(id).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(host.pod_status(id).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(host.exec(id, &["true"]).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(host.start_container(id).await.unwrap_err().code(), Code::NotFound);
    let asked = host::StreamLogsRequest { container_id: id.into(), ..Default::default() };
    assert_eq!(host.logs(asked).await.unwrap_err().code(), Code::NotFound);
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_takes_too_long_is_killed_and_one_that_is_missing_is_an_error() {
    let host = Host::start().await;
    let pod = host.pod("exec").await;
    let id = host.run(&pod, sleeper("main")).await;
    let slow = |timeout: i64| {
        let cmd = ["sh", "-c", "sleep 4321; true"].map(Into::into).to_vec();
        v1::ExecSyncRequest { container_id: id.clone(), cmd, timeout }
    };
    let processes = async || host.sh(&id, "ps | grep -c '[s]leep 4321' || true").await;
    let count = async |wanted: &str| {
        until("the command to come or go", async || match processes().await {
            seen if seen == wanted => Ok(()),
            seen => Err(seen),
        })
        .await;
    };
    assert_eq!(host.runtime().exec_sync(slow(1)).await.unwrap_err().code(), Code::DeadlineExceeded);
    // Nobody waits for what the command itself had started: killed with it, it may go a moment later.
    count("0").await;
    // A caller that goes away leaves nothing behind either.
    let mut runtime = host.runtime();
    let call = tokio::spawn({
        let request = slow(0);
        async move { runtime.exec_sync(request).await }
    });
    count("2").await;
    call.abort();
    count("0").await;
    let error = host.exec(&id, &["no-such-command"]).await.unwrap_err();
    assert!(error.message().contains("no-such-command"), "{error:?}");
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_user_of_a_container_is_in_its_status_and_masked_paths_are_not_read() {
    let host = Host::start().await;
    let pod = host.pod("security").await;
    let mut config = sleeper("main");
    let security = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    security.run_as_user = Some(v1::Int64Value { value: 1000 });
    security.supplemental_groups = vec![1234];
    security.masked_paths = vec!["/etc/group".into(), "/home".into()];
    security.readonly_paths = vec!["/tmp".into()];
    let id = host.run(&pod, config).await;
    let user = host.status(&id).await.unwrap().user.unwrap().linux.unwrap();
    assert_eq!((user.uid, user.gid, user.supplemental_groups), (1000, 1000, vec![1000, 1234]));
    assert_eq!(host.sh(&id, "id -u; id -G").await, "1000\n1000 1234");
    assert_eq!(host.sh(&id, "cat /etc/group; ls -A /home").await, "");
    let (code, _, err) = host.exec(&id, &["touch", "/tmp/x"]).await.unwrap();
    assert!(code != 0 && err.contains("Read-only file system"), "{err}");
    host.end().await;
}
