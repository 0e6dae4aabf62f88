//! Events with the kubelet's reasons, written by one task off everybody's path: repeated ones are counted, floods are cut.

use std::{collections::HashMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference, Pod},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::pods::names;

/// Whose events these are.
const COMPONENT: &str = "kubelet";
/// Events that wait to be written; more are dropped.
const QUEUE: usize = 4096;
/// Series that are remembered.
const SERIES: usize = 4096;
/// What one object may say at once, and how often after that.
const BURST: f64 = 25.0;
const REFILL_PER_SECOND: f64 = 1.0 / 30.0;
/// How long a write may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// How grave an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// All went well.
    Normal,
    /// Something did not.
    Warning,
}

#[derive(Debug)]
struct Note {
    object: ObjectReference,
    kind: Kind,
    reason: &'static str,
    message: String,
    at: Timestamp,
}

/// Takes events from anywhere; never waits.
#[derive(Clone)]
pub(crate) struct Recorder {
    notes: mpsc::Sender<Note>,
}

/// A pod, or one of its containers, as an event names it.
pub(crate) fn reference(pod: &Pod, container: Option<&str>) -> ObjectReference {
    let init =
        |name: &str| pod.spec.iter().flat_map(|s| s.init_containers.iter().flatten()).any(|c| c.name == name);
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        name: pod.metadata.name.clone(),
        namespace: Some(names::namespace(pod).to_owned()),
        uid: pod.metadata.uid.clone(),
        resource_version: pod.metadata.resource_version.clone(),
        field_path: container
            .map(|c| format!("spec.{}{{{c}}}", if init(c) { "initContainers" } else { "containers" })),
    }
}

/// The node, as an event names it.
pub(crate) fn node_reference(node: &str) -> ObjectReference {
    ObjectReference {
        kind: Some("Node".into()),
        name: Some(node.to_owned()),
        uid: Some(node.to_owned()),
        ..ObjectReference::default()
    }
}

impl Recorder {
    /// A recorder and the task that writes; without a client events are only logged.
    pub(crate) fn new(
        client: Option<Client>,
        host: String,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()>) {
        let (notes, queue) = mpsc::channel(QUEUE);
        (Self { notes }, write(queue, client, host, stop))
    }

    /// Says something of an object.
    pub(crate) fn say(
        &self,
        object: ObjectReference,
        kind: Kind,
        reason: &'static str,
        message: impl Into<String>,
    ) {
        let mut message = message.into();
        if message.len() > 1024 {
            let end = (0..=1021).rev().find(|i| message.is_char_boundary(*i)).unwrap_or(0);
            message.truncate(end);
            message.push_str("...");
        }
        let name = object.name.as_deref().unwrap_or_default();
        info!(namespace = object.namespace.as_deref(), name, reason, message, "event");
        // A full queue loses the newest event: never worth a wait.
        let _ = self.notes.try_send(Note { object, kind, reason, message, at: Timestamp::now() });
    }

    /// Says something of a pod or of one of its containers.
    pub(crate) fn pod(
        &self,
        pod: &Pod,
        container: Option<&str>,
        kind: Kind,
        reason: &'static str,
        message: impl Into<String>,
    ) {
        self.say(reference(pod, container), kind, reason, message);
    }
}

type SeriesKey = (String, String, Kind, &'static str, String);

struct Series {
    name: String,
    count: i32,
    first: Timestamp,
    used: Instant,
}

/// Lets an object say so much at once and then little.
struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    fn take(&mut self, now: Instant) -> bool {
        self.left = (self.left + now.duration_since(self.at).as_secs_f64() * REFILL_PER_SECOND).min(BURST);
        self.at = now;
        if self.left < 1.0 {
            return false;
        }
        self.left -= 1.0;
        true
    }
}

