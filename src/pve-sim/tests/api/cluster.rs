//! A simulator in this process, and a client that holds every request and answer against the official schema.

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use moxlet_pve_sim::{
    Config, Simulator,
    config::{Acl, Host, Token},
};
use moxlet_tests_pve::schema::Schema;
use reqwest::{Client, Method};
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};

/// Longer than anything here takes, even on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
pub const TEMPLATE: &str = "local:vztmpl/debian-13-standard_13.1-1_amd64.tar.zst";
/// A token with all rights.
pub const ADMIN: &str = "moxlet@pve!sim";
/// The least that a CT's config needs here.
pub const CONF: &str = "arch: amd64\nfeatures: nesting=1\nhostname: web\nmemory: 64\nostype: unmanaged\n\
    rootfs: local-zfs:subvol-100-disk-0,size=1G\nswap: 0\nunprivileged: 1\n";

pub struct Cluster {
    pub simulator: Simulator,
    pub dir: tempfile::TempDir,
    pub client: Client,
}

pub struct Answer {
    pub status: u16,
    pub reason: String,
    pub closes: bool,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap()
    }

    pub fn data(&self) -> Value {
        assert_eq!(self.status, 200, "{} {}", self.reason, self.text);
        self.json()["data"].clone()
    }

    /// The message, which is also the reason phrase.
    pub fn refused(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{} {}", self.reason, self.text);
        let message = self.json()["message"].as_str().unwrap().to_owned();
        assert_eq!(message.lines().next().unwrap(), self.reason);
        message.trim_end().to_owned()
    }

    /// The reason of one refused parameter.
    pub fn field(&self, name: &str) -> String {
        assert_eq!(self.refused(400), "Parameter verification failed.");
        self.json()["errors"][name].as_str().unwrap_or_else(|| panic!("{name}: {}", self.text)).to_owned()
    }
}

fn secret(token: &str) -> String {
    format!("secret-of-{}", token.replace(['@', '!'], "-"))
}

pub fn config(dir: &std::path::Path, hosts: usize) -> Config {
    let token = |id: &str, privsep| Token { id: id.into(), secret: Some(secret(id)), privsep, file: None };
    let acl = |path: &str, who: &str, role: &str| Acl {
        path: path.into(),
        who: who.into(),
        role: role.into(),
        propagate: true,
    };
    let mut config = Config {
        state_dir: dir.to_path_buf(),
        admin: Some(([127, 0, 0, 1], 0).into()),
        hosts: (1..=hosts)
            .map(|n| Host {
                name: format!("pve{n}"),
                listen: Some(([127, 0, 0, 1], 0).into()),
                ..Host::default()
            })
            .collect(),
        users: vec!["moxlet@pve".into(), "auditor@pve".into(), "vmadmin@pve".into()],
        tokens: vec![
            token(ADMIN, false),
            token("moxlet@pve!sep", true),
            token("root@pam!all", false),
            token("auditor@pve!tok", false),
            token("vmadmin@pve!tok", false),
        ],
        acl: vec![
            acl("/", "moxlet@pve", "Administrator"),
            acl("/vms/100", "moxlet@pve!sep", "PVEVMUser"),
            acl("/vms", "auditor@pve", "PVEAuditor"),
            acl("/vms", "vmadmin@pve", "PVEVMAdmin"),
        ],
        ..Config::default()
    };
    config.behaviour.auth_delay_ms = 50;
    config.behaviour.resources_ms = 0;
    config.behaviour.lock_wait_ms = 300;
    config
}

impl Cluster {
    pub async fn start(hosts: usize) -> Self {
        Self::with(hosts, |_| {}).await
    }

