//! The API's methods, one file a subject; [`dispatch`] finds the one that a call is for.
//!
//! A method gets parameters that the schema has been held against, from a caller who has the privileges that the schema
//! asks for. What the real methods check beyond that, they check here.

mod access;
mod backup;
mod cluster;
mod firewall;
mod ha;
mod lxc;
mod network;
mod nodes;
mod pools;
mod storage;
mod tasks;

use std::sync::Arc;

pub(crate) use cluster::{tell_now, tell_statuses};
use serde_json::{Map, Value, json};

use crate::{
    access::{Caller, Rights, UserCfg},
    answer::{Answered, Data, Refusal},
    schema::check_parameters,
    sim::Sim,
};

/// One call.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) sim: Arc<Sim>,
    /// The host that it came in at.
    pub(crate) host: String,
    pub(crate) caller: Caller,
    pub(crate) method: String,
    pub(crate) template: String,
    pub(crate) given: Map<String, Value>,
}

impl Call {
    /// A text parameter.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.given.get(name).and_then(Value::as_str)
    }

    /// A parameter that the schema makes sure of.
    pub(crate) fn needed(&self, name: &str) -> Answered<&str> {
        self.text(name).ok_or_else(|| Refusal::parameter(name, "property is missing and it is not optional"))
    }

    /// An integer parameter.
    pub(crate) fn integer(&self, name: &str) -> Option<i64> {
        self.given.get(name).and_then(Value::as_i64)
    }

    /// A boolean parameter; false if absent.
    pub(crate) fn flag(&self, name: &str) -> bool {
        self.integer(name) == Some(1)
    }

    /// The host that the call is for.
    pub(crate) fn node(&self) -> Answered<&str> {
        self.needed("node")
    }

    /// The guest that the call is for.
    pub(crate) fn vmid(&self) -> Answered<u32> {
        self.vmid_of("vmid")
    }

    pub(crate) fn vmid_of(&self, name: &str) -> Answered<u32> {
        let given = self.integer(name).and_then(|n| u32::try_from(n).ok());
        given.ok_or_else(|| Refusal::parameter(name, "property is missing and it is not optional"))
    }

    /// Users, ACLs and all that as they are now.
    pub(crate) fn users(&self) -> Answered<UserCfg> {
        Ok(self.sim.users()?)
    }

    /// Checks privileges beyond those of the schema.
    pub(crate) fn check(&self, path: &str, privileges: &[&str]) -> Answered<()> {
        let users = self.users()?;
        Rights::of(&users, &self.caller).check(path, privileges)
    }

    /// Whether the caller has one of the privileges.
    pub(crate) fn has_any(&self, path: &str, privileges: &[&str]) -> Answered<bool> {
        let users = self.users()?;
        Ok(Rights::of(&users, &self.caller).has_any(path, privileges))
    }

    /// Starts a task on the call's host.
    pub(crate) fn fork<F, W>(&self, node: &str, kind: &str, id: &str, work: W) -> Answered
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
        W: FnOnce(crate::tasks::TaskLog) -> F,
    {
        let upid = self.sim.tasks.fork(node, kind, id, &self.caller, work)?;
        Ok(json!(upid).into())
    }
}

/// Does a call as root@pam does it on a host, without HTTP.
pub(crate) async fn call_as_root(
    sim: &Arc<Sim>,
    host: &str,
    method: &str,
    path: &str,
    parameters: Map<String, Value>,
) -> Answered<Data> {
    let found = sim.schema.find(method, path);
    let found =
        found.ok_or_else(|| Refusal::new(501, format!("Method '{method} {path}' not implemented")))?;
    let mut given = parameters;
    given.extend(found.in_path.into_iter().map(|(name, value)| (name, json!(value))));
    sim.host(host)?;
    let call = Call {
        sim: Arc::clone(sim),
        host: host.to_owned(),
        caller: Caller::parse("root@pam"),
        method: method.to_owned(),
        template: found.template.to_owned(),
        given: check_parameters(found.method, given)?,
    };
    dispatch(call).await
}

/// Does a call.
pub(crate) async fn dispatch(call: Call) -> Answered<Data> {
    let template = call.template.clone();
    let area = template.split('/').nth(1).unwrap_or("");
    let done = match area {
        "version" => Some(nodes::version(&call)),
        "access" => access::dispatch(&call).await,
        "pools" => pools::dispatch(&call).await,
        "storage" => storage::dispatch_cluster(&call).await,
        "cluster" => match template.strip_prefix("/cluster/ha") {
            Some(_) => ha::dispatch(&call).await,
            None => cluster::dispatch(&call).await,
        },
        "nodes" => dispatch_node(&call, &template).await,
        _ => None,
    };
    match done {
        Some(answered) => answered,
        None if call.method == "GET" && !call.sim.schema.children(&template).is_empty() => {
            let index: Vec<Value> = call
                .sim
                .schema
                .children(&template)
                .into_iter()
                .map(|name| json!({ "subdir": name, "name": name }))
                .collect();
            Ok(json!(index).into())
        }
        None => Err(Refusal::new(501, format!("Method '{} {template}' is not simulated", call.method))),
    }
}

async fn dispatch_node(call: &Call, template: &str) -> Option<Answered> {
    let below = template.strip_prefix("/nodes/{node}/").unwrap_or("");
    match below.split('/').next().unwrap_or("") {
        "lxc" if below.contains("/firewall") => firewall::dispatch(call).await,
        "lxc" => lxc::dispatch(call).await,
        "tasks" => tasks::dispatch(call).await,
        "storage" => storage::dispatch_node(call).await,
        "network" => network::dispatch(call),
        "vzdump" => backup::dispatch(call).await,
        _ => nodes::dispatch(call).await,
    }
}

/// A parameter's value as it stands in a file.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
