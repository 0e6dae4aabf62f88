//! The command line of `moxlet image`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Subcommand, ValueEnum};

use crate::{duration::Span, socket::SocketArgs};

/// `moxlet image`: which store, and what to do with it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  moxlet image list                                                the images of this host's agent
  moxlet image pull --authfile ~/.docker/config.json r.example/app:1
  moxlet image --store /srv/images pull busybox                    a store without an agent
  moxlet image --store rpool/images --storage zfs list             … on ZFS
  moxlet image mount busybox /mnt && ls /mnt && moxlet image umount /mnt

With --socket (or neither) a running agent does the work. With --store the command opens a store itself; while an agent has it
open that is refused: the store of `moxlet up` is the agent's root directory.")]
pub(crate) struct ImageArgs {
    #[command(flatten)]
    pub(crate) store: StoreArgs,
    #[command(subcommand)]
    pub(crate) command: ImageCommand,
}

/// Which store. What these options need of one another is judged in [`StoreArgs::check`]: the parser judges before it brings those
/// before and after the verb together.
#[derive(Debug, Args)]
pub(crate) struct StoreArgs {
    #[command(flatten)]
    pub(crate) socket: SocketArgs,
    /// Open a store without an agent: a directory, or with --storage zfs a dataset
    #[arg(long, value_name = "DIR|DATASET", global = true)]
    pub(crate) store: Option<PathBuf>,
    /// What --store is [default: overlay]
    #[arg(long, value_enum, global = true)]
    storage: Option<StorageKind>,
    /// What is logged to standard error: error, warn, info, debug, or a filter like `moxlet_image=debug`
    #[arg(long, value_name = "FILTER", env = "MOXLET_LOG", default_value = "warn", global = true)]
    pub(crate) log: String,
}

impl StoreArgs {
    /// What the store lies on.
    pub(crate) fn storage(&self) -> StorageKind {
        self.storage.unwrap_or(StorageKind::Overlay)
    }

    /// Whether the options go together, on whichever side of the verb they stand.
    ///
    /// # Errors
    /// One is of no use without another, or they exclude one another.
    pub(crate) fn check(&self, registry: Option<&RegistryArgs>) -> Result<()> {
        if self.store.is_some() {
            if self.socket.socket.is_some() {
                bail!(
                    "--socket and --store exclude one another: a store belongs to an agent or is opened by this command"
                );
            }
            return Ok(());
        }
        for (option, given) in [
            ("--storage", self.storage.is_some()),
            ("--plain-http", registry.is_some_and(|r| r.plain_http)),
            ("--hosts-dir", registry.is_some_and(|r| r.hosts_dir.is_some())),
        ] {
            if given {
                bail!("{option} is for a store that this command opens itself: name it with --store");
            }
        }
        Ok(())
    }
}

