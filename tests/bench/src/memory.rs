//! Resident memory of the programs of both sides.

use std::fs;

use anyhow::{Context, Result};

use crate::{
    table::{Bound, Table},
    text,
};

fn resident_kb(pid: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))
        .with_context(|| format!("process {pid} is gone"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// `moxlet up` beside kubelet and containerd together.
pub(crate) fn idle(table: &mut Table, what: &str) -> Result<()> {
    let ours = resident_kb(&text("MOXLET_PID")?)?;
    let peer = resident_kb(&text("PEER_KUBELET_PID")?)? + resident_kb(&text("PEER_CONTAINERD_PID")?)?;
    table.row(what, ours / 1024.0, Some(peer / 1024.0), &Bound::Under(40.0));
    Ok(())
}

/// `moxlet up` while `pods` of its pods run.
pub(crate) fn with_pods(table: &mut Table, pods: usize) -> Result<()> {
    let ours = resident_kb(&text("MOXLET_PID")?)?;
    table.row(&format!("resident, with {pods} pods (MB)"), ours / 1024.0, None, &Bound::Under(60.0));
    Ok(())
}

/// The largest moxlet-init beside the largest of the peer's shims.
pub(crate) fn per_pod(table: &mut Table) -> Result<()> {
    let largest = |name: &str| -> Result<f64> {
        let mut largest = 0.0_f64;
        for entry in fs::read_dir("/proc")?.flatten() {
            let pid = entry.file_name().to_string_lossy().into_owned();
            if !pid.bytes().all(|b| b.is_ascii_digit()) {
                continue;
            }
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let program =
                String::from_utf8_lossy(command.split(|b| *b == 0).next().unwrap_or_default()).into_owned();
            if program.rsplit('/').next() == Some(name) {
                largest = largest.max(resident_kb(&pid).unwrap_or(0.0));
            }
        }
        Ok(largest)
    };
    table.row(
        "resident, moxlet-init of a pod (MB)",
        largest("moxlet-init")? / 1024.0,
        Some(largest("containerd-shim-runc-v2")? / 1024.0),
        &Bound::Under(4.0),
    );
    Ok(())
}
