//! The store below an agent: quotas of containers, and what an agent that has ended keeps busy.

use moxlet_cri::v1;
use moxlet_tests_component::{
    host::{Host, sleeper},
    store::{self, Bed, Pool, run},
    wait::until,
};

const QUOTA: u64 = 8 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_uses_up_its_quota_is_told_so_and_its_pod_goes_on() {
    for bed in Bed::all_with_quota() {
        println!("on {bed:?}");
        let host = Host::start_on(bed, |config| config.container_root_quota = Some(QUOTA)).await;
        let pod = host.pod("quota").await;
        let (id, other) = (host.run(&pod, sleeper("main")).await, host.run(&pod, sleeper("other")).await);
        let fill = "n=0; while [ $n -lt 64 ] && dd if=/dev/urandom of=/fill.$n bs=1M count=1 conv=fsync 2>/dev/shm/why; do
                      n=$((n+1))
                    done; echo $n; cat /dev/shm/why";
        let (_, said, _) = host.exec(&id, &["sh", "-c", fill]).await.unwrap();
        let (written, why) = said.split_once('\n').unwrap();
        let written: u64 = written.parse().unwrap();
        assert!(((QUOTA >> 20) * 3 / 4..=(QUOTA >> 20) * 2).contains(&written), "{said}");
        assert!(why.contains("quota exceeded") || why.contains("No space left"), "{said}");
        for id in [&id, &other] {
            assert_eq!(host.status(id).await.unwrap().state(), v1::ContainerState::ContainerRunning);
        }
        assert_eq!(host.sh(&other, "echo yes >/file; cat /file").await, "yes");
        host.sh(&id, "rm /fill.*").await;
        until("room again", async || match host.exec(&id, &["sh", "-c", "sync; echo again >/file"]).await {
            Ok((0, ..)) => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
        host.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_is_exported_once_agent_and_pods_have_ended_and_brings_its_images_back() {
    let Some(pool) = Pool::create() else { return };
    let mut host = Host::start_on(Bed::Zfs(pool.name.clone()), |_| ()).await;
    let pod = host.pod("exported").await;
    let id = host.run(&pod, sleeper("main")).await;
    host.stop_agent().await;
    run("zpool", &["export", &pool.name]).expect_err("a pod runs on it");
    host.start_agent().await;
    assert_eq!(host.status(&id).await.unwrap().state(), v1::ContainerState::ContainerRunning);
    host.remove_pod(&pod.id).await.unwrap();
    host.nothing_is_left().await;
    host.stop_agent().await;
    assert_eq!(store::mounts(&host.config), Vec::<std::path::PathBuf>::new());
    run("zpool", &["export", &pool.name]).unwrap();
    pool.import();
    host.start_agent().await;
    let pod = host.pod("again").await;
    host.run(&pod, sleeper("main")).await;
    host.end().await;
}