/// What a store lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum StorageKind {
    /// OverlayFS below a directory.
    Overlay,
    /// ZFS below a dataset.
    Zfs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Pull images from their registries; prints their ids.
    ///
    /// An image that is here already is brought up to date: layers that are here are not moved again.
    Pull(PullArgs),
    /// List images.
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Show all that is known of images, as JSON: names, config, layers, manifest, use.
    Inspect(Images),
    /// Give an image a further name. The image that has the name loses it.
    Tag {
        /// A name or id of the image
        image: String,
        /// The new name, with or without a tag
        name: String,
    },
    /// Take names from images. An image goes with its last name, or by its id, unless somebody uses it.
    #[command(visible_alias = "rm")]
    Remove(Images),
    /// Keep images from garbage collection.
    Pin(Images),
    /// Let garbage collection have images again.
    Unpin(Images),
    /// Show an image's files at a directory, read-only, as a container would see them.
    ///
    /// As long as it is mounted its layers stay, whatever becomes of its names.
    Mount {
        /// A name or id of the image
        image: String,
        /// An empty directory; made if missing
        directory: PathBuf,
    },
    /// Take such a mount away.
    #[command(visible_alias = "unmount")]
    Umount {
        /// The directory
        directory: PathBuf,
    },
    /// Push images to a registry; prints the digest there.
    ///
    /// An image keeps its digest where the registry has the blobs that it came with, or can take them over from another
    /// repository of its own. Else its layers are compressed anew: the id stays, the digest is a new one.
    Push(PushArgs),
    /// Write images to an archive that skopeo, podman, docker and containerd read, or to an OCI layout directory.
    #[command(visible_alias = "save")]
    Export(ExportArgs),
    /// Take images from an OCI layout, an OCI or docker archive, or make one of a root file system.
    #[command(visible_alias = "load", after_help = IMPORT_EXAMPLES)]
    Import(Box<ImportArgs>),
    /// Compare images with their digests: every layer is read from disk. Ends with status 1 where one is damaged.
    Verify {
        /// Names or ids; all images if none is given
        images: Vec<String>,
        /// Remove damaged images that nobody uses, so that the next pull brings them anew
        #[arg(long)]
        repair: bool,
    },
    /// Copy all images of a store on ZFS to another one, usually on another pool.
    ///
    /// Layers go by `zfs send`, and what they share they share there as well. The source stays as it is. After an interruption
    /// the same command goes on. Agents of both stores are stopped first; roots of containers do not go along.
    #[command(after_help = MIGRATE_EXAMPLES)]
    Migrate {
        /// The dataset of the other store; made if missing, but not the one above it
        #[arg(long, value_name = "DATASET")]
        to: PathBuf,
    },
    /// Remove images for want of space, by the kubelet's rules: those not used for longest first, never what is in use or
    /// pinned.
    Gc(GcArgs),
    /// Remove all images that nobody uses and that are not pinned.
    Prune {
        /// Spare what is younger, such as 24h
        #[arg(long, value_name = "AGE", default_value = "0s")]
        min_age: Span,
        /// Say which would be removed, and remove none
        #[arg(long)]
        dry_run: bool,
    },
}

const IMPORT_EXAMPLES: &str = "Examples:
  moxlet image import app.tar                                   what docker save, podman save or skopeo wrote
  moxlet image import ./layout --name r.example/app:1           an OCI layout directory
  moxlet image import --rootfs --name debian:13 --cmd /bin/bash debian-13-standard_13.1-2_amd64.tar.zst
  tar -C root --xattrs --numeric-owner -c . | moxlet image import --rootfs --name mine:1 -";

const MIGRATE_EXAMPLES: &str = "Example:
  moxlet image migrate --store tank/moxlet --storage zfs --to rpool/moxlet";

#[derive(Debug, Args)]
pub(crate) struct PushArgs {
    /// A name or id of the image
    pub(crate) image: String,
    /// The name there [default: the image's]
    pub(crate) target: Option<String>,
    /// Compression of layers whose blobs the registry lacks: gzip or zstd
    #[arg(long, value_name = "KIND", default_value = "gzip", value_parser = ["gzip", "zstd"])]
    pub(crate) compression: String,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    #[command(flatten)]
    pub(crate) images: Images,
    /// The archive [default: standard output]
    #[arg(long, short, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// An OCI layout directory, new or empty, instead
    #[arg(long, value_name = "DIR", conflicts_with = "output")]
    pub(crate) oci_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// An archive (plain or with gzip, zstd or xz), an OCI layout directory, or - for standard input
    pub(crate) source: PathBuf,
    /// The image's name
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// The archive is a root file system, such as an LXC template: make an image of one layer of it
    #[arg(long)]
    pub(crate) rootfs: bool,
    /// With --rootfs: an argument of the default command; may be given several times
    #[arg(long, value_name = "ARG", requires = "rootfs", allow_hyphen_values = true)]
    pub(crate) cmd: Vec<String>,
    /// With --rootfs: a word of the entrypoint; may be given several times
    #[arg(long, value_name = "ARG", requires = "rootfs", allow_hyphen_values = true)]
    pub(crate) entrypoint: Vec<String>,
    /// With --rootfs: a variable
    #[arg(long, value_name = "NAME=value", requires = "rootfs")]
    pub(crate) env: Vec<String>,
    /// With --rootfs: the working directory
    #[arg(long, value_name = "DIR", requires = "rootfs")]
    pub(crate) workdir: Option<String>,
    /// With --rootfs: the user, as USER or UID, with :GROUP or :GID if need be
    #[arg(long, value_name = "USER", requires = "rootfs")]
    pub(crate) user: Option<String>,
    /// With --rootfs: a label
    #[arg(long, value_name = "KEY=value", requires = "rootfs")]
    pub(crate) label: Vec<String>,
    /// With --rootfs: the architecture, as Go names it [default: a template's name says, else this host's]
    #[arg(long, value_name = "ARCH", requires = "rootfs")]
    pub(crate) arch: Option<String>,
}

