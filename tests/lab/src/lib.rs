//! A host of Proxmox VE in a guest, seen from outside: its shell by ssh, its API by curl, and all that pods could leave on it.
//!
//! `tests/lab/pve` makes it. The agent is in the guest; the node, the control plane, kubectl and these tests are on the machine that
//! the guest runs on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::missing_panics_doc)]

use std::{collections::BTreeSet, path::PathBuf, process::Command};

use moxlet_tests_e2e::{Finished, eventually};
use serde_json::Value;

/// Where the guest has what its Proxmox VE is.
const PVE: &str = "/root/pve";
/// What pods could leave on the host, one line a thing.
const TRACES: &str = r#"
cd /root/pve/etc/nodes && find . -type f ! -name 'pve-ssl*' -exec sha256sum {} + | sort -k 2
cat /root/pve/etc/ha/resources.cfg /root/pve/etc/user.cfg 2>/dev/null | sed 's/^/cfg /'
zfs list -H -o name -t all -r rpool | sed 's/^/dataset /'
awk '{ print "mount " $5 }' /proc/self/mountinfo | grep -v ' /run/credentials'
ls /sys/class/net | sed 's/^/interface /'
find /sys/fs/cgroup -maxdepth 2 -path '*lxc*' ! -name '*.*' -type d
ls /var/lib/lxc | sed 's/^/CT /'
cd /var/lib/moxlet && find pve addresses ledger pods volumes storage/roots -mindepth 1 ! -name notices.json
# A unit that failed is what systemd remembers of a CT that was killed, until the next start with its number resets it.
systemctl list-units --all --plain --no-legend 'pve-container@*' | awk '$3 != "failed" { print "unit " $1, $3 }'
pgrep -a lxc-start | sed 's/^[0-9]* /process /'
"#;

/// The CTs of somebody else that stand on the host all the time.
#[must_use]
pub fn foreign() -> Vec<u32> {
    let all = std::env::var("MOXLET_LAB_FOREIGN").unwrap_or_default();
    all.split_whitespace().map(|vmid| vmid.parse().unwrap()).collect()
}

/// The guest that is the host.
#[derive(Debug)]
pub struct Guest {
    script: PathBuf,
    run: PathBuf,
}

impl Guest {
    /// The one that the environment names.
    #[must_use]
    pub fn get() -> Self {
        let var = |name: &str| {
            PathBuf::from(
                std::env::var_os(name)
                    .unwrap_or_else(|| panic!("{name} is not set: tests/lab/pve runs these tests")),
            )
        };
        Self { script: var("MOXLET_LAB_GUEST"), run: var("MOXLET_LAB_RUN") }
    }

    /// A line of shell on the host.
    #[must_use]
    pub fn try_sh(&self, script: &str) -> Finished {
        let output =
            Command::new(&self.script).arg("ssh").arg(&self.run).args(["1", script]).output().unwrap();
        Finished {
            code: output.status.code().unwrap_or(-1),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// As [`Self::try_sh`]; it has to succeed. What it printed, without the last newline.
    #[must_use]
    pub fn sh(&self, script: &str) -> String {
        let done = self.try_sh(script);
        assert_eq!(done.code, 0, "{script}: {}{}", done.text(), done.stderr);
        done.text().trim_end().to_owned()
    }

    /// The data of a call of Proxmox VE's API; a server that was killed a moment ago comes again.
    #[must_use]
    pub fn api(&self, method: &str, path: &str) -> Value {
        let call = format!(
            "curl -sS --retry 30 --retry-connrefused --retry-delay 1 --fail-with-body -X {method} --cacert {PVE}/ca.pem -H \"Authorization: PVEAPIToken=$(cat {PVE}/token)\" \"$(cat {PVE}/url)/api2/json{path}\""
        );
        let answer: Value = serde_json::from_str(&self.sh(&call)).unwrap();
        answer["data"].clone()
    }

    /// A call of the simulator's admin port.
    pub fn control(&self, method: &str, path: &str, body: &Value) {
        let _ = self.sh(&format!(
            "curl -sS --fail-with-body -X {method} -H 'Content-Type: application/json' -d '{body}' http://127.0.0.1:8010{path}"
        ));
    }

    /// Kills the node, as a crash would, and starts it again.
    pub fn kill_node(&self) {
        let var = |name: &str| std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set"));
        let pid = std::fs::read_to_string(var("MOXLET_LAB_NODE_PID")).unwrap();
        let pid = pid.split(' ').next().unwrap().to_owned();
        let killed = Command::new("kill").args(["-KILL", &pid]).status().unwrap();
        assert!(killed.success(), "the node did not run any more");
        while PathBuf::from(format!("/proc/{pid}/exe")).exists() {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let started = Command::new(var("MOXLET_LAB_NODE_START")).status().unwrap();
        assert!(started.success());
    }

    /// The CTs of pods that Proxmox VE lists, by their pods' names.
    #[must_use]
    pub fn cts(&self) -> Vec<(String, u32)> {
        let listed = self.api("GET", "/nodes/pve1/lxc");
        let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), ToOwned::to_owned);
        let all = listed.as_array().into_iter().flatten();
        let mut all: Vec<_> = all.map(|ct| (text(&ct["name"]), text(&ct["vmid"]).parse().unwrap())).collect();
        all.retain(|(_, vmid)| !foreign().contains(vmid));
        all.sort();
        all
    }

    /// The number of a pod's CT: there is one.
    #[must_use]
    pub fn vmid(&self, pod: &str) -> u32 {
        let all = self.cts();
        let of_pod: Vec<_> = all.iter().filter(|(name, _)| name == pod).collect();
        assert_eq!(of_pod.len(), 1, "{all:?}");
        of_pod[0].1
    }

    /// Waits until the agent knows of no pod.
    pub fn without_pods(&self) {
        // What goes while it is looked at is no failure.
        eventually("the agent to have no pod", || {
            let left = self.sh(
                "cd /var/lib/moxlet && find pve/ct pve/include addresses ledger pods volumes -type f ! -name notices.json; true",
            );
            if left.is_empty() { Ok(()) } else { Err(left) }
        });
    }

    /// All that pods could leave.
    #[must_use]
    pub fn traces(&self) -> BTreeSet<String> {
        self.sh(TRACES).lines().map(ToOwned::to_owned).collect()
    }

    /// Waits until all is as it was.
    pub fn as_before(&self, before: &BTreeSet<String>) {
        eventually("the host to be as it was", || {
            let now = self.traces();
            let (more, less): (Vec<_>, Vec<_>) =
                (now.difference(before).collect(), before.difference(&now).collect());
            if more.is_empty() && less.is_empty() {
                Ok(())
            } else {
                Err(format!("more: {more:#?}, less: {less:#?}"))
            }
        });
    }
}
