//! What pod workers ask of the API server, behind a trait: the real thing, none at all (static pods only), a fake in tests.

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    core::v1::{ConfigMap, Pod, Secret, ServiceAccount},
};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
};

use crate::model::names;
use crate::{
    error::{Error, Result},
    objects::Objects,
};

/// A service account's token and when it ends.
#[derive(Clone)]
pub(crate) struct Token {
    /// The token.
    pub(crate) value: String,
    /// When it was asked for.
    pub(crate) issued: Timestamp,
    /// When it ends.
    pub(crate) expires: Timestamp,
}

/// The objects that a pod worker reads and writes.
#[async_trait]
pub(crate) trait Cluster: Send + Sync {
    /// How often a ConfigMap or Secret that the pod of this UID names has changed.
    fn revision(&self, _uid: &str) -> u64 {
        0
    }
    /// One ConfigMap.
    async fn config_map(&self, namespace: &str, name: &str) -> Result<ConfigMap>;
    /// One Secret.
    async fn secret(&self, namespace: &str, name: &str) -> Result<Secret>;
    /// A token of the pod's service account, bound to the pod.
    async fn token(&self, pod: &Pod, audience: Option<&str>, seconds: Option<i64>) -> Result<Token>;
    /// Patches a pod's status (strategic merge) and answers the pod as it is then; `None`: there is no such pod any more.
    async fn patch_status(
        &self,
        namespace: &str,
        name: &str,
        patch: &serde_json::Value,
    ) -> Result<Option<Pod>>;
    /// Removes the object of a pod that has ended; one that is gone or another pod's is left alone.
    async fn delete_pod(&self, namespace: &str, name: &str, uid: &str) -> Result<()>;
    /// Makes the API server's copy of a static pod.
    async fn create_pod(&self, pod: &Pod) -> Result<()>;
}

/// The real API server.
#[derive(Clone)]
pub(crate) struct KubeCluster(pub(crate) Client, pub(crate) Objects);

#[async_trait]
impl Cluster for KubeCluster {
    fn revision(&self, uid: &str) -> u64 {
        self.1.revision(uid)
    }

    async fn config_map(&self, namespace: &str, name: &str) -> Result<ConfigMap> {
        self.1.config_map(namespace, name).await
    }

    async fn secret(&self, namespace: &str, name: &str) -> Result<Secret> {
        self.1.secret(namespace, name).await
    }

    async fn token(&self, pod: &Pod, audience: Option<&str>, seconds: Option<i64>) -> Result<Token> {
        let account = pod
            .spec
            .as_ref()
            .and_then(|s| s.service_account_name.as_deref())
            .filter(|n| !n.is_empty())
            .unwrap_or("default");
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: audience.filter(|a| !a.is_empty()).map(|a| vec![a.to_owned()]),
                expiration_seconds: seconds,
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: pod.metadata.name.clone(),
                    uid: pod.metadata.uid.clone(),
                }),
            }),
            ..TokenRequest::default()
        };
        let api: Api<ServiceAccount> = Api::namespaced(self.0.clone(), names::namespace(pod));
        let issued = Timestamp::now();
        let answer = api
            .create_token_request(account, &PostParams::default(), &request)
            .await
            .map_err(Error::api(format!("get a token of serviceaccount {account:?}")))?;
        let status = answer.status.unwrap_or_default();
        let value = status.token.unwrap_or_default();
        let expires = status.expiration_timestamp.map_or(issued, |t| t.0);
        Ok(Token { value, issued, expires })
    }

    async fn patch_status(
        &self,
        namespace: &str,
        name: &str,
        patch: &serde_json::Value,
    ) -> Result<Option<Pod>> {
        let api: Api<Pod> = Api::namespaced(self.0.clone(), namespace);
        let what = || format!("patch the status of pod {namespace}/{name}");
        match api.patch_status(name, &PatchParams::default(), &Patch::Strategic(patch)).await {
            Ok(pod) => Ok(Some(pod)),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(kube::Error::Api(status)) if status.code == 409 => {
                // Another pod of that name has taken its place, or somebody else wrote at the same time.
                let now = api.get_opt(name).await.map_err(Error::api(what()))?;
                let uid = patch["metadata"]["uid"].as_str();
                match now.filter(|pod| pod.metadata.uid.as_deref() == uid) {
                    Some(_) => Err(Error::api(what())(kube::Error::Api(status))),
                    None => Ok(None),
                }
            }
            Err(e) => Err(Error::api(what())(e)),
        }
    }

    async fn delete_pod(&self, namespace: &str, name: &str, uid: &str) -> Result<()> {
        let api: Api<Pod> = Api::namespaced(self.0.clone(), namespace);
        let params = DeleteParams::default()
            .grace_period(0)
            .preconditions(Preconditions { uid: Some(uid.to_owned()), resource_version: None });
        match api.delete(name, &params).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
            Err(e) => Err(Error::api(format!("delete pod {namespace}/{name}"))(e)),
        }
    }

    async fn create_pod(&self, pod: &Pod) -> Result<()> {
        let api: Api<Pod> = Api::namespaced(self.0.clone(), names::namespace(pod));
        match api.create(&PostParams::default(), pod).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(e) => Err(Error::api(format!("create the mirror pod {}", names::name(pod)))(e)),
        }
    }
}

/// No API server: static pods only.
pub(crate) struct NoCluster;

#[async_trait]
impl Cluster for NoCluster {
    async fn config_map(&self, _: &str, name: &str) -> Result<ConfigMap> {
        Err(Error::NotFound { kind: "configmap", name: name.to_owned() })
    }

    async fn secret(&self, _: &str, name: &str) -> Result<Secret> {
        Err(Error::NotFound { kind: "secret", name: name.to_owned() })
    }

    async fn token(&self, _: &Pod, _: Option<&str>, _: Option<i64>) -> Result<Token> {
        Err(Error::NotFound { kind: "serviceaccount", name: "default".to_owned() })
    }

    async fn patch_status(&self, _: &str, _: &str, _: &serde_json::Value) -> Result<Option<Pod>> {
        Ok(None)
    }

    async fn delete_pod(&self, _: &str, _: &str, _: &str) -> Result<()> {
        Ok(())
    }

    async fn create_pod(&self, _: &Pod) -> Result<()> {
        Ok(())
    }
}