/// Images by name or id.
#[derive(Debug, Args)]
pub(crate) struct Images {
    /// Names, digests, or ids (three or more digits)
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    #[command(flatten)]
    pub(crate) images: Images,
    /// Say nothing but the ids
    #[arg(long, short)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

/// How registries are spoken to.
#[derive(Debug, Args)]
pub(crate) struct RegistryArgs {
    /// Docker's config.json, or the .dockerconfigjson of a pull secret; those credentials are used that fit the image
    #[arg(long, value_name = "FILE")]
    pub(crate) authfile: Vec<PathBuf>,
    /// A file with one line, USER:PASSWORD
    #[arg(long, value_name = "FILE", conflicts_with = "username")]
    pub(crate) creds_file: Option<PathBuf>,
    /// The user to log in as; the password comes with --password-stdin or in MOXLET_REGISTRY_PASSWORD
    #[arg(long, value_name = "USER")]
    pub(crate) username: Option<String>,
    /// Read the password from standard input
    #[arg(long, requires = "username")]
    pub(crate) password_stdin: bool,
    /// Speak to the images' registries without TLS; for a store of one's own (an agent has plain_http_registries)
    #[arg(long)]
    pub(crate) plain_http: bool,
    /// A directory of hosts.toml files, as containerd's certs.d; for a store of one's own
    #[arg(long, value_name = "DIR")]
    pub(crate) hosts_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// How it looks
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
    /// Print ids alone
    #[arg(long, short, conflicts_with = "output")]
    pub(crate) quiet: bool,
}

/// How a list looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// An array of objects.
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct GcArgs {
    /// Remove images once the file system is this full, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 85, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) high: u8,
    /// Then remove images until it is this full, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 80, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) low: u8,
    /// Spare what is younger
    #[arg(long, value_name = "AGE", default_value = "2m")]
    pub(crate) min_age: Span,
    /// Also remove what was not used for so long, however much space there is
    #[arg(long, value_name = "AGE")]
    pub(crate) max_age: Option<Span>,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use crate::cli::{Cli, Command};

    fn read(words: &[&str]) -> Result<Box<ImageArgs>> {
        let Command::Image(args) = Cli::read(words)?.command else { panic!("{words:?}") };
        let registry = match &args.command {
            ImageCommand::Pull(pull) => Some(&pull.registry),
            _ => None,
        };
        args.store.check(registry)?;
        Ok(args)
    }

    #[test]
    fn options_of_the_store_stand_on_either_side_of_the_verb() {
        for words in [
            &["moxlet", "image", "--store", "/s", "--storage", "zfs", "pull", "--plain-http", "a"][..],
            &["moxlet", "image", "pull", "--store", "/s", "--storage", "zfs", "--plain-http", "a"],
            &["moxlet", "image", "--store", "/s", "pull", "--storage", "zfs", "a"],
            &["moxlet", "image", "--storage", "zfs", "pull", "a", "--store", "/s"],
        ] {
            let args = read(words).unwrap();
            assert_eq!(args.store.store.as_deref(), Some(std::path::Path::new("/s")), "{words:?}");
            assert_eq!(args.store.storage(), StorageKind::Zfs, "{words:?}");
        }
    }

    #[test]
    fn options_that_need_or_exclude_a_store_say_so() {
        for (words, part) in [
            (&["moxlet", "image", "--storage", "zfs", "ls"][..], "--store"),
            (&["moxlet", "image", "pull", "--plain-http", "a"], "--store"),
            (&["moxlet", "image", "--socket", "/a", "ls", "--store", "/s"], "exclude"),
            (&["moxlet", "image", "--store", "/s", "ls", "--socket", "/a"], "exclude"),
        ] {
            let error = read(words).unwrap_err().to_string();
            assert!(error.contains(part), "{words:?}: {error}");
        }
    }
}
