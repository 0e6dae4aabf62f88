//! Volumes of every kind as a container sees them.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use moxlet_cri::{
    host::{self, VolumeKind},
    v1,
};
use moxlet_tests_component::{
    host::{Host, Pod, mounted, sleeper},
    wait::until,
};

fn volume(kind: VolumeKind, name: &str) -> host::ApplyVolumeRequest {
    host::ApplyVolumeRequest { kind: kind as i32, name: name.into(), ..Default::default() }
}

fn files(kind: VolumeKind, name: &str, all: &[(&str, &str, u32)]) -> host::ApplyVolumeRequest {
    let file = |(path, data, mode): &(&str, &str, u32)| host::VolumeFile {
        path: (*path).into(),
        data: data.as_bytes().to_vec(),
        mode: *mode,
    };
    host::ApplyVolumeRequest { files: all.iter().map(file).collect(), ..volume(kind, name) }
}

/// A container that sleeps with these mounts, as this user with the volumes' group.
async fn user(host: &Host, pod: &Pod, name: &str, mounts: Vec<v1::Mount>) -> String {
    let mut config = sleeper(name);
    config.mounts = mounts;
    let security = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    security.run_as_user = Some(v1::Int64Value { value: 1000 });
    security.supplemental_groups = vec![2000];
    host.run(pod, config).await
}

