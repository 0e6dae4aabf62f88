//! Which privileges a caller has on a path, and the check that a method's description in the schema asks for.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::{Caller, UserCfg};
use crate::answer::{Answered, Refusal};

/// The role that takes away what others give.
const NO_ACCESS: &str = "NoAccess";

/// A caller's privileges.
#[derive(Debug, Clone)]
pub(crate) struct Rights<'a> {
    cfg: &'a UserCfg,
    caller: &'a Caller,
}

impl<'a> Rights<'a> {
    pub(crate) fn of(cfg: &'a UserCfg, caller: &'a Caller) -> Self {
        Self { cfg, caller }
    }

    pub(crate) fn caller(&self) -> &Caller {
        self.caller
    }

    /// The privileges on a path, each with whether paths below inherit it.
    pub(crate) fn on(&self, path: &str) -> BTreeMap<String, bool> {
        let user = self.of_user(&self.caller.user, path);
        let Some(token) = &self.caller.token else { return user };
        let privsep = self
            .cfg
            .users
            .get(&self.caller.user)
            .and_then(|u| u.tokens.get(token))
            .is_none_or(|entry| entry.privsep);
        if !privsep {
            return user;
        }
        let own = self.of_subject(&self.caller.full(), &BTreeSet::new(), path);
        own.into_iter()
            .filter_map(|(privilege, propagate)| {
                user.get(&privilege).map(|user_propagates| (privilege, propagate && *user_propagates))
            })
            .collect()
    }

    fn of_user(&self, user: &str, path: &str) -> BTreeMap<String, bool> {
        if user == "root@pam" {
            return super::ALL_PRIVILEGES.iter().map(|p| ((*p).to_owned(), true)).collect();
        }
        let groups: BTreeSet<String> = self
            .cfg
            .groups
            .iter()
            .filter(|(_, members)| members.contains(user))
            .map(|(group, _)| format!("@{group}"))
            .collect();
        self.of_subject(user, &groups, path)
    }

    /// Roles of a path, and of the pool that the path's guest or storage is in. Those of a pool are never passed down, and
    /// `NoAccess` of either leaves nothing.
    fn of_subject(&self, who: &str, groups: &BTreeSet<String>, path: &str) -> BTreeMap<String, bool> {
        let mut roles = self.roles(who, groups, path);
        for (pool, of) in &self.cfg.pools {
            let is_member = match path.strip_prefix("/vms/") {
                Some(vmid) => vmid.parse().is_ok_and(|v: u32| of.vms.contains(&v)),
                None => path.strip_prefix("/storage/").is_some_and(|s| of.storages.contains(s)),
            };
            if is_member {
                for (role, _) in self.roles(who, groups, &format!("/pool/{pool}")) {
                    roles.entry(role).or_insert(false);
                }
            }
        }
        if roles.contains_key(NO_ACCESS) { BTreeMap::new() } else { self.privileges(&roles) }
    }

    fn privileges(&self, roles: &BTreeMap<String, bool>) -> BTreeMap<String, bool> {
        let mut all = BTreeMap::new();
        for (role, propagate) in roles {
            for privilege in self.cfg.roles.get(role).into_iter().flatten() {
                let known = all.entry(privilege.clone()).or_insert(false);
                *known |= *propagate;
            }
        }
        all
    }

    /// From the root downwards, the entries of a deeper path replace those above; a user's replace those of its groups.
    fn roles(&self, who: &str, groups: &BTreeSet<String>, path: &str) -> BTreeMap<String, bool> {
        let mut roles: BTreeMap<String, bool> = BTreeMap::new();
        for level in levels(path) {
            let exact = level == path;
            let matching = |subject: &dyn Fn(&str) -> bool| -> BTreeMap<String, bool> {
                self.cfg
                    .acl
                    .iter()
                    .filter(|e| e.path == level && subject(&e.who) && (exact || e.propagate))
                    .map(|e| (e.role.clone(), e.propagate))
                    .collect()
            };
            let own = matching(&|w| w == who);
            let found = if own.is_empty() { matching(&|w| groups.contains(w)) } else { own };
            if !found.is_empty() {
                roles = found;
            }
        }
        roles
    }

