//! What other tools write is imported, what we export they read.

use std::fs;

use moxlet_tests_component::registry;

use crate::support::{Store, text, tool};

#[test]
fn skopeo_and_umoci_read_what_is_exported() {
    let (store, image) = (Store::new(), registry::busybox());
    // Through an import, whose layers can be made again.
    let (brought, out, layout) = (store.path("in.tar"), store.path("out.tar"), store.path("layout"));
    let from = format!("docker://{image}");
    tool(
        "skopeo",
        &["copy", "-q", "--src-tls-verify=false", &from, &format!("oci-archive:{}:mine:1", text(&brought))],
    );
    let id = store.run(&["import", text(&brought), "--name", "mine:1"]);
    store.run(&["export", "mine:1", "-o", text(&out)]);
    store.run(&["export", "mine:1", "--oci-dir", text(&layout)]);
    let name = "docker.io/library/mine:1";
    for source in [
        format!("oci-archive:{}:{name}", text(&out)),
        format!("docker-archive:{}", text(&out)),
        format!("oci:{}:{name}", text(&layout)),
    ] {
        let copy = store.path("copy");
        tool("skopeo", &["copy", "-q", &source, &format!("dir:{}", text(&copy))]);
        let digits = id.trim_start_matches("sha256:");
        assert!(copy.join(digits).is_file(), "{source} has another config");
        fs::remove_dir_all(&copy).unwrap();
    }
    let unpacked = store.path("unpacked");
    tool("umoci", &["unpack", "--image", &format!("{}:{name}", text(&layout)), text(&unpacked)]);
    assert!(unpacked.join("rootfs/bin/busybox").is_file());
    assert!(store.complaint(&["export", "mine:1", "--oci-dir", text(&layout)]).contains("not empty"));
}

#[test]
fn archives_and_layouts_of_skopeo_are_imported_as_the_same_image() {
    let (store, image) = (Store::new(), registry::busybox());
    let id = store.run(&["pull", &image]);
    store.run(&["remove", &image]);
    let from = format!("docker://{image}");
    for (kind, path, tag) in [
        ("oci-archive", store.path("oci.tar"), ":r.example/a:1"),
        ("docker-archive", store.path("docker.tar"), ":r.example/b:1"),
        ("oci", store.path("layout"), ":latest"),
    ] {
        let to = format!("{kind}:{}{tag}", text(&path));
        tool("skopeo", &["copy", "-q", "--src-tls-verify=false", &from, &to]);
        assert_eq!(store.run(&["import", text(&path)]), id, "{kind}");
    }
    let listed = store.run(&["list"]);
    assert!(listed.contains("r.example/a:1") && listed.contains("r.example/b:1"), "{listed}");
    assert_eq!(store.run(&["import", text(&store.path("layout")), "--name", "c:1"]), id);
    store.run(&["verify"]);
    assert!(store.leftovers().is_empty(), "{:?}", store.leftovers());
}

#[test]
fn a_template_becomes_an_image_that_knows_what_it_is() {
    let store = Store::new();
    let root = store.path("root");
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("etc/issue"), "template").unwrap();
    let architecture = if std::env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" };
    let archive = store.path(&format!("debian-13-standard_13.1-2_{architecture}.tar.xz"));
    tool("tar", &["-C", text(&root), "-cJf", text(&archive), "."]);
    store.run(&[
        "import",
        "--rootfs",
        "--name",
        "debian:13",
        "--cmd",
        "/bin/bash",
        "--env",
        "A=b",
        text(&archive),
    ]);
    let inspected: serde_json::Value = serde_json::from_str(&store.run(&["inspect", "debian:13"])).unwrap();
    let config = &inspected[0]["config"]["config"];
    assert_eq!(config["Labels"]["org.opencontainers.image.title"], "debian-13-standard");
    assert_eq!((&config["Cmd"][0], &config["Env"][0]), (&"/bin/bash".into(), &"A=b".into()));
    let target = store.path("seen");
    store.run(&["mount", "debian:13", text(&target)]);
    assert_eq!(fs::read_to_string(target.join("etc/issue")).unwrap(), "template");
    store.run(&["umount", text(&target)]);
    assert!(store.complaint(&["import", "--rootfs", text(&root)]).contains("make a tarball"));
}
