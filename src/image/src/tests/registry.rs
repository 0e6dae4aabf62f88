//! A registry with faults on demand.

use std::{
    collections::HashMap,
    io::Write,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, Method, Response, StatusCode, Uri, header},
    routing::get,
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use moxlet_ids::{Algorithm, Digest};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::layer::tests::Tar;

/// What goes wrong with a blob.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// The connection breaks in the middle, so many times.
    Breaks(u32),
    /// As `Breaks`, and the registry cannot send a part.
    BreaksWithoutRanges(u32),
    /// It ends in the middle as if that were its end, so many times.
    Cut(u32),
    /// 503, so many times.
    Busy(u32),
    /// Other bytes of the same length.
    Damaged,
    /// It is elsewhere.
    Redirect(String),
    /// Half of it comes, the rest when a permit is added.
    Held(Arc<Semaphore>),
}

#[derive(Default)]
struct Content {
    /// By repository and tag or digest.
    manifests: HashMap<(String, String), Vec<u8>>,
    blobs: HashMap<String, Vec<u8>>,
    faults: HashMap<String, Fault>,
    /// User and password, where one has to log in.
    login: Option<(String, String)>,
    /// What was asked for: path, range, and whether credentials came along.
    requests: Vec<(String, Option<String>, bool)>,
    /// Who asked for tokens.
    tokens: Vec<String>,
    /// Where we are.
    address: String,
}

/// The registry.
#[derive(Clone, Default)]
pub(crate) struct Registry(Arc<Mutex<Content>>);

/// An image in the making.
#[derive(Default, Clone)]
pub(crate) struct Image {
    layers: Vec<(Vec<u8>, Vec<u8>)>,
    config: Value,
}

impl Image {
    pub(crate) fn new() -> Self {
        let config = json!({
            "architecture": crate::registry::platform::host_architecture(),
            "os": "linux",
            "config": { "Cmd": ["/bin/sh"], "Labels": null, "ExposedPorts": null, "Env": ["A=b"] },
            "history": null,
        });
        Self { layers: Vec::new(), config }
    }

    /// Adds a layer as gzip.
    pub(crate) fn layer(self, tar: Tar) -> Self {
        let tar = tar.end();
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&tar).unwrap();
        let blob = encoder.finish().unwrap();
        self.blob(tar, blob)
    }

    /// Adds a layer as it is, in a blob that need not fit.
    pub(crate) fn blob(mut self, tar: Vec<u8>, blob: Vec<u8>) -> Self {
        self.layers.push((tar, blob));
        self
    }

    /// Changes a field of the config.
    pub(crate) fn with(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    /// The digest of a layer's blob.
    pub(crate) fn digest(&self, layer: usize) -> String {
        Digest::of(&self.layers[layer].1).to_string()
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.config.clone();
        if config["rootfs"].is_null() {
            let diff_ids: Vec<_> = self.layers.iter().map(|(tar, _)| Digest::of(tar).to_string()).collect();
            config["rootfs"] = json!({ "type": "layers", "diff_ids": diff_ids });
        }
        serde_json::to_vec(&config).unwrap()
    }

    /// Its config and first layer.
    pub(crate) fn blobs(&self) -> (Vec<u8>, Vec<u8>) {
        (self.config(), self.layers[0].1.clone())
    }

    /// Its manifest.
    pub(crate) fn manifest(&self) -> Vec<u8> {
        let describe = |kind: &str, bytes: &[u8]| {
            json!({
                "mediaType": format!("application/vnd.oci.image.{kind}"),
                "digest": Digest::of(bytes),
                "size": bytes.len(),
            })
        };
        let layers: Vec<_> =
            self.layers.iter().map(|(_, blob)| describe("layer.v1.tar+gzip", blob)).collect();
        let config = describe("config.v1+json", &self.config());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers,
        });
        serde_json::to_vec(&manifest).unwrap()
    }

    /// The image's id.
    pub(crate) fn id(&self) -> Digest {
        Digest::of(&self.config())
    }

    pub(crate) fn config_size(&self) -> u64 {
        self.config().len() as u64
    }

    pub(crate) fn size(&self) -> u64 {
        (self.config().len() + self.layers.iter().map(|(_, blob)| blob.len()).sum::<usize>()) as u64
    }
}

impl Registry {
    pub(crate) async fn start() -> Self {
        let registry = Self::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        registry.content().address = listener.local_addr().unwrap().to_string();
        let app = Router::new()
            .route("/token", get(token).post(refresh))
            .route("/v2/{repository}/manifests/{wanted}", get(manifest))
            .route("/v2/{repository}/blobs/{digest}", get(blob))
            .with_state(registry.clone());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        registry
    }

