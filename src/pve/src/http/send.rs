//! One call: picks a server, waits for a place at it, asks it, reads its answer within bounds, tries again where that is safe.
//!
//! Safe is: a GET after anything that may pass; any method after a failure to connect, since then nothing was sent. A write
//! that may have reached a server is never sent twice.

use std::{
    borrow::Cow,
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::ext::ReasonPhrase;
use rand::RngExt;
use reqwest::{
    Response,
    header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue},
};
use serde_json::Value;

use super::{
    encode,
    endpoint::{Server, Servers},
    limits::Limits,
};
use crate::{
    Endpoint, Error, Observed, Observer, Result, Token,
    classify::{self, Failure},
    error::{CallName, chain},
};

/// The largest body that the server takes.
const MAX_REQUEST: usize = 512 << 10;
/// What is kept of an error's body.
const MAX_ERROR_BODY: usize = 64 << 10;
/// How often a call that may be repeated is sent.
const ATTEMPTS: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(2);

/// What to ask for.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) method: &'static str,
    pub(crate) template: &'static str,
    pub(crate) path: Vec<(&'static str, String)>,
    pub(crate) parameters: Vec<(Cow<'static, str>, String)>,
}

impl Request {
    pub(crate) fn new(method: &'static str, template: &'static str) -> Self {
        Self { method, template, path: Vec::new(), parameters: Vec::new() }
    }

    /// A value of the path.
    #[allow(clippy::needless_pass_by_value)] // callers give numbers, names and references to them alike
    pub(crate) fn at(mut self, name: &'static str, value: impl ToString) -> Self {
        self.path.push((name, value.to_string()));
        self
    }

    /// A parameter.
    #[allow(clippy::needless_pass_by_value)]
    pub(crate) fn with(mut self, name: impl Into<Cow<'static, str>>, value: impl ToString) -> Self {
        self.parameters.push((name.into(), value.to_string()));
        self
    }

    /// A parameter, if there is a value.
    pub(crate) fn maybe(self, name: &'static str, value: Option<impl ToString>) -> Self {
        match value {
            Some(value) => self.with(name, value),
            None => self,
        }
    }

    /// A flag, left out when it is off.
    pub(crate) fn flag(self, name: &'static str, on: bool) -> Self {
        if on { self.with(name, 1) } else { self }
    }

    fn node(&self) -> &str {
        self.path.iter().find(|(name, _)| *name == "node").map_or("", |(_, value)| value)
    }

    fn is_read(&self) -> bool {
        self.method == "GET"
    }
}

/// A successful answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) call: CallName,
    pub(crate) data: Value,
    /// Beside `data` where a list was cut by `limit`: how long it is.
    pub(crate) total: Option<u64>,
}

/// The server's half of a client.
pub(crate) struct Http {
    pub(crate) servers: Servers,
    pub(crate) token: Token,
    authorization: HeaderValue,
    answer_timeout: Duration,
    max_answer: usize,
    observer: Option<Arc<dyn Observer>>,
}

/// The bounds of a call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) connect: Duration,
    pub(crate) answer: Duration,
    pub(crate) max_answer: usize,
    pub(crate) limits: Limits,
}

