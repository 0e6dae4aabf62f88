//! Masquerading of our own network: one rule for the whole range, in an nftables table of our own (or one iptables
//! rule where nft is missing). CNI's bridge would make a chain per pod and leaves it behind when DEL comes after the
//! pod's namespace is gone.

use crate::{
    Error, Result,
    program::{find, run},
};

/// Whether the host can masquerade.
pub(super) fn is_possible() -> bool {
    find("nft").is_some() || find("iptables").is_some()
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

fn rule<'a>(verb: &'a str, cidr: &'a str, comment: &'a str) -> Vec<&'a str> {
    let rest = ["POSTROUTING", "-s", cidr, "!", "-d", cidr, "-m", "comment", "--comment", comment];
    [&["-w", "-t", "nat", verb], rest.as_slice(), &["-j", "MASQUERADE"]].concat()
}

/// Makes the rule for these ranges, or makes it anew. None may lie in another.
pub(super) async fn set(bridge: &str, ranges: &[String]) -> Result<()> {
    let failed = |said: String| Err(Error::Masquerade { cidr: ranges.join(", "), said });
    if find("nft").is_some() {
        let ended = run("nft", &["-f", "-"], &rules(bridge, ranges)).await?;
        return if ended.status.success() { Ok(()) } else { failed(ended.said()) };
    }
    if find("iptables").is_none() {
        return failed("there is neither nft nor iptables".to_owned());
    }
    let comment = table(bridge);
    for cidr in ranges {
        if run("iptables", &rule("-C", cidr, &comment), "").await?.status.success() {
            continue;
        }
        let added = run("iptables", &rule("-A", cidr, &comment), "").await?;
        if !added.status.success() {
            return failed(added.said());
        }
    }
    Ok(())
}

/// Removes the rules of all ranges. Idempotent.
pub(super) async fn clear(bridge: &str) -> Result<()> {
    let name = table(bridge);
    if find("nft").is_some() {
        run("nft", &["-f", "-"], &format!("add table ip {name}\ndelete table ip {name}\n")).await?;
    } else if find("iptables").is_some() {
        let listed = run("iptables", &["-w", "-t", "nat", "-S", "POSTROUTING"], "").await?;
        for rule in commented(&String::from_utf8_lossy(&listed.stdout), &name) {
            let delete: Vec<&str> =
                ["-w", "-t", "nat", "-D"].into_iter().chain(rule.iter().map(String::as_str)).collect();
            run("iptables", &delete, "").await?;
        }
    }
    Ok(())
}

/// Of rules as `iptables -S` lists them those with this comment, each without its `-A`.
fn commented(listed: &str, comment: &str) -> Vec<Vec<String>> {
    let words =
        |line: &str| line.split_whitespace().map(|w| w.trim_matches('"').to_owned()).collect::<Vec<_>>();
    let ours = |rule: &Vec<String>| rule.windows(2).any(|w| w[0] == "--comment" && w[1] == comment);
    listed.lines().filter_map(|l| l.strip_prefix("-A ")).map(words).filter(ours).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rules_with_the_bridges_comment_are_removed() {
        let listed = "-P POSTROUTING ACCEPT\n\
            -A POSTROUTING -s 10.0.0.0/24 ! -d 10.0.0.0/24 -m comment --comment moxlet_moxlet0 -j MASQUERADE\n\
            -A POSTROUTING -s 10.1.0.0/24 -m comment --comment \"moxlet_moxlet0\" -j MASQUERADE\n\
            -A POSTROUTING -s 10.2.0.0/24 -m comment --comment moxlet_moxlet01 -j MASQUERADE\n\
            -A POSTROUTING -s 10.3.0.0/24 -j MASQUERADE\n";
        let found = commented(listed, &table("moxlet0"));
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(
            found[1].join(" "),
            "POSTROUTING -s 10.1.0.0/24 -m comment --comment moxlet_moxlet0 -j MASQUERADE"
        );
    }
}