    fn content(&self) -> std::sync::MutexGuard<'_, Content> {
        self.0.lock().unwrap()
    }

    /// A name in this registry.
    pub(crate) fn name(&self, rest: &str) -> String {
        format!("{}/{rest}", self.content().address)
    }

    pub(crate) fn url(&self, rest: &str) -> String {
        format!("http://{}/{rest}", self.content().address)
    }

    /// Adds an image under `repository:tag`, by way of an index; the index's digest.
    pub(crate) fn push(&self, name: &str, image: &Image) -> Digest {
        self.push_by(Algorithm::Sha256, name, image)
    }

    /// The same with all descriptors by that algorithm.
    pub(crate) fn push_by(&self, algorithm: Algorithm, name: &str, image: &Image) -> Digest {
        let (repository, tag) = name.split_once(':').unwrap();
        let config = image.config();
        let mut content = self.content();
        let mut add = |bytes: &[u8]| {
            content.blobs.insert(Digest::by(algorithm, bytes).to_string(), bytes.to_vec());
            json!({ "digest": Digest::by(algorithm, bytes), "size": bytes.len() })
        };
        let layers: Vec<_> = image
            .layers
            .iter()
            .map(|(_, blob)| {
                let mut layer = add(blob);
                layer["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar+gzip");
                layer
            })
            .collect();
        let manifest = json!({ "schemaVersion": 2, "config": add(&config), "layers": layers });
        let manifest = serde_json::to_vec(&manifest).unwrap();
        let architecture = crate::registry::platform::host_architecture();
        let index = json!({
            "schemaVersion": 2,
            "manifests": [{
                "digest": Digest::by(algorithm, &manifest),
                "size": manifest.len(),
                "platform": { "os": "linux", "architecture": architecture },
            }],
        });
        let index = serde_json::to_vec(&index).unwrap();
        let digest = Digest::by(algorithm, &index);
        for (wanted, bytes) in [
            (Digest::by(algorithm, &manifest).to_string(), &manifest),
            (digest.to_string(), &index),
            (tag.to_owned(), &index),
        ] {
            content.manifests.insert((repository.to_owned(), wanted), bytes.clone());
        }
        digest
    }

    pub(crate) fn fault(&self, digest: &str, fault: Fault) {
        self.content().faults.insert(digest.to_owned(), fault);
    }

    pub(crate) fn login(&self, user: &str, password: &str) {
        self.content().login = Some((user.to_owned(), password.to_owned()));
    }

    /// Answers a request for this digest with some other manifest.
    pub(crate) fn lie(&self, digest: &Digest) {
        let mut content = self.content();
        let other = content.manifests.values().next().unwrap().clone();
        content.manifests.insert(("app".to_owned(), digest.to_string()), other);
    }

    pub(crate) fn forget_requests(&self) {
        self.content().requests.clear();
    }

    /// Who asked for tokens: the login headers.
    pub(crate) fn tokens(&self) -> Vec<String> {
        self.content().tokens.clone()
    }

    /// The requests whose path contains a text: range, and whether credentials came along.
    pub(crate) fn requests(&self, part: &str) -> Vec<(Option<String>, bool)> {
        let content = self.content();
        let matching = content.requests.iter().filter(|(path, _, _)| path.contains(part));
        matching.map(|(_, range, login)| (range.clone(), *login)).collect()
    }
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<String> {
    headers.get(name).map(|v| v.to_str().unwrap().to_owned())
}

fn answer(status: StatusCode, body: impl Into<Body>) -> Response<Body> {
    Response::builder().status(status).body(body.into()).unwrap()
}

