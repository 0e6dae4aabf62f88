//! CRI v1 and moxlet.host.v1: the gRPC contract between node and agent, and the [`link`] on which they speak.
//!
//! [`v1`] and [`host`] are generated; `proto/api.proto` is vendored from k8s.io/cri-api (Apache-2.0, see
//! `proto/LICENSE.cri-api`), `proto/host.proto` and `proto/images.proto` are ours.

pub mod link;
pub mod paths;

/// CRI v1 (`runtime.v1`).
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, rustdoc::all)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

/// What CRI lacks (`moxlet.host.v1`).
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, rustdoc::all)]
pub mod host {
    tonic::include_proto!("moxlet.host.v1");
}

/// Names of annotations by which node and agent say more than CRI has fields for.
pub mod annotations {
    /// On a sandbox: its pod's termination grace period in seconds, for a host that goes down and stops CTs by itself.
    pub const GRACE_PERIOD: &str = "dev.moxlet/grace-period";
    /// On a container: where in the container its termination message file is mounted.
    pub const TERMINATION_MESSAGE_PATH: &str = "dev.moxlet/termination-message-path";
    /// On a container: its `oom_score_adj` (-1000 to 1000), set by the agent from the host.
    pub const OOM_SCORE_ADJ: &str = "dev.moxlet/oom-score-adj";
    /// On a container: `true` where the pod asks for runAsNonRoot, so that the agent judges the image's user.
    pub const RUN_AS_NON_ROOT: &str = "dev.moxlet/run-as-non-root";
}
