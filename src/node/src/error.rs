//! What can go wrong in the node, one variant an operation.

use std::path::PathBuf;

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the node could not do something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server did not answer in time.
    #[error("the API server did not answer for {what} within {seconds} s")]
    Deadline {
        /// What was asked for.
        what: &'static str,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A key of the configuration has a value that cannot be used.
    #[error("configuration key {key}: {reason}")]
    Config {
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The link to the agent.
    #[error(transparent)]
    Link(#[from] moxlet_cri::link::Error),
    /// The agent answered a call with an error, or not at all.
    #[error("{call}: {}", agent_says(.status))]
    Agent {
        /// The CRI call.
        call: &'static str,
        /// The answer.
        status: Box<tonic::Status>,
    },
    /// An answer of the agent lacks something.
    #[error("{call}: the agent's answer lacks {what}")]
    AgentAnswer {
        /// The CRI call.
        call: &'static str,
        /// What is missing.
        what: &'static str,
    },
    /// The API server refused a request or is away.
    #[error("could not {what}")]
    Api {
        /// What was attempted, on what.
        what: String,
        /// Why it failed.
        #[source]
        source: Box<kube::Error>,
    },
    /// The API server knows no such object.
    #[error("{kind} \"{name}\" not found")]
    NotFound {
        /// As `kubectl` names it: configmap, secret.
        kind: &'static str,
        /// Namespace and name.
        name: String,
    },
    /// A kubeconfig cannot be used.
    #[error("could not use the kubeconfig {path}: {reason}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file of the node cannot be read or written.
    #[error("could not {what} {path}")]
    File {
        /// read, write, …
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The kubelet API cannot listen.
    #[error("could not listen on {address}")]
    Listen {
        /// Where.
        address: std::net::SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A certificate or key cannot be made, read or used.
    #[error("could not {what}: {reason}")]
    Certificate {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        reason: String,
    },
    /// A container's configuration cannot be made from its pod.
    #[error("{0}")]
    ContainerConfig(String),
    /// A volume's contents cannot be made.
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : {reason}")]
    Volume {
        /// The volume's name in the pod.
        volume: String,
        /// Why.
        reason: String,
    },
    /// Another process has the node's state directory.
    #[error("another moxlet uses the state directory {path}")]
    StateDirInUse {
        /// The directory.
        path: PathBuf,
    },
    /// The API server takes this process for somebody else.
    #[error(
        "the kubeconfig is not that of node {node:?}: with it the API server takes this process for {found}, not for \"system:node:{node}\" of the group system:nodes. \
         Use --bootstrap-kubeconfig to get an identity for the node (and unset KUBECONFIG if it is meant for kubectl), or set allow_any_identity = true"
    )]
    NotTheNode {
        /// The node's name.
        node: String,
        /// User and groups.
        found: String,
    },
    /// Another instance has taken over the Node's Lease while this one did not renew it.
    #[error(
        "the Lease of node {node:?} is now held by {holder}: this process stops acting for the node, its pods keep running"
    )]
    NodeNameTaken {
        /// The node's name.
        node: String,
        /// Who holds it.
        holder: String,
    },
    /// A manifest of a static pod is not valid.
    #[error("static pod {path}: {reason}")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    /// An error of the API server, with what was attempted.
    pub(crate) fn api(what: impl Into<String>) -> impl FnOnce(kube::Error) -> Self {
        let what = what.into();
        move |source| Self::Api { what, source: Box::new(source) }
    }

    /// An error of the agent, with the call.
    pub(crate) fn agent(call: &'static str) -> impl FnOnce(tonic::Status) -> Self {
        move |status| Self::Agent { call, status: Box::new(status) }
    }

    /// The gRPC code, where the agent answered with one.
    #[must_use]
    pub fn code(&self) -> Option<tonic::Code> {
        match self {
            Self::Agent { status, .. } => Some(status.code()),
            _ => None,
        }
    }
}

/// What an agent answered, or why it did not: where a connection fails, the status itself says no more than that.
fn agent_says(status: &tonic::Status) -> String {
    const NOTHING: &str = "transport error";
    let mut text = status.message().to_owned();
    let mut next = std::error::Error::source(status);
    while let Some(cause) = next {
        let more = cause.to_string();
        if text == NOTHING {
            text = more;
        } else if more != NOTHING && !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = cause.source();
    }
    text
}

/// An error with all its causes on one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
