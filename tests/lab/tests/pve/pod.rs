//! What a pod is on the host, what kubectl does with it, and that nothing of it stays.

use moxlet_tests_e2e::{LONG, Namespace, busybox, container};
use moxlet_tests_lab::Guest;
use serde_json::{Value, json};

use crate::pod::numbers::{PERIOD, SUM_MIB};

/// An idle container that ends when it is told to.
pub(crate) const IDLE: &str = "trap 'exit 0' TERM; echo up; while true; do sleep 1 & wait $!; done";

mod numbers {
    pub(super) const PERIOD: u64 = 100_000;
    /// 64 and 32 MiB for the containers, 16 MiB for the pod, and as much more that memory.high is not below.
    pub(super) const SUM_MIB: u64 = 113;
}

fn limited(name: &str, script: &str, memory: &str, cpu: &str) -> Value {
    container(name, script, json!({"resources": {"limits": {"memory": memory, "cpu": cpu}}}))
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned)
}

/// The host without pods, once its image is there and all that is made once is made.
pub(crate) fn warm() -> Guest {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let ns = Namespace::new("warm");
        assert_eq!(ns.output_of("first", json!({"containers": [busybox("echo done")]})), "done\n");
        ns.kubectl(&["delete", "pod", "first"]).ok();
    });
    let guest = Guest::get();
    guest.without_pods();
    guest
}

