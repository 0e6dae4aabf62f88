//! Static pods: manifests in a folder, YAML or JSON, looked at every two seconds; a changed file is another pod.

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
use tracing::warn;

use crate::{
    error::{Error, Result, chain},
    pods::{
        manager::{Source, Update},
        names,
    },
};

const PERIOD: Duration = Duration::from_secs(2);
/// The largest manifest that is read, and the most of them.
const MAX_BYTES: u64 = 1 << 20;
const MAX_FILES: usize = 1000;

/// Reads the folder until stopped.
pub(crate) async fn watch(
    folder: PathBuf,
    node: String,
    updates: mpsc::Sender<Update>,
    stop: CancellationToken,
) {
    let mut known: BTreeMap<String, Arc<Pod>> = BTreeMap::new();
    let mut complaints: BTreeMap<PathBuf, String> = BTreeMap::new();
    let mut period = tokio::time::interval(PERIOD);
    let mut first = true;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = period.tick() => {}
        }
        let (dir, name) = (folder.clone(), node.clone());
        let Ok((pods, broken)) = tokio::task::spawn_blocking(move || read(&dir, &name)).await else {
            continue;
        };
        for (path, text) in &broken {
            if complaints.get(path) != Some(text) {
                warn!(path = %path.display(), "{text}");
            }
        }
        complaints = broken;
        let mut news = Vec::new();
        for (uid, pod) in &known {
            // A file that cannot be read for the moment takes nothing down.
            if !pods.contains_key(uid) && complaints.is_empty() {
                news.push(Update::Gone(pod.clone()));
            }
        }
        for (uid, pod) in &pods {
            if !known.contains_key(uid) {
                news.push(Update::Apply(Source::Files, Arc::new(pod.clone())));
            }
        }
        if complaints.is_empty() {
            known.retain(|uid, _| pods.contains_key(uid));
        }
        known.extend(pods.into_iter().map(|(uid, pod)| (uid, Arc::new(pod))));
        if std::mem::take(&mut first) {
            news.push(Update::Listed(Source::Files, known.keys().cloned().collect::<HashSet<_>>()));
        }
        for update in news {
            if updates.send(update).await.is_err() {
                return;
            }
        }
    }
}

fn read(folder: &Path, node: &str) -> (BTreeMap<String, Pod>, BTreeMap<PathBuf, String>) {
    let mut pods = BTreeMap::new();
    let mut broken = BTreeMap::new();
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return (pods, broken),
        Err(e) => {
            broken.insert(folder.to_owned(), format!("could not read the folder: {e}"));
            return (pods, broken);
        }
    };
    for entry in entries.flatten().take(MAX_FILES) {
        let path = entry.path();
        let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
        let manifest =
            path.extension().is_some_and(|e| ["yaml", "yml", "json"].contains(&e.to_string_lossy().as_ref()));
        if hidden || !manifest || !path.is_file() {
            continue;
        }
        match load(&path, node) {
            Ok(pod) => {
                pods.insert(names::uid(&pod).to_owned(), pod);
            }
            Err(e) => {
                broken.insert(path, chain(&e));
            }
        }
    }
    (pods, broken)
}

fn load(path: &Path, node: &str) -> Result<Pod> {
    use std::io::Read;
    let failed = |source| Error::File { what: "read", path: path.to_owned(), source };
    let mut text = String::new();
    std::fs::File::open(path)
        .map_err(failed)?
        .take(MAX_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    let wrong = |reason: String| Error::Manifest { path: path.to_owned(), reason };
    if text.len() as u64 > MAX_BYTES {
        return Err(wrong(format!("larger than {MAX_BYTES} bytes")));
    }
    parse(&text, &path.display().to_string(), node).map_err(wrong)
}

/// Makes a pod of a manifest, with the defaults that the API server would set.
fn parse(text: &str, place: &str, node: &str) -> std::result::Result<Pod, String> {
    let value: serde_json::Value = serde_saphyr::from_str(text).map_err(|e| e.to_string())?;
    if value.get("kind").and_then(serde_json::Value::as_str) != Some("Pod") {
        return Err("kind is not Pod".into());
    }
    let mut pod: Pod = serde_json::from_value(value).map_err(|e| e.to_string())?;
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
    fn what_is_wrong_is_said() {
        for (text, want) in [
            ("kind: Service\n", "kind is not Pod"),
            ("kind: Pod\nmetadata: {}\n", "metadata.name is missing"),
            ("kind: Pod\nmetadata: {name: a}\nspec: {containers: []}\n", "spec.containers is empty"),
            (
                "kind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c}]}\n",
                "container c: image is missing",
            ),
        ] {
            assert_eq!(parse(text, "p", "n").unwrap_err(), want);
        }
        assert!(parse("kind: [", "p", "n").is_err());
    }
}
