//! Where an agent's directories of pods lie on the host.
//!
//! ```text
//! <root_dir>/pods/<sandbox>/      in the CT: /run/moxlet/pod
//!   run/init.sock  state/         the init's socket and exit records (the CT's root writes)
//!   etc/  shm/                    resolv.conf and hostname; /dev/shm of all containers
//!   logs/                         the pod's log directory, bound with the CT's ids
//!   ctr/<container>/rootfs        a container's root
//!   mnt/<container>/<n>           what is mounted in it
//!   term/<container>              its termination message
//! ```

use std::path::{Path, PathBuf};

use moxlet_ids::SandboxId;

/// The directories.
#[derive(Debug, Clone)]
pub(crate) struct Dirs {
    /// Shared directories of the pods, a shared mount.
    pub(crate) pods: PathBuf,
    /// Base of the pods' log directories.
    pub(crate) logs: PathBuf,
}

impl Dirs {
    /// Those of an agent whose files are below `root`.
    pub(crate) fn below(root: &Path) -> Self {
        Self { pods: root.join("pods"), logs: root.join("logs") }
    }

    /// A pod's shared directory.
    pub(crate) fn pod(&self, id: &SandboxId) -> PathBuf {
        self.pods.join(id.as_str())
    }

    /// The socket of the init of a pod's CT.
    pub(crate) fn init_socket(&self, id: &SandboxId) -> PathBuf {
        self.pod(id).join("run/init.sock")
    }
}
