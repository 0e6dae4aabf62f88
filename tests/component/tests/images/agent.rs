//! The commands through an agent, whose containers use the images.

use std::{
    path::Path,
    process::{Command, Output},
};

use moxlet_cri::v1;
use moxlet_tests_component::{
    host::{Host, container, sleeper},
    program, registry,
};

use crate::{
    proxy::Proxy,
    support::{Store, failed, pushed, succeeded, tar, text, until},
};

fn try_run(socket: &Path, args: &[&str]) -> Output {
    Command::new(program()).args(["image", "--socket"]).arg(socket).args(args).output().unwrap()
}

fn run(socket: &Path, args: &[&str]) -> String {
    succeeded(args, &try_run(socket, args))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_a_container_uses_is_not_removed() {
    let host = Host::start().await;
    let (socket, image) = (host.config.cri_socket.clone(), registry::busybox());
    let id = run(&socket, &["list", "-q"]);
    let pod = host.pod("uses").await;
    let container_id = host.run(&pod, sleeper("main")).await;
    run(&socket, &["tag", &image, "second:1"]);
    assert!(run(&socket, &["remove", "second:1"]).starts_with("untagged"));
    let refused = failed(&[], &try_run(&socket, &["remove", &image]));
    assert!(refused.contains(&container_id), "{refused}");
    assert_eq!(run(&socket, &["prune"]), "");
    let root = host.root().display().to_string();
    let locked = Command::new(program()).args(["image", "--store", &root, "list"]).output().unwrap();
    let locked = failed(&[], &locked);
    assert!(locked.contains("is in use by process"), "{locked}");

    run(&socket, &["pin", &image]);
    let listed = host.images().list_images(v1::ListImagesRequest::default()).await.unwrap().into_inner();
    assert_eq!((listed.images[0].id.as_str(), listed.images[0].pinned), (id.as_str(), true));
    let spec = v1::ImageSpec { image: image.clone(), ..v1::ImageSpec::default() };
    let request = v1::ImageStatusRequest { image: Some(spec), verbose: true };
    let info = host.images().image_status(request).await.unwrap().into_inner().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
    assert_eq!(info["imageSpec"]["config"]["Cmd"][0], "/bin/sh");
    assert!(info["inUseBy"][0].as_str().unwrap().contains(&container_id));
    host.remove_pod(&pod.id).await.unwrap();
    assert!(run(&socket, &["remove", &image]).starts_with("removed"));
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_runs_from_an_imported_root_file_system() {
    let host = Host::start().await;
    let socket = host.config.cri_socket.clone();
    let store = Store::new();
    let archive = store.path("root.tar");
    let busybox = std::fs::read("/bin/busybox").unwrap();
    let mut bytes = tar(&[("bin/sh".into(), busybox), ("etc/issue".into(), b"imported".to_vec())]);
    // Programs may be run.
    let mode = bytes.windows(7).position(|w| w == b"0000644").unwrap();
    bytes.splice(mode..mode + 7, *b"0000755");
    fix_checksum(&mut bytes);
    std::fs::write(&archive, bytes).unwrap();
    run(&socket, &["import", "--rootfs", "--name", "imported:1", text(&archive)]);
    let pod = host.pod("imported").await;
    let mut config = container("main", "read -r line </etc/issue || true; echo \"$line\"");
    config.image = Some(v1::ImageSpec { image: "imported:1".into(), ..v1::ImageSpec::default() });
    let id = host.run(&pod, config).await;
    assert_eq!(host.exited(&id).await.exit_code, 0);
    assert!(host.log(&id).await.contains("imported"));
    assert!(run(&socket, &["verify", "imported:1"]).starts_with("ok"));
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_pulls_of_one_image_at_once_are_one_download() {
    const LAYERS: usize = 3;
    let host = Host::start().await;
    let socket = host.config.cri_socket.clone();
    let id = pushed(&format!("{}/test/twice:1", registry::address()), LAYERS, 10, 50_000);
    let proxy = Proxy::start();
    let name = proxy.name("test/twice:1");
    // Both begin while nothing of the image is here: the answers wait.
    proxy.hold(true);
    let pulls: Vec<_> = (0..2)
        .map(|_| {
            let (socket, name) = (socket.clone(), name.clone());
            std::thread::spawn(move || run(&socket, &["pull", "-q", &name]))
        })
        .collect();
    until(|| proxy.blobs() > 0);
    let begun = || {
        let of = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let all =
            std::fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().into_string().ok());
        all.filter(|pid| of(pid).contains(&format!("\0{name}\0"))).count()
    };
    until(|| begun() == 2);
    proxy.hold(false);
    for pull in pulls {
        assert_eq!(pull.join().unwrap(), id);
    }
    assert_eq!(proxy.blobs(), LAYERS + 1, "each layer and the config once");
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_collection_removes_what_is_idle_and_keeps_what_is_used_or_pinned() {
    let host = Host::start().await;
    let socket = host.config.cri_socket.clone();
    let used = run(&socket, &["list", "-q"]);
    let pod = host.pod("uses").await;
    host.run(&pod, sleeper("main")).await;
    let [pinned, idle] = [("kept", 1), ("idle", 2)].map(|(name, layers)| {
        let name = format!("{}/test/{name}:1", registry::address());
        let id = pushed(&name, layers, 3, 50_000);
        assert_eq!(run(&socket, &["pull", "-q", &name]), id);
        id
    });
    run(&socket, &["pin", &pinned]);
    let young = try_run(&socket, &["gc", "--high", "0", "--low", "0", "--min-age", "1h"]);
    assert_eq!(String::from_utf8(young.stdout).unwrap(), "", "what is young stays");
    // That the file system is not empty afterwards is a failure, which names what went all the same.
    let gone = try_run(&socket, &["gc", "--high", "0", "--low", "0", "--min-age", "0s"]);
    let gone = String::from_utf8(gone.stdout).unwrap();
    assert!(gone.contains(&idle) && !gone.contains(&pinned) && !gone.contains(&used), "{gone}");
    let left = run(&socket, &["list", "-q"]);
    let mut left: Vec<&str> = left.lines().collect();
    let mut kept = [used.as_str(), pinned.as_str()];
    left.sort_unstable();
    kept.sort_unstable();
    assert_eq!(left, kept);
    host.end().await;
}

/// Writes the checksum of the first header anew.
fn fix_checksum(tar: &mut [u8]) {
    tar[148..156].copy_from_slice(b"        ");
    let sum: u32 = tar[..512].iter().map(|b| u32::from(*b)).sum();
    tar[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}
