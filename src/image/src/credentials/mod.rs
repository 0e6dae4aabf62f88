//! Ways to log in at registries, and where they come from: pull secrets, the host's `config.json`, credential helpers.

mod docker_config;
mod helper;
mod keyring;
mod node;

pub use keyring::Keyring;
pub(crate) use node::NodeCredentials;

/// One way to log in at a registry; several are tried in turn.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// The user.
    pub username: String,
    /// The password.
    pub password: String,
    /// A refresh token, for which the registry's token service gives access tokens; it comes before user and password.
    pub identity_token: String,
    /// A token that the registry takes as it is, instead of all others.
    pub registry_token: String,
}

impl Credentials {
    /// Whether there is nothing in them.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.username.is_empty()
            && self.password.is_empty()
            && self.identity_token.is_empty()
            && self.registry_token.is_empty()
    }
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}
