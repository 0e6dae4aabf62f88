//! The manifests of static pods: files of a folder, YAML or JSON, looked at every two seconds. A changed file is another pod.
//!
//! Each file stands for itself: one that cannot be read or is no pod changes nothing of the others, and what ran of it before runs on
//! until it is mended or removed.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::{Pod, Toleration};
use moxlet_ids::Digest;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::mirror;
use crate::model::names;
use crate::{
    error::{Error, Result, chain},
    pods::updates::{Source, Update},
};

const PERIOD: Duration = Duration::from_secs(2);
/// The largest manifest that is read.
const MAX_BYTES: u64 = 1 << 20;
/// The most manifests of a folder.
const MAX_FILES: usize = 1000;

/// Reads the folder until stopped; the manager and the keeper of mirror pods learn what has changed.
pub(crate) async fn watch(
    folder: PathBuf,
    node: String,
    updates: mpsc::Sender<Update>,
    mirrors: mpsc::Sender<mirror::Input>,
    stop: CancellationToken,
) {
    let mut manifests = Manifests::default();
    let mut period = tokio::time::interval(PERIOD);
    let mut first = true;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = period.tick() => {}
        }
        let (dir, name) = (folder.clone(), node.clone());
        let Ok(found) = tokio::task::spawn_blocking(move || read(&dir, &name)).await else { continue };
        let changes = manifests.take(found);
        for (path, error) in &changes.errors {
            warn!(path = %path.display(), error, "a static pod's manifest cannot be used");
        }
        for path in &changes.mended {
            info!(path = %path.display(), "a static pod's manifest is in order, or gone");
        }
        let mut news: Vec<_> = changes.gone.into_iter().map(Update::Gone).collect();
        news.extend(changes.applied.into_iter().map(|pod| Update::Apply(Source::Files, pod)));
        if std::mem::take(&mut first) {
            news.push(Update::Listed(Source::Files, manifests.uids()));
        }
        if !news.is_empty() && mirrors.send(mirror::Input::Static(manifests.pods())).await.is_err() {
            return;
        }
        for update in news {
            if updates.send(update).await.is_err() {
                return;
            }
        }
    }
}

/// What one look at the folder found: a pod or an error for each file; or why the folder itself cannot be read.
type Found = std::result::Result<BTreeMap<PathBuf, std::result::Result<Pod, String>>, (PathBuf, String)>;

/// What one look at the folder changes.
#[derive(Debug, Default)]
struct Changes {
    gone: Vec<Arc<Pod>>,
    applied: Vec<Arc<Pod>>,
    errors: Vec<(PathBuf, String)>,
    mended: Vec<PathBuf>,
}

/// The pods of the folder's files, and which files cannot be used.
#[derive(Debug, Default)]
struct Manifests {
    pods: BTreeMap<PathBuf, Arc<Pod>>,
    errors: BTreeMap<PathBuf, String>,
}

impl Manifests {
    fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.values().cloned().collect()
    }

    fn uids(&self) -> HashSet<String> {
        self.pods.values().map(|p| names::uid(p).to_owned()).collect()
    }

    /// Takes in what was found; an error that stays is logged once.
    fn take(&mut self, found: Found) -> Changes {
        let mut changes = Changes::default();
        let before = std::mem::take(&mut self.errors);
        match found {
            Ok(files) => {
                let gone: Vec<_> =
                    self.pods.keys().filter(|path| !files.contains_key(*path)).cloned().collect();
                changes.gone.extend(gone.iter().filter_map(|path| self.pods.remove(path)));
                for (path, file) in files {
                    if let Err(error) = file.and_then(|pod| self.replace(&path, pod, &mut changes)) {
                        self.errors.insert(path, error);
                    }
                }
            }
            // Nothing is known of any file: all stays.
            Err((folder, error)) => {
                self.errors.clone_from(&before);
                self.errors.insert(folder, error);
            }
        }
        let new = self.errors.iter().filter(|(path, error)| before.get(*path) != Some(*error));
        changes.errors = new.map(|(path, error)| (path.clone(), error.clone())).collect();
        changes.mended = before.into_keys().filter(|path| !self.errors.contains_key(path)).collect();
        changes
    }

    fn replace(&mut self, path: &Path, pod: Pod, changes: &mut Changes) -> std::result::Result<(), String> {
        let same_name = |other: &Pod| {
            (names::namespace(other), names::name(other)) == (names::namespace(&pod), names::name(&pod))
        };
        if let Some((other, _)) = self.pods.iter().find(|(p, other)| *p != path && same_name(other)) {
            return Err(format!("{} has a pod of the same name", other.display()));
        }
        if self.pods.get(path).is_some_and(|old| names::uid(old) == names::uid(&pod)) {
            return Ok(());
        }
        let pod = Arc::new(pod);
        changes.gone.extend(self.pods.insert(path.to_owned(), pod.clone()));
        changes.applied.push(pod);
        Ok(())
    }
}

