//! Volumes: datasets `<pool>/subvol-<vmid>-disk-N`, made, listed and destroyed as PVE::Storage::ZFSPoolPlugin does.

use std::{path::Path, time::Duration};

use super::{QUICK, Room, Storage, VolumeInfo, run};
use crate::{Error, Result, backend::tool::command};

/// How often a busy dataset is tried again.
const BUSY_TRIES: u32 = 6;
pub(super) const LONG: Duration = Duration::from_secs(3600);

/// The dataset that holds a storage's volumes.
pub(super) fn pool(storage: &Storage) -> Result<&str> {
    let why = || Error::Backend(format!("storage '{}' is no zfspool", storage.name));
    storage.pool.as_deref().ok_or_else(why)
}

fn check(volume: &str) -> Result<()> {
    let good = volume.starts_with("subvol-") || volume.starts_with("basevol-");
    if good && volume.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
        Ok(())
    } else {
        Err(Error::Backend(format!("unable to parse zfs volume name '{volume}'")))
    }
}

/// Mounts a volume on the host unless it is mounted, wherever that is.
pub(super) async fn activate(dataset: &str) -> Result<()> {
    activate_by("zfs", dataset).await
}

async fn activate_by(zfs: &str, dataset: &str) -> Result<()> {
    let mounted = run(zfs, &["get", "-Hp", "-o", "value", "mounted", dataset], QUICK).await?;
    if mounted.trim() != "yes" {
        run(zfs, &["mount", dataset], QUICK).await?;
    }
    Ok(())
}

pub(super) async fn volumes(pool: &str) -> Result<Vec<VolumeInfo>> {
    let args = ["list", "-Hp", "-d", "1", "-t", "filesystem", "-o", "name,refquota,refer", pool];
    let text = run("zfs", &args, QUICK).await?;
    Ok(text
        .lines()
        .filter_map(|line| {
            let mut fields = line.split('\t');
            let name = fields.next()?.strip_prefix(pool)?.strip_prefix('/')?.to_owned();
            let vmid = name.strip_prefix("subvol-").or_else(|| name.strip_prefix("basevol-"))?;
            let vmid = vmid.split('-').next()?.parse().ok();
            let (size, used) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            Some(VolumeInfo { name, content: "rootdir", format: "subvol", size, used, vmid })
        })
        .collect())
}

fn free_name(vmid: u32, taken: &[VolumeInfo]) -> Result<String> {
    (0..1000)
        .map(|n| format!("subvol-{vmid}-disk-{n}"))
        .find(|name| !taken.iter().any(|v| v.name == *name))
        .ok_or_else(|| Error::Backend(format!("unable to allocate a volume name for VM {vmid}")))
}

pub(super) async fn create(pool: &str, vmid: u32, size: u64, taken: &[VolumeInfo]) -> Result<String> {
    let name = free_name(vmid, taken)?;
    let quota = format!("refquota={size}");
    let dataset = format!("{pool}/{name}");
    run("zfs", &["create", "-o", "acltype=posixacl", "-o", "xattr=sa", "-o", &quota, &dataset], QUICK)
        .await?;
    Ok(name)
}

pub(super) async fn snapshot(pool: &str, volume: &str, name: &str) -> Result<()> {
    check(volume)?;
    run("zfs", &["snapshot", &format!("{pool}/{volume}@{name}")], QUICK).await.map(|_| ())
}

pub(super) async fn destroy_snapshot(pool: &str, volume: &str, name: &str) -> Result<()> {
    destroy_snapshot_by("zfs", &snapshot_name(pool, volume, name)?, Duration::from_secs(1)).await
}

/// One that was mounted is busy until its mount is really gone, and so is tried again.
async fn destroy_snapshot_by(zfs: &str, name: &str, pause: Duration) -> Result<()> {
    for n in 1.. {
        match run(zfs, &["destroy", name], QUICK).await {
            Err(Error::Tool { stderr, .. }) if stderr.contains("could not find any snapshots") => break,
            Err(Error::Tool { stderr, .. }) if stderr.contains("busy") && n < BUSY_TRIES => {
                tokio::time::sleep(pause).await;
            }
            other => return other.map(|_| ()),
        }
    }
    Ok(())
}

pub(super) async fn copy(
    pool: &str,
    volume: &str,
    vmid: u32,
    size: u64,
    taken: &[VolumeInfo],
) -> Result<String> {
    check(volume)?;
    let name = free_name(vmid, taken)?;
    let from = format!("{pool}/{volume}@__copy_{vmid}__");
    let to = format!("{pool}/{name}");
    run("zfs", &["snapshot", &from], QUICK).await?;
    let copied = send(&from, &to).await;
    let _ = run("zfs", &["destroy", &from], QUICK).await;
    copied?;
    let _ = run("zfs", &["destroy", &format!("{to}@__copy_{vmid}__")], QUICK).await;
    run("zfs", &["set", &format!("refquota={size}"), &to], QUICK).await?;
    Ok(name)
}

