//! Pulls from real registries, and pushes to them: TLS by a private CA, client certificates, passwords, and a mirror that pulls through.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};

use moxlet_image::{Compression, Config, Credentials, Error, ImageStore};
use moxlet_storage::{Driver, OverlayDriver};
use moxlet_tests_component::{registry, wait::until};

const USER: &str = "moxlet";
const PASSWORD: &str = "of-the-test";
/// The line of an htpasswd file for the two: bcrypt, which is all that docker-registry takes.
const HTPASSWD: &str = "moxlet:$2b$04$e71CzmrdLs7cgMvDwQKxHe8BfiPnZrcAzJSJnezUKYqt/4MBbGhz.\n";

/// docker-registry on loopback, ended with us.
struct Served {
    child: Child,
    address: String,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Served {
    /// One whose data lie in a directory; `http` and `rest` go into its configuration.
    async fn start(dir: &Path, http: &str, rest: &str) -> Self {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        std::fs::create_dir_all(dir).unwrap();
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: \"{address}\"{http}}}\n{rest}",
            dir.join("data").display()
        );
        let config = dir.join("config.yml");
        std::fs::write(&config, text).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let served = Self { child, address };
        until("the registry to listen", async || {
            TcpStream::connect(&served.address).map(drop).map_err(|e| e.to_string())
        })
        .await;
        served
    }

    /// With TLS, a password, and only for those who have a certificate of the CA.
    async fn secured(dir: &Path) -> Self {
        let at = |name: &str| dir.join(name).display().to_string();
        std::fs::write(at("htpasswd"), HTPASSWD).unwrap();
        let tls = format!(
            ", tls: {{certificate: {}, key: {}, clientcas: [{}]}}",
            at("server.cert"),
            at("server.key"),
            at("ca.crt")
        );
        let auth = format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", at("htpasswd"));
        Self::start(&dir.join("secured"), &tls, &auth).await
    }

    fn name(&self) -> String {
        format!("{}/demo/busybox:1", self.address)
    }

    /// The name of its directory of settings.
    fn settings(&self) -> String {
        self.address.replace(':', "_") + "_"
    }
}

