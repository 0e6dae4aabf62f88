//! How long this machine takes to start a program: the measure of how much slower an emulated guest is than the machine that
//! emulates it, for work that is made of starting programs.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use crate::table::quantile;

/// What the program is told to do when it is started for this.
pub(crate) const NOTHING: &str = "nothing";
const TIMES: usize = 200;

/// The median of 200 starts of this program, until it has ended.
pub(crate) fn start() -> Result<Duration> {
    let own = std::env::current_exe()?;
    let mut times = Vec::with_capacity(TIMES);
    for _ in 0..TIMES {
        let begin = Instant::now();
        ensure!(Command::new(&own).arg(NOTHING).status()?.success(), "{} did not start", own.display());
        times.push(begin.elapsed());
    }
    Ok(quantile(&times, 0.5))
}
