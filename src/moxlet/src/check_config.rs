//! `moxlet check-config`: judges a configuration file and all that it names, and starts nothing. What the machine itself lacks is
//! another matter, which a start says.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::{
    args::{AgentArgs, HostArgs, NodeArgs, ProgramArgs, UpArgs},
    config::{Config, Engine, Role},
    preflight,
};

/// The largest file that is looked into, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// What `moxlet check-config` takes.
#[derive(Debug, Args)]
pub(crate) struct CheckConfigArgs {
    /// The configuration file (TOML)
    #[arg(long, value_name = "FILE", default_value = "/etc/moxlet/moxlet.toml")]
    config: PathBuf,
    /// The program that shall read it [default: node and agent for a file with agent_endpoint and agent_listen, else up]
    #[arg(long = "for", value_name = "PROGRAM", value_enum)]
    programs: Vec<Program>,
}

/// A program that reads a configuration file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Program {
    Up,
    Node,
    Agent,
}

impl Program {
    const fn role(self) -> Role {
        match self {
            Self::Up => Role::Up,
            Self::Node => Role::Node,
            Self::Agent => Role::Agent,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Node => "node",
            Self::Agent => "agent",
        }
    }
}

/// Judges the file.
///
/// # Errors
/// Something is wrong; what it is has been printed.
pub(crate) fn main(args: &CheckConfigArgs) -> Result<()> {
    let config = Config::unchecked(&args.config)?;
    let programs = if args.programs.is_empty() { meant(&config) } else { args.programs.clone() };
    let mut count = 0;
    for program in programs {
        let wrongs = judge(&config, &args.config, program);
        if wrongs.is_empty() {
            println!("{}: nothing is wrong for `moxlet {}`", args.config.display(), program.name());
        }
        for wrong in &wrongs {
            eprintln!("moxlet {}: {wrong}", program.name());
        }
        count += wrongs.len();
    }
    match count {
        0 => Ok(()),
        1 => bail!("{}: one thing is wrong", args.config.display()),
        n => bail!("{}: {n} things are wrong", args.config.display()),
    }
}

/// The programs that a file is for which says nothing of it but its keys.
fn meant(config: &Config) -> Vec<Program> {
    let (node, agent) = (config.agent_endpoint.is_some(), config.agent_listen.is_some());
    let apart = [(node, Program::Node), (agent, Program::Agent)];
    let apart: Vec<_> = apart.into_iter().filter_map(|(is, program)| is.then_some(program)).collect();
    if apart.is_empty() { vec![Program::Up] } else { apart }
}

/// All that is wrong for a program.
fn judge(config: &Config, file: &Path, program: Program) -> Vec<String> {
    let role = program.role();
    let mut wrongs = config.wrongs(role);
    if let Err(error) = start_like(file, program)
        && wrongs.is_empty()
    {
        wrongs.push(moxlet_errors::chain(error.as_ref()));
    }
    if role != Role::Agent {
        look_into_the_nodes(config, &mut wrongs);
    }
    if role != Role::Node {
        look_into_the_agents(config, &mut wrongs);
    }
    if let Ok(Some(files)) = config.link_files()
        && role != Role::Up
    {
        wrongs.extend(files.check().err().map(|e| moxlet_errors::chain(&e)));
    }
    wrongs
}

/// Reads the file as the program would, so that the two never judge differently.
fn start_like(file: &Path, program: Program) -> Result<Config> {
    let program_args = ProgramArgs { config: Some(file.to_owned()), ..ProgramArgs::default() };
    match program {
        Program::Node => Config::node(&NodeArgs { program: program_args, ..NodeArgs::default() }),
        Program::Agent => {
            let host = HostArgs { program: program_args, ..HostArgs::default() };
            Config::agent(&AgentArgs { host, ..AgentArgs::default() })
        }
        Program::Up => {
            let host = HostArgs { program: program_args, ..HostArgs::default() };
            Config::up(&UpArgs { host, ..UpArgs::default() })
        }
    }
}

/// The node's files.
fn look_into_the_nodes(config: &Config, wrongs: &mut Vec<String>) {
    for (key, path) in [
        ("kubeconfig", &config.kubeconfig),
        ("bootstrap_kubeconfig", &config.bootstrap_kubeconfig),
        ("client_ca_file", &config.client_ca_file),
    ] {
        if let Some(path) = path.as_deref().filter(|p| p.exists()) {
            wrongs.extend(unreadable(key, path));
        }
    }
    if let Some(dir) = config.static_pod_dir.as_deref().filter(|d| d.exists()) {
        wrongs.extend(no_directory("static_pod_dir", dir));
    }
}

