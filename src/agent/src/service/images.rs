//! CRI's ImageService.

use std::collections::HashMap;

use base64::Engine as _;
use jiff::Timestamp;
use moxlet_cri::v1::{self, image_service_server::ImageService};
use moxlet_ids::ChainId;
use moxlet_image::{Credentials, ImageRecord, InspectedLayer, InspectedManifest, Origin};
use moxlet_storage::Usage;
use serde::Serialize;
use serde_json::value::RawValue;
use tonic::{Request, Response, Status};

use super::{Parts, Service, in_chunks};
use crate::{
    clock::now_ns,
    error::{Error, Result},
};

/// `ErrRegistryUnavailable` of k8s.io/cri-api's `pkg/errors`.
const REGISTRY_UNAVAILABLE: &str = "RegistryUnavailable";

type Answer<T> = std::result::Result<Response<T>, Status>;

/// What is told of an image at length. It is written as it is: a config that is made into values can be a hundred times as
/// large.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Info<'a> {
    #[serde(rename = "chainID")]
    chain_id: Option<&'a ChainId>,
    image_spec: &'a RawValue,
    origin: Origin,
    added_at: Option<Timestamp>,
    last_used_at: Option<Timestamp>,
    in_use_by: &'a [String],
    layers: &'a [InspectedLayer],
    manifest: Option<&'a InspectedManifest>,
}

/// An image as CRI shows it; the user is a number where the image's is.
fn shown(image: ImageRecord) -> v1::Image {
    let name = image.config.user.split(':').next().unwrap_or_default();
    let uid = if name.is_empty() { Some(0) } else { name.parse::<i64>().ok() };
    let username = if uid.is_some() { String::new() } else { name.to_owned() };
    v1::Image {
        id: image.id.to_string(),
        repo_tags: image.repo_tags,
        repo_digests: image.repo_digests,
        size: image.size_bytes,
        uid: uid.map(|value| v1::Int64Value { value }),
        username,
        pinned: image.pinned,
        ..v1::Image::default()
    }
}

/// CRI's way to log in as ours. `auth` is base64 of `user:password`, with NULs at its end in old files.
fn credentials(auth: v1::AuthConfig) -> Result<Credentials> {
    let mut all = Credentials {
        username: auth.username,
        password: auth.password,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
    };
    if all.username.is_empty() && !auth.auth.is_empty() {
        let wrong = || Error::Invalid("the registry's auth is not base64 of user:password".into());
        let bytes =
            base64::engine::general_purpose::STANDARD.decode(auth.auth.trim()).map_err(|_| wrong())?;
        let text = String::from_utf8(bytes).map_err(|_| wrong())?;
        let (user, password) = text.split_once(':').ok_or_else(wrong)?;
        all.username = user.to_owned();
        all.password = password.trim_end_matches('\0').to_owned();
    }
    Ok(all)
}

/// A failed pull as a kubelet wants it: it knows its own errors by the beginnings of their texts, of code Unknown.
pub(super) fn pull_status(error: moxlet_image::Error) -> Status {
    let unavailable = matches!(error, moxlet_image::Error::Unreachable { .. });
    let status = Status::from(Error::from(error));
    if unavailable {
        Status::unknown(format!("{REGISTRY_UNAVAILABLE}: {}", status.message()))
    } else {
        status
    }
}

impl Service {
    async fn all_images(&self, filter: Option<v1::ImageFilter>) -> Result<Vec<v1::Image>> {
        let wanted = filter.and_then(|f| f.image).map(|i| i.image).filter(|i| !i.is_empty());
        let images = match wanted {
            Some(name) => self.rooms.images.resolve(&name).await?.into_iter().collect(),
            None => self.rooms.images.list().await?,
        };
        Ok(images.into_iter().map(shown).collect())
    }

