//! The crate's error: one variant an operation.

use std::{io, path::PathBuf};

/// Result with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong when a pod is attached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no usable network configuration.
    #[error("no usable CNI configuration in {}: {reason}", dir.display())]
    NoConfig {
        /// Where one was looked for.
        dir: PathBuf,
        /// What was found instead.
        reason: String,
    },
    /// A configuration file is not what the CNI specification asks for.
    #[error("the CNI configuration {} is not valid: {reason}", path.display())]
    BadConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A plugin is in none of the plugin directories.
    #[error(
        "the CNI plugin {plugin:?} is not in {dirs}: install containernetworking-plugins or set the directory"
    )]
    NoPlugin {
        /// The plugin's type.
        plugin: String,
        /// Where it was looked for.
        dirs: String,
    },
    /// A plugin said no.
    #[error("CNI plugin {plugin} failed at {command} of {sandbox} (code {code}): {message}")]
    Plugin {
        /// The plugin's type.
        plugin: String,
        /// ADD, DEL, …
        command: &'static str,
        /// For whom.
        sandbox: String,
        /// The plugin's error code, 0 if it gave none.
        code: u64,
        /// What it said.
        message: String,
    },
    /// A plugin took too long and was killed.
    #[error("CNI plugin {plugin} did not end within {seconds} s at {command} of {sandbox}; it was killed")]
    Timeout {
        /// The plugin's type.
        plugin: String,
        /// ADD, DEL, …
        command: &'static str,
        /// For whom.
        sandbox: String,
        /// How long was waited.
        seconds: u64,
    },
    /// A plugin could not be started or talked to.
    #[error("could not run the CNI plugin {plugin}")]
    Spawn {
        /// The plugin's type.
        plugin: String,
        /// Why not.
        source: io::Error,
    },
    /// A program of the system could not be started or talked to.
    #[error("could not run the program {program}")]
    Program {
        /// Which.
        program: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A program of the system took too long and was killed.
    #[error("the program {program} did not end within {seconds} s; it was killed")]
    ProgramTimeout {
        /// Which.
        program: &'static str,
        /// How long was waited.
        seconds: u64,
    },
    /// A plugin's answer is not a result.
    #[error("CNI plugin {plugin} answered something that is no result: {reason}")]
    BadResult {
        /// The plugin's type.
        plugin: String,
        /// What is wrong.
        reason: String,
    },
    /// A value that cannot be used.
    #[error("{what} {value:?} cannot be used: {reason}")]
    Invalid {
        /// Which value.
        what: &'static str,
        /// The value, cut.
        value: String,
        /// Why not.
        reason: &'static str,
    },
    /// No record of an attachment.
    #[error("sandbox {0} is not attached")]
    NotAttached(String),
    /// The network is still in use.
    #[error("the network is still in use by sandbox {0}")]
    Attached(String),
    /// The bridge could not be made or removed.
    #[error("could not {what} the bridge {bridge} ({said}): see `ip link show dev {bridge}`")]
    Bridge {
        /// Which.
        bridge: String,
        /// What was attempted, a verb.
        what: &'static str,
        /// What `ip` said.
        said: String,
    },
    /// The configured bridge is somebody else's and does not have the gateway of the pods' range.
    #[error(
        "the interface {bridge} was not made by Moxlet and does not have the pods' gateway {gateway}, so it is left as it is: \
         set `bridge` to a name that is free, give it this address, or attach pods to it by a CNI configuration of your own (`cni_conf_dir`)"
    )]
    ForeignBridge {
        /// Which.
        bridge: String,
        /// The address that it would need, with the length of its range.
        gateway: String,
    },
    /// The pods' traffic cannot leave the host.
    #[error(
        "could not masquerade {cidr} ({said}): install nftables or iptables, or look whether the kernel has NAT"
    )]
    Masquerade {
        /// Which range.
        cidr: String,
        /// What the program said.
        said: String,
    },
    /// A slice of addresses that is none.
    #[error("the addresses {0}")]
    BadSlice(String),
    /// All addresses of the slice are given or must not be.
    #[error(
        "all addresses from {0} are given, or the host or a gateway has them: delete pods, or widen the range"
    )]
    SliceFull(String),
    /// A file operation failed.
    #[error("could not {what} {}", path.display())]
    Io {
        /// What was attempted, a verb.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io { what, path, source }
}
