//! Limits of containers, the kernel's OOM killer and AppArmor's profile. All is read from the host's side.

use std::{
    fs,
    path::{Path, PathBuf},
};

use moxlet_cri::{annotations, v1};
use moxlet_tests_component::{
    host::{Host, container, sleeper},
    pve,
    wait::until,
};

/// The file of a container's cgroup: named by cgroup v1, or as v2 names it.
fn file(container: &str, v1: &str, v2: &str) -> PathBuf {
    fn find(dir: &Path, container: &str, depth: u32, into: &mut Vec<PathBuf>) {
        for path in fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_dir())
        {
            if path.ends_with(container) {
                into.push(path);
            } else if depth > 0 {
                find(&path, container, depth - 1, into);
            }
        }
    }
    let mut found = Vec::new();
    find(Path::new("/sys/fs/cgroup"), container, 3, &mut found);
    let named = found.iter().flat_map(|dir| [dir.join(v1), dir.join(v2)]).find(|path| path.exists());
    named.unwrap_or_else(|| panic!("neither {v1} nor {v2} in {found:?}"))
}

fn read(container: &str, v1: &str, v2: &str) -> String {
    fs::read_to_string(file(container, v1, v2)).unwrap().trim().to_owned()
}

fn memory(container: &str) -> String {
    read(container, "memory.limit_in_bytes", "memory.max")
}

