//! What containers get of a request and an image: specs that OCI runtimes understand, as containerd makes them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;

use moxlet_cri::annotations::RUN_AS_NON_ROOT;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// A request before an image.
struct Case {
    config: v1::ContainerConfig,
    image: Value,
    mounts: Vec<ResolvedMount>,
    cgroup_v1: bool,
    root: TempDir,
}

impl Case {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        let passwd = "root:x:0:0:root:/root:/bin/sh\n# none\nbroken\nweb:x:1000:1001::/home/web:/bin/sh\n";
        std::fs::write(root.path().join("etc/passwd"), passwd).unwrap();
        let group = "root:x:0:\nweb:x:1001:\nmedia:x:2000:other,web\nbroken:x\nfar:x:70000:far\n";
        std::fs::write(root.path().join("etc/group"), group).unwrap();
        let mut case = Self {
            config: v1::ContainerConfig {
                metadata: Some(v1::ContainerMetadata { name: "web".into(), attempt: 0 }),
                ..v1::ContainerConfig::default()
            },
            image: json!({"Entrypoint": ["/entry"], "Cmd": ["serve"]}),
            mounts: Vec::new(),
            cgroup_v1: false,
            root,
        };
        case.security();
        case
    }

    fn security(&mut self) -> &mut v1::LinuxContainerSecurityContext {
        self.config.linux.get_or_insert_default().security_context.get_or_insert_default()
    }

    fn resources(&mut self) -> &mut v1::LinuxContainerResources {
        self.config.linux.get_or_insert_default().resources.get_or_insert_default()
    }

    fn user(mut self, user: &str) -> Self {
        self.image["User"] = json!(user);
        self
    }

    fn build(&self) -> Result<Value> {
        let image: ImageConfig = serde_json::from_value(json!({
            "architecture": "amd64", "os": "linux", "config": self.image,
            "rootfs": {"type": "layers", "diff_ids": []},
        }))
        .unwrap();
        let spec = build(&SpecInput {
            container_id: &ContainerId::random(),
            config: &self.config,
            sandbox: &v1::PodSandboxConfig::default(),
            image: &image,
            rootfs_host: self.root.path(),
            rootfs_ct: "/run/moxlet/pod/ctr/x/rootfs",
            mounts: &self.mounts,
            cgroup_path: Some("/x"),
            cgroup_v1: self.cgroup_v1,
            hostname: "web-0",
            map: IdMap::default(),
        })?;
        Ok(serde_json::to_value(spec).unwrap())
    }

    fn spec(&self) -> Value {
        self.build().unwrap()
    }

    /// Why it is refused.
    fn refused(&self) -> String {
        self.build().unwrap_err().to_string()
    }
}

fn texts(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect()
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|t| (*t).to_owned()).collect()
}

fn env(spec: &Value) -> Vec<&str> {
    texts(&spec["process"]["env"])
}

#[test]
fn a_plain_container_is_confined() {
    let spec = Case::new().spec();
    assert_eq!(spec["root"], json!({"path": "/run/moxlet/pod/ctr/x/rootfs", "readonly": false}));
    let process = &spec["process"];
    assert_eq!(process["cwd"], "/");
    assert_eq!(process["terminal"], false);
    assert_eq!(process["noNewPrivileges"], false);
    let bounding = texts(&process["capabilities"]["bounding"]);
    assert_eq!(bounding.len(), 14);
    assert!(bounding.contains(&"CAP_CHOWN") && !bounding.contains(&"CAP_SYS_ADMIN"));
    for set in ["effective", "permitted"] {
        assert_eq!(process["capabilities"][set], process["capabilities"]["bounding"]);
    }
    for set in ["inheritable", "ambient"] {
        assert_eq!(process["capabilities"][set], json!([]));
    }
    assert!(texts(&spec["linux"]["maskedPaths"]).contains(&"/proc/kcore"));
    assert!(texts(&spec["linux"]["readonlyPaths"]).contains(&"/proc/sys"));
    assert_eq!(spec["linux"]["cgroupsPath"], "/x");
    assert_eq!(spec["annotations"]["io.kubernetes.cri.container-name"], "web");
    // A host name needs a UTS namespace of its own, and the pod has one.
    assert!(spec.get("hostname").is_none());
    for ours in ["network", "ipc", "uts", "user"] {
        assert!(!spec["linux"]["namespaces"].to_string().contains(ours), "{ours}");
    }
}

