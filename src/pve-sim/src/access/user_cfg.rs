//! The file `user.cfg`: colon-separated lines of users, tokens, groups, roles, ACL entries and pools.

use std::collections::{BTreeMap, BTreeSet};

use super::privileges::BUILTIN_ROLES;

/// The whole file.
#[derive(Debug, Clone, Default)]
pub(crate) struct UserCfg {
    pub(crate) users: BTreeMap<String, User>,
    pub(crate) groups: BTreeMap<String, BTreeSet<String>>,
    pub(crate) roles: BTreeMap<String, BTreeSet<String>>,
    pub(crate) acl: Vec<AclEntry>,
    pub(crate) pools: BTreeMap<String, Pool>,
}

/// A user.
#[derive(Debug, Clone, Default)]
pub(crate) struct User {
    pub(crate) enabled: bool,
    /// Seconds since 1970; 0 is never.
    pub(crate) expire: i64,
    pub(crate) firstname: String,
    pub(crate) lastname: String,
    pub(crate) email: String,
    pub(crate) comment: String,
    pub(crate) tokens: BTreeMap<String, TokenEntry>,
}

/// A token, without its secret.
#[derive(Debug, Clone, Default)]
pub(crate) struct TokenEntry {
    pub(crate) expire: i64,
    pub(crate) privsep: bool,
    pub(crate) comment: String,
}

/// Who has which role where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AclEntry {
    pub(crate) path: String,
    pub(crate) propagate: bool,
    /// A user, a token or `@group`.
    pub(crate) who: String,
    pub(crate) role: String,
}

/// A resource pool.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pool {
    pub(crate) comment: String,
    pub(crate) vms: BTreeSet<u32>,
    pub(crate) storages: BTreeSet<String>,
}

impl UserCfg {
    /// Reads the file; root@pam and the built-in roles always are there.
    pub(crate) fn parse(text: &str) -> Self {
        let mut cfg = Self::default();
        cfg.users.insert("root@pam".into(), User { enabled: true, ..User::default() });
        for line in text.lines() {
            let fields: Vec<&str> = line.split(':').collect();
            let field = |n: usize| fields.get(n).copied().unwrap_or("");
            let number = |n: usize| field(n).parse::<i64>().unwrap_or(0);
            match field(0) {
                "user" => cfg.parse_user(&fields),
                "token" => {
                    if let Some((user, id)) = field(1).split_once('!') {
                        let entry = TokenEntry {
                            expire: number(2),
                            privsep: field(3) == "1",
                            comment: decode(field(4)),
                        };
                        cfg.users.entry(user.to_owned()).or_default().tokens.insert(id.to_owned(), entry);
                    }
                }
                "group" => {
                    cfg.groups.insert(field(1).to_owned(), list(field(2)));
                }
                "role" => {
                    cfg.roles.insert(field(1).to_owned(), list(field(2)));
                }
                "acl" => {
                    for who in list(field(3)) {
                        for role in list(field(4)) {
                            let entry = AclEntry {
                                path: field(2).to_owned(),
                                propagate: field(1) == "1",
                                who: who.clone(),
                                role,
                            };
                            cfg.acl.push(entry);
                        }
                    }
                }
                "pool" => {
                    let pool = Pool {
                        comment: decode(field(2)),
                        vms: list(field(3)).iter().filter_map(|v| v.parse().ok()).collect(),
                        storages: list(field(4)),
                    };
                    cfg.pools.insert(field(1).to_owned(), pool);
                }
                _ => {}
            }
        }
        for (name, privileges) in BUILTIN_ROLES {
            cfg.roles.insert((*name).to_owned(), privileges.iter().map(ToString::to_string).collect());
        }
        cfg
    }

    /// A line `user:ID:ENABLED:EXPIRE:FIRSTNAME:LASTNAME:EMAIL:COMMENT:…`.
    fn parse_user(&mut self, fields: &[&str]) {
        let field = |n: usize| fields.get(n).copied().unwrap_or("");
        let user = self.users.entry(field(1).to_owned()).or_default();
        user.enabled = field(2) == "1";
        user.expire = field(3).parse().unwrap_or(0);
        user.firstname = decode(field(4));
        user.lastname = decode(field(5));
        user.email = decode(field(6));
        user.comment = decode(field(7));
    }

    /// The file's text.
    pub(crate) fn format(&self) -> String {
        let mut text = String::new();
        for (id, user) in &self.users {
            text.push_str(&format!(
                "user:{id}:{}:{}:{}:{}:{}:{}::\n",
                i32::from(user.enabled),
                user.expire,
                encode(&user.firstname),
                encode(&user.lastname),
                encode(&user.email),
                encode(&user.comment)
            ));
            for (token, entry) in &user.tokens {
                text.push_str(&format!(
                    "token:{id}!{token}:{}:{}:{}:\n",
                    entry.expire,
                    i32::from(entry.privsep),
                    encode(&entry.comment)
                ));
            }
        }
        text.push('\n');
        for (id, members) in &self.groups {
            text.push_str(&format!("group:{id}:{}::\n", join(members)));
        }
        for (id, pool) in &self.pools {
            let vms: BTreeSet<String> = pool.vms.iter().map(ToString::to_string).collect();
            text.push_str(&format!(
                "pool:{id}:{}:{}:{}:\n",
                encode(&pool.comment),
                join(&vms),
                join(&pool.storages)
            ));
        }
        for (id, privileges) in &self.roles {
            if !is_builtin(id) {
                text.push_str(&format!("role:{id}:{}:\n", join(privileges)));
            }
        }
        for entry in &self.acl {
            text.push_str(&format!(
                "acl:{}:{}:{}:{}:\n",
                i32::from(entry.propagate),
                entry.path,
                entry.who,
                entry.role
            ));
        }
        text
    }

    /// The pool that a guest is in.
    pub(crate) fn pool_of(&self, vmid: u32) -> Option<&str> {
        self.pools.iter().find(|(_, p)| p.vms.contains(&vmid)).map(|(id, _)| id.as_str())
    }

    /// Takes a guest out of its pool and its path out of the ACL: PVE::AccessControl::remove_vm_access.
    pub(crate) fn remove_vm_access(&mut self, vmid: u32) {
        for pool in self.pools.values_mut() {
            pool.vms.remove(&vmid);
        }
        let path = format!("/vms/{vmid}");
        self.acl.retain(|entry| entry.path != path);
    }
}

/// Whether a role is built in.
pub(crate) fn is_builtin(role: &str) -> bool {
    BUILTIN_ROLES.iter().any(|(name, _)| *name == role)
}

fn list(text: &str) -> BTreeSet<String> {
    text.split([',', ';', ' ']).filter(|t| !t.is_empty()).map(str::to_owned).collect()
}

fn join(of: &BTreeSet<String>) -> String {
    of.iter().map(String::as_str).collect::<Vec<_>>().join(",")
}

fn encode(text: &str) -> String {
    crate::guest::encode_text(text)
}

fn decode(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}
