//! `/access`: permissions, ACLs, users, tokens, roles.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::Call;
use crate::{
    access::{self, AclEntry, BUILTIN_ROLES, Caller, Rights, TokenEntry, User, UserCfg},
    answer::{Answered, Refusal},
};

pub(super) async fn dispatch(call: &Call) -> Option<Answered> {
    Some(match (call.method.as_str(), call.template.as_str()) {
        ("GET", "/access/permissions") => permissions(call),
        ("GET", "/access/acl") => acl(call),
        ("PUT", "/access/acl") => update_acl(call).await,
        ("GET", "/access/roles") => roles(call),
        ("GET", "/access/roles/{roleid}") => role(call),
        ("POST", "/access/roles") => create_role(call).await,
        ("DELETE", "/access/roles/{roleid}") => delete_role(call).await,
        ("GET", "/access/users") => users(call),
        ("GET", "/access/users/{userid}") => user(call),
        ("POST", "/access/users") => create_user(call).await,
        ("DELETE", "/access/users/{userid}") => delete_user(call).await,
        ("GET", "/access/users/{userid}/token") => tokens(call),
        ("GET", "/access/users/{userid}/token/{tokenid}") => token(call),
        ("POST", "/access/users/{userid}/token/{tokenid}") => create_token(call).await,
        ("DELETE", "/access/users/{userid}/token/{tokenid}") => delete_token(call).await,
        _ => return None,
    })
}

/// Changes user.cfg under its cluster-wide lock.
pub(super) async fn change(call: &Call, change: impl FnOnce(&mut UserCfg) -> Answered<()>) -> Answered {
    let sim = &call.sim;
    let _held = sim.cfs.lock_cfs("user.cfg", sim.lock_wait()).await?;
    let mut users = sim.users()?;
    change(&mut users)?;
    sim.cfs.write("user.cfg", &users.format())?;
    Ok(Value::Null.into())
}

fn permissions(call: &Call) -> Answered {
    let users = call.users()?;
    let whose = match call.text("userid") {
        Some(id) if Caller::parse(id) != call.caller => {
            call.check("/access", &["Sys.Audit"])?;
            Caller::parse(id)
        }
        _ => call.caller.clone(),
    };
    if !users.users.contains_key(&whose.user) {
        return Err(Refusal::died(format!("no such user ('{}')", whose.user)));
    }
    let rights = Rights::of(&users, &whose);
    let paths: BTreeSet<String> = match call.text("path") {
        Some(path) => BTreeSet::from([path.to_owned()]),
        None => {
            let fixed = ["/", "/access", "/access/groups", "/nodes", "/pool", "/sdn", "/storage", "/vms"]
                .map(str::to_owned);
            let members = users.pools.values().flat_map(|pool| {
                let vms = pool.vms.iter().map(|vmid| format!("/vms/{vmid}"));
                vms.chain(pool.storages.iter().map(|storage| format!("/storage/{storage}")))
            });
            fixed.into_iter().chain(users.acl.iter().map(|a| a.path.clone())).chain(members).collect()
        }
    };
    let mut all = json!({});
    for path in paths {
        let on = rights.on(&path);
        if !on.is_empty() {
            all[&path] = on
                .into_iter()
                .map(|(p, propagate)| (p, json!(i32::from(propagate))))
                .collect::<serde_json::Map<_, _>>()
                .into();
        }
    }
    Ok(all.into())
}

/// Users, groups and tokens as ACL entries name them.
fn kind_of(who: &str) -> (&'static str, &str) {
    match who.strip_prefix('@') {
        Some(group) => ("group", group),
        None if who.contains('!') => ("token", who),
        None => ("user", who),
    }
}

fn acl(call: &Call) -> Answered {
    let users = call.users()?;
    let rights = Rights::of(&users, &call.caller);
    let all: Vec<Value> = users
        .acl
        .iter()
        .filter(|a| rights.has_any(&a.path, &["Permissions.Modify"]))
        .map(|a| {
            let (kind, ugid) = kind_of(&a.who);
            json!({ "path": a.path, "propagate": i32::from(a.propagate), "roleid": a.role, "type": kind, "ugid": ugid })
        })
        .collect();
    Ok(json!(all).into())
}

fn list(call: &Call, name: &str) -> Vec<String> {
    let text = call.text(name).unwrap_or("");
    text.split([',', ';', ' ', '\0']).filter(|v| !v.is_empty()).map(str::to_owned).collect()
}

