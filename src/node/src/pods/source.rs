//! Pods that the API server binds to this node.

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
use crate::relist;

/// Watches until stopped.
pub(crate) async fn watch(
    client: Client,
    node: String,
    updates: mpsc::Sender<Update>,
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
        let update = match event {
            Ok(Some(watcher::Event::Init)) => {
                listed.clear();
                continue;
            }
            Ok(Some(watcher::Event::InitApply(pod))) if ours(&pod) => {
                listed.insert(names::uid(&pod).to_owned());
                Update::Apply(Source::Api, Arc::new(pod))
            }
            Ok(Some(watcher::Event::InitDone)) => Update::Listed(Source::Api, std::mem::take(&mut listed)),
            Ok(Some(watcher::Event::Apply(pod))) if ours(&pod) => Update::Apply(Source::Api, Arc::new(pod)),
            Ok(Some(watcher::Event::Delete(pod))) => Update::Gone(Arc::new(pod)),
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