#[test]
fn asked_for_hardening_is_given() {
    let mut case = Case::new();
    case.config.tty = true;
    let security = case.security();
    security.readonly_rootfs = true;
    security.no_new_privs = true;
    security.masked_paths = strings(&["/proc/keys"]);
    security.readonly_paths = strings(&["/proc/sys/"]);
    security.capabilities = Some(v1::Capability {
        drop_capabilities: strings(&["ALL"]),
        add_capabilities: strings(&["NET_BIND_SERVICE"]),
        ..v1::Capability::default()
    });
    let spec = case.spec();
    assert_eq!(spec["root"]["readonly"], true);
    assert_eq!(spec["process"]["noNewPrivileges"], true);
    assert_eq!(spec["process"]["terminal"], true);
    assert_eq!(spec["linux"]["maskedPaths"], json!(["/proc/keys"]));
    assert_eq!(spec["linux"]["readonlyPaths"], json!(["/proc/sys"]));
    assert_eq!(spec["process"]["capabilities"]["permitted"], json!(["CAP_NET_BIND_SERVICE"]));
}

#[test]
fn seccomp_is_as_asked_and_nothing_unasked() {
    let with = |kind: ProfileType| {
        let mut case = Case::new();
        case.security().seccomp =
            Some(v1::SecurityProfile { profile_type: kind as i32, localhost_ref: "mine.json".into() });
        case
    };
    let spec = with(ProfileType::RuntimeDefault).spec();
    assert_eq!(spec["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
    assert!(with(ProfileType::Unconfined).spec()["linux"].get("seccomp").is_none());
    assert!(Case::new().spec()["linux"].get("seccomp").is_none());
    assert!(with(ProfileType::Localhost).refused().contains("\"mine.json\""));
}

#[test]
#[allow(deprecated)]
fn the_older_field_of_seccomp_is_understood() {
    let mut case = Case::new();
    for (path, some) in
        [("runtime/default", true), ("docker/default", true), ("unconfined", false), ("", false)]
    {
        case.security().seccomp_profile_path = path.into();
        assert_eq!(case.spec()["linux"].get("seccomp").is_some(), some, "{path}");
    }
    case.security().seccomp_profile_path = "localhost/mine".into();
    assert!(case.refused().contains("localhost/mine"));
}

#[test]
fn command_and_arguments_replace_those_of_the_image() {
    let args = |command: &[&str], args: &[&str]| {
        let mut case = Case::new();
        case.config.command = strings(command);
        case.config.args = strings(args);
        case.spec()["process"]["args"].clone()
    };
    assert_eq!(args(&[], &[]), json!(["/entry", "serve"]));
    assert_eq!(args(&[], &["x"]), json!(["/entry", "x"]));
    assert_eq!(args(&["/cmd"], &[]), json!(["/cmd"]));
    assert_eq!(args(&["/cmd"], &["x", ""]), json!(["/cmd", "x", ""]));
    let mut case = Case::new();
    case.image = json!({"Entrypoint": [""], "Cmd": ["sh"]});
    assert_eq!(case.spec()["process"]["args"], json!(["sh"]));
    case.image = json!({});
    assert!(case.refused().contains("no command specified"));
    case.config.command = strings(&["a\0b"]);
    assert!(case.refused().contains("NUL"));
}

#[test]
fn variables_of_the_request_replace_those_of_the_image_in_their_place() {
    let mut case = Case::new();
    case.image["Env"] = json!(["PATH=/opt/bin", "A=image", "B=image", "no-pair", "=odd"]);
    case.config.tty = true;
    let pair = |key: &str, value: &str| v1::KeyValue { key: key.into(), value: value.into() };
    case.config.envs = vec![pair("A", "own"), pair("C", "x=y"), pair("HOSTNAME", "other"), pair("A", "last")];
    assert_eq!(
        env(&case.spec()),
        ["PATH=/opt/bin", "TERM=xterm", "HOSTNAME=other", "A=last", "B=image", "C=x=y"]
    );
    let plain = Case::new();
    let spec = plain.spec();
    assert!(env(&spec)[0].starts_with("PATH=/usr/local/sbin:") && env(&spec)[1] == "HOSTNAME=web-0");
    case.config.envs = vec![pair("A=B", "x")];
    assert!(case.refused().contains("\"A=B\""));
    case.config.envs = vec![v1::KeyValue { key: "BIN".into(), value: vec![0xff] }];
    assert!(case.refused().contains("BIN"));
}

#[test]
fn the_working_directory_is_the_requests_or_the_images() {
    let mut case = Case::new();
    case.image["WorkingDir"] = json!("srv/web");
    assert_eq!(case.spec()["process"]["cwd"], "/srv/web");
    case.config.working_dir = "/tmp/".into();
    assert_eq!(case.spec()["process"]["cwd"], "/tmp");
    case.config.working_dir = "/a/../b".into();
    assert!(case.refused().contains(".."));
}

#[test]
fn the_user_is_looked_up_in_the_image() {
    let user = |case: &Case| case.spec()["process"]["user"].clone();
    assert_eq!(user(&Case::new()), json!({"uid": 0, "gid": 0, "additionalGids": [0]}));
    assert_eq!(
        user(&Case::new().user("web")),
        json!({"uid": 1000, "gid": 1001, "additionalGids": [1001, 2000]})
    );
    assert_eq!(user(&Case::new().user("1000")), user(&Case::new().user("web")));
    assert_eq!(user(&Case::new().user("web:media"))["gid"], 2000);
    assert_eq!(user(&Case::new().user("4242:")), json!({"uid": 4242, "gid": 0, "additionalGids": [0]}));
    assert!(Case::new().user("nobody").refused().contains("\"nobody\""));
    assert!(Case::new().user("web:none").refused().contains("\"none\""));
}

#[test]
fn the_requests_user_goes_before_the_images() {
    let mut case = Case::new().user("web");
    case.security().run_as_user = Some(v1::Int64Value { value: 33 });
    case.security().run_as_group = Some(v1::Int64Value { value: 44 });
    case.security().supplemental_groups = vec![44, 55];
    assert_eq!(case.spec()["process"]["user"], json!({"uid": 33, "gid": 44, "additionalGids": [44, 55]}));
    case.security().run_as_user = Some(v1::Int64Value { value: 1000 });
    case.security().run_as_group = None;
    case.security().supplemental_groups_policy = v1::SupplementalGroupsPolicy::Strict as i32;
    assert_eq!(case.spec()["process"]["user"]["additionalGids"], json!([1001, 44, 55]));
    case.security().run_as_user = Some(v1::Int64Value { value: 70_000 });
    assert!(case.refused().contains("70000 is outside"));
    case.security().run_as_user = None;
    case.security().run_as_group = Some(v1::Int64Value { value: 1 });
    assert!(case.refused().contains("specified without user"));
}

#[test]
fn run_as_non_root_judges_the_user() {
    let judged = |user: Option<i64>, image: &str| {
        let mut case = Case::new().user(image);
        case.config.annotations = HashMap::from([(RUN_AS_NON_ROOT.to_owned(), "true".to_owned())]);
        case.security().run_as_user = user.map(|value| v1::Int64Value { value });
        case.build().map(drop).map_err(|e| e.to_string())
    };
    judged(None, "1000").unwrap();
    judged(Some(1), "root").unwrap();
    for image in ["", "0", "0:0"] {
        assert!(judged(None, image).unwrap_err().contains("image will run as root"), "{image:?}");
    }
    assert!(judged(None, "web").unwrap_err().contains("non-numeric user (web)"));
    assert!(judged(Some(0), "1000").unwrap_err().contains("breaks non-root policy"));
}

#[test]
fn files_of_the_image_cannot_lead_out_of_it() {
    let case = Case::new().user("daemon");
    let passwd = case.root.path().join("etc/passwd");
    std::fs::remove_file(&passwd).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &passwd).unwrap();
    // The host has a daemon, the image only a link to itself.
    assert!(case.build().is_err());
    std::fs::remove_file(&passwd).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &passwd,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o644),
        0,
    )
    .unwrap();
    assert!(case.refused().contains("no regular file"));
}

