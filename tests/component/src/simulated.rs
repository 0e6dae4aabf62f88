//! A simulated cluster of two hosts without LXC, engines on its first host, and guests of somebody else.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use moxlet_ids::{SandboxId, Vmid};
use moxlet_pve::{Client, Endpoint, Observed, Trust};
use moxlet_pve_sim::{Config, Simulator, config};
use moxlet_sandbox::{
    IdMap, Limits, Nic, NicAddress, SandboxSpec,
    cgroup::Numbers,
    pve::{
        PveConfig, PveEngine, VmidRange,
        fake::{self, FileInits, FileVolumes},
    },
};
use moxlet_tests_pve::schema::Schema;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// The first VMID of pods.
pub const FIRST: u32 = 1_000_000;
/// The token's secret.
pub const SECRET: &str = "00000000-0000-4000-8000-000000000000";

/// Where everything lies; outlives simulators and engines.
pub struct Place {
    /// The directory below which all is.
    pub dir: PathBuf,
}

/// Reads all files below a directory; what goes meanwhile is not there.
fn contents(dir: &Path, into: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            contents(&entry.path(), into);
        } else if let Ok(bytes) = fs::read(entry.path()) {
            into.insert(entry.path(), bytes);
        }
    }
}

impl Place {
    /// All below this directory.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// How the simulator is set up; a task takes at least so many milliseconds.
    #[must_use]
    pub fn sim_config(&self, task_ms: u64) -> Config {
        let host = |name: &str| config::Host {
            name: name.into(),
            listen: Some(([127, 0, 0, 1], 0).into()),
            ..config::Host::default()
        };
        Config {
            state_dir: self.state(),
            admin: Some(([127, 0, 0, 1], 0).into()),
            hosts: vec![host("pve1"), host("pve2")],
            tokens: vec![config::Token {
                id: "moxlet@pve!sim".into(),
                secret: Some(SECRET.into()),
                privsep: false,
                file: None,
            }],
            behaviour: config::Behaviour {
                resources_ms: 0,
                task_ms,
                lock_wait_ms: 500,
                auth_delay_ms: 0,
                ..config::Behaviour::default()
            },
            ..Config::default()
        }
    }

    /// The simulator's state.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// The engine's own directory.
    #[must_use]
    pub fn engine_dir(&self) -> PathBuf {
        self.dir.join("engine")
    }

    /// `/etc/pve` as the first host sees it.
    #[must_use]
    pub fn etc_pve(&self) -> PathBuf {
        self.state().join("hosts/pve1/etc/pve")
    }

    /// A CT's configuration.
    #[must_use]
    pub fn conf(&self, vmid: u32) -> PathBuf {
        self.state().join(format!("etc/pve/nodes/pve1/lxc/{vmid}.conf"))
    }

    /// A CT's root volume.
    #[must_use]
    pub fn volume(&self, vmid: u32) -> PathBuf {
        self.state().join(format!("volumes/pve1/local-zfs/subvol-{vmid}-disk-0"))
    }

    /// Starts the simulator; a task takes at least so many milliseconds.
    pub async fn simulate(&self, task_ms: u64) -> Simulator {
        Simulator::start(self.sim_config(task_ms)).await.unwrap()
    }

    /// An engine whose API is at this address.
    pub fn engine(&self, url: &str, last: u32, calls: &Calls) -> PveEngine {
        self.engine_of(self.pve_config(last), self.client(url, calls))
    }

    /// How an engine is set up whose last VMID is this one.
    #[must_use]
    pub fn pve_config(&self, last: u32) -> PveConfig {
        PveConfig {
            dir: self.engine_dir(),
            config_dir: self.etc_pve(),
            lock_dir: self.state().join("run/lock/lxc"),
            node: "pve1".parse().unwrap(),
            storage: "local-zfs".parse().unwrap(),
            range: VmidRange::new(Vmid::new(FIRST).unwrap(), Vmid::new(last).unwrap()).unwrap(),
            protection: false,
            pool: None,
            memory_bytes: 8 << 30,
            cores: 4,
            start_timeout: Duration::from_secs(60),
        }
    }

    /// An engine of this configuration with this client.
    #[must_use]
    pub fn engine_of(&self, config: PveConfig, client: Client) -> PveEngine {
        let numbers = Numbers::default();
        let volumes =
            FileVolumes::open(&self.state().join("volumes/pve1/local-zfs"), &self.dir.join("owners"))
                .unwrap();
        let inits = FileInits::new(&self.state().join("run/ct"), config.node.clone(), numbers.clone());
        PveEngine::new(config, client, Arc::new(volumes), Arc::new(inits), numbers).unwrap()
    }

