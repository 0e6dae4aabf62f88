//! Volumes of a pod: what shall be in them is gathered here (objects fetched side by side), the agent makes them.
//!
//! Contents are looked at again every `volume_refresh`, and when a ConfigMap or Secret changes; while the pod's sandbox runs, a volume is
//! sent to the agent only when it changed.

pub(crate) mod content;
pub(crate) mod hosts;

use std::collections::HashMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use moxlet_cri::host;
use moxlet_ids::Digest;
use prost::Message;

use self::content::Content;
use crate::model::names;
use crate::{
    cluster::{Cluster, Token},
    cri_client::Runtime,
    env::fields::Facts,
    error::{Error, Result},
};

/// Name of the volume that holds a pod's `/etc/hosts`; it is no DNS label, so no volume of a pod can have it.
const HOSTS_VOLUME: &str = "moxlet_etc-hosts";

#[derive(Debug)]
struct Applied {
    host_path: String,
    digest: Digest,
}

/// The volumes of one pod that the agent is known to have.
#[derive(Default)]
pub(crate) struct Volumes {
    applied: HashMap<String, Applied>,
    tokens: HashMap<String, Token>,
}

/// Whether a token is due to be replaced: 80 % of its life or a day have passed, as in the kubelet.
pub(crate) fn is_due(token: &Token, now: Timestamp) -> bool {
    let life = token.expires.as_second() - token.issued.as_second();
    let age = now.as_second() - token.issued.as_second();
    age >= life * 4 / 5 || age >= 24 * 3600
}

impl Volumes {
    /// Makes what is missing and refreshes what has changed.
    ///
    /// # Errors
    /// The first volume that could not be made; the others are made nevertheless.
    pub(crate) async fn apply(
        &mut self,
        agent: &dyn Runtime,
        cluster: &dyn Cluster,
        pod: &Pod,
        facts: &Facts,
    ) -> Result<()> {
        let fs_group = pod
            .spec
            .as_ref()
            .and_then(|s| s.security_context.as_ref())
            .and_then(|c| c.fs_group)
            .and_then(|g| u32::try_from(g).ok());
        let tokens = &self.tokens;
        let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
        let gathered =
            futures::future::join_all(volumes.map(|v| async move {
                (v.name.clone(), content::gather(cluster, pod, v, facts, tokens).await)
            }))
            .await;
        let mut first_error = None;
        for (name, result) in gathered {
            let outcome = match result {
                Ok(Content { kind, files, size_bytes, tokens }) => {
                    let request = host::ApplyVolumeRequest {
                        pod_uid: names::uid(pod).to_owned(),
                        name: name.clone(),
                        kind: kind as i32,
                        files,
                        fs_group,
                        size_bytes,
                    };
                    let outcome = self.send(agent, request).await;
                    if outcome.is_ok() {
                        self.tokens.extend(tokens);
                    }
                    outcome.map(drop)
                }
                Err(e) => Err(e),
            };
            if let Err(e) = outcome {
                let error = match e {
                    Error::Volume { .. } => e,
                    other => Error::Volume { volume: name, reason: crate::error::chain(&other) },
                };
                first_error.get_or_insert(error);
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    async fn send(&mut self, agent: &dyn Runtime, request: host::ApplyVolumeRequest) -> Result<String> {
        let digest = Digest::of(&request.encode_to_vec());
        if let Some(applied) = self.applied.get(&request.name).filter(|a| a.digest == digest) {
            return Ok(applied.host_path.clone());
        }
        let name = request.name.clone();
        let host_path = agent.apply_volume(request).await?.host_path;
        self.applied.insert(name, Applied { host_path: host_path.clone(), digest });
        Ok(host_path)
    }

    /// Writes the pod's `/etc/hosts` and answers where it lies on the host.
    pub(crate) async fn apply_hosts(
        &mut self,
        agent: &dyn Runtime,
        pod: &Pod,
        text: String,
    ) -> Result<String> {
        let request = host::ApplyVolumeRequest {
            pod_uid: names::uid(pod).to_owned(),
            name: HOSTS_VOLUME.to_owned(),
            kind: host::VolumeKind::PlainFiles as i32,
            files: vec![host::VolumeFile { path: "hosts".into(), data: text.into_bytes(), mode: 0o644 }],
            fs_group: None,
            size_bytes: 0,
        };
        Ok(format!("{}/hosts", self.send(agent, request).await?.trim_end_matches('/')))
    }

    /// Forgets what was sent: whoever makes a sandbox sends all volumes, since those on tmpfs are gone where the host was
    /// restarted. The agent leaves alone what is there as it should be.
    pub(crate) fn forget_sent(&mut self) {
        self.applied.clear();
    }

    /// Where a volume lies on the host.
    pub(crate) fn host_path(&self, name: &str) -> Option<&str> {
        self.applied.get(name).map(|a| a.host_path.as_str())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{cluster::NoCluster, cri_client::fake::FakeRuntime};

    #[tokio::test]
    async fn a_volume_is_sent_once_while_a_sandbox_runs_and_again_for_the_next_one() {
        let agent = FakeRuntime::new(|_, _| None);
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "uid": "u"},
            "spec": {"containers": [], "volumes": [{"name": "v", "downwardAPI": {"items": []}}]}}))
        .unwrap();
        let mut volumes = Volumes::default();
        let facts = Facts::default();
        for sent in [1, 1] {
            volumes.apply(&agent, &NoCluster, &pod, &facts).await.unwrap();
            assert_eq!(agent.calls(&["ApplyVolume"]).len(), sent);
        }
        volumes.forget_sent();
        volumes.apply(&agent, &NoCluster, &pod, &facts).await.unwrap();
        assert_eq!(agent.calls(&["ApplyVolume"]).len(), 2);
    }
}
