//! Pulls from registries that are down, slow, or lie: what can be got over is, the rest has the right error.

use std::{
    io::Write,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::{Notify, mpsc};

use super::{
    pulls::{large, user},
    raw::{Raw, Request, Step, answer},
    *,
};
use crate::{
    Error, Reference,
    download::download,
    layer::Piece,
    registry::{Registry as Client, Served, manifest::Descriptor},
};

const FAST: Duration = Duration::from_millis(1);

/// A store that loses patience soon.
async fn hasty() -> Place {
    Place::with(|config| config.stall_timeout = Duration::from_millis(400)).await
}

async fn refused(raw: &Raw, login: &[crate::Credentials]) -> Error {
    let place = hasty().await;
    let error = place.store.pull(&raw.name(), login).await.unwrap_err();
    place.no_drafts().await;
    assert_eq!(place.layers().await, 0);
    assert!(place.store.list().await.unwrap().is_empty());
    error
}

/// The head of the whole layer and half of it.
fn half(image: &Image) -> Vec<u8> {
    let (_, layer) = image.blobs();
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", layer.len());
    [head.as_bytes(), &layer[..layer.len() / 2]].concat()
}

/// Serves an image whose layer is first answered as wanted, and pulls it; the requests for the layer.
async fn pulled(
    special: impl Fn(&Image, &Request) -> Option<Vec<Step>> + Send + Sync + 'static,
) -> Vec<Request> {
    let image = large(1);
    let (layer, served) = (image.digest(0), image.clone());
    let wanted = layer.clone();
    let raw =
        Raw::start(&image, move |r| if r.path.contains(&wanted) { special(&served, r) } else { None }).await;
    let place = hasty().await;
    let record = place.store.pull(&raw.name(), &[]).await.unwrap();
    assert_eq!(record.id, image.id());
    raw.requests(&layer)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_stalls_goes_on_where_it_was() {
    let asked = pulled(|image, r| match r.nth {
        0 => Some(vec![Step::Send(half(image)), Step::Hang]),
        _ => None,
    })
    .await;
    assert_eq!(asked.len(), 2);
    assert!(asked[1].from().is_some_and(|from| from > 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_drips_is_taken_up_anew() {
    let asked = pulled(|image, r| {
        let (_, layer) = image.blobs();
        let drops = layer[layer.len() / 2..].iter().take(1000);
        let drops = drops.flat_map(|b| [Step::Send(vec![*b]), Step::Wait(Duration::from_millis(100))]);
        (r.nth == 0).then(|| [Step::Send(half(image))].into_iter().chain(drops).collect())
    })
    .await;
    assert_eq!(asked.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_never_ends_is_not_waited_for() {
    let asked = pulled(|_, r| match r.nth {
        0 => Some(vec![
            Step::Send(b"HTTP/1.1 200 OK\r\nx: ".to_vec()),
            Step::Repeat(b"a".to_vec(), Duration::from_millis(50)),
        ]),
        1 => Some(vec![Step::Hang]),
        _ => None,
    })
    .await;
    assert_eq!(asked.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_cut_goes_on_where_it_was() {
    let asked = pulled(|image, r| {
        let (_, layer) = image.blobs();
        match r.nth {
            // Its length is that of the half.
            0 => Some(answer("200 OK", "", &layer[..layer.len() / 2])),
            // Closed without a word, then in trouble.
            1 => Some(Vec::new()),
            2 => Some(answer("500 Internal Server Error", "", b"")),
            _ => None,
        }
    })
    .await;
    let middle = asked[1].from();
    assert!(
        asked.len() == 4 && middle.is_some() && asked[2..].iter().all(|r| r.from() == middle),
        "{asked:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_that_is_not_the_wanted_one_is_not_taken() {
    for wrong in ["bytes 0-9/10", "bytes nonsense", "bytes 7-9/*"] {
        let asked = pulled(move |image, r| {
            let (_, layer) = image.blobs();
            match (r.nth, r.from()) {
                (0, _) => Some(vec![Step::Send(half(image))]),
                (_, Some(_)) => {
                    Some(answer("206 Partial Content", &format!("content-range: {wrong}\r\n"), &layer))
                }
                _ => None,
            }
        })
        .await;
        // The answer that is not read may break off before its head has come, and is then asked for again.
        let parts: Vec<bool> = asked.iter().map(|r| r.from().is_some()).collect();
        assert!(matches!(parts.as_slice(), [false, true, .., false]), "{parts:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_has_no_parts_sends_the_whole() {
    let asked = pulled(|image, r| match (r.nth, r.from()) {
        (0, _) => Some(vec![Step::Send(half(image))]),
        (_, Some(_)) => Some(answer("416 Range Not Satisfiable", "", b"")),
        _ => None,
    })
    .await;
    assert_eq!(asked.len(), 3);
    let ignored = pulled(|image, r| match r.nth {
        0 => Some(vec![Step::Send(half(image))]),
        _ => Some(answer("200 OK", "", &image.blobs().1)),
    })
    .await;
    assert_eq!(ignored.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_longer_than_it_may_be_is_refused() {
    let image = large(1);
    let (layer, (_, bytes)) = (image.digest(0), image.blobs());
    let raw = Raw::start(&image, move |r| {
        r.path.contains(&layer).then(|| answer("200 OK", "", &[bytes.as_slice(), b"more"].concat()))
    })
    .await;
    let error = refused(&raw, &[]).await;
    assert!(matches!(&error, Error::BadImage { reason, .. } if reason.contains("larger")), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_without_patience_is_waited_for_a_little() {
    let asked = pulled(|_, r| match r.nth {
        0 => Some(answer("429 Too Many Requests", "retry-after: 0\r\n", b"")),
        _ => None,
    })
    .await;
    assert_eq!(asked.len(), 2);

    let raw =
        Raw::start(&large(1), |_| Some(answer("429 Too Many Requests", "retry-after: 3600\r\n", b""))).await;
    let error = refused(&raw, &[]).await;
    assert!(matches!(&error, Error::Unreachable { reason, .. } if reason.contains("3600 s")), "{error}");
    assert_eq!(raw.requests("").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_end_somewhere_and_stay_with_tls() {
    for (to, said) in [
        ("/v2/app/manifests/again", "redirects more than"),
        ("http://192.0.2.1/", "without TLS"),
        ("file:///etc/passwd", "without TLS"),
        ("http://[", "no address"),
    ] {
        let raw = Raw::start(&large(1), move |_| {
            Some(answer("307 Temporary Redirect", &format!("location: {to}\r\n"), b""))
        })
        .await;
        let error = refused(&raw, &[]).await;
        assert!(
            matches!(&error, Error::Unreachable { reason, .. } if reason.contains(said)),
            "{to}: {error}"
        );
        assert!(raw.requests("").len() <= 6);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_end_is_not_read_to_it() {
    let endless = |head: &'static str| {
        move |_: &Request| {
            let piece = format!("10000\r\n{}\r\n", " ".repeat(0x10000)).into_bytes();
            Some(vec![Step::Send(head.as_bytes().to_vec()), Step::Repeat(piece, Duration::ZERO)])
        }
    };
    let raw = Raw::start(&large(1), endless("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")).await;
    let error = refused(&raw, &[]).await;
    assert!(
        matches!(&error, Error::BadImage { reason, .. } if reason.contains("larger")),
        "manifest: {error}"
    );

    let head = "HTTP/1.1 500 Internal Server Error\r\ntransfer-encoding: chunked\r\n\r\n";
    let raw = Raw::start(&large(1), endless(head)).await;
    let error = refused(&raw, &[]).await;
    assert!(matches!(error, Error::Unreachable { .. }), "error body: {error}");

    let raw = Raw::start(&large(1), |_| {
        let header = format!("x: {}\r\n", "a".repeat(1000)).into_bytes();
        Some(vec![Step::Send(b"HTTP/1.1 200 OK\r\n".to_vec()), Step::Repeat(header, FAST)])
    })
    .await;
    let error = refused(&raw, &[]).await;
    assert!(matches!(error, Error::Unreachable { .. }), "headers: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_lies_about_itself_is_refused() {
    let other = moxlet_ids::Digest::of(b"other");
    let image = large(1);
    let manifest = image.manifest();
    let raw = Raw::start(&image, move |r| {
        let lie = format!("docker-content-digest: {other}\r\n");
        r.path.contains("manifests/").then(|| answer("200 OK", &lie, &manifest))
    })
    .await;
    let error = refused(&raw, &[]).await;
    assert!(matches!(&error, Error::DigestMismatch { part, .. } if part == "manifest"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_may_come_compressed() {
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let image = large(1);
    for (encoding, body, want) in [
        ("gzip", gzip(&image.manifest()), None),
        ("gzip", gzip(&vec![b' '; 5 << 20]), Some("larger")),
        ("gzip", b"nonsense".to_vec(), Some("gzip cannot be read")),
        ("br", image.manifest(), Some("not asked for")),
    ] {
        let header = format!("content-encoding: {encoding}\r\n");
        let raw = Raw::start(&image, move |r| {
            r.path.contains("manifests/").then(|| answer("200 OK", &header, &body))
        })
        .await;
        match want {
            None => drop(hasty().await.store.pull(&raw.name(), &[]).await.unwrap()),
            Some(said) => {
                let error = refused(&raw, &[]).await;
                assert!(matches!(&error, Error::BadImage { reason, .. } if reason.contains(said)), "{error}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_layer_comes_from_the_registry_or_is_named() {
    let image = large(1);
    for kind in [
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    ] {
        let mut manifest: serde_json::Value = serde_json::from_slice(&image.manifest()).unwrap();
        manifest["layers"][0]["mediaType"] = kind.into();
        let elsewhere = Raw::start(&image, |_| None).await;
        let url = format!("http://{}/v2/app/blobs/{}", elsewhere.address, image.digest(0));
        manifest["layers"][0]["urls"] = vec![url].into();
        let manifest = manifest.to_string();
        for there in [true, false] {
            let (manifest, layer) = (manifest.clone(), image.digest(0));
            let raw = Raw::start(&image, move |r| {
                if r.path.contains("manifests/") {
                    return Some(answer("200 OK", "", manifest.as_bytes()));
                }
                (r.path.contains(&layer) && !there).then(|| answer("404 Not Found", "", b""))
            })
            .await;
            if there {
                hasty().await.store.pull(&raw.name(), &[]).await.unwrap();
            } else {
                let said = refused(&raw, &[]).await.to_string();
                assert!(
                    said.contains("layer 1") && said.contains("not distributed by the registry"),
                    "{said}"
                );
            }
        }
        assert!(elsewhere.requests("").is_empty(), "an image sends us nowhere");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_an_old_registry_without_layers_is_pulled() {
    let config = serde_json::json!({
        "architecture": crate::registry::platform::host_architecture(), "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": null },
    });
    let config = config.to_string().into_bytes();
    let digest = moxlet_ids::Digest::of(&config);
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": { "mediaType": "application/octet-stream", "digest": digest, "size": config.len() },
        "layers": null,
    });
    let (manifest, wanted) = (manifest.to_string(), digest.to_string());
    let raw = Raw::start(&large(1), move |r| {
        if r.path.contains("manifests/") {
            return Some(answer("200 OK", "", manifest.as_bytes()));
        }
        r.path.contains(&wanted).then(|| answer("200 OK", "", &config))
    })
    .await;
    let record = hasty().await.store.pull(&raw.name(), &[]).await.unwrap();
    assert_eq!((&record.id, record.layers.len()), (&digest, 0));
}

/// Answers that ask for a token, for requests that do not come with the wanted one.
fn guarded(r: &Request, token: &str, realm: &str) -> Option<Vec<Step>> {
    if r.header("authorization") == Some(&format!("Bearer {token}")) {
        return None;
    }
    let challenge = format!("www-authenticate: Bearer realm=\"{realm}\",service=\"s\"\r\n");
    Some(answer("401 Unauthorized", &challenge, b""))
}

fn realm(r: &Request) -> String {
    format!("http://{}/token", r.header("host").unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_expires_in_the_middle_is_replaced() {
    let image = large(1);
    let (layer, served, age) = (image.digest(0), image.clone(), AtomicUsize::new(0));
    let raw = Raw::start(&image, move |r| {
        let token = age.load(Ordering::SeqCst);
        if r.path.starts_with("/token") {
            return Some(answer("200 OK", "", format!(r#"{{"token":"t{token}"}}"#).as_bytes()));
        }
        let refusal = guarded(r, &format!("t{token}"), &realm(r));
        if refusal.is_none() && r.path.contains(&layer) && r.from().is_none() {
            age.fetch_add(1, Ordering::SeqCst);
            return Some(vec![Step::Send(half(&served))]);
        }
        refusal
    })
    .await;
    let record = hasty().await.store.pull(&raw.name(), &[user("me", "secret")]).await.unwrap();
    assert_eq!(record.id, image.id());
    assert_eq!(raw.requests("/token").len(), 2);
    let asked = raw.requests(&image.digest(0));
    assert!(asked.last().unwrap().from().is_some(), "it went on where it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_service_that_lies_is_not_believed() {
    let endless = || {
        let head = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
        vec![Step::Send(head), Step::Repeat(vec![b' '; 1 << 16], Duration::ZERO)]
    };
    for (reply, said) in [
        (answer("200 OK", "", b"{}"), "no token"),
        (answer("200 OK", "", b"[\"token\"]"), "no token"),
        (answer("200 OK", "", br#"{"token":"a\nb"}"#), "401"),
        (answer("404 Not Found", "", b""), "404"),
        (answer("503 Service Unavailable", "", b""), "503"),
        (endless(), "larger"),
        (vec![Step::Hang], "said nothing"),
    ] {
        let raw = Raw::start(&large(1), move |r| {
            if r.path.starts_with("/token") { Some(reply.clone()) } else { guarded(r, "none", &realm(r)) }
        })
        .await;
        let error = refused(&raw, &[user("me", "secret")]).await.to_string();
        assert!(error.contains(said) && !error.contains("secret"), "{said}: {error}");
    }
    for realm in ["http://192.0.2.1/token", "ftp://127.0.0.1/", "nonsense"] {
        let raw = Raw::start(&large(1), move |r| guarded(r, "none", realm)).await;
        let error = refused(&raw, &[user("me", "secret")]).await;
        assert!(matches!(&error, Error::Denied { reason, .. } if reason.contains("address")), "{error}");
    }
}

/// A body that breaks off in its middle.
fn broken(body: &[u8]) -> Vec<Step> {
    let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
    vec![Step::Send([head.as_bytes(), &body[..body.len() / 2]].concat())]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_or_token_that_breaks_off_is_asked_for_again() {
    let image = large(1);
    let manifest = image.manifest();
    let raw = Raw::start(&image, move |r| {
        let token = br#"{"token":"t"}"#;
        match (r.path.starts_with("/token"), r.nth) {
            (true, 0) => Some(broken(token)),
            (true, _) => Some(answer("200 OK", "", token)),
            _ => guarded(r, "t", &realm(r))
                .or_else(|| (r.path.contains("manifests/") && r.nth < 3).then(|| broken(&manifest))),
        }
    })
    .await;
    assert_eq!(hasty().await.store.pull(&raw.name(), &[]).await.unwrap().id, image.id());
    assert_eq!(raw.requests("/token").len(), 2);
    assert_eq!(raw.requests("manifests/").len(), 4, "without a token, two that broke off, the whole");

    let raw = Raw::start(&image, |r| r.path.contains("manifests/").then(|| broken(b"{ }"))).await;
    let error = refused(&raw, &[]).await;
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert_eq!(raw.requests("manifests/").len(), crate::registry::ATTEMPTS as usize);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_has_so_many_tries_wherever_each_fails() {
    let raw = Raw::start(&large(1), |r| {
        let busy = || answer("503 Service Unavailable", "", b"");
        r.path.contains("manifests/").then(|| if r.nth % 2 == 0 { busy() } else { broken(b"{ }") })
    })
    .await;
    let error = refused(&raw, &[]).await;
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert_eq!(raw.requests("manifests/").len(), crate::registry::ATTEMPTS as usize);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_just_being_started_is_waited_for() {
    let image = large(1);
    let registry = Raw::start(&image, |_| None).await;
    // An address at which nobody listens yet.
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let place = Place::with(|config| config.retry_pause = Duration::from_millis(300)).await;
    let start = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = tokio::net::TcpStream::connect(&registry.address).await.unwrap();
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut near, &mut far).await });
        }
    };
    let name = format!("{address}/app:v1");
    tokio::select! {
        record = place.store.pull(&name, &[]) => assert_eq!(record.unwrap().id, image.id()),
        () = start => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_down_is_unreachable_until_it_is_up() {
    let place = hasty().await;
    let error = place.store.pull("127.0.0.1:1/app:v1", &[]).await.unwrap_err();
    assert!(matches!(&error, Error::Unreachable { .. }), "{error}");
    let image = large(1);
    let down = Arc::new(AtomicBool::new(true));
    let state = Arc::clone(&down);
    let raw = Raw::start(&image, move |_| state.load(Ordering::SeqCst).then(Vec::new)).await;
    let error = place.store.pull(&raw.name(), &[]).await.unwrap_err();
    assert!(matches!(&error, Error::Unreachable { .. }), "{error}");
    assert_eq!(raw.requests("").len(), crate::registry::ATTEMPTS as usize);
    down.store(false, Ordering::SeqCst);
    assert_eq!(place.store.pull(&raw.name(), &[]).await.unwrap().id, image.id());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_blobs_come_from_a_host_than_it_has_places() {
    let image = large(1);
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let registry = Registry::start().await;
    let place = Place::with(|config| config.max_parallel_per_host = 2).await;
    let images: Vec<_> = (1..=4).map(large).collect();
    for (n, image) in images.iter().enumerate() {
        registry.push(&format!("a{n}:v1"), image);
        registry.fault(&image.digest(0), super::registry::Fault::Held(Arc::clone(&gate)));
    }
    let pulls: Vec<_> = (0..4)
        .map(|n| {
            let (store, name) = (Arc::clone(&place.store), registry.name(&format!("a{n}:v1")));
            tokio::spawn(async move { store.pull(&name, &[]).await })
        })
        .collect();
    let begun = || images.iter().map(|i| registry.requests(&i.digest(0)).len()).sum::<usize>();
    eventually(|| std::future::ready(begun() == 2)).await;
    // All others have their config and wait for a place.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(begun(), 2);
    gate.add_permits(4);
    for pull in pulls {
        pull.await.unwrap().unwrap();
    }
    assert_ne!(image.id(), images[1].id());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_is_not_taken_gives_its_place_away() {
    let image = large(1);
    let raw = Raw::start(&image, |_| None).await;
    let config = Config { max_parallel_per_host: 1, ..Config::default() };
    let (client, reference) = (Client::new(&config).unwrap(), Reference::parse(&raw.name()).unwrap());
    let session = client.session(&reference, &[]).await.unwrap();
    let (_, layer) = image.blobs();
    let blob = Descriptor {
        media_type: String::new(),
        digest: image.digest(0).parse().unwrap(),
        size: layer.len() as u64,
    };
    let take = async |mut pieces: mpsc::Receiver<Piece>| {
        let mut got = 0;
        while let Some(Piece::Bytes(piece)) = pieces.recv().await {
            got += piece.len();
        }
        got
    };
    let (first, second) = (mpsc::channel(1), mpsc::channel(1));
    // The first one is taken only when the second one is there.
    let there = Notify::new();
    let taken = async {
        there.notified().await;
        take(first.1).await
    };
    let other = async {
        let got = take(second.1).await;
        there.notify_one();
        got
    };
    let (mut one, mut two) = (Served::default(), Served::default());
    let (a, b, first, second) = futures::join!(
        download(&session, &blob, "first", first.0, &mut one),
        download(&session, &blob, "second", second.0, &mut two),
        taken,
        other
    );
    a.unwrap();
    b.unwrap();
    assert_eq!((first, second), (layer.len(), layer.len()));
}
