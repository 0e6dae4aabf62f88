//! What our token may do.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::{
    Client, Result,
    http::{Request, unexpected},
};

/// Privileges by path, as they are in effect: those that the token and its user both have.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Permissions {
    /// The privileges on each path that has some of its own.
    pub paths: BTreeMap<String, BTreeSet<String>>,
}

impl Permissions {
    /// Whether a privilege is held on a path. A path without an entry has those of the nearest above it that were passed
    /// down; the server lists what is in effect for the paths that it knows, so this is a forecast for any other.
    #[must_use]
    pub fn has(&self, path: &str, privilege: &str) -> bool {
        let mut path = path.trim_end_matches('/');
        loop {
            let here = if path.is_empty() { "/" } else { path };
            if let Some(privileges) = self.paths.get(here) {
                return privileges.contains(privilege);
            }
            match path.rfind('/') {
                Some(at) => path = path.get(..at).unwrap_or_default(),
                None => return false,
            }
        }
    }
}

impl Client {
    /// What our own token may do, on all paths or on one.
    ///
    /// # Errors
    /// As every call.
    pub async fn permissions(&self, path: Option<&str>) -> Result<Permissions> {
        let request = Request::new("GET", "/access/permissions").maybe("path", path);
        let answer = self.send(request).await?;
        let Some(paths) = answer.data.as_object() else {
            let reason = "it is no object";
            return Err(unexpected(
                &answer.call,
                "privileges by path",
                reason,
                answer.data.to_string().as_bytes(),
            ));
        };
        let held = |privileges: &Value| {
            let all = privileges.as_object().into_iter().flatten();
            // The value says whether it is passed down; that it is listed says that it is held.
            all.map(|(name, _)| name.clone()).collect()
        };
        Ok(Permissions {
            paths: paths.iter().map(|(path, privileges)| (path.clone(), held(privileges))).collect(),
        })
    }
}