    /// Whether all privileges are there.
    pub(crate) fn has(&self, path: &str, privileges: &[&str]) -> bool {
        let on = self.on(path);
        privileges.iter().all(|p| on.contains_key(*p))
    }

    /// Whether one of the privileges is there.
    pub(crate) fn has_any(&self, path: &str, privileges: &[&str]) -> bool {
        let on = self.on(path);
        privileges.iter().any(|p| on.contains_key(*p))
    }

    /// PVE::RPCEnvironment::check.
    pub(crate) fn check(&self, path: &str, privileges: &[&str]) -> Answered<()> {
        let on = self.on(path);
        match privileges.iter().find(|p| !on.contains_key(**p)) {
            Some(missing) => Err(Refusal::forbidden(&format!("{path}, {missing}"))),
            None => Ok(()),
        }
    }

    /// PVE::RPCEnvironment::check_any.
    pub(crate) fn check_any(&self, path: &str, privileges: &[&str]) -> Answered<()> {
        if self.has_any(path, privileges) {
            Ok(())
        } else {
            Err(Refusal::forbidden(&format!("{path}, {}", privileges.join("|"))))
        }
    }
}

fn levels(path: &str) -> Vec<String> {
    let mut all = vec!["/".to_owned()];
    let mut level = String::new();
    for part in path.split('/').filter(|p| !p.is_empty()) {
        level.push('/');
        level.push_str(part);
        all.push(level.clone());
    }
    all
}

/// PVE::RPCEnvironment::check_api2_permissions: what the schema's `permissions` of a method ask for.
pub(crate) fn check_api(
    permissions: &Value,
    rights: &Rights<'_>,
    given: &Map<String, Value>,
) -> Answered<()> {
    if rights.caller().is_root() {
        return Ok(());
    }
    if permissions.is_null() {
        return Err(Refusal::forbidden("user != root@pam"));
    }
    if matches!(permissions.get("user").and_then(Value::as_str), Some("all" | "world")) {
        return Ok(());
    }
    match permissions.get("check") {
        Some(test) => check_test(test, rights, given),
        None => Err(Refusal::forbidden("")),
    }
}

fn check_test(test: &Value, rights: &Rights<'_>, given: &Map<String, Value>) -> Answered<()> {
    let Some(parts) = test.as_array() else { return Err(Refusal::forbidden("")) };
    let text = |n: usize| parts.get(n).and_then(Value::as_str).unwrap_or("");
    let names = |n: usize| -> Vec<&str> {
        parts.get(n).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect()
    };
    match text(0) {
        "and" => parts.iter().skip(1).try_for_each(|t| check_test(t, rights, given)),
        "or" => {
            if parts.iter().skip(1).any(|t| check_test(t, rights, given).is_ok()) {
                Ok(())
            } else {
                Err(Refusal::forbidden(""))
            }
        }
        "perm" => {
            let options: BTreeMap<&str, &Value> = parts
                .get(3..)
                .unwrap_or_default()
                .chunks(2)
                .filter_map(|pair| Some((pair.first()?.as_str()?, pair.get(1)?)))
                .collect();
            if let Some(needed) = options.get("require_param").and_then(|v| v.as_str())
                && !given.contains_key(needed)
            {
                return Err(Refusal::forbidden(""));
            }
            let path = fill(text(1), given);
            if options.contains_key("any") {
                rights.check_any(&path, &names(2))
            } else {
                rights.check(&path, &names(2))
            }
        }
        "perm-modify" => {
            let path = fill(text(1), given);
            let of_kind = if path.starts_with("/storage") {
                "Datastore.Allocate"
            } else if path.starts_with("/vms") {
                "VM.Allocate"
            } else if path.starts_with("/pool") {
                "Pool.Allocate"
            } else {
                "Permissions.Modify"
            };
            rights.check_any(&path, &["Permissions.Modify", of_kind])
        }
        "userid-param" => check_user(text(1), rights, given),
        "userid-group" => rights.check_any("/access/groups", &names(1)),
        _ => Err(Refusal::forbidden("")),
    }
}

