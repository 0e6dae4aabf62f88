//! Image references, pull policies and pull secrets.

use k8s_openapi::api::core::v1::{Container, Pod, Secret};

use crate::cluster::Cluster;
use crate::model::names;

/// When an image is pulled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    /// At every start.
    Always,
    /// Where it is missing.
    IfNotPresent,
    /// Never.
    Never,
}

/// A container's pull policy, with the API's default: Always for `latest`.
pub(crate) fn policy(container: &Container) -> Policy {
    match container.image_pull_policy.as_deref() {
        Some("Always") => Policy::Always,
        Some("Never") => Policy::Never,
        Some("IfNotPresent") => Policy::IfNotPresent,
        _ => {
            let image = container.image.as_deref().unwrap_or_default();
            let (name, digest) = image.split_once('@').map_or((image, false), |(n, _)| (n, true));
            match name.rsplit('/').next().and_then(|last| last.split_once(':')) {
                Some((_, tag)) if tag != "latest" => Policy::IfNotPresent,
                _ if digest => Policy::IfNotPresent,
                _ => Policy::Always,
            }
        }
    }
}

impl Policy {
    /// As the API and the agent spell it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::IfNotPresent => "IfNotPresent",
            Self::Never => "Never",
        }
    }
}

/// What a pull secret holds, as it is; which of it fits an image is for the agent to say.
fn docker_config(secret: Secret) -> Option<Vec<u8>> {
    let mut data = secret.data.unwrap_or_default();
    data.remove(".dockerconfigjson").or_else(|| data.remove(".dockercfg")).map(|bytes| bytes.0)
}

/// The pod's pull secrets; one that cannot be had is named in the second list.
pub(crate) async fn pull_secrets(cluster: &dyn Cluster, pod: &Pod) -> (Vec<Vec<u8>>, Vec<String>) {
    let wanted = pod.spec.iter().flat_map(|s| s.image_pull_secrets.iter().flatten()).map(|r| r.name.clone());
    let fetched = futures::future::join_all(wanted.map(|name| async move {
        let answer = cluster.secret(names::namespace(pod), &name).await;
        (name, answer)
    }))
    .await;
    let (mut configs, mut missing) = (Vec::new(), Vec::new());
    for (name, answer) in fetched {
        match answer {
            Ok(secret) => configs.extend(docker_config(secret)),
            Err(_) => missing.push(name),
        }
    }
    (configs, missing)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn policies_by_tag() {
        let of = |image: &str| policy(&Container { image: Some(image.into()), ..Container::default() });
        assert_eq!(of("a"), Policy::Always);
        assert_eq!(of("h:5000/a"), Policy::Always);
        assert_eq!(of("a:latest"), Policy::Always);
        assert_eq!(of("a:1"), Policy::IfNotPresent);
        assert_eq!(of("a@sha256:00"), Policy::IfNotPresent);
    }

    #[test]
    fn a_pull_secret_is_passed_on_as_it_is() {
        let secret = |key: &str| Secret {
            data: Some([(key.to_owned(), k8s_openapi::ByteString(b"{}".to_vec()))].into()),
            ..Secret::default()
        };
        assert_eq!(docker_config(secret(".dockerconfigjson")).unwrap(), b"{}");
        assert_eq!(docker_config(secret(".dockercfg")).unwrap(), b"{}");
        assert!(docker_config(secret("other")).is_none());
    }
}
