//! liblxc's programs: build the argument list, run, map the failure. No shell, a fixed environment.

use std::{fs::File, path::Path, process::Stdio, time::Duration};

use moxlet_ids::SandboxId;
use tokio::process::Command;

use crate::{Error, INIT_IN_CT, Result, error::io, process::tail};

/// Where liblxc's programs are run from; the caller's PATH is not asked.
pub const LXC_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const START: &str = "lxc-start";
const TAIL_MAX: usize = 1500;

fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", LXC_PATH).env("LC_ALL", "C").current_dir("/").stdin(Stdio::null());
    command
}

/// Whether a program is where the tools are looked for.
pub(super) fn is_installed(program: &str) -> bool {
    LXC_PATH.split(':').any(|dir| Path::new(dir).join(program).is_file())
}

/// liblxc's version, major and minor.
pub(super) async fn version() -> Result<(u32, u32)> {
    let output = command(START)
        .arg("--version")
        .stderr(Stdio::null())
        .output()
        .await
        .map_err(|source| Error::Spawn { program: START.into(), package: "lxc", source })?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    parse_version(&text).ok_or_else(|| {
        Error::Host(format!("{START} --version said {:?}", text.chars().take(80).collect::<String>()))
    })
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers =
        text.trim().split('.').map(|n| n.chars().take_while(char::is_ascii_digit).collect::<String>());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// One start of a CT.
pub(super) struct Start<'a> {
    /// liblxc's directory of CTs.
    pub(super) lxcpath: &'a Path,
    /// Which CT.
    pub(super) id: &'a SandboxId,
    /// Arguments of its init.
    pub(super) init_args: &'a [String],
    /// liblxc's log of this CT.
    pub(super) log: &'a Path,
    /// What the program writes to stderr goes here.
    pub(super) errors: &'a Path,
    /// How long it may take.
    pub(super) limit: Duration,
}

/// Starts a CT in the background; returns when liblxc says that it runs. The monitor has a session of its own.
pub(super) async fn start(start: &Start<'_>) -> Result<()> {
    for file in [start.log, start.errors] {
        File::create(file).map_err(io("empty", file))?;
    }
    let errors = File::options().append(true).open(start.errors).map_err(io("open", start.errors))?;
    let said = || {
        let both = [tail(start.log, TAIL_MAX), tail(start.errors, TAIL_MAX)];
        both.into_iter().find(|text| !text.is_empty()).unwrap_or_else(|| "it said nothing".into())
    };
    let mut child = command(START)
        .arg("-P")
        .arg(start.lxcpath)
        .args(["-n", start.id.as_str(), "-d", "--", INIT_IN_CT])
        .args(start.init_args)
        .stdout(Stdio::null())
        .stderr(errors)
        .process_group(0)
        .spawn()
        .map_err(|source| Error::Spawn { program: START.into(), package: "lxc", source })?;
    let ended = tokio::time::timeout(start.limit, child.wait()).await;
    let ct = start.id.to_string();
    match ended {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => {
            Err(Error::Tool { program: START.into(), ct, status: status.to_string(), tail: said() })
        }
        Ok(Err(source)) => Err(Error::Spawn { program: START.into(), package: "lxc", source }),
        Err(_) => {
            let _ = child.kill().await;
            let seconds = start.limit.as_secs();
            Err(Error::Timeout { what: "the start", ct, seconds, tail: format!(": {}", said()) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(parse_version("5.0.2\n"), Some((5, 0)));
        assert_eq!(parse_version("6.0.4"), Some((6, 0)));
        assert_eq!(parse_version("6.1-devel"), Some((6, 1)));
        assert_eq!(parse_version("none"), None);
    }
}