fn read(folder: &Path, node: &str) -> Found {
    let failed = |e: std::io::Error| (folder.to_owned(), format!("could not read the folder: {e}"));
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(e) => return Err(failed(e)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
        let manifest =
            path.extension().is_some_and(|e| ["yaml", "yml", "json"].contains(&e.to_string_lossy().as_ref()));
        if !hidden && manifest && path.is_file() {
            paths.push(path);
        }
        if paths.len() > MAX_FILES {
            return Err((
                folder.to_owned(),
                format!("there are more than {MAX_FILES} manifests in the folder"),
            ));
        }
    }
    let load = |path: PathBuf| {
        let pod = load(&path, node).map_err(|e| chain(&e));
        (path, pod)
    };
    Ok(paths.into_iter().map(load).collect())
}

fn load(path: &Path, node: &str) -> Result<Pod> {
    let text = moxlet_files::read_text_bounded(path, MAX_BYTES).map_err(|source| Error::File {
        what: "read",
        path: path.to_owned(),
        source,
    })?;
    parse(&text, &path.display().to_string(), node)
        .map_err(|reason| Error::Manifest { path: path.to_owned(), reason })
}

/// Reads a manifest as kubectl does: YAML with the octal numbers of its version 1.1, in which Kubernetes' examples give modes.
/// A field that no pod has is an error, since what it was meant for would not happen.
fn decode(text: &str) -> std::result::Result<Pod, String> {
    let options = serde_saphyr::options! { legacy_octal_numbers: true };
    let value: serde_json::Value =
        serde_saphyr::from_str_with_options(text, options).map_err(|e| e.to_string())?;
    if value.get("kind").and_then(serde_json::Value::as_str) != Some("Pod") {
        return Err("kind is not Pod".into());
    }
    let mut unknown = Vec::new();
    let pod = serde_ignored::deserialize(value, |path| {
        // `?` stands for a field that may be missing: no part of the name.
        unknown.push(path.to_string().replace(".?", ""));
    });
    let pod = pod.map_err(|e: serde_json::Error| e.to_string())?;
    if !unknown.is_empty() {
        unknown.truncate(8);
        return Err(format!("unknown field {}", unknown.join(", ")));
    }
    Ok(pod)
}

