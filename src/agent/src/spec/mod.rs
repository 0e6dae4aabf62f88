//! The OCI runtime spec of a container, from a CRI request and the image's configuration, as containerd makes it.
//!
//! Network, IPC, UTS and user namespace are the CT's own; mount, cgroup and (unless the pod shares it) PID namespace are
//! made anew in it. What only a host could give is refused by name.

mod capabilities;
mod mounts;
mod resources;
mod seccomp;
#[cfg(test)]
mod tests;
mod user;

pub(crate) use mounts::target;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use moxlet_cri::{
    paths,
    v1::{self, NamespaceMode, security_profile::ProfileType},
};
use moxlet_ids::ContainerId;
use moxlet_image::ImageConfig;
use moxlet_storage::IdMap;
use oci_spec::{
    OciSpecError,
    runtime::{
        Capabilities, Capability, Linux, LinuxCapabilitiesBuilder, LinuxNamespace, LinuxNamespaceBuilder,
        LinuxNamespaceType, LinuxSeccomp, Process, RootBuilder, Spec, UserBuilder,
    },
};

use crate::error::{Error, Result};

/// Where programs are looked for if neither image nor request says.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Of arguments and environment together; the kernel's own bound is below.
const MAX_TEXT: usize = 4 << 20;

/// A mount whose source is already to be seen in the CT.
#[derive(Debug, Clone, Default)]
pub(crate) struct ResolvedMount {
    /// Its source as seen in the CT.
    pub(crate) source_ct: String,
    /// Where it appears in the container.
    pub(crate) target: String,
    /// Read-only.
    pub(crate) read_only: bool,
    /// With the mounts below the source.
    pub(crate) recursive: bool,
    /// No program in it is ever executed and no device opened.
    pub(crate) data: bool,
}

/// What a spec is made from.
pub(crate) struct SpecInput<'a> {
    /// The container.
    pub(crate) container_id: &'a ContainerId,
    /// The request.
    pub(crate) config: &'a v1::ContainerConfig,
    /// Its sandbox's request.
    pub(crate) sandbox: &'a v1::PodSandboxConfig,
    /// The image's configuration.
    pub(crate) image: &'a ImageConfig,
    /// The mounted root on the host, to read `etc/passwd` and `etc/group` in it.
    pub(crate) rootfs_host: &'a Path,
    /// The root as seen in the CT.
    pub(crate) rootfs_ct: &'a str,
    /// All mounts besides the standard ones.
    pub(crate) mounts: &'a [ResolvedMount],
    /// The container's cgroup as seen in the CT.
    pub(crate) cgroup_path: Option<&'a str>,
    /// On v1 the host sets the limits and the spec has none.
    pub(crate) cgroup_v1: bool,
    /// The pod's host name.
    pub(crate) hostname: &'a str,
    /// The CT's ids.
    pub(crate) map: IdMap,
}

/// Makes the spec.
pub(crate) fn build(input: &SpecInput<'_>) -> Result<Spec> {
    let config = input.config;
    let linux = config.linux.clone().unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    refuse(&security)?;
    mounts::refuse(config)?;
    let capabilities = capabilities::of(security.capabilities.as_ref())?;
    let process = process(input, &security, &capabilities)?;
    let mut part = Linux::default();
    // What a request does not ask for is not to be the crate's idea of a container.
    part.set_resources(None)
        .set_namespaces(Some(namespaces(&security)?))
        .set_masked_paths(Some(mounts::paths(&security.masked_paths, &paths::MASKED)?))
        .set_readonly_paths(Some(mounts::paths(&security.readonly_paths, &paths::READ_ONLY)?))
        .set_cgroups_path(input.cgroup_path.map(PathBuf::from))
        .set_seccomp(seccomp_profile(&security, &capabilities)?);
    let resources = resources::of(linux.resources.as_ref())?;
    if !input.cgroup_v1 {
        part.set_resources(resources);
    }
    let root = oci(RootBuilder::default().path(input.rootfs_ct).readonly(security.readonly_rootfs).build())?;
    let mut spec = Spec::default();
    spec.set_version("1.2.0".to_owned())
        // It would need a UTS namespace of the container's own, and the CT's has it.
        .set_hostname(None)
        .set_root(Some(root))
        .set_process(Some(process))
        .set_mounts(Some(mounts::all(input.mounts)?))
        .set_linux(Some(part))
        .set_annotations(Some(annotations(input)));
    Ok(spec)
}

