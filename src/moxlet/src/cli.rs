//! The command line: what a newcomer reads with `--help`.
//!
//! What a flag does to its key in the configuration file is in `docs/configuration.md`, with all keys.

use std::{
    ffi::OsString,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, parser::ValueSource};

use moxlet_cri::link::Endpoint;

use crate::{
    cli_docs::{CompletionArgs, ManArgs},
    image::ImageArgs,
    pods::{EventsArgs, ExecArgs, InspectArgs, LogsArgs, PodsArgs},
};

/// Pods as LXC containers: one Kubernetes node out of Proxmox hosts, or out of this machine.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
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
        let program = ["up", "node"].into_iter().find_map(|name| matches.subcommand_matches(name));
        let source = program.and_then(|p| p.value_source("kubeconfig"));
        let mut cli = Self::from_arg_matches_mut(&mut matches).map_err(|e| e.format(&mut Self::command()))?;
        match &mut cli.command {
            Command::Up(UpArgs { kubelet, .. }) | Command::Node(NodeArgs { kubelet, .. }) => {
                kubelet.kubeconfig_source = source;
            }
            _ => {}
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
    /// Run the node alone: a kubelet whose pods run on the host of an agent, here or on another machine.
    ///
    /// With an agent on another machine it needs no root and none of what runs pods. Run one node for an agent.
    #[command(after_help = "Examples:
  moxlet node --config /etc/moxlet/node.toml                          everything from a file (docs/configuration.md)
  moxlet node --agent-endpoint unix:///var/lib/moxlet/run/agent.sock  the agent of this host
  moxlet node --agent-endpoint https://pve1.example:10353 …           another's, with link_certificate_file and the like in the file")]
    Node(NodeArgs),
    /// Run the agent alone: the CRI runtime of a host, for a node (here or on another machine), crictl, or an ordinary kubelet.
    Agent(AgentArgs),
    /// Make the certificates by which a node and agents on other machines know one another.
    ///
    /// They are an authority, one certificate for the node and one for each agent. Run again, it keeps what is there, adds agents
    /// and renews what ends within 90 days. Running programs take renewed files up by themselves.
    #[command(after_help = "Example:
  moxlet certificates --dir /etc/moxlet/link --agent pve1,10.0.0.11 --agent pve2,10.0.0.12")]
    Certificates(CertificatesArgs),
    /// Judge a configuration file and all that it names, without starting anything. Ends with status 1 where something is wrong.
    CheckConfig(CheckConfigArgs),
    /// List the pods of this host, as `kubectl get pods` does.
    Pods(PodsArgs),
    /// Print a container's log.
    Logs(LogsArgs),
    /// Run a command in a running container; its exit status is this one's.
    #[command(after_help = "Examples:
  moxlet exec web -- nginx -t                  in the only container, or the first that runs
  moxlet exec -it default/web -c main -- sh    a shell with a terminal")]
    Exec(ExecArgs),
    /// Show all that is known of pods, containers and images of this host, as JSON.
    Inspect(InspectArgs),
    /// Show what happened to the pods of this host.
    Events(EventsArgs),
    /// Pull, list, tag, pin, mount and remove images, by the agent of this host or in a store of your own.
    Image(Box<ImageArgs>),
    /// Take from this host what Moxlet made on it: bridge, masquerading, ip_forward, mounts, and files if asked for.
    ///
    /// It is refused while Moxlet runs or a pod is left, says of each thing whether it is gone, and can be run again.
    Uninstall(UninstallArgs),
    /// Print the script by which a shell completes this command line.
    #[command(after_help = "Example:
  moxlet completion bash > /etc/bash_completion.d/moxlet")]
    Completion(CompletionArgs),
    /// Write the man pages of this command line into a directory.
    #[command(hide = true)]
    Man(ManArgs),
}

/// What `moxlet uninstall` takes.
#[derive(Debug, Args, Default)]
pub(crate) struct UninstallArgs {
    #[command(flatten)]
    pub(crate) host: HostArgs,
    /// Also delete the root directory: images on OverlayFS, logs, keys. A ZFS dataset is left
    #[arg(long)]
    pub(crate) delete_files: bool,
}

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

/// What `moxlet certificates` takes.
#[derive(Debug, Args)]
pub(crate) struct CertificatesArgs {
    /// Where they are written; keep it: it holds the authority's key
    #[arg(long, value_name = "DIR", default_value = "/etc/moxlet/link")]
    pub(crate) dir: PathBuf,
    /// The names and addresses by which the node reaches an agent; its files are named after the first. May be given several times
    #[arg(long = "agent", value_name = "NAME[,NAME…]")]
    pub(crate) agents: Vec<String>,
    /// How long node's and agents' certificates last, in days
    #[arg(long, value_name = "N", default_value_t = 825, value_parser = clap::value_parser!(u32).range(91..=3650))]
    pub(crate) days: u32,
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

/// What `moxlet check-config` takes.
#[derive(Debug, Args)]
pub(crate) struct CheckConfigArgs {
    /// The configuration file (TOML)
    #[arg(long, value_name = "FILE", default_value = "/etc/moxlet/moxlet.toml")]
    pub(crate) config: PathBuf,
    /// The program that shall read it [default: node and agent for a file with agent_endpoint and agent_listen, else up]
    #[arg(long = "for", value_name = "PROGRAM", value_enum)]
    pub(crate) programs: Vec<Program>,
}

/// A program that reads a configuration file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Program {
    Up,
    Node,
    Agent,
}

impl Program {
    /// Its name, as a subcommand of `moxlet`.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Node => "node",
            Self::Agent => "agent",
        }
    }
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
        for program in ["up", "node"] {
            for words in
                [&["moxlet", program, "--kubeconfig", "/k"][..], &["moxlet", program, "--kubeconfig=/k"]]
            {
                let command = Cli::read(words).unwrap().command;
                let (Command::Up(UpArgs { kubelet, .. }) | Command::Node(NodeArgs { kubelet, .. })) = command
                else {
                    panic!("{words:?}")
                };
                assert_eq!(kubelet.kubeconfig_source, Some(ValueSource::CommandLine));
            }
            assert!(Cli::read(["moxlet", program, "--kubeconfigs=/k"]).is_err());
        }
    }

    #[test]
    fn an_endpoint_that_is_none_is_refused_at_once() {
        let error = Cli::read(["moxlet", "node", "--agent-endpoint", "pve1:10353"]).unwrap_err().to_string();
        assert!(error.contains("https://HOST:PORT"), "{error}");
    }
}
