//! A backup's archive of a real CT: tar in the CT's user namespace, in a mount namespace of its own where the CT's volumes, or
//! their snapshots, are mounted as they are in the CT (PVE::VZDump::LXC).
//!
//! A process of its own does that (`pve-sim ct-tar FILE`): mounts it, then becomes tar. What it mounted goes with it.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Stdio,
};

use nix::sched::CloneFlags;
use rustix::mount::MountPropagationFlags;
use serde::{Deserialize, Serialize};

use super::zfs;
use crate::{
    Error, Result,
    backend::{Backup, tool::command},
    error::io,
    guest::backup::{CONF, FIREWALL},
};

/// Where a CT is mounted for a backup.
const PLACE: &str = "/mnt/vzsnap0";
/// Ids of an unprivileged CT, as lxc-usernsexec is told.
const MAPS: [&str; 4] = ["-m", "u:0:100000:65536", "-m", "g:0:100000:65536"];
const STDERR_MAX: usize = 2000;

/// What the process mounts, and what it becomes.
#[derive(Debug, Serialize, Deserialize)]
struct Work {
    mounts: Vec<Mount>,
    command: Vec<String>,
}

/// Something to be mounted below [`PLACE`].
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Mount {
    source: Source,
    /// Its place in the CT.
    target: String,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Source {
    /// `dataset@name`.
    Snapshot(String),
    Dir(String),
}

/// Writes the archive.
pub(super) async fn write(program: &str, backup: Backup<'_>) -> Result<()> {
    let mut mounts = Vec::new();
    for volume in backup.volumes {
        let pool = zfs::pool(&volume.storage)?;
        let source = match backup.snapshot {
            Some(name) => Source::Snapshot(zfs::snapshot_name(pool, &volume.volume, name)?),
            None => Source::Dir(zfs::mounted(pool, &volume.volume).await?),
        };
        mounts.push(Mount { source, target: volume.target.clone() });
    }
    let work = Work { mounts, command: tar(&backup) };
    let path = backup.meta.join("tar.json");
    fs::write(&path, serde_json::to_vec(&work).unwrap_or_default()).map_err(io("write", &path))?;
    let out = fs::File::create(backup.file).map_err(io("create", backup.file))?;
    // Not `output`, which takes the standard output for itself.
    let child = command(program).arg("ct-tar").arg(&path).stdout(out).stderr(Stdio::piped()).spawn();
    let failed = |status: String, stderr: &[u8]| {
        let text = String::from_utf8_lossy(stderr);
        let skip = text.chars().count().saturating_sub(STDERR_MAX);
        Error::Tool {
            program: "tar".into(),
            args: work.command.join(" "),
            status,
            stderr: text.chars().skip(skip).collect::<String>().trim().to_owned(),
        }
    };
    let child = child.map_err(|error| failed(error.to_string(), &[]))?;
    match tokio::time::timeout(zfs::LONG, child.wait_with_output()).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => Err(failed(output.status.to_string(), &output.stderr)),
        Ok(Err(error)) => Err(failed(error.to_string(), &[])),
        Err(_) => Err(failed(format!("no end after {} s", zfs::LONG.as_secs()), &[])),
    }
}

/// tar with its arguments; extended attributes and ACLs are left out.
fn tar(backup: &Backup<'_>) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| all.extend(words.iter().map(|w| (*w).to_owned()));
    if backup.unprivileged {
        add(&["lxc-usernsexec"]);
        add(&MAPS);
        add(&["--"]);
    }
    add(&["tar", "-cpf", "-"]);
    add(backup.compression.option().as_slice());
    add(&["--one-file-system", "--sparse", "--numeric-owner", "--warning=no-file-ignored"]);
    add(&[&format!("--directory={}", backup.meta.display()), &format!("./{CONF}"), &format!("./{FIREWALL}")]);
    add(&[&format!("--directory={PLACE}"), "--no-anchored"]);
    if backup.unprivileged {
        add(&["--exclude=lost+found"]);
    }
    add(&["--anchored"]);
    for name in backup.excluded {
        add(&[&format!("--exclude=.{name}")]);
    }
    for volume in backup.volumes {
        add(&[&format!(".{}", volume.target)]);
    }
    all
}

