//! Docker's `config.json`, the `dockerconfigjson` of a pull secret (the same format), and the older `.dockercfg`.
//!
//! What is wrong with a file is said without a word out of it: it is full of secrets.

use std::collections::BTreeMap;

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde::Deserialize;

use super::Credentials;

/// The largest file that is read, in bytes: no Secret is larger.
pub(super) const MAX_FILE: usize = 1 << 20;

/// Padding may be there or not, as the kubelet takes both.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What a file says, by the keys as they are written.
#[derive(Default)]
pub(super) struct DockerConfig {
    pub(super) auths: Vec<(String, Credentials)>,
    /// The helper for all registries.
    pub(super) creds_store: Option<String>,
    /// The helper of a registry.
    pub(super) cred_helpers: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    #[serde(default)]
    auths: Option<BTreeMap<String, Option<Entry>>>,
    #[serde(default)]
    creds_store: Option<String>,
    #[serde(default)]
    cred_helpers: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

/// Reads a file of either format.
///
/// # Errors
/// What is wrong with it; nothing of its contents.
pub(super) fn parse(bytes: &[u8]) -> Result<DockerConfig, String> {
    if bytes.len() > MAX_FILE {
        return Err(format!("it is larger than {MAX_FILE} bytes"));
    }
    let top: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(bytes).map_err(|e| place(&e))?;
    let file = if is_old(&top) {
        let auths = serde_json::from_slice(bytes).map_err(|e| place(&e))?;
        File { auths: Some(auths), creds_store: None, cred_helpers: None }
    } else {
        serde_json::from_slice(bytes).map_err(|e| place(&e))?
    };
    let mut config = DockerConfig {
        auths: Vec::new(),
        creds_store: file.creds_store.filter(|s| !s.is_empty()),
        cred_helpers: file.cred_helpers.unwrap_or_default(),
    };
    for (key, entry) in file.auths.unwrap_or_default() {
        let credentials =
            entry.unwrap_or_default().read().map_err(|e| format!("the entry of {key:?}: {e}"))?;
        config.auths.push((key, credentials));
    }
    Ok(config)
}

/// Where a file cannot be understood. The error's own text would quote what it found there.
fn place(error: &serde_json::Error) -> String {
    let what = match error.classify() {
        serde_json::error::Category::Data => "it has a value of the wrong type",
        _ => "it is not JSON",
    };
    format!("{what} at line {}, column {}", error.line(), error.column())
}

/// `.dockercfg` has the registries at the top.
fn is_old(top: &serde_json::Map<String, serde_json::Value>) -> bool {
    let login = |value: &serde_json::Value| {
        value.as_object().is_some_and(|entry| {
            ["auth", "username", "password", "email", "identitytoken", "registrytoken"]
                .iter()
                .any(|key| entry.contains_key(*key))
        })
    };
    !top.contains_key("auths") && !top.is_empty() && top.values().all(login)
}

impl Entry {
    /// `auth` decides over `username` and `password`.
    fn read(self) -> Result<Credentials, String> {
        let mut credentials = Credentials {
            username: self.username.unwrap_or_default(),
            password: self.password.unwrap_or_default(),
            identity_token: self.identitytoken.unwrap_or_default(),
            registry_token: self.registrytoken.unwrap_or_default(),
        };
        if let Some(auth) = self.auth.filter(|a| !a.is_empty()) {
            (credentials.username, credentials.password) = decode(&auth)?;
        }
        Ok(credentials)
    }
}

/// User and password of an `auth`; old files have NULs behind the password.
fn decode(auth: &str) -> Result<(String, String), String> {
    let compact: String = auth.trim().chars().filter(|c| !matches!(c, '\r' | '\n')).collect();
    let bytes = BASE64.decode(compact).map_err(|_| "its auth is not base64".to_owned())?;
    let text = String::from_utf8(bytes).map_err(|_| "its auth is not text".to_owned())?;
    let (user, password) = text.split_once(':').ok_or("its auth is not user:password")?;
    Ok((user.to_owned(), password.trim_end_matches('\0').to_owned()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    fn one(text: &str) -> Credentials {
        let mut config = parse(text.as_bytes()).unwrap();
        assert_eq!(config.auths.len(), 1, "{text}");
        config.auths.remove(0).1
    }

    fn user(name: &str, password: &str) -> Credentials {
        Credentials { username: name.into(), password: password.into(), ..Credentials::default() }
    }

    #[test]
    fn both_formats_are_read() {
        // dXNlcjpwYTpzcw== is user:pa:ss, dXNlcjpwYXNzAAA= is user:pass and two NULs.
        for (text, want) in [
            (r#"{"auths":{"a.b":{"auth":"dXNlcjpwYTpzcw=="}}}"#, user("user", "pa:ss")),
            (r#"{"auths":{"a.b":{"auth":"dXNlcjpwYTpzcw"}}}"#, user("user", "pa:ss")),
            (r#"{"auths":{"a.b":{"auth":"dXNlcjpw\nYTpzcw==\n"}}}"#, user("user", "pa:ss")),
            (r#"{"auths":{"a.b":{"auth":"dXNlcjpwYXNzAAA="}}}"#, user("user", "pass")),
            (r#"{"auths":{"a.b":{"username":"u","password":"p","email":"x@y"}}}"#, user("u", "p")),
            (r#"{"auths":{"a.b":{"username":"u","auth":"dXNlcjpwYTpzcw=="}}}"#, user("user", "pa:ss")),
            (r#"{"a.b":{"auth":"dXNlcjpwYTpzcw==","email":"x@y"}}"#, user("user", "pa:ss")),
            (r#"{"auths":{"a.b":null}}"#, Credentials::default()),
            (
                r#"{"auths":{"a.b":{}},"HttpHeaders":{"User-Agent":"x"},"detachKeys":"a"}"#,
                Credentials::default(),
            ),
        ] {
            assert_eq!(one(text), want, "{text}");
        }
        let tokens = one(r#"{"auths":{"a.b":{"identitytoken":"i","registrytoken":"r"}}}"#);
        assert_eq!((tokens.identity_token.as_str(), tokens.registry_token.as_str()), ("i", "r"));
    }

    #[test]
    fn helpers_are_read() {
        let config = parse(br#"{"credsStore":"pass","credHelpers":{"a.b":"ecr-login"}}"#).unwrap();
        assert_eq!(config.creds_store.as_deref(), Some("pass"));
        assert_eq!(config.cred_helpers["a.b"], "ecr-login");
        assert!(config.auths.is_empty());
        assert!(parse(b"{}").unwrap().auths.is_empty());
    }

    #[test]
    fn what_is_wrong_is_said_without_the_contents() {
        for (text, said) in [
            (r#"{"auths":{"a.b":"secret"}}"#, "wrong type"),
            (r#"{"auths":{"a.b":{"password":["secret"]}}}"#, "wrong type"),
            (r#"{"auths":{"a.b":{"auth":"secret%"}}}"#, r#"the entry of "a.b": its auth is not base64"#),
            (r#"{"auths":{"a.b":{"auth":"c2VjcmV0"}}}"#, "its auth is not user:password"),
            (r#"{"auths":{"a.b":{"auth":"//86//8="}}}"#, "its auth is not text"),
            (r#"{"secret"}"#, "not JSON"),
            (r#"["secret"]"#, "wrong type"),
            ("", "not JSON"),
        ] {
            let error = parse(text.as_bytes()).err().unwrap();
            assert!(error.contains(said) && !error.contains("secret"), "{text}: {error}");
        }
        assert!(parse(&vec![b' '; MAX_FILE + 1]).is_err());
    }
}
