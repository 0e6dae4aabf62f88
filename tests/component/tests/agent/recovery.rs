//! An agent that ends and comes again: what runs is taken over, what is half made or belongs to nobody goes.

use std::{fs, os::unix::fs::DirBuilderExt, path::Path};

use moxlet_cri::{
    host::{ApplyVolumeRequest, VolumeKind},
    v1,
};
use moxlet_tests_component::{
    host::{Host, container, mounted, sleeper},
    pve, store, traces,
    wait::until,
};
use rustix::process::{Pid, Signal, kill_process};

/// All processes of a CT as the host numbers them.
pub(crate) fn processes(sandbox: &str) -> Vec<u32> {
    let payload = if pve::is_engine() { "/lxc/".to_owned() } else { format!("/lxc.payload.{sandbox}") };
    // Proxmox VE's cgroups have numbers; then the pod is known by what is mounted.
    let mounted = format!("/pods/{sandbox}");
    let has = |pid: &u32, file: &str, text: &str| {
        fs::read_to_string(format!("/proc/{pid}/{file}")).is_ok_and(|t| t.contains(text))
    };
    let all = fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    all.filter(|pid| has(pid, "cgroup", &payload) && (!pve::is_engine() || has(pid, "mountinfo", &mounted)))
        .collect()
}

/// PID 1 of a CT.
fn init(sandbox: &str) -> u32 {
    let is_init = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let numbers =
            status.lines().find_map(|l| l.strip_prefix("NSpid:")).unwrap_or_default().split_whitespace();
        numbers.skip(1).eq(["1"])
    };
    processes(sandbox).into_iter().find(is_init).unwrap()
}

/// `kill -9` of a CT's PID 1, and with it of all its processes.
pub(crate) fn kill_init(sandbox: &str) {
    kill_process(Pid::from_raw(init(sandbox).cast_signed()).unwrap(), Signal::KILL).unwrap();
}

/// Stops a CT's PID 1 as if it hung; only SIGKILL ends it then.
pub(crate) fn hang_init(sandbox: &str) {
    kill_process(Pid::from_raw(init(sandbox).cast_signed()).unwrap(), Signal::STOP).unwrap();
}

async fn no_process(sandbox: &str) {
    until("the CT's processes to end", async || match processes(sandbox) {
        left if left.is_empty() => Ok(()),
        left => Err(format!("{left:?}")),
    })
    .await;
}

