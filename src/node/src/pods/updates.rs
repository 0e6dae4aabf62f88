//! What the sources of pods say to the manager.

use std::{collections::HashSet, sync::Arc};

use k8s_openapi::api::core::v1::Pod;

/// Where pods come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Source {
    /// The API server.
    Api,
    /// Manifests in a folder.
    Files,
}

/// What a source has seen.
pub(crate) enum Update {
    /// A pod as it is now.
    Apply(Source, Arc<Pod>),
    /// A pod is gone; this is the last that was seen of it.
    Gone(Arc<Pod>),
    /// All pods of a source were told; whatever else was from it is gone.
    Listed(Source, HashSet<String>),
    /// A ConfigMap or Secret that the pod of this UID names has changed.
    Content(String),
    /// The API server's copy of a static pod, to which its status goes; no UID: there is none.
    Mirror {
        /// The pod's namespace.
        namespace: String,
        /// The pod's name.
        name: String,
        /// UID of the copy.
        uid: String,
    },
}