fn run(program: &str, arguments: &[&str]) {
    let out = Command::new(program).args(arguments).output().unwrap();
    assert!(out.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// A CA, a server's certificate for 127.0.0.1 and a client's, in a directory.
fn make_certificates(dir: &Path) {
    let at = |name: &str| dir.join(name).display().to_string();
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
    let ca = [at("ca.key"), at("ca.crt")];
    let mut arguments = vec!["req", "-x509", "-subj", "/CN=test CA", "-keyout", &ca[0], "-out", &ca[1]];
    arguments.extend(key);
    run("openssl", &arguments);
    for (name, extension) in
        [("server", "subjectAltName=IP:127.0.0.1"), ("client", "extendedKeyUsage=clientAuth")]
    {
        let (secret, cert) = (at(&format!("{name}.key")), at(&format!("{name}.cert")));
        let subject = format!("/CN={name}");
        let mut arguments = vec!["req", "-x509", "-CA", &ca[1], "-CAkey", &ca[0], "-subj", &subject];
        arguments.extend(["-addext", "basicConstraints=critical,CA:FALSE", "-addext", extension]);
        arguments.extend(["-keyout", &secret, "-out", &cert]);
        arguments.extend(key);
        run("openssl", &arguments);
    }
}

struct Place {
    dir: tempfile::TempDir,
    store: Arc<ImageStore>,
}

impl Place {
    async fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("moxlet-registry-").tempdir().unwrap();
        std::fs::create_dir(dir.path().join("certs.d")).unwrap();
        let driver = Arc::new(OverlayDriver::open(&dir.path().join("driver")).await.unwrap());
        let config = Config {
            dir: dir.path().join("images"),
            registry_config_dir: Some(dir.path().join("certs.d")),
            docker_config: Some(dir.path().join("config.json")),
            ..Config::default()
        };
        let store = ImageStore::open(config, driver as Arc<dyn Driver>).await.unwrap();
        Self { dir, store }
    }

    /// A file of a registry's settings.
    fn settings(&self, registry: &str, name: &str) -> PathBuf {
        let dir = self.dir.path().join("certs.d").join(registry);
        std::fs::create_dir_all(&dir).unwrap();
        dir.join(name)
    }

    async fn failed(&self, name: &str, auths: &[Credentials]) -> Error {
        self.store.pull(name, auths).await.unwrap_err()
    }
}

fn user(password: &str) -> Credentials {
    Credentials { username: USER.to_owned(), password: password.to_owned(), ..Credentials::default() }
}

/// Copies busybox into a secured registry.
fn fill(served: &Served, certificates: &Path) {
    let (from, to) = (format!("docker://{}", registry::busybox()), format!("docker://{}", served.name()));
    let (certificates, login) = (certificates.display().to_string(), format!("{USER}:{PASSWORD}"));
    run(
        "skopeo",
        &[
            "copy",
            "-q",
            "--src-tls-verify=false",
            "--dest-cert-dir",
            &certificates,
            "--dest-creds",
            &login,
            &from,
            &to,
        ],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_wants_its_ca_a_client_certificate_and_a_password() {
    let certificates = tempfile::tempdir().unwrap();
    make_certificates(certificates.path());
    let served = Served::secured(certificates.path()).await;
    // skopeo shows each pair that it finds, and the server's is none for clients.
    let clients = tempfile::tempdir().unwrap();
    for name in ["ca.crt", "client.cert", "client.key"] {
        std::fs::copy(certificates.path().join(name), clients.path().join(name)).unwrap();
    }
    fill(&served, clients.path());
    let (place, name) = (Place::new().await, served.name());
    let hosts = place.settings(&served.settings(), "hosts.toml");
    let url = format!("server = \"https://{}\"\n", served.address);
    let ca = format!("ca = {:?}\n", certificates.path().join("ca.crt"));
    let pair = ["client.cert", "client.key"].map(|n| certificates.path().join(n));
    let client = format!("client = [{pair:?}]\n");

    for (text, said) in [
        (url.clone(), "UnknownIssuer"),
        (format!("{url}{ca}"), "ertificate"),
        (format!("{url}ca = \"missing.crt\"\n"), "missing.crt"),
        (format!("{url}ca = {:?}\n", pair[1]), "there is no certificate in it"),
    ] {
        std::fs::write(&hosts, &text).unwrap();
        let error = place.failed(&name, &[user(PASSWORD)]).await;
        assert!(matches!(error, Error::Unreachable { .. } | Error::Settings { .. }), "{text}: {error}");
        assert!(error.to_string().contains(said), "{text}: {error}");
    }
    std::fs::write(&hosts, format!("{url}{ca}{client}")).unwrap();
    for auths in [&[][..], &[user("wrong")]] {
        let error = place.failed(&name, auths).await;
        assert!(matches!(error, Error::Denied { .. }), "{error}");
    }
    let record = place.store.pull(&name, &[user("wrong"), user(PASSWORD)]).await.unwrap();
    assert_eq!(record.repo_tags, [name.as_str()]);

    let entry = format!(
        r#"{{"auths":{{"{}/demo":{{"username":"{USER}","password":"{PASSWORD}"}}}}}}"#,
        served.address
    );
    std::fs::write(place.dir.path().join("config.json"), entry).unwrap();
    let pems = pair.each_ref().map(|file| std::fs::read_to_string(file).unwrap()).concat();
    let both = place.settings(&served.settings(), "both.pem");
    std::fs::write(both, pems).unwrap();
    std::fs::write(&hosts, format!("{url}skip_verify = true\nclient = \"both.pem\"\n")).unwrap();
    place.store.pull(&name, &[]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pushed_over_tls_by_who_has_certificate_and_password() {
    let certificates = tempfile::tempdir().unwrap();
    make_certificates(certificates.path());
    let served = Served::secured(certificates.path()).await;
    let (place, target) = (Place::new().await, format!("{}/pushed/busybox:2", served.address));
    let pulled = place.store.pull(&registry::busybox(), &[]).await.unwrap();
    let push = async |auths: &[Credentials]| {
        place.store.push(&registry::busybox(), Some(&target), auths, Compression::default()).await
    };
    // Registries on loopback are spoken to without TLS unless the settings say otherwise.
    let hosts = place.settings(&served.settings(), "hosts.toml");
    std::fs::write(&hosts, format!("server = \"https://{}\"\n", served.address)).unwrap();
    let error = push(&[user(PASSWORD)]).await.unwrap_err();
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
    std::fs::remove_dir_all(hosts.parent().unwrap()).unwrap();
    for name in ["ca.crt", "client.cert", "client.key"] {
        std::fs::copy(certificates.path().join(name), place.settings(&served.address, name)).unwrap();
    }
    for auths in [&[][..], &[user("wrong")]] {
        push(auths).await.unwrap_err();
        let error = place.failed(&target, &[user(PASSWORD)]).await;
        assert!(matches!(error, Error::NotFound { .. }), "nothing is there: {error}");
    }
    let digest = push(&[user("wrong"), user(PASSWORD)]).await.unwrap();
    let elsewhere = Place::new().await;
    for name in ["ca.crt", "client.cert", "client.key"] {
        std::fs::copy(certificates.path().join(name), elsewhere.settings(&served.address, name)).unwrap();
    }
    let record = elsewhere.store.pull(&target, &[user(PASSWORD)]).await.unwrap();
    assert_eq!((record.id, record.layers), (pulled.id, pulled.layers));
    assert_eq!(record.repo_digests, [format!("{}/pushed/busybox@{digest}", served.address)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn dockers_certificate_files_serve_as_well() {
    let certificates = tempfile::tempdir().unwrap();
    make_certificates(certificates.path());
    let served = Served::secured(certificates.path()).await;
    let place = Place::new().await;
    for name in ["ca.crt", "client.cert", "client.key"] {
        let to = place.settings(&served.address, name);
        std::fs::copy(certificates.path().join(name), to).unwrap();
    }
    fill(&served, &place.dir.path().join("certs.d").join(&served.address));
    place.store.pull(&served.name(), &[user(PASSWORD)]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_self_signed_certificate_is_trusted_where_it_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    for (name, subject) in [("good", "IP:127.0.0.1"), ("other", "IP:127.0.0.2")] {
        let (key, cert) = (at(&format!("{name}.key")), at(&format!("{name}.crt")));
        let subject = format!("subjectAltName={subject}");
        let arguments =
            ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=registry"];
        let rest = ["-addext", &subject, "-keyout", &key, "-out", &cert];
        run("openssl", &[arguments.as_slice(), rest.as_slice()].concat());
    }
    let place = Place::new().await;
    for (name, said) in [("good", "not found"), ("other", "ertificate")] {
        let tls = format!(
            ", tls: {{certificate: {}, key: {}}}",
            at(&format!("{name}.crt")),
            at(&format!("{name}.key"))
        );
        let served = Served::start(&dir.path().join(name), &tls, "").await;
        let hosts = place.settings(&served.settings(), "hosts.toml");
        std::fs::write(&hosts, format!("server = \"https://{}\"\n", served.address)).unwrap();
        let error = place.failed(&served.name(), &[]).await;
        assert!(matches!(error, Error::Unreachable { .. }), "{name}: {error}");
        let ca = at(&format!("{name}.crt"));
        std::fs::write(&hosts, format!("server = \"https://{}\"\nca = {ca:?}\n", served.address)).unwrap();
        let error = place.failed(&served.name(), &[]).await;
        assert_eq!(matches!(error, Error::NotFound { .. }), name == "good", "{error}");
        assert!(error.to_string().contains(said), "{name}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_pulls_through_serves_the_registrys_images() {
    let place = Place::new().await;
    let upstream = registry::address();
    let dir = place.dir.path().join("mirror");
    let mirror = Served::start(&dir, "", &format!("proxy: {{remoteurl: \"http://{upstream}\"}}\n")).await;
    let hosts = place.settings("_default", "hosts.toml");
    // Whatever the registry, the mirror alone is asked.
    std::fs::write(&hosts, format!("server = \"http://{}\"\n", mirror.address)).unwrap();
    let record = place.store.pull("registry.invalid/demo/busybox:1", &[]).await.unwrap();
    assert_eq!(record.repo_tags, ["registry.invalid/demo/busybox:1"]);

    std::fs::write(&hosts, format!("[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n", mirror.address))
        .unwrap();
    let before = std::fs::read_dir(dir.join("data/docker/registry/v2/repositories/demo")).unwrap().count();
    let web = format!("{upstream}/demo/web:1");
    place.store.pull(&web, &[]).await.unwrap();
    let after = std::fs::read_dir(dir.join("data/docker/registry/v2/repositories/demo")).unwrap().count();
    assert_eq!((before, after), (1, 2), "the contents came through the mirror");
    drop(mirror);
    place.store.remove(&web).await.unwrap();
    place.store.pull(&web, &[]).await.unwrap();
}
