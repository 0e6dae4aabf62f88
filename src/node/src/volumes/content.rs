//! What shall be in one volume.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::{
    ByteString,
    api::core::v1::{
        ConfigMap, DownwardAPIVolumeFile, EmptyDirVolumeSource, KeyToPath, Pod, Secret,
        ServiceAccountTokenProjection, Volume, VolumeProjection,
    },
};
use moxlet_cri::host::{VolumeFile, VolumeKind};

use super::is_due;
use crate::model::{names, resources};
use crate::{
    cluster::{Cluster, Token},
    env::fields::{self, Facts},
    error::{Error, Result},
};

/// The kubelet's default life of a token.
const TOKEN_SECONDS: i64 = 3600;

/// A volume's kind and files.
pub(crate) struct Content {
    /// What it is made as.
    pub(crate) kind: VolumeKind,
    /// Its files.
    pub(crate) files: Vec<VolumeFile>,
    /// Its limit; 0: none.
    pub(crate) size_bytes: u64,
    /// Tokens that were asked for anew, by their place.
    pub(crate) tokens: Vec<(String, Token)>,
}

fn mode(own: Option<i32>, default: Option<i32>) -> u32 {
    u32::try_from(own.or(default).unwrap_or(0o644)).unwrap_or(0o644) & 0o7777
}

/// Files of an object's keys: all of them, or those that `items` name. Object and keys may be missing where they are optional;
/// `missing` is the kubelet's word for a key that is.
fn project(
    object: Result<BTreeMap<String, Vec<u8>>>,
    items: Option<&Vec<KeyToPath>>,
    default_mode: Option<i32>,
    optional: Option<bool>,
    missing: &str,
) -> Result<Vec<VolumeFile>, String> {
    let may_miss = optional == Some(true);
    let data = match object {
        Ok(data) => data,
        Err(Error::NotFound { .. }) if may_miss => BTreeMap::new(),
        Err(e) => return Err(crate::error::chain(&e)),
    };
    let Some(items) = items.filter(|i| !i.is_empty()) else {
        let file = |(path, data)| VolumeFile { path, data, mode: mode(None, default_mode) };
        return Ok(data.into_iter().map(file).collect());
    };
    let mut files = Vec::new();
    for item in items {
        match data.get(&item.key) {
            Some(bytes) => files.push(VolumeFile {
                path: item.path.clone(),
                data: bytes.clone(),
                mode: mode(item.mode, default_mode),
            }),
            None if may_miss => {}
            None => return Err(format!("{missing}: {}", item.key)),
        }
    }
    Ok(files)
}

fn map_data(map: ConfigMap) -> BTreeMap<String, Vec<u8>> {
    let text = map.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.into_bytes()));
    let binary = map.binary_data.unwrap_or_default().into_iter().map(|(k, ByteString(v))| (k, v));
    text.chain(binary).collect()
}

fn secret_data(secret: Secret) -> BTreeMap<String, Vec<u8>> {
    secret.data.unwrap_or_default().into_iter().map(|(k, ByteString(v))| (k, v)).collect()
}

fn downward(
    pod: &Pod,
    facts: &Facts,
    items: Option<&Vec<DownwardAPIVolumeFile>>,
    default_mode: Option<i32>,
) -> Result<Vec<VolumeFile>, String> {
    let mut files = Vec::new();
    for item in items.into_iter().flatten() {
        let value = match (&item.field_ref, &item.resource_field_ref) {
            (Some(f), _) => fields::field(pod, facts, &f.field_path)
                .ok_or_else(|| format!("unsupported fieldPath: {}", f.field_path))?,
            (None, Some(r)) => fields::resource(pod, None, facts, r)
                .ok_or_else(|| format!("unsupported container resource : {}", r.resource))?,
            (None, None) => continue,
        };
        files.push(VolumeFile {
            path: item.path.clone(),
            data: value.into_bytes(),
            mode: mode(item.mode, default_mode),
        });
    }
    Ok(files)
}

/// Gathers what a volume shall hold.
pub(crate) async fn gather(
    cluster: &dyn Cluster,
    pod: &Pod,
    volume: &Volume,
    facts: &Facts,
    tokens: &HashMap<String, Token>,
) -> Result<Content> {
    let gatherer = Gatherer { cluster, pod, volume, facts, tokens };
    gatherer.content().await.map_err(|reason| Error::Volume { volume: volume.name.clone(), reason })
}

/// What a volume's files come from.
#[derive(Clone, Copy)]
struct Gatherer<'a> {
    cluster: &'a dyn Cluster,
    pod: &'a Pod,
    volume: &'a Volume,
    facts: &'a Facts,
    tokens: &'a HashMap<String, Token>,
}

