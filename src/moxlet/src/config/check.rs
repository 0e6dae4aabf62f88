//! What must hold of a configuration before anything is started with it: keys that contradict one another, and files that are not
//! there. All that is wrong is said at once.

use std::path::Path;

use anyhow::{Result, bail};
use moxlet_cri::link::Endpoint;

use super::{Config, Engine, Role, Storage};
use crate::log_filter;

/// What is wrong, a sentence each.
type Wrongs = Vec<String>;

impl Config {
    /// Passes a configuration in which nothing is wrong for that program.
    ///
    /// # Errors
    /// All that is wrong.
    pub(super) fn checked(self, role: Role) -> Result<Self> {
        let wrongs = self.wrongs(role);
        if wrongs.is_empty() {
            return Ok(self);
        }
        bail!("{}", wrongs.join("; "))
    }

    /// All that is wrong for that program, without a look into the files that are named.
    pub(crate) fn wrongs(&self, role: Role) -> Wrongs {
        let mut wrongs = Vec::new();
        if !self.root_dir.is_absolute() {
            wrongs.push(format!("root_dir: {} is not an absolute path", self.root_dir.display()));
        }
        wrongs.extend(log_filter::parse("log", &self.log).err().map(|e| moxlet_errors::chain(e.as_ref())));
        if role != Role::Agent {
            self.check_node(&mut wrongs);
        }
        if role != Role::Node {
            self.check_agent(&mut wrongs);
        }
        wrongs.extend(self.check_link(role).err().map(|e| e.to_string()));
        wrongs
    }

    /// What the node reads.
    fn check_node(&self, wrongs: &mut Wrongs) {
        // A node's own kubeconfig may not exist before the bootstrap has written it.
        let made_later = self.bootstrap_kubeconfig.is_some();
        let kubeconfig = self.kubeconfig.as_deref().filter(|_| !made_later);
        wrongs.extend(missing("kubeconfig", kubeconfig));
        wrongs.extend(missing("bootstrap_kubeconfig", self.bootstrap_kubeconfig.as_deref()));
        wrongs.extend(missing("client_ca_file", self.client_ca_file.as_deref()));
        wrongs.extend(missing("static_pod_dir", self.static_pod_dir.as_deref()));
        let (low, high) = (self.image_gc_low_threshold_percent, self.image_gc_high_threshold_percent);
        if high > 100 || low > high {
            wrongs.push(format!(
                "image_gc_high_threshold_percent ({high}) must be at most 100 and image_gc_low_threshold_percent ({low}) not above it"
            ));
        }
        if self.max_pods == 0 {
            wrongs.push("max_pods must be at least 1".to_owned());
        }
    }

    /// What the agent reads.
    fn check_agent(&self, wrongs: &mut Wrongs) {
        wrongs.extend(missing("init_binary", self.init_binary.as_deref()));
        wrongs.extend(missing("resolv_conf", self.resolv_conf.as_deref()));
        wrongs.extend(missing("cni_conf_dir", self.cni_conf_dir.as_deref()));
        wrongs.extend(missing("registry_config_dir", self.registry_config_dir.as_deref()));
        wrongs.extend(missing("docker_config", self.docker_config.as_deref()));
        match (self.storage, &self.zfs_dataset) {
            (Storage::Zfs, None) => wrongs.push(
                "storage = \"zfs\" needs zfs_dataset, such as zfs_dataset = \"rpool/moxlet\"".to_owned(),
            ),
            (Storage::Overlay, Some(dataset)) => {
                wrongs.push(format!("zfs_dataset = {dataset:?} is of no use without storage = \"zfs\""));
            }
            _ => {}
        }
        if self.container_root_quota.is_some_and(|b| b.0 == 0) {
            wrongs.push("container_root_quota must be at least 1 byte; leave it out for no quota".to_owned());
        }
        self.check_engine(wrongs);
        if self.container_log_max_files < 2 {
            wrongs.push(
                "container_log_max_files must be at least 2, as the kubelet's containerLogMaxFiles"
                    .to_owned(),
            );
        }
    }

    /// What each engine reads alone.
    fn check_engine(&self, wrongs: &mut Wrongs) {
        match (self.engine, &self.pve) {
            (Engine::Lxc, Some(_)) => {
                wrongs.push("there is a section [pve], but engine is not \"pve\"".to_owned());
            }
            (Engine::Pve, pve) => {
                wrongs.extend(pve.clone().unwrap_or_default().settings().err().map(|e| e.to_string()));
                if self.bridge != Self::default().bridge {
                    wrongs.push(format!(
                        "bridge = {:?} is the bridge of engine = \"lxc\"; with engine = \"pve\" it is pve.bridge, in section [pve]",
                        self.bridge
                    ));
                }
            }
            (Engine::Lxc, None) => {}
        }
    }

    /// What node and agent read of the link between them.
    fn check_link(&self, role: Role) -> Result<()> {
        match role {
            Role::Up if self.agent_listen.is_some() || self.agent_endpoint.is_some() => bail!(
                "agent_listen and agent_endpoint are for node and agent apart (`moxlet node`, `moxlet agent`); with `moxlet up` they \
                 are one process"
            ),
            Role::Agent if self.agent_listen.is_some() => self.need_link_files("agent_listen"),
            Role::Node if matches!(self.agent_endpoint, Some(Endpoint::Tls { .. })) => {
                self.need_link_files("an agent_endpoint of https://")
            }
            _ if self.link_files()?.is_some() => bail!(
                "link_certificate_file and the like are of no use without {}",
                match role {
                    Role::Agent => "agent_listen",
                    Role::Node => "an agent_endpoint of https://",
                    Role::Up => "`moxlet node` or `moxlet agent`: with `moxlet up` they are one process",
                }
            ),
            _ => Ok(()),
        }
    }

    fn need_link_files(&self, what: &str) -> Result<()> {
        if self.link_files()?.is_none() {
            bail!(
                "{what} needs link_certificate_file, link_key_file and link_ca_file, by which node and agent know one another \
                 (`moxlet certificates` makes them)"
            );
        }
        Ok(())
    }
}

/// A file that a key names and that is not there.
fn missing(key: &str, path: Option<&Path>) -> Option<String> {
    let path = path?;
    match path.try_exists() {
        Ok(true) => None,
        Ok(false) => Some(format!("{key}: {} does not exist", path.display())),
        Err(e) => Some(format!("{key}: {} cannot be looked at: {e}", path.display())),
    }
}
