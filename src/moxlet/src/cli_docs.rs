//! `moxlet completion` and `moxlet man`: what shells and `man` know of the command line, from its own description.

use std::{io::Write as _, path::PathBuf};

use anyhow::{Context as _, Result};
use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::cli::Cli;

/// What `moxlet completion` takes.
#[derive(Debug, Args)]
pub(crate) struct CompletionArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// What `moxlet man` takes.
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// The directory that gets a page for each verb; made if missing
    dir: PathBuf,
}

/// Prints the script that completes this command line.
///
/// # Errors
/// It cannot be written.
pub(crate) fn completion(args: &CompletionArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "moxlet", &mut script);
    std::io::stdout().write_all(&script).context("cannot write to standard output")
}

/// Writes the man pages, `moxlet.1` and one for each verb, such as `moxlet-image-pull.1`.
///
/// # Errors
/// They cannot be written.
pub(crate) fn man(args: &ManArgs) -> Result<()> {
    let context = || format!("cannot write man pages into {}", args.dir.display());
    std::fs::create_dir_all(&args.dir).with_context(context)?;
    clap_mangen::generate_to(Cli::command().disable_help_subcommand(true), &args.dir).with_context(context)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn there_is_a_page_for_each_verb() {
        let dir = tempfile::tempdir().unwrap();
        man(&ManArgs { dir: dir.path().join("man1") }).unwrap();
        for page in ["moxlet.1", "moxlet-pods.1", "moxlet-image-pull.1", "moxlet-check-config.1"] {
            let text = std::fs::read_to_string(dir.path().join("man1").join(page)).unwrap();
            assert!(text.contains(".TH"), "{page}");
        }
    }

    #[test]
    fn completions_know_the_verbs() {
        let mut script = Vec::new();
        clap_complete::generate(Shell::Bash, &mut Cli::command(), "moxlet", &mut script);
        let script = String::from_utf8(script).unwrap();
        assert!(script.contains("check-config") && script.contains("inspect"));
    }
}
