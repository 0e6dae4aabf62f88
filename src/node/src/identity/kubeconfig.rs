//! Kubeconfigs: reading one, taking its server and CA, and replacing its credentials by the node's own.

use std::path::Path;

use base64::{Engine, engine::general_purpose::STANDARD};
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};

use super::keys::Pair;
use crate::{Error, Result};

fn refused(path: &Path) -> impl Fn(&dyn std::fmt::Display) -> Error {
    move |reason| Error::Kubeconfig { path: path.to_owned(), reason: reason.to_string() }
}

/// Reads a kubeconfig; its current context counts.
pub(super) async fn load(path: &Path) -> Result<kube::Config> {
    let error = refused(path);
    let file = Kubeconfig::read_from(path).map_err(|e| error(&crate::chain(&e)))?;
    let mut config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
        .await
        .map_err(|e| error(&crate::chain(&e)))?;
    if config.cluster_url.host().is_none() {
        return Err(error(&"its cluster has no server address"));
    }
    // A watch is silent for minutes at a time; a dead connection is found by its own timeout.
    config.read_timeout = Some(std::time::Duration::from_secs(600));
    Ok(config)
}

/// A client for that configuration.
pub(super) fn client(config: kube::Config, path: &Path) -> Result<kube::Client> {
    kube::Client::try_from(config).map_err(|e| refused(path)(&crate::chain(&e)))
}

/// The same server and CA with the node's certificate instead of the file's credentials.
pub(super) fn with_certificate(config: &kube::Config, pair: &Pair) -> Result<kube::Config> {
    let mut config = config.clone();
    let auth = serde_json::json!({
        "client-certificate-data": STANDARD.encode(&pair.chain_pem),
        "client-key-data": STANDARD.encode(&pair.key_pem),
    });
    config.auth_info = serde_json::from_value::<AuthInfo>(auth)
        .map_err(|e| Error::Certificate { what: "use the client certificate", reason: e.to_string() })?;
    Ok(config)
}

/// A number that changes with the kubeconfig or one of the files that it names.
pub(super) fn fingerprint(path: &Path) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hash = DefaultHasher::new();
    std::fs::read(path).ok().hash(&mut hash);
    if let Ok(file) = Kubeconfig::read_from(path) {
        for user in file.auth_infos.iter().filter_map(|u| u.auth_info.as_ref()) {
            for named in [&user.client_certificate, &user.client_key].into_iter().flatten() {
                std::fs::read(named).ok().hash(&mut hash);
            }
        }
    }
    hash.finish()
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::identity::{keys, names::ServingNames};

    pub(crate) fn write(dir: &Path, server: &str) -> std::path::PathBuf {
        let path = dir.join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: c\n  cluster:\n    server: {server}\nusers:\n- name: u\n  user:\n    token: abc.def\ncontexts:\n- name: x\n  context:\n    cluster: c\n    user: u\ncurrent-context: x\n"
        );
        std::fs::write(&path, text).unwrap();
        path
    }

    #[tokio::test]
    async fn the_nodes_certificate_takes_the_tokens_place() {
        let dir = tempfile::tempdir().unwrap();
        let config = load(&write(dir.path(), "https://10.0.0.1:6443")).await.unwrap();
        assert!(config.auth_info.token.is_some());
        let pair = keys::self_signed("n", &ServingNames { dns: vec!["n".into()], ips: vec![] }).unwrap();
        let own = with_certificate(&config, &pair).unwrap();
        assert!(own.auth_info.token.is_none());
        assert_eq!(own.cluster_url, config.cluster_url);
        let certificate = STANDARD.decode(own.auth_info.client_certificate_data.unwrap()).unwrap();
        assert_eq!(certificate, pair.chain_pem.as_bytes());
    }

    #[tokio::test]
    async fn a_bad_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none");
        let error = load(&path).await.unwrap_err().to_string();
        assert!(error.contains("none"), "{error}");
        std::fs::write(&path, "clusters: 7").unwrap();
        assert!(load(&path).await.is_err());
    }

    #[test]
    fn a_fingerprint_follows_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let before = fingerprint(&write(dir.path(), "https://a"));
        assert_eq!(before, fingerprint(&dir.path().join("kubeconfig")));
        assert_ne!(before, fingerprint(&write(dir.path(), "https://b")));
    }
}
