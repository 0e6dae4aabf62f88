//! A CT's firewall: options and rules in `firewall/<vmid>.fw`.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::Call;
use crate::{
    answer::{Answered, Refusal},
    section::digest,
    sim::Sim,
};

/// Parameters of a rule that are written with a dash of their own.
const RULE_KEYS: &[&str] = &["iface", "source", "dest", "proto", "dport", "sport", "log", "icmp-type"];

#[derive(Debug, Default)]
struct File {
    options: BTreeMap<String, String>,
    rules: Vec<Rule>,
    digest: String,
}

#[derive(Debug, Clone, Default)]
struct Rule {
    kind: String,
    action: String,
    enabled: bool,
    comment: String,
    keys: BTreeMap<String, String>,
}

pub(super) async fn dispatch(call: &Call) -> Option<Answered> {
    let below = call.template.strip_prefix("/nodes/{node}/lxc/{vmid}/firewall")?;
    Some(match (call.method.as_str(), below) {
        ("GET", "/options") => options(call),
        ("PUT", "/options") => set_options(call),
        ("GET", "/rules") => rules(call),
        ("POST", "/rules") => add_rule(call),
        ("GET", "/rules/{pos}") => rule(call),
        ("PUT", "/rules/{pos}") => set_rule(call),
        ("DELETE", "/rules/{pos}") => delete_rule(call),
        _ => return None,
    })
}

fn name(vmid: u32) -> String {
    format!("firewall/{vmid}.fw")
}

/// Removes a CT's firewall.
pub(super) fn remove(sim: &Sim, vmid: u32) -> Answered<()> {
    sim.cfs.remove(&name(vmid))
}

fn load(call: &Call) -> Answered<File> {
    let vmid = call.vmid()?;
    call.sim.load_conf(call.node()?, vmid)?;
    let text = call.sim.cfs.read(&name(vmid))?.unwrap_or_default();
    let mut file = File { digest: digest(&text), ..File::default() };
    let mut section = "";
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty()) {
        if line.starts_with('[') {
            section = if line == "[RULES]" { "rules" } else { "options" };
        } else if section == "rules" {
            file.rules.push(Rule::parse(line));
        } else if let Some((key, value)) = line.split_once(':') {
            file.options.insert(key.trim().to_owned(), value.trim().to_owned());
        }
    }
    Ok(file)
}

fn save(call: &Call, file: &File) -> Answered {
    if call.text("digest").is_some_and(|d| d != file.digest) {
        return Err(Refusal::died(
            "detected modified configuration - file changed by other user? Try again.",
        ));
    }
    let mut text = String::new();
    if !file.options.is_empty() {
        text.push_str("[OPTIONS]\n\n");
        for (key, value) in &file.options {
            text.push_str(&format!("{key}: {value}\n"));
        }
        text.push('\n');
    }
    if !file.rules.is_empty() {
        text.push_str("[RULES]\n\n");
        for rule in &file.rules {
            text.push_str(&rule.format());
        }
        text.push('\n');
    }
    call.sim.cfs.write(&name(call.vmid()?), &text)?;
    Ok(Value::Null.into())
}

impl Rule {
    fn parse(line: &str) -> Self {
        let (line, enabled) = match line.strip_prefix('|') {
            Some(rest) => (rest, false),
            None => (line, true),
        };
        let (line, comment) = line.split_once('#').unwrap_or((line, ""));
        let mut words = line.split_whitespace();
        let kind = words.next().unwrap_or("").to_lowercase();
        let action = words.next().unwrap_or("").to_owned();
        let mut keys = BTreeMap::new();
        while let (Some(key), Some(value)) = (words.next(), words.next()) {
            keys.insert(key.trim_start_matches('-').to_owned(), value.to_owned());
        }
        Self { kind, action, enabled, comment: comment.trim().to_owned(), keys }
    }

