//! What a pod needs of an image: that it is here by the pod's pull policy, and that the pod may have it.
//!
//! That an image is here does not mean that every pod may use it: it may have come with the pull secret of another one. As
//! the kubelet does (KEP-2535, its policy `NeverVerifyPreloadedImages`), the store remembers of an image that was pulled
//! for a pod with which of the pod's credentials that was, as salted digests, or that the pod had none for it. That is
//! part of the image's record from its first moment on. A pod that cannot show any of these has to pass the registry's
//! authorisation itself, which moves no layer that is here. Images that were imported, or pulled by hand, are free for all.

use std::{collections::BTreeSet, str::FromStr};

use moxlet_ids::Digest;
use tokio::sync::watch;

use crate::{
    Credentials, Error, ImageRecord, ImageStore, Keyring, PullProgress, Reference, Result, Wanted,
    store::{Access, Details},
};

/// When an image is pulled (`imagePullPolicy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullPolicy {
    /// Every time.
    Always,
    /// Where it is missing.
    IfNotPresent,
    /// Never.
    Never,
}

impl FromStr for PullPolicy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "Always" => Ok(Self::Always),
            "IfNotPresent" => Ok(Self::IfNotPresent),
            "Never" => Ok(Self::Never),
            other => Err(Error::PullPolicy(other.chars().take(40).collect())),
        }
    }
}

/// For whom an image is pulled. That says who may have it once it is here.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Taker {
    /// Whoever works on the host: what is pulled by hand says nothing about pods.
    Host,
    /// A pod that has credentials for it, of which this is the salted digest.
    Holder(String),
    /// A pod that has none.
    Anyone,
}

impl Taker {
    /// What the record of the image says of it.
    pub(crate) fn access(self) -> Option<Access> {
        match self {
            Self::Host => None,
            Self::Holder(proof) => Some(Access { anyone: false, credentials: BTreeSet::from([proof]) }),
            Self::Anyone => Some(Access { anyone: true, credentials: BTreeSet::new() }),
        }
    }
}

/// Whether somebody with these credentials may use an image of a repository that is here.
fn may_use(details: &Details, repository: &str, proofs: &[String]) -> bool {
    if details.access.is_empty() {
        return true;
    }
    let Some(access) = details.access.get(repository) else { return false };
    access.anyone || proofs.iter().any(|p| access.credentials.contains(p))
}

impl ImageStore {
    /// The image that is here for a pod with these pull secrets, by its pull policy; nothing where it has to be pulled.
    /// That counts as a use.
    ///
    /// # Errors
    /// [`Error::NeverPull`] where it is not here, or not free for the pod, and must not be pulled; [`Error::InvalidName`].
    pub async fn find_for(
        &self,
        reference: &str,
        policy: PullPolicy,
        secrets: &Keyring,
    ) -> Result<Option<ImageRecord>> {
        let parsed = Reference::parse(reference)?;
        if policy == PullPolicy::Always {
            return Ok(None);
        }
        // Not by the beginning of an id: a pod that says `cafe` means that name.
        if let Some((record, details)) = self.store.look_up_name(reference, &parsed) {
            let proofs = self.proofs(&secrets.lookup(&parsed)).await?;
            if may_use(&details, &parsed.name(), &proofs) {
                self.used(&record.id).await?;
                return Ok(Some(record));
            }
        }
        match policy {
            // Whether it is here is no business of a pod that may not have it.
            PullPolicy::Never => Err(Error::NeverPull(reference.to_owned())),
            _ => Ok(None),
        }
    }

    /// Pulls an image for a pod with these pull secrets, and remembers that the pod may have it. Each of the credentials
    /// that fit is tried, the most particular one first; the registry client tries the host's own and none at all
    /// after that. How far it has come goes to `progress`.
    ///
    /// # Errors
    /// As [`Self::pull`].
    pub async fn pull_for(
        &self,
        reference: &str,
        secrets: &Keyring,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<ImageRecord> {
        let parsed = Reference::parse(reference)?;
        let credentials = secrets.lookup(&parsed);
        let proofs = self.proofs(&credentials).await?;
        let mut denied = None;
        for (credentials, proof) in credentials.into_iter().zip(proofs) {
            let wanted = (parsed.clone(), vec![credentials], Taker::Holder(proof));
            match self.follow(wanted, progress).await {
                Ok(record) => return Ok(record),
                // Some registries say that there is nothing of what they do not show.
                Err(error @ (Error::Denied { .. } | Error::NotFound { .. })) => {
                    denied.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        match denied {
            Some(error) => Err(error),
            None => self.follow((parsed, Vec::new(), Taker::Anyone), progress).await,
        }
    }

    /// As [`Self::pull`], with how far it has come passed on to `progress`.
    ///
    /// # Errors
    /// As [`Self::pull`].
    pub async fn pull_telling(
        &self,
        reference: &str,
        auths: &[Credentials],
        progress: &watch::Sender<PullProgress>,
    ) -> Result<ImageRecord> {
        self.follow((Reference::parse(reference)?, auths.to_vec(), Taker::Host), progress).await
    }

    async fn follow(&self, wanted: Wanted, progress: &watch::Sender<PullProgress>) -> Result<ImageRecord> {
        let (mut seen, pull) = self.join(wanted);
        let mut pull = std::pin::pin!(pull);
        let outcome = loop {
            tokio::select! {
                outcome = &mut pull => break outcome,
                Ok(()) = seen.changed() => {
                    progress.send_replace(seen.borrow_and_update().clone());
                }
            }
        };
        progress.send_replace(seen.borrow().clone());
        outcome
    }

    async fn proofs(&self, credentials: &[Credentials]) -> Result<Vec<String>> {
        if credentials.is_empty() {
            return Ok(Vec::new());
        }
        let (store, credentials) = (self.store.clone(), credentials.to_vec());
        // The first one makes the salt.
        self.store.writing(move || credentials.iter().map(|c| store.records.proof(c)).collect()).await
    }
}

impl crate::store::Records {
    /// A digest of credentials that says nothing to somebody who has the disk but not the salt, and tells equal ones.
    fn proof(&self, credentials: &Credentials) -> Result<String> {
        let mut text = self.salt()?;
        for part in [
            &credentials.username,
            &credentials.password,
            &credentials.identity_token,
            &credentials.registry_token,
        ] {
            text.extend((part.len() as u64).to_le_bytes());
            text.extend(part.as_bytes());
        }
        Ok(Digest::of(&text).hex().to_owned())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn an_image_is_free_for_who_has_shown_credentials_and_for_all_if_none_were_needed() {
        let mut details = Details::default();
        assert!(may_use(&details, "a/b", &[]), "preloaded");
        details.access.insert("a/b".into(), Access { anyone: false, credentials: ["x".to_owned()].into() });
        assert!(!may_use(&details, "a/b", &[]));
        assert!(!may_use(&details, "a/b", &["y".to_owned()]));
        assert!(may_use(&details, "a/b", &["y".to_owned(), "x".to_owned()]));
        assert!(!may_use(&details, "a/c", &["x".to_owned()]), "another repository of the same image");
        details.access.insert("a/c".into(), Access { anyone: true, ..Access::default() });
        assert!(may_use(&details, "a/c", &[]));
        assert!("Sometimes".parse::<PullPolicy>().is_err());
    }
}
