//! Uploads: into a real registry, and into one that fails.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{HeaderMap, Response, StatusCode, header},
    routing::{patch, post},
};
use bytes::Bytes;
use futures::{FutureExt, StreamExt, future::BoxFuture, stream};
use moxlet_ids::Digest;

use super::*;
use crate::{
    Error, Reference,
    layer::tests::Tar,
    registry::{Registry as Client, upload::ByteStream},
};

/// docker-registry on loopback, ended with us.
pub(super) struct Real {
    child: Child,
    address: String,
    _dir: tempfile::TempDir,
}

impl Drop for Real {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Real {
    pub(super) async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let config = dir.path().join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"}}\n",
            dir.path().display()
        );
        std::fs::write(&config, text).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually(|| std::future::ready(std::net::TcpStream::connect(&address).is_ok())).await;
        Self { child, address, _dir: dir }
    }

    pub(super) fn reference(&self, rest: &str) -> Reference {
        Reference::parse(&format!("{}/{rest}", self.address)).unwrap()
    }
}

fn client() -> Client {
    let config = Config {
        retry_pause: Duration::from_millis(10),
        stall_timeout: Duration::from_secs(2),
        ..Config::default()
    };
    Client::new(&config).unwrap()
}

fn opener(bytes: &[u8]) -> impl Fn() -> BoxFuture<'static, crate::Result<ByteStream>> + Send + Sync + use<> {
    let pieces: Vec<Bytes> = bytes.chunks(10_000).map(Bytes::copy_from_slice).collect();
    move || {
        let pieces = pieces.clone();
        async move { Ok(stream::iter(pieces).map(Ok).boxed()) }.boxed()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_uploaded_can_be_pulled() {
    let (real, place, client) = (Real::start().await, Place::new().await, client());
    let image = Image::new().layer(Tar::default().file("etc/a", "pushed"));
    let (config, layer) = image.blobs();
    let reference = real.reference("team/app:v1");
    let session = client.session(&reference, &[]).await.unwrap();

    let digest = Digest::of(&layer);
    assert!(!session.exists(&digest).await.unwrap());
    let (unknown, size) = session.upload_unknown("layer 1", &opener(&layer)).await.unwrap();
    assert_eq!((&unknown, size), (&digest, layer.len() as u64));
    assert!(session.exists(&digest).await.unwrap());
    session.upload(&Digest::of(&config), config.len() as u64, "config", &opener(&config)).await.unwrap();
    let manifest = image.manifest();
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let put = session.put_manifest(reference.wanted(), kind, &manifest).await.unwrap();
    assert_eq!(put, Digest::of(&manifest));
    let record = place.store.pull(&reference.to_string(), &[]).await.unwrap();
    assert_eq!(record.id, image.id());

    let other = real.reference("other/app:v1");
    let session = client.session(&other, &[]).await.unwrap();
    assert!(session.mount(&digest, "team/app").await.unwrap());
    assert!(session.exists(&digest).await.unwrap());
    assert!(!session.mount(&Digest::of(b"nowhere"), "team/app").await.unwrap());
    let empty = Digest::of(b"");
    session.upload(&empty, 0, "empty", &opener(b"")).await.unwrap();
    assert!(session.exists(&empty).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_refuses_what_does_not_match() {
    let (real, client) = (Real::start().await, client());
    let reference = real.reference("app:v1");
    let session = client.session(&reference, &[]).await.unwrap();
    let open = opener(b"something else");
    for outcome in [
        session.upload(&Digest::of(b"something"), 14, "layer 1", &open).await.map(drop),
        session.put_manifest("v1", "application/vnd.oci.image.manifest.v1+json", b"{").await.map(drop),
    ] {
        let error = outcome.unwrap_err();
        assert!(matches!(&error, Error::Push { denied: false, .. }), "{error}");
        assert!(error.to_string().contains("failed to push image"), "{error}");
    }
}

/// Fails the first uploads in different ways; counts how many began.
async fn flaky(begun: &Arc<AtomicUsize>) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let begin = |State(begun): State<Arc<AtomicUsize>>| async move {
        begun.fetch_add(1, Ordering::SeqCst);
        let response = Response::builder().status(StatusCode::ACCEPTED);
        response.header(header::LOCATION, "/upload?state=a%2Fb").body(Body::empty()).unwrap()
    };
    let put = |State(begun): State<Arc<AtomicUsize>>, uri: axum::http::Uri, body: Body| async move {
        match begun.load(Ordering::SeqCst) {
            1 => return StatusCode::SERVICE_UNAVAILABLE,
            2 => {
                // It takes nothing more.
                tokio::time::sleep(Duration::from_secs(600)).await;
            }
            3 => return StatusCode::UNAUTHORIZED,
            _ => {}
        }
        let mut body = body.into_data_stream();
        while let Some(piece) = body.next().await {
            if piece.is_err() {
                return StatusCode::BAD_REQUEST;
            }
        }
        assert!(uri.query().unwrap().starts_with("state=a%2Fb&digest=sha256"), "{uri}");
        StatusCode::CREATED
    };
    let app = Router::new()
        .route("/v2/app/blobs/uploads/", post(begin))
        .route("/upload", patch(put).put(put))
        .with_state(Arc::clone(begun));
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_off_begins_anew() {
    let begun = Arc::new(AtomicUsize::new(0));
    let address = flaky(&begun).await;
    let (client, reference) = (client(), Reference::parse(&format!("{address}/app")).unwrap());
    let session = client.session(&reference, &[]).await.unwrap();
    let bytes = vec![7; 40 << 20];
    session.upload(&Digest::of(&bytes), bytes.len() as u64, "layer 1", &opener(&bytes)).await.unwrap();
    assert_eq!(begun.load(Ordering::SeqCst), 4);
}

/// Tells how many uploads began; a token is good until bytes have come.
#[derive(Default)]
struct Forgetful {
    address: String,
    begun: AtomicUsize,
    token: AtomicUsize,
    ended: std::sync::Mutex<Vec<HeaderMap>>,
}

impl Forgetful {
    async fn start() -> Arc<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let registry = Arc::new(Self { address, ..Self::default() });
        let token = |State(registry): State<Arc<Self>>| async move {
            format!(r#"{{"token":"t{}"}}"#, registry.token.load(Ordering::SeqCst))
        };
        let begin = |State(registry): State<Arc<Self>>, headers: HeaderMap| async move {
            registry.refuse(&headers).unwrap_or_else(|| {
                registry.begun.fetch_add(1, Ordering::SeqCst);
                let response = Response::builder().status(StatusCode::ACCEPTED);
                response.header(header::LOCATION, "/upload").body(Body::empty()).unwrap()
            })
        };
        let bytes = |State(registry): State<Arc<Self>>, headers: HeaderMap, body: Bytes| async move {
            registry.refuse(&headers).unwrap_or_else(|| {
                assert!(!body.is_empty());
                registry.token.fetch_add(1, Ordering::SeqCst);
                let response = Response::builder().status(StatusCode::ACCEPTED);
                response.header(header::LOCATION, "/upload?state=1").body(Body::empty()).unwrap()
            })
        };
        let end = |State(registry): State<Arc<Self>>, headers: HeaderMap| async move {
            registry.refuse(&headers).unwrap_or_else(|| {
                registry.ended.lock().unwrap().push(headers);
                Response::builder().status(StatusCode::CREATED).body(Body::empty()).unwrap()
            })
        };
        let app = Router::new()
            .route("/token", axum::routing::get(token))
            .route("/v2/app/blobs/uploads/", post(begin))
            .route("/upload", patch(bytes).put(end))
            .with_state(Arc::clone(&registry));
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        registry
    }

    fn refuse(&self, headers: &HeaderMap) -> Option<Response<Body>> {
        let wanted = format!("Bearer t{}", self.token.load(Ordering::SeqCst));
        if headers.get(header::AUTHORIZATION).is_some_and(|h| *h == wanted) {
            return None;
        }
        let challenge = format!(r#"Bearer realm="http://{}/token""#, self.address);
        let response = Response::builder().status(StatusCode::UNAUTHORIZED);
        Some(response.header(header::WWW_AUTHENTICATE, challenge).body(Body::empty()).unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_outlives_its_token_is_ended_with_a_new_one() {
    let registry = Forgetful::start().await;
    let (client, reference) = (client(), Reference::parse(&format!("{}/app", registry.address)).unwrap());
    let login = [super::pulls::user("me", "secret")];
    let session = client.session(&reference, &login).await.unwrap();
    let (digest, size) = session.upload_unknown("layer 1", &opener(&[7; 100_000])).await.unwrap();
    assert_eq!((digest, size), (Digest::of(&[7; 100_000]), 100_000));
    assert_eq!(registry.begun.load(Ordering::SeqCst), 1, "nothing is sent twice");
    let ended = registry.ended.lock().unwrap();
    assert_eq!(ended.len(), 1);
    assert_eq!(ended[0][header::CONTENT_LENGTH], "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_cannot_be_read_is_given_up() {
    let begun = Arc::new(AtomicUsize::new(3));
    let address = flaky(&begun).await;
    let (client, reference) = (client(), Reference::parse(&format!("{address}/app")).unwrap());
    let session = client.session(&reference, &[]).await.unwrap();
    let open = || -> BoxFuture<'static, crate::Result<ByteStream>> {
        let broken = stream::iter([Ok(Bytes::from_static(b"a")), Err(std::io::Error::other("the disk"))]);
        async move { Ok(broken.boxed()) }.boxed()
    };
    let error = session.upload(&Digest::of(b"ab"), 2, "layer 1", &open).await.unwrap_err();
    assert!(matches!(&error, Error::Push { .. }) && error.to_string().contains("layer 1"), "{error}");
    let open = || async { Err(Error::Stopped) }.boxed();
    let error = session.upload(&Digest::of(b"ab"), 2, "layer 1", &open).await.unwrap_err();
    assert!(matches!(error, Error::Stopped), "{error}");
    fn sent<T: Send>(_: &T) {}
    let open = opener(b"");
    sent(&session.upload_unknown("layer 1", &open));
    sent(&session.upload(&Digest::of(b""), 0, "layer 1", &open));
}
