//! Users, API tokens, roles and the access control list: `user.cfg` and `priv/token.cfg`, and what they permit.

mod permissions;
mod privileges;
mod user_cfg;

pub(crate) use permissions::{Rights, check_api};
pub(crate) use privileges::{ALL as ALL_PRIVILEGES, BUILTIN_ROLES};
pub(crate) use user_cfg::{AclEntry, Pool, TokenEntry, User, UserCfg};

use crate::{Result, pmxcfs::Pmxcfs};

/// Who calls: a user, or a token of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    /// `user@realm`.
    pub(crate) user: String,
    /// The token's id.
    pub(crate) token: Option<String>,
}

impl Caller {
    /// `user@realm` or `user@realm!token`.
    pub(crate) fn full(&self) -> String {
        match &self.token {
            Some(token) => format!("{}!{token}", self.user),
            None => self.user.clone(),
        }
    }

    /// Splits `user@realm[!token]`.
    pub(crate) fn parse(text: &str) -> Self {
        match text.split_once('!') {
            Some((user, token)) => Self { user: user.into(), token: Some(token.into()) },
            None => Self { user: text.into(), token: None },
        }
    }

    /// Only root@pam itself is: a token of it is not.
    pub(crate) fn is_root(&self) -> bool {
        self.token.is_none() && self.user == "root@pam"
    }
}

/// Reads `user.cfg`.
pub(crate) fn load(cfs: &Pmxcfs) -> Result<UserCfg> {
    Ok(UserCfg::parse(&cfs.read("user.cfg")?.unwrap_or_default()))
}

/// Reads the tokens' secrets: `user@realm!id` → secret.
pub(crate) fn load_secrets(cfs: &Pmxcfs) -> Result<std::collections::BTreeMap<String, String>> {
    let text = cfs.read("priv/token.cfg")?.unwrap_or_default();
    Ok(text
        .lines()
        .filter_map(|l| l.split_once(' '))
        .map(|(id, secret)| (id.to_owned(), secret.to_owned()))
        .collect())
}

/// The text of `priv/token.cfg`.
pub(crate) fn format_secrets(secrets: &std::collections::BTreeMap<String, String>) -> String {
    secrets.iter().map(|(id, secret)| format!("{id} {secret}\n")).collect()
}

/// Why an `Authorization` header is refused, in PVE::AccessControl's words.
pub(crate) fn authenticate(
    cfs: &Pmxcfs,
    header: Option<&str>,
    now: i64,
) -> std::result::Result<Caller, String> {
    let token =
        header.and_then(|h| h.strip_prefix("PVEAPIToken=").or_else(|| h.strip_prefix("PVEAPIToken ")));
    let Some(token) = token else { return Err("No ticket".into()) };
    let Some((id, secret)) = token.split_once(['=', ':']) else {
        return Err(format!("token value '{}' is malformed", token.split('=').next().unwrap_or("")));
    };
    let caller = Caller::parse(id);
    let Some(token_id) = &caller.token else { return Err("invalid API token - no token id".into()) };
    let cfg = load(cfs).map_err(|e| e.to_string())?;
    let Some(user) = cfg.users.get(&caller.user) else {
        return Err(format!("no such user ('{}')", caller.user));
    };
    if !user.enabled {
        return Err(format!("user '{}' is disabled", caller.user));
    }
    if user.expire != 0 && user.expire <= now {
        return Err("account expired".into());
    }
    let Some(entry) = user.tokens.get(token_id) else {
        return Err(format!("no such token '{token_id}' for user '{}'", caller.user));
    };
    if entry.expire != 0 && entry.expire <= now {
        return Err(format!("token '{token_id}' access expired"));
    }
    let secrets = load_secrets(cfs).map_err(|e| e.to_string())?;
    match secrets.get(id) {
        Some(known) if known == secret => Ok(caller),
        _ => Err("invalid token value!".into()),
    }
}
