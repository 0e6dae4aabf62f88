//! Logging in at a registry: Basic, or a Bearer token from the place that the registry names.

use reqwest::{
    StatusCode, Url,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE},
};

use super::Session;
use crate::{Credentials, Result, error::chain};

const MAX_TOKEN: usize = 64 << 10;

/// How a registry wants to be logged in at.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// The challenges that we know; at most a few.
pub(super) fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    let values = headers.get_all(WWW_AUTHENTICATE).iter().take(4);
    values.filter_map(|v| challenge(v.to_str().ok()?)).collect()
}

fn challenge(text: &str) -> Option<Challenge> {
    let (scheme, mut rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let (mut realm, mut service, mut scope) = (None, None, None);
    while let Some((key, after)) = rest.split_once('=') {
        let value;
        if let Some(quoted) = after.strip_prefix('"') {
            (value, rest) = quoted.split_once('"')?;
            rest = rest.trim_start().strip_prefix(',').unwrap_or(rest);
        } else {
            (value, rest) = after.split_once(',').unwrap_or((after, ""));
        }
        match key.trim().to_ascii_lowercase().as_str() {
            "realm" => realm = Some(value.to_owned()),
            "service" => service = Some(value.to_owned()),
            "scope" => scope = Some(value.to_owned()),
            _ => {}
        }
    }
    Some(Challenge::Bearer { realm: realm?, service, scope })
}

#[derive(serde::Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Session<'_> {
    /// The header for some credentials (empty ones are nobody's); none where these do not fit the challenges.
    pub(super) async fn log_in(
        &self,
        challenges: &[Challenge],
        credentials: &Credentials,
    ) -> Result<Option<HeaderValue>> {
        if !credentials.registry_token.is_empty() {
            return Ok(secret(format!("Bearer {}", credentials.registry_token)));
        }
        for challenge in challenges {
            match challenge {
                Challenge::Basic => {
                    if let Some(header) = basic(credentials) {
                        return Ok(Some(header));
                    }
                }
                Challenge::Bearer { realm, service, scope } => {
                    let token = self.token(realm, service.as_deref(), scope.as_deref(), credentials).await?;
                    return Ok(secret(format!("Bearer {token}")));
                }
            }
        }
        Ok(None)
    }

    /// A token, by GET with Basic as Docker asks for it, or by POST with a refresh token (RFC 6749, section 6).
    async fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
        credentials: &Credentials,
    ) -> Result<String> {
        let mut url = Url::parse(realm).map_err(|_| self.denied("the token realm is no address"))?;
        if !self.registry.may_go(&url) {
            return Err(self.denied("the token realm is an address without TLS"));
        }
        let ours = format!("repository:{}:pull", self.reference.repository());
        let scope = scope.unwrap_or(&ours);
        let client = self.registry.client(&url);
        let request = if credentials.identity_token.is_empty() {
            {
                let mut query = url.query_pairs_mut();
                if let Some(service) = service {
                    query.append_pair("service", service);
                }
                query.append_pair("scope", scope);
            }
            match basic(credentials) {
                Some(login) => client.get(url).header(AUTHORIZATION, login),
                None => client.get(url),
            }
        } else {
            let form = [
                ("grant_type", "refresh_token"),
                ("service", service.unwrap_or_default()),
                ("client_id", "moxlet"),
                ("scope", scope),
                ("refresh_token", &credentials.identity_token),
            ];
            // A form is written as a query is.
            let mut encoder = url.clone();
            encoder.set_query(None);
            encoder.query_pairs_mut().extend_pairs(form);
            let body = encoder.query().unwrap_or_default().to_owned();
            client.post(url).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(body)
        };
        let response = request.send().await.map_err(|e| self.unreachable(&chain(&e.without_url())))?;
        match response.status() {
            s if s.is_success() => {}
            s if s.is_server_error() || s == StatusCode::TOO_MANY_REQUESTS => {
                return Err(self.unreachable(&format!("its token service answers {s}")));
            }
            s => return Err(self.denied(super::describe(s, response).await)),
        }
        let body = self.body(response, MAX_TOKEN, "token").await?;
        let token: Option<Token> = serde_json::from_slice(&body).ok();
        token
            .and_then(|t| t.token.or(t.access_token))
            .filter(|t| !t.is_empty())
            .ok_or_else(|| self.denied("the token service gave no token"))
    }
}

/// The header of a user and password, if there are any.
fn basic(credentials: &Credentials) -> Option<HeaderValue> {
    if credentials.username.is_empty() && credentials.password.is_empty() {
        return None;
    }
    let pair = format!("{}:{}", credentials.username, credentials.password);
    secret(format!("Basic {}", base64(pair.as_bytes())))
}

fn secret(text: String) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn base64(bytes: &[u8]) -> String {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    #[test]
    fn challenges_are_read() {
        let text = r#"Bearer realm="https://a.b/token",service="r",scope="repository:a/b:pull,push""#;
        let bearer = Challenge::Bearer {
            realm: "https://a.b/token".into(),
            service: Some("r".into()),
            scope: Some("repository:a/b:pull,push".into()),
        };
        assert_eq!(challenge(text), Some(bearer));
        assert_eq!(challenge("basic realm=x"), Some(Challenge::Basic));
        for text in ["", "Bearer", "Bearer realm", "Bearer realm=\"x", "Digest realm=x", "Bearer service=a"] {
            assert_eq!(challenge(text), None, "{text}");
        }
    }
}
