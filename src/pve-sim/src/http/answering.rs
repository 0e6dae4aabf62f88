//! From request to answer, in the order in which pveproxy and pvedaemon go about it.

use std::{sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::{body::Incoming, ext::ReasonPhrase};
use serde_json::{Map, Value, json};

use super::{Body, Dropped, Server, loosen::loosen, pass::Passed, request};
use crate::{
    access::{self, Caller, Rights},
    answer::{Answered, Data, Refusal},
    api::{self, Call},
    faults::CallFault,
    schema::check_parameters,
    sim::now,
};

/// The proxy's time-out between hosts.
const PROXY_TIMEOUT: Duration = Duration::from_secs(30);

/// A request's way.
struct Way {
    method: String,
    path: String,
    template: String,
    token: String,
    faults: Vec<CallFault>,
}

pub(super) async fn answer(server: Server, request: Request<Incoming>) -> Result<Response<Body>, Dropped> {
    let sim = server.sim.clone();
    if sim.faults.is_offline(&server.host) {
        return Err(Dropped);
    }
    let mut way = Way {
        method: request.method().to_string(),
        path: String::new(),
        template: "(none)".into(),
        token: String::new(),
        faults: Vec::new(),
    };
    let outcome = match accept(&server, &request, &mut way).await {
        Ok(caller) => {
            if way.faults.iter().any(|f| matches!(f, CallFault::Hang)) {
                std::future::pending::<()>().await;
            }
            if way.faults.iter().any(|f| matches!(f, CallFault::Drop { after: false })) {
                sim.faults.count(&way.method, &way.template, &way.token, 0);
                return Err(Dropped);
            }
            work(&server, request, &mut way, caller).await?
        }
        Err(refused) => Err(refused),
    };
    if way.faults.iter().any(|f| matches!(f, CallFault::Drop { after: true })) {
        sim.faults.count(&way.method, &way.template, &way.token, 0);
        return Err(Dropped);
    }
    let outcome = match way.faults.iter().find_map(after_error) {
        Some(refusal) => Err(refusal),
        None => outcome,
    };
    let status = outcome.as_ref().map_or_else(|r| r.code, |_| 200);
    sim.faults.count(&way.method, &way.template, &way.token, status);
    Ok(match outcome {
        Ok(mut data) => {
            loosen(sim.config.behaviour.types, &way.template, &mut data.data);
            let mut body = json!({ "data": data.data });
            if let Some(total) = data.total {
                body["total"] = json!(total);
            }
            let mut text = Bytes::from(body.to_string());
            if let Some(other) = way.faults.iter().find_map(|f| match f {
                CallFault::Body { text } => Some(text.clone()),
                _ => None,
            }) {
                text = Bytes::from(other);
            }
            let half = way.faults.iter().any(|f| matches!(f, CallFault::HalfAnswer));
            respond(200, None, if half { Body::half(text) } else { Body::whole(text) })
        }
        // 401 has no body.
        Err(refusal) if refusal.code == 401 => respond(401, Some(&refusal), Body::whole(Bytes::new())),
        Err(refusal) => {
            let text = Bytes::from(refusal.body().to_string());
            respond(refusal.code, Some(&refusal), Body::whole(text))
        }
    })
}

fn after_error(fault: &CallFault) -> Option<Refusal> {
    match fault {
        CallFault::Error { code, message, errors, after: true } => {
            Some(Refusal { code: *code, message: message.clone(), errors: errors.clone() })
        }
        _ => None,
    }
}

/// What comes before the call itself: the head, the caller, the faults.
async fn accept(server: &Server, request: &Request<Incoming>, way: &mut Way) -> Answered<Caller> {
    request::check_head(request.method(), request.headers())?;
    let sim = &server.sim;
    way.path = request::api_path(request.uri().path())
        .ok_or_else(|| Refusal::new(501, format!("no handler for '{}'", request.uri().path())))?;
    let header = request.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
    let caller = match access::authenticate(&sim.cfs, header, now()) {
        Ok(caller) => caller,
        Err(why) => {
            tokio::time::sleep(Duration::from_millis(sim.config.behaviour.auth_delay_ms)).await;
            return Err(Refusal::new(401, why));
        }
    };
    way.token = caller.full();
    if let Some(found) = sim.schema.find(&way.method, &way.path) {
        way.template = found.template.to_owned();
    } else if way.path == "/" {
        way.template = "/".to_owned();
    }
    way.faults = sim.faults.call(&way.method, &way.path, &way.token);
    for fault in &way.faults {
        match fault {
            CallFault::Delay { ms, hold_worker: false } => {
                tokio::time::sleep(Duration::from_millis(*ms)).await;
            }
            CallFault::Error { code, message, errors, after: false } => {
                return Err(Refusal { code: *code, message: message.clone(), errors: errors.clone() });
            }
            _ => {}
        }
    }
    Ok(caller)
}

/// The call: found, permitted, passed to its host, checked, done by a worker.
async fn work(
    server: &Server,
    request: Request<Incoming>,
    way: &mut Way,
    caller: Caller,
) -> Result<Answered<Data>, Dropped> {
    let sim = &server.sim;
    if way.path == "/" && way.method == "GET" {
        let index: Vec<Value> =
            sim.schema.children("/").into_iter().map(|s| json!({ "subdir": s })).collect();
        return Ok(Ok(json!(index).into()));
    }
    let Some(found) = sim.schema.find(&way.method, &way.path) else {
        return Ok(Err(Refusal::new(501, format!("Method '{} {}' not implemented", way.method, way.path))));
    };
    let authorization = request.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
    let authorization = authorization.unwrap_or_default().to_owned();
    let mut given = match parameters(request, &found.in_path).await {
        Ok(given) => given,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let permitted = sim
        .users()
        .map_err(Refusal::from)
        .and_then(|users| access::check_api(&found.method.permissions, &Rights::of(&users, &caller), &given));
    if let Err(refusal) = permitted {
        return Ok(Err(refusal));
    }
    let node = match target(server, found.method.on_node, &mut given).await {
        Ok(node) => node,
        Err(refusal) => return Ok(Err(refusal)),
    };
    if let Some(to) = sim.config.host(&node).and_then(|h| h.remote) {
        given.retain(|name, _| !found.in_path.iter().any(|(in_path, _)| in_path == name));
        let passed = Passed {
            to,
            ca: &sim.config.state_dir.join("tls/pve-root-ca.pem"),
            method: &way.method,
            path: &way.path,
            authorization: &authorization,
            given,
        };
        return Ok(passed.send().await);
    }
    let given = match check_parameters(found.method, given) {
        Ok(given) => given,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let call = Call {
        sim: sim.clone(),
        host: server.host.clone(),
        caller,
        method: way.method.clone(),
        template: way.template.clone(),
        given,
    };
    with_worker(server, &node, &way.faults, api::dispatch(call)).await
}

/// All parameters, those of the path included.
async fn parameters(
    request: Request<Incoming>,
    in_path: &[(String, String)],
) -> Answered<Map<String, Value>> {
    let mut given = request::parameters(request).await?;
    for (name, value) in in_path {
        if given.get(name).is_some_and(|other| other.as_str() != Some(value)) {
            let why = "duplicate parameter (already defined in URI) with conflicting values!";
            return Err(Refusal::parameter(name, why));
        }
        given.insert(name.clone(), json!(value));
    }
    Ok(given)
}

/// The host that does the work. A lost one is what the proxy between hosts makes of it.
async fn target(server: &Server, on_node: bool, given: &mut Map<String, Value>) -> Answered<String> {
    if !on_node {
        return Ok(server.host.clone());
    }
    let mut node = given.get("node").and_then(Value::as_str).unwrap_or("").to_owned();
    if node == "localhost" {
        node.clone_from(&server.host);
        given.insert("node".into(), json!(node));
    }
    server.sim.host(&node)?;
    if server.sim.faults.is_offline(&node) {
        return Err(Refusal::new(595, "No route to host"));
    }
    Ok(node)
}

/// Does a call while holding one of the host's workers, waiting for a free one.
///
/// pvedaemon has few worker processes. A call beyond them is not refused: its connection waits in the daemon's listen
/// queue until a worker accepts it, or until the proxy in front gives up. So it is here; only a full queue refuses.
async fn with_worker(
    server: &Server,
    node: &str,
    faults: &[CallFault],
    call: impl Future<Output = Answered<Data>>,
) -> Result<Answered<Data>, Dropped> {
    let sim = &server.sim;
    let Some(workers) = sim.workers(node) else { return Ok(Err(Refusal::died("no such host"))) };
    let behaviour = &sim.config.behaviour;
    let waiting = workers.waiting.fetch_add(1, Ordering::SeqCst);
    let permit = if waiting >= behaviour.worker_backlog + workers.all {
        None
    } else {
        let patience = Duration::from_millis(behaviour.worker_wait_ms).min(PROXY_TIMEOUT);
        tokio::time::timeout(patience, workers.free.acquire()).await.ok().and_then(Result::ok)
    };
    workers.waiting.fetch_sub(1, Ordering::SeqCst);
    let Some(_permit) = permit else {
        sim.faults.counts().refused_for_want_of_a_worker += 1;
        return if waiting >= behaviour.worker_backlog + workers.all {
            Err(Dropped)
        } else {
            Ok(Err(Refusal::new(596, "Connection timed out")))
        };
    };
    let at_once = (workers.all - workers.free.available_permits()) as u64;
    {
        let mut counts = sim.faults.counts();
        counts.most_at_once = counts.most_at_once.max(at_once);
    }
    for fault in faults {
        if let CallFault::Delay { ms, hold_worker: true } = fault {
            tokio::time::sleep(Duration::from_millis(*ms)).await;
        }
    }
    Ok(call.await)
}

fn respond(code: u16, refusal: Option<&Refusal>, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("max-age=0"));
    headers.insert(header::PRAGMA, HeaderValue::from_static("no-cache"));
    headers.insert(header::SERVER, HeaderValue::from_static("pve-api-daemon/3.0"));
    if code != 401 {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json;charset=UTF-8"));
    }
    if let Some(refusal) = refusal {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        if let Ok(reason) = ReasonPhrase::try_from(refusal.reason().into_bytes()) {
            response.extensions_mut().insert(reason);
        }
    }
    response
}
