//! What an administrator did to the CTs of pods, as the agent saw it, told as events of the pods.
//!
//! The agent keeps its last notices, so that what was seen while nobody listened is told late. Events are named by the time of
//! their notice: told again after a restart of the node they are the same, not more.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::{StreamExt, stream::BoxStream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use moxlet_cri::host::Notice;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{
    cri_client::Runtime,
    error::{Result, chain},
    events::{Kind, Recorder, node_reference, reference},
    pods::registry::PodRegistry,
};

/// Notices that are older when the node starts are not told: API servers keep events for an hour.
const OLDEST: Duration = Duration::from_secs(3600);

/// Where notices come from.
#[async_trait]
pub(crate) trait Source: Send + Sync {
    /// Those younger than this time (nanoseconds since 1970), and all that follow.
    async fn since(&self, ns: i64) -> Result<BoxStream<'static, Result<Notice>>>;
}

#[async_trait]
impl Source for Arc<dyn Runtime> {
    async fn since(&self, ns: i64) -> Result<BoxStream<'static, Result<Notice>>> {
        self.notices(ns).await
    }
}

/// The pauses before a lost stream is opened again: each is twice the one before it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pauses {
    pub(crate) first: Duration,
    pub(crate) longest: Duration,
}

impl Default for Pauses {
    fn default() -> Self {
        Self { first: Duration::from_secs(1), longest: Duration::from_secs(30) }
    }
}

/// Turns notices into events.
pub(crate) struct Teller<S> {
    /// The agent.
    pub(crate) agent: S,
    /// The pods of this node.
    pub(crate) registry: PodRegistry,
    /// Who writes the events.
    pub(crate) events: Recorder,
    /// The node, which is told of CTs that are no pod's.
    pub(crate) node: String,
    /// How long it waits for an agent that is away.
    pub(crate) pauses: Pauses,
}

