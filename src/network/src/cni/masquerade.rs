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

/// Whether the rules for these ranges are there.
pub(super) async fn is_set(bridge: &str, ranges: &[String]) -> Result<bool> {
    let name = table(bridge);
    if find("nft").is_some() {
        let listed = run("nft", &["list", "table", "ip", &name], "").await?;
        let text = String::from_utf8_lossy(&listed.stdout);
        return Ok(listed.status.success() && masquerades(&text, ranges));
    }
    if find("iptables").is_some() {
        for cidr in ranges {
            if !run("iptables", &rule("-C", cidr, &name), "").await?.status.success() {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Whether a table as `nft list` shows it has a rule that masquerades each of the ranges.
fn masquerades(listed: &str, ranges: &[String]) -> bool {
    let rules: Vec<Vec<&str>> = listed
        .lines()
        .filter(|line| line.contains("masquerade"))
        .map(|line| line.split(|c: char| c.is_whitespace() || "{},".contains(c)).collect())
        .collect();
    ranges.iter().all(|range| rules.iter().any(|words| words.contains(&range.as_str())))
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
    fn a_table_without_the_rule_or_one_of_its_ranges_masquerades_nothing() {
        let table = |rules: &str| {
            format!(
                "table ip moxlet_a {{\n\tchain postrouting {{\n\t\ttype nat hook postrouting priority srcnat;\n{rules}\t}}\n}}\n"
            )
        };
        let both = ["10.1.0.0/24".to_owned(), "10.2.0.0/24".to_owned()];
        let full = table(
            "\t\tip saddr { 10.1.0.0/24, 10.2.0.0/24 } ip daddr != { 10.1.0.0/24, 10.2.0.0/24 } masquerade\n",
        );
        assert!(masquerades(&full, &both) && masquerades(&full, &both[1..]));
        let one = table("\t\tip saddr 10.1.0.0/24 ip daddr != 10.1.0.0/24 masquerade\n");
        assert!(masquerades(&one, &both[..1]) && !masquerades(&one, &both));
        assert!(!masquerades(&table(""), &both) && !masquerades("", &both));
    }

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
