//! Pods that the API server binds to this node, and its copies of static pods.

use std::{collections::HashSet, sync::Arc};

use futures::TryStreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, runtime::watcher};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{
    manager::{Source, Update},
    names,
};
use crate::{objects::Objects, relist, static_pods::mirror};

/// Watches until stopped.
pub(crate) async fn watch(
    client: Client,
    node: String,
    updates: mpsc::Sender<Update>,
    mirrors: mpsc::Sender<mirror::Input>,
    objects: Objects,
    stop: CancellationToken,
) {
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    let mut stream = std::pin::pin!(relist::watch(Api::<Pod>::all(client), config));
    let mut listed = HashSet::new();
    loop {
        let event = tokio::select! {
            () = stop.cancelled() => return,
            event = stream.try_next() => event,
        };
        let ours = |pod: &Pod| pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(node.as_str());
        let for_mirrors = match &event {
            Ok(Some(watcher::Event::InitApply(pod) | watcher::Event::Apply(pod)))
                if mirror::is_mirror(pod) =>
            {
                Some(mirror::Input::Shown(Arc::new(pod.clone())))
            }
            Ok(Some(watcher::Event::Delete(pod))) if mirror::is_mirror(pod) => {
                Some(mirror::Input::Removed(Arc::new(pod.clone())))
            }
            _ => None,
        };
        if let Some(input) = for_mirrors {
            if let Ok(Some(watcher::Event::InitApply(pod))) = &event {
                listed.insert(names::uid(pod).to_owned());
            }
            if mirrors.send(input).await.is_err() {
                return;
            }
            continue;
        }
        let update = match event {
            Ok(Some(watcher::Event::Init)) => {
                listed.clear();
                continue;
            }
            Ok(Some(watcher::Event::InitApply(pod))) if ours(&pod) => {
                listed.insert(names::uid(&pod).to_owned());
                objects.set(&pod);
                Update::Apply(Source::Api, Arc::new(pod))
            }
            Ok(Some(watcher::Event::InitDone)) => {
                let listed = std::mem::take(&mut listed);
                objects.keep(&listed);
                if mirrors.send(mirror::Input::Listed(listed.clone())).await.is_err() {
                    return;
                }
                Update::Listed(Source::Api, listed)
            }
            Ok(Some(watcher::Event::Apply(pod))) if ours(&pod) => {
                objects.set(&pod);
                Update::Apply(Source::Api, Arc::new(pod))
            }
            Ok(Some(watcher::Event::Delete(pod))) => {
                objects.remove(names::uid(&pod));
                Update::Gone(Arc::new(pod))
            }
            Ok(Some(_)) => continue,
            Ok(None) => return,
            Err(error) => {
                warn!(%error, "cannot watch pods");
                continue;
            }
        };
        if updates.send(update).await.is_err() {
            return;
        }
    }
}