fn limited(mut config: v1::ContainerConfig, memory_mib: i64) -> v1::ContainerConfig {
    config.linux.as_mut().unwrap().resources = Some(v1::LinuxContainerResources {
        memory_limit_in_bytes: memory_mib << 20,
        cpu_quota: 50_000,
        cpu_period: 100_000,
        cpu_shares: 512,
        unified: [("pids.max".to_owned(), "40".to_owned())].into(),
        ..v1::LinuxContainerResources::default()
    });
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn a_containers_limits_hold_and_it_cannot_raise_them() {
    let host = Host::start().await;
    let pod = host.pod("limited").await;
    let id = host.run(&pod, limited(sleeper("main"), 64)).await;
    let all = || (memory(&id), read(&id, "cpu.cfs_quota_us", "cpu.max"), read(&id, "pids.max", "pids.max"));
    let before = all();
    assert_eq!((before.0.as_str(), before.2.as_str()), ("67108864", "40"));
    assert!(before.1.starts_with("50000"), "{}", before.1);
    let script = "find / -xdev -maxdepth 0 >/dev/null; n=0
        for f in $(find /sys/fs/cgroup -name 'memory.*limit*' -o -name memory.max -o -name pids.max -o -name 'cpu.cfs_*' -o -name cpu.max); do
          n=$((n+1)); for v in -1 max 1073741824 99; do echo $v >$f; done
        done 2>/dev/null; mount -o remount,rw /sys/fs/cgroup/memory 2>/dev/null; echo $n";
    let tried: u32 = host.sh(&id, script).await.parse().unwrap();
    assert!(tried >= 3, "the container sees its limits");
    assert_eq!(all(), before);
    let (_, out, err) =
        host.exec(&id, &["sh", "-c", "for i in $(seq 100); do sleep 5 & done; wait"]).await.unwrap();
    assert!(err.contains("fork"), "{out}{err}");
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_a_running_container_are_changed() {
    let host = Host::start().await;
    let pod = host.pod("resized").await;
    let id = host.run(&pod, limited(sleeper("main"), 64)).await;
    for mib in [128, 32] {
        let linux = limited(sleeper("main"), mib).linux.unwrap().resources;
        let request =
            v1::UpdateContainerResourcesRequest { container_id: id.clone(), linux, ..Default::default() };
        host.runtime().update_container_resources(request).await.unwrap();
        assert_eq!(memory(&id), (mib << 20).to_string());
    }
    let update = async |linux: v1::LinuxContainerResources| {
        let request = v1::UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(linux),
            ..Default::default()
        };
        host.runtime().update_container_resources(request).await.map(drop)
    };
    update(v1::LinuxContainerResources { cpu_period: 200_000, oom_score_adj: 700, ..Default::default() })
        .await
        .unwrap();
    let period = read(&id, "cpu.cfs_period_us", "cpu.max");
    assert!(period.ends_with("200000"), "{period}");
    assert_eq!(host.sh(&id, "cat /proc/1/oom_score_adj").await, "700");
    update(v1::LinuxContainerResources { memory_limit_in_bytes: -1, ..Default::default() }).await.unwrap();
    assert!(memory(&id) == "max" || memory(&id).parse::<u64>().unwrap() > 1 << 60, "{}", memory(&id));
    let refused = update(v1::LinuxContainerResources { cpuset_cpus: "0".into(), ..Default::default() })
        .await
        .unwrap_err();
    assert!(
        refused.code() == tonic::Code::Unimplemented && refused.message().contains("cpuset"),
        "{refused:?}"
    );
    let status = host.status(&id).await.unwrap();
    assert_eq!(status.stop_signal(), v1::Signal::Sigterm);
    let shown = status.resources.unwrap().linux.unwrap();
    assert_eq!((shown.cpu_period, shown.cpu_quota, shown.cpu_shares), (200_000, 50_000, 512));
    assert_eq!((shown.memory_limit_in_bytes, shown.oom_score_adj), (-1, 700));
    host.stop_container(&id, 0).await.unwrap();
    let request = v1::UpdateContainerResourcesRequest { container_id: id.clone(), ..Default::default() };
    assert!(host.runtime().update_container_resources(request).await.unwrap_err().message().contains(&id));
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_beyond_its_memory_is_oom_killed_and_says_so() {
    let host = Host::start().await;
    let pod = host.pod("hog").await;
    let hog = host.run(&pod, limited(container("hog", "exec tail /dev/zero"), 24)).await;
    let neighbour = host.run(&pod, limited(sleeper("neighbour"), 24)).await;
    let status = host.exited(&hog).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    assert_eq!(host.status(&neighbour).await.unwrap().state(), v1::ContainerState::ContainerRunning);
    // A child is the victim here and the container lives on.
    let survivor =
        host.run(&pod, limited(container("survivor", "tail /dev/zero; echo child ended with $?"), 24)).await;
    let status = host.exited(&survivor).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
    assert!(host.log(&survivor).await.contains("child ended with 137"));
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn oom_score_adj_is_that_of_the_request() {
    let host = Host::start().await;
    let pod = host.pod("score").await;
    let mut by_resources = limited(sleeper("resources"), 64);
    by_resources.linux.as_mut().unwrap().resources.as_mut().unwrap().oom_score_adj = 900;
    let id = host.run(&pod, by_resources).await;
    assert_eq!(host.sh(&id, "cat /proc/1/oom_score_adj").await, "900");
    let mut by_note = container("note", "cat /proc/self/oom_score_adj; exec sleep 1000");
    by_note.annotations = [(annotations::OOM_SCORE_ADJ.to_owned(), "777".to_owned())].into();
    let id = host.run(&pod, by_note).await;
    until("the container's own view", async || match host.log(&id).await {
        log if log == "777\n" => Ok(()),
        log => Err(log),
    })
    .await;
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_is_under_the_profile_of_its_ct_where_the_host_has_apparmor() {
    let host = Host::start().await;
    let pod = host.pod("confined").await;
    let id = host.run(&pod, sleeper("main")).await;
    let has_apparmor =
        fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.trim() == "Y");
    let process = read(&id, "cgroup.procs", "cgroup.procs");
    let label = fs::read_to_string(format!("/proc/{process}/attr/current")).unwrap_or_default();
    let name = pve::vmid(host.root(), &pod.id).unwrap_or_else(|| pod.id.clone());
    assert_eq!(label.contains(&name) && label.trim_end().ends_with("(enforce)"), has_apparmor, "{label}");
    host.end().await;
}