#[test]
fn limits_are_in_the_spec_where_the_init_sets_them() {
    let mut case = Case::new();
    *case.resources() = v1::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 1,
        memory_limit_in_bytes: 64 << 20,
        unified: HashMap::from([("memory.oom.group".to_owned(), "1".to_owned())]),
        ..v1::LinuxContainerResources::default()
    };
    let resources = case.spec()["linux"]["resources"].clone();
    assert_eq!(resources["cpu"], json!({"shares": 2, "quota": 50_000, "period": 100_000}));
    assert_eq!(resources["memory"], json!({"limit": 64 << 20, "swap": 64 << 20}));
    assert_eq!(resources["unified"], json!({"memory.oom.group": "1"}));
    case.resources().memory_swap_limit_in_bytes = 96 << 20;
    assert_eq!(case.spec()["linux"]["resources"]["memory"]["swap"], 96 << 20);
    case.cgroup_v1 = true;
    assert!(case.spec()["linux"].get("resources").is_none());
    *case.resources() =
        v1::LinuxContainerResources { cpu_quota: -1, ..v1::LinuxContainerResources::default() };
    case.cgroup_v1 = false;
    assert!(case.spec()["linux"].get("resources").is_none());
}

#[test]
fn limits_that_cannot_be_are_refused_on_either_hierarchy() {
    for cgroup_v1 in [false, true] {
        let mut case = Case { cgroup_v1, ..Case::new() };
        case.resources().cpuset_cpus = "0-1".into();
        assert!(case.refused().contains("set of CPUs"));
        let mut case = Case { cgroup_v1, ..Case::new() };
        case.resources().unified = HashMap::from([("../escape".to_owned(), "1".to_owned())]);
        assert!(case.refused().contains("../escape"));
        let mut case = Case { cgroup_v1, ..Case::new() };
        case.resources().hugepage_limits = vec![v1::HugepageLimit { page_size: "2MB".into(), limit: 1 }];
        assert!(case.refused().contains("2MB"));
    }
}