/// A program's process in a CT: its number and when it was started.
fn process(sandbox: &str, command: &str) -> Option<(u32, String)> {
    let matches = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).replace('\0', " ").trim() == command
    };
    let pid = processes(sandbox).into_iter().find(matches)?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some((pid, stat.rsplit(") ").next()?.split(' ').nth(19)?.to_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_container_is_taken_over_as_it_is() {
    let mut host = Host::start().await;
    let pod = host.pod("stays").await;
    let id = host.run(&pod, container("main", "trap 'exit 6' TERM; echo up; sleep 4711 & wait")).await;
    let before =
        until("the container's process", async || process(&pod.id, "sleep 4711").ok_or_else(String::new))
            .await;
    let (status, pod_status) = (host.status(&id).await.unwrap(), host.pod_status(&pod.id).await.unwrap());
    host.stop_agent().await;
    assert_eq!(process(&pod.id, "sleep 4711"), Some(before.clone()));
    host.start_agent().await;
    assert_eq!(host.status(&id).await.unwrap(), status, "known from the first answer on");
    assert_eq!(host.pod_status(&pod.id).await.unwrap(), pod_status);
    assert_eq!(process(&pod.id, "sleep 4711"), Some(before));
    assert_eq!(host.sh(&id, "echo here").await, "here");
    assert_eq!(host.log(&id).await, "up\n");
    host.stop_container(&id, 10).await.unwrap();
    assert_eq!(host.status(&id).await.unwrap().exit_code, 6);
    let other = host.pod("after").await;
    assert_ne!(host.pod_status(&other.id).await.unwrap().network, pod_status.network);
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_while_the_agent_is_away_is_known_with_its_code() {
    let mut host = Host::start().await;
    let pod = host.pod("exits").await;
    let asked =
        ApplyVolumeRequest { name: "v".into(), kind: VolumeKind::EmptyDir as i32, ..Default::default() };
    let volume = host.volume(&pod.config, asked).await.unwrap();
    let mut config = container("main", "while [ ! -e /v/go ]; do sleep 0.1; done; echo going; exit 9");
    config.mounts = vec![mounted(&volume, "/v")];
    let id = host.run(&pod, config).await;
    let other = host.run(&pod, sleeper("other")).await;
    host.stop_agent().await;
    fs::write(Path::new(&volume).join("go"), "").unwrap();
    let record = host.root().join(format!("pods/{}/state/{id}.json", pod.id));
    until("the exit record", async || if record.exists() { Ok(()) } else { Err(String::new()) }).await;
    host.start_agent().await;
    let status = host.status(&id).await.unwrap();
    assert_eq!((status.state(), status.exit_code), (v1::ContainerState::ContainerExited, 9));
    assert!(status.finished_at >= status.started_at && status.started_at > 0, "{status:?}");
    assert_eq!(host.log(&id).await, "going\n");
    assert_eq!(host.status(&other).await.unwrap().state(), v1::ContainerState::ContainerRunning);
    host.stop_agent().await;
    host.start_agent().await;
    assert_eq!(host.status(&id).await.unwrap(), status, "it is known for good");
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ct_that_was_killed_while_the_agent_is_away_is_not_ready() {
    let mut host = Host::start().await;
    let pod = host.pod("killed").await;
    let id = host.run(&pod, sleeper("main")).await;
    host.stop_agent().await;
    kill_init(&pod.id);
    no_process(&pod.id).await;
    host.start_agent().await;
    assert_eq!(host.pod_status(&pod.id).await.unwrap().state(), v1::PodSandboxState::SandboxNotready);
    let status = host.status(&id).await.unwrap();
    assert_eq!((status.state(), status.exit_code), (v1::ContainerState::ContainerExited, 137));
    assert_eq!(status.reason, "ContainerStatusUnknown");
    // On Proxmox VE the address stands in the CT's configuration, and is the CT's until that is removed.
    assert!(pve::is_engine() || traces::allotted(host.root()).is_empty(), "its address is free");
    host.remove_container(&id).await.unwrap();
    host.remove_pod(&pod.id).await.unwrap();
    host.nothing_is_left().await;
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_was_not_started_is_made_anew() {
    let mut host = Host::start().await;
    let pod = host.pod("made").await;
    let id = host.create(&pod, sleeper("main")).await.unwrap();
    host.stop_agent().await;
    host.start_agent().await;
    assert!(host.status(&id).await.is_err());
    assert!(store::roots(&host.config).is_empty());
    let again = host.run(&pod, sleeper("main")).await;
    assert_eq!(host.status(&again).await.unwrap().state(), v1::ContainerState::ContainerRunning);
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_was_half_made_is_removed() {
    let mut host = Host::start().await;
    let (half, whole) = (host.pod("half").await, host.pod("whole").await);
    host.run(&half, sleeper("main")).await;
    let id = host.run(&whole, sleeper("main")).await;
    host.stop_agent().await;
    let file = host.root().join(format!("ledger/sandboxes/{}.json", half.id));
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(r#""phase":"ready""#), "{text}");
    fs::write(&file, text.replace(r#""phase":"ready""#, r#""phase":"creating""#)).unwrap();
    host.start_agent().await;
    assert!(host.pod_status(&half.id).await.is_err());
    assert!(processes(&half.id).is_empty());
    assert_eq!(host.status(&id).await.unwrap().state(), v1::ContainerState::ContainerRunning);
    host.remove_pod(&whole.id).await.unwrap();
    host.nothing_is_left().await;
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_sandbox_of_the_ledger_owns_is_removed() {
    let mut host = Host::start().await;
    let (lost, kept) = (host.pod("lost").await, host.pod("kept").await);
    host.run(&lost, sleeper("main")).await;
    let id = host.run(&kept, sleeper("main")).await;
    host.stop_agent().await;
    let root = host.root().to_owned();
    // A whole pod that runs and is not in the ledger: CT, mounts, address, container.
    fs::remove_file(root.join(format!("ledger/sandboxes/{}.json", lost.id))).unwrap();
    // And single things as a crash leaves them.
    let stray = |digit: &str| digit.repeat(32);
    if !pve::is_engine() {
        fs::create_dir(root.join(format!("lxc/ct/{}", stray("a")))).unwrap();
    }
    let shared = root.join(format!("pods/{}/ctr/x/rootfs", stray("b")));
    fs::DirBuilder::new().recursive(true).mode(0o711).create(&shared).unwrap();
    let flags = rustix::mount::MountFlags::NODEV;
    rustix::mount::mount("stray", &shared, "tmpfs", flags, None::<&std::ffi::CStr>).unwrap();
    if pve::is_engine() {
        fs::write(root.join("addresses/10.10.99.99"), stray("c")).unwrap();
    } else {
        let allotments = root.join("cni/ipam/moxlet");
        let range = host.config.pod_cidr.as_deref().unwrap().trim_end_matches(".0/24").to_owned();
        fs::write(allotments.join(format!("{range}.77")), format!("{}\r\neth0", stray("c"))).unwrap();
    }
    store::make_stray(&host.config, &stray("d"));
    fs::write(root.join("ledger/sandboxes/.half.tmp"), "{").unwrap();

    host.start_agent().await;
    assert!(host.pod_status(&lost.id).await.is_err());
    assert!(processes(&lost.id).is_empty());
    assert_eq!(host.status(&id).await.unwrap().state(), v1::ContainerState::ContainerRunning);
    assert_eq!(traces::allotted(&root), [host.pod_status(&kept.id).await.unwrap().network.unwrap().ip]);
    assert_eq!(store::roots(&host.config), [id]);
    assert_eq!(store::unfinished(&host.config), Vec::<String>::new());
    host.remove_pod(&kept.id).await.unwrap();
    host.nothing_is_left().await;
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_was_cut_short_is_ended() {
    let mut host = Host::start().await;
    let pod = host.pod("removed").await;
    let id = host.run(&pod, container("main", "exit 3")).await;
    host.exited(&id).await;
    host.stop_agent().await;
    // As if the agent had ended between the removal of a root and that of its record.
    moxlet_storage::mounts::unmount_all_below(&host.root().join(format!("pods/{}/ctr", pod.id))).unwrap();
    store::remove_root(&host.config, &id);
    host.start_agent().await;
    assert_eq!(host.status(&id).await.unwrap().exit_code, 3);
    host.remove_container(&id).await.unwrap();
    host.remove_pod(&pod.id).await.unwrap();
    host.nothing_is_left().await;
    host.end().await;
}

/// Cuts a file in half, as a disk may do that loses power.
fn cut(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_record_is_put_aside_and_what_it_was_of_is_removed() {
    let mut host = Host::start().await;
    let (lost, stays) = (host.pod("lost").await, host.pod("stays").await);
    host.run(&lost, sleeper("main")).await;
    let (unknown, known) = (
        host.run(&stays, container("unknown", "exec sleep 4712")).await,
        host.run(&stays, sleeper("known")).await,
    );
    host.stop_agent().await;
    let ledger = host.root().join("ledger");
    cut(&ledger.join(format!("sandboxes/{}.json", lost.id)));
    cut(&ledger.join(format!("containers/{unknown}.json")));
    host.start_agent().await;
    assert!(host.pod_status(&lost.id).await.is_err());
    assert_eq!(processes(&lost.id), Vec::<u32>::new());
    assert_eq!(host.status(&known).await.unwrap().state(), v1::ContainerState::ContainerRunning);
    assert!(host.status(&unknown).await.is_err());
    assert_eq!(process(&stays.id, "sleep 4712"), None, "nobody knows of it, so that it would run twice");
    for name in [&lost.id, &unknown] {
        assert!(ledger.join(format!("damaged/{name}.json")).exists());
    }
    // Whoever wanted it makes it anew, by the same name.
    host.run(&stays, container("unknown", "exec sleep 4712")).await;
    host.end().await;
}
