//! What a configuration may say, what is refused, and that the reference knows every key.
#![allow(clippy::unwrap_used, clippy::expect_used)]
use std::io::Write;

use super::*;

/// The configuration of a program whose file holds that.
fn load_as(role: Role, text: &str) -> Result<Config> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let program = ProgramArgs { config: Some(file.path().to_owned()), ..ProgramArgs::default() };
    match role {
        Role::Node => Config::node(&NodeArgs { program, ..NodeArgs::default() }),
        Role::Agent => {
            let host = HostArgs { program, ..HostArgs::default() };
            Config::agent(&AgentArgs { host, ..AgentArgs::default() })
        }
        Role::Up => {
            let host = HostArgs { program, ..HostArgs::default() };
            Config::up(&UpArgs { host, ..UpArgs::default() })
        }
    }
}

fn load(text: &str) -> Result<Config> {
    load_as(Role::Up, text)
}

#[test]
fn a_link_needs_all_of_its_certificates_and_two_programs() {
    let files = "link_certificate_file = \"/c\"\nlink_key_file = \"/k\"\nlink_ca_file = \"/a\"\n";
    let (listen, remote) = ("agent_listen = \"[::]:10353\"\n", "agent_endpoint = \"https://pve1:10353\"\n");
    assert!(load_as(Role::Agent, &format!("{listen}{files}")).unwrap().link_files().unwrap().is_some());
    assert_eq!(
        load_as(Role::Node, &format!("{remote}{files}")).unwrap().agent_endpoint().to_string(),
        "https://pve1:10353"
    );
    let both = format!("{listen}{remote}{files}");
    for (role, text, word) in [
        (Role::Agent, listen.to_owned(), "moxlet certificates"),
        (Role::Node, remote.to_owned(), "moxlet certificates"),
        (Role::Node, format!("{remote}link_ca_file = \"/a\""), "all three"),
        (Role::Up, both.clone(), "one process"),
        (Role::Up, files.to_owned(), "one process"),
        (Role::Agent, files.to_owned(), "agent_listen"),
        (Role::Node, files.to_owned(), "agent_endpoint"),
        (Role::Node, "agent_endpoint = \"pve1:10353\"".to_owned(), "https://HOST:PORT"),
    ] {
        let error = load_as(role, &text).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    let own = load_as(Role::Node, "root_dir = \"/r\"").unwrap().agent_endpoint();
    assert_eq!(own.to_string(), "unix:///r/run/agent.sock");
}

#[test]
fn each_program_reads_the_keys_that_are_its_own() {
    let (agents, nodes) = ("docker_config = \"/nonexistent\"", "client_ca_file = \"/nonexistent\"");
    assert!(load_as(Role::Node, agents).is_ok() && load_as(Role::Agent, agents).is_err());
    assert!(load_as(Role::Agent, nodes).is_ok() && load_as(Role::Node, nodes).is_err());
    assert!(load(agents).is_err() && load(nodes).is_err());
}

#[test]
fn an_empty_file_gives_the_defaults() {
    assert_eq!(load("").unwrap().listen.port(), 10250);
}

#[test]
fn a_file_that_is_too_large_is_refused_also_where_it_has_no_size() {
    let line = "# a comment of 32 bytes for once\n";
    let error = load(&line.repeat(40_000)).unwrap_err();
    assert!(moxlet_errors::chain(error.as_ref()).contains("1048576 bytes"), "{error:#}");
    let error = read::read("/dev/zero".as_ref()).unwrap_err();
    let error = moxlet_errors::chain(error.as_ref());
    assert!(error.contains("/dev/zero") && error.contains("1048576 bytes"), "{error}");
}

#[test]
fn the_environments_kubeconfig_gives_way_to_what_is_said_to_moxlet_itself() {
    let mut up = KubeletArgs { kubeconfig: Some("/env".into()), ..KubeletArgs::default() };
    up.kubeconfig_source = Some(ValueSource::EnvVariable);
    let over = |config: &Config, up: &KubeletArgs| {
        let mut config = config.clone();
        config.override_kubelet(up);
        config.kubeconfig
    };
    let (nothing, mut file) = (Config::default(), Config::default());
    assert_eq!(over(&nothing, &up), Some("/env".into()));
    file.kubeconfig = Some("/file".into());
    assert_eq!(over(&file, &up), Some("/file".into()));
    up.kubeconfig_source = Some(ValueSource::CommandLine);
    assert_eq!(over(&file, &up), Some("/env".into()));
    up.kubeconfig_source = Some(ValueSource::EnvVariable);
    up.bootstrap_kubeconfig = Some("/join".into());
    assert_eq!(over(&nothing, &up), None, "a bootstrap's identity is kept elsewhere");
}

#[test]
fn an_unknown_key_is_named_with_its_line() {
    let error = load("max_pods = 10\n\nmax_podz = 11\n").unwrap_err().to_string();
    assert!(error.contains("line 3: unknown key \"max_podz\"; did you mean \"max_pods\"?"), "{error}");
    let error = load("[pve]\nstorag = \"x\"\nmax_pods = 3\n").unwrap_err().to_string();
    assert!(
        error.contains("line 2: unknown key \"storag\" in section [pve]; did you mean \"storage\"?"),
        "{error}"
    );
    assert!(
        error.contains("line 3: unknown key \"max_pods\" in section [pve]; it is a key of the whole file"),
        "{error}"
    );
    let error = load("vlan = 3\n").unwrap_err().to_string();
    assert!(error.contains("[pve] has that key"), "{error}");
}

#[test]
fn a_value_of_the_wrong_type_is_named_with_its_line() {
    let error = load("root_dir = \"/x\"\nmax_pods = \"many\"\n").unwrap_err().to_string();
    assert!(
        error.contains(
            "line 2: max_pods: found string \"many\"; right is a whole number from 0 to 4294967295"
        ),
        "{error}"
    );
    for (text, words) in [
        (
            "storage = \"zfss\"",
            "storage: found \"zfss\"; right is one of overlay, zfs; did you mean \"zfs\"?",
        ),
        ("listen = \"everywhere\"", "listen: found \"everywhere\"; "),
        (
            "container_log_max_bytes = \"10MB\"",
            "container_log_max_bytes: \"10MB\" is not a size in bytes, such as 10485760 or \"10Mi\"",
        ),
        (
            "container_log_max_bytes = true",
            "container_log_max_bytes: found boolean `true`; right is a size in bytes",
        ),
        ("image_maximum_gc_age = 90", "image_maximum_gc_age: found integer `90`; right is a span of time"),
        ("stop_pods = \"yes\"", "stop_pods: found string \"yes\"; right is true or false"),
        (
            "[node_labels]\nmax_pods = 10",
            "\"max_pods\" is a key of the whole file: it belongs above the first section",
        ),
        (
            "[pve]\nvlan = \"a\"",
            "line 2: pve.vlan: found string \"a\"; right is a whole number from 0 to 65535",
        ),
        ("bridge = ", "line 1: "),
    ] {
        let error = load(text).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn sizes_are_given_as_numbers_or_as_quantities() {
    let config = load("container_root_quota = \"10Gi\"\ncontainer_log_max_bytes = 1048576\nsystem_reserved_memory_bytes = \"512Mi\"").unwrap();
    assert_eq!(config.container_root_quota, Some(Bytes(10 << 30)));
    assert_eq!(
        (config.container_log_max_bytes, config.system_reserved_memory_bytes),
        (Bytes(1 << 20), Some(Bytes(512 << 20)))
    );
}

#[test]
fn a_log_filter_that_silences_everything_is_refused() {
    let error = load("log = \"inof\"").unwrap_err().to_string();
    assert!(error.contains("log: \"inof\"") && error.contains("did you mean \"info\"?"), "{error}");
}

#[test]
fn all_that_is_wrong_is_said_at_once() {
    let error = load("max_pods = 0\nlog = \"inof\"\ncontainer_log_max_files = 1").unwrap_err().to_string();
    for key in ["max_pods", "log", "container_log_max_files"] {
        assert!(error.contains(key), "{key} is not in {error}");
    }
}

#[test]
fn the_bridge_of_proxmox_is_not_the_bridge_of_lxc() {
    let error = load("engine = \"pve\"\nbridge = \"vmbr0\"").unwrap_err().to_string();
    assert!(error.contains("pve.bridge"), "{error}");
}

#[test]
fn a_file_that_does_not_exist_is_named_with_its_key() {
    for key in ["client_ca_file", "docker_config", "registry_config_dir"] {
        let error = load(&format!("{key} = \"/nonexistent/file\"")).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains("/nonexistent/file"), "{error}");
    }
}

#[test]
fn a_store_on_zfs_needs_its_dataset_and_only_that_one_does() {
    let error = load("storage = \"zfs\"").unwrap_err().to_string();
    assert!(error.contains("zfs_dataset"), "{error}");
    let error = load("zfs_dataset = \"rpool/moxlet\"").unwrap_err().to_string();
    assert!(error.contains("storage"), "{error}");
    let config = load("storage = \"zfs\"\nzfs_dataset = \"rpool/moxlet\"\n").unwrap();
    assert_eq!((config.storage, config.zfs_dataset.as_deref()), (Storage::Zfs, Some("rpool/moxlet")));
    let error = load("container_root_quota = 0").unwrap_err().to_string();
    assert!(error.contains("container_root_quota"), "{error}");
}

#[test]
fn the_reference_lists_every_key() {
    let reference = include_str!("../../../../docs/configuration.md");
    let source = include_str!("../config.rs");
    let (_, body) = source.split_once("pub(crate) struct Config {").unwrap();
    let (body, _) = body.split_once("\n}\n").unwrap();
    for line in body.lines().filter_map(|l| l.trim().strip_prefix("pub(crate) ")) {
        let key = line.split(':').next().unwrap();
        assert!(reference.contains(&format!("| `{key}` |")), "docs/configuration.md does not list {key}");
    }
}
