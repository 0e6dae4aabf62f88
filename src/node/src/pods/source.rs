//! Pods that the API server binds to this node, and its copies of static pods.

use std::{collections::HashSet, sync::Arc};

use futures::TryStreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, runtime::watcher};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::updates::{Source, Update};
use crate::model::names;
use crate::{objects::Objects, relist, static_pods::mirror};

/// Where what the API server shows goes to.
struct Feed {
    node: String,
    updates: mpsc::Sender<Update>,
    mirrors: mpsc::Sender<mirror::Input>,
    objects: Objects,
    /// UIDs of the list that is being read.
    listed: HashSet<String>,
}

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
    let mut feed = Feed { node, updates, mirrors, objects, listed: HashSet::new() };
    loop {
        let event = tokio::select! {
            () = stop.cancelled() => return,
            event = stream.try_next() => event,
        };
        let goes_on = match event {
            Ok(Some(event)) => feed.pass_on(event).await,
            Ok(None) => false,
            Err(error) => {
                warn!(%error, "cannot watch pods");
                true
            }
        };
        if !goes_on {
            return;
        }
    }
}

impl Feed {
    /// Passes an event on; answers whether somebody still listens.
    async fn pass_on(&mut self, event: watcher::Event<Pod>) -> bool {
        match event {
            watcher::Event::Init => {
                self.listed.clear();
                true
            }
            watcher::Event::InitApply(pod) => {
                if mirror::is_mirror(&pod) || self.is_ours(&pod) {
                    self.listed.insert(names::uid(&pod).to_owned());
                }
                self.shown(pod).await
            }
            watcher::Event::InitDone => {
                let listed = std::mem::take(&mut self.listed);
                self.objects.keep(&listed);
                self.mirrors.send(mirror::Input::Listed(listed.clone())).await.is_ok()
                    && self.updates.send(Update::Listed(Source::Api, listed)).await.is_ok()
            }
            watcher::Event::Apply(pod) => self.shown(pod).await,
            watcher::Event::Delete(pod) if mirror::is_mirror(&pod) => {
                self.mirrors.send(mirror::Input::Removed(Arc::new(pod))).await.is_ok()
            }
            watcher::Event::Delete(pod) => {
                self.objects.remove(names::uid(&pod));
                self.updates.send(Update::Gone(Arc::new(pod))).await.is_ok()
            }
        }
    }

    fn is_ours(&self, pod: &Pod) -> bool {
        pod.spec.as_ref().and_then(|s| s.node_name.as_ref()) == Some(&self.node)
    }

    async fn shown(&self, pod: Pod) -> bool {
        if mirror::is_mirror(&pod) {
            return self.mirrors.send(mirror::Input::Shown(Arc::new(pod))).await.is_ok();
        }
        if !self.is_ours(&pod) {
            return true;
        }
        self.objects.set(&pod);
        self.updates.send(Update::Apply(Source::Api, Arc::new(pod))).await.is_ok()
    }
}
