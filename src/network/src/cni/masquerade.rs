//! Masquerading of our own network: one rule for the whole range, in an nftables table of our own (or one iptables
//! rule where nft is missing). CNI's bridge would make a chain per pod and leaves it behind when DEL comes after the
//! pod's namespace is gone.

use std::process::Stdio;

use tokio::{io::AsyncWriteExt as _, process::Command};

use crate::{Error, Result};

const DIRS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

fn program(name: &str) -> Option<std::path::PathBuf> {
    DIRS.iter().map(|dir| std::path::Path::new(dir).join(name)).find(|path| path.is_file())
}

/// Whether the host can masquerade.
pub(super) fn is_possible() -> bool {
    program("nft").is_some() || program("iptables").is_some()
}

fn table(bridge: &str) -> String {
    let name: String = bridge.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    format!("moxlet_{name}")
}

fn rules(bridge: &str, ranges: &[String]) -> String {
    let table = table(bridge);
    let ranges = ranges.join(", ");
    format!(
        "add table ip {table}\ndelete table ip {table}\ntable ip {table} {{\n chain postrouting {{\n  \
         type nat hook postrouting priority srcnat; policy accept;\n  \
         ip saddr {{ {ranges} }} ip daddr != {{ {ranges} }} ip daddr != 224.0.0.0/4 masquerade\n }}\n}}\n"
    )
}

async fn run(program: &std::path::Path, args: &[&str], input: &str) -> Result<bool> {
    let name = program.display().to_string();
    let failed = |source| Error::Spawn { plugin: name.clone(), source };
    let mut child = Command::new(program)
        .args(args)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).await.map_err(failed)?;
    }
    Ok(child.wait().await.map_err(failed)?.success())
}

fn rule<'a>(verb: &'a str, cidr: &'a str, comment: &'a str) -> Vec<&'a str> {
    let rest = ["POSTROUTING", "-s", cidr, "!", "-d", cidr, "-m", "comment", "--comment", comment];
    [&["-w", "-t", "nat", verb], rest.as_slice(), &["-j", "MASQUERADE"]].concat()
}

/// Makes the rule for these ranges, or makes it anew. None may lie in another.
pub(super) async fn set(bridge: &str, ranges: &[String]) -> Result<()> {
    let mut done = false;
    if let Some(nft) = program("nft") {
        done = run(&nft, &["-f", "-"], &rules(bridge, ranges)).await?;
    } else if let Some(iptables) = program("iptables") {
        let comment = table(bridge);
        for cidr in ranges {
            done = run(&iptables, &rule("-C", cidr, &comment), "").await?
                || run(&iptables, &rule("-A", cidr, &comment), "").await?;
        }
    }
    if done { Ok(()) } else { Err(Error::Masquerade { cidr: ranges.join(", ") }) }
}

/// Removes the rule. Idempotent.
pub(super) async fn clear(bridge: &str, cidr: Option<&str>) -> Result<()> {
    let name = table(bridge);
    if let Some(nft) = program("nft") {
        run(&nft, &["-f", "-"], &format!("add table ip {name}\ndelete table ip {name}\n")).await?;
    } else if let (Some(iptables), Some(cidr)) = (program("iptables"), cidr) {
        run(&iptables, &rule("-D", cidr, &name), "").await?;
    }
    Ok(())
}