impl Http {
    pub(crate) fn new(
        endpoints: &[Endpoint],
        token: Token,
        bounds: Bounds,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<Self> {
        // A second provider is not installed; whichever came first serves.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let authorization = token
            .header()
            .ok_or_else(|| Error::Setup("the API token cannot stand in a header".to_owned()))?;
        Ok(Self {
            servers: Servers::new(endpoints, bounds.connect, bounds.limits)?,
            token,
            authorization,
            answer_timeout: bounds.answer,
            max_answer: bounds.max_answer,
            observer,
        })
    }

    /// Makes a call.
    pub(crate) async fn call(&self, request: &Request) -> Result<Answer> {
        let path = encode::path(request.template, &request.path).into_boxed_str();
        let call = CallName { method: request.method, path };
        let form = encode::form(&request.parameters);
        if form.len() > MAX_REQUEST {
            let reason = format!("its parameters have {} bytes, the server takes {MAX_REQUEST}", form.len());
            return Err(Error::Refused { call, reason });
        }
        let mut pause = FIRST_PAUSE;
        let mut attempt = 1;
        loop {
            let Some((index, server)) = self.servers.pick() else {
                return Err(Error::Setup("no endpoint is given".to_owned()));
            };
            let place = server.gate.enter().await;
            let (status, result) = self.once(server, request, &call, &form, attempt).await;
            drop(place);
            let error = match result {
                Ok(answer) => {
                    self.servers.worked(index);
                    return Ok(answer);
                }
                Err(error) => error,
            };
            let again = match (status, &error) {
                // Nothing was sent.
                (None, Error::Unreachable { sent: false, .. } | Error::Certificate { .. }) => {
                    self.servers.failed(index);
                    true
                }
                (None | Some(502..=504), Error::Unreachable { .. }) => {
                    self.servers.failed(index);
                    request.is_read()
                }
                // The server is well, it is the way from it to the node that is not.
                (Some(_), Error::Unreachable { .. }) => {
                    self.servers.next(index);
                    request.is_read()
                }
                _ => false,
            };
            // Every endpoint gets its chance, also where there are more of them than tries.
            let most = ATTEMPTS.max(u32::try_from(self.servers.len()).unwrap_or(ATTEMPTS));
            let hopeless = matches!(error, Error::Certificate { .. }) && self.servers.len() == 1;
            if !again || attempt >= most || hopeless {
                return Err(error);
            }
            tracing::debug!(%error, attempt, "a call to Proxmox VE is tried again");
            let jittered = pause.mul_f64(rand::rng().random_range(0.5..1.0));
            tokio::time::sleep(jittered).await;
            pause = (pause * 2).min(LAST_PAUSE);
            attempt += 1;
        }
    }

    async fn once(
        &self,
        server: &Server,
        request: &Request,
        call: &CallName,
        form: &str,
        attempt: u32,
    ) -> (Option<u16>, Result<Answer>) {
        let started = Instant::now();
        let outcome = self.exchange(server, request, call, form).await;
        let (status, result) = match outcome {
            Ok((status, result)) => (Some(status), result),
            Err(error) => (None, Err(error)),
        };
        if let Some(observer) = &self.observer {
            observer.observe(&Observed {
                method: request.method,
                template: request.template,
                path: &call.path,
                parameters: &request.parameters,
                endpoint: &server.name,
                attempt,
                status,
                data: result.as_ref().ok().map(|a| &a.data),
                duration: started.elapsed(),
            });
        }
        (status, result)
    }

    /// Sends and reads. The outer error is one without an answer.
    async fn exchange(
        &self,
        server: &Server,
        request: &Request,
        call: &CallName,
        form: &str,
    ) -> Result<(u16, Result<Answer>)> {
        let mut url = server.url.clone();
        url.set_path(&format!("/api2/json{}", call.path));
        let method = request.method.parse().unwrap_or(reqwest::Method::GET);
        let in_body = matches!(request.method, "POST" | "PUT");
        if !in_body && !form.is_empty() {
            url.set_query(Some(form));
        }
        let mut builder = server
            .client
            .request(method, url)
            .header(AUTHORIZATION, self.authorization.clone())
            .timeout(self.answer_timeout);
        if in_body {
            // A body of known length: the server refuses chunks, and bodies of other methods.
            builder = builder
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .header(CONTENT_LENGTH, form.len())
                .body(form.to_owned());
        }
        let response = builder.send().await.map_err(|e| server.error(call, &e))?;
        let status = response.status().as_u16();
        let reason = reason_phrase(&response);
        if status == 200 {
            let body = self.body(server, call, response, self.max_answer).await?;
            return Ok((status, parse(call, &body)));
        }
        // If it cannot be read, the status line says enough.
        let body = self.body(server, call, response, MAX_ERROR_BODY).await.unwrap_or_default();
        Ok((status, Err(self.failure(server, request, call, status, &reason, &body))))
    }

    /// A body up to `max` bytes.
    async fn body(
        &self,
        server: &Server,
        call: &CallName,
        mut response: Response,
        max: usize,
    ) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let chunk = response.chunk().await.map_err(|e| Error::Unreachable {
                call: call.clone(),
                endpoint: server.name.clone(),
                reason: format!("the answer breaks off: {}", chain(&e)),
                sent: true,
            })?;
            let Some(chunk) = chunk else { return Ok(body) };
            if body.len() + chunk.len() > max {
                let reason = format!("it is longer than {max} bytes");
                return Err(unexpected(call, "an answer of bounded length", &reason, &body));
            }
            body.extend_from_slice(&chunk);
        }
    }

    fn failure(
        &self,
        server: &Server,
        request: &Request,
        call: &CallName,
        status: u16,
        reason: &str,
        body: &[u8],
    ) -> Error {
        let parsed: Option<Value> = serde_json::from_slice(body).ok().filter(Value::is_object);
        let message = parsed.as_ref().and_then(|p| p["message"].as_str()).filter(|m| !m.trim().is_empty());
        let errors = parsed.as_ref().map(errors_of).unwrap_or_default();
        let ours = parsed.is_some() || body.is_empty();
        // The API answers in JSON or with nothing. Pages of a proxy on the way tell only whether it reached the server.
        if !ours && !matches!(status, 501..=504 | 595..=599) {
            let why = format!("it has status {status} {reason}");
            return unexpected(call, "a JSON object", &why, body);
        }
        classify::answer(Failure {
            call: call.clone(),
            status,
            message: message.unwrap_or(reason),
            errors,
            endpoint: &server.name,
            node: Some(request.node()).filter(|n| !n.is_empty()),
            token: self.token.id(),
        })
    }
}

