//! The checker itself: what it takes and what it names.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use moxlet_tests_pve::schema::{EXCEPTIONS, Kind, Schema, params_of_json};
use serde_json::json;

fn params(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn request(method: &str, path: &str, list: &[(&str, &str)]) -> Vec<(Kind, String)> {
    let wrong = Schema::official().check_request(method, path, &params(list));
    wrong.into_iter().map(|v| (v.kind, v.place)).collect()
}

#[test]
fn the_schema_is_whole() {
    let schema = Schema::official();
    assert_eq!(schema.version(), "9.2");
    assert!(schema.calls().count() > 200);
}

#[test]
fn a_good_request_passes() {
    assert_eq!(
        request(
            "POST",
            "/nodes/pve-1/lxc",
            &[
                ("vmid", "1000000"),
                ("ostemplate", "local:vztmpl/a.tar.zst"),
                (
                    "net0",
                    "name=eth0,bridge=vmbr0,ip=10.0.0.2/24,gw=10.0.0.1,hwaddr=BC:24:11:00:00:01,host-managed=1"
                ),
                ("rootfs", "local-zfs:4"),
                ("mp0", "/srv,mp=/run/guard,ro=1"),
                ("features", "nesting=1"),
                ("tags", "moxlet;ns-default"),
                ("startup", "down=40"),
            ]
        ),
        []
    );
    assert_eq!(request("GET", "/api2/json/nodes/a/tasks/UPID%3Aa%3A1%3A/status", &[]), []);
}

#[test]
fn what_is_wrong_with_a_request_is_named() {
    let lxc = "/nodes/a/lxc/100";
    for (method, path, list, kind, place) in [
        ("GET", "/nothing", &[][..], Kind::UnknownPath, ""),
        ("PATCH", "/version", &[], Kind::UnknownMethod, ""),
        ("GET", "/nodes/a_b/lxc", &[], Kind::WrongFormat, "parameter node"),
        ("GET", "/nodes/a/lxc/99/config", &[], Kind::OutOfRange, "parameter vmid"),
        ("DELETE", lxc, &[("purge", "maybe")], Kind::WrongType, "parameter purge"),
        ("DELETE", lxc, &[("purge", "1"), ("purge", "1")], Kind::WrongFormat, "parameter purge"),
        ("DELETE", lxc, &[("all", "1")], Kind::UnknownParameter, "parameter all"),
        ("POST", "/nodes/a/lxc/100/migrate", &[], Kind::MissingParameter, "parameter target"),
        (
            "PUT",
            "/nodes/a/lxc/100/config",
            &[("net0", "name=eth0,mtu=1")],
            Kind::OutOfRange,
            "parameter net0.mtu",
        ),
        (
            "PUT",
            "/nodes/a/lxc/100/config",
            &[("net01", "name=eth0")],
            Kind::UnknownParameter,
            "parameter net01",
        ),
        ("PUT", "/nodes/a/lxc/100/config", &[("mp0", "/a,ro=1")], Kind::MissingParameter, "parameter mp0.mp"),
        (
            "PUT",
            "/nodes/a/lxc/100/config",
            &[("mp0", "/a,mp=/b,x=1")],
            Kind::UnknownParameter,
            "parameter mp0.x",
        ),
        ("PUT", "/nodes/a/lxc/100/config", &[("ostype", "windows")], Kind::NotInEnum, "parameter ostype"),
        ("PUT", "/nodes/a/lxc/100/config", &[("memory", "15")], Kind::OutOfRange, "parameter memory"),
        ("GET", "/cluster/resources", &[("type", "ct")], Kind::NotInEnum, "parameter type"),
    ] {
        let found = request(method, path, list);
        assert!(found.contains(&(kind, place.to_owned())), "{method} {path} {list:?}: {found:?}");
    }
}

#[test]
fn the_looseness_of_the_real_server_is_taken_in_answers() {
    let schema = Schema::official();
    let taken = [
        ("/nodes/a/lxc/100/interfaces", json!(null)),
        ("/nodes/a/lxc", json!([{"vmid": "100", "status": "running", "template": ""}])),
        ("/nodes/a/lxc", json!([{"vmid": 100, "status": "running", "cpu": 0.5, "mem": "77"}])),
        ("/cluster/nextid", json!("100")),
    ];
    for (path, data) in taken {
        assert_eq!(schema.check_answer("GET", path, &data), [], "{path}");
    }
}

#[test]
fn what_is_wrong_with_an_answer_is_named() {
    let schema = Schema::official();
    for (path, data, kind, place) in [
        ("/nodes/a/lxc", json!([{"vmid": 100}]), Kind::MissingField, "answer[0].status"),
        ("/nodes/a/lxc", json!([{"vmid": 100, "status": "paused"}]), Kind::NotInEnum, "answer[0].status"),
        (
            "/nodes/a/lxc",
            json!([{"vmid": 100, "status": "running", "x": 1}]),
            Kind::UndeclaredField,
            "answer[0].x",
        ),
        ("/nodes/a/lxc", json!({}), Kind::WrongType, "answer"),
        ("/nodes/a/lxc", json!([{"vmid": 1.5, "status": "running"}]), Kind::WrongType, "answer[0].vmid"),
        (
            "/nodes/a/lxc/100/config",
            json!({"digest": "x", "net0": "mtu=1"}),
            Kind::MissingParameter,
            "answer.net0.name",
        ),
    ] {
        let found = schema.check_answer("GET", path, &data);
        assert!(found.iter().any(|v| v.kind == kind && v.place == place), "{path} {data}: {found:?}");
    }
    assert_eq!(schema.check_answer("PUT", "/nodes/a/lxc/100/config", &json!(1))[0].kind, Kind::WrongType);
}

#[test]
fn every_exception_is_of_a_call_that_exists() {
    let schema = Schema::official();
    for exception in EXCEPTIONS {
        assert!(
            schema.calls().any(|c| c == (exception.method, exception.path)),
            "{} {}: {}",
            exception.method,
            exception.path,
            exception.why
        );
    }
}

#[test]
fn a_json_body_is_a_form() {
    let body = json!({"a": true, "b": 3, "c": "x", "d": null, "e": ["1", "2"]});
    assert_eq!(params_of_json(&body), params(&[("a", "1"), ("b", "3"), ("c", "x"), ("e", "1"), ("e", "2")]));
}
