//! The hook of a pod's CT under real LXC: it lets the CT of its number begin and no other.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::{Command, Output, Stdio},
};

use moxlet_sandbox::{Engine, SandboxSpec};
use moxlet_tests_component::{init_binary, repository};

use crate::world::{FIRST, World, spec};

/// What a CT's program leaves in its root.
const BEGUN: &str = "begun";

/// Runs a CT of this number with the hook of another's included file, to its end.
fn run(dir: &Path, vmid: u32, include: &Path) -> Output {
    let (own, root) = (dir.join(vmid.to_string()), dir.join("root"));
    let hook = fs::read_to_string(include).unwrap();
    let hook = hook.lines().find(|l| l.starts_with("lxc.hook.pre-start")).unwrap();
    for part in ["bin", "dev", "proc", "sys", "etc", "tmp"] {
        fs::create_dir_all(root.join(part)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    let _ = symlink("busybox", root.join("bin/sh"));
    fs::create_dir_all(&own).unwrap();
    let included = own.join("include");
    fs::write(&included, format!("{hook}\n")).unwrap();
    let text = format!(
        "lxc.uts.name = ct{vmid}\nlxc.rootfs.path = dir:{}\nlxc.net.0.type = empty\nlxc.autodev = 0\nlxc.console.path = none\n\
         lxc.tty.max = 0\nlxc.init.cmd = /bin/busybox touch /tmp/{BEGUN}\nlxc.include = {}\n",
        root.display(),
        included.display()
    );
    fs::write(own.join("config"), text).unwrap();
    let _ = fs::remove_file(root.join("tmp").join(BEGUN));
    let log = own.join("log");
    let mut command = Command::new("lxc-start");
    command.args(["-F", "-P"]).arg(dir).args(["-n", &vmid.to_string(), "-l", "DEBUG", "-o"]).arg(&log);
    let mut output = command.stdin(Stdio::null()).output().unwrap();
    output.stderr.extend(fs::read(log).unwrap_or_default());
    output
}

/// Where the engine left what a CT of the first number includes.
async fn included(world: &World, pod: &SandboxSpec) -> std::path::PathBuf {
    world.engine.create(pod).await.unwrap();
    world.place.engine_dir().join(format!("include/{FIRST}-{}.conf", pod.pod_uid))
}

#[tokio::test]
async fn lxc_starts_the_ct_of_the_hooks_number_and_no_copy_of_it() {
    let init = tokio::task::spawn_blocking(init_binary).await.unwrap();
    // moxlet-init, and what stands in for it in tests that have no CTs to run.
    for program in [init.to_owned(), repository().join("tests/component/check-ct")] {
        let world = World::new().await;
        let pod = SandboxSpec { init_binary: program.clone(), ..spec("web") };
        let include = included(&world, &pod).await;
        let dir = tempfile::Builder::new().prefix("moxlet-hook-").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let begun = dir.path().join("root/tmp").join(BEGUN);

        let own = run(dir.path(), FIRST, &include);
        let said = String::from_utf8_lossy(&own.stderr);
        assert!(own.status.success() && begun.exists(), "{program:?}: {said}");

        let copy = run(dir.path(), FIRST + 50, &include);
        let said = String::from_utf8_lossy(&copy.stderr);
        assert!(!copy.status.success() && !begun.exists(), "{program:?}: {said}");
        let why = format!("CT {} includes the file of CT {FIRST}", FIRST + 50);
        assert!(said.contains(&why), "{program:?}: {said}");
        world.engine.delete(&pod.id).await.unwrap();
        world.assert_as_before();
    }
}