/// What Proxmox VE's API shows of the CT.
fn assert_shown(guest: &Guest, ns: &Namespace, vmid: u32) {
    let pod = ns.get("web");
    let ip = text(&pod["status"]["podIP"]);
    let shown = guest.api("GET", &format!("/nodes/pve1/lxc/{vmid}/config"));
    let grace = pod["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap();
    for (key, wanted) in [
        ("hostname", "web".to_owned()),
        ("tags", format!("moxlet;ns-{}", ns.name)),
        ("cores", "1".to_owned()),
        ("cpulimit", "0.5".to_owned()),
        ("memory", SUM_MIB.to_string()),
        ("swap", "0".to_owned()),
        ("onboot", "0".to_owned()),
        ("startup", format!("down={}", grace + 10)),
        ("unprivileged", "1".to_owned()),
        ("features", "nesting=1".to_owned()),
    ] {
        assert_eq!(text(&shown[key]), wanted, "{key} in {shown}");
    }
    let has = |key: &str, words: &[&str]| {
        let value = text(&shown[key]);
        assert!(words.iter().all(|w| value.contains(w)), "{key}: {value}");
    };
    let uid = text(&pod["metadata"]["uid"]);
    has("description", &[&format!("{}/web", ns.name), &uid, "`main`", "`side`"]);
    has("net0", &["name=eth0", "bridge=vmbr0", &format!("ip={ip}/16"), "gw=10.10.0.1", "host-managed=1"]);
    has("rootfs", &[&format!("local-zfs:subvol-{vmid}-disk-0"), "size="]);
    has("mp0", &["/pve/guard", "mp=/run/moxlet-guard", "ro=1"]);
    let status = guest.api("GET", &format!("/nodes/pve1/lxc/{vmid}/status/current"));
    assert_eq!(text(&status["status"]), "running");
}

/// The files that liblxc and the kernel have.
fn assert_real(guest: &Guest, ns: &Namespace, vmid: u32) {
    let info = guest.sh(&format!("lxc-info -n {vmid}"));
    assert!(info.lines().any(|l| l.starts_with("State:") && l.ends_with("RUNNING")), "{info}");
    let config = guest.sh(&format!("cat /var/lib/lxc/{vmid}/config"));
    let bytes = SUM_MIB << 20;
    for line in [
        format!("lxc.cgroup.dir.container = lxc/{vmid}"),
        "lxc.apparmor.profile = generated".to_owned(),
        format!("lxc.cgroup2.memory.max = {bytes}"),
        "lxc.idmap = u 0 100000 65536".to_owned(),
        format!("lxc.net.0.veth.pair = veth{vmid}i0"),
    ] {
        assert!(config.lines().any(|l| l == line), "{line} is not in\n{config}");
    }
    let of_ct = |file: &str| guest.sh(&format!("cat /sys/fs/cgroup/lxc/{vmid}/{file}"));
    assert_eq!(of_ct("memory.max"), bytes.to_string());
    assert_eq!(of_ct("memory.swap.max"), "0");
    assert_eq!(of_ct("cpu.max"), format!("{} {PERIOD}", PERIOD / 2));
    assert_eq!(of_ct("cpuset.cpus.effective"), "0");
    let id = text(&ns.get("web")["status"]["containerStatuses"][0]["containerID"]);
    let id = id.rsplit('/').next().unwrap();
    let dir = guest.sh(&format!("find /sys/fs/cgroup/lxc/{vmid} -type d -name '*{id}*' | head -n 1"));
    assert_eq!(guest.sh(&format!("cat {dir}/memory.max")), (64 << 20).to_string());
    assert_eq!(guest.sh(&format!("cat {dir}/cpu.max")), format!("30000 {PERIOD}"));
    let label = guest.sh(&format!("cat /proc/$(head -n 1 {dir}/cgroup.procs)/attr/current"));
    assert!(label.contains(&format!("lxc-{vmid}_")) && label.ends_with("(enforce)"), "{label}");
    let mounted = guest.sh("awk '{ print $5 }' /proc/self/mountinfo");
    assert!(
        !mounted.contains(&format!("/var/lib/lxc/{vmid}")),
        "the CT's root is mounted for its monitor alone"
    );
}

#[test]
fn a_pod_is_a_ct_of_proxmox_ve_and_leaves_the_host_as_it_was() {
    let guest = warm();
    let before = guest.traces();
    let ns = Namespace::new("life");
    let containers = [limited("main", IDLE, "64Mi", "300m"), limited("side", IDLE, "32Mi", "200m")];
    ns.pod_with("web", json!({"containers": containers}));
    ns.wait_ready("web");
    let vmid = guest.vmid("web");
    assert!((1_000_000..=1_009_999).contains(&vmid));
    assert_shown(&guest, &ns, vmid);
    assert_real(&guest, &ns, vmid);

    assert_eq!(ns.kubectl(&["logs", "web", "-c", "main"]).ok(), "up\n");
    assert_eq!(ns.exec("web", "hostname; exit 3").code, 3);
    let file = std::env::temp_dir().join(format!("moxlet-lab-{}", std::process::id()));
    let bytes: Vec<u8> = (0..100_000_u32).map(|n| (n % 251) as u8).collect();
    std::fs::write(&file, &bytes).unwrap();
    let (here, there) = (file.to_str().unwrap(), "web:/tmp/file");
    ns.kubectl(&["cp", here, there, "-c", "main"]).ok();
    std::fs::remove_file(&file).unwrap();
    ns.kubectl(&["cp", there, here, "-c", "main"]).ok();
    assert_eq!(std::fs::read(&file).unwrap(), bytes);
    std::fs::remove_file(&file).unwrap();

    ns.kubectl(&["delete", "pod", "web"]).ok();
    assert_eq!(guest.cts(), []);
    guest.as_before(&before);
}

#[test]
fn a_memory_hog_is_oom_killed_and_its_neighbour_is_not() {
    let guest = warm();
    let before = guest.traces();
    let ns = Namespace::new("hog");
    let containers =
        [limited("hog", "exec tail /dev/zero", "24Mi", "500m"), limited("side", IDLE, "24Mi", "100m")];
    ns.pod_with("hog", json!({"restartPolicy": "Never", "containers": containers}));
    ns.until("hog", "OOMKilled", LONG, |pod| {
        let statuses = pod["status"]["containerStatuses"].as_array()?;
        let of = |name: &str| statuses.iter().find(|s| s["name"] == name);
        let ended = &of("hog")?["state"]["terminated"];
        let killed = ended["reason"] == "OOMKilled" && ended["exitCode"] == 137;
        (killed && of("side")?["state"]["running"].is_object()).then_some(())
    });
    ns.kubectl(&["delete", "pod", "hog"]).ok();
    guest.as_before(&before);
}

#[test]
fn a_removal_that_ended_at_lock_destroyed_leaves_nothing() {
    let guest = warm();
    let before = guest.traces();
    let ns = Namespace::new("destroyed");
    ns.running("web", IDLE);
    let vmid = guest.vmid("web");
    // Proxmox VE takes a CT's permissions away at last; where it cannot, the CT stays with this lock, without a root.
    guest.control("PUT", "/locks/user.cfg", &json!({"held": true}));
    ns.kubectl(&["delete", "pod", "web"]).ok();
    let tasks = guest.api("GET", &format!("/nodes/pve1/tasks?vmid={vmid}&typefilter=vzdestroy"));
    guest.control("PUT", "/locks/user.cfg", &json!({"held": false}));
    let last = text(&tasks[0]["status"]);
    assert!(last.contains("user_cfg"), "{last}");
    guest.as_before(&before);
}
