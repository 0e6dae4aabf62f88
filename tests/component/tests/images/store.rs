//! The commands on a store of one's own.

use std::fs;

use moxlet_tests_component::registry;
use serde_json::Value;

use crate::support::{Store, docker_archive, text};

#[test]
fn an_image_is_pulled_named_pinned_and_removed() {
    let (store, image) = (Store::new(), registry::busybox());
    let id = store.run(&["pull", &image]);
    assert!(id.starts_with("sha256:"), "{id}");
    assert_eq!(store.run(&["pull", "-q", &image]), id);
    assert_eq!(store.run(&["list", "-q"]), id);
    assert_eq!(store.run(&["tag", &image, "mine:1"]), id);
    store.run(&["pin", "mine:1"]);
    let listed: Value = serde_json::from_str(&store.run(&["list", "-o", "json"])).unwrap();
    assert_eq!(
        (&listed[0]["pinned"], listed[0]["repoTags"].as_array().unwrap().len()),
        (&Value::Bool(true), 2)
    );
    assert!(store.run(&["list"]).contains("docker.io/library/mine:1"));
    let inspected: Value = serde_json::from_str(&store.run(&["inspect", "mine:1"])).unwrap();
    assert_eq!(
        (inspected[0]["id"].as_str(), inspected[0]["origin"].as_str()),
        (Some(id.as_str()), Some("pulled"))
    );
    assert_eq!(store.run(&["prune"]), "", "it is pinned");
    store.run(&["unpin", "mine:1"]);
    assert_eq!(store.run(&["remove", &image]), format!("untagged {image}"));
    assert!(store.run(&["prune"]).starts_with(&format!("removed {id}")));
    assert!(store.complaint(&["inspect", "mine:1"]).contains("is not in the store"));
    assert!(store.complaint(&["remove", "mine:1"]).contains("is not in the store"));
    assert_eq!(store.run(&["list", "-o", "json"]), "[]");
    assert!(store.leftovers().is_empty(), "{:?}", store.leftovers());
}

#[test]
fn a_mounted_image_is_seen_and_kept() {
    let (store, image) = (Store::new(), registry::busybox());
    store.run(&["pull", &image]);
    let target = store.path("seen");
    store.run(&["mount", &image, text(&target)]);
    assert!(target.join("bin/busybox").is_file());
    assert!(fs::write(target.join("x"), "x").is_err());
    let refused = store.complaint(&["remove", &image]);
    assert!(refused.contains(text(&target)), "{refused}");
    store.run(&["umount", text(&target)]);
    assert!(!target.join("bin").exists());
    assert!(store.complaint(&["umount", text(&target)]).contains("no image of this store"));
    store.run(&["remove", &image]);
    assert!(store.leftovers().is_empty(), "{:?}", store.leftovers());
}

#[test]
fn a_damaged_layer_is_found_and_repaired() {
    let store = Store::new();
    let archive = store.path("a.tar");
    fs::write(&archive, docker_archive("made:1", 2, 3, 1000)).unwrap();
    store.run(&["import", text(&archive)]);
    assert!(store.run(&["verify"]).contains("ok       docker.io/library/made:1 (2 of 2 layers compared)"));
    let layer = store.names("storage/layers").remove(0);
    let dir = store.path("store/storage/layers").join(layer);
    let inside = fs::read_dir(&dir).unwrap().next().unwrap().unwrap().path();
    fs::write(inside.join("file1"), vec![0; 1000]).unwrap();
    let output = store.try_run(&["verify", "--repair", "made:1"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("damaged  docker.io/library/made:1") && said.contains("removed"), "{said}");
    store.run(&["import", text(&archive)]);
    store.run(&["verify", "made:1"]);
}

#[test]
fn an_image_that_has_lost_its_tapes_is_not_called_whole() {
    let store = Store::new();
    let archive = store.path("a.tar");
    fs::write(&archive, docker_archive("made:1", 2, 3, 1000)).unwrap();
    store.run(&["import", text(&archive)]);
    for tape in store.names("images/layers") {
        fs::remove_file(store.path("store/images/layers").join(tape)).unwrap();
    }
    let output = store.try_run(&["verify"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("unknown  docker.io/library/made:1 (0 of 2 layers compared)"), "{said}");
    assert!(store.complaint(&["verify"]).contains("1 of 1 images cannot be compared"));
    // An import brings them again.
    store.run(&["import", text(&archive)]);
    assert!(store.run(&["verify"]).contains("ok       docker.io/library/made:1 (2 of 2 layers compared)"));
}

#[test]
fn what_a_layout_has_beside_images_is_left_out_and_told() {
    let (store, layout) = (Store::new(), Store::new());
    let archive = store.path("a.tar");
    fs::write(&archive, docker_archive("made:1", 2, 3, 1000)).unwrap();
    let id = store.run(&["import", text(&archive)]);
    let dir = store.path("layout");
    store.run(&["export", "made:1", "--oci-dir", text(&dir)]);
    let path = dir.join("index.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let other = format!("sha256:{}", "0".repeat(64));
    let entry = serde_json::json!({ "digest": other, "size": 2 });
    index["manifests"].as_array_mut().unwrap().insert(0, entry.clone());
    fs::write(&path, index.to_string()).unwrap();
    let output = layout.try_run(&["import", text(&dir)]);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(crate::support::succeeded(&["import"], &output), id);
    assert!(told.contains(&format!("left out {other}: its blob {other} is missing")), "{told}");
    fs::write(&path, serde_json::json!({ "manifests": [entry] }).to_string()).unwrap();
    assert!(layout.complaint(&["import", text(&dir)]).contains("no image that can be taken"));
}

#[test]
fn wrong_uses_are_told() {
    let store = Store::new();
    assert!(store.complaint(&["pull", "a.b/UPPER"]).contains("repository name must be lowercase"));
    let nothing = format!("{}/demo/nothing:1", registry::address());
    assert!(store.complaint(&["pull", &nothing]).contains("not found"));
    assert!(store.complaint(&["gc", "--high", "10", "--low", "20"]).contains("above the high one"));
    assert_eq!(store.try_run(&["pull", "--creds-file"]).status.code(), Some(2));
    let creds = store.path("creds");
    fs::write(&creds, "no colon").unwrap();
    assert!(store.complaint(&["pull", "--creds-file", text(&creds), "x"]).contains("USER:PASSWORD"));
    let empty = store.path("empty.tar");
    fs::write(&empty, vec![0; 10240]).unwrap();
    assert!(store.complaint(&["import", text(&empty)]).contains("--rootfs"));
    assert!(store.leftovers().is_empty(), "{:?}", store.leftovers());
}
