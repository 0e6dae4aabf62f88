//! Sandboxes: made, listed, stopped and removed, many at once.

use std::{
    collections::{BTreeSet, HashMap},
    os::unix::fs::PermissionsExt,
};

use moxlet_cri::v1;
use moxlet_tests_component::{
    host::{Host, container, sleeper},
    pve, traces,
    wait::until,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_is_removed_takes_its_running_containers_along() {
    let host = Host::start().await;
    let pod = host.pod("busy").await;
    host.run(&pod, container("ignores", "trap '' TERM; while :; do sleep 0.1; done")).await;
    host.run(&pod, sleeper("sleeps")).await;
    host.create(&pod, sleeper("made")).await.unwrap();
    host.remove_pod(&pod.id).await.unwrap();
    let left =
        host.runtime().list_containers(v1::ListContainersRequest::default()).await.unwrap().into_inner();
    assert!(left.containers.is_empty(), "{left:?}");
    host.nothing_is_left().await;
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_is_stopped_twice_and_its_containers_have_ended() {
    let host = Host::start().await;
    let pod = host.pod("stopped").await;
    let id = host.run(&pod, sleeper("main")).await;
    let ip = host.pod_status(&pod.id).await.unwrap().network.unwrap().ip;
    assert_eq!(traces::allotted(host.root()), [ip]);
    host.stop_pod(&pod.id).await.unwrap();
    host.stop_pod(&pod.id).await.unwrap();
    assert_eq!(host.pod_status(&pod.id).await.unwrap().state(), v1::PodSandboxState::SandboxNotready);
    // On Proxmox VE the address stands in the CT's configuration for as long as there is one.
    assert_eq!(traces::allotted(host.root()).is_empty(), !pve::is_engine(), "its address is free");
    let status = host.status(&id).await.unwrap();
    assert_eq!((status.state(), status.exit_code), (v1::ContainerState::ContainerExited, 137));
    let error = host.create(&pod, sleeper("late")).await.unwrap_err();
    assert!(error.message().contains("not ready"), "{error:?}");
    host.remove_container(&id).await.unwrap();
    host.remove_pod(&pod.id).await.unwrap();
    host.remove_pod(&pod.id).await.unwrap();
    host.nothing_is_left().await;
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_init_hangs_is_stopped_and_removed() {
    let mut host = Host::start().await;
    for taken_over in [false, true] {
        let pod = host.pod("hung").await;
        let id = host.run(&pod, sleeper("main")).await;
        let made = host.create(&pod, container("made", "true")).await.unwrap();
        crate::recovery::hang_init(&pod.id);
        if taken_over {
            host.stop_agent().await;
            host.start_agent().await;
        }
        let error = host.stop_container(&id, 1).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error:?}");
        // A start that waits for it does not keep the CT from being stopped; of one taken over it is gone already.
        let start = async { host.start_container(&made).await.unwrap_err() };
        let (_, stopped) = tokio::join!(start, host.stop_pod(&pod.id));
        stopped.unwrap();
        assert_eq!(crate::recovery::processes(&pod.id), Vec::<u32>::new());
        assert_eq!(host.status(&id).await.unwrap().state(), v1::ContainerState::ContainerExited);
        host.remove_pod(&pod.id).await.unwrap();
        // Without a stop before: RemovePodSandbox ends it by itself.
        let pod = host.pod("hung").await;
        crate::recovery::hang_init(&pod.id);
        host.remove_pod(&pod.id).await.unwrap();
        host.nothing_is_left().await;
    }
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_full_of_commands_refuses_more_and_is_stopped_all_the_same() {
    let host = Host::start().await;
    let pod = host.pod("execs").await;
    let id = host.run(&pod, sleeper("main")).await;
    let sleep = async || {
        let cmd = ["sleep", "1000"].map(Into::into).to_vec();
        let request = v1::ExecSyncRequest { container_id: id.clone(), cmd, timeout: 0 };
        // Who is not let in at once, since so many come together, tries again until the container has ended.
        while let Err(error) = host.runtime().exec_sync(request.clone()).await
            && error.code() != tonic::Code::FailedPrecondition
        {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let crowd = join((0..128).map(|_| sleep()));
    let stop = async {
        until("no room for a command", async || match host.exec(&id, &["true"]).await {
            Err(error) if error.code() == tonic::Code::ResourceExhausted => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
        host.stop_container(&id, 1).await.unwrap();
        host.stop_pod(&pod.id).await.unwrap();
    };
    let (_, ()) = tokio::join!(crowd, stop);
    assert_eq!(host.status(&id).await.unwrap().state(), v1::ContainerState::ContainerExited);
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_logs_are_roots_alone_and_nothing_runs_from_them() {
    let host = Host::start().await;
    let pod = host.pod("logs").await;
    let id = host.run(&pod, container("main", "echo a; exec sleep 1000")).await;
    until("a log", async || match host.log(&id).await {
        log if log.contains('a') => Ok(()),
        log => Err(log),
    })
    .await;
    let logs = std::path::PathBuf::from(&pod.config.log_directory);
    for dir in [logs.parent().unwrap(), &logs, &logs.join("main")] {
        let mode = std::fs::metadata(dir).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode, 0o700, "{}", dir.display());
    }
    let mut seen = 0;
    for pid in crate::recovery::processes(&pod.id) {
        let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
        for line in mounts.lines().filter(|l| l.split(' ').nth(4).is_some_and(|at| at.ends_with("/pod/logs")))
        {
            let options = line.split(' ').nth(5).unwrap();
            seen += 1;
            assert!(
                ["nosuid", "nodev", "noexec"].iter().all(|o| options.split(',').any(|i| i == *o)),
                "{line}"
            );
        }
    }
    assert_ne!(seen, 0);
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_sandboxes_at_once_have_twenty_addresses_and_leave_nothing() {
    let host = Host::start().await;
    let all = (0..20).map(|n| host.pod_config(&format!("crowd{n}")));
    let made = join(all.map(|config| host.try_pod(config))).await;
    let pods: Vec<_> = made.into_iter().map(Result::unwrap).collect();
    let mut addresses = BTreeSet::new();
    for pod in &pods {
        addresses.insert(host.pod_status(&pod.id).await.unwrap().network.unwrap().ip);
    }
    assert_eq!(addresses.len(), 20, "{addresses:?}");
    for removed in join(pods.iter().map(|pod| host.remove_pod(&pod.id))).await {
        removed.unwrap();
    }
    host.nothing_is_left().await;
    host.end().await;
}

/// All of them at once, the results in their order.
async fn join<T>(all: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    futures::future::join_all(all).await
}

#[tokio::test(flavor = "multi_thread")]
async fn of_one_pod_and_attempt_there_is_one_sandbox_however_many_ask_at_once() {
    let host = Host::start().await;
    let made = join((0..4).map(|_| host.try_pod(host.pod_config("single")))).await;
    let (good, bad): (Vec<_>, Vec<_>) = made.into_iter().partition(Result::is_ok);
    assert_eq!(good.len(), 1);
    let id = &good[0].as_ref().unwrap().id;
    for error in bad.into_iter().map(Result::unwrap_err) {
        assert!(error.message().contains("default/single") && error.message().contains(id), "{error:?}");
    }
    let mut next = host.pod_config("single");
    next.metadata.as_mut().unwrap().attempt = 1;
    host.try_pod(next).await.unwrap();
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_filtered_by_state_label_and_beginning_of_an_id() {
    let host = Host::start().await;
    let labels = |text: &str| {
        HashMap::from([("app".to_owned(), text.to_owned()), ("all".to_owned(), "yes".to_owned())])
    };
    let mut made = Vec::new();
    for name in ["web", "db"] {
        let mut config = host.pod_config(name);
        config.labels = labels(name);
        let pod = host.try_pod(config).await.unwrap();
        let mut config = sleeper(name);
        config.labels = labels(name);
        let id = host.run(&pod, config).await;
        made.push((pod, id));
    }
    let (db, of_db) = &made[1];
    host.stop_pod(&db.id).await.unwrap();

    let pods = async |filter: v1::PodSandboxFilter| {
        let request = v1::ListPodSandboxRequest { filter: Some(filter) };
        let items = host.runtime().list_pod_sandbox(request).await.unwrap().into_inner().items;
        items.into_iter().map(|i| i.metadata.unwrap().name).collect::<BTreeSet<_>>()
    };
    let names = |all: &[&str]| all.iter().map(|n| (*n).to_owned()).collect::<BTreeSet<_>>();
    let filter = v1::PodSandboxFilter::default;
    let state = |s: v1::PodSandboxState| Some(v1::PodSandboxStateValue { state: s as i32 });
    assert_eq!(pods(filter()).await, names(&["web", "db"]));
    assert_eq!(pods(v1::PodSandboxFilter { id: db.id[..12].into(), ..filter() }).await, names(&["db"]));
    assert_eq!(
        pods(v1::PodSandboxFilter { state: state(v1::PodSandboxState::SandboxReady), ..filter() }).await,
        names(&["web"])
    );
    let selector = v1::PodSandboxFilter { label_selector: labels("web"), ..filter() };
    assert_eq!(pods(selector.clone()).await, names(&["web"]));
    assert!(
        pods(v1::PodSandboxFilter { id: db.id.clone(), ..selector }).await.is_empty(),
        "all conditions hold"
    );

    let containers = async |filter: v1::ContainerFilter| {
        let request = v1::ListContainersRequest { filter: Some(filter) };
        let items = host.runtime().list_containers(request).await.unwrap().into_inner().containers;
        items.into_iter().map(|i| i.metadata.unwrap().name).collect::<BTreeSet<_>>()
    };
    let filter = v1::ContainerFilter::default;
    let state = |s: v1::ContainerState| Some(v1::ContainerStateValue { state: s as i32 });
    assert_eq!(containers(filter()).await, names(&["web", "db"]));
    let asked = v1::ContainerFilter { state: state(v1::ContainerState::ContainerExited), ..filter() };
    assert_eq!(containers(asked).await, names(&["db"]));
    assert_eq!(
        containers(v1::ContainerFilter { pod_sandbox_id: db.id.clone(), ..filter() }).await,
        names(&["db"])
    );
    assert_eq!(containers(v1::ContainerFilter { id: of_db[..10].into(), ..filter() }).await, names(&["db"]));
    assert_eq!(
        containers(v1::ContainerFilter { label_selector: labels("web"), ..filter() }).await,
        names(&["web"])
    );
    assert_eq!(host.status(&of_db[..10]).await.unwrap().id, *of_db);
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_sandbox_asks_of_its_network_and_kernel_is_seen_in_it() {
    let host = Host::start().await;
    let mut config = host.pod_config("asks");
    config.dns_config = Some(v1::DnsConfig {
        servers: vec!["10.96.0.10".into()],
        searches: vec!["default.svc.cluster.local".into()],
        options: vec!["ndots:5".into()],
    });
    config.linux.as_mut().unwrap().sysctls =
        [("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())].into();
    let pod = host.try_pod(config).await.unwrap();
    let id = host.run(&pod, sleeper("main")).await;
    let resolv = host.sh(&id, "cat /etc/resolv.conf").await;
    assert!(resolv.contains("nameserver 10.96.0.10") && resolv.contains("ndots:5"), "{resolv}");
    assert_eq!(host.sh(&id, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start").await, "0");
    let ip = host.pod_status(&pod.id).await.unwrap().network.unwrap().ip;
    assert!(host.sh(&id, "ip -4 address show dev eth0").await.contains(&ip));
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_without_a_host_name_has_that_of_its_pod() {
    let host = Host::start().await;
    let mut config = host.pod_config("nameless");
    config.hostname.clear();
    let pod = host.try_pod(config).await.unwrap();
    let id = host.run(&pod, sleeper("main")).await;
    assert_eq!(host.sh(&id, "hostname; cat /etc/hostname").await, "nameless\nnameless");
    let mut config = host.pod_config("no_host-name");
    config.hostname.clear();
    let pod = host.try_pod(config).await.unwrap();
    let id = host.run(&pod, sleeper("main")).await;
    assert_eq!(host.sh(&id, "hostname").await, pod.id);
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_whose_init_dies_is_not_ready_and_its_container_has_ended() {
    let host = Host::start().await;
    let pod = host.pod("dies").await;
    let id = host.run(&pod, sleeper("main")).await;
    crate::recovery::kill_init(&pod.id);
    until("the sandbox to be noticed", async || match host.pod_status(&pod.id).await.unwrap().state() {
        v1::PodSandboxState::SandboxNotready => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    let status = host.exited(&id).await;
    assert_ne!(status.exit_code, 0);
    host.end().await;
}