/// The agent's files.
fn look_into_the_agents(config: &Config, wrongs: &mut Vec<String>) {
    if let Some(path) = config.init_binary.as_deref().filter(|p| p.exists()) {
        let runs = std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
        if !runs {
            wrongs.push(format!("init_binary: {} is not an executable file", path.display()));
        }
    }
    if let Some(path) = config.docker_config.as_deref().filter(|p| p.exists()) {
        wrongs.extend(unreadable("docker_config", path));
        if let Ok(bytes) = moxlet_files::read_bounded(path, MAX_FILE)
            && let Err(error) = moxlet_image::Keyring::from_docker_config(&bytes)
        {
            wrongs.push(format!("docker_config: {}: {}", path.display(), moxlet_errors::chain(&error)));
        }
    }
    if let Some(dir) = config.registry_config_dir.as_deref().filter(|d| d.exists()) {
        let all = moxlet_image::check_registry_config(dir);
        wrongs.extend(all.iter().map(|e| format!("registry_config_dir: {}", moxlet_errors::chain(e))));
    }
    if let Some(dir) = config.cni_conf_dir.as_deref().filter(|d| d.exists()) {
        wrongs.extend(no_directory("cni_conf_dir", dir));
    }
    if config.engine == Engine::Lxc {
        wrongs.extend(preflight::plugins(&config.cni_bin_dirs, config.cni_conf_dir.is_none()));
    }
    if config.engine == Engine::Pve {
        let token = config.pve.clone().unwrap_or_default().token_file;
        if token.exists() {
            wrongs.extend(open_to_all("pve.token_file", &token));
            wrongs.extend(unreadable("pve.token_file", &token));
        }
    }
}

/// A file that cannot be read as text within the bound.
fn unreadable(key: &str, path: &Path) -> Option<String> {
    let error = moxlet_files::read_text_bounded(path, MAX_FILE).err()?;
    Some(format!("{key}: {} cannot be read: {error}", path.display()))
}

fn no_directory(key: &str, path: &Path) -> Option<String> {
    let error = std::fs::read_dir(path).err()?;
    Some(format!("{key}: {} cannot be listed: {error}", path.display()))
}

/// A secret that every user of the host can read.
fn open_to_all(key: &str, path: &Path) -> Option<String> {
    let mode = std::fs::metadata(path).ok()?.permissions().mode() & 0o777;
    (mode & 0o007 != 0).then(|| {
        format!(
            "{key}: {} has mode {mode:04o}, which lets every user of this host at it: chmod 0600 it",
            path.display()
        )
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn wrongs(text: &str, program: Program) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("moxlet.toml");
        std::fs::write(&file, text.replace("DIR", &dir.path().display().to_string())).unwrap();
        for plugin in ["bridge", "host-local", "loopback"] {
            std::fs::write(dir.path().join(plugin), "").unwrap();
        }
        std::fs::write(dir.path().join("broken.json"), "{\"auths\": 3}").unwrap();
        std::fs::create_dir_all(dir.path().join("certs.d/r.example")).unwrap();
        std::fs::write(dir.path().join("certs.d/r.example/hosts.toml"), "servr = \"https://r\"\n").unwrap();
        judge(&Config::unchecked(&file).unwrap(), &file, program)
    }

    #[test]
    fn a_file_in_which_nothing_is_wrong_passes() {
        assert_eq!(wrongs("cni_bin_dirs = [\"DIR\"]\n", Program::Up), Vec::<String>::new());
    }

    #[test]
    fn what_the_file_names_is_looked_into() {
        let text = "cni_bin_dirs = [\"/nonexistent\"]\ndocker_config = \"DIR/broken.json\"\ninit_binary = \"DIR/broken.json\"\n\
                    registry_config_dir = \"DIR/certs.d\"\nmax_pods = 0\n";
        let all = wrongs(text, Program::Up).join("\n");
        for part in
            ["plugin loopback", "docker_config: ", "init_binary: ", "r.example/hosts.toml", "max_pods"]
        {
            assert!(all.contains(part), "{part} is not in {all}");
        }
        let node = wrongs(text, Program::Node);
        assert_eq!(node, ["max_pods must be at least 1"]);
    }

    #[test]
    fn a_file_is_for_the_programs_whose_keys_it_has() {
        let config = |node: bool, agent: bool| Config {
            agent_endpoint: node.then(|| "https://a:1".parse().unwrap()),
            agent_listen: agent.then(|| "[::]:1".parse().unwrap()),
            ..Config::default()
        };
        assert_eq!(meant(&config(false, false)), [Program::Up]);
        assert_eq!(meant(&config(true, true)), [Program::Node, Program::Agent]);
        assert_eq!(meant(&config(false, true)), [Program::Agent]);
    }
}
