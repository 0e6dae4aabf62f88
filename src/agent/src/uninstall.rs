//! Taking from a host what Moxlet made on it: liblxc's lock files, the network, `ip_forward`, the mounts below its directory and,
//! where that is asked for, the directory.
//!
//! Each step can be run again from any point, and one that fails keeps none of the others. Whoever calls holds the lock of the
//! directory, so that no agent runs on it. What is on a ZFS dataset is left to its administrator.

use std::{fs, io::ErrorKind, path::Path};

use moxlet_network::{forwarding, take_down};
use moxlet_sandbox::{LxcConfig, LxcEngine};
use moxlet_storage::mounts;

use crate::{
    Config, PATIENCE,
    config::EngineSettings,
    engine,
    error::{Error, Result},
    tasks::blocking,
};

/// Where a pod that is left has a name: the ledger, and the engines' records.
const PODS: [&str; 3] = ["ledger/sandboxes", "lxc/ct", "pve/ct"];
/// Below these directories whatever is mounted is Moxlet's. An administrator may have mounted one of them.
const MOUNTS: [&str; 4] = ["lxc", "pods", "storage", "volumes"];

/// Something that was taken down.
#[derive(Debug)]
pub struct Step {
    /// What it is, as a person would name it.
    pub what: String,
    /// Whether it is gone.
    pub outcome: Result<()>,
}

/// Takes down what is on the host of the agent of this configuration; also its files, if `with_files`.
///
/// # Errors
/// There are pods: nothing has been touched.
pub async fn uninstall(config: &Config, with_files: bool) -> Result<Vec<Step>> {
    let root = config.root_dir.clone();
    let checked = root.clone();
    blocking(move || no_pods(&checked)).await?;
    let mut steps = Vec::new();
    let mut step = |what: String, outcome: Result<()>| steps.push(Step { what, outcome });
    if matches!(config.engine, EngineSettings::Lxc) {
        step("the engine's directory and liblxc's lock files".into(), engine_directory(config).await);
        if config.cni.use_host_conf.is_none() {
            let what = format!("the bridge {}, if Moxlet made it, and its masquerading", config.cni.bridge);
            step(what, take_down(&engine::cni(config)).await.map_err(Error::from));
        }
        let record = root.join("ip_forward");
        let restored = blocking(move || Ok(forwarding::restore(&record)?)).await;
        step("net.ipv4.ip_forward as it was".into(), restored);
    }
    let below = root.clone();
    let unmounted = blocking(move || unmount(&below)).await;
    step(format!("what is mounted below {}", root.display()), unmounted);
    if with_files {
        let what = format!("all files in {}", root.display());
        // They say what is still to be done.
        let outcome = if steps.iter().any(|s| s.outcome.is_err()) {
            Err(Error::State("they stay until nothing else fails".to_owned()))
        } else {
            blocking(move || remove(&root)).await
        };
        steps.push(Step { what, outcome });
    }
    Ok(steps)
}

fn no_pods(root: &Path) -> Result<()> {
    for dir in PODS.map(|dir| root.join(dir)) {
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(Error::io(format!("cannot list {}", dir.display()), e)),
        };
        let mut names = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned());
        if let Some(name) = names.find(|name| !name.starts_with('.')) {
            return Err(Error::State(format!(
                "there are pods on this host ({}): end them while Moxlet runs, by `kubectl drain` or by \
                 `crictl --runtime-endpoint unix://{}/run/agent.sock rmp --all --force`",
                dir.join(name).display(),
                root.display()
            )));
        }
    }
    Ok(())
}

async fn engine_directory(config: &Config) -> Result<()> {
    let dir = config.root_dir.join("lxc");
    if !dir.exists() {
        return Ok(());
    }
    let settings = LxcConfig { dir, map: config.map, manage_subids: false, start_timeout: PATIENCE };
    Ok(LxcEngine::new(settings).await?.remove_directory().await?)
}

fn unmount(root: &Path) -> Result<()> {
    let mut outcome = Ok(());
    for dir in MOUNTS.map(|dir| root.join(dir)) {
        outcome = outcome.and(mounts::unmount_all_below(&dir));
    }
    // This one is bound on itself by the agent.
    outcome = outcome.and(mounts::unmount(&root.join("pods")));
    Ok(outcome?)
}

/// Removes all that is in a directory, and the directory unless somebody has mounted it.
fn remove(root: &Path) -> Result<()> {
    // A removal goes into what is mounted.
    if let Some(path) = mounts::mounted_below(root)?.first() {
        return Err(Error::State(format!("{} is mounted: unmount it first", path.display())));
    }
    let failed = |e| Error::io(format!("cannot remove {}", root.display()), e);
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(e)),
    };
    for entry in entries {
        let entry = entry.map_err(failed)?;
        let is_dir = entry.file_type().map_err(failed)?.is_dir();
        let path = entry.path();
        if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }.map_err(failed)?;
    }
    if mounts::is_mounted(root)? { Ok(()) } else { fs::remove_dir(root).map_err(failed) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::CniSettings;

    /// An agent's directory, and a configuration whose bridge nobody has.
    fn host() -> (tempfile::TempDir, Config) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("moxlet");
        for dir in ["ledger/sandboxes", "pods", "images", "run"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        fs::write(root.join("images/a"), "").unwrap();
        let cni = CniSettings { bridge: "moxlet-nobodys".into(), ..Config::default().cni };
        (dir, Config { root_dir: root, cni, ..Config::default() })
    }

    fn failures(steps: Vec<Step>) -> Vec<Step> {
        steps.into_iter().filter(|s| s.outcome.is_err()).collect()
    }

    #[tokio::test]
    async fn nothing_is_touched_while_a_pod_is_left() {
        for pod in ["ledger/sandboxes/a.json", "pve/ct/a.json"] {
            let (_dir, config) = host();
            let path = config.root_dir.join(pod);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            let error = uninstall(&config, true).await.unwrap_err().to_string();
            assert!(error.contains(pod) && error.contains("kubectl drain"), "{error}");
            assert!(config.root_dir.join("images/a").exists());
        }
    }

    #[tokio::test]
    async fn mounts_go_and_files_only_where_that_is_asked_for() {
        let (_dir, config) = host();
        let pods = config.root_dir.join("pods");
        mounts::make_shared_dir(&pods).unwrap();
        let failed = failures(uninstall(&config, false).await.unwrap());
        assert!(failed.is_empty(), "{failed:?}");
        assert!(!mounts::is_mounted(&pods).unwrap() && config.root_dir.join("images/a").exists());
        for _ in 0..2 {
            let failed = failures(uninstall(&config, true).await.unwrap());
            assert!(failed.is_empty(), "{failed:?}");
            assert!(!config.root_dir.exists());
        }
    }

    #[tokio::test]
    async fn what_an_administrator_has_mounted_stays_and_keeps_the_files() {
        let (_dir, config) = host();
        let theirs = config.root_dir.join("images");
        mounts::make_shared_dir(&theirs).unwrap();
        let failed = failures(uninstall(&config, true).await.unwrap());
        mounts::unmount(&theirs).unwrap();
        assert!(failed.len() == 1 && failed[0].what.contains("files"), "{failed:?}");
        assert!(theirs.join("a").exists());
    }
}
