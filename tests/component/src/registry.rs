//! A registry on loopback with the images that `scripts/lib/images.sh` makes, one for a test program.
//!
//! It belongs to a shell that waits for the end of its standard input, which this program holds: however the program ends,
//! registry and files go with it.

use std::{
    io::{BufRead, BufReader},
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::OnceLock,
};

use crate::repository;

const SCRIPT: &str = r#"
. "$1/scripts/lib/common.sh"
. "$1/scripts/lib/images.sh"
trap '' INT TERM
dir=$(mktemp -d)
trap 'stop_daemon registry "$dir/registry"; rm -rf "$dir"' EXIT
make_images "$dir/images" >&2
registry_up "$dir/registry" "$2" >&2
push_images "$dir/images" "$2" >&2
echo ready
read -r _ || true
"#;

/// `host:port` of the registry: the one that `MOXLET_TEST_REGISTRY` names (with the images in it), or one made here.
pub fn address() -> &'static str {
    static GIVEN: OnceLock<Option<String>> = OnceLock::new();
    if let Some(address) = GIVEN.get_or_init(|| std::env::var("MOXLET_TEST_REGISTRY").ok()) {
        return address;
    }
    static STARTED: OnceLock<(String, Child)> = OnceLock::new();
    &STARTED.get_or_init(start).0
}

/// busybox, with a shell.
#[must_use]
pub fn busybox() -> String {
    format!("{}/demo/busybox:1", address())
}

fn start() -> (String, Child) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut shell = Command::new("bash")
        .args(["-c", SCRIPT, "registry"])
        .arg(repository())
        .arg(port.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(shell.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n", "the registry did not come up; see what was written above");
    (format!("127.0.0.1:{port}"), shell)
}
