//! Credentials of a command: from files, standard input or the environment, never from arguments, which all of a machine
//! can read.

use std::{
    io::{self, Read},
    path::Path,
};

use anyhow::{Context, Result, bail};
use moxlet_cri::host::ImageLogin;

use super::args::RegistryArgs;

/// Where a password may come from besides standard input.
const VARIABLE: &str = "MOXLET_REGISTRY_PASSWORD";
/// Bytes of a file or password that are read.
const MAX: u64 = 1 << 20;

/// What a command logs in with.
#[derive(Default)]
pub(crate) struct Logins {
    pub(crate) logins: Vec<ImageLogin>,
    /// Contents of config.json files.
    pub(crate) docker_configs: Vec<Vec<u8>>,
}

impl Logins {
    /// Reads what the arguments name.
    pub(crate) fn read(args: &RegistryArgs) -> Result<Self> {
        let mut all = Self::default();
        if let Some(path) = &args.creds_file {
            let text = String::from_utf8(read(path)?).context("the credentials are no text")?;
            let Some((user, password)) = text.trim_end_matches(['\r', '\n']).split_once(':') else {
                bail!("{} does not hold USER:PASSWORD in one line", path.display());
            };
            all.logins.push(login(user, password));
        }
        if let Some(user) = &args.username {
            let password = if args.password_stdin {
                let mut text = String::new();
                io::stdin().take(MAX).read_to_string(&mut text).context("cannot read the password")?;
                text.trim_end_matches(['\r', '\n']).to_owned()
            } else {
                std::env::var(VARIABLE).ok().with_context(|| {
                    format!("--username needs a password: give --password-stdin, or set {VARIABLE}")
                })?
            };
            all.logins.push(login(user, &password));
        }
        for path in &args.authfile {
            all.docker_configs.push(read(path)?);
        }
        Ok(all)
    }
}

fn login(user: &str, password: &str) -> ImageLogin {
    ImageLogin { username: user.to_owned(), password: password.to_owned(), ..ImageLogin::default() }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let context = || format!("cannot read {}", path.display());
    std::fs::File::open(path)
        .with_context(context)?
        .take(MAX + 1)
        .read_to_end(&mut bytes)
        .with_context(context)?;
    if bytes.len() as u64 > MAX {
        bail!("{} has more than {MAX} bytes", path.display());
    }
    Ok(bytes)
}
