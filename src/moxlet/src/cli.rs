//! The command line: what a newcomer reads with `--help`.
//!
//! A flag overrides its key in the configuration file; all keys are listed in `docs/configuration.md`.

use std::{net::IpAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::image::ImageArgs;

/// Pods as LXC containers: one Kubernetes node out of Proxmox hosts, or out of this machine.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make this machine a Kubernetes node: node and agent in one process.
    ///
    /// With a kubeconfig (--kubeconfig, --bootstrap-kubeconfig or KUBECONFIG) it joins that cluster; without one it
    /// runs the pods whose manifests lie in --static-pod-dir. On SIGTERM it stops and leaves the pods running;
    /// the next start takes them over as they are.
    #[command(after_help = "Examples:
  moxlet up --static-pod-dir /etc/moxlet/pods           no cluster: run pods from a folder
  moxlet up --bootstrap-kubeconfig join.kubeconfig      join a cluster with a bootstrap token
  moxlet up --config /etc/moxlet/moxlet.toml            everything from a file (docs/configuration.md)")]
    Up(UpArgs),
    /// Run the CRI runtime alone, on a unix socket: for crictl, or for an ordinary kubelet.
    Agent(CommonArgs),
    /// Pull, list, tag, pin, mount and remove images, by the agent of this host or in a store of your own.
    Image(Box<ImageArgs>),
}

/// What every program of Moxlet takes.
#[derive(Debug, Args, Default)]
pub(crate) struct CommonArgs {
    /// Configuration file (TOML). A key that it does not know is an error.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Everything that Moxlet keeps lies below this directory [default: /var/lib/moxlet]
    #[arg(long, value_name = "DIR")]
    pub(crate) root_dir: Option<PathBuf>,
    /// Where the CRI socket is served [default: run/agent.sock below the root directory]
    #[arg(long, value_name = "PATH")]
    pub(crate) cri_socket: Option<PathBuf>,
    /// A registry (host or host:port) that is spoken to without TLS; may be given several times
    #[arg(long = "plain-http-registry", value_name = "HOST")]
    pub(crate) plain_http_registries: Vec<String>,
    /// Also stop the pods when Moxlet is stopped (otherwise they keep running)
    #[arg(long)]
    pub(crate) stop_pods: bool,
    /// How log lines look
    #[arg(long, value_enum)]
    pub(crate) log_format: Option<LogFormat>,
    /// What is logged: error, warn, info, debug, trace, or a filter like `info,moxlet_agent=debug`
    #[arg(long, value_name = "FILTER", env = "MOXLET_LOG")]
    pub(crate) log: Option<String>,
}

/// What `moxlet up` takes on top.
#[derive(Debug, Args, Default)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    pub(crate) common: CommonArgs,
    /// Name of the Node object [default: this machine's host name]
    #[arg(long, value_name = "NAME")]
    pub(crate) node_name: Option<String>,
    /// A kubeconfig that holds a node's identity
    #[arg(long, value_name = "FILE", env = "KUBECONFIG")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// A kubeconfig with a bootstrap token: Moxlet asks for a certificate of its own with it, once
    #[arg(long, value_name = "FILE")]
    pub(crate) bootstrap_kubeconfig: Option<PathBuf>,
    /// Folder of pod manifests (YAML or JSON) to run on this machine, with or without a cluster
    #[arg(long, value_name = "DIR")]
    pub(crate) static_pod_dir: Option<PathBuf>,
    /// Address and port of the kubelet API [default: 0.0.0.0:10250]
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) listen: Option<std::net::SocketAddr>,
    /// The node's address, where the machine has several
    #[arg(long, value_name = "IP")]
    pub(crate) node_ip: Option<IpAddr>,
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

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Cli;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