/// A structure of the specification, with our error.
fn oci<T>(built: std::result::Result<T, OciSpecError>) -> Result<T> {
    built.map_err(|e| Error::Invalid(format!("the container's OCI spec: {e}")))
}

/// What of a security context no container of a CT can have.
fn refuse(security: &v1::LinuxContainerSecurityContext) -> Result<()> {
    if security.privileged {
        return Err(Error::Refused(
            "privileged container: a CT has no privileges of the host to give".into(),
        ));
    }
    #[allow(deprecated)]
    let named = security.apparmor_profile.starts_with("localhost/");
    if named || security.apparmor.as_ref().is_some_and(|p| p.profile_type() == ProfileType::Localhost) {
        return Err(Error::Refused("an AppArmor profile of the host".into()));
    }
    if security.selinux_options.as_ref().is_some_and(|o| *o != v1::SeLinuxOption::default()) {
        return Err(Error::Refused("SELinux options".into()));
    }
    Ok(())
}

fn process(
    input: &SpecInput<'_>,
    security: &v1::LinuxContainerSecurityContext,
    capabilities: &[String],
) -> Result<Process> {
    let config = input.config;
    let user = user::resolve(config, &input.image.user, input.rootfs_host, input.map)?;
    let user = oci(UserBuilder::default().uid(user.uid).gid(user.gid).additional_gids(user.groups).build())?;
    let known = |name: &String| {
        // The crate reads them without the prefix that it writes.
        let plain = name.strip_prefix("CAP_").unwrap_or(name);
        plain.parse::<Capability>().map_err(|_| Error::Invalid(format!("unknown capability {name:?}")))
    };
    let all = capabilities.iter().map(known).collect::<Result<Capabilities>>()?;
    let sets = LinuxCapabilitiesBuilder::default()
        .bounding(all.clone())
        .effective(all.clone())
        .permitted(all)
        .inheritable(Capabilities::new())
        .ambient(Capabilities::new());
    let mut process = Process::default();
    process
        .set_terminal(Some(config.tty))
        .set_args(Some(args(input)?))
        .set_env(Some(env(input)?))
        .set_cwd(PathBuf::from(cwd(input)?))
        .set_user(user)
        .set_capabilities(Some(oci(sets.build())?))
        .set_no_new_privileges(Some(security.no_new_privs))
        // Those of the CT.
        .set_rlimits(None);
    Ok(process)
}

