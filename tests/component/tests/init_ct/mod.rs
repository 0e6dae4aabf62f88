//! A real unprivileged CT with moxlet-init in it, for one test; gone with all its traces when dropped.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    time::Duration,
};

use moxlet_ids::SandboxId;
use moxlet_init_proto::{ContainerState, CreateRequest, Event, ExecRequest, Status, client::Client};
use moxlet_sandbox::{Engine, IdMap, Limits, LxcConfig, LxcEngine, SandboxSpec, cgroup::ContainerCgroups};
use moxlet_storage::mounts;
use moxlet_tests_component::init_binary;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

pub(crate) const MAP: IdMap = IdMap { host_base: 100_000, size: 65_536 };

pub(crate) struct Ct {
    pub(crate) engine: LxcEngine,
    pub(crate) id: SandboxId,
    pub(crate) pid: u32,
    pub(crate) client: Client,
    pub(crate) shared: PathBuf,
    top: Option<tempfile::TempDir>,
}

impl Ct {
    pub(crate) async fn start() -> Self {
        let top = tempfile::Builder::new().prefix("moxlet-init-").tempdir().unwrap();
        fs::set_permissions(top.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let pods = top.path().join("pods");
        fs::create_dir(&pods).unwrap();
        fs::set_permissions(&pods, fs::Permissions::from_mode(0o711)).unwrap();
        mounts::make_shared_dir(&pods).unwrap();
        let shared = pods.join("pod");
        for dir in ["", "run", "state", "logs", "rootfs"] {
            let dir = shared.join(dir);
            fs::create_dir(&dir).unwrap();
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o711)).unwrap();
        }
        for dir in ["run", "state", "logs"] {
            chown(shared.join(dir), Some(MAP.host_base), Some(MAP.host_base)).unwrap();
        }
        let init = top.path().join("moxlet-init");
        fs::copy(init_binary(), &init).unwrap();
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
        let dir = top.path().join("lxc");
        let config = LxcConfig { dir, map: MAP, manage_subids: true, start_timeout: Duration::from_secs(20) };
        let engine = LxcEngine::new(config).await.unwrap();
        let id = SandboxId::random();
        let spec = SandboxSpec {
            id: id.clone(),
            pod_namespace: "default".into(),
            pod_name: "test".into(),
            pod_uid: "test".parse().unwrap(),
            attempt: 0,
            hostname: "test".into(),
            map: MAP,
            shared_dir: shared.clone(),
            init_binary: init,
            init_args: vec!["--grace".into(), "3".into()],
            limits: Limits::default(),
            sysctls: Default::default(),
            stop_grace: Duration::from_secs(30),
            nics: Vec::new(),
        };
        let mut ct = Self { engine, id, pid: 0, client: Client::new(Path::new("/")), shared, top: Some(top) };
        ct.engine.create(&spec).await.unwrap();
        ct.pid = ct.engine.start(&ct.id).await.unwrap();
        ct.client = Client::connect(&ct.shared.join("run/init.sock"), Duration::from_secs(10)).await.unwrap();
        ct
    }

    /// A root with busybox in it, owned by the CT's root.
    fn root(&self, id: &str) -> String {
        let root = self.shared.join("rootfs").join(id);
        for dir in ["", "bin", "dev", "etc", "proc", "sys", "tmp", "home"] {
            let dir = root.join(dir);
            fs::create_dir(&dir).unwrap();
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
            chown(&dir, Some(MAP.host_base), Some(MAP.host_base)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for tool in "sh true cat echo sleep id grep head dd tty stty printf kill mkdir touch ls env nc ps seq test base64 yes tr hostname".split(' ') {
            symlink("busybox", root.join("bin").join(tool)).unwrap();
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home:/bin/sh\n")
            .unwrap();
        fs::write(root.join("bin/plain"), "text").unwrap();
        format!("/run/moxlet/pod/rootfs/{id}")
    }

    /// A request as the agent makes it.
    pub(crate) fn request(&self, id: &str, args: &[&str]) -> CreateRequest {
        let spec = json!({
            "ociVersion": "1.2.0",
            "hostname": "ignored",
            "root": {"path": self.root(id), "readonly": false},
            "process": {
                "args": args, "cwd": "/", "noNewPrivileges": false,
                "env": ["PATH=/bin", "COLOUR=red"],
                "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
                "capabilities": capabilities(),
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
            ],
            "linux": {
                "cgroupsPath": format!("/{id}"),
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/acpi", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
                "seccomp": seccomp(),
            },
        });
        // As the agent does on cgroup v1: the host makes the container's cgroup.
        ContainerCgroups::detect()
            .unwrap()
            .create(
                &self.id,
                &id.parse().unwrap(),
                &Limits { memory_bytes: Some(256 << 20), ..Limits::default() },
                MAP,
            )
            .unwrap();
        CreateRequest {
            id: id.into(),
            spec,
            log_path: Some(format!("/run/moxlet/pod/logs/{id}.log").into()),
            ..CreateRequest::default()
        }
    }

    /// Creates and starts.
    pub(crate) async fn run(&self, request: CreateRequest) -> ContainerState {
        let id = request.id.clone();
        let made = self.client.create(request).await.unwrap();
        assert_eq!(made.status, Status::Created);
        self.client.start(&id).await.unwrap()
    }

    /// Waits for a container's exit: code and signal.
    pub(crate) async fn exited(&self, id: &str) -> (i32, Option<i32>) {
        let wait = async {
            let mut events = self.client.events().await.unwrap();
            loop {
                let all = self.client.list().await.unwrap();
                if let Some(Status::Exited { code, signal, .. }) =
                    all.into_iter().find(|c| c.id == id).map(|c| c.status)
                {
                    return (code, signal);
                }
                let Some(Event::Started { .. } | Event::Exited { .. }) = events.next().await.unwrap() else {
                    panic!()
                };
            }
        };
        tokio::time::timeout(Duration::from_secs(60), wait).await.unwrap()
    }

    /// Creates, starts and waits; the exit code and what was logged.
    pub(crate) async fn output(&self, id: &str, args: &[&str]) -> (i32, String) {
        self.run(self.request(id, args)).await;
        let (code, _) = self.exited(id).await;
        (code, self.log(id))
    }

    pub(crate) fn log_path(&self, id: &str) -> PathBuf {
        self.shared.join(format!("logs/{id}.log"))
    }

    /// The live log file's content as a reader puts it together.
    pub(crate) fn log(&self, id: &str) -> String {
        String::from_utf8(content(&fs::read(self.log_path(id)).unwrap())).unwrap()
    }

    /// Runs a command without terminal: exit code, output, errors.
    pub(crate) async fn exec(&self, id: &str, args: &[&str]) -> (i32, String, String) {
        let request = ExecRequest {
            id: id.into(),
            args: args.iter().map(|a| (*a).into()).collect(),
            stdout: true,
            stderr: true,
            ..ExecRequest::default()
        };
        let exec = self.client.exec(request).await.unwrap();
        let (mut out, mut err) = (String::new(), String::new());
        let (mut stdout, mut stderr) = (exec.streams.stdout.unwrap(), exec.streams.stderr.unwrap());
        tokio::try_join!(stdout.read_to_string(&mut out), stderr.read_to_string(&mut err)).unwrap();
        (self.client.wait_exec(&exec.exec_id).await.unwrap(), out, err)
    }

    /// A line of the init's `/proc/PID/status`, in kB.
    pub(crate) fn init_status_kb(&self, key: &str) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        text.lines()
            .find_map(|l| l.strip_prefix(key))
            .unwrap()
            .split_whitespace()
            .find_map(|w| w.parse().ok())
            .unwrap()
    }
}

impl Drop for Ct {
    fn drop(&mut self) {
        let (engine, id, shared) = (&self.engine, &self.id, self.shared.parent().unwrap());
        std::thread::scope(|s| {
            s.spawn(|| {
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
                    let _ = engine.delete(id).await;
                    let _ = engine.remove_directory().await;
                });
            });
        });
        let _ = mounts::unmount_all_below(shared);
        let _ = mounts::unmount(shared);
        if std::env::var_os("MOXLET_KEEP").is_some()
            && let Some(top) = self.top.take()
        {
            eprintln!("kept {}", top.keep().display());
        }
    }
}

/// Puts CRI log bytes together as a reader does.
pub(crate) fn content(log: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for line in log.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let mut words = line.splitn(4, |b| *b == b' ');
        let (_, stream, tag, text) =
            (words.next().unwrap(), words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
        assert!(matches!(stream, b"stdout" | b"stderr"));
        out.extend_from_slice(text);
        if tag == b"F" {
            out.push(b'\n');
        } else {
            assert_eq!(tag, b"P");
        }
    }
    out
}

/// containerd's default set.
pub(crate) const CAPS: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

fn capabilities() -> Value {
    json!({"bounding": CAPS, "effective": CAPS, "permitted": CAPS})
}

/// A profile of the size of containerd's: what a program needs is allowed, all else is refused.
fn seccomp() -> Value {
    let names: Vec<&str> = include_str!("syscalls.txt").split_whitespace().collect();
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": names, "action": "SCMP_ACT_ALLOW"},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}]},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 2_114_060_288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
        ],
    })
}
