//! Whether this process may act for its Node: the API server knows it as that node, and no other living process holds the
//! Node's Lease. Until then nothing is written to the Node and no pod of the API server is run; static pods run nevertheless.
//!
//! The Lease in kube-node-lease is the node's heartbeat, renewed every 10 s. Its `holderIdentity` is the node's name, as
//! conformance wants; which process holds it is in an annotation. Whether a holder lives is judged by what is seen of its
//! renewals on this machine's monotonic clock: a Lease that was not renewed for its whole duration is free.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::{
        authentication::v1::{SelfSubjectReview, UserInfo},
        coordination::v1::{Lease, LeaseSpec},
        core::v1::Node,
    },
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference},
};
use kube::{Api, Client, api::PostParams};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    error::{Error, Result, chain},
    instance::Instance,
};

const NAMESPACE: &str = "kube-node-lease";
/// Annotation: the instance that holds the Lease.
const INSTANCE: &str = "moxlet.dev/instance";
/// Annotation: the host that this instance runs on, for people.
const HOST: &str = "moxlet.dev/instance-host";
const DURATION_SECONDS: i32 = 40;
const DURATION: Duration = Duration::from_secs(40);
const PERIOD: Duration = Duration::from_secs(10);
/// How often a Lease that another instance holds is looked at.
const LOOK: Duration = Duration::from_secs(2);
/// The longest pause after a failed call.
const LONGEST: Duration = Duration::from_secs(7);

/// Judges whom the API server takes this process for.
///
/// # Errors
/// Who it is, where that is not the node.
fn is_node(user: &UserInfo, node: &str) -> std::result::Result<(), String> {
    let name = user.username.as_deref().unwrap_or_default();
    let groups = user.groups.as_deref().unwrap_or_default();
    if name == format!("system:node:{node}") && groups.iter().any(|g| g == "system:nodes") {
        return Ok(());
    }
    Err(format!("{name:?} of the groups {}", groups.join(", ")))
}

/// What came of an attempt to take or renew the Lease.
#[derive(Debug)]
enum Attempt {
    /// It is this instance's.
    Held(Box<Lease>),
    /// Another instance holds it.
    Other(Holder),
}

/// Who holds a Lease, and when it was renewed by the holder's clock.
#[derive(Clone, Debug, PartialEq)]
struct Holder {
    instance: Option<String>,
    host: Option<String>,
    renewed: Option<MicroTime>,
}

impl Holder {
    fn of(lease: &Lease) -> Self {
        let notes = lease.metadata.annotations.as_ref();
        let note = |key: &str| notes.and_then(|n| n.get(key)).cloned();
        let renewed = lease.spec.as_ref().and_then(|s| s.renew_time.clone());
        Self { instance: note(INSTANCE), host: note(HOST), renewed }
    }

    /// As people are told of it.
    fn described(&self) -> String {
        let host = self.host.as_deref().unwrap_or("an unknown host");
        match &self.instance {
            Some(instance) => format!("instance {instance} on {host}"),
            None => "a kubelet or an earlier Moxlet, which does not name itself".to_owned(),
        }
    }
}

/// What was seen of another holder: since when its last renewal is unchanged.
#[derive(Debug)]
struct Seen {
    holder: Holder,
    since: Instant,
}

impl Seen {
    /// Whether the holder counts as gone, after it was looked at once more.
    fn look(seen: &mut Option<Self>, holder: &Holder, now: Instant) -> bool {
        match seen {
            Some(known) if known.holder == *holder => now.duration_since(known.since) >= DURATION,
            _ => {
                *seen = Some(Self { holder: holder.clone(), since: now });
                false
            }
        }
    }
}

/// The next time of renewal: now, but never before the last one, since controllers take a step back for a missing renewal.
fn renewal(last: Option<&MicroTime>, now: Timestamp) -> MicroTime {
    let least = last.and_then(|l| l.0.checked_add(SignedDuration::from_micros(1)).ok());
    MicroTime(least.map_or(now, |least| least.max(now)))
}

