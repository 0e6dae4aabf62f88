//! The table of `scripts/bench pve`: what pods cost Proxmox VE in calls, and what many of them cost this machine.
//!
//! Calls are counted by the simulator, whose CTs are records here: what is measured is what the engine asks and waits for, not
//! what LXC takes. How pods grow dear as their number grows is measured with real CTs, of the engine `lxc`. What a start takes
//! beside that engine is measured with real CTs on both, in a guest.

mod calls;
mod density;
pub(crate) mod starts;

use anyhow::Result;

use crate::{number, table::Table};

/// Measures, prints, and says whether all bounds hold.
pub(crate) async fn measure() -> Result<bool> {
    let mut table = Table::default();
    calls::measure(&mut table, number("ROUNDS", 20)?.max(1), number("BURST", 200)?.max(1)).await?;
    let growth = density::measure(&mut table, number("PODS", 200)?.max(2)).await?;
    println!("{growth}");
    table.print();
    Ok(table.holds())
}