    pub async fn with(hosts: usize, change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path(), hosts);
        change(&mut config);
        let simulator = Simulator::start(config).await.unwrap();
        let client = client(&std::fs::read(simulator.ca_file()).unwrap());
        Self { simulator, dir, client }
    }

    /// Ends the simulator and starts it anew on the same state.
    pub async fn restart(self, hosts: usize) -> Self {
        let Self { simulator, dir, .. } = self;
        simulator.stop().await;
        let simulator = Simulator::start(config(dir.path(), hosts)).await.unwrap();
        let client = client(&std::fs::read(simulator.ca_file()).unwrap());
        Self { simulator, dir, client }
    }

    pub fn url(&self, host: usize) -> &str {
        &self.simulator.hosts()[host].url
    }

    /// A bare TLS connection to a host.
    pub async fn connect(&self, host: usize) -> tokio_rustls::client::TlsStream<tokio::net::TcpStream> {
        let ca = std::fs::read(self.simulator.ca_file()).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(rustls_pki_types::CertificateDer::from_pem_slice(&ca).unwrap()).unwrap();
        let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let address = self.url(host).strip_prefix("https://").unwrap().to_owned();
        let stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        let name = std::net::IpAddr::from([127, 0, 0, 1]).into();
        tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
    }

    /// A call by a token at a host; an answer 200 is held against the schema.
    pub async fn call_at(
        &self,
        host: usize,
        token: &str,
        method: &str,
        path: &str,
        params: &[(&str, &str)],
    ) -> Answer {
        let verb: Method = method.parse().unwrap();
        let encoded = encode(params);
        let in_query = matches!(method, "GET" | "DELETE");
        let mut url = format!("{}/api2/json{path}", self.url(host));
        if in_query && !params.is_empty() {
            url = format!("{url}?{encoded}");
        }
        let mut request = self
            .client
            .request(verb, url)
            .header("Authorization", format!("PVEAPIToken={token}={}", secret(token)));
        if !in_query {
            request = request.header("Content-Type", "application/x-www-form-urlencoded").body(encoded);
        }
        let answer = read(request.send().await.unwrap()).await;
        if answer.status == 200 {
            let owned: Vec<(String, String)> =
                params.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
            let schema = Schema::official();
            let wrong = schema.check_request(method, path, &owned);
            assert!(wrong.is_empty(), "{method} {path} was taken and is against the schema: {wrong:?}");
            let wrong = schema.check_answer(method, path, &answer.json()["data"]);
            assert!(
                wrong.is_empty(),
                "{method} {path} answers against the schema: {wrong:?}\n{}",
                answer.text
            );
        }
        answer
    }

    pub async fn call(&self, method: &str, path: &str, params: &[(&str, &str)]) -> Answer {
        self.call_at(0, ADMIN, method, path, params).await
    }

    pub async fn call_as(&self, token: &str, method: &str, path: &str, params: &[(&str, &str)]) -> Answer {
        self.call_at(0, token, method, path, params).await
    }

    /// Waits for a task and returns how it ended.
    pub async fn ended(&self, upid: &Value) -> String {
        let upid = upid.as_str().unwrap();
        let node = upid.split(':').nth(1).unwrap();
        let path = format!("/nodes/{node}/tasks/{}/status", percent(upid));
        let since = Instant::now();
        loop {
            let status = self.call("GET", &path, &[]).await.data();
            if status["status"] == "stopped" {
                return status["exitstatus"].as_str().unwrap().to_owned();
            }
            assert!(since.elapsed() < LIMIT, "the task does not end: {status}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Does a call that is a task, and the task ends well.
    pub async fn done(&self, method: &str, path: &str, params: &[(&str, &str)]) {
        let upid = self.call(method, path, params).await.data();
        assert_eq!(self.ended(&upid).await, "OK", "{method} {path}");
    }

    /// Writes a CT's config as another program does.
    pub fn write_conf(&self, node: &str, vmid: u32, text: &str) {
        std::fs::write(self.conf(node, vmid), text).unwrap();
    }

    pub fn conf(&self, node: &str, vmid: u32) -> PathBuf {
        self.simulator.etc_pve().join(format!("nodes/{node}/lxc/{vmid}.conf"))
    }

    pub fn read_conf(&self, node: &str, vmid: u32) -> String {
        std::fs::read_to_string(self.conf(node, vmid)).unwrap()
    }

    /// The admin port.
    pub async fn admin(&self, method: &str, path: &str, body: Value) -> Value {
        let url = format!("http://{}{path}", self.simulator.admin().unwrap());
        let request =
            self.client.request(method.parse().unwrap(), url).header("Content-Type", "application/json");
        let answer = request.body(body.to_string()).send().await.unwrap();
        let (status, text) = (answer.status(), answer.text().await.unwrap());
        assert!(status.is_success(), "{method} {path}: {text}");
        serde_json::from_str(&text).unwrap()
    }

    pub async fn count(&self, method: &str, template: &str) -> u64 {
        let counts = self.admin("GET", "/counts", json!({})).await;
        counts["by"][format!("{method} {template} {ADMIN}")]["count"].as_u64().unwrap_or(0)
    }
}

pub fn client(ca: &[u8]) -> Client {
    static PROVIDER: OnceLock<()> = OnceLock::new();
    PROVIDER.get_or_init(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    let ca = reqwest::Certificate::from_pem(ca).unwrap();
    Client::builder().tls_certs_only([ca]).timeout(LIMIT).build().unwrap()
}

pub async fn read(response: reqwest::Response) -> Answer {
    let status = response.status();
    let reason = match response.extensions().get::<hyper::ext::ReasonPhrase>() {
        Some(phrase) => String::from_utf8(phrase.as_bytes().to_vec()).unwrap(),
        None => status.canonical_reason().unwrap_or("").to_owned(),
    };
    let closes = response.headers().get("connection").is_some_and(|v| v == "close");
    let text = response.text().await.unwrap();
    Answer { status: status.as_u16(), reason, closes, text }
}

pub fn percent(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}

pub fn encode(params: &[(&str, &str)]) -> String {
    form_urlencoded::Serializer::new(String::new()).extend_pairs(params).finish()
}