impl Gatherer<'_> {
    async fn content(self) -> Result<Content, String> {
        let mut content =
            Content { kind: VolumeKind::Files, files: Vec::new(), size_bytes: 0, tokens: Vec::new() };
        let volume = self.volume;
        if let Some(dir) = &volume.empty_dir {
            (content.kind, content.size_bytes) = empty_dir(dir);
        } else if let Some(source) = &volume.config_map {
            let (items, mode) = (source.items.as_ref(), source.default_mode);
            content.files = self.config_map(&source.name, items, mode, source.optional).await?;
        } else if let Some(source) = &volume.secret {
            let (items, mode) = (source.items.as_ref(), source.default_mode);
            let name = source.secret_name.as_deref().unwrap_or_default();
            content.files = self.secret(name, items, mode, source.optional).await?;
        } else if let Some(source) = &volume.downward_api {
            content.files = downward(self.pod, self.facts, source.items.as_ref(), source.default_mode)?;
        } else if let Some(source) = &volume.projected {
            let parts = source.sources.iter().flatten().map(|part| self.part(part, source.default_mode));
            for (files, fresh) in futures::future::try_join_all(parts).await? {
                content.files.extend(files);
                content.tokens.extend(fresh);
            }
        } else {
            return Err("this kind of volume is not supported".into());
        }
        Ok(content)
    }

    async fn config_map(
        self,
        name: &str,
        items: Option<&Vec<KeyToPath>>,
        default_mode: Option<i32>,
        optional: Option<bool>,
    ) -> Result<Vec<VolumeFile>, String> {
        let map = self.cluster.config_map(names::namespace(self.pod), name).await.map(map_data);
        project(map, items, default_mode, optional, "configmap references non-existent config key")
    }

    async fn secret(
        self,
        name: &str,
        items: Option<&Vec<KeyToPath>>,
        default_mode: Option<i32>,
        optional: Option<bool>,
    ) -> Result<Vec<VolumeFile>, String> {
        let secret = self.cluster.secret(names::namespace(self.pod), name).await.map(secret_data);
        project(secret, items, default_mode, optional, "references non-existent secret key")
    }

    /// One source of a projected volume, and the token that was asked for anew for it.
    async fn part(
        self,
        part: &VolumeProjection,
        default_mode: Option<i32>,
    ) -> Result<(Vec<VolumeFile>, Option<(String, Token)>), String> {
        let mut fresh = None;
        let files = if let Some(p) = &part.config_map {
            self.config_map(&p.name, p.items.as_ref(), default_mode, p.optional).await?
        } else if let Some(p) = &part.secret {
            self.secret(&p.name, p.items.as_ref(), default_mode, p.optional).await?
        } else if let Some(p) = &part.downward_api {
            downward(self.pod, self.facts, p.items.as_ref(), default_mode)?
        } else if let Some(p) = &part.service_account_token {
            let (file, new) = self.token(p, default_mode).await?;
            fresh = new;
            vec![file]
        } else {
            Vec::new()
        };
        Ok((files, fresh))
    }

    /// A token as a file: the one that is known until it is due, then a new one, which comes along with its place.
    async fn token(
        self,
        source: &ServiceAccountTokenProjection,
        default_mode: Option<i32>,
    ) -> Result<(VolumeFile, Option<(String, Token)>), String> {
        let place = format!("{}/{}", self.volume.name, source.path);
        let now = jiff::Timestamp::now();
        let known = self.tokens.get(&place);
        let (token, fresh) = match known.filter(|t| !is_due(t, now)) {
            Some(token) => (token.clone(), None),
            None => {
                let seconds = Some(source.expiration_seconds.unwrap_or(TOKEN_SECONDS));
                match self.cluster.token(self.pod, source.audience.as_deref(), seconds).await {
                    Ok(token) => (token.clone(), Some((place, token))),
                    // An old one that still holds is better than none.
                    Err(e) => match known.filter(|t| t.expires > now) {
                        Some(token) => (token.clone(), None),
                        None => return Err(format!("failed to fetch token: {}", crate::error::chain(&e))),
                    },
                }
            }
        };
        let context = self.pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
        let private = context.is_some_and(|c| c.fs_group.is_some());
        let mode = if private { 0o600 } else { mode(None, default_mode) };
        Ok((VolumeFile { path: source.path.clone(), data: token.value.into_bytes(), mode }, fresh))
    }
}

/// What an emptyDir is made as, and its limit in bytes; 0: none.
fn empty_dir(dir: &EmptyDirVolumeSource) -> (VolumeKind, u64) {
    let kind = match dir.medium.as_deref() {
        Some("Memory") => VolumeKind::EmptyDirMemory,
        _ => VolumeKind::EmptyDir,
    };
    let limit = dir.size_limit.as_ref().and_then(|q| resources::units(&q.0));
    (kind, limit.and_then(|n| u64::try_from(n).ok()).unwrap_or(0))
}