/// The challenge, where the request does not come with our token.
fn refuse(content: &Content, headers: &HeaderMap) -> Option<Response<Body>> {
    content.login.as_ref()?;
    if text(headers, header::AUTHORIZATION).as_deref() == Some("Bearer good") {
        return None;
    }
    let challenge = format!(r#"Bearer realm="http://{}/token",service="test""#, content.address);
    let response =
        Response::builder().status(StatusCode::UNAUTHORIZED).header(header::WWW_AUTHENTICATE, challenge);
    Some(response.body(Body::empty()).unwrap())
}

async fn token(State(registry): State<Registry>, headers: HeaderMap) -> Response<Body> {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let mut content = registry.content();
    let (user, password) = content.login.clone().unwrap();
    content.tokens.push(text(&headers, header::AUTHORIZATION).unwrap_or_default());
    let wanted = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
    match text(&headers, header::AUTHORIZATION) {
        Some(login) if login == wanted => answer(StatusCode::OK, r#"{"token":"good"}"#),
        Some(_) => {
            answer(StatusCode::UNAUTHORIZED, r#"{"errors":[{"code":"UNAUTHORIZED","message":"wrong"}]}"#)
        }
        None => answer(StatusCode::OK, r#"{"token":"of nobody"}"#),
    }
}

/// A refresh token is `of` and the user.
async fn refresh(State(registry): State<Registry>, body: String) -> Response<Body> {
    let (user, _) = registry.content().login.clone().unwrap();
    let form: HashMap<_, _> = body.split('&').filter_map(|pair| pair.split_once('=')).collect();
    assert_eq!((form["grant_type"], form["service"], form["client_id"]), ("refresh_token", "test", "moxlet"));
    assert!(form["scope"].starts_with("repository%3A"), "{body}");
    if form["refresh_token"] == format!("of+{user}") {
        answer(StatusCode::OK, r#"{"access_token":"good","expires_in":60}"#)
    } else {
        // RFC 6749, section 5.2.
        answer(StatusCode::BAD_REQUEST, r#"{"error":"invalid_grant"}"#)
    }
}

async fn manifest(
    State(registry): State<Registry>,
    Path((repository, wanted)): Path<(String, String)>,
    (method, uri): (Method, Uri),
    headers: HeaderMap,
) -> Response<Body> {
    let mut content = registry.content();
    let asked = if method == Method::HEAD { format!("HEAD {uri}") } else { uri.to_string() };
    content.requests.push((asked, None, headers.contains_key(header::AUTHORIZATION)));
    if let Some(refusal) = refuse(&content, &headers) {
        return refusal;
    }
    match content.manifests.get(&(repository, wanted)) {
        Some(bytes) => {
            let mut answer = answer(StatusCode::OK, bytes.clone());
            let digest = Digest::of(bytes).to_string().parse().unwrap();
            answer.headers_mut().insert("docker-content-digest", digest);
            answer
        }
        None => answer(StatusCode::NOT_FOUND, r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no"}]}"#),
    }
}

/// The first of the pieces at once, then the second or an error.
fn halves(bytes: &[u8], then: Option<Arc<Semaphore>>) -> Body {
    let (front, back) = bytes.split_at(bytes.len() / 2);
    let (front, back) = (Bytes::copy_from_slice(front), Bytes::copy_from_slice(back));
    Body::from_stream(stream::iter([Ok(front)]).chain(stream::once(async move {
        match then {
            Some(permit) => {
                permit.acquire().await.unwrap().forget();
                Ok(back)
            }
            None => {
                tokio::task::yield_now().await;
                Err(std::io::Error::other("broken on purpose"))
            }
        }
    })))
}

async fn blob(
    State(registry): State<Registry>,
    Path((_, digest)): Path<(String, String)>,
    uri: Uri,
    headers: HeaderMap,
) -> Response<Body> {
    let mut content = registry.content();
    let range = text(&headers, header::RANGE);
    let login = headers.contains_key(header::AUTHORIZATION);
    content.requests.push((uri.to_string(), range.clone(), login));
    if let Some(refusal) = refuse(&content, &headers) {
        return refusal;
    }
    let Some(bytes) = content.blobs.get(&digest).cloned() else { return answer(StatusCode::NOT_FOUND, "") };
    let from: usize =
        range.map_or(0, |r| r.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
    let part = |bytes: &[u8], body: Body| {
        if from == 0 {
            return answer(StatusCode::OK, body);
        }
        let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
        let response =
            Response::builder().status(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, range);
        response.body(body).unwrap()
    };
    match content.faults.get_mut(&digest) {
        Some(Fault::Breaks(times)) if *times > 0 => {
            *times -= 1;
            part(&bytes, halves(&bytes[from..], None))
        }
        Some(Fault::BreaksWithoutRanges(times)) if *times > 0 => {
            *times -= 1;
            answer(StatusCode::OK, halves(&bytes, None))
        }
        Some(Fault::BreaksWithoutRanges(_)) => answer(StatusCode::OK, bytes),
        Some(Fault::Cut(times)) if *times > 0 => {
            *times -= 1;
            part(&bytes, Body::from(bytes[from..bytes.len().midpoint(from)].to_vec()))
        }
        Some(Fault::Busy(times)) if *times > 0 => {
            *times -= 1;
            answer(StatusCode::SERVICE_UNAVAILABLE, "")
        }
        Some(Fault::Damaged) => {
            let mut damaged = bytes;
            let middle = damaged.len() / 2;
            damaged[middle] ^= 0xff;
            answer(StatusCode::OK, damaged)
        }
        Some(Fault::Redirect(to)) => {
            let response =
                Response::builder().status(StatusCode::TEMPORARY_REDIRECT).header(header::LOCATION, &*to);
            response.body(Body::empty()).unwrap()
        }
        Some(Fault::Held(permit)) => answer(StatusCode::OK, halves(&bytes, Some(Arc::clone(permit)))),
        _ => part(&bytes, Body::from(bytes[from..].to_vec())),
    }
}
