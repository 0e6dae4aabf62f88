//! Which image a text stands for: an id or the beginning of one, a tag, a digest.

use moxlet_ids::Digest;

use super::records::Images;
use crate::{Error, ImageRecord, Reference, Result};

/// Digits of an id that are enough to look for one; fewer are rather a short name.
const MIN_DIGITS: usize = 3;

/// What a text has turned out to be, and the image's id.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Named {
    Id(Digest),
    Tag(Digest, String),
    Digest(Digest, String),
}

impl Named {
    pub(super) fn id(&self) -> &Digest {
        match self {
            Self::Id(id) | Self::Tag(id, _) | Self::Digest(id, _) => id,
        }
    }
}

/// Finds an image. A full id comes first, then a name, then the beginning of an id.
pub(super) fn find(images: &Images, text: &str) -> Result<Option<Named>> {
    let digits = text.strip_prefix("sha256:").unwrap_or(text);
    let hexadecimal = digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if hexadecimal && digits.len() == 64 {
        let id: Option<Digest> = format!("sha256:{digits}").parse().ok();
        return Ok(id.filter(|id| images.contains_key(id)).map(Named::Id));
    }
    // `sha256:12ab` could be a tag as well, but nobody means that.
    let reference = if text.starts_with("sha256:") { None } else { Some(Reference::parse(text)) };
    if let Some(Ok(reference)) = &reference
        && let Some(named) = by_name(images, reference)
    {
        return Ok(Some(named));
    }
    if hexadecimal && digits.len() >= MIN_DIGITS {
        let mut ids = images.keys().filter(|id| id.hex().starts_with(digits));
        return match (ids.next(), ids.next()) {
            (Some(_), Some(_)) => Err(Error::Ambiguous(text.to_owned())),
            (id, _) => Ok(id.cloned().map(Named::Id)),
        };
    }
    match reference {
        Some(Err(error)) => Err(error),
        _ => Ok(None),
    }
}

/// The id of the image that has a name, or of which this is the whole id.
pub(super) fn find_name(images: &Images, text: &str, reference: &Reference) -> Option<Digest> {
    let id = text.parse::<Digest>().ok().filter(|id| images.contains_key(id));
    id.or_else(|| by_name(images, reference).map(|named| named.id().clone()))
}

fn by_name(images: &Images, reference: &Reference) -> Option<Named> {
    if let Some(digest) = reference.digest() {
        let full = format!("{}@{digest}", reference.name());
        let found = images.values().find(|s| s.record.repo_digests.contains(&full))?;
        return Some(Named::Digest(found.record.id.clone(), full));
    }
    let tag = reference.repo_tag()?;
    let found = images.values().find(|s| s.record.repo_tags.contains(&tag))?;
    Some(Named::Tag(found.record.id.clone(), tag))
}

/// Takes a tag from an image, and with the last tag of a repository the repository's digests, which came along with
/// the tags. True when no name is left.
pub(super) fn drop_tag(record: &mut ImageRecord, tag: &str) -> bool {
    record.repo_tags.retain(|t| t != tag);
    let repository = |name: &str| name.rsplit_once(':').map(|(repository, _)| repository.to_owned());
    let Some(of) = repository(tag) else { return is_nameless(record) };
    if !record.repo_tags.iter().any(|t| repository(t).as_deref() == Some(&of)) {
        record.repo_digests.retain(|d| d.split_once('@').is_none_or(|(repository, _)| repository != of));
    }
    is_nameless(record)
}

/// Takes a digest from an image. True when no name is left.
pub(super) fn drop_digest(record: &mut ImageRecord, digest: &str) -> bool {
    record.repo_digests.retain(|d| d != digest);
    is_nameless(record)
}

fn is_nameless(record: &ImageRecord) -> bool {
    record.repo_tags.is_empty() && record.repo_digests.is_empty()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::store::details::{Details, Stored};

    fn id(start: &str) -> Digest {
        format!("sha256:{start:0<64}").parse().unwrap()
    }

    fn images() -> Images {
        let image = |start: &str, tags: &[&str], digests: &[String]| {
            let record = ImageRecord {
                id: id(start),
                repo_tags: tags.iter().map(|t| (*t).to_owned()).collect(),
                repo_digests: digests.to_vec(),
                size_bytes: 0,
                layers: Vec::new(),
                pinned: false,
                config: Arc::default(),
            };
            (id(start), Stored { record, serial: 1, details: Details::default() })
        };
        let digests = [format!("a.b/c@{}", id("1"))];
        Images::from([
            image("abc1", &["docker.io/library/busybox:latest", "a.b/c:1", "a.b/c:2"], &digests),
            image("abc2", &["docker.io/library/abc1:latest"], &[]),
        ])
    }

    #[test]
    fn ids_tags_and_digests_are_found() {
        let images = images();
        let found = |text: &str| find(&images, text).unwrap().map(|n| n.id().clone());
        for text in ["busybox", "abc10", "sha256:abc1", id("abc1").as_str(), id("abc1").hex(), "a.b/c:1"] {
            assert_eq!(found(text), Some(id("abc1")), "{text}");
        }
        assert_eq!(found(&format!("a.b/c@{}", id("1"))), Some(id("abc1")));
        assert_eq!(found(&format!("a.b/c:any@{}", id("1"))), Some(id("abc1")));
        assert_eq!(found("abc1"), Some(id("abc2")), "a name comes before the beginning of an id");
        assert_eq!(found("sha256:abc2"), Some(id("abc2")));
        for text in ["nothing", "ab", "abd", id("9").as_str(), "a.b/c:3", "a.b/d:1"] {
            assert_eq!(found(text), None, "{text}");
        }
        assert!(matches!(find(&images, "abc"), Err(Error::Ambiguous(_))));
        assert!(matches!(find(&images, "A b"), Err(Error::InvalidName { .. })));
    }

    #[test]
    fn a_pods_name_is_never_the_beginning_of_an_id() {
        let images = images();
        let found = |text: &str| find_name(&images, text, &Reference::parse(text).unwrap());
        for text in ["busybox", id("abc1").as_str(), "a.b/c:1", &format!("a.b/c@{}", id("1"))] {
            assert_eq!(found(text), Some(id("abc1")), "{text}");
        }
        assert_eq!(found("abc1"), Some(id("abc2")), "as a name");
        for text in ["abc2", "abc10", "sha256:abc2", id("9").as_str()] {
            assert_eq!(found(text), None, "{text}");
        }
    }

    #[test]
    fn digests_go_with_the_last_tag_of_their_repository() {
        let mut record = images().remove(&id("abc1")).unwrap().record;
        assert!(!drop_tag(&mut record, "a.b/c:1"));
        assert_eq!(record.repo_digests.len(), 1);
        assert!(!drop_tag(&mut record, "a.b/c:2"));
        assert_eq!(record.repo_digests.len(), 0);
        assert!(drop_tag(&mut record, "docker.io/library/busybox:latest"));
    }

    proptest! {
        #[test]
        fn any_text_is_found_or_not(text in "\\PC{0,80}") {
            let _ = find(&images(), &text);
        }
    }
}
