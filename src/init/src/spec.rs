//! The OCI spec as libcontainer takes it in a CT: what it refuses or cannot do there is left out.

use moxlet_init_proto::CreateRequest;
use serde_json::{Value, json};

use crate::error::{Error, Result};

/// A spec that libcontainer takes.
#[derive(Debug)]
pub(crate) struct Prepared {
    /// The bundle's `config.json`.
    pub(crate) config: Vec<u8>,
    /// The container's cgroup as the CT sees it, absolute.
    pub(crate) cgroups_path: String,
    /// The user and group of its command.
    pub(crate) owner: (u32, u32),
    /// It has no PID namespace of its own.
    pub(crate) shares_pids: bool,
}

/// Adjusts the request's spec, taking it out of the request.
pub(crate) fn prepare(request: &mut CreateRequest) -> Result<Prepared> {
    let mut spec = request.spec.take();
    let wrong = |what: &str| Error::Invalid(format!("the spec of container {:?} {what}", request.id));
    if !spec["root"]["path"].as_str().is_some_and(|p| p.starts_with('/')) {
        return Err(wrong("has no absolute root.path"));
    }
    if !spec["process"]["args"].as_array().is_some_and(|a| !a.is_empty() && a.iter().all(Value::is_string)) {
        return Err(wrong("has no process.args"));
    }
    let new_uts = spec["linux"]["namespaces"]
        .as_array()
        .is_some_and(|all| all.iter().any(|n| n["type"] == "uts" && n["path"].is_null()));
    let shares_pids =
        !spec["linux"]["namespaces"].as_array().is_some_and(|all| all.iter().any(|n| n["type"] == "pid"));
    let id_of = |name: &str| spec["process"]["user"][name].as_u64().and_then(|id| u32::try_from(id).ok());
    let owner = (id_of("uid").unwrap_or(0), id_of("gid").unwrap_or(0));
    let Some(top) = spec.as_object_mut() else { return Err(wrong("is no object")) };
    if !new_uts {
        // The CT has the pod's name already; libcontainer refuses one without a UTS namespace.
        top.remove("hostname");
        top.remove("domainname");
    }
    let Some(process) = top.get_mut("process").and_then(Value::as_object_mut) else {
        return Err(wrong("has no process"));
    };
    process.insert("terminal".into(), json!(request.tty));
    // Set by the agent from the host: lowering it is forbidden in a CT.
    process.remove("oomScoreAdj");
    if process.get("noNewPrivileges") == Some(&json!(false)) {
        // libcontainer takes an explicit false for "load the filter after the capabilities are gone", which must fail.
        process.remove("noNewPrivileges");
    }
    let Some(linux) = top.get_mut("linux").and_then(Value::as_object_mut) else {
        return Err(wrong("has no linux part"));
    };
    exchange_masked_values(linux.get_mut("seccomp"));
    let path = linux.entry("cgroupsPath").or_insert_with(|| json!(format!("/{}", request.id)));
    let Some(cgroups_path) =
        path.as_str().filter(|p| p.starts_with('/') && !p.split('/').any(|part| part == ".."))
    else {
        return Err(wrong("has a cgroupsPath that is not absolute"));
    };
    let cgroups_path = cgroups_path.to_owned();
    let config = serde_json::to_vec(&spec).map_err(|e| wrong(&e.to_string()))?;
    Ok(Prepared { config, cgroups_path, owner, shares_pids })
}

