//! Reads a request as PVE::APIServer::AnyEvent does: what it refuses before the API sees the call, and the parameters.

use bytes::Bytes;
use http::{HeaderMap, Method, Request, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde_json::{Map, Value};

use crate::answer::{Answered, Refusal};

/// The largest body of a call.
pub(super) const BODY_MAX: usize = 512 * 1024;

/// Refuses what the HTTP server itself does not take.
pub(super) fn check_head(method: &Method, headers: &HeaderMap) -> Answered<()> {
    let refuse = |why: String| Err(Refusal::new(501, why));
    if let Some(coding) = headers.get(header::TRANSFER_ENCODING) {
        let coding = String::from_utf8_lossy(coding.as_bytes());
        return refuse(if coding.eq_ignore_ascii_case("chunked") {
            "chunked transfer encoding not supported".into()
        } else {
            format!("Unknown transfer encoding '{coding}'")
        });
    }
    if !matches!(*method, Method::GET | Method::POST | Method::PUT | Method::DELETE | Method::HEAD) {
        return refuse(format!("method '{method}' not available"));
    }
    let length: u64 =
        headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok()).unwrap_or(0);
    if length > 0 && !matches!(*method, Method::POST | Method::PUT) {
        return refuse(format!("Unexpected content for method '{method}'"));
    }
    if length > BODY_MAX as u64 {
        return refuse("for data too large".into());
    }
    Ok(())
}

/// The path below `/api2/json`, decoded; `/` for the root.
pub(super) fn api_path(path: &str) -> Option<String> {
    let rest = path.strip_prefix("/api2/json")?;
    if !rest.is_empty() && !rest.starts_with('/') {
        return None;
    }
    let decoded = percent_encoding::percent_decode_str(rest).decode_utf8_lossy();
    let trimmed = decoded.trim_end_matches('/');
    Some(if trimmed.is_empty() { "/".to_owned() } else { trimmed.to_owned() })
}

/// The parameters: of the query for GET and DELETE, of the body (and the query) otherwise.
pub(super) async fn parameters(request: Request<Incoming>) -> Answered<Map<String, Value>> {
    let mut all = Map::new();
    add_form(&mut all, request.uri().query().unwrap_or("").as_bytes());
    let json = request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).is_some_and(|t| {
        t.split(';').next().is_some_and(|t| t.trim().eq_ignore_ascii_case("application/json"))
    });
    let bytes = Limited::new(request.into_body(), BODY_MAX)
        .collect()
        .await
        .map_err(|e| Refusal::new(400, format!("body: {e}")))?
        .to_bytes();
    add_body(&mut all, &bytes, json)?;
    Ok(all)
}

fn add_body(all: &mut Map<String, Value>, bytes: &Bytes, json: bool) -> Answered<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    if !json {
        add_form(all, bytes);
        return Ok(());
    }
    match serde_json::from_slice::<Value>(bytes) {
        Ok(Value::Object(object)) => all.extend(object),
        Ok(_) => return Err(Refusal::new(400, "JSON body is no object")),
        Err(e) => return Err(Refusal::new(400, format!("malformed JSON string: {e}"))),
    }
    Ok(())
}

fn add_form(all: &mut Map<String, Value>, bytes: &[u8]) {
    for (key, value) in form_urlencoded::parse(bytes) {
        match all.get_mut(key.as_ref()) {
            // A parameter that comes twice is a list, which Perl joins with NUL.
            Some(Value::String(earlier)) => {
                earlier.push('\0');
                earlier.push_str(&value);
            }
            _ => {
                all.insert(key.into_owned(), Value::from(value.into_owned()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_decoded_before_they_are_looked_up() {
        assert_eq!(
            api_path("/api2/json/nodes/a/tasks/UPID%3Aa%3Ax%40pve%21t%3A/").as_deref(),
            Some("/nodes/a/tasks/UPID:a:x@pve!t:")
        );
        assert_eq!(api_path("/api2/json").as_deref(), Some("/"));
        assert_eq!(api_path("/api2/jsonx"), None);
    }
}
