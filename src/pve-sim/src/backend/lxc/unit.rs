//! How a CT's monitor is started: by a systemd unit as Proxmox VE does, or as a child where systemd is not PID 1.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use super::{POLL, QUICK, run};
use crate::{Result, backend::tool::command, error::io};

/// How long a unit may take to be gone after its CT is.
const GONE: Duration = Duration::from_secs(10);

pub(super) fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

fn stderr_file(unit: &str, vmid: u32) -> PathBuf {
    PathBuf::from(format!("/run/pve/{unit}-{vmid}.stderr"))
}

/// Writes the unit, unless one of this name is there.
pub(super) async fn install(unit: &str, lxcpath: &Path) -> Result<()> {
    let run_dir = Path::new("/run/pve");
    fs::create_dir_all(run_dir).map_err(io("create", run_dir))?;
    let path = PathBuf::from(format!("/run/systemd/system/{unit}@.service"));
    if path.exists() || Path::new(&format!("/lib/systemd/system/{unit}@.service")).exists() {
        return Ok(());
    }
    let text = format!(
        "[Unit]\nDescription=PVE LXC Container: %i\nDefaultDependencies=no\n\n[Service]\nType=simple\nDelegate=yes\n\
         KillMode=mixed\nTimeoutStopSec=120s\nExecStart=/usr/bin/lxc-start -F -P {0} -n %i\n\
         ExecStop=/usr/bin/lxc-stop -P {0} -n %i\nStandardOutput=null\nStandardError=truncate:/run/pve/{unit}-%i.stderr\n",
        lxcpath.display()
    );
    fs::write(&path, text).map_err(io("write", &path))?;
    run("systemctl", &["daemon-reload"], QUICK).await.map(|_| ())
}

/// Starts a CT's unit as `PVE::LXC::vm_start` does: once. A unit that failed too often of late is refused by systemd, there as
/// here.
pub(super) async fn start(unit: &str, vmid: u32) -> Result<()> {
    start_by("systemctl", unit, vmid).await
}

async fn start_by(systemctl: &str, unit: &str, vmid: u32) -> Result<()> {
    run(systemctl, &["start", &format!("{unit}@{vmid}")], QUICK).await.map(|_| ())
}

pub(super) async fn has_failed(unit: &str, vmid: u32) -> bool {
    let name = format!("{unit}@{vmid}");
    let state = run("systemctl", &["show", "--property=ActiveState", "--value", &name], QUICK).await;
    state.is_ok_and(|s| matches!(s.trim(), "failed" | "inactive"))
}

pub(super) async fn wait_until_inactive(unit: &str, vmid: u32) {
    let since = Instant::now();
    while since.elapsed() < GONE && !has_failed(unit, vmid).await {
        tokio::time::sleep(POLL).await;
    }
}

/// A monitor that is a child.
#[derive(Debug)]
pub(super) struct Child {
    ended: Arc<AtomicBool>,
}

impl Child {
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }
}

/// Starts a monitor in a session of its own; it goes on when the simulator ends.
pub(super) fn spawn(lxcpath: &Path, vmid: u32, errors: &Path) -> Result<Child> {
    let stderr = fs::File::create(errors).map_err(io("create", errors))?;
    let mut child = command("lxc-start")
        .args(["-F", "-P"])
        .arg(lxcpath)
        .args(["-n", &vmid.to_string()])
        .stdout(Stdio::null())
        .stderr(stderr)
        .process_group(0)
        .kill_on_drop(false)
        .spawn()
        .map_err(io("start", Path::new("lxc-start")))?;
    let ended = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&ended);
    // Reaped whenever it ends.
    tokio::spawn(async move {
        let _ = child.wait().await;
        seen.store(true, Ordering::SeqCst);
    });
    Ok(Child { ended })
}

/// What a failed start wrote.
pub(super) fn said(unit: &str, vmid: u32, errors: &Path, by_unit: bool) -> String {
    let path = if by_unit { stderr_file(unit, vmid) } else { errors.to_path_buf() };
    let text = fs::read_to_string(path).unwrap_or_default();
    text.chars().take(8000).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::backend::tool::script;

    #[tokio::test]
    async fn a_unit_that_does_not_start_is_not_started_again() {
        let dir = tempfile::tempdir().unwrap();
        let (systemctl, asked) = script(dir.path(), "exit 1");
        start_by(&systemctl, "pve-container", 100).await.unwrap_err();
        assert_eq!(fs::read_to_string(asked).unwrap(), "start pve-container@100\n");
    }
}
