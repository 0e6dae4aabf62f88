//! Component tests: the crates against real LXC, OverlayFS, CNI and a registry. Here is what the test programs share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::missing_panics_doc)]

pub mod forwarding;
pub mod host;
pub mod pve;
pub mod registry;
pub mod simulated;
pub mod store;
pub mod traces;
pub mod wait;

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// The top of the repository that the tests run in. Asked when they run: a program that was built in another copy of the
/// repository is taken over by cargo as it is.
#[must_use]
pub fn repository() -> PathBuf {
    let package =
        std::env::var_os("CARGO_MANIFEST_DIR").expect("run by cargo, or with CARGO_MANIFEST_DIR set");
    Path::new(&package).join("../..")
}

/// moxlet-init, built once by the project's own script, or the one that `MOXLET_INIT` names.
pub fn init_binary() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        if let Some(path) = std::env::var_os("MOXLET_INIT") {
            return path.into();
        }
        let out = Command::new(repository().join("scripts/build-init")).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap().lines().last().unwrap().into()
    })
}

/// The moxlet program, built once, or the one that `MOXLET_PROGRAM` names.
pub fn program() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        if let Some(path) = std::env::var_os("MOXLET_PROGRAM") {
            return path.into();
        }
        // Beside this test, so that nothing is built twice.
        let target = std::env::current_exe().unwrap().ancestors().nth(3).unwrap().to_owned();
        let built = Command::new("cargo")
            .args(["build", "--locked", "--quiet", "-p", "moxlet", "--target-dir"])
            .arg(&target)
            .current_dir(repository())
            .status()
            .unwrap();
        assert!(built.success(), "moxlet cannot be built");
        target.join("debug/moxlet")
    })
}