/// Makes a pod of a manifest, with the defaults that the API server would set.
fn parse(text: &str, place: &str, node: &str) -> std::result::Result<Pod, String> {
    let mut pod = decode(text)?;
    let name = pod.metadata.name.clone().filter(|n| !n.is_empty()).ok_or("metadata.name is missing")?;
    let label = |n: &str| {
        !n.is_empty()
            && n.len() <= 253
            && n.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
    };
    if !label(&name) {
        return Err(format!("metadata.name {name:?} is no DNS name"));
    }
    let spec = pod.spec.as_mut().ok_or("spec is missing")?;
    if spec.containers.is_empty() {
        return Err("spec.containers is empty".into());
    }
    let mut seen = HashSet::new();
    for c in spec.init_containers.iter().flatten().chain(&spec.containers) {
        if !label(&c.name) || !seen.insert(c.name.clone()) {
            return Err(format!("container name {:?} is invalid or not unique", c.name));
        }
        if c.image.as_deref().unwrap_or_default().is_empty() {
            return Err(format!("container {}: image is missing", c.name));
        }
    }
    let hash = Digest::of(format!("{node}\n{place}\n{text}").as_bytes()).hex()[..32].to_owned();
    spec.node_name = Some(node.to_owned());
    spec.restart_policy.get_or_insert_with(|| "Always".into());
    spec.termination_grace_period_seconds.get_or_insert(30);
    spec.enable_service_links.get_or_insert(true);
    spec.dns_policy.get_or_insert_with(|| "ClusterFirst".into());
    spec.tolerations.get_or_insert_default().push(Toleration {
        operator: Some("Exists".into()),
        effect: Some("NoExecute".into()),
        ..Toleration::default()
    });
    let meta = &mut pod.metadata;
    meta.name = Some(format!("{name}-{node}"));
    meta.namespace.get_or_insert_with(|| "default".into());
    meta.uid = Some(hash.clone());
    let notes = meta.annotations.get_or_insert_default();
    notes.insert(names::SOURCE.into(), "file".into());
    notes.insert("kubernetes.io/config.hash".into(), hash);
    Ok(pod)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    const GOOD: &str = "kind: Pod\napiVersion: v1\nmetadata:\n  name: web\nspec:\n  containers:\n  - name: c\n    image: busybox:1\n";

    fn pod(name: &str, image: &str) -> Pod {
        let text = GOOD.replace("web", name).replace("busybox:1", image);
        parse(&text, name, "n1").unwrap()
    }

    fn folder(files: &[(&str, std::result::Result<Pod, &str>)]) -> Found {
        Ok(files
            .iter()
            .map(|(name, file)| (PathBuf::from(name), file.clone().map_err(str::to_owned)))
            .collect())
    }

    fn names_of(pods: &[Arc<Pod>]) -> Vec<&str> {
        pods.iter().map(|p| names::name(p)).collect()
    }

    #[test]
    fn a_manifest_becomes_a_pod_of_this_node() {
        let pod = parse(GOOD, "/m/web.yaml", "n1").unwrap();
        assert_eq!((names::namespace(&pod), names::name(&pod)), ("default", "web-n1"));
        assert_eq!(names::uid(&pod).len(), 32);
        assert!(names::is_static(&pod));
        let other = parse(&GOOD.replace("busybox:1", "busybox:2"), "/m/web.yaml", "n1").unwrap();
        assert_ne!(names::uid(&pod), names::uid(&other));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, want) in [
            ("kind: Service\n", "kind is not Pod"),
            ("kind: Pod\nmetadata: {}\n", "metadata.name is missing"),
            ("kind: Pod\nmetadata: {name: a}\nspec: {containers: []}\n", "spec.containers is empty"),
            (
                "kind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c}]}\n",
                "container c: image is missing",
            ),
            (
                "kind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c, image: i, comand: [x]}]}\n",
                "unknown field spec.containers.0.comand",
            ),
        ] {
            assert_eq!(parse(text, "p", "n").unwrap_err(), want);
        }
        assert!(parse("kind: [", "p", "n").is_err());
    }

    #[test]
    fn numbers_mean_what_kubectl_reads_in_them() {
        let text = format!(
            "{GOOD}    resources: {{limits: {{cpu: 1, memory: 64Mi}}}}\n  volumes:\n  - name: v\n    secret: {{secretName: s, defaultMode: 0400, items: [{{key: k, path: p, mode: 0o600}}]}}\n"
        );
        let pod = parse(&text, "p", "n").unwrap();
        let spec = pod.spec.unwrap();
        assert_eq!(spec.containers[0].resources.as_ref().unwrap().limits.as_ref().unwrap()["cpu"].0, "1");
        let secret = spec.volumes.unwrap()[0].secret.clone().unwrap();
        assert_eq!(secret.default_mode, Some(0o400));
        assert_eq!(secret.items.unwrap()[0].mode, Some(0o600));
    }

    #[test]
    fn a_broken_file_holds_up_no_other_and_its_own_pod_runs_on() {
        let mut manifests = Manifests::default();
        let all = [("a", Ok(pod("a", "i:1"))), ("b", Ok(pod("b", "i:1"))), ("c", Ok(pod("c", "i:1")))];
        assert_eq!(manifests.take(folder(&all)).applied.len(), 3);
        let changes = manifests.take(folder(&[("a", Ok(pod("a", "i:2"))), ("b", Err("half written"))]));
        assert_eq!(names_of(&changes.gone), ["c-n1", "a-n1"]);
        assert_eq!(names_of(&changes.applied), ["a-n1"]);
        assert_eq!(changes.errors.len(), 1);
        assert!(
            manifests
                .take(folder(&[("a", Ok(pod("a", "i:2"))), ("b", Err("half written"))]))
                .errors
                .is_empty()
        );
        let changes = manifests.take(folder(&[("a", Ok(pod("a", "i:2"))), ("b", Ok(pod("b", "i:1")))]));
        assert_eq!(changes.mended, [PathBuf::from("b")]);
        assert!(changes.applied.is_empty() && changes.gone.is_empty(), "the same as before it was broken");
    }

    #[test]
    fn a_folder_that_cannot_be_read_takes_nothing_down() {
        let mut manifests = Manifests::default();
        manifests.take(folder(&[("a", Ok(pod("a", "i:1")))]));
        let changes = manifests.take(Err((PathBuf::from("/m"), "away".into())));
        assert!(changes.gone.is_empty() && changes.errors.len() == 1);
        assert_eq!(manifests.take(folder(&[])).gone.len(), 1);
    }

    #[test]
    fn two_files_with_one_pods_name_are_told_apart() {
        let mut manifests = Manifests::default();
        let changes = manifests.take(folder(&[("a", Ok(pod("web", "i:1"))), ("b", Ok(pod("web", "i:2")))]));
        assert_eq!(changes.applied.len(), 1);
        assert!(changes.errors[0].1.contains("a has a pod of the same name"), "{:?}", changes.errors);
        let changes = manifests.take(folder(&[("b", Ok(pod("web", "i:2")))]));
        assert_eq!((changes.gone.len(), changes.applied.len()), (1, 1));
    }
}
