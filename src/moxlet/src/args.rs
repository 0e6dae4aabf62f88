//! What the programs `up`, `node` and `agent` take on the command line; what a flag does to its key is in `docs/configuration.md`.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use clap::{Args, ValueEnum, parser::ValueSource};
use moxlet_cri::link::Endpoint;

/// What every program of Moxlet takes.
#[derive(Debug, Args, Default)]
pub(crate) struct ProgramArgs {
    /// Configuration file (TOML). A key that it does not know is an error.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Everything that Moxlet keeps lies below this directory [default: /var/lib/moxlet]
    #[arg(long, value_name = "DIR")]
    pub(crate) root_dir: Option<PathBuf>,
    /// How log lines look
    #[arg(long, value_enum)]
    pub(crate) log_format: Option<LogFormat>,
    /// What is logged: error, warn, info, debug, trace, or a filter like `info,moxlet_agent=debug`
    #[arg(long, value_name = "FILTER", env = "MOXLET_LOG")]
    pub(crate) log: Option<String>,
}

/// What is said of a host of pods.
#[derive(Debug, Args, Default)]
pub(crate) struct HostArgs {
    #[command(flatten)]
    pub(crate) program: ProgramArgs,
    /// Where the CRI socket is served [default: run/agent.sock below the root directory]
    #[arg(long, value_name = "PATH")]
    pub(crate) cri_socket: Option<PathBuf>,
    /// A registry (host or host:port) that is spoken to without TLS; may be given several times
    #[arg(long = "plain-http-registry", value_name = "HOST")]
    pub(crate) plain_http_registries: Vec<String>,
    /// Also stop the pods when Moxlet is stopped (otherwise they keep running)
    #[arg(long)]
    pub(crate) stop_pods: bool,
}

/// What is said of a node.
#[derive(Debug, Args, Default)]
pub(crate) struct KubeletArgs {
    /// Name of the Node object [default: this machine's host name]
    #[arg(long, value_name = "NAME")]
    pub(crate) node_name: Option<String>,
    /// A kubeconfig that holds a node's identity
    #[arg(long, value_name = "FILE", env = "KUBECONFIG")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Whether that stood on the command line or in the environment.
    #[arg(skip)]
    pub(crate) kubeconfig_source: Option<ValueSource>,
    /// A kubeconfig with a bootstrap token: Moxlet asks for a certificate of its own with it, once
    #[arg(long, value_name = "FILE")]
    pub(crate) bootstrap_kubeconfig: Option<PathBuf>,
    /// Folder of pod manifests (YAML or JSON) to run, with or without a cluster
    #[arg(long, value_name = "DIR")]
    pub(crate) static_pod_dir: Option<PathBuf>,
    /// Address and port of the kubelet API [default: 0.0.0.0:10250]
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// The node's address, where the machine has several
    #[arg(long, value_name = "IP")]
    pub(crate) node_ip: Option<IpAddr>,
}

/// What `moxlet up` takes.
#[derive(Debug, Args, Default)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    pub(crate) host: HostArgs,
    #[command(flatten)]
    pub(crate) kubelet: KubeletArgs,
}

/// What `moxlet node` takes.
#[derive(Debug, Args, Default)]
pub(crate) struct NodeArgs {
    #[command(flatten)]
    pub(crate) program: ProgramArgs,
    #[command(flatten)]
    pub(crate) kubelet: KubeletArgs,
    /// Where the agent is: unix:///PATH or https://HOST:PORT [default: run/agent.sock below the root directory]
    #[arg(long, value_name = "URL")]
    pub(crate) agent_endpoint: Option<Endpoint>,
}

/// What `moxlet agent` takes.
#[derive(Debug, Args, Default)]
pub(crate) struct AgentArgs {
    #[command(flatten)]
    pub(crate) host: HostArgs,
    /// Also serve a node on another machine, at this address; needs link_certificate_file and the like in the file
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) agent_listen: Option<SocketAddr>,
}

/// The look of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}