fn annotations(input: &SpecInput<'_>) -> HashMap<String, String> {
    let sandbox = input.sandbox.metadata.clone().unwrap_or_default();
    let name = input.config.metadata.as_ref().map_or("", |m| m.name.as_str());
    [
        ("io.kubernetes.cri.container-type", "container"),
        ("io.kubernetes.cri.container-name", name),
        ("io.kubernetes.cri.sandbox-name", &sandbox.name),
        ("io.kubernetes.cri.sandbox-namespace", &sandbox.namespace),
        ("io.kubernetes.cri.sandbox-uid", &sandbox.uid),
        ("dev.moxlet/container-id", input.container_id.as_str()),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

/// The request's command replaces the image's entry point and its arguments; its args only the latter.
fn args(input: &SpecInput<'_>) -> Result<Vec<String>> {
    let image = input.image;
    let mut command = input.config.command.clone();
    let mut args = input.config.args.clone();
    if command.is_empty() {
        if args.is_empty() {
            args.clone_from(&image.cmd);
        }
        command.clone_from(&image.entrypoint);
        // So images take back the entry point of the image that they build on.
        if command == [""] {
            command.clear();
        }
    }
    command.append(&mut args);
    if command.is_empty() {
        return Err(Error::Invalid("no command specified".to_owned()));
    }
    plain("an argument", command.iter().map(String::as_str))?;
    Ok(command)
}

fn env(input: &SpecInput<'_>) -> Result<Vec<String>> {
    let mut all: Vec<(String, String)> = vec![("PATH".into(), PATH.into())];
    let mut places = std::collections::HashMap::from([("PATH".to_owned(), 0)]);
    let mut set = |key: &str, value: String| match places.get(key) {
        Some(place) => {
            let pair: &mut (String, String) = &mut all[*place];
            pair.1 = value;
        }
        None => {
            places.insert(key.to_owned(), all.len());
            all.push((key.to_owned(), value));
        }
    };
    if input.config.tty {
        set("TERM", "xterm".to_owned());
    }
    set("HOSTNAME", input.hostname.to_owned());
    for pair in &input.image.env {
        match pair.split_once('=') {
            Some((key, value)) if !key.is_empty() => set(key, value.to_owned()),
            _ => {}
        }
    }
    for pair in &input.config.envs {
        if pair.key.is_empty() || pair.key.contains('=') {
            return Err(Error::Invalid(format!("{:?} is no name of an environment variable", pair.key)));
        }
        let value = std::str::from_utf8(&pair.value)
            .map_err(|_| Error::Refused(format!("environment variable {}, which is not UTF-8", pair.key)))?;
        set(&pair.key, value.to_owned());
    }
    plain("an environment variable", all.iter().flat_map(|(k, v)| [k.as_str(), v.as_str()]))?;
    Ok(all.into_iter().map(|(key, value)| format!("{key}={value}")).collect())
}

fn plain<'a>(what: &str, texts: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut sum = 0;
    for text in texts {
        if text.contains('\0') {
            return Err(Error::Invalid(format!("{what} contains a NUL byte")));
        }
        sum += text.len();
    }
    if sum > MAX_TEXT {
        Err(Error::Invalid(format!("{what}: more than {MAX_TEXT} bytes in all")))
    } else {
        Ok(())
    }
}

fn cwd(input: &SpecInput<'_>) -> Result<String> {
    let asked = [&input.config.working_dir, &input.image.working_dir];
    asked
        .into_iter()
        .find(|dir| !dir.is_empty())
        .map_or_else(|| Ok("/".to_owned()), |dir| mounts::target(dir))
}

/// Namespaces of the container's own. Without one of process ids it is in that of the pod, which is the CT's.
fn namespaces(security: &v1::LinuxContainerSecurityContext) -> Result<Vec<LinuxNamespace>> {
    // CRI's default is the pod's for each; a kubelet always says which.
    let options = security.namespace_options.clone().unwrap_or_default();
    for (what, mode) in [("network", options.network()), ("PID", options.pid()), ("IPC", options.ipc())] {
        if mode == NamespaceMode::Node {
            return Err(Error::Refused(format!("the host's {what} namespace: a CT has its own")));
        }
    }
    let mut kinds = vec![LinuxNamespaceType::Mount, LinuxNamespaceType::Cgroup];
    match options.pid() {
        NamespaceMode::Target => {
            return Err(Error::Refused("the PID namespace of another container".into()));
        }
        NamespaceMode::Pod => {}
        _ => kinds.push(LinuxNamespaceType::Pid),
    }
    kinds.into_iter().map(|kind| oci(LinuxNamespaceBuilder::default().typ(kind).build())).collect()
}

fn seccomp_profile(
    security: &v1::LinuxContainerSecurityContext,
    caps: &[String],
) -> Result<Option<LinuxSeccomp>> {
    let refused = |name: &str| Err(Error::Refused(format!("seccomp profile {name:?} of the host")));
    if let Some(profile) = &security.seccomp {
        return match profile.profile_type() {
            ProfileType::RuntimeDefault => seccomp::runtime_default(caps).map(Some),
            ProfileType::Unconfined => Ok(None),
            ProfileType::Localhost => refused(&profile.localhost_ref),
        };
    }
    #[allow(deprecated)]
    match security.seccomp_profile_path.as_str() {
        "" | "unconfined" => Ok(None),
        "runtime/default" | "docker/default" => seccomp::runtime_default(caps).map(Some),
        other => refused(other),
    }
}