fn bind(target: &str) -> ResolvedMount {
    ResolvedMount {
        source_ct: "/run/moxlet/pod/mnt/x".into(),
        target: target.into(),
        ..ResolvedMount::default()
    }
}

fn destinations(spec: &Value) -> Vec<&str> {
    spec["mounts"].as_array().unwrap().iter().map(|m| m["destination"].as_str().unwrap()).collect()
}

#[test]
fn a_parent_is_mounted_before_what_lies_below_it() {
    let mut case = Case::new();
    case.mounts = vec![bind("/data/a/b"), bind("data/"), bind("/dev/shm"), bind("/data/a")];
    let spec = case.spec();
    let order = destinations(&spec);
    let at =
        |path: &str| order.iter().position(|d| *d == path).unwrap_or_else(|| panic!("{path} in {order:?}"));
    assert!(at("/data") < at("/data/a") && at("/data/a") < at("/data/a/b"));
    assert!(at("/dev") < at("/dev/pts") && at("/dev") < at("/dev/shm"));
    assert!(at("/sys") < at("/sys/fs/cgroup"));
}

#[test]
fn mounts_say_how_they_are_made() {
    let mut case = Case::new();
    case.mounts = vec![
        ResolvedMount { read_only: true, recursive: true, ..bind("/ro") },
        ResolvedMount { data: true, ..bind("/etc/resolv.conf") },
    ];
    let spec = case.spec();
    let of = |path: &str| {
        spec["mounts"].as_array().unwrap().iter().find(|m| m["destination"] == path).unwrap().clone()
    };
    assert_eq!(of("/ro")["options"], json!(["rbind", "rprivate", "ro", "nodev"]));
    let data = json!(["bind", "rprivate", "rw", "nodev", "nosuid", "noexec"]);
    assert_eq!(of("/etc/resolv.conf")["options"], data, "nothing runs there");
    assert_eq!(of("/ro")["source"], "/run/moxlet/pod/mnt/x");
    assert_eq!(of("/proc")["type"], "proc");
    for bad in ["/", "", "/a/../b"] {
        case.mounts = vec![bind(bad)];
        assert!(case.build().is_err(), "{bad:?}");
    }
}

