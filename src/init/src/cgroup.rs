//! cgroups from inside the CT: on v2 the controllers are handed down, on both versions an exec joins its container's.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

const ROOT: &str = "/sys/fs/cgroup";
/// How often the processes of a cgroup without `cgroup.kill` are killed anew: some may fork while the list is gone through.
const KILL_ROUNDS: usize = 100;

/// On cgroup v2 a group with processes cannot hand controllers down: PID 1 goes into a leaf. What the CT was not given stays
/// missing; on v1 there is nothing to do.
pub(crate) fn hand_down() {
    let root = Path::new(ROOT);
    let Ok(pids) = fs::read_to_string(root.join("cgroup.procs")) else { return };
    let leaf = root.join("init");
    let _ = fs::create_dir(&leaf);
    for pid in pids.lines() {
        let _ = fs::write(leaf.join("cgroup.procs"), pid);
    }
    for controller in ["cpu", "memory", "pids", "io", "cpuset"] {
        let _ = fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// The directories of a process's cgroups, where this process is not in the same.
fn differing(pid: i32) -> io::Result<Vec<PathBuf>> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let theirs = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    Ok(theirs.lines().filter(|line| !own.lines().any(|o| o == *line)).filter_map(directory).collect())
}

/// `4:memory:/x` is `/sys/fs/cgroup/memory/x`; `0::/x` is v2, alone or beside v1.
fn directory(line: &str) -> Option<PathBuf> {
    let mut parts = line.splitn(3, ':');
    let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
    if path.split('/').any(|p| p == "..") {
        return None;
    }
    let mount = match controllers.strip_prefix("name=").unwrap_or(controllers) {
        "" if Path::new(ROOT).join("unified").is_dir() => Path::new(ROOT).join("unified"),
        "" => PathBuf::from(ROOT),
        names => Path::new(ROOT).join(names),
    };
    Some(mount.join(path.trim_start_matches('/')))
}

/// Puts this process into the cgroups of another.
pub(crate) fn join(pid: i32) -> io::Result<()> {
    for dir in differing(pid)? {
        match fs::write(dir.join("cgroup.procs"), "0") {
            // A hierarchy that is not mounted here limits nothing here either.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", dir.display()))),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// The directories of a container's cgroup, on v1 one in each hierarchy.
fn directories(cgroups_path: &str) -> Vec<PathBuf> {
    let relative = cgroups_path.trim_start_matches('/');
    if relative.is_empty() || relative.split('/').any(|p| p == "..") {
        return Vec::new();
    }
    let hierarchies = fs::read_dir(ROOT).into_iter().flatten().flatten().map(|e| e.path());
    std::iter::once(PathBuf::from(ROOT))
        .chain(hierarchies)
        .map(|dir| dir.join(relative))
        .filter(|dir| dir.is_dir())
        .collect()
}

/// The processes of a container's cgroup.
pub(crate) fn processes(cgroups_path: &str) -> Vec<i32> {
    let listed = directories(cgroups_path).into_iter().find_map(|dir| {
        let text = fs::read_to_string(dir.join("cgroup.procs")).ok()?;
        Some(text.lines().filter_map(|pid| pid.parse().ok()).filter(|pid| *pid > 1).collect())
    });
    listed.unwrap_or_default()
}

/// Kills all processes of a container's cgroup, also those that are made meanwhile.
pub(crate) fn kill(cgroups_path: &str) {
    if directories(cgroups_path).iter().any(|dir| fs::write(dir.join("cgroup.kill"), "1").is_ok()) {
        return;
    }
    for _ in 0..KILL_ROUNDS {
        let left = processes(cgroups_path);
        if left.is_empty() {
            return;
        }
        for pid in left {
            // SAFETY: a plain call. The PID was read this instant.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Removes a container's cgroup wherever it was made. What the host made, or what is busy, the agent removes.
pub(crate) fn remove(cgroups_path: &str) {
    for dir in directories(cgroups_path) {
        let _ = fs::remove_dir(dir);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_line_of_proc_is_a_directory() {
        assert_eq!(directory("4:memory:/abc").unwrap(), Path::new("/sys/fs/cgroup/memory/abc"));
        assert_eq!(directory("2:cpu,cpuacct:/").unwrap(), Path::new("/sys/fs/cgroup/cpu,cpuacct/"));
        assert_eq!(directory("1:name=systemd:/x").unwrap(), Path::new("/sys/fs/cgroup/systemd/x"));
        assert_eq!(directory("4:memory:/../x"), None);
        assert_eq!(directory("nonsense"), None);
    }
}
