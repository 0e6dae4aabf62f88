//! Which options of a CT a caller may set: PVE::LXC::check_ct_modify_config_perm. A token of root@pam is not root@pam.

use std::collections::BTreeMap;

use super::Call;
use crate::{
    access::Rights,
    answer::{Answered, Refusal},
    guest::{CtConf, Volume, VolumeKind, parse_pairs},
};

/// One changed option; `None` is its deletion.
pub(super) type Changes = BTreeMap<String, Option<String>>;

/// Refuses the first option that the caller may not change.
pub(super) fn check_changes(
    call: &Call,
    vmid: u32,
    pool: Option<&str>,
    old: &CtConf,
    changes: &Changes,
    unprivileged: bool,
) -> Answered<()> {
    if call.caller.is_root() {
        return Ok(());
    }
    let users = call.users()?;
    let rights = Rights::of(&users, &call.caller);
    let path = format!("/vms/{vmid}");
    let on_vm = |privilege: &str| -> Answered<()> {
        if let Some(pool) = pool
            && rights.has(&format!("/pool/{pool}"), &[privilege])
        {
            return Ok(());
        }
        rights.check(&path, &[privilege])
    };
    for (option, value) in changes {
        let stem = option.trim_end_matches(|c: char| c.is_ascii_digit());
        match stem {
            "cores" | "cpuunits" | "cpulimit" => on_vm("VM.Config.CPU")?,
            "memory" | "swap" => on_vm("VM.Config.Memory")?,
            "rootfs" | "mp" => {
                on_vm("VM.Config.Disk")?;
                if let Some(value) = value {
                    check_volume(&rights, option, value)?;
                }
            }
            "nameserver" | "searchdomain" | "hostname" => on_vm("VM.Config.Network")?,
            "net" => {
                on_vm("VM.Config.Network")?;
                let net = parse_pairs(value.as_deref().unwrap_or(""), "name");
                if let Some(bridge) = net.get("bridge") {
                    rights.check_any(&format!("/sdn/zones/localnetwork/{bridge}"), &["SDN.Use"])?;
                }
            }
            "dev" => {
                return Err(Refusal::forbidden(
                    "configuring device passthrough is only allowed for root@pam",
                ));
            }
            "features" => check_features(old, value.as_deref(), unprivileged, &on_vm)?,
            "hookscript" => {
                return Err(Refusal::forbidden("changing the hookscript is only allowed for root@pam"));
            }
            _ => on_vm("VM.Config.Options")?,
        }
    }
    Ok(())
}

fn check_volume(rights: &Rights<'_>, key: &str, value: &str) -> Answered<()> {
    let Some(volume) = Volume::parse(key, value) else { return Ok(()) };
    match &volume.kind {
        VolumeKind::Storage { storage, .. } => {
            rights.check(&format!("/storage/{storage}"), &["Datastore.AllocateSpace"])
        }
        _ => Err(Refusal::forbidden(&format!(
            "mount point type {} is only allowed for root@pam",
            volume.kind_name()
        ))),
    }
}

fn check_features(
    old: &CtConf,
    value: Option<&str>,
    unprivileged: bool,
    on_vm: &impl Fn(&str) -> Answered<()>,
) -> Answered<()> {
    if !unprivileged {
        return Err(Refusal::forbidden(
            "changing feature flags for privileged container is only allowed for root@pam",
        ));
    }
    let before = parse_pairs(old.get("features").unwrap_or(""), "");
    let after = parse_pairs(value.unwrap_or(""), "");
    let changed = |key: &String| before.get(key) != after.get(key);
    let others = before.keys().chain(after.keys()).any(|key| key != "nesting" && changed(key));
    if others {
        return Err(Refusal::forbidden(
            "changing feature flags (except nesting) is only allowed for root@pam",
        ));
    }
    if changed(&"nesting".to_owned()) {
        on_vm("VM.Allocate")?;
    }
    Ok(())
}