async fn write(
    mut queue: mpsc::Receiver<Note>,
    client: Option<Client>,
    host: String,
    stop: CancellationToken,
) {
    let host = Arc::new(host);
    let mut series: HashMap<SeriesKey, Series> = HashMap::new();
    let mut buckets: HashMap<String, Bucket> = HashMap::new();
    loop {
        let note = tokio::select! {
            note = queue.recv() => note,
            () = stop.cancelled() => return,
        };
        let Some(note) = note else { return };
        let Some(client) = client.clone() else { continue };
        let now = Instant::now();
        let uid = note.object.uid.clone().unwrap_or_default();
        if buckets.len() > SERIES {
            buckets.retain(|_, b| now.duration_since(b.at) < Duration::from_secs(600));
        }
        if !buckets.entry(uid.clone()).or_insert(Bucket { left: BURST, at: now }).take(now) {
            debug!(reason = note.reason, "event dropped, its object says too much");
            continue;
        }
        if series.len() > SERIES {
            series.retain(|_, s| now.duration_since(s.used) < Duration::from_secs(600));
        }
        let field = note.object.field_path.clone().unwrap_or_default();
        let key = (uid, field, note.kind, note.reason, note.message.clone());
        let namespace = note.object.namespace.clone().unwrap_or_else(|| "default".into());
        let api: Api<Event> = Api::namespaced(client, &namespace);
        let known = series.get_mut(&key).map(|s| {
            s.count += 1;
            s.used = now;
            (s.name.clone(), s.count)
        });
        let name = known.as_ref().map_or_else(
            || {
                format!(
                    "{}.{:016x}",
                    note.object.name.as_deref().unwrap_or_default(),
                    note.at.as_nanosecond()
                )
            },
            |k| k.0.clone(),
        );
        let outcome = tokio::time::timeout(PATIENCE, async {
            if let Some((_, count)) = known {
                let patch = serde_json::json!({"count": count, "lastTimestamp": Time(note.at)});
                match api.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await {
                    Err(kube::Error::Api(status)) if status.code == 404 => {}
                    other => return other.map(|_| ()),
                }
            }
            let first = series.get(&key).map_or(note.at, |s| s.first);
            let event = Event {
                metadata: ObjectMeta {
                    name: Some(name.clone()),
                    namespace: Some(namespace.clone()),
                    ..ObjectMeta::default()
                },
                involved_object: note.object.clone(),
                reason: Some(note.reason.into()),
                message: Some(note.message.clone()),
                type_: Some(if note.kind == Kind::Normal { "Normal" } else { "Warning" }.into()),
                count: Some(known_count(series.get(&key))),
                first_timestamp: Some(Time(first)),
                last_timestamp: Some(Time(note.at)),
                source: Some(EventSource { component: Some(COMPONENT.into()), host: Some((*host).clone()) }),
                reporting_component: Some(COMPONENT.into()),
                reporting_instance: Some((*host).clone()),
                ..Event::default()
            };
            api.create(&PostParams::default(), &event).await.map(|_| ())
        })
        .await;
        match outcome {
            Ok(Ok(())) => {
                series.entry(key).or_insert(Series { name, count: 1, first: note.at, used: now });
            }
            Ok(Err(error)) => debug!(%error, "cannot write an event"),
            Err(_) => debug!("an event took too long to write"),
        }
    }
}

fn known_count(series: Option<&Series>) -> i32 {
    series.map_or(1, |s| s.count)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn an_object_may_say_25_things_at_once() {
        let now = Instant::now();
        let mut bucket = Bucket { left: BURST, at: now };
        assert_eq!((0..100).filter(|_| bucket.take(now)).count(), 25);
        assert!(bucket.take(now + Duration::from_secs(31)));
        assert!(!bucket.take(now + Duration::from_secs(31)));
    }

    #[test]
    fn containers_are_named_by_field() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p"}, "spec": {"initContainers": [{"name": "i"}], "containers": [{"name": "c"}]}})).unwrap();
        assert_eq!(reference(&pod, Some("i")).field_path.unwrap(), "spec.initContainers{i}");
        assert_eq!(reference(&pod, Some("c")).field_path.unwrap(), "spec.containers{c}");
    }
}