#[test]
fn a_recursively_read_only_mount_has_to_be_read_only() {
    let mut case = Case::new();
    let mount =
        v1::Mount { container_path: "/data".into(), recursive_read_only: true, ..v1::Mount::default() };
    case.config.mounts = vec![mount.clone()];
    let error = case.build().unwrap_err().to_string();
    assert!(error.contains("/data") && error.contains("readonly"), "{error}");
    case.config.mounts = vec![v1::Mount { readonly: true, ..mount }];
    assert!(case.build().is_ok());
}

#[test]
fn a_mount_of_the_request_replaces_a_standard_one() {
    let mut case = Case::new();
    case.mounts = vec![bind("/sys/fs/cgroup")];
    let spec = case.spec();
    assert_eq!(destinations(&spec).iter().filter(|d| **d == "/sys/fs/cgroup").count(), 1);
    case.mounts = vec![bind("/dev")];
    let spec = case.spec();
    assert!(!destinations(&spec).iter().any(|d| d.starts_with("/dev/")), "{:?}", destinations(&spec));
}

#[test]
fn a_pod_may_share_its_process_ids() {
    let own = |mode: NamespaceMode| {
        let mut case = Case::new();
        case.security().namespace_options =
            Some(v1::NamespaceOption { pid: mode as i32, ..v1::NamespaceOption::default() });
        case.spec()["linux"]["namespaces"].to_string().contains("pid")
    };
    assert!(own(NamespaceMode::Container));
    assert!(!own(NamespaceMode::Pod));
    let silent = Case::new().spec()["linux"]["namespaces"].to_string();
    assert!(!silent.contains("pid"), "the pod's is CRI's default: {silent}");
}

#[test]
fn what_only_a_host_could_give_is_refused_by_name() {
    let refused = |change: &dyn Fn(&mut Case)| {
        let mut case = Case::new();
        change(&mut case);
        case.refused()
    };
    let options =
        |case: &mut Case, options: v1::NamespaceOption| case.security().namespace_options = Some(options);
    let node = NamespaceMode::Node as i32;
    let none = v1::NamespaceOption::default;
    let capability =
        |name: &str| v1::Capability { add_capabilities: strings(&[name]), ..v1::Capability::default() };
    for (text, word) in [
        (refused(&|c| c.security().privileged = true), "privileged"),
        (
            refused(&|c| {
                c.config.devices =
                    vec![v1::Device { host_path: "/dev/fuse".into(), ..v1::Device::default() }];
            }),
            "/dev/fuse",
        ),
        (refused(&|c| c.config.cdi_devices = vec![v1::CdiDevice { name: "gpu/0".into() }]), "gpu/0"),
        (refused(&|c| options(c, v1::NamespaceOption { network: node, ..none() })), "network"),
        (refused(&|c| options(c, v1::NamespaceOption { pid: node, ..none() })), "PID"),
        (refused(&|c| options(c, v1::NamespaceOption { ipc: node, ..none() })), "IPC"),
        (
            refused(&|c| options(c, v1::NamespaceOption { pid: NamespaceMode::Target as i32, ..none() })),
            "another container",
        ),
        (refused(&|c| c.security().capabilities = Some(capability("SYS_MODULE"))), "SYS_MODULE"),
        (
            refused(&|c| {
                let own = v1::SeLinuxOption { level: "s0".into(), ..v1::SeLinuxOption::default() };
                c.security().selinux_options = Some(own);
            }),
            "SELinux",
        ),
        (
            refused(&|c| {
                let own = ProfileType::Localhost as i32;
                c.security().apparmor =
                    Some(v1::SecurityProfile { profile_type: own, localhost_ref: "mine".into() });
            }),
            "AppArmor",
        ),
    ] {
        assert!(text.starts_with("not supported: ") && text.contains(word), "{text:?} names {word}");
    }
}
