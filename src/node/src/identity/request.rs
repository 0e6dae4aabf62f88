//! A certificate from the cluster: the request is posted under a name that follows from its key, so that a restart
//! finds it again, and looked at until it is issued, denied or failed.

use std::time::Duration;

use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
};
use kube::{
    Api,
    api::{ObjectMeta, PostParams},
};
use rcgen::{KeyPair, PublicKeyData};
use sha2::{Digest, Sha256};

use super::{keys, keys::Pair, names::ServingNames, store::Store};
use crate::{Error, Result};

/// What a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Speaking to the API server.
    Client,
    /// Serving the kubelet API.
    Serving,
}

impl Purpose {
    /// The signer that issues it.
    pub(super) fn signer(self) -> &'static str {
        match self {
            Self::Client => "kubernetes.io/kube-apiserver-client-kubelet",
            Self::Serving => "kubernetes.io/kubelet-serving",
        }
    }

    /// What its key may be used for; ECDSA enciphers no keys.
    pub(super) fn usages(self) -> [&'static str; 2] {
        match self {
            Self::Client => ["digital signature", "client auth"],
            Self::Serving => ["digital signature", "server auth"],
        }
    }

    /// Its name in the store.
    pub(super) fn file(self) -> &'static str {
        match self {
            Self::Client => "kubelet-client",
            Self::Serving => "kubelet-server",
        }
    }
}

/// How a look at a request ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nobody has decided yet.
    Waiting,
    /// The chain, PEM.
    Issued(String),
    /// Denied or failed, with what the cluster says about it.
    Refused(String),
}

