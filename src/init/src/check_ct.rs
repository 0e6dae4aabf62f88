//! `moxlet-init check-ct VMID`: the hook that LXC runs on the host, as root, before it starts a pod's CT on Proxmox VE.
//!
//! The file that it stands in is included by an absolute path. A copy of the CT under another number (a clone, a restored
//! backup) carries that line, and while the pod lives it finds the file: it would start with the pod's directory and address.

use std::process::ExitCode;

/// Lets the CT of this number start and no other. LXC appends words of its own to the arguments.
pub(crate) fn main(mut args: impl Iterator<Item = String>) -> ExitCode {
    let name = std::env::var("LXC_NAME").ok();
    match check(args.next().as_deref(), name.as_deref()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("moxlet-init check-ct: {why}");
            ExitCode::FAILURE
        }
    }
}

fn check(wanted: Option<&str>, name: Option<&str>) -> Result<(), String> {
    let wanted = wanted.filter(|w| !w.is_empty()).ok_or("it is a hook of LXC and needs the CT's VMID")?;
    let name = name.ok_or("LXC_NAME is not set: it is run by LXC before a CT starts, not by hand")?;
    if name == wanted {
        return Ok(());
    }
    Err(format!(
        "CT {name} includes the file of CT {wanted}, which is a pod's, and would start with the pod's directory and address; it is a \
         copy: take the line lxc.include out of its configuration"
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_the_ct_of_this_number_starts() {
        assert_eq!(check(Some("1000000"), Some("1000000")), Ok(()));
        let why = check(Some("1000000"), Some("1000001")).unwrap_err();
        assert!(why.contains("CT 1000001 includes the file of CT 1000000"), "{why}");
        assert!(check(Some("100"), Some("1000")).is_err() && check(Some("1000"), Some("100")).is_err());
    }

    #[test]
    fn what_is_missing_is_named() {
        assert!(check(None, Some("100")).unwrap_err().contains("VMID"));
        assert!(check(Some(""), Some("")).unwrap_err().contains("VMID"));
        assert!(check(Some("100"), None).unwrap_err().contains("LXC_NAME"));
    }
}
