//! From one store on ZFS to another one; what cannot migrate is refused.

use std::{
    fs,
    process::{Command, Stdio},
    thread,
    time::Instant,
};

use moxlet_tests_component::{program, store::Pool};
use serde_json::Value;

use crate::{
    support::{docker_archive, failed, text},
    zfs::{Parent, ZfsStore},
};

/// How often a migration is killed.
const KILLS: u32 = 8;

fn refusal(args: &[&str]) -> String {
    let mut command = Command::new(program());
    command.args(["image", "migrate"]).args(args).env_remove("MOXLET_SOCKET").stdin(Stdio::null());
    failed(args, &command.output().unwrap())
}

#[test]
fn what_cannot_migrate_is_refused_by_name() {
    let overlay = refusal(&["--store", "/srv/images", "--to", "rpool/moxlet"]);
    assert!(overlay.contains("/srv/images is a store on OverlayFS") && overlay.contains("image export"));
    let directory = refusal(&["--store", "tank/moxlet", "--storage", "zfs", "--to", "/srv/images"]);
    assert!(directory.contains("/srv/images is a directory") && directory.contains("image import"));
    let inside = refusal(&["--store", "tank/a", "--storage", "zfs", "--to", "tank/a/b"]);
    assert!(inside.contains("are not two stores"), "{inside}");
    assert!(refusal(&["--to", "tank/a"]).contains("--store DATASET"));
}

/// Images by id, as a list tells of them: names, pin, times.
fn listed(store: &ZfsStore) -> Value {
    serde_json::from_str(&store.run(&["list", "-o", "json"])).unwrap()
}

fn import(store: &ZfsStore, name: &str, layers: usize) -> String {
    let archive = store.path("a.tar");
    fs::write(&archive, docker_archive(name, layers, 4, 100_000)).unwrap();
    store.run(&["import", text(&archive)])
}

#[test]
fn a_store_on_zfs_migrates_to_another_one_of_its_pool() {
    let Some(parent) = Parent::from_env() else { return };
    migrates(&parent, &parent);
}

#[test]
fn a_store_on_zfs_migrates_to_another_pool_which_needs_nothing_of_the_first_one_then() {
    let (Some(parent), Some(pool)) = (Parent::from_env(), Pool::create()) else { return };
    let (first, second) = migrates(&parent, &Parent(pool.name.clone()));
    // And on from there, once the first store has gone.
    drop(first);
    let third = parent.store();
    second.run(&["migrate", "--to", &third.dataset]);
    assert_eq!(listed(&third), listed(&second));
    assert!(third.run(&["verify"]).contains("layers compared)"));
}

/// Migrates from a store below one dataset to one below the other; both stores.
fn migrates(here: &Parent, there: &Parent) -> (ZfsStore, ZfsStore) {
    let parent = here;
    let (from, to) = (here.store(), there.store());
    let (small, large) = (import(&from, "small:1", 2), import(&from, "large:1", 3));
    from.run(&["tag", "small:1", "small:2"]);
    from.run(&["pin", "small:1"]);
    let before = (listed(&from), from.datasets());

    let said = from.run(&["migrate", "--to", &to.dataset]);
    // The oldest one first; a new name makes an image the newest.
    assert!(said.contains("large:1 (3 of 3 layers copied)"), "{said}");
    assert!(said.contains("small:2 (0 of 2 layers copied)"), "{said}");
    assert_eq!(listed(&to), before.0, "names, pins and times are those of the source");
    assert_eq!((listed(&from), from.datasets()), before, "the source is as it was");
    assert!(to.run(&["verify"]).contains("(3 of 3 layers compared)"));
    // What the layers share they share there.
    assert_eq!(to.layers().len(), 3);

    let again = from.run(&["migrate", "--to", &to.dataset]);
    assert_eq!(again.matches("present").count(), 2, "{again}");
    // What the other store has got in the meantime it keeps.
    to.run(&["tag", "large:1", "moved:1"]);
    to.run(&["unpin", "small:1"]);
    from.run(&["tag", "small:1", "moved:1"]);
    let third = from.run(&["migrate", "--to", &to.dataset]);
    assert!(third.contains("moved:1 stays with the image that has it there"), "{third}");
    let seen = listed(&to);
    let of = |id: &str| seen.as_array().unwrap().iter().find(|i| i["id"] == *id).unwrap().clone();
    assert_eq!(of(&small)["pinned"], true);
    assert!(of(&large)["repoTags"].to_string().contains("moved:1"));
    assert!(!of(&small)["repoTags"].to_string().contains("moved:1"));

    let nothing = format!("{}/nothing", parent.0);
    let complaint = {
        let args = ["image", "migrate", "--store", &nothing, "--storage", "zfs", "--to", &to.dataset];
        failed(&args, &Command::new(program()).args(args).env_remove("MOXLET_SOCKET").output().unwrap())
    };
    assert!(complaint.contains("there is no such pool or dataset"), "{complaint}");
    (from, to)
}

#[test]
fn a_migration_that_is_killed_at_any_point_goes_on_with_the_next_one() {
    let Some(parent) = Parent::from_env() else { return };
    let (from, measure, to) = (parent.store(), parent.store(), parent.store());
    for layers in 1..=4 {
        import(&from, &format!("made:{layers}"), layers);
    }
    let before = (listed(&from), from.datasets());
    let begun = Instant::now();
    from.run(&["migrate", "--to", &measure.dataset]);
    let whole = begun.elapsed();
    let mut most = 0;
    for n in 0..KILLS {
        let mut command = from.command(&["migrate", "--to", &to.dataset]);
        let mut migration = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(whole * (n * 3 % KILLS) / KILLS);
        migration.kill().unwrap();
        migration.wait().unwrap();
        let images = listed(&to).as_array().unwrap().len();
        assert!(images >= most, "after kill {n} there are {images} images, there were {most}");
        most = images;
        to.run(&["verify"]);
        assert_eq!(to.drafts(), Vec::<String>::new(), "after kill {n}");
    }
    from.run(&["migrate", "--to", &to.dataset]);
    assert_eq!(listed(&to), before.0);
    assert_eq!((listed(&from), from.datasets()), before, "the source is as it was");
    assert!(to.run(&["verify"]).contains("(4 of 4 layers compared)"));
    assert_eq!(to.layers().len(), 4);
}