    fn format(&self) -> String {
        let off = if self.enabled { "" } else { "|" };
        let keys: String = self.keys.iter().map(|(k, v)| format!(" -{k} {v}")).collect();
        let comment = if self.comment.is_empty() { String::new() } else { format!(" # {}", self.comment) };
        format!("{off}{} {}{keys}{comment}\n", self.kind.to_uppercase(), self.action)
    }

    fn set(&mut self, call: &Call) {
        if let Some(kind) = call.text("type") {
            kind.clone_into(&mut self.kind);
        }
        if let Some(action) = call.text("action") {
            action.clone_into(&mut self.action);
        }
        if let Some(enable) = call.integer("enable") {
            self.enabled = enable != 0;
        }
        if let Some(comment) = call.text("comment") {
            self.comment = comment.replace('\n', " ");
        }
        for key in RULE_KEYS {
            if let Some(value) = call.text(key) {
                self.keys.insert((*key).to_owned(), value.replace(char::is_whitespace, ""));
            }
        }
    }

    fn to_json(&self, pos: usize, digest: &str) -> Value {
        let mut json = json!({
            "pos": pos, "type": self.kind, "action": self.action, "enable": i32::from(self.enabled), "digest": digest,
        });
        if !self.comment.is_empty() {
            json["comment"] = json!(self.comment);
        }
        for (key, value) in &self.keys {
            json[key] = json!(value);
        }
        json
    }
}

fn options(call: &Call) -> Answered {
    let file = load(call)?;
    let mut json = json!({ "digest": file.digest });
    for (key, value) in &file.options {
        json[key] = value.parse::<i64>().map_or_else(|_| json!(value), |n| json!(n));
    }
    Ok(json.into())
}

fn set_options(call: &Call) -> Answered {
    let mut file = load(call)?;
    for (key, value) in &call.given {
        if !matches!(key.as_str(), "node" | "vmid" | "digest" | "delete") {
            file.options.insert(key.clone(), super::plain(value));
        }
    }
    for key in call.text("delete").unwrap_or("").split([',', ' ', ';']) {
        file.options.remove(key);
    }
    save(call, &file)
}

fn rules(call: &Call) -> Answered {
    let file = load(call)?;
    let all: Vec<Value> =
        file.rules.iter().enumerate().map(|(pos, r)| r.to_json(pos, &file.digest)).collect();
    Ok(json!(all).into())
}

fn position(call: &Call, file: &File) -> Answered<usize> {
    let pos = call.integer("pos").and_then(|p| usize::try_from(p).ok());
    pos.filter(|p| *p < file.rules.len()).ok_or_else(|| {
        Refusal::parameter("pos", format!("no rule at position {}", call.integer("pos").unwrap_or(0)))
    })
}

fn rule(call: &Call) -> Answered {
    let file = load(call)?;
    let pos = position(call, &file)?;
    let rule = file.rules.get(pos).ok_or_else(|| Refusal::parameter("pos", "no rule"))?;
    Ok(rule.to_json(pos, &file.digest).into())
}

/// A new rule comes first, unless a position is given.
fn add_rule(call: &Call) -> Answered {
    let mut file = load(call)?;
    let mut rule = Rule::default();
    rule.set(call);
    let pos = call.integer("pos").and_then(|p| usize::try_from(p).ok()).unwrap_or(0).min(file.rules.len());
    file.rules.insert(pos, rule);
    save(call, &file)
}

fn set_rule(call: &Call) -> Answered {
    let mut file = load(call)?;
    let pos = position(call, &file)?;
    if let Some(to) = call.integer("moveto").and_then(|p| usize::try_from(p).ok()) {
        let rule = file.rules.remove(pos);
        file.rules.insert(to.min(file.rules.len()), rule);
    } else if let Some(rule) = file.rules.get_mut(pos) {
        rule.set(call);
        for key in call.text("delete").unwrap_or("").split([',', ' ', ';']) {
            rule.keys.remove(key);
        }
    }
    save(call, &file)
}

fn delete_rule(call: &Call) -> Answered {
    let mut file = load(call)?;
    let pos = position(call, &file)?;
    file.rules.remove(pos);
    save(call, &file)
}
