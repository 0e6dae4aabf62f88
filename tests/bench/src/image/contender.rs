//! Who brings images, each into an empty directory of the RAM disk.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::{Bench, source::Image};

pub(crate) const PODMAN_DRIVER: &str = "overlay";

/// What each layer goes through in the bare pipe, two at a time: no digest is looked at, no layer above another.
const PIPE: &str = r#"printf '%s\n' "$@" | xargs -P 2 -I {} bash -o pipefail -c \
 'mkdir "$BENCH_OUT/{}" && curl -sSf --noproxy "*" "$BENCH_BLOBS/{}" | $BENCH_UNPACK | tar -x -C "$BENCH_OUT/{}"'"#;
const SKOPEO_UMOCI: &str = r#"skopeo copy -q --src-tls-verify=false "docker://$1" "oci:$2/layout:bench" &&
 umoci unpack --image "$2/layout:bench" "$2/bundle""#;

/// One who brings images.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Contender {
    Moxlet,
    Pipe,
    Podman,
    SkopeoUmoci,
}

/// What a command took.
pub(crate) struct Run {
    pub(crate) time: Duration,
    /// Bytes resident at most, of it or of one of its children that it has waited for.
    pub(crate) peak: u64,
}

impl Contender {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Moxlet => "moxlet",
            Self::Pipe => "the bare pipe",
            Self::Podman => "podman",
            Self::SkopeoUmoci => "skopeo + umoci",
        }
    }

    /// Why it does not bring an image, if it does not.
    pub(crate) fn absent(self, image: &Image) -> Option<String> {
        let programs: &[&str] = match self {
            Self::Moxlet => &[],
            Self::Pipe => &["curl", "gzip", "zstd", "tar"],
            Self::Podman => &["podman"],
            Self::SkopeoUmoci => &["skopeo", "umoci"],
        };
        if let Some(missing) = programs.iter().find(|p| !installed(p)) {
            return Some(format!("{missing} is not installed"));
        }
        let zstd = matches!(self, Self::SkopeoUmoci) && image.zstd();
        zstd.then(|| "umoci does not read zstd".to_owned())
    }

    /// Brings an image; what it has brought is removed.
    pub(crate) fn pull(self, bench: &Bench, image: &Image) -> Result<Run> {
        let out = bench.dir.join("out");
        fs::create_dir_all(&out).context("cannot make a directory for the pull")?;
        let run = self.command(bench, image, &out)?.run()?;
        fs::remove_dir_all(&out).with_context(|| format!("cannot remove what {} has pulled", self.name()))?;
        Ok(run)
    }

    fn command(self, bench: &Bench, image: &Image, out: &Path) -> Result<Timed> {
        let name = format!("{}/bench/{}:1", bench.registry, image.tag);
        let mut command = match self {
            Self::Moxlet => return moxlet(bench, out, &bench.registry, &image.tag),
            Self::Pipe => {
                let mut command = Command::new("bash");
                command.args(["-o", "pipefail", "-c", PIPE, "pipe"]);
                command.args(image.layers.iter().map(|l| &l.digest));
                command.env("BENCH_UNPACK", if image.zstd() { "zstd -dc" } else { "gzip -dc" });
                command.env("BENCH_BLOBS", format!("http://{}/v2/bench/{}/blobs", bench.registry, image.tag));
                command.env("BENCH_OUT", out);
                command
            }
            Self::Podman => {
                let mut command = Command::new("podman");
                command.arg("--root").arg(out.join("root")).arg("--runroot").arg(out.join("run"));
                // Else it leaves a lock among the networks of others.
                command.arg("--network-config-dir").arg(out.join("net"));
                command.args(["--storage-driver", PODMAN_DRIVER, "pull", "-q", "--tls-verify=false", &name]);
                command
            }
            Self::SkopeoUmoci => {
                let mut command = Command::new("bash");
                command.args(["-c", SKOPEO_UMOCI, "skopeo", &name]).arg(out);
                command
            }
        };
        // Where podman and skopeo keep what is half there.
        command.env("TMPDIR", out);
        Ok(Timed(command))
    }
}

/// Whether a program is in PATH.
fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// A pull into a store of its own.
pub(crate) fn moxlet(bench: &Bench, store: &Path, registry: &str, tag: &str) -> Result<Timed> {
    let mut command = Command::new(&bench.moxlet);
    command.args(["image", "pull", "--quiet", "--storage", "overlay", "--plain-http", "--store"]).arg(store);
    command.arg(format!("{registry}/bench/{tag}:1"));
    Ok(Timed(command))
}

/// A command that is to be measured.
pub(crate) struct Timed(Command);

impl Timed {
    /// Runs it.
    ///
    /// # Errors
    /// It cannot be started, or fails.
    pub(crate) fn run(mut self) -> Result<Run> {
        let start = Instant::now();
        let child = self.0.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        let child = child.with_context(|| format!("cannot start {:?}", self.0.get_program()))?;
        let pid = libc::pid_t::try_from(child.id()).context("a process id that is none")?;
        let mut status = 0;
        // SAFETY: plain old data, for which zeros are a value.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: both pointers are to locals that live until it returns; nobody else waits for this child.
        if unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) } != pid {
            return Err(std::io::Error::last_os_error()).context("cannot wait for a command");
        }
        let time = start.elapsed();
        if status != 0 {
            bail!("{:?} failed (wait status {status:#x})", self.0);
        }
        Ok(Run { time, peak: u64::try_from(usage.ru_maxrss).unwrap_or_default() << 10 })
    }
}