#[tokio::test(flavor = "multi_thread")]
async fn empty_dirs_are_written_by_any_user_and_shared_by_the_pods_containers() {
    let host = Host::start().await;
    let pod = host.pod("empty").await;
    let plain = host.volume(&pod.config, volume(VolumeKind::EmptyDir, "plain")).await.unwrap();
    let asked = host::ApplyVolumeRequest { fs_group: Some(2000), ..volume(VolumeKind::EmptyDir, "group") };
    let group = host.volume(&pod.config, asked).await.unwrap();
    let mounts = || vec![mounted(&plain, "/plain"), mounted(&group, "/group")];
    let one = user(&host, &pod, "one", mounts()).await;
    let two = host.run(&pod, v1::ContainerConfig { mounts: mounts(), ..sleeper("two") }).await;
    assert_eq!(host.sh(&one, "stat -c %a:%u:%g /plain /group").await, "777:0:0\n2777:0:2000");
    host.sh(&one, "echo hello >/plain/file; echo hello >/group/file").await;
    assert_eq!(
        host.sh(&two, "cat /plain/file; stat -c %u:%g /plain/file /group/file").await,
        "hello\n1000:1000\n1000:2000"
    );
    let meta = fs::metadata(Path::new(&plain).join("file")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (1000, 1000), "ids are shifted at the mount alone");
    assert_eq!(host.volume(&pod.config, volume(VolumeKind::EmptyDir, "plain")).await.unwrap(), plain);
    assert_eq!(host.sh(&two, "cat /plain/file").await, "hello", "made again, it keeps its content");
    let read_only = v1::Mount { readonly: true, ..mounted(&plain, "/plain") };
    let three = host.run(&pod, v1::ContainerConfig { mounts: vec![read_only], ..sleeper("three") }).await;
    let (code, _, err) = host.exec(&three, &["touch", "/plain/x"]).await.unwrap();
    assert!(code != 0 && err.contains("Read-only"), "{err}");
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_dir_in_memory_has_its_size() {
    let host = Host::start().await;
    let pod = host.pod("memory").await;
    let asked =
        host::ApplyVolumeRequest { size_bytes: 1 << 20, ..volume(VolumeKind::EmptyDirMemory, "cache") };
    let path = host.volume(&pod.config, asked).await.unwrap();
    let id = user(&host, &pod, "main", vec![mounted(&path, "/cache")]).await;
    assert_eq!(host.sh(&id, "stat -f -c %T /cache; stat -c %a /cache").await, "tmpfs\n777");
    host.sh(&id, "head -c 1000000 /dev/zero >/cache/fits").await;
    let (code, _, err) =
        host.exec(&id, &["sh", "-c", "head -c 1000000 /dev/zero >/cache/more"]).await.unwrap();
    assert!(code != 0, "{err}");
    assert!(host.sh(&id, "stat -c %s /cache/more").await.parse::<u32>().unwrap() < 100_000);
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_have_owner_and_mode_and_are_replaced_under_a_running_container() {
    let host = Host::start().await;
    let pod = host.pod("files").await;
    let with = |all: &[(&str, &str, u32)]| host::ApplyVolumeRequest {
        fs_group: Some(2000),
        ..files(VolumeKind::Files, "conf", all)
    };
    let path =
        host.volume(&pod.config, with(&[("key", "old", 0o400), ("sub/open", "o", 0o644)])).await.unwrap();
    let id = user(&host, &pod, "main", vec![v1::Mount { readonly: true, ..mounted(&path, "/conf") }]).await;
    assert_eq!(
        host.sh(&id, "cat /conf/key /conf/sub/open; stat -Lc %a:%u:%g /conf/key /conf/sub/open").await,
        "oldo440:0:2000\n644:0:2000"
    );
    let (code, _, _) = host.exec(&id, &["sh", "-c", "echo x >/conf/key"]).await.unwrap();
    assert_ne!(code, 0);
    host.volume(&pod.config, with(&[("key", "new", 0o400), ("more", "m", 0o444)])).await.unwrap();
    assert_eq!(host.sh(&id, "cat /conf/key /conf/more; ls /conf").await, "newmkey\nmore");
    assert_eq!(host.sh(&id, "stat -f -c %T /conf").await, "tmpfs", "secrets are on no disk");
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_file_that_is_mounted_by_itself_changes_under_a_running_container() {
    let host = Host::start().await;
    let pod = host.pod("plain").await;
    let with = |text: &str| files(VolumeKind::PlainFiles, "etc", &[("hosts", text, 0o644)]);
    let path = host.volume(&pod.config, with("127.0.0.1 localhost\n")).await.unwrap();
    let hosts = Path::new(&path).join("hosts").display().to_string();
    let id = user(&host, &pod, "main", vec![mounted(&hosts, "/etc/hosts")]).await;
    assert_eq!(
        host.sh(&id, "cat /etc/hosts; stat -c %a:%u:%g /etc/hosts").await,
        "127.0.0.1 localhost\n644:0:0"
    );
    host.volume(&pod.config, with("10.0.0.1 other\n")).await.unwrap();
    assert_eq!(host.sh(&id, "cat /etc/hosts").await, "10.0.0.1 other");
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_pods_volumes_is_to_be_seen_in_another_pod() {
    let host = Host::start().await;
    let (owner, stranger) = (host.pod("owner").await, host.pod("stranger").await);
    let path = host
        .volume(&owner.config, files(VolumeKind::Files, "key", &[("token", "TOP-SECRET", 0o644)]))
        .await
        .unwrap();
    let one = host
        .run(&owner, v1::ContainerConfig { mounts: vec![mounted(&path, "/key")], ..sleeper("main") })
        .await;
    let two = host.run(&stranger, sleeper("main")).await;
    assert_eq!(host.sh(&one, "cat /key/token").await, "TOP-SECRET");
    let search = "find / -xdev -type f ! -path '/proc/*' ! -path '/sys/*' | xargs grep -l TOP-SECRET 2>/dev/null || true";
    assert_eq!(host.sh(&two, search).await, "");
    for pid in crate::recovery::processes(&stranger.id) {
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
        assert!(!mounts.contains("uid-owner") && !mounts.contains(&owner.id), "{mounts}");
    }
    for dir in [host.root().join("volumes"), host.root().join("ledger"), host.root().join("storage")] {
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o077, 0, "{}", dir.display());
    }
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_go_when_their_pod_has_gone_and_not_before() {
    let host = Host::start().await;
    let pod = host.pod("owner").await;
    for kind in [VolumeKind::EmptyDir, VolumeKind::EmptyDirMemory, VolumeKind::Files, VolumeKind::PlainFiles]
    {
        host.volume(&pod.config, volume(kind, &format!("{kind:?}").to_lowercase())).await.unwrap();
    }
    let path = host.volume(&pod.config, volume(VolumeKind::EmptyDir, "emptydir")).await.unwrap();
    let id = user(&host, &pod, "main", vec![mounted(&path, "/data")]).await;
    host.sh(&id, "mkdir -p /data/a/b; ln -s / /data/link; touch /data/a/b/file; chmod 0 /data/a").await;
    let remove = async || {
        let request = host::RemovePodVolumesRequest { pod_uid: "uid-owner".into() };
        host.service().remove_pod_volumes(request).await
    };
    assert!(remove().await.unwrap_err().message().contains(&pod.id));
    host.remove_pod(&pod.id).await.unwrap();
    let pods =
        async || host.service().list_pods(host::ListPodsRequest {}).await.unwrap().into_inner().pod_uids;
    assert_eq!(pods().await, ["uid-owner"], "its volumes and logs are still there");
    remove().await.unwrap();
    remove().await.unwrap();
    assert!(pods().await.is_empty());
    until("nothing to be left", async || match host.traces() {
        left if left.is_empty() => Ok(()),
        left => Err(left.join("\n")),
    })
    .await;
    assert_eq!(fs::read_dir(host.root().join("logs")).unwrap().count(), 0);
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_makes_no_sense_is_refused_by_name() {
    let host = Host::start().await;
    let config = host.pod_config("senseless");
    for (request, words) in [
        (volume(VolumeKind::EmptyDir, "../x"), "../x"),
        (volume(VolumeKind::Unspecified, "x"), "no kind"),
        (files(VolumeKind::Files, "x", &[("../../etc/passwd", "x", 0o644)]), "../../etc/passwd"),
        (
            host::ApplyVolumeRequest { fs_group: Some(70_000), ..volume(VolumeKind::EmptyDir, "x") },
            "fsGroup 70000",
        ),
    ] {
        let error = host.volume(&config, request).await.unwrap_err();
        assert!(error.message().contains(words), "{error:?}");
    }
    host.end().await;
}