async fn update_acl(call: &Call) -> Answered {
    let path = call.needed("path")?.to_owned();
    if !path.starts_with('/') {
        return Err(Refusal::parameter("path", format!("invalid ACL path '{path}'")));
    }
    let mut whom = list(call, "users");
    whom.extend(list(call, "tokens"));
    whom.extend(list(call, "groups").into_iter().map(|g| format!("@{g}")));
    if whom.is_empty() {
        return Err(Refusal::parameter("users", "either 'users', 'groups' or 'tokens' is required."));
    }
    let propagate = call.integer("propagate") != Some(0);
    change(call, |cfg| {
        for role in list(call, "roles") {
            if !cfg.roles.contains_key(&role) {
                return Err(Refusal::died(format!("role '{role}' does not exist")));
            }
            for who in &whom {
                check_subject(cfg, who)?;
                cfg.acl.retain(|a| !(a.path == path && a.who == *who && a.role == role));
                if !call.flag("delete") {
                    cfg.acl.push(AclEntry {
                        path: path.clone(),
                        propagate,
                        who: who.clone(),
                        role: role.clone(),
                    });
                }
            }
        }
        Ok(())
    })
    .await
}

fn check_subject(cfg: &UserCfg, who: &str) -> Answered<()> {
    let refuse = |what: String| Err(Refusal::died(format!("ACL update failed: {what}")));
    let (kind, name) = kind_of(who);
    let caller = Caller::parse(name);
    match kind {
        "group" if !cfg.groups.contains_key(name) => refuse(format!("group '{name}' does not exist")),
        "user" if !cfg.users.contains_key(name) => refuse(format!("user '{name}' does not exist")),
        "token" => {
            let known = cfg
                .users
                .get(&caller.user)
                .is_some_and(|u| caller.token.is_some_and(|t| u.tokens.contains_key(&t)));
            if known { Ok(()) } else { refuse(format!("no such token '{name}'")) }
        }
        _ => Ok(()),
    }
}

fn is_builtin(role: &str) -> bool {
    BUILTIN_ROLES.iter().any(|(name, _)| *name == role)
}

fn roles(call: &Call) -> Answered {
    let all: Vec<Value> = call
        .users()?
        .roles
        .iter()
        .map(|(id, privileges)| {
            let privileges: Vec<&str> = privileges.iter().map(String::as_str).collect();
            json!({ "roleid": id, "privs": privileges.join(","), "special": i32::from(is_builtin(id)) })
        })
        .collect();
    Ok(json!(all).into())
}

fn role(call: &Call) -> Answered {
    let id = call.needed("roleid")?;
    let cfg = call.users()?;
    let role = cfg.roles.get(id).ok_or_else(|| Refusal::died(format!("role '{id}' does not exist")))?;
    Ok(Value::Object(role.iter().map(|p| (p.clone(), json!(1))).collect()).into())
}

async fn create_role(call: &Call) -> Answered {
    let id = call.needed("roleid")?.to_owned();
    let privileges: BTreeSet<String> = list(call, "privs").into_iter().collect();
    if let Some(odd) = privileges.iter().find(|p| !access::ALL_PRIVILEGES.contains(&p.as_str())) {
        return Err(Refusal::died(format!("create role failed: invalid privilege '{odd}'")));
    }
    change(call, |cfg| {
        if cfg.roles.contains_key(&id) {
            return Err(Refusal::died(format!("create role failed: role '{id}' already exists")));
        }
        cfg.roles.insert(id, privileges);
        Ok(())
    })
    .await
}

async fn delete_role(call: &Call) -> Answered {
    let id = call.needed("roleid")?.to_owned();
    if is_builtin(&id) {
        return Err(Refusal::died(format!("auto-generated role '{id}' cannot be deleted")));
    }
    change(call, |cfg| {
        cfg.roles.remove(&id).ok_or_else(|| Refusal::died(format!("role '{id}' does not exist")))?;
        cfg.acl.retain(|a| a.role != id);
        Ok(())
    })
    .await
}

fn user_json(user: &User) -> Value {
    let mut json = json!({ "enable": i32::from(user.enabled), "expire": user.expire });
    for (key, value) in [
        ("comment", &user.comment),
        ("firstname", &user.firstname),
        ("lastname", &user.lastname),
        ("email", &user.email),
    ] {
        if !value.is_empty() {
            json[key] = json!(value);
        }
    }
    json
}

fn token_json(token: &TokenEntry) -> Value {
    let mut json = json!({ "expire": token.expire, "privsep": i32::from(token.privsep) });
    if !token.comment.is_empty() {
        json["comment"] = json!(token.comment);
    }
    json
}

fn users(call: &Call) -> Answered {
    let cfg = call.users()?;
    let sees_all = call.has_any("/access/groups", &["User.Modify", "Sys.Audit"])?;
    let all: Vec<Value> = cfg
        .users
        .iter()
        .filter(|(id, _)| sees_all || **id == call.caller.user)
        .map(|(id, user)| {
            let mut json = user_json(user);
            json["userid"] = json!(id);
            json["realm-type"] = json!(id.rsplit('@').next().unwrap_or(""));
            if call.flag("full") {
                let tokens: Vec<Value> = user
                    .tokens
                    .iter()
                    .map(|(id, token)| {
                        let mut json = token_json(token);
                        json["tokenid"] = json!(id);
                        json
                    })
                    .collect();
                json["tokens"] = json!(tokens);
                json["groups"] = json!("");
            }
            json
        })
        .collect();
    Ok(json!(all).into())
}

