//! A simulated cluster of two hosts, guests of somebody else on it, and an engine on the first host.

use std::{
    collections::BTreeMap,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use moxlet_ids::{SandboxId, Vmid};
use moxlet_pve::{Client, Endpoint, NodeName, Observed, Trust};
use moxlet_pve_sim::{Config, Simulator, config};
use moxlet_sandbox::{
    Engine, IdMap, Limits, Nic, NicAddress, SandboxSpec,
    cgroup::Numbers,
    pve::{
        PveConfig, PveEngine, VmidRange,
        fake::{FileInits, FileVolumes},
    },
};
use serde_json::{Value, json};

pub(crate) const FIRST: u32 = 1_000_000;
const SECRET: &str = "00000000-0000-4000-8000-000000000000";

/// Where everything lies; outlives simulators and engines.
pub(crate) struct Place {
    pub(crate) dir: PathBuf,
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
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    fn sim_config(&self, task_ms: u64) -> Config {
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
                ..config::Behaviour::default()
            },
            ..Config::default()
        }
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    pub(crate) fn engine_dir(&self) -> PathBuf {
        self.dir.join("engine")
    }

    pub(crate) fn etc_pve(&self) -> PathBuf {
        self.state().join("hosts/pve1/etc/pve")
    }

    pub(crate) fn conf(&self, vmid: u32) -> PathBuf {
        self.state().join(format!("etc/pve/nodes/pve1/lxc/{vmid}.conf"))
    }

    pub(crate) fn volume(&self, vmid: u32) -> PathBuf {
        self.state().join(format!("volumes/pve1/local-zfs/subvol-{vmid}-disk-0"))
    }

    pub(crate) async fn simulate(&self, task_ms: u64) -> Simulator {
        Simulator::start(self.sim_config(task_ms)).await.unwrap()
    }

    /// An engine whose API is at this address.
    pub(crate) fn engine(&self, url: &str, last: u32, calls: &Calls) -> PveEngine {
        let node: NodeName = "pve1".parse().unwrap();
        let numbers = Numbers::default();
        let config = PveConfig {
            dir: self.engine_dir(),
            config_dir: self.etc_pve(),
            lock_dir: self.state().join("run/lock/lxc"),
            node: node.clone(),
            storage: "local-zfs".parse().unwrap(),
            range: VmidRange::new(Vmid::new(FIRST).unwrap(), Vmid::new(last).unwrap()).unwrap(),
            protection: false,
            memory_bytes: 8 << 30,
            cores: 4,
            start_timeout: Duration::from_secs(60),
        };
        let volumes =
            FileVolumes::open(&self.state().join("volumes/pve1/local-zfs"), &self.dir.join("owners"))
                .unwrap();
        let inits = FileInits::new(&self.state().join("run/ct"), node, numbers.clone());
        let client = self.client(url, calls);
        PveEngine::new(config, client, Arc::new(volumes), Arc::new(inits), numbers).unwrap()
    }

    pub(crate) fn client(&self, url: &str, calls: &Calls) -> Client {
        let ca = fs::read(self.state().join("tls/pve-root-ca.pem")).unwrap();
        let all = calls.clone();
        Client::builder(format!("moxlet@pve!sim={SECRET}").parse().unwrap())
            .endpoint(Endpoint::new(url, Trust::Authorities(ca)).unwrap())
            .observer(move |seen: &Observed<'_>| {
                all.0.lock().unwrap().push(format!("{} {}", seen.method, seen.template));
            })
            .build()
            .unwrap()
    }

    /// Guests of somebody else: outside the range, within it, and a clone of a pod's CT.
    pub(crate) fn add_foreigners(&self) {
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
    pub(crate) fn snapshot(&self) -> BTreeMap<PathBuf, Vec<u8>> {
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
pub(crate) struct Calls(Arc<Mutex<Vec<String>>>);

impl Calls {
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

pub(crate) struct World {
    pub(crate) place: Place,
    pub(crate) sim: Simulator,
    pub(crate) engine: PveEngine,
    pub(crate) calls: Calls,
    /// Somebody else at the API.
    pub(crate) admin: Client,
    pub(crate) node: NodeName,
    before: BTreeMap<PathBuf, Vec<u8>>,
    _dir: tempfile::TempDir,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(FIRST + 99, 0).await
    }

    pub(crate) async fn with(last: u32, task_ms: u64) -> Self {
        let dir = tempfile::Builder::new().prefix("moxlet-pve-").tempdir().unwrap();
        let place = Place::new(dir.path());
        let sim = place.simulate(task_ms).await;
        place.add_foreigners();
        let calls = Calls::default();
        let url = &sim.hosts()[0].url;
        let engine = place.engine(url, last, &calls);
        let admin = place.client(url, &Calls::default());
        let before = place.snapshot();
        Self { place, engine, calls, admin, before, node: "pve1".parse().unwrap(), sim, _dir: dir }
    }

    /// Nothing but what was there before is there, to the last bit.
    pub(crate) fn assert_as_before(&self) {
        let now = self.place.snapshot();
        let show = |all: &BTreeMap<PathBuf, Vec<u8>>| {
            all.keys().map(|p| p.display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(show(&now), show(&self.before));
        assert_eq!(now, self.before);
    }

    /// What was there before is there, to the last bit; there may be more.
    pub(crate) fn assert_foreigners_untouched(&self) {
        let now = self.place.snapshot();
        for (path, bytes) in &self.before {
            assert_eq!(now.get(path), Some(bytes), "{}", path.display());
        }
    }

    pub(crate) fn vmid(&self, id: &SandboxId) -> u32 {
        self.engine.vmid(id).unwrap().get()
    }

    pub(crate) fn conf(&self, id: &SandboxId) -> String {
        fs::read_to_string(self.place.conf(self.vmid(id))).unwrap()
    }

    /// A call of the admin port.
    pub(crate) async fn control(&self, method: &str, path: &str, body: Value) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let address = self.sim.admin().unwrap();
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let body = body.to_string();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    pub(crate) async fn fault(&self, kind: &str, rule: Value) {
        self.control("POST", &format!("/faults/{kind}"), rule).await;
    }

    pub(crate) async fn no_faults(&self) {
        self.control("DELETE", "/faults", json!({})).await;
    }

    /// A pod's CT, running.
    pub(crate) async fn running(&self, name: &str) -> SandboxId {
        let spec = spec(name);
        self.engine.create(&spec).await.unwrap();
        self.engine.start(&spec.id).await.unwrap();
        self.engine.look().await.unwrap();
        spec.id
    }

    /// The reasons of what is seen.
    pub(crate) async fn seen(&self) -> Vec<&'static str> {
        self.engine.look().await.unwrap().into_iter().map(|o| o.reason).collect()
    }
}

pub(crate) fn spec(name: &str) -> SandboxSpec {
    SandboxSpec {
        id: SandboxId::random(),
        pod_namespace: "default".into(),
        pod_name: name.into(),
        pod_uid: format!("uid-of-{name}").parse().unwrap(),
        attempt: 0,
        hostname: name.into(),
        map: IdMap::default(),
        shared_dir: "/var/lib/moxlet/pods/x".into(),
        init_binary: "/var/lib/moxlet/init/x/moxlet-init".into(),
        init_args: vec!["--grace".into(), "30".into()],
        limits: Limits { memory_bytes: Some(64 << 20), cpu_quota_us: Some(50_000), ..Limits::default() },
        sysctls: BTreeMap::new(),
        stop_grace: Duration::from_secs(30),
        nics: vec![Nic {
            name: "eth0".into(),
            bridge: "vmbr0".into(),
            mac: None,
            ipv4: Some(NicAddress::Static {
                address: Ipv4Addr::new(10, 10, 1, 7),
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
