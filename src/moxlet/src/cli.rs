//! The command line: what a newcomer reads with `--help`.
//!
//! What a flag does to its key in the configuration file is in `docs/configuration.md`, with all keys.

use std::{ffi::OsString, net::IpAddr, path::PathBuf};

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, parser::ValueSource};

use crate::image::ImageArgs;

/// Pods as LXC containers: one Kubernetes node out of Proxmox hosts, or out of this machine.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// Reads a command line, and where the values came from that may come from elsewhere.
    ///
    /// # Errors
    /// It is none, or asks for help.
    pub(crate) fn read<T: Into<OsString> + Clone>(
        words: impl IntoIterator<Item = T>,
    ) -> Result<Self, clap::Error> {
        let mut matches = Self::command().try_get_matches_from(words)?;
        let source = matches.subcommand_matches("up").and_then(|up| up.value_source("kubeconfig"));
        let mut cli = Self::from_arg_matches_mut(&mut matches).map_err(|e| e.format(&mut Self::command()))?;
        if let Command::Up(up) = &mut cli.command {
            up.kubeconfig_source = source;
        }
        Ok(cli)
    }
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
    /// Take from this host what Moxlet made on it: bridge, masquerading, ip_forward, mounts, and files if asked for.
    ///
    /// It is refused while Moxlet runs or a pod is left, says of each thing whether it is gone, and can be run again.
    Uninstall(UninstallArgs),
}

/// What `moxlet uninstall` takes.
#[derive(Debug, Args, Default)]
pub(crate) struct UninstallArgs {
    #[command(flatten)]
    pub(crate) common: CommonArgs,
    /// Also delete the root directory: images on OverlayFS, logs, keys. A ZFS dataset is left
    #[arg(long)]
    pub(crate) delete_files: bool,
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
    /// Whether that stood on the command line or in the environment.
    #[arg(skip)]
    pub(crate) kubeconfig_source: Option<ValueSource>,
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
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_kubeconfig_of_the_command_line_is_known_as_such() {
        for words in [&["moxlet", "up", "--kubeconfig", "/k"][..], &["moxlet", "up", "--kubeconfig=/k"]] {
            let Command::Up(up) = Cli::read(words).unwrap().command else { panic!("{words:?}") };
            assert_eq!(up.kubeconfig_source, Some(ValueSource::CommandLine));
        }
        assert!(Cli::read(["moxlet", "up", "--kubeconfigs=/k"]).is_err());
    }
}
