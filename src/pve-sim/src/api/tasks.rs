//! `/nodes/{node}/tasks`: list, status, log, cancel. A caller sees its own tasks, all with Sys.Audit on the host.

use serde_json::{Value, json};

use super::Call;
use crate::{
    access::Caller,
    answer::{Answered, Data, Refusal},
    tasks::{Listed, Upid},
};

pub(super) async fn dispatch(call: &Call) -> Option<Answered> {
    Some(match (call.method.as_str(), call.template.as_str()) {
        ("GET", "/nodes/{node}/tasks") => list(call),
        ("GET", "/nodes/{node}/tasks/{upid}/status") => status(call),
        ("GET", "/nodes/{node}/tasks/{upid}/log") => log(call),
        ("DELETE", "/nodes/{node}/tasks/{upid}") => cancel(call),
        _ => return None,
    })
}

/// The task of the call, if the caller may see it.
fn task(call: &Call, privilege: &str) -> Answered<Upid> {
    let upid = Upid::parse(call.needed("upid")?)
        .ok_or_else(|| Refusal::parameter("upid", "unable to parse worker upid"))?;
    if upid.node != call.node()? || !call.sim.tasks.exists(&upid) {
        return Err(Refusal::parameter("upid", "no such task"));
    }
    if upid.user != call.caller {
        call.check(&format!("/nodes/{}", upid.node), &[privilege])?;
    }
    Ok(upid)
}

fn status(call: &Call) -> Answered {
    let upid = task(call, "Sys.Audit")?;
    let mut status = upid.to_json();
    if call.sim.tasks.is_running(&upid.text) {
        status["status"] = json!("running");
    } else {
        status["status"] = json!("stopped");
        status["exitstatus"] = json!(call.sim.tasks.exit_status(&upid));
    }
    Ok(status.into())
}

fn log(call: &Call) -> Answered {
    let upid = task(call, "Sys.Audit")?;
    let number =
        |name: &str, default: u64| call.integer(name).and_then(|n| u64::try_from(n).ok()).unwrap_or(default);
    let (lines, total) = call.sim.tasks.read_log(&upid, number("start", 0), number("limit", 50))?;
    let lines: Vec<Value> = lines.into_iter().map(|(n, t)| json!({ "n": n, "t": t })).collect();
    Ok(Data { data: json!(lines), total: Some(total) })
}

fn cancel(call: &Call) -> Answered {
    let upid = task(call, "Sys.Modify")?;
    call.sim.tasks.cancel(&upid.text);
    Ok(Value::Null.into())
}

fn list(call: &Call) -> Answered {
    let node = call.node()?;
    let sees_all = call.has_any(&format!("/nodes/{node}"), &["Sys.Audit"])?;
    let source = call.text("source").unwrap_or("archive");
    let filter = Filter::of(call);
    let found: Vec<Listed> = call
        .sim
        .tasks
        .list(node)
        .into_iter()
        .filter(|task| match source {
            "archive" => task.end.is_some(),
            "active" => task.end.is_none(),
            _ => true,
        })
        .filter(|task| sees_all || task.upid.user == call.caller)
        .filter(|task| filter.takes(task))
        .collect();
    let total = found.len() as u64;
    let number = |name: &str, default: usize| {
        call.integer(name).and_then(|n| usize::try_from(n).ok()).unwrap_or(default)
    };
    let limit = match number("limit", 50) {
        0 => usize::MAX,
        limit => limit,
    };
    let shown: Vec<Value> =
        found.iter().skip(number("start", 0)).take(limit).map(|t| to_json(t, "RUNNING")).collect();
    Ok(Data { data: json!(shown), total: Some(total) })
}

/// A listed task; a running one has `running` as its status, or none.
pub(super) fn to_json(task: &Listed, running: &str) -> Value {
    let mut json = task.upid.to_json();
    match &task.end {
        Some((at, status)) => {
            json["endtime"] = json!(at);
            json["status"] = json!(status);
        }
        None if !running.is_empty() => json["status"] = json!(running),
        None => {}
    }
    json
}

struct Filter {
    errors: bool,
    vmid: Option<String>,
    kind: Option<String>,
    user: Option<String>,
    since: i64,
    until: i64,
    statuses: Vec<String>,
}

impl Filter {
    fn of(call: &Call) -> Self {
        let owned = |name: &str| call.text(name).map(str::to_owned);
        Self {
            errors: call.flag("errors"),
            vmid: call.integer("vmid").map(|v| v.to_string()),
            kind: owned("typefilter"),
            user: owned("userfilter"),
            since: call.integer("since").unwrap_or(0),
            until: call.integer("until").unwrap_or(i64::MAX),
            statuses: owned("statusfilter")
                .map(|s| s.split([',', ';', ' ', '\0']).map(str::to_owned).collect())
                .unwrap_or_default(),
        }
    }

    fn takes(&self, task: &Listed) -> bool {
        let status = task.end.as_ref().map(|(_, s)| s.as_str());
        let is_good = status == Some("OK") || status.is_some_and(|s| s.starts_with("WARNINGS"));
        let kind_of_status = match status {
            Some("OK") => "ok",
            Some("unexpected status") | None => "unknown",
            Some(s) if s.starts_with("WARNINGS") => "warning",
            Some(_) => "error",
        };
        let user_fits = |wanted: &String| {
            let full: &Caller = &task.upid.user;
            full.full().contains(wanted.as_str())
        };
        (!self.errors || (status.is_some() && !is_good))
            && self.vmid.as_ref().is_none_or(|v| *v == task.upid.id)
            && self.kind.as_ref().is_none_or(|k| *k == task.upid.kind)
            && self.user.as_ref().is_none_or(user_fits)
            && (self.since..=self.until).contains(&task.upid.starttime)
            && (self.statuses.is_empty() || self.statuses.iter().any(|s| s == kind_of_status))
    }
}