/// Takes the Lease and renews it.
pub(crate) struct Membership {
    /// The API server.
    pub(crate) client: Client,
    /// The node's name.
    pub(crate) node: String,
    /// Name of this machine.
    pub(crate) host: String,
    /// This process.
    pub(crate) instance: Arc<Instance>,
    /// Whether anybody but the node itself may be the node.
    pub(crate) any_identity: bool,
    /// Set once this process may act for the Node.
    pub(crate) admitted: watch::Sender<bool>,
}

impl Membership {
    /// Works until stopped.
    ///
    /// # Errors
    /// [`Error::NotTheNode`] and [`Error::NodeNameTaken`]: then this process must not go on.
    pub(crate) async fn run(self, stop: CancellationToken) -> Result<()> {
        tokio::select! {
            () = stop.cancelled() => Ok(()),
            ended = self.keep() => ended,
        }
    }

    async fn keep(&self) -> Result<()> {
        if !self.any_identity {
            self.identify().await?;
        }
        let mut lease = self.acquire().await;
        self.admitted.send_replace(true);
        let mut pause = Duration::from_millis(200);
        loop {
            let wait = match timeout(PERIOD, Box::pin(self.attempt(Some(lease.clone())))).await {
                Ok(Ok(Attempt::Held(renewed))) => {
                    (lease, pause) = (renewed, Duration::from_millis(200));
                    PERIOD
                }
                Ok(Ok(Attempt::Other(holder))) => {
                    return Err(Error::NodeNameTaken { node: self.node.clone(), holder: holder.described() });
                }
                Ok(Err(error)) => {
                    warn!(error = %chain(&error), "could not renew the node's Lease");
                    pause = (pause * 2).min(LONGEST);
                    pause
                }
                Err(_) => {
                    warn!(seconds = PERIOD.as_secs(), "the API server did not answer about the node's Lease");
                    pause
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    /// Asks the API server who this is, until it answers.
    async fn identify(&self) -> Result<()> {
        let api: Api<SelfSubjectReview> = Api::all(self.client.clone());
        let mut pause = Duration::from_millis(200);
        loop {
            let (params, review) = (PostParams::default(), SelfSubjectReview::default());
            let error = match timeout(PERIOD, api.create(&params, &review)).await {
                Ok(Ok(answer)) => {
                    let user = answer.status.and_then(|s| s.user_info).unwrap_or_default();
                    return is_node(&user, &self.node)
                        .map_err(|found| Error::NotTheNode { node: self.node.clone(), found });
                }
                Ok(Err(error)) => chain(&error),
                Err(_) => "no answer in time".to_owned(),
            };
            warn!(error, "could not ask the API server who this node is");
            pause = (pause * 2).min(LONGEST);
            tokio::time::sleep(pause).await;
        }
    }

    /// Waits until the Lease is this instance's.
    async fn acquire(&self) -> Box<Lease> {
        let mut seen: Option<Seen> = None;
        let mut pause = Duration::from_millis(200);
        loop {
            let wait = match timeout(PERIOD, Box::pin(self.attempt(None))).await {
                Ok(Ok(Attempt::Held(lease))) => return lease,
                Ok(Ok(Attempt::Other(holder))) => {
                    let known = seen.as_ref().map(|s| (s.holder.instance.clone(), s.holder.host.clone()));
                    if known != Some((holder.instance.clone(), holder.host.clone())) {
                        warn!(
                            node = self.node,
                            holder = holder.described(),
                            "the node's Lease is held by another instance: this one waits until it was not renewed for 40 s"
                        );
                    }
                    if Seen::look(&mut seen, &holder, Instant::now()) {
                        match self.take_over(&holder).await {
                            Ok(Some(lease)) => return lease,
                            Ok(None) => {}
                            Err(error) => {
                                warn!(error = %chain(&error), "could not take over the node's Lease");
                            }
                        }
                    }
                    LOOK
                }
                Ok(Err(error)) => {
                    warn!(error = %chain(&error), "could not take the node's Lease");
                    pause = (pause * 2).min(LONGEST);
                    pause
                }
                Err(_) => {
                    warn!(seconds = PERIOD.as_secs(), "the API server did not answer about the node's Lease");
                    pause
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    fn leases(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    /// Renews the Lease as it is known, or as it is found. Only what is not another instance's is written.
    async fn attempt(&self, known: Option<Box<Lease>>) -> Result<Attempt> {
        let failed = || format!("renew the Lease {NAMESPACE}/{}", self.node);
        if let Some(known) = known {
            match self.write(*known).await {
                Ok(lease) => return Ok(Attempt::Held(Box::new(lease))),
                // It was changed or deleted by somebody else: looked at below.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                Err(error) => return Err(Error::api(failed())(error)),
            }
        }
        let found = self.leases().get_opt(&self.node).await.map_err(Error::api(failed()))?;
        let Some(found) = found else { return self.create().await };
        let holder = Holder::of(&found);
        if holder.instance.as_deref() != Some(self.instance.id()) {
            return Ok(Attempt::Other(holder));
        }
        let lease = self.write(found).await.map_err(Error::api(failed()))?;
        Ok(Attempt::Held(Box::new(lease)))
    }

    /// Takes a Lease whose holder is gone; none if it was renewed meanwhile.
    async fn take_over(&self, gone: &Holder) -> Result<Option<Box<Lease>>> {
        let failed = || format!("take over the Lease {NAMESPACE}/{}", self.node);
        let found = self.leases().get_opt(&self.node).await.map_err(Error::api(failed()))?;
        let Some(found) = found.filter(|f| Holder::of(f) == *gone) else { return Ok(None) };
        match self.write(found).await {
            Ok(lease) => {
                info!(
                    node = self.node,
                    holder = gone.described(),
                    "took over the Lease of an instance that is gone"
                );
                Ok(Some(Box::new(lease)))
            }
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
            Err(error) => Err(Error::api(failed())(error)),
        }
    }

    /// Writes the Lease as this instance's, if it is still as it was seen.
    async fn write(&self, mut lease: Lease) -> kube::Result<Lease> {
        self.mark(&mut lease);
        if lease.metadata.owner_references.as_ref().is_none_or(Vec::is_empty) {
            lease.metadata.owner_references = self.owner().await?;
        }
        self.leases().replace(&self.node, &PostParams::default(), &lease).await
    }

    async fn create(&self) -> Result<Attempt> {
        let failed = || format!("create the Lease {NAMESPACE}/{}", self.node);
        let mut lease = Lease {
            metadata: ObjectMeta {
                name: Some(self.node.clone()),
                namespace: Some(NAMESPACE.to_owned()),
                // Before the Node is registered it has no owner: a renewal adds it.
                owner_references: self.owner().await.map_err(Error::api(failed()))?,
                ..ObjectMeta::default()
            },
            spec: None,
        };
        self.mark(&mut lease);
        let made = self.leases().create(&PostParams::default(), &lease).await;
        Ok(Attempt::Held(Box::new(made.map_err(Error::api(failed()))?)))
    }

    fn mark(&self, lease: &mut Lease) {
        let notes = lease.metadata.annotations.get_or_insert_default();
        notes.insert(INSTANCE.to_owned(), self.instance.id().to_owned());
        notes.insert(HOST.to_owned(), self.host.clone());
        let last = lease.spec.as_ref().and_then(|s| s.renew_time.clone());
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(self.node.clone()),
            lease_duration_seconds: Some(DURATION_SECONDS),
            renew_time: Some(renewal(last.as_ref(), Timestamp::now())),
            ..lease.spec.take().unwrap_or_default()
        });
    }

    async fn owner(&self) -> kube::Result<Option<Vec<OwnerReference>>> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let uid = nodes.get_opt(&self.node).await?.and_then(|n| n.metadata.uid);
        Ok(uid.map(|uid| {
            vec![OwnerReference {
                api_version: "v1".into(),
                kind: "Node".into(),
                name: self.node.clone(),
                uid,
                ..OwnerReference::default()
            }]
        }))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn user(name: &str, groups: &[&str]) -> UserInfo {
        UserInfo {
            username: Some(name.into()),
            groups: Some(groups.iter().map(|g| (*g).to_owned()).collect()),
            ..UserInfo::default()
        }
    }

    #[test]
    fn only_the_node_itself_is_the_node() {
        assert_eq!(is_node(&user("system:node:n1", &["system:nodes", "system:authenticated"]), "n1"), Ok(()));
        for (name, groups) in [
            ("kubernetes-admin", &["system:masters"][..]),
            ("system:node:n2", &["system:nodes"]),
            ("system:node:n1", &["system:authenticated"]),
            ("", &[]),
        ] {
            let found = is_node(&user(name, groups), "n1").unwrap_err();
            assert!(found.contains(name), "{found}");
        }
    }

    fn holder(instance: &str, renewed: i64) -> Holder {
        Holder {
            instance: Some(instance.into()),
            host: Some("pve2".into()),
            renewed: Some(MicroTime(Timestamp::from_second(renewed).unwrap())),
        }
    }

    #[test]
    fn a_holder_that_renews_lives_whatever_its_clock_says_and_one_that_is_silent_for_40_s_is_gone() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut seen = None;
        assert!(!Seen::look(&mut seen, &holder("a", 5), at(0)), "its clock is years behind");
        assert!(!Seen::look(&mut seen, &holder("a", 5), at(39)));
        assert!(!Seen::look(&mut seen, &holder("a", 6), at(41)), "renewed");
        assert!(!Seen::look(&mut seen, &holder("b", 6), at(80)), "another one");
        assert!(Seen::look(&mut seen, &holder("b", 6), at(120)));
    }

    #[test]
    fn a_renewal_is_never_earlier_than_the_last() {
        let at = |s| Timestamp::from_second(s).unwrap();
        assert_eq!(renewal(None, at(10)).0, at(10));
        assert_eq!(renewal(Some(&MicroTime(at(9))), at(10)).0, at(10));
        let set_back = renewal(Some(&MicroTime(at(3600))), at(10)).0;
        assert_eq!(set_back, at(3600) + SignedDuration::from_micros(1));
    }

    /// An API server that has this Lease and answers each write with what was written.
    fn server(lease: serde_json::Value) -> (Client, Arc<parking_lot::Mutex<Vec<String>>>) {
        let asked = Arc::new(parking_lot::Mutex::new(Vec::new()));
        let remembered = asked.clone();
        let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            let (lease, asked) = (lease.clone(), remembered.clone());
            async move {
                let (parts, body) = request.into_parts();
                let sent = body.collect_bytes().await.unwrap();
                asked.lock().push(format!("{} {}", parts.method, parts.uri.path()));
                let answer = if parts.method == http::Method::PUT {
                    sent.to_vec()
                } else {
                    serde_json::to_vec(&lease).unwrap()
                };
                let answer = http::Response::new(kube::client::Body::from(answer));
                Ok::<_, std::convert::Infallible>(answer)
            }
        });
        (Client::new(service, "default"), asked)
    }

    fn membership(client: Client, dir: &std::path::Path) -> Membership {
        Membership {
            client,
            node: "n1".into(),
            host: "pve1".into(),
            instance: Arc::new(Instance::take(dir).unwrap()),
            any_identity: true,
            admitted: watch::Sender::new(false),
        }
    }

    fn lease(instance: &str) -> serde_json::Value {
        serde_json::json!({
            "metadata": {"name": "n1", "namespace": NAMESPACE, "resourceVersion": "7",
                "annotations": {INSTANCE: instance, HOST: "pve2"},
                "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "u"}]},
            "spec": {"holderIdentity": "n1", "renewTime": "2026-01-01T00:00:00.000000Z"}})
    }

    #[tokio::test]
    async fn the_lease_of_another_instance_is_not_written_and_its_holder_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (client, asked) = server(lease("other"));
        let Attempt::Other(holder) = membership(client, dir.path()).attempt(None).await.unwrap() else {
            panic!("taken")
        };
        assert_eq!(holder.described(), "instance other on pve2");
        assert!(asked.lock().iter().all(|call| call.starts_with("GET ")), "{:?}", asked.lock());
    }

    #[tokio::test]
    async fn a_restart_goes_on_with_its_own_lease_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let own = Instance::take(dir.path()).unwrap().id().to_owned();
        let (client, _) = server(lease(&own));
        let Attempt::Held(held) = membership(client, dir.path()).attempt(None).await.unwrap() else {
            panic!("not taken")
        };
        assert_eq!(held.metadata.resource_version.as_deref(), Some("7"), "another's write would be noticed");
        assert_eq!(held.spec.unwrap().holder_identity.as_deref(), Some("n1"));
    }
}
