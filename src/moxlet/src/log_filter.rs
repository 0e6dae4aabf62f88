//! What is logged, as `--log`, `MOXLET_LOG` and the key `log` say it.
//!
//! A filter of tracing takes any bare word as the name of a module, with all of its levels, and then logs nothing of the others:
//! `inof` would silence everything. Here a bare word has to be a level.

use anyhow::{Context as _, Result, bail};
use tracing_subscriber::EnvFilter;

use crate::nearest::nearest;

const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];
/// The crates of this workspace that log, as their targets begin.
const TARGETS: [&str; 10] = [
    "moxlet",
    "moxlet_agent",
    "moxlet_cri",
    "moxlet_image",
    "moxlet_network",
    "moxlet_node",
    "moxlet_pve",
    "moxlet_sandbox",
    "moxlet_storage",
    "moxlet_stream",
];

/// What these crates log of failed calls is passed on to the node, which logs it with the pod or object that it concerns. A directive
/// of the filter that names them comes later and stands.
const PASSED_ON: &str = "kube_runtime::watcher=off,kube_client=off";

/// Reads a filter; `key` is what it was given by.
///
/// # Errors
/// It is not one, or a word of it cannot be meant so.
pub(crate) fn parse(key: &str, text: &str) -> Result<EnvFilter> {
    for directive in text.split(',').map(str::trim).filter(|d| !d.is_empty()) {
        // Spans and their fields are left to the filter itself.
        if directive.contains(['[', ']', '{', '}']) {
            continue;
        }
        match directive.split_once('=') {
            None => check_level(key, directive)?,
            Some((target, _)) => check_target(key, target)?,
        }
    }
    EnvFilter::try_new(format!("{PASSED_ON},{text}")).with_context(|| {
        format!("{key}: {text:?} is not a log filter; right is a level ({}) or a filter such as info,moxlet_agent=debug", LEVELS.join(", "))
    })
}

fn check_level(key: &str, word: &str) -> Result<()> {
    if LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word)) {
        return Ok(());
    }
    if TARGETS.contains(&word) {
        bail!("{key}: {word:?} is a module without a level; write {word}=debug");
    }
    let meant = nearest(word, LEVELS).map_or_else(String::new, |l| format!("; did you mean {l:?}?"));
    bail!("{key}: {word:?} is not a log level ({}){meant}", LEVELS.join(", "))
}

fn check_target(key: &str, target: &str) -> Result<()> {
    let name = target.split("::").next().unwrap_or(target);
    if let Some(meant) = nearest(name, TARGETS).filter(|meant| *meant != name) {
        bail!("{key}: nothing logs as {name:?}; did you mean {meant:?}?");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_word_that_would_silence_everything_is_refused() {
        for (text, meant) in [
            ("inof", "\"info\""),
            ("info,debgu", "\"debug\""),
            ("moxlet_agent", "moxlet_agent=debug"),
            ("info,moxlet_agnet=debug", "\"moxlet_agent\""),
        ] {
            let error = parse("log", text).unwrap_err().to_string();
            assert!(error.starts_with("log: ") && error.contains(meant), "{error}");
        }
        assert!(parse("log", "moxlet_agent=loud").unwrap_err().to_string().contains("moxlet_agent=loud"));
    }

    #[test]
    fn levels_and_filters_pass() {
        for text in [
            "info",
            "INFO",
            "off",
            "warn,moxlet_image::registry=trace,hyper=info",
            "[span{field=1}]=debug",
            "",
        ] {
            assert!(parse("log", text).is_ok(), "{text}");
        }
    }
}
