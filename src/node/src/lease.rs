//! The node's heartbeat: a Lease in kube-node-lease, renewed every 10 s.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        coordination::v1::{Lease, LeaseSpec},
        core::v1::Node,
    },
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::error::{Error, Result, chain};

const NAMESPACE: &str = "kube-node-lease";
const DURATION_SECONDS: i32 = 40;
const PERIOD: Duration = Duration::from_secs(10);

/// Renews until stopped.
pub(crate) async fn run(client: Client, node: String, stop: CancellationToken) {
    let mut pause = Duration::from_millis(200);
    loop {
        let wait = match tokio::time::timeout(PERIOD, renew(&client, &node)).await {
            Ok(Ok(())) => {
                pause = Duration::from_millis(200);
                PERIOD
            }
            Ok(Err(error)) => {
                warn!(error = %chain(&error), "lease not renewed");
                pause = (pause * 2).min(Duration::from_secs(7));
                pause
            }
            Err(_) => {
                warn!("lease not renewed in time");
                pause
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn renew(client: &Client, node: &str) -> Result<()> {
    let leases: Api<Lease> = Api::namespaced(client.clone(), NAMESPACE);
    let now = MicroTime(Timestamp::now());
    let patch = serde_json::json!({"spec": {
        "holderIdentity": node, "leaseDurationSeconds": DURATION_SECONDS, "renewTime": now}});
    match leases.patch(node, &PatchParams::default(), &Patch::Merge(&patch)).await {
        Ok(_) => return Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        Err(e) => return Err(Error::api(format!("renew the lease {NAMESPACE}/{node}"))(e)),
    }
    let nodes: Api<Node> = Api::all(client.clone());
    let uid = nodes
        .get(node)
        .await
        .map_err(Error::api(format!("get node {node}")))?
        .metadata
        .uid
        .unwrap_or_default();
    let lease = Lease {
        metadata: ObjectMeta {
            name: Some(node.to_owned()),
            namespace: Some(NAMESPACE.to_owned()),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".into(),
                kind: "Node".into(),
                name: node.to_owned(),
                uid,
                ..OwnerReference::default()
            }]),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(node.to_owned()),
            lease_duration_seconds: Some(DURATION_SECONDS),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }),
    };
    match leases.create(&PostParams::default(), &lease).await {
        Ok(_) => Ok(()),
        Err(e) => Err(Error::api(format!("create the lease {NAMESPACE}/{node}"))(e)),
    }
}