/// The text of the status line: it is where older daemons put the message.
fn reason_phrase(response: &Response) -> String {
    let own = response.extensions().get::<ReasonPhrase>();
    match own {
        Some(phrase) => String::from_utf8_lossy(phrase.as_bytes()).into_owned(),
        None => response.status().canonical_reason().unwrap_or_default().to_owned(),
    }
}

/// The `errors` map: a text for each parameter.
fn errors_of(body: &Value) -> Vec<(String, String)> {
    let Some(errors) = body["errors"].as_object() else { return Vec::new() };
    let text = |v: &Value| classify::bounded(v.as_str().unwrap_or(&v.to_string()));
    errors.iter().take(64).map(|(name, why)| (classify::bounded(name), text(why))).collect()
}

fn parse(call: &CallName, body: &[u8]) -> Result<Answer> {
    let wrong = |reason: &str| unexpected(call, "a JSON object with `data`", reason, body);
    let mut parsed: Value = serde_json::from_slice(body).map_err(|e| wrong(&e.to_string()))?;
    let total = parsed["total"].as_u64().or_else(|| parsed["total"].as_str()?.parse().ok());
    let Some(object) = parsed.as_object_mut() else { return Err(wrong("it is no object")) };
    match object.remove("data") {
        Some(data) => Ok(Answer { call: call.clone(), data, total }),
        None => Err(wrong("`data` is missing")),
    }
}

/// The error for an answer that the API does not give.
pub(crate) fn unexpected(call: &CallName, expected: &'static str, reason: &str, body: &[u8]) -> Error {
    let start = body.get(..body.len().min(800)).unwrap_or_default();
    let got: String = String::from_utf8_lossy(start).chars().take(200).collect();
    Error::Unexpected { call: call.clone(), expected, reason: classify::bounded(reason), got }
}