    /// A client of the API at this address, whose calls are noted and held against the official schema.
    #[must_use]
    pub fn client(&self, url: &str, calls: &Calls) -> Client {
        let ca = fs::read(self.state().join("tls/pve-root-ca.pem")).unwrap();
        let all = calls.clone();
        Client::builder(format!("moxlet@pve!sim={SECRET}").parse().unwrap())
            .endpoint(Endpoint::new(url, Trust::Authorities(ca)).unwrap())
            .observer(move |seen: &Observed<'_>| {
                let parameters: Vec<(String, String)> = seen
                    .parameters
                    .iter()
                    .map(|(key, value)| (key.clone().into_owned(), value.clone()))
                    .collect();
                let wrong = Schema::official().check_request(seen.method, seen.path, &parameters);
                assert!(
                    wrong.is_empty(),
                    "{} {} is not as the schema says: {wrong:?}",
                    seen.method,
                    seen.path
                );
                all.0.lock().unwrap().push(format!("{} {}", seen.method, seen.template));
            })
            .build()
            .unwrap()
    }

    /// Replaces a text in a file of the cluster's file system, as an administrator's program would.
    pub fn change(&self, file: &str, from: &str, to: &str) {
        let path = self.state().join("etc/pve").join(file);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{from} is not in {text}");
        fs::write(&path, text.replace(from, to)).unwrap();
    }

    /// A call that the client does not have, by curl; its answer.
    pub async fn call(&self, url: &str, method: &str, path: &str) -> Value {
        let curl = tokio::process::Command::new("curl")
            .args(["-sS", "--fail-with-body", "--noproxy", "*", "-X", method, "--cacert"])
            .arg(self.state().join("tls/pve-root-ca.pem"))
            .args(["-H", &format!("Authorization: PVEAPIToken=moxlet@pve!sim={SECRET}")])
            .arg(format!("{url}/api2/json{path}"))
            .output()
            .await
            .unwrap();
        assert!(curl.status.success(), "{method} {path}: {}", String::from_utf8_lossy(&curl.stderr));
        serde_json::from_slice(&curl.stdout).unwrap()
    }

    /// What tells the fake volumes that their storage has no room.
    pub fn set_full(&self, full: bool) {
        let flag = self.dir.join("owners").join(fake::FULL);
        if full { fs::write(flag, "").unwrap() } else { fs::remove_file(flag).unwrap() }
    }

    /// Guests of somebody else: outside the range, within it, and a clone of a pod's CT.
    pub fn add_foreigners(&self) {
        let include = self.engine_dir().join(format!("include/{FIRST}-u-1.conf"));
        let clone = format!(
            "arch: amd64\nhostname: clone\nmemory: 64\nrootfs: local-zfs:subvol-{}-disk-0,size=1G\ntags: moxlet\nlxc.include: {}\n",
            FIRST + 2,
            include.display()
        );
        for (vmid, text) in [
            (100, "#mine\narch: amd64\nhostname: db\nmemory: 512\nrootfs: local-zfs:subvol-100-disk-0,size=8G\n".to_owned()),
            (FIRST + 1, format!("arch: amd64\nhostname: other\nmemory: 64\nrootfs: local-zfs:subvol-{}-disk-0,size=1G\ntags: moxlet;ns-default\n", FIRST + 1)),
            (FIRST + 2, clone),
        ] {
            fs::write(self.conf(vmid), text).unwrap();
            fs::create_dir_all(self.volume(vmid).parent().unwrap()).unwrap();
            fs::write(self.volume(vmid), "1073741824").unwrap();
        }
        // A dataset whose CT is long gone.
        fs::write(self.volume(FIRST + 3), "5").unwrap();
    }

    /// All of configurations, volumes, marks, records and owners.
    pub fn snapshot(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut all = BTreeMap::new();
        for dir in ["state/etc/pve/nodes", "state/volumes", "state/run/ct", "engine", "owners"] {
            contents(&self.dir.join(dir), &mut all);
        }
        // Keys of the simulated hosts.
        all.retain(|path, _| !path.to_string_lossy().contains("pve-ssl"));
        all
    }
}

/// What was asked of the API.
#[derive(Clone, Default)]
pub struct Calls(Arc<Mutex<Vec<String>>>);

impl Calls {
    /// What was asked since the last time, as `GET /path/{template}`.
    #[allow(clippy::must_use_candidate)]
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// A call of the simulator's admin port; its answer.
pub async fn control(sim: &Simulator, method: &str, path: &str, body: &Value) -> Value {
    control_at(sim.admin().unwrap(), method, path, body).await
}

/// The same of a simulator that runs elsewhere.
pub async fn control_at(address: SocketAddr, method: &str, path: &str, body: &Value) -> Value {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let body = body.to_string();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    serde_json::from_str(body).unwrap()
}

/// The address of a pod of this name: no two on a host have the same.
fn address(name: &str) -> Ipv4Addr {
    if name == "web" {
        return Ipv4Addr::new(10, 10, 1, 7);
    }
    let hash =
        name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let [_, b, c, d] = (hash ^ (hash >> 24)).to_be_bytes();
    Ipv4Addr::new(10, b, c, d)
}

/// What is asked of a pod's CT.
#[must_use]
pub fn spec(name: &str) -> SandboxSpec {
    SandboxSpec {
        id: SandboxId::random(),
        pod_namespace: "default".into(),
        pod_name: name.into(),
        pod_uid: format!("uid-of-{name}").parse().unwrap(),
        attempt: 0,
        hostname: name.into(),
        map: IdMap::default(),
        shared_dir: "/var/lib/moxlet/pods/x".into(),
        // It runs nothing but the hook.
        init_binary: crate::repository().join("tests/component/check-ct"),
        init_args: vec!["--grace".into(), "30".into()],
        limits: Limits { memory_bytes: Some(64 << 20), cpu_quota_us: Some(50_000), ..Limits::default() },
        sysctls: BTreeMap::new(),
        stop_grace: Duration::from_secs(30),
        nics: vec![Nic {
            name: "eth0".into(),
            bridge: "vmbr0".into(),
            mac: None,
            ipv4: Some(NicAddress::Static {
                address: address(name),
                prefix: 16,
                gateway: Some(Ipv4Addr::new(10, 10, 0, 1)),
            }),
            ipv6: None,
            mtu: None,
            vlan: None,
            firewall: false,
        }],
    }
}