/// The object to post.
pub(super) fn object(
    purpose: Purpose,
    key: &KeyPair,
    node: &str,
    names: Option<&ServingNames>,
) -> Result<CertificateSigningRequest> {
    let mut seed = Sha256::new();
    seed.update(key.subject_public_key_info());
    seed.update(format!("{node} {names:?}"));
    let name = format!("moxlet-{}-{}", purpose.file(), &hex::encode(seed.finalize())[..20]);
    Ok(CertificateSigningRequest {
        metadata: ObjectMeta { name: Some(name), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(keys::request_pem(key, node, names)?.into_bytes()),
            signer_name: purpose.signer().to_owned(),
            usages: Some(purpose.usages().map(str::to_owned).to_vec()),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    })
}

/// What has become of a request.
pub(super) fn verdict(request: &CertificateSigningRequest) -> Verdict {
    let Some(status) = &request.status else { return Verdict::Waiting };
    for condition in status.conditions.iter().flatten() {
        if condition.type_ == "Denied" || condition.type_ == "Failed" {
            let reason = condition.reason.as_deref().unwrap_or_default();
            let message = condition.message.as_deref().unwrap_or_default();
            return Verdict::Refused(
                format!("{}: {reason} {message}", condition.type_).trim_end().to_owned(),
            );
        }
    }
    match &status.certificate {
        Some(certificate) if !certificate.0.is_empty() => {
            Verdict::Issued(String::from_utf8_lossy(&certificate.0).into_owned())
        }
        _ => Verdict::Waiting,
    }
}

/// Asks until the certificate is there and kept. Cancel-safe: a later call goes on with the same request.
///
/// Errors are those of the API server and a refusal; the caller decides whether to try again.
pub(super) async fn obtain(
    client: &kube::Client,
    store: &Store,
    purpose: Purpose,
    node: &str,
    names: Option<&ServingNames>,
) -> Result<Pair> {
    let key = match store.pending(purpose.file())?.map(|pem| keys::key_from_pem(&pem)) {
        Some(Ok(key)) => key,
        _ => {
            let key = keys::generate()?;
            store.keep_pending(purpose.file(), &key.serialize_pem())?;
            key
        }
    };
    let wanted = object(purpose, &key, node, names)?;
    let name = wanted.metadata.name.clone().unwrap_or_default();
    let api: Api<CertificateSigningRequest> = Api::all(client.clone());
    let started = tokio::time::Instant::now();
    let mut told = false;
    loop {
        let found = match api
            .get_opt(&name)
            .await
            .map_err(Error::api(format!("read the certificate request {name}")))?
        {
            Some(found) => found,
            None => match api.create(&PostParams::default(), &wanted).await {
                Err(kube::Error::Api(status)) if status.code == 409 => continue,
                other => other
                    .map_err(Error::api(format!("create a certificate request for {}", purpose.signer())))?,
            },
        };
        match verdict(&found) {
            Verdict::Issued(chain) => {
                let pair = Pair::parse(&key.serialize_pem(), &chain)?;
                store.keep(purpose.file(), &pair)?;
                tracing::info!(request = name, signer = purpose.signer(), "certificate issued");
                return Ok(pair);
            }
            Verdict::Refused(reason) => {
                store.forget_pending(purpose.file())?;
                return Err(Error::Certificate {
                    what: "get a certificate from the cluster",
                    reason: format!("request {name} was refused ({reason})"),
                });
            }
            Verdict::Waiting if !told => {
                told = true;
                tracing::info!(
                    request = name,
                    signer = purpose.signer(),
                    "waiting for the certificate: kubectl certificate approve {name}"
                );
            }
            Verdict::Waiting => {}
        }
        tokio::time::sleep(pause(started.elapsed())).await;
    }
}

/// How long to wait before the next look: short while somebody is likely at it.
fn pause(waited: Duration) -> Duration {
    match waited.as_secs() {
        0..5 => Duration::from_millis(250),
        5..60 => Duration::from_secs(1),
        60..600 => Duration::from_secs(5),
        _ => Duration::from_secs(30),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn names() -> ServingNames {
        ServingNames { dns: vec!["n1".into()], ips: vec!["10.0.0.5".parse().unwrap()] }
    }

    #[test]
    fn the_object_is_what_the_signers_expect() {
        let key = keys::generate().unwrap();
        let csr = object(Purpose::Serving, &key, "n1", Some(&names())).unwrap();
        assert_eq!(csr.spec.signer_name, "kubernetes.io/kubelet-serving");
        assert_eq!(csr.spec.usages.as_deref().unwrap(), ["digital signature", "server auth"]);
        assert!(csr.spec.request.0.starts_with(b"-----BEGIN CERTIFICATE REQUEST-----"));
        let again = object(Purpose::Serving, &key, "n1", Some(&names())).unwrap();
        assert_eq!(csr.metadata.name, again.metadata.name);
        let moved = ServingNames { ips: vec![], ..names() };
        assert_ne!(
            csr.metadata.name,
            object(Purpose::Serving, &key, "n1", Some(&moved)).unwrap().metadata.name
        );
        let client = object(Purpose::Client, &key, "n1", None).unwrap();
        assert_eq!(client.spec.signer_name, "kubernetes.io/kube-apiserver-client-kubelet");
        assert_eq!(client.spec.usages.unwrap(), ["digital signature", "client auth"]);
    }

    #[test]
    fn verdicts() {
        let parse = |status: serde_json::Value| {
            let text = serde_json::json!({
                "metadata": {"name": "x"}, "spec": {"request": "", "signerName": "s"}, "status": status,
            });
            verdict(&serde_json::from_value(text).unwrap())
        };
        assert_eq!(parse(serde_json::json!({})), Verdict::Waiting);
        assert_eq!(
            parse(serde_json::json!({"conditions": [{"type": "Approved", "status": "True"}]})),
            Verdict::Waiting
        );
        let denied =
            parse(serde_json::json!({"conditions": [{"type": "Denied", "status": "True", "reason": "No"}]}));
        assert_eq!(denied, Verdict::Refused("Denied: No".into()));
        assert_eq!(parse(serde_json::json!({"certificate": "UEVN"})), Verdict::Issued("PEM".into()));
    }
}