    /// What `crictl inspecti` shows beside the image: containerd's `info`, and where the image is from.
    async fn verbose(&self, image: &ImageRecord) -> Result<HashMap<String, String>> {
        let Some(inspection) = self.rooms.images.inspect(image.id.as_str()).await? else {
            return Ok(HashMap::new());
        };
        let info = Info {
            chain_id: image.layers.last(),
            image_spec: &inspection.config,
            origin: inspection.origin,
            added_at: inspection.added_at,
            last_used_at: inspection.last_used_at,
            in_use_by: &inspection.in_use_by,
            layers: &inspection.layers,
            manifest: inspection.manifest.as_ref(),
        };
        let info = serde_json::to_string(&info)
            .map_err(|e| Error::io("making a text of what is known of an image", e))?;
        Ok(HashMap::from([("info".to_owned(), info)]))
    }
}

#[tonic::async_trait]
impl ImageService for Service {
    async fn list_images(&self, request: Request<v1::ListImagesRequest>) -> Answer<v1::ListImagesResponse> {
        let images = self.all_images(request.into_inner().filter).await?;
        Ok(Response::new(v1::ListImagesResponse { images }))
    }

    type StreamImagesStream = Parts<v1::StreamImagesResponse>;

    async fn stream_images(
        &self,
        request: Request<v1::StreamImagesRequest>,
    ) -> Answer<Self::StreamImagesStream> {
        let images = self.all_images(request.into_inner().filter).await?;
        Ok(in_chunks(images, |images| v1::StreamImagesResponse { images }))
    }

    async fn image_status(
        &self,
        request: Request<v1::ImageStatusRequest>,
    ) -> Answer<v1::ImageStatusResponse> {
        let request = request.into_inner();
        let name = request.image.unwrap_or_default().image;
        let image = self.rooms.images.resolve(&name).await.map_err(Error::from)?;
        let info = match &image {
            Some(image) if request.verbose => self.verbose(image).await?,
            _ => HashMap::new(),
        };
        Ok(Response::new(v1::ImageStatusResponse { image: image.map(shown), info }))
    }

    async fn pull_image(&self, request: Request<v1::PullImageRequest>) -> Answer<v1::PullImageResponse> {
        let request = request.into_inner();
        let name = request.image.unwrap_or_default().image;
        let auths = request.auth.map(credentials).transpose()?;
        let image = self.rooms.images.pull(&name, auths.as_slice()).await.map_err(pull_status)?;
        Ok(Response::new(v1::PullImageResponse { image_ref: image.id.to_string() }))
    }

    async fn remove_image(
        &self,
        request: Request<v1::RemoveImageRequest>,
    ) -> Answer<v1::RemoveImageResponse> {
        let name = request.into_inner().image.unwrap_or_default().image;
        self.rooms.images.remove_unused(&name).await.map_err(Error::from)?;
        Ok(Response::new(v1::RemoveImageResponse {}))
    }

    async fn image_fs_info(&self, _: Request<v1::ImageFsInfoRequest>) -> Answer<v1::ImageFsInfoResponse> {
        let driver = &self.rooms.driver;
        let mountpoint = driver.fs_usage().await.map_err(Error::from)?.mountpoint.display().to_string();
        let images = driver.layers_usage().await.map_err(Error::from)?;
        let containers = self.rooms.usages.sum();
        let shown = |usage: Usage| {
            let number = |value| Some(v1::UInt64Value { value });
            vec![v1::FilesystemUsage {
                timestamp: now_ns(),
                fs_id: Some(v1::FilesystemIdentifier { mountpoint: mountpoint.clone() }),
                used_bytes: number(usage.bytes),
                inodes_used: number(usage.inodes),
            }]
        };
        Ok(Response::new(v1::ImageFsInfoResponse {
            image_filesystems: shown(images),
            container_filesystems: shown(containers),
        }))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_login_comes_in_parts_or_encoded() {
        let auth = v1::AuthConfig { auth: "dXNlcjpwYTpzcwA=".into(), ..v1::AuthConfig::default() };
        let got = credentials(auth).unwrap();
        assert_eq!((got.username.as_str(), got.password.as_str()), ("user", "pa:ss"));
        for bad in ["%", "dXNlcg=="] {
            let auth = v1::AuthConfig { auth: bad.into(), ..v1::AuthConfig::default() };
            assert!(credentials(auth).is_err(), "{bad}");
        }
    }
}