fn find<'a>(cfg: &'a UserCfg, id: &str) -> Answered<&'a User> {
    cfg.users.get(id).ok_or_else(|| Refusal::died(format!("no such user ('{id}')")))
}

fn user(call: &Call) -> Answered {
    let cfg = call.users()?;
    let user = find(&cfg, call.needed("userid")?)?;
    let mut json = user_json(user);
    json["groups"] = json!([]);
    json["tokens"] = Value::Object(user.tokens.iter().map(|(id, t)| (id.clone(), token_json(t))).collect());
    Ok(json.into())
}

async fn create_user(call: &Call) -> Answered {
    let id = call.needed("userid")?.to_owned();
    let own = |name: &str| call.text(name).unwrap_or("").to_owned();
    let user = User {
        enabled: call.integer("enable") != Some(0),
        expire: call.integer("expire").unwrap_or(0),
        comment: own("comment"),
        firstname: own("firstname"),
        lastname: own("lastname"),
        email: own("email"),
        ..User::default()
    };
    change(call, |cfg| {
        if cfg.users.contains_key(&id) {
            return Err(Refusal::died(format!("create user failed: user '{id}' already exists")));
        }
        cfg.users.insert(id, user);
        Ok(())
    })
    .await
}

async fn delete_user(call: &Call) -> Answered {
    let id = call.needed("userid")?.to_owned();
    change(call, |cfg| {
        cfg.users.remove(&id).ok_or_else(|| Refusal::died(format!("user '{id}' does not exist")))?;
        let of = format!("{id}!");
        cfg.acl.retain(|a| a.who != id && !a.who.starts_with(&of));
        Ok(())
    })
    .await
}

fn tokens(call: &Call) -> Answered {
    let cfg = call.users()?;
    let all: Vec<Value> = find(&cfg, call.needed("userid")?)?
        .tokens
        .iter()
        .map(|(id, token)| {
            let mut json = token_json(token);
            json["tokenid"] = json!(id);
            json
        })
        .collect();
    Ok(json!(all).into())
}

fn token(call: &Call) -> Answered {
    let cfg = call.users()?;
    let (user, id) = (call.needed("userid")?, call.needed("tokenid")?);
    let found = find(&cfg, user)?.tokens.get(id);
    let token = found.ok_or_else(|| Refusal::died(format!("no such token '{id}' for user '{user}'")))?;
    Ok(token_json(token).into())
}

async fn create_token(call: &Call) -> Answered {
    let (user, id) = (call.needed("userid")?.to_owned(), call.needed("tokenid")?.to_owned());
    let entry = TokenEntry {
        expire: call.integer("expire").unwrap_or(0),
        privsep: call.integer("privsep") != Some(0),
        comment: call.text("comment").unwrap_or("").to_owned(),
    };
    let full = format!("{user}!{id}");
    let info = token_json(&entry);
    let secret = uuid::Uuid::new_v4().to_string();
    change(call, |cfg| {
        let user =
            cfg.users.get_mut(&user).ok_or_else(|| Refusal::died(format!("no such user ('{user}')")))?;
        if user.tokens.contains_key(&id) {
            return Err(Refusal::parameter("tokenid", "Token already exists."));
        }
        user.tokens.insert(id, entry);
        set_secret(call, &full, Some(&secret))
    })
    .await?;
    Ok(json!({ "full-tokenid": full, "value": secret, "info": info }).into())
}

async fn delete_token(call: &Call) -> Answered {
    let (user, id) = (call.needed("userid")?.to_owned(), call.needed("tokenid")?.to_owned());
    let full = format!("{user}!{id}");
    change(call, |cfg| {
        let found = cfg.users.get_mut(&user).and_then(|u| u.tokens.remove(&id));
        found.ok_or_else(|| Refusal::died(format!("no such token '{id}' for user '{user}'")))?;
        cfg.acl.retain(|a| a.who != full);
        set_secret(call, &full, None)
    })
    .await
}

fn set_secret(call: &Call, token: &str, secret: Option<&str>) -> Answered<()> {
    let cfs = &call.sim.cfs;
    let mut secrets = access::load_secrets(cfs)?;
    match secret {
        Some(secret) => secrets.insert(token.to_owned(), secret.to_owned()),
        None => secrets.remove(token),
    };
    cfs.write("priv/token.cfg", &access::format_secrets(&secrets))
}
