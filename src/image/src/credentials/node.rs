//! The host's own `config.json`: read again when it has changed, its helpers asked when a registry wants a login.

use std::{
    fs::File,
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    Credentials,
    docker_config::{self, DockerConfig, MAX_FILE},
    helper::Helpers,
    keyring::Keyring,
};

/// By what a file is known to be the one that was read: device, inode, size, and time of its last change.
type Mark = (u64, u64, u64, i64, i64);

struct Loaded {
    keyring: Keyring,
    config: DockerConfig,
}

/// The host's credentials.
pub(crate) struct NodeCredentials {
    path: Option<PathBuf>,
    helpers: Helpers,
    loaded: Mutex<Option<(Mark, Arc<Loaded>)>>,
}

impl std::fmt::Debug for NodeCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeCredentials").field("path", &self.path).finish_non_exhaustive()
    }
}

impl NodeCredentials {
    pub(crate) fn new(path: Option<PathBuf>) -> Self {
        Self { path, helpers: Helpers::default(), loaded: Mutex::default() }
    }

    /// Those of a helper that is such a script, in a directory of its own.
    #[cfg(test)]
    pub(crate) fn of_helper(dir: &Path, script: &str) -> Self {
        let path = dir.join("config.json");
        let written = std::fs::write(&path, r#"{"credsStore":"test"}"#);
        assert!(written.is_ok(), "{written:?}");
        let helpers = super::helper::tests::helper(dir, "test", script);
        Self { helpers, ..Self::new(Some(path)) }
    }

    /// What there is for a repository of a registry (`docker.io` for Docker Hub). A file or helper that fails is told in
    /// the log: the pull may go without.
    pub(crate) async fn lookup(&self, registry: &str, repository: &str) -> Vec<Credentials> {
        let Some(path) = &self.path else { return Vec::new() };
        let loaded = match self.load(path) {
            Ok(loaded) => loaded,
            Err(reason) => {
                tracing::warn!(file = %path.display(), reason, "the host's registry credentials cannot be read");
                return Vec::new();
            }
        };
        let mut found = Vec::new();
        let (server, names) = names(registry);
        let helpers = &loaded.config.cred_helpers;
        let helper = names.iter().find_map(|n| helpers.get(*n)).or(loaded.config.creds_store.as_ref());
        if let Some(name) = helper {
            match self.helpers.get(name, server).await {
                Ok(credentials) => found.extend(credentials),
                Err(reason) => tracing::warn!(helper = name, registry, reason, "a credential helper failed"),
            }
        }
        for credentials in loaded.keyring.lookup_name(&format!("{registry}/{repository}")) {
            if !found.contains(&credentials) {
                found.push(credentials);
            }
        }
        found
    }

    fn load(&self, path: &Path) -> Result<Arc<Loaded>, String> {
        let mut file = File::open(path).map_err(|e| e.to_string())?;
        let about = file.metadata().map_err(|e| e.to_string())?;
        let mark = (about.dev(), about.ino(), about.len(), about.mtime(), about.mtime_nsec());
        let mut slot = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, loaded)) = &*slot
            && *known == mark
        {
            return Ok(Arc::clone(loaded));
        }
        let mut bytes = Vec::new();
        file.by_ref().take(MAX_FILE as u64 + 1).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
        let config = docker_config::parse(&bytes)?;
        let loaded = Arc::new(Loaded { keyring: Keyring::of(&config), config });
        *slot = Some((mark, Arc::clone(&loaded)));
        Ok(loaded)
    }
}

/// What a registry is called in front of a helper, and by which names the file may know it.
fn names(registry: &str) -> (&str, Vec<&str>) {
    const HUB: &str = "https://index.docker.io/v1/";
    if registry == "docker.io" {
        (HUB, vec![HUB, "index.docker.io", "docker.io"])
    } else {
        (registry, vec![registry])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::{super::helper::tests::helper, *};

    async fn users(node: &NodeCredentials, registry: &str) -> Vec<String> {
        node.lookup(registry, "a/b").await.into_iter().map(|c| c.username).collect()
    }

    #[tokio::test]
    async fn the_file_is_read_again_when_it_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let node = NodeCredentials::new(Some(path.clone()));
        assert!(users(&node, "a.b").await.is_empty(), "it may come later");
        for user in ["one", "another"] {
            std::fs::write(&path, format!(r#"{{"auths":{{"a.b":{{"username":"{user}"}}}}}}"#)).unwrap();
            assert_eq!(users(&node, "a.b").await, [user]);
        }
        assert!(users(&node, "c.d").await.is_empty());
        std::fs::write(&path, "{").unwrap();
        assert!(users(&node, "a.b").await.is_empty());
        assert!(users(&NodeCredentials::new(None), "a.b").await.is_empty());
    }

    #[tokio::test]
    async fn helpers_come_before_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(
            &path,
            r#"{"auths":{"a.b":{"username":"file"},"docker.io":{}},"credsStore":"all","credHelpers":{"a.b":"one"}}"#,
        )
        .unwrap();
        let say = |name: &str| format!(r#"printf '{{"Username":"{name} %s","Secret":"s"}}' "$(cat)""#);
        helper(dir.path(), "one", &say("one"));
        let mut node = NodeCredentials::new(Some(path));
        node.helpers = helper(dir.path(), "all", &say("all"));
        assert_eq!(users(&node, "a.b").await, ["one a.b", "file"]);
        assert_eq!(users(&node, "docker.io").await, ["all https://index.docker.io/v1/"]);
        node.helpers = helper(dir.path(), "one", "exit 1");
        assert_eq!(users(&node, "a.b").await, ["file"], "a helper that fails is not the end");
    }
}
