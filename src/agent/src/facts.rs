//! Facts of the host that the Node object shows, read anew each time.

use std::{
    fs::File,
    io::Read,
    net::{IpAddr, UdpSocket},
    path::Path,
};

use moxlet_cri::host;

/// No file of /proc, /sys and /etc that is read here is larger.
const MAX: u64 = 1 << 20;
/// Ticks of `/proc/stat` a second: what the kernel shows to programs on every architecture.
const TICKS: u64 = 100;

/// A file's text; none where it cannot be read or is no such file, as its size says: what is cut would be told of the host.
fn text(path: &str) -> String {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX + 1).read_to_end(&mut bytes));
    if read.is_err() || bytes.len() as u64 > MAX {
        return String::new();
    }
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

/// The host's name.
pub(crate) fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Reads what the host is; of `root`, the size of its file system; `resolv_conf` is read in place of the host's own.
pub(crate) fn read(root: &Path, resolv_conf: Option<&Path>) -> host::InfoResponse {
    let name = rustix::system::uname();
    let memory = text("/proc/meminfo");
    let total = meminfo(&memory, "MemTotal:");
    let disk = rustix::fs::statvfs(root).ok();
    let disk = disk.as_ref();
    let (threads, threads_max) = threads();
    host::InfoResponse {
        hostname: name.nodename().to_string_lossy().into_owned(),
        machine_id: text("/etc/machine-id"),
        system_uuid: text("/sys/class/dmi/id/product_uuid"),
        boot_id: text("/proc/sys/kernel/random/boot_id"),
        kernel_version: name.release().to_string_lossy().into_owned(),
        os_image: pretty_name(&text("/etc/os-release")),
        architecture: architecture().to_owned(),
        runtime_version: format!("moxlet://{}", env!("CARGO_PKG_VERSION")),
        cpus: std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1)),
        memory_bytes: total,
        ephemeral_storage_bytes: disk.map_or(0, |s| s.f_blocks.saturating_mul(s.f_frsize)),
        ephemeral_storage_available_bytes: disk.map_or(0, |s| s.f_bavail.saturating_mul(s.f_frsize)),
        ephemeral_storage_inodes: disk.map_or(0, |s| s.f_files),
        ephemeral_storage_inodes_free: disk.map_or(0, |s| s.f_ffree),
        addresses: addresses().iter().map(ToString::to_string).collect(),
        cpu_usage_core_nano_seconds: busy_ns(&text("/proc/stat")),
        resolv_conf: moxlet_network::resolver::of_host(resolv_conf).text,
        threads,
        threads_max,
        memory_working_set_bytes: total.saturating_sub(meminfo(&memory, "MemAvailable:")),
        ..host::InfoResponse::default()
    }
}

/// Processes and threads that there are, and the most that the kernel lets there be.
fn threads() -> (u64, u64) {
    let number = |path| text(path).parse::<u64>().ok();
    let limits = [number("/proc/sys/kernel/pid_max"), number("/proc/sys/kernel/threads-max")];
    (in_use(&text("/proc/loadavg")), limits.into_iter().flatten().min().unwrap_or(0))
}

/// The second number of `1/234` in `/proc/loadavg`: all that can be scheduled.
fn in_use(loadavg: &str) -> u64 {
    let entities = loadavg.split_whitespace().nth(3).and_then(|f| f.split_once('/'));
    entities.and_then(|(_, all)| all.parse().ok()).unwrap_or(0)
}

/// The architecture as Go names it.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn pretty_name(text: &str) -> String {
    let value = text.lines().find_map(|l| l.strip_prefix("PRETTY_NAME="));
    value.unwrap_or("Linux").trim_matches('"').to_owned()
}

/// Bytes of a line of `/proc/meminfo`.
fn meminfo(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|l| l.strip_prefix(key));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Time that the processors worked: user, nice, system, irq, softirq, steal; not idle, iowait, nor guest (in user already).
fn busy_ns(text: &str) -> u64 {
    let fields = text.lines().find_map(|l| l.strip_prefix("cpu "));
    let fields: Vec<u64> = fields.unwrap_or("").split_whitespace().filter_map(|f| f.parse().ok()).collect();
    let ticks: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|at| fields.get(*at)).sum();
    ticks.saturating_mul(1_000_000_000 / TICKS)
}

/// The host's addresses, those that its default routes leave from first. A UDP socket that is connected sends nothing.
fn addresses() -> Vec<IpAddr> {
    let mut found = Vec::new();
    for (from, to) in [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")] {
        let source =
            UdpSocket::bind(from).and_then(|s| s.connect(to).map(|()| s)).and_then(|s| s.local_addr());
        found.extend(source.ok().map(|a| a.ip()));
    }
    for address in nix::ifaddrs::getifaddrs().into_iter().flatten() {
        let Some(storage) = address.address else { continue };
        let ip = storage
            .as_sockaddr_in()
            .map(|a| IpAddr::from(a.ip()))
            .or_else(|| storage.as_sockaddr_in6().map(|a| IpAddr::from(a.ip())));
        found.extend(ip.filter(|ip| match ip {
            IpAddr::V4(v4) => !v4.is_link_local(),
            IpAddr::V6(v6) => !v6.is_unicast_link_local(),
        }));
    }
    let mut seen = std::collections::BTreeSet::new();
    found.retain(|ip| !ip.is_loopback() && !ip.is_unspecified() && seen.insert(*ip));
    if found.is_empty() { vec![IpAddr::from([127, 0, 0, 1])] } else { found }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn figures_of_proc_are_read() {
        assert_eq!(meminfo("MemTotal:       2048 kB\nMemFree: 1 kB\n", "MemTotal:"), 2048 * 1024);
        assert_eq!(busy_ns("cpu  10 1 5 1000 50 2 3 4 9 9\ncpu0 1\n"), 25 * 10_000_000);
        assert_eq!(in_use("0.20 0.18 0.12 1/80 11206"), 80);
        assert_eq!(in_use(""), 0);
        assert_eq!(pretty_name("A=b\nPRETTY_NAME=\"Debian GNU/Linux 13\"\n"), "Debian GNU/Linux 13");
    }

    #[test]
    fn a_file_that_is_too_large_is_no_fact() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("machine-id");
        let most = usize::try_from(MAX).unwrap();
        std::fs::write(&path, "a".repeat(most)).unwrap();
        assert_eq!(text(path.to_str().unwrap()).len(), most);
        std::fs::write(&path, "a".repeat(most + 1)).unwrap();
        assert_eq!(text(path.to_str().unwrap()), "");
        assert_eq!(text("/nonexistent/file"), "");
    }

    #[test]
    fn this_host_has_memory_and_an_address() {
        let info = read(Path::new("/"), None);
        assert!(info.threads > 0 && info.threads_max > info.threads);
        assert!(info.memory_bytes > 0 && info.cpus > 0 && !info.addresses.is_empty());
    }
}
