//! Fills a new state directory from the configuration.

use std::{fs, io::Write, os::unix::fs::OpenOptionsExt};

use crate::{
    Error, Result,
    access::{self, AclEntry, Caller, Pool, TokenEntry, User, UserCfg},
    answer::Refusal,
    config::Config,
    error::io,
    pmxcfs::Pmxcfs,
    section::{self, Section},
};

/// Writes what is not there yet; tokens of the configuration are always made sure of.
pub(crate) fn fill(config: &Config, cfs: &Pmxcfs) -> Result<()> {
    let mut users = match cfs.read("user.cfg")? {
        Some(text) => UserCfg::parse(&text),
        None => first_users(config),
    };
    tokens(config, cfs, &mut users)?;
    write(cfs, "user.cfg", &users.format())?;
    if cfs.read("storage.cfg")?.is_none() {
        write(cfs, "storage.cfg", &section::format(&storages(config)))?;
    }
    if cfs.read("datacenter.cfg")?.is_none() {
        let next_id = config
            .next_id
            .map(|r| format!("next-id: lower={},upper={}\n", r.lower, r.upper))
            .unwrap_or_default();
        write(cfs, "datacenter.cfg", &format!("keyboard: en-us\n{next_id}"))?;
    }
    Ok(())
}

fn write(cfs: &Pmxcfs, name: &str, text: &str) -> Result<()> {
    cfs.write(name, text).map_err(|refusal: Refusal| Error::Config(refusal.message))
}

fn first_users(config: &Config) -> UserCfg {
    let mut users = UserCfg::parse("");
    for name in &config.users {
        users.users.insert(name.clone(), User { enabled: true, ..User::default() });
    }
    for (role, privileges) in &config.roles {
        users.roles.insert(role.clone(), privileges.iter().cloned().collect());
    }
    users.acl = config
        .acl
        .iter()
        .map(|a| AclEntry {
            path: a.path.clone(),
            propagate: a.propagate,
            who: a.who.clone(),
            role: a.role.clone(),
        })
        .collect();
    users.pools = config.pools.iter().map(|p| (p.clone(), Pool::default())).collect();
    users
}

fn tokens(config: &Config, cfs: &Pmxcfs, users: &mut UserCfg) -> Result<()> {
    let mut secrets = access::load_secrets(cfs)?;
    for token in &config.tokens {
        let caller = Caller::parse(&token.id);
        let Some(id) = caller.token.filter(|id| id.len() >= 2) else {
            return Err(Error::Config(format!("token {:?}: its id needs two characters", token.id)));
        };
        let entry = TokenEntry { expire: 0, privsep: token.privsep, comment: String::new() };
        let user =
            users.users.entry(caller.user).or_insert_with(|| User { enabled: true, ..User::default() });
        user.tokens.entry(id).or_insert(entry);
        let secret = match &token.secret {
            Some(secret) => secret.clone(),
            None => secrets.get(&token.id).cloned().unwrap_or_else(|| uuid::Uuid::new_v4().to_string()),
        };
        if let Some(path) = &token.file {
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(path)
                .map_err(io("create", path))?;
            file.write_all(format!("{}={secret}\n", token.id).as_bytes()).map_err(io("write", path))?;
        }
        secrets.insert(token.id.clone(), secret);
    }
    write(cfs, "priv/token.cfg", &access::format_secrets(&secrets))
}

fn storages(config: &Config) -> Vec<Section> {
    config
        .storages
        .iter()
        .map(|storage| {
            let mut section =
                Section { kind: storage.kind.clone(), id: storage.name.clone(), ..Section::default() };
            let mut set = |key: &str, value: String| {
                if !value.is_empty() {
                    section.keys.insert(key.to_owned(), value);
                }
            };
            set("content", storage.content.join(","));
            set("nodes", storage.nodes.join(","));
            set("pool", storage.pool.clone().unwrap_or_default());
            set(
                "mountpoint",
                storage.mountpoint.as_ref().map(|p| p.display().to_string()).unwrap_or_default(),
            );
            set("path", storage.path.as_ref().map(|p| p.display().to_string()).unwrap_or_default());
            set("shared", if storage.shared { "1".into() } else { String::new() });
            section
        })
        .collect()
}
