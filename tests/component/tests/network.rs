//! The CNI runner against the real plugins, in network namespaces that the tests make.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU8, Ordering},
    time::Duration,
};

use moxlet_ids::SandboxId;
use moxlet_network::{Cni, CniConfig, Error};
use moxlet_tests_component::{forwarding::Forwarding, wait::until};

/// A network namespace that lives as long as this.
struct Namespace(Child);

impl Namespace {
    async fn new() -> Self {
        let child =
            Command::new("unshare").args(["--net", "sleep", "1000"]).stdin(Stdio::null()).spawn().unwrap();
        let namespace = Self(child);
        let own = fs::read_link("/proc/self/ns/net").unwrap();
        until("a network namespace", async || match fs::read_link(namespace.path()) {
            Ok(other) if other != own => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
        namespace
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.0.id()))
    }

    /// Runs a command in it; whether it succeeds, and its output.
    fn run(&self, command: &str) -> (bool, String) {
        let net = format!("--net={}", self.path().display());
        let out = Command::new("nsenter").arg(net).args(command.split(' ')).output().unwrap();
        (out.status.success(), String::from_utf8(out.stdout).unwrap())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A network of a test's own.
struct Network {
    config: CniConfig,
    number: u8,
    _dir: tempfile::TempDir,
    _forwarding: Forwarding,
}

impl Network {
    fn new() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = tempfile::Builder::new().prefix("moxlet-network-").tempdir().unwrap();
        let config = CniConfig {
            conf_dir: dir.path().join("net.d"),
            bin_dirs: vec!["/usr/lib/cni".into(), "/opt/cni/bin".into()],
            cache_dir: dir.path().join("cache"),
            ipam_dir: dir.path().join("ipam"),
            pod_cidr: Some(format!("10.249.{number}.0/26")),
            bridge_name: format!("mxn{}n{number}", std::process::id()),
            network_name: "moxlet".into(),
            ip_masq: true,
            write_default: true,
            timeout: Duration::from_secs(20),
        };
        Self { config, number, _dir: dir, _forwarding: Forwarding::keep() }
    }

    async fn open(&self) -> Cni {
        Cni::new(self.config.clone()).await.unwrap()
    }

    /// The n-th of four ranges of this network.
    fn range(&self, n: u8) -> String {
        format!("10.249.{}.{}/26", self.number, n * 64)
    }

    fn is_in(&self, address: IpAddr, n: u8) -> bool {
        let IpAddr::V4(v4) = address else { return false };
        v4.octets()[2] == self.number && v4.octets()[3] / 64 == n
    }

    fn gateways(&self) -> BTreeSet<String> {
        let out = Command::new("ip")
            .args(["-o", "-4", "address", "show", "dev", &self.config.bridge_name])
            .output();
        let text = String::from_utf8(out.unwrap().stdout).unwrap();
        text.lines().filter_map(|l| l.split_whitespace().nth(3)).map(Into::into).collect()
    }

    fn gateway(&self, n: u8) -> String {
        format!("10.249.{}.{}/26", self.number, n * 64 + 1)
    }

    fn ports(&self) -> usize {
        let dir = Path::new("/sys/class/net").join(&self.config.bridge_name).join("brif");
        fs::read_dir(dir).map_or(0, Iterator::count)
    }
}

impl Drop for Network {
    /// By force: a test that failed has not removed it.
    fn drop(&mut self) {
        let quiet = |program: &str, args: &[&str]| {
            let _ = Command::new(program).args(args).stderr(Stdio::null()).status();
        };
        let bridge = &self.config.bridge_name;
        if Path::new("/sys/class/net").join(bridge).exists() {
            quiet("ip", &["link", "delete", bridge]);
        }
        quiet("nft", &["delete", "table", "ip", &format!("moxlet_{bridge}")]);
    }
}

fn tables() -> String {
    String::from_utf8(Command::new("nft").args(["list", "tables"]).output().unwrap().stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_is_attached_checked_and_detached_and_nothing_is_left() {
    let network = Network::new();
    let cni = network.open().await;
    cni.ready().await.unwrap();
    let (namespace, id) = (Namespace::new().await, SandboxId::random());
    let attached = cni.add(&id, &namespace.path(), "default", "web").await.unwrap();
    assert_eq!((attached.interface.as_str(), attached.ips.len()), ("eth0", 1));
    let (_, seen) = namespace.run("ip -o address show");
    assert!(seen.contains(&format!("{}/26", attached.ips[0])) && seen.contains("127.0.0.1/8"), "{seen}");
    let (_, link) = namespace.run("ip -o link show eth0");
    assert!(link.contains(attached.mac.as_deref().unwrap()), "{link}");
    let (_, route) = namespace.run("ip route show default");
    assert!(route.contains(network.gateway(0).trim_end_matches("/26")), "{route}");
    assert_eq!(fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap().trim(), "1");
    cni.check(&id, &namespace.path()).await.unwrap();
    let again = network.open().await;
    assert_eq!(again.attachment(&id).await.unwrap().unwrap().ips, attached.ips, "known from disk");
    assert_eq!(again.attached().await.unwrap(), std::slice::from_ref(&id));
    assert!(matches!(again.remove_bridge().await, Err(Error::Attached(_))));

    namespace.run("ip address flush dev eth0");
    assert!(cni.check(&id, &namespace.path()).await.is_err(), "somebody took its address away");
    cni.del(&id, Some(&namespace.path())).await.unwrap();
    cni.del(&id, Some(&namespace.path())).await.unwrap();
    assert!(matches!(
        cni.check(&id, &namespace.path()).await,
        Err(Error::NotAttached(_)) | Err(Error::Plugin { .. })
    ));
    assert!(!namespace.run("ip link show eth0").0);
    assert!(cni.attached().await.unwrap().is_empty());
    assert_eq!(network.ports(), 0);
    assert!(tables().contains(&format!("moxlet_{}", network.config.bridge_name)));
    cni.remove_bridge().await.unwrap();
    cni.remove_bridge().await.unwrap();
    assert!(!Path::new("/sys/class/net").join(&network.config.bridge_name).exists());
    assert!(!tables().contains(&format!("moxlet_{}", network.config.bridge_name)));
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_are_distinct_and_neighbours_reach_one_another() {
    let network = Network::new();
    let cni = network.open().await;
    let mut namespaces = Vec::new();
    for _ in 0..6 {
        namespaces.push((SandboxId::random(), Namespace::new().await));
    }
    let all = namespaces.iter().map(|(id, ns)| {
        let (cni, path) = (&cni, ns.path());
        async move { cni.add(id, &path, "default", "pod").await.unwrap().ips[0] }
    });
    let addresses = futures::future::join_all(all).await;
    assert_eq!(addresses.iter().collect::<BTreeSet<_>>().len(), 6, "{addresses:?}");
    for (_, namespace) in &namespaces[1..] {
        let (good, out) = namespace.run(&format!("busybox ping -c 1 -W 5 {}", addresses[0]));
        assert!(good, "{out}");
    }
    for (id, namespace) in &namespaces {
        cni.del(id, Some(&namespace.path())).await.unwrap();
    }
    assert_eq!(network.ports(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attachment_whose_namespace_is_gone_gives_its_address_back() {
    let network = Network::new();
    let cni = network.open().await;
    let (namespace, id) = (Namespace::new().await, SandboxId::random());
    let path = namespace.path();
    cni.add(&id, &path, "default", "web").await.unwrap();
    drop(namespace);
    until("the interface to go with its namespace", async || match network.ports() {
        0 => Ok(()),
        n => Err(n.to_string()),
    })
    .await;
    cni.del(&id, Some(&path)).await.unwrap();
    cni.del(&id, None).await.unwrap();
    assert!(cni.attached().await.unwrap().is_empty());
    cni.del(&SandboxId::random(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_allotment_without_a_record_is_found_and_released() {
    let network = Network::new();
    let cni = network.open().await;
    let (namespace, id) = (Namespace::new().await, SandboxId::random());
    cni.add(&id, &namespace.path(), "default", "web").await.unwrap();
    fs::remove_file(network.config.cache_dir.join(format!("{id}.json"))).unwrap();
    let cni = network.open().await;
    assert_eq!(cni.attached().await.unwrap(), std::slice::from_ref(&id));
    cni.del(&id, None).await.unwrap();
    assert!(cni.attached().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attachment_that_fails_leaves_nothing() {
    let network = Network::new();
    let cni = network.open().await;
    let id = SandboxId::random();
    let error = cni.add(&id, Path::new("/proc/1/no-such-namespace"), "default", "web").await.unwrap_err();
    assert!(error.to_string().contains(id.as_str()), "{error}");
    assert!(cni.attached().await.unwrap().is_empty());
    let namespace = Namespace::new().await;
    for (ns, name) in [("default", "a;CNI_X=1"), ("", "web")] {
        assert!(matches!(cni.add(&id, &namespace.path(), ns, name).await, Err(Error::Invalid { .. })));
    }
    assert_eq!(network.ports(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_that_changes_leaves_the_old_gateway_while_a_pod_has_an_address_of_it() {
    let network = Network::new();
    let cni = network.open().await;
    let (old, new) =
        ((SandboxId::random(), Namespace::new().await), (SandboxId::random(), Namespace::new().await));
    let first = cni.add(&old.0, &old.1.path(), "default", "old").await.unwrap().ips[0];
    assert!(network.is_in(first, 0));
    cni.set_pod_cidr(&network.range(1)).await.unwrap();
    cni.set_pod_cidr(&network.range(1)).await.unwrap();
    assert_eq!(network.gateways(), [network.gateway(0), network.gateway(1)].into());
    let second = cni.add(&new.0, &new.1.path(), "default", "new").await.unwrap().ips[0];
    assert!(network.is_in(second, 1), "{second}");
    assert!(old.1.run(&format!("busybox ping -c 1 -W 5 {}", network.gateway(0).trim_end_matches("/26"))).0);
    assert!(old.1.run(&format!("busybox ping -c 1 -W 5 {second}")).0, "the bridge is one network");

    // The range is remembered where the configuration names none.
    let unset = CniConfig { pod_cidr: None, ..network.config.clone() };
    let cni = Cni::new(unset).await.unwrap();
    assert_eq!(network.gateways(), [network.gateway(0), network.gateway(1)].into());
    cni.del(&old.0, Some(&old.1.path())).await.unwrap();
    cni.set_pod_cidr(&network.range(2)).await.unwrap();
    assert_eq!(network.gateways(), [network.gateway(1), network.gateway(2)].into());
    cni.del(&new.0, Some(&new.1.path())).await.unwrap();
    cni.remove_bridge().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_named() {
    let network = Network::new();
    let unset = CniConfig { pod_cidr: None, ..network.config.clone() };
    let cni = Cni::new(unset).await.unwrap();
    let error = cni.ready().await.unwrap_err();
    assert!(error.to_string().contains("range is not known"), "{error}");
    cni.set_pod_cidr(&network.range(0)).await.unwrap();
    cni.ready().await.unwrap();
    for bad in ["10.0.0.0", "10.0.0.0/31", "fd00::/64"] {
        assert!(cni.set_pod_cidr(bad).await.is_err(), "{bad}");
    }
    let nowhere = CniConfig { bin_dirs: vec!["/nowhere".into()], ..network.config.clone() };
    let error = Cni::new(nowhere).await.unwrap().ready().await.unwrap_err();
    assert!(error.to_string().contains("bridge") && error.to_string().contains("/nowhere"), "{error}");
    let theirs = CniConfig { write_default: false, ..network.config.clone() };
    fs::remove_file(network.config.conf_dir.join("10-moxlet.conflist")).unwrap();
    let error = Cni::new(theirs.clone()).await.unwrap().ready().await.unwrap_err();
    assert!(error.to_string().contains(".conflist"), "{error}");
    fs::write(network.config.conf_dir.join("20-theirs.conflist"), "{").unwrap();
    let error = Cni::new(theirs).await.unwrap().ready().await.unwrap_err();
    assert!(error.to_string().contains("20-theirs.conflist"), "{error}");
    cni.remove_bridge().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_of_the_admins_own_is_used_as_it_is() {
    let network = Network::new();
    fs::create_dir_all(&network.config.conf_dir).unwrap();
    let conflist = format!(
        r#"{{"cniVersion": "0.4.0", "name": "theirs", "plugins": [{{"type": "bridge", "bridge": "{}", "isGateway": true,
            "ipam": {{"type": "host-local", "subnet": "{}", "dataDir": "{}"}}}}]}}"#,
        network.config.bridge_name,
        network.range(3),
        network.config.ipam_dir.display()
    );
    fs::write(network.config.conf_dir.join("10-theirs.conflist"), conflist).unwrap();
    let cni =
        Cni::new(CniConfig { write_default: false, pod_cidr: None, ..network.config.clone() }).await.unwrap();
    cni.ready().await.unwrap();
    let (namespace, id) = (Namespace::new().await, SandboxId::random());
    let address = cni.add(&id, &namespace.path(), "default", "web").await.unwrap().ips[0];
    assert!(network.is_in(address, 3), "{address}");
    cni.check(&id, &namespace.path()).await.unwrap();
    cni.del(&id, Some(&namespace.path())).await.unwrap();
    assert_eq!(network.ports(), 0);
    let mut left = fs::read_dir(network.config.ipam_dir.join("theirs")).unwrap().flatten();
    assert!(!left.any(|e| e.file_name().to_string_lossy().parse::<IpAddr>().is_ok()));
}

/// Runs `ip`, which must succeed.
fn ip(args: &str) {
    assert!(Command::new("ip").args(args.split(' ')).status().unwrap().success(), "ip {args}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bridge_of_somebody_else_keeps_its_address_is_refused_by_name_and_never_removed() {
    let network = Network::new();
    let bridge = &network.config.bridge_name;
    ip(&format!("link add {bridge} type bridge"));
    ip(&format!("address add 192.0.2.77/24 dev {bridge}"));
    let error = Cni::new(network.config.clone()).await.unwrap_err();
    assert!(matches!(error, Error::ForeignBridge { .. }), "{error}");
    assert!(error.to_string().contains(bridge.as_str()), "{error}");
    moxlet_network::take_down(&network.config).await.unwrap();
    assert_eq!(network.gateways(), ["192.0.2.77/24".to_owned()].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bridge_of_somebody_else_with_the_pods_gateway_is_used_as_it_is() {
    let network = Network::new();
    let bridge = &network.config.bridge_name;
    ip(&format!("link add {bridge} type bridge"));
    ip(&format!("address add 192.0.2.77/24 dev {bridge}"));
    ip(&format!("address add {} dev {bridge}", network.gateway(0)));
    ip(&format!("link set {bridge} up"));
    let as_it_was = network.gateways();
    let cni = network.open().await;
    let (namespace, id) = (Namespace::new().await, SandboxId::random());
    let address = cni.add(&id, &namespace.path(), "default", "web").await.unwrap().ips[0];
    assert!(
        namespace.run(&format!("busybox ping -c 1 -W 5 {}", network.gateway(0).trim_end_matches("/26"))).0
    );
    assert!(network.is_in(address, 0));
    cni.del(&id, Some(&namespace.path())).await.unwrap();
    assert!(matches!(cni.set_pod_cidr(&network.range(1)).await, Err(Error::ForeignBridge { .. })));
    cni.remove_bridge().await.unwrap();
    assert_eq!(network.gateways(), as_it_was);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bridge_that_an_older_version_made_without_a_mark_is_ours() {
    let network = Network::new();
    let bridge = &network.config.bridge_name;
    let mac = format!("0a:58:0a:f9:{:02x}:01", network.number);
    ip(&format!("link add {bridge} address {mac} type bridge"));
    ip(&format!("address add {} dev {bridge}", network.gateway(0)));
    let cni = network.open().await;
    cni.set_pod_cidr(&network.range(1)).await.unwrap();
    assert_eq!(network.gateways(), [network.gateway(1)].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_that_the_hosts_firewall_has_flushed_and_a_lost_gateway_come_back() {
    let network = Network::new();
    let cni = network.open().await;
    assert!(!cni.restore().await.unwrap(), "nothing was missing");
    let table = format!("moxlet_{}", network.config.bridge_name);
    for command in [vec!["flush", "table", "ip", &table], vec!["delete", "table", "ip", &table]] {
        assert!(Command::new("nft").args(&command).status().unwrap().success());
        assert!(cni.restore().await.unwrap(), "{command:?}");
        let listed = Command::new("nft").args(["list", "table", "ip", &table]).output().unwrap();
        assert!(String::from_utf8_lossy(&listed.stdout).contains("masquerade"));
        assert!(!cni.restore().await.unwrap());
    }
    ip(&format!("address flush dev {}", network.config.bridge_name));
    cni.restore().await.unwrap();
    assert_eq!(network.gateways(), [network.gateway(0)].into());
    cni.remove_bridge().await.unwrap();
}
