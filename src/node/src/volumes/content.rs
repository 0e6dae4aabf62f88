//! What shall be in one volume.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, DownwardAPIVolumeFile, KeyToPath, Pod, Secret, Volume},
};
use moxlet_cri::host::{VolumeFile, VolumeKind};

use super::is_due;
use crate::{
    cluster::{Cluster, Token},
    env::fields::{self, Facts},
    error::{Error, Result},
    pods::{names, resources},
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

/// Files of an object's keys: all of them, or those that `items` name.
fn project(
    data: BTreeMap<String, Vec<u8>>,
    items: Option<&Vec<KeyToPath>>,
    default_mode: Option<i32>,
    optional: bool,
    what: &str,
) -> Result<Vec<VolumeFile>, String> {
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
            None if optional => {}
            None => return Err(format!("{what}: {}", item.key)),
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

/// An object, or nothing where it is missing and may be.
fn optional<T: Default>(answer: Result<T>, optional: bool) -> Result<T, String> {
    match answer {
        Ok(found) => Ok(found),
        Err(Error::NotFound { .. }) if optional => Ok(T::default()),
        Err(e) => Err(crate::error::chain(&e)),
    }
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
    let failed = |reason: String| Error::Volume { volume: volume.name.clone(), reason };
    let mut content =
        Content { kind: VolumeKind::Files, files: Vec::new(), size_bytes: 0, tokens: Vec::new() };
    let namespace = names::namespace(pod);
    if let Some(dir) = &volume.empty_dir {
        content.kind = match dir.medium.as_deref() {
            Some("Memory") => VolumeKind::EmptyDirMemory,
            _ => VolumeKind::EmptyDir,
        };
        content.size_bytes = dir
            .size_limit
            .as_ref()
            .and_then(|q| resources::units(&q.0))
            .and_then(|n| u64::try_from(n).ok())
            .unwrap_or(0);
    } else if let Some(source) = &volume.config_map {
        let may_miss = source.optional == Some(true);
        let map = optional(cluster.config_map(namespace, &source.name).await, may_miss).map_err(failed)?;
        content.files = project(
            map_data(map),
            source.items.as_ref(),
            source.default_mode,
            may_miss,
            "configmap references non-existent config key",
        )
        .map_err(failed)?;
    } else if let Some(source) = &volume.secret {
        let may_miss = source.optional == Some(true);
        let name = source.secret_name.as_deref().unwrap_or_default();
        let secret = optional(cluster.secret(namespace, name).await, may_miss).map_err(failed)?;
        content.files = project(
            secret_data(secret),
            source.items.as_ref(),
            source.default_mode,
            may_miss,
            "references non-existent secret key",
        )
        .map_err(failed)?;
    } else if let Some(source) = &volume.downward_api {
        content.files = downward(pod, facts, source.items.as_ref(), source.default_mode).map_err(failed)?;
    } else if let Some(source) = &volume.projected {
        let default_mode = source.default_mode;
        let parts = source.sources.iter().flatten().map(|part| async move {
            let mut fresh = None;
            let files = if let Some(p) = &part.config_map {
                let may_miss = p.optional == Some(true);
                let map = optional(cluster.config_map(namespace, &p.name).await, may_miss)?;
                project(
                    map_data(map),
                    p.items.as_ref(),
                    default_mode,
                    may_miss,
                    "configmap references non-existent config key",
                )?
            } else if let Some(p) = &part.secret {
                let may_miss = p.optional == Some(true);
                let secret = optional(cluster.secret(namespace, &p.name).await, may_miss)?;
                project(
                    secret_data(secret),
                    p.items.as_ref(),
                    default_mode,
                    may_miss,
                    "references non-existent secret key",
                )?
            } else if let Some(p) = &part.downward_api {
                downward(pod, facts, p.items.as_ref(), default_mode)?
            } else if let Some(p) = &part.service_account_token {
                let place = format!("{}/{}", volume.name, p.path);
                let now = jiff::Timestamp::now();
                let known = tokens.get(&place).filter(|t| !is_due(t, now));
                let token = match known {
                    Some(token) => token.clone(),
                    None => {
                        let seconds = Some(p.expiration_seconds.unwrap_or(TOKEN_SECONDS));
                        match cluster.token(pod, p.audience.as_deref(), seconds).await {
                            Ok(token) => {
                                fresh = Some((place, token.clone()));
                                token
                            }
                            // An old one that still holds is better than none.
                            Err(e) => match tokens.get(&place).filter(|t| t.expires > now) {
                                Some(token) => token.clone(),
                                None => {
                                    return Err(format!(
                                        "failed to fetch token: {}",
                                        crate::error::chain(&e)
                                    ));
                                }
                            },
                        }
                    }
                };
                let private = pod
                    .spec
                    .as_ref()
                    .and_then(|s| s.security_context.as_ref())
                    .is_some_and(|c| c.fs_group.is_some());
                let mode = if private { 0o600 } else { mode(None, default_mode) };
                vec![VolumeFile { path: p.path.clone(), data: token.value.into_bytes(), mode }]
            } else {
                Vec::new()
            };
            Ok::<_, String>((files, fresh))
        });
        for (files, fresh) in futures::future::try_join_all(parts).await.map_err(failed)? {
            content.files.extend(files);
            content.tokens.extend(fresh);
        }
    } else {
        return Err(failed("this kind of volume is not supported".into()));
    }
    Ok(content)
}