/// In a masked comparison OCI's `value` is the mask and `valueTwo` what must be left (so does runc); libcontainer 0.7 reads
/// them the other way round, by which containerd's default profile would allow `clone` with every flag.
fn exchange_masked_values(seccomp: Option<&mut Value>) {
    let rules = seccomp.and_then(|s| s.get_mut("syscalls")).and_then(Value::as_array_mut);
    for rule in rules.into_iter().flatten() {
        for arg in rule.get_mut("args").and_then(Value::as_array_mut).into_iter().flatten() {
            if arg["op"] == "SCMP_CMP_MASKED_EQ" {
                let (mask, left) = (arg["value"].take(), arg["valueTwo"].take());
                arg["value"] = if left.is_null() { json!(0) } else { left };
                arg["valueTwo"] = if mask.is_null() { json!(0) } else { mask };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn request(spec: Value) -> CreateRequest {
        CreateRequest { id: "abc".into(), spec, ..CreateRequest::default() }
    }

    #[test]
    fn what_libcontainer_refuses_is_left_out() {
        let mut r = request(json!({
            "ociVersion": "1.0.2", "hostname": "web", "root": {"path": "/x"},
            "process": {"args": ["a"], "cwd": "/", "noNewPrivileges": false, "oomScoreAdj": -998},
            "linux": {"namespaces": [{"type": "pid"}]},
        }));
        let spec: Value = serde_json::from_slice(&prepare(&mut r).unwrap().config).unwrap();
        assert!(spec.get("hostname").is_none());
        assert_eq!(spec["process"], json!({"args": ["a"], "cwd": "/", "terminal": false}));
        assert_eq!(spec["linux"]["cgroupsPath"], "/abc");
    }

    #[test]
    fn no_new_privileges_and_a_new_uts_namespace_stay() {
        let mut r = request(json!({
            "hostname": "web", "root": {"path": "/x"}, "process": {"args": ["a"], "noNewPrivileges": true},
            "linux": {"namespaces": [{"type": "uts"}], "cgroupsPath": "/c"},
        }));
        let spec: Value = serde_json::from_slice(&prepare(&mut r).unwrap().config).unwrap();
        assert_eq!(spec["hostname"], "web");
        assert_eq!(spec["process"]["noNewPrivileges"], true);
        assert_eq!(spec["linux"]["cgroupsPath"], "/c");
    }

    #[test]
    fn it_is_known_whose_the_pipes_are_and_whether_processes_are_the_pods() {
        let spec = |user: Value, namespaces: Value| json!({"root": {"path": "/x"}, "process": {"args": ["a"], "user": user}, "linux": {"namespaces": namespaces}});
        let user = json!({"uid": 1000, "gid": 2000});
        let prepared =
            prepare(&mut request(spec(user, json!([{"type": "pid"}, {"type": "mount"}])))).unwrap();
        assert_eq!((prepared.owner, prepared.shares_pids), ((1000, 2000), false));
        let prepared = prepare(&mut request(spec(Value::Null, json!([{"type": "mount"}])))).unwrap();
        assert_eq!((prepared.owner, prepared.shares_pids), ((0, 0), true));
    }

    #[test]
    fn masked_comparisons_are_exchanged_and_no_others() {
        let arg = |op: &str| json!({"index": 0, "value": 7, "op": op});
        let mut r = request(json!({
            "root": {"path": "/x"}, "process": {"args": ["a"]},
            "linux": {"seccomp": {"syscalls": [{"args": [arg("SCMP_CMP_MASKED_EQ"), arg("SCMP_CMP_EQ")]}, {}]}},
        }));
        let spec: Value = serde_json::from_slice(&prepare(&mut r).unwrap().config).unwrap();
        let args = &spec["linux"]["seccomp"]["syscalls"][0]["args"];
        assert_eq!((&args[0]["value"], &args[0]["valueTwo"]), (&json!(0), &json!(7)));
        assert_eq!(args[1], arg("SCMP_CMP_EQ"));
    }

    #[test]
    fn a_spec_that_makes_no_sense_is_refused_by_name() {
        for spec in [
            json!(null),
            json!({"root": {"path": "x"}}),
            json!({"root": {"path": "/x"}, "process": {"args": []}, "linux": {}}),
            json!({"root": {"path": "/x"}, "process": {"args": ["a"]}}),
            json!({"root": {"path": "/x"}, "process": {"args": ["a"]}, "linux": {"cgroupsPath": "/../x"}}),
        ] {
            assert!(matches!(prepare(&mut request(spec)), Err(Error::Invalid(_))));
        }
    }
}
