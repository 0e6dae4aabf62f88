//! Events with the kubelet's reasons, written by one task off everybody's path: repeated ones are counted, floods are cut.

use std::{borrow::Cow, collections::HashMap, time::Duration};

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
use tracing::{debug, info, warn};

use crate::model::names;

/// Whose events these are.
const COMPONENT: &str = "kubelet";
/// Events that wait to be written; more are dropped.
const QUEUE: usize = 4096;
/// Series that are remembered, and for how long when there are more.
const SERIES: usize = 4096;
const REMEMBERED: Duration = Duration::from_secs(600);
/// How many events one object may have at once, and how often after that.
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

/// One event that is to be written.
#[derive(Debug)]
pub(crate) struct Note {
    pub(crate) object: ObjectReference,
    pub(crate) kind: Kind,
    pub(crate) reason: Cow<'static, str>,
    pub(crate) message: String,
    pub(crate) at: Timestamp,
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

    /// A recorder whose events are taken from the queue by whoever has it.
    #[cfg(test)]
    pub(crate) fn queued() -> (Self, mpsc::Receiver<Note>) {
        let (notes, queue) = mpsc::channel(QUEUE);
        (Self { notes }, queue)
    }

    /// Emits an event of an object.
    pub(crate) fn emit(
        &self,
        object: ObjectReference,
        kind: Kind,
        reason: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
    ) {
        self.emit_at(object, kind, reason, message, Timestamp::now());
    }

    /// Emits an event of an earlier time. With the same time it is the same event, also after a restart.
    pub(crate) fn emit_at(
        &self,
        object: ObjectReference,
        kind: Kind,
        reason: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
        at: Timestamp,
    ) {
        let (reason, mut message) = (reason.into(), message.into());
        if message.len() > 1024 {
            let end = (0..=1021).rev().find(|i| message.is_char_boundary(*i)).unwrap_or(0);
            message.truncate(end);
            message.push_str("...");
        }
        let name = object.name.as_deref().unwrap_or_default();
        let namespace = object.namespace.as_deref();
        match kind {
            Kind::Normal => info!(namespace, name, reason = &*reason, message, "event"),
            Kind::Warning => warn!(namespace, name, reason = &*reason, message, "event"),
        }
        // A full queue loses the newest event: never worth a wait.
        let _ = self.notes.try_send(Note { object, kind, reason, message, at });
    }

    /// Emits an event of a pod or of one of its containers.
    pub(crate) fn pod(
        &self,
        pod: &Pod,
        container: Option<&str>,
        kind: Kind,
        reason: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
    ) {
        self.emit(reference(pod, container), kind, reason, message);
    }
}

/// What makes two events one that is counted: object, field, kind, reason, message.
type SeriesKey = (String, String, Kind, Cow<'static, str>, String);

struct Series {
    name: String,
    count: i32,
    first: Timestamp,
    used: Instant,
}

/// Lets an object have so many events at once and then few.
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
    let mut writer = Writer { host, series: HashMap::new(), buckets: HashMap::new() };
    loop {
        let note = tokio::select! {
            note = queue.recv() => note,
            () = stop.cancelled() => return,
        };
        let Some(note) = note else { return };
        if let Some(client) = &client {
            writer.note(client, &note).await;
        }
    }
}

/// What was written of late.
struct Writer {
    host: String,
    series: HashMap<SeriesKey, Series>,
    buckets: HashMap<String, Bucket>,
}

impl Writer {
    async fn note(&mut self, client: &Client, note: &Note) {
        let now = Instant::now();
        if !self.may(note.object.uid.as_deref().unwrap_or_default(), now) {
            debug!(reason = &*note.reason, "event dropped: its object has too many");
            return;
        }
        if self.series.len() > SERIES {
            self.series.retain(|_, s| now.duration_since(s.used) < REMEMBERED);
        }
        let namespace = note.object.namespace.as_deref().unwrap_or("default");
        let api: Api<Event> = Api::namespaced(client.clone(), namespace);
        let key = (
            note.object.uid.clone().unwrap_or_default(),
            note.object.field_path.clone().unwrap_or_default(),
            note.kind,
            note.reason.clone(),
            note.message.clone(),
        );
        let series = self.series.entry(key).or_insert_with(|| {
            let name = note.object.name.as_deref().unwrap_or_default();
            let name = format!("{name}.{:016x}", note.at.as_nanosecond());
            Series { name, count: 0, first: note.at, used: now }
        });
        series.count += 1;
        series.used = now;
        match tokio::time::timeout(PATIENCE, put(&api, &self.host, series, note)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(%error, "cannot write an event"),
            Err(_) => debug!("an event took too long to write"),
        }
    }

    /// Whether an object may have an event now.
    fn may(&mut self, uid: &str, now: Instant) -> bool {
        if self.buckets.len() > SERIES {
            self.buckets.retain(|_, b| now.duration_since(b.at) < REMEMBERED);
        }
        self.buckets.entry(uid.to_owned()).or_insert(Bucket { left: BURST, at: now }).take(now)
    }
}

/// Counts an event that is there, or makes it.
async fn put(api: &Api<Event>, host: &str, series: &Series, note: &Note) -> kube::Result<()> {
    if series.count > 1 {
        let patch = serde_json::json!({"count": series.count, "lastTimestamp": Time(note.at)});
        match api.patch(&series.name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            other => return other.map(|_| ()),
        }
    }
    match api.create(&PostParams::default(), &event(host, series, note)).await {
        // It was written by this node before a restart, or by a call whose answer was lost.
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        other => other.map(|_| ()),
    }
}

fn event(host: &str, series: &Series, note: &Note) -> Event {
    Event {
        metadata: ObjectMeta {
            name: Some(series.name.clone()),
            namespace: Some(note.object.namespace.clone().unwrap_or_else(|| "default".into())),
            ..ObjectMeta::default()
        },
        involved_object: note.object.clone(),
        reason: Some(note.reason.clone().into_owned()),
        message: Some(note.message.clone()),
        type_: Some(if note.kind == Kind::Normal { "Normal" } else { "Warning" }.into()),
        count: Some(series.count),
        first_timestamp: Some(Time(series.first)),
        last_timestamp: Some(Time(note.at)),
        source: Some(EventSource { component: Some(COMPONENT.into()), host: Some(host.to_owned()) }),
        reporting_component: Some(COMPONENT.into()),
        reporting_instance: Some(host.to_owned()),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn an_object_has_25_events_at_once() {
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
