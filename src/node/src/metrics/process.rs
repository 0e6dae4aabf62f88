//! Figures of the process itself, read from /proc at each scrape.

use std::fs;

use super::text::{Kind, Text};

/// Clock ticks a second in /proc: USER_HZ, 100 on every Linux architecture that Moxlet runs on.
const TICKS: f64 = 100.0;

/// Appends the usual `process_*` families; what cannot be read is left out.
pub(super) fn encode(text: &mut Text) {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The command's name may hold spaces and brackets: the fields count from behind its closing one.
    let fields: Vec<&str> =
        stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
    let field = |n: usize| fields.get(n - 3).and_then(|f| f.parse::<f64>().ok());
    let mut one = |name: &str, kind, help: &str, value: Option<f64>| {
        if let Some(value) = value {
            text.family(name, kind, help);
            text.sample(name, &[], value, None);
        }
    };
    let cpu = field(14).zip(field(15)).map(|(user, system)| (user + system) / TICKS);
    one("process_cpu_seconds_total", Kind::Counter, "Total user and system CPU time spent in seconds.", cpu);
    one("process_virtual_memory_bytes", Kind::Gauge, "Virtual memory size in bytes.", field(23));
    let resident = resident_kib().map(|kib| kib * 1024.0);
    one("process_resident_memory_bytes", Kind::Gauge, "Resident memory size in bytes.", resident);
    let open = fs::read_dir("/proc/self/fd").ok().map(|d| d.count().saturating_sub(1) as f64);
    one("process_open_fds", Kind::Gauge, "Number of open file descriptors.", open);
    one("process_max_fds", Kind::Gauge, "Maximum number of open file descriptors.", max_fds());
    one("process_threads", Kind::Gauge, "Number of threads.", field(20));
    let started = boot_time().zip(field(22)).map(|(boot, after)| boot + after / TICKS);
    one(
        "process_start_time_seconds",
        Kind::Gauge,
        "Start time of the process since unix epoch in seconds.",
        started,
    );
}

fn resident_kib() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?.split_whitespace().next()?.parse().ok()
}

fn max_fds() -> Option<f64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    limits.lines().find_map(|l| l.strip_prefix("Max open files"))?.split_whitespace().next()?.parse().ok()
}

fn boot_time() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|l| l.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_all_of_them() {
        let mut text = Text::default();
        encode(&mut text);
        let text = text.finish();
        assert_eq!(text.lines().filter(|l| !l.starts_with('#')).count(), 7, "{text}");
    }
}
