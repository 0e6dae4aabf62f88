//! An API token: who we are to the server, and the secret that proves it.

use std::{fmt, str::FromStr};

use reqwest::header::HeaderValue;

/// An API token, `user@realm!id=secret`. Neither `Debug` nor any error shows the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    id: String,
    secret: String,
}

/// Why a text is no token. It does not repeat the text, which holds a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the API token is not of the form user@realm!id=secret: {0}")]
pub struct InvalidToken(&'static str);

impl Token {
    /// The token's full id, `user@realm!id`.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The user that the token belongs to, `user@realm`.
    #[must_use]
    pub fn user(&self) -> &str {
        self.id.split_once('!').map_or(self.id.as_str(), |(user, _)| user)
    }

    /// The `Authorization` header.
    pub(crate) fn header(&self) -> Option<HeaderValue> {
        let mut value = HeaderValue::from_str(&format!("PVEAPIToken={}={}", self.id, self.secret)).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

impl FromStr for Token {
    type Err = InvalidToken;

    /// Blanks and line ends around the token are ignored, so that a file's content can be given.
    fn from_str(s: &str) -> Result<Self, InvalidToken> {
        let (id, secret) = s.trim().split_once('=').ok_or(InvalidToken("it has no `=`"))?;
        let (user, name) = id.split_once('!').ok_or(InvalidToken("it has no `!`"))?;
        let (login, realm) = user.rsplit_once('@').ok_or(InvalidToken("the user has no `@`"))?;
        let word = |s: &str| {
            s.len() >= 2
                && s.starts_with(|c: char| c.is_ascii_alphabetic())
                && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        };
        if login.is_empty() || !login.bytes().all(|b| b.is_ascii_graphic() && !b":/".contains(&b)) {
            return Err(InvalidToken("the user's name is empty or has a character that is not allowed"));
        }
        if !word(realm) || !word(name) {
            return Err(InvalidToken(
                "realm and token id are two or more letters, digits, dots, dashes or underscores",
            ));
        }
        if secret.is_empty() || secret.len() > 256 || !secret.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(InvalidToken(
                "the secret is empty, too long, or has a character that is not allowed",
            ));
        }
        Ok(Self { id: id.to_owned(), secret: secret.to_owned() })
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("id", &self.id).field("secret", &"***").finish()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_token_file_is_read_and_its_secret_is_never_shown() {
        let token: Token = " moxlet@pve!node1=0f5e-secret \n".parse().unwrap();
        assert_eq!((token.id(), token.user()), ("moxlet@pve!node1", "moxlet@pve"));
        assert!(!format!("{token:?} {:?}", token.header().unwrap()).contains("0f5e"));
    }

    #[test]
    fn what_is_no_token_is_refused_without_repeating_it() {
        for bad in [
            "",
            "a@b",
            "root@pam!x=sec",
            "root!xx=sec",
            "root@pam!xx=",
            "root@pam!xx=a b",
            "ro ot@pam!xx=s3cr3t",
        ] {
            let error = bad.parse::<Token>().unwrap_err().to_string();
            assert!(!error.contains("s3cr3t"), "{error}");
        }
    }
}