async fn send(from: &str, to: &str) -> Result<()> {
    let failed = |what: &str, why: String| Error::Backend(format!("zfs {what} {from} {to}: {why}"));
    let mut sender = command("zfs")
        .args(["send", from])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .map_err(|e| failed("send", e.to_string()))?;
    let out = sender.stdout.take().ok_or_else(|| failed("send", "no output".into()))?;
    let out: std::process::Stdio =
        out.try_into().map_err(|e: std::io::Error| failed("send", e.to_string()))?;
    let received = command("zfs").args(["recv", to]).stdin(out).output().await;
    let sent = sender.wait().await.map_err(|e| failed("send", e.to_string()))?;
    let received = received.map_err(|e| failed("recv", e.to_string()))?;
    if sent.success() && received.status.success() {
        Ok(())
    } else {
        Err(failed("recv", String::from_utf8_lossy(&received.stderr).trim().to_owned()))
    }
}

/// Destroys a volume with all below it. One that is gone is no error; one that is busy is tried again.
pub(super) async fn destroy(pool: &str, volume: &str) -> Result<()> {
    check(volume)?;
    let dataset = format!("{pool}/{volume}");
    for n in 0..BUSY_TRIES {
        match run("zfs", &["destroy", "-r", &dataset], QUICK).await {
            Ok(_) => return Ok(()),
            Err(Error::Tool { stderr, .. }) if stderr.contains("dataset does not exist") => return Ok(()),
            Err(Error::Tool { stderr, .. }) if stderr.contains("dataset is busy") && n + 1 < BUSY_TRIES => {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

pub(super) async fn room(pool: &str) -> Result<Room> {
    let text = run("zfs", &["get", "-Hp", "-o", "value", "used,available", pool], QUICK).await?;
    let mut figures = text.lines().filter_map(|l| l.trim().parse::<u64>().ok());
    let used = figures.next().unwrap_or(0);
    Ok(Room { total: used + figures.next().unwrap_or(0), used })
}

/// Where a volume is mounted, which it is afterwards.
pub(super) async fn mounted(pool: &str, volume: &str) -> Result<String> {
    check(volume)?;
    let dataset = format!("{pool}/{volume}");
    let mountpoint = run("zfs", &["get", "-H", "-o", "value", "mountpoint", &dataset], QUICK).await?;
    let mountpoint = mountpoint.trim();
    if !mountpoint.starts_with('/') {
        return Err(Error::Backend(format!("dataset {dataset} is mounted nowhere ({mountpoint})")));
    }
    activate(&dataset).await?;
    Ok(mountpoint.to_owned())
}

/// The snapshot of a volume.
pub(super) fn snapshot_name(pool: &str, volume: &str, name: &str) -> Result<String> {
    check(volume)?;
    Ok(format!("{pool}/{volume}@{name}"))
}

/// Unpacks an archive into a fresh volume, an unprivileged CT's with its ids shifted. A backup's config stays behind.
pub(super) async fn unpack(pool: &str, volume: &str, archive: &Path, unprivileged: bool) -> Result<()> {
    let mountpoint = mounted(pool, volume).await?;
    let mountpoint = mountpoint.as_str();
    let archive = archive.display().to_string();
    let mut tar = vec!["tar", "-xpf", &archive, "--numeric-owner", "-C", mountpoint, "--anchored"];
    tar.extend(["--exclude", "./dev/*", "--exclude", "./etc/vzdump/pct.*"]);
    if unprivileged {
        run("chown", &["100000:100000", mountpoint], QUICK).await?;
        let mut args = vec!["-m", "u:0:100000:65536", "-m", "g:0:100000:65536", "--"];
        args.append(&mut tar);
        run("lxc-usernsexec", &args, LONG).await?;
    } else {
        run("tar", tar.get(1..).unwrap_or_default(), LONG).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use super::*;
    use crate::backend::tool::script;

    #[tokio::test]
    async fn a_snapshot_that_is_still_mounted_is_destroyed_when_it_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let busy = "[ $(wc -l <\"$(dirname \"$0\")/asked\") = 3 ] || { echo 'dataset is busy' >&2; exit 1; }";
        let (zfs, asked) = script(dir.path(), busy);
        destroy_snapshot_by(&zfs, "p/subvol-1-disk-0@vzdump", Duration::ZERO).await.unwrap();
        assert_eq!(fs::read_to_string(asked).unwrap(), "destroy p/subvol-1-disk-0@vzdump\n".repeat(3));
    }

    #[tokio::test]
    async fn a_volume_is_mounted_on_the_host_unless_it_is() {
        let get = "get -Hp -o value mounted p/subvol-1-disk-0\n";
        for (mounted, asked) in [("yes", get.to_owned()), ("no", format!("{get}mount p/subvol-1-disk-0\n"))] {
            let dir = tempfile::tempdir().unwrap();
            let (zfs, file) = script(dir.path(), &format!("echo {mounted}"));
            activate_by(&zfs, "p/subvol-1-disk-0").await.unwrap();
            assert_eq!(fs::read_to_string(file).unwrap(), asked);
        }
    }
}