/// Does what the file says: never returns if all goes well.
///
/// # Errors
/// Something cannot be mounted, or tar not be run.
pub fn run(path: &Path) -> Result<()> {
    let text = fs::read(path).map_err(io("read", path))?;
    let work: Work =
        serde_json::from_slice(&text).map_err(|e| Error::Backend(format!("{}: {e}", path.display())))?;
    let failed = |what| move |e: std::io::Error| io(what, Path::new(PLACE))(e);
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(|e| failed("unshare mounts for")(e.into()))?;
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", flags).map_err(|e| failed("unshare mounts for")(e.into()))?;
    fs::create_dir_all(PLACE).map_err(failed("create"))?;
    for mount in &work.mounts {
        mount_at(mount)?;
    }
    let Some((program, args)) = work.command.split_first() else {
        return Err(Error::Backend(format!("{}: no command", path.display())));
    };
    Err(io("run", Path::new(program))(std::process::Command::new(program).args(args).exec()))
}

fn mount_at(mount: &Mount) -> Result<()> {
    let target = PathBuf::from(format!("{PLACE}{}", mount.target));
    match &mount.source {
        Source::Dir(dir) => {
            rustix::mount::mount_bind(dir, &target).map_err(|e| io("bind at", &target)(e.into()))
        }
        Source::Snapshot(name) => {
            let output = std::process::Command::new("mount")
                .args(["-o", "ro", "-t", "zfs", name])
                .arg(&target)
                .output()
                .map_err(io("run", Path::new("mount")))?;
            if output.status.success() {
                return Ok(());
            }
            Err(Error::Tool {
                program: "mount".into(),
                args: format!("-o ro -t zfs {name} {}", target.display()),
                status: output.status.to_string(),
                stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{backend::BackedUp, guest::backup::Compression};

    fn volumes() -> Vec<BackedUp> {
        let storage = "name = 'z'\ntype = 'zfspool'\ncontent = ['rootdir']\npool = 'p'";
        let of = |volume: &str, target: &str| BackedUp {
            storage: toml::from_str(storage).unwrap(),
            volume: volume.into(),
            target: target.into(),
        };
        vec![of("subvol-100-disk-0", "/"), of("subvol-100-disk-1", "/data")]
    }

    #[test]
    fn tar_runs_in_the_cts_user_namespace_and_the_config_comes_first() {
        let volumes = volumes();
        let backup = Backup {
            volumes: &volumes,
            snapshot: Some("vzdump"),
            meta: Path::new("/d/x.tmp"),
            excluded: &["/tmp/?*"],
            unprivileged: true,
            compression: Compression::Gzip,
            file: Path::new("/d/x.dat"),
        };
        let all = tar(&backup).join(" ");
        assert!(
            all.starts_with("lxc-usernsexec -m u:0:100000:65536 -m g:0:100000:65536 -- tar -cpf - --gzip "),
            "{all}"
        );
        assert!(
            all.ends_with(
                "--directory=/d/x.tmp ./etc/vzdump/pct.conf ./etc/vzdump/pct.fw --directory=/mnt/vzsnap0 --no-anchored \
                 --exclude=lost+found --anchored --exclude=./tmp/?* ./ ./data"
            ),
            "{all}"
        );
        assert!(
            tar(&Backup { unprivileged: false, ..backup }).join(" ").starts_with("tar -cpf - --gzip --one")
        );
    }

    #[tokio::test]
    async fn what_the_program_writes_is_the_archive_and_a_failure_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.dat");
        let backup = |file| Backup {
            volumes: &[],
            snapshot: None,
            meta: dir.path(),
            excluded: &[],
            unprivileged: true,
            compression: Compression::Gzip,
            file,
        };
        write("echo", backup(&file)).await.unwrap();
        let written = fs::read_to_string(&file).unwrap();
        assert_eq!(written, format!("ct-tar {}\n", dir.path().join("tar.json").display()));
        assert!(write("false", backup(&file)).await.is_err());
        assert!(write("/nonexistent/tar", backup(&file)).await.is_err());
    }
}
