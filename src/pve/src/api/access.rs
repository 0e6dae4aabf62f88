//! What our token may do.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{
    Client, Result,
    http::{Request, unexpected},
    lenient,
};

/// Privileges by path, as they are in effect: those that the token and its user both have.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Permissions {
    /// The privileges on each path that has some, and whether each is passed down to the paths below.
    pub paths: BTreeMap<String, BTreeMap<String, bool>>,
}

impl Permissions {
    /// Whether a privilege is held on a path. The server lists what is in effect for the paths that it knows; for any other this
    /// is a forecast: it has what [is passed down](Self::passes_down) to it.
    #[must_use]
    pub fn has(&self, path: &str, privilege: &str) -> bool {
        let path = path.trim_end_matches('/');
        match self.paths.get(if path.is_empty() { "/" } else { path }) {
            Some(held) => held.contains_key(privilege),
            None => path
                .rfind('/')
                .and_then(|at| path.get(..at))
                .is_some_and(|above| self.passes_down(above, privilege)),
        }
    }

    /// Whether the paths below this one that have no entries of their own have a privilege: what the nearest path passes down, and
    /// one that passes nothing down leaves it to those above.
    #[must_use]
    pub fn passes_down(&self, path: &str, privilege: &str) -> bool {
        let mut path = path.trim_end_matches('/');
        loop {
            let here = if path.is_empty() { "/" } else { path };
            if let Some(held) = self.paths.get(here)
                && held.values().any(|passed_down| *passed_down)
            {
                return held.get(privilege).is_some_and(|passed_down| *passed_down);
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
        // That a privilege is listed says that it is held, the value whether it is passed down.
        let held = |privileges: &Value| {
            let all = privileges.as_object().into_iter().flatten();
            all.map(|(name, passed_down)| (name.clone(), lenient::is_true(passed_down))).collect()
        };
        Ok(Permissions {
            paths: paths.iter().map(|(path, privileges)| (path.clone(), held(privileges))).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(paths: &[(&str, &[(&str, bool)])]) -> Permissions {
        let held =
            |all: &[(&str, bool)]| all.iter().map(|(name, down)| ((*name).to_owned(), *down)).collect();
        Permissions { paths: paths.iter().map(|(path, all)| ((*path).to_owned(), held(all))).collect() }
    }

    #[test]
    fn a_privilege_that_is_not_passed_down_holds_on_its_own_path_alone() {
        let mine = of(&[("/vms", &[("VM.Audit", false), ("VM.Config.Options", true)])]);
        assert!(mine.has("/vms", "VM.Audit") && mine.has("/vms/", "VM.Audit"));
        assert!(!mine.has("/vms/1000000", "VM.Audit"));
        assert!(mine.has("/vms/1000000", "VM.Config.Options"));
        assert!(!mine.has("/nodes", "VM.Audit"));
    }

    #[test]
    fn a_path_that_passes_nothing_down_hides_nothing_of_those_above_it() {
        let mine = of(&[("/", &[("VM.Audit", true)]), ("/vms", &[("VM.Allocate", false)])]);
        assert!(mine.has("/vms/100", "VM.Audit") && !mine.has("/vms/100", "VM.Allocate"));
        let replaced = of(&[("/", &[("VM.Audit", true)]), ("/vms", &[("VM.Allocate", true)])]);
        assert!(!replaced.has("/vms/100", "VM.Audit") && replaced.has("/vms/100", "VM.Allocate"));
        let none = of(&[("/", &[("VM.Audit", false)])]);
        assert!(none.has("/", "VM.Audit") && !none.has("/vms", "VM.Audit"));
    }

    #[test]
    fn what_some_guests_have_is_not_what_all_have() {
        let mine = of(&[("/vms/100", &[("VM.Audit", true)]), ("/vms", &[("VM.Allocate", false)])]);
        assert!(mine.has("/vms/100", "VM.Audit") && !mine.passes_down("/vms", "VM.Audit"));
        assert!(mine.has("/vms", "VM.Allocate") && !mine.passes_down("/vms", "VM.Allocate"));
        let all = of(&[("/", &[("VM.Audit", true)]), ("/vms/100", &[("VM.Allocate", true)])]);
        assert!(all.passes_down("/vms", "VM.Audit") && all.passes_down("/", "VM.Audit"));
        assert!(!all.has("/vms/100", "VM.Audit"));
    }
}
