//! The command line: what a newcomer reads with `--help`. What each verb takes stands in the verb's own file.

use std::ffi::OsString;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::{
    args::{AgentArgs, NodeArgs, UpArgs},
    certificates::CertificatesArgs,
    check_config::CheckConfigArgs,
    cli_docs::{CompletionArgs, ManArgs},
    image::ImageArgs,
    pods::{EventsArgs, ExecArgs, InspectArgs, LogsArgs, PodsArgs},
    uninstall::UninstallArgs,
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use clap::parser::ValueSource;

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