impl<S: Source> Teller<S> {
    /// Tells until it is stopped; a stream that ends is opened again where it ended.
    pub(crate) async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.follow() => {}
        }
    }

    async fn follow(&self) {
        let oldest = i64::try_from(OLDEST.as_nanos()).unwrap_or(i64::MAX);
        let now = i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX);
        let mut since = now.saturating_sub(oldest);
        let Pauses { first, longest } = self.pauses;
        let mut pause = first;
        loop {
            let opened = Instant::now();
            match self.agent.since(since).await {
                Ok(mut notices) => {
                    while let Some(Ok(notice)) = notices.next().await {
                        since = since.max(notice.at_ns);
                        self.tell(notice);
                    }
                    debug!("the agent's notices have ended");
                }
                Err(error) => debug!(error = %chain(&error), "the agent gives no notices"),
            }
            // One that held for a while was no failure.
            if opened.elapsed() >= longest {
                pause = first;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }

    fn tell(&self, notice: Notice) {
        let kind = if notice.warning { Kind::Warning } else { Kind::Normal };
        let at = Timestamp::from_nanosecond(notice.at_ns.into()).unwrap_or_else(|_| Timestamp::now());
        let object = self.object(&notice);
        self.events.emit_at(object, kind, notice.reason, notice.message, at);
    }

    fn object(&self, notice: &Notice) -> ObjectReference {
        if notice.pod_name.is_empty() {
            return node_reference(&self.node);
        }
        let known = self.registry.get(&notice.pod_namespace, &notice.pod_name);
        match known.filter(|view| view.pod.metadata.uid.as_deref() == Some(&notice.pod_uid)) {
            Some(view) => reference(&view.pod, None),
            None => ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: Some(notice.pod_name.clone()),
                namespace: Some(notice.pod_namespace.clone()),
                uid: Some(notice.pod_uid.clone()),
                ..ObjectReference::default()
            },
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::sync::Mutex;

    use k8s_openapi::api::core::v1::Pod;

    use super::*;
    use crate::{error::Error, pods::registry::PodView};

    /// Streams to be opened one after the other; none: the agent is away. Remembers since when each was asked for.
    #[derive(Default)]
    struct Script {
        streams: Mutex<Vec<Option<Vec<Notice>>>>,
        asked: Mutex<Vec<i64>>,
    }

    #[async_trait]
    impl Source for Arc<Script> {
        async fn since(&self, ns: i64) -> Result<BoxStream<'static, Result<Notice>>> {
            self.asked.lock().unwrap().push(ns);
            let next = self.streams.lock().unwrap().pop();
            match next {
                Some(Some(notices)) => Ok(futures::stream::iter(notices.into_iter().map(Ok)).boxed()),
                Some(None) => Err(Error::Agent {
                    call: "StreamNotices",
                    status: Box::new(tonic::Status::unavailable("away")),
                }),
                None => Ok(futures::stream::pending().boxed()),
            }
        }
    }

    fn notice(pod: &str, reason: &str, at_ns: i64) -> Notice {
        Notice {
            pod_namespace: if pod.is_empty() { String::new() } else { "default".into() },
            pod_name: pod.into(),
            pod_uid: if pod.is_empty() { String::new() } else { format!("uid-{pod}") },
            reason: reason.into(),
            message: format!("CT 1000000: {reason}"),
            warning: reason == "CTDeleted",
            at_ns,
            ..Notice::default()
        }
    }

    fn teller(script: &Arc<Script>, events: Recorder) -> Teller<Arc<Script>> {
        let registry = PodRegistry::default();
        let pauses = Pauses { first: Duration::from_millis(1), longest: Duration::from_secs(60) };
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "web", "namespace": "default", "uid": "uid-web", "resourceVersion": "7"}}))
        .unwrap();
        registry.publish(PodView { pod: Arc::new(pod), sandbox_id: None, containers: Default::default() });
        Teller { agent: script.clone(), registry, events, node: "n1".into(), pauses }
    }

    #[tokio::test]
    async fn notices_become_events_of_the_pod_and_a_lost_stream_is_taken_up_where_it_ended() {
        let script = Arc::new(Script::default());
        let late = i64::try_from(Timestamp::now().as_nanosecond()).unwrap() + 1_000_000_000;
        *script.streams.lock().unwrap() = vec![
            Some(vec![notice("web", "CTDeleted", late + 5)]),
            None,
            Some(vec![notice("web", "CTLocked", late), notice("", "CTForeign", late + 1)]),
        ];
        let (events, mut queue) = Recorder::queued();
        let stop = CancellationToken::new();
        let telling = tokio::spawn(teller(&script, events).run(stop.clone()));
        let locked = queue.recv().await.unwrap();
        assert_eq!((locked.kind, &*locked.reason), (Kind::Normal, "CTLocked"));
        assert_eq!(locked.object.resource_version.as_deref(), Some("7"), "the pod as it is known here");
        assert_eq!(locked.at.as_nanosecond(), i128::from(late));
        let foreign = queue.recv().await.unwrap();
        assert_eq!(
            (foreign.object.kind.as_deref(), foreign.object.name.as_deref()),
            (Some("Node"), Some("n1"))
        );
        let deleted = queue.recv().await.unwrap();
        assert_eq!((deleted.kind, deleted.message.as_str()), (Kind::Warning, "CT 1000000: CTDeleted"));
        let asked = script.asked.lock().unwrap().clone();
        assert_eq!(asked[1..], [late + 1, late + 1], "nothing twice, nothing lost");
        stop.cancel();
        telling.await.unwrap();
    }

    #[test]
    fn a_pod_that_is_not_known_here_any_more_is_named_all_the_same() {
        let (events, mut queue) = Recorder::queued();
        let teller = teller(&Arc::default(), events);
        teller.tell(Notice { pod_uid: "uid-of-an-earlier-web".into(), ..notice("web", "CTBack", 1) });
        let object = queue.try_recv().unwrap().object;
        assert_eq!(object.uid.as_deref(), Some("uid-of-an-earlier-web"));
        assert_eq!((object.name.as_deref(), object.kind.as_deref()), (Some("web"), Some("Pod")));
    }
}
