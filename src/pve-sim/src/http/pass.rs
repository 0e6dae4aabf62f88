//! Calls for a host that another process serves: passed on as pveproxy does, over TLS with the cluster's CA.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use serde_json::{Map, Value};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::answer::{Answered, Data, Refusal};

/// The largest answer that is passed on.
const ANSWER_MAX: usize = 16 << 20;
/// How long the other host may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// One call for another host.
#[derive(Debug)]
pub(super) struct Passed<'a> {
    pub(super) to: SocketAddr,
    pub(super) ca: &'a Path,
    pub(super) method: &'a str,
    /// Below `/api2/json`, decoded.
    pub(super) path: &'a str,
    pub(super) authorization: &'a str,
    /// All parameters but those of the path.
    pub(super) given: Map<String, Value>,
}

impl Passed<'_> {
    /// The other host's answer. One that cannot be had is 595, as between hosts.
    pub(super) async fn send(self) -> Answered<Data> {
        let lost = |why: &dyn std::fmt::Display| Refusal::new(595, why.to_string());
        let stream = tokio::time::timeout(CONNECT, TcpStream::connect(self.to))
            .await
            .map_err(|_| lost(&"Connection timed out"))?
            .map_err(|e| lost(&e))?;
        let name = ServerName::IpAddress(self.to.ip().into());
        let stream = connector(self.ca)?.connect(name, stream).await.map_err(|e| lost(&e))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| lost(&e))?;
        let connection = tokio::spawn(connection);
        let answer = sender.send_request(self.request()?).await.map_err(|e| lost(&e))?;
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, ANSWER_MAX).collect().await.map_err(|e| lost(&e))?.to_bytes();
        connection.abort();
        let reason = head
            .extensions
            .get::<hyper::ext::ReasonPhrase>()
            .map(|r| String::from_utf8_lossy(r.as_bytes()).into_owned());
        let mut json: Value = serde_json::from_slice(&body).unwrap_or_default();
        if head.status.is_success() {
            let total = json["total"].as_u64();
            return Ok(Data { data: json["data"].take(), total });
        }
        let errors = serde_json::from_value(json["errors"].take()).unwrap_or_default();
        let message = json["message"].as_str().map(|m| m.trim_end().to_owned()).or(reason);
        Err(Refusal { code: head.status.as_u16(), message: message.unwrap_or_default(), errors })
    }

    fn request(&self) -> Answered<Request<Full<Bytes>>> {
        let mut form = form_urlencoded::Serializer::new(String::new());
        for (name, value) in &self.given {
            form.append_pair(name, value.as_str().map_or_else(|| value.to_string(), str::to_owned).as_str());
        }
        let form = form.finish();
        let path = self.path.split('/').map(|part| {
            percent_encoding::utf8_percent_encode(part, percent_encoding::NON_ALPHANUMERIC).to_string()
        });
        let mut uri = format!("/api2/json{}", path.collect::<Vec<_>>().join("/"));
        let in_body = matches!(self.method, "POST" | "PUT");
        if !in_body && !form.is_empty() {
            uri = format!("{uri}?{form}");
        }
        let method =
            Method::from_bytes(self.method.as_bytes()).map_err(|e| Refusal::new(501, e.to_string()))?;
        let mut request = Request::builder()
            .method(method)
            .uri(uri)
            .header(header::HOST, self.to.to_string())
            .header(header::AUTHORIZATION, self.authorization);
        if in_body {
            request = request.header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        }
        let body = if in_body { Bytes::from(form) } else { Bytes::new() };
        request.body(Full::new(body)).map_err(|e| Refusal::new(501, e.to_string()))
    }
}

/// Trusts the cluster's own CA, as its hosts do among themselves.
fn connector(ca: &Path) -> Answered<TlsConnector> {
    let unusable = |why: &dyn std::fmt::Display| Refusal::new(596, format!("tls: {why}"));
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca).map_err(|e| unusable(&e))? {
        roots.add(certificate.map_err(|e| unusable(&e))?).map_err(|e| unusable(&e))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| unusable(&e))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}