/// May the caller change the user that a call names: because it is the caller itself, or by a privilege on the user's realm?
fn check_user(test: &str, rights: &Rights<'_>, given: &Map<String, Value>) -> Answered<()> {
    let user = given.get("userid").and_then(Value::as_str).unwrap_or("");
    if test == "self" {
        let is_self = user == rights.caller().user && rights.caller().token.is_none();
        return if is_self { Ok(()) } else { Err(Refusal::forbidden("")) };
    }
    let realm = user.rsplit('@').next().unwrap_or("");
    rights.check(&format!("/access/realm/{realm}"), &[test])
}

fn fill(template: &str, given: &Map<String, Value>) -> String {
    let mut out = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        out.push_str(before);
        let (name, behind) = after.split_once('}').unwrap_or((after, ""));
        match given.get(name) {
            Some(Value::String(s)) => out.push_str(s),
            Some(value) => out.push_str(&value.to_string()),
            None => {}
        }
        rest = behind;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const CFG: &str = "user:a@pve:1:0:::::\ntoken:a@pve!sep:0:1::\ntoken:a@pve!full:0:0::\nuser:b@pve:1:0:::::\n\
        group:ops:b@pve::\nrole:Own:VM.Audit,VM.PowerMgmt:\nacl:1:/vms:a@pve:Own:\nacl:1:/vms/100:a@pve!sep:PVEAuditor:\n\
        acl:1:/:@ops:Administrator:\nacl:1:/vms/7:b@pve:NoAccess:\nacl:0:/nodes:a@pve:PVEAuditor:\npool:p::200::\nacl:1:/pool/p:a@pve:PVEVMAdmin:\n";

    fn has(who: &str, path: &str, privilege: &str) -> bool {
        let cfg = UserCfg::parse(CFG);
        Rights::of(&cfg, &Caller::parse(who)).has(path, &[privilege])
    }

    #[test]
    fn roles_are_inherited_replaced_below_and_not_inherited_without_propagation() {
        assert!(has("a@pve", "/vms/100", "VM.PowerMgmt"));
        assert!(!has("a@pve", "/", "VM.PowerMgmt"));
        assert!(has("b@pve", "/vms/8", "VM.Allocate"));
        assert!(!has("b@pve", "/vms/7", "VM.Audit"));
        assert!(has("a@pve", "/nodes", "Sys.Audit"));
        assert!(!has("a@pve", "/nodes/x", "Sys.Audit"));
        assert!(has("a@pve", "/vms/200", "VM.Allocate"));
    }

    #[test]
    fn each_privilege_has_whether_it_is_passed_down() {
        let cfg = UserCfg::parse(&format!("{CFG}pool:q::7::\nacl:1:/pool/q:b@pve:PVEVMAdmin:\n"));
        let on = |who: &str, path: &str| Rights::of(&cfg, &Caller::parse(who)).on(path);
        assert_eq!(on("a@pve", "/vms/100").get("VM.Audit"), Some(&true));
        assert_eq!(on("a@pve", "/nodes").get("Sys.Audit"), Some(&false));
        // A pool passes nothing on from its members, and gives nothing where there is no access.
        assert_eq!(on("a@pve", "/vms/200").get("VM.Allocate"), Some(&false));
        assert!(on("b@pve", "/vms/7").is_empty());
    }

    #[test]
    fn a_token_with_privilege_separation_has_the_intersection() {
        assert!(has("a@pve!sep", "/vms/100", "VM.Audit"));
        assert!(!has("a@pve!sep", "/vms/100", "VM.PowerMgmt"));
        assert!(!has("a@pve!sep", "/vms/101", "VM.Audit"));
        assert!(has("a@pve!full", "/vms/101", "VM.PowerMgmt"));
    }
}
