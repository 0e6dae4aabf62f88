//! Which VMID a new CT gets: the lowest free one of a range.
//!
//! Proxmox VE keeps about a megabyte of graphs for each VMID that ever was on each host, so they are used again. Free is
//! what neither a guest of any node has nor something of ours that is left over, nor what the cluster still has rules for: those
//! of a guest that is long gone would hold for the pod. Between the look and the making another may take it: the exclusive
//! creation of its file decides.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::ErrorKind,
    path::Path,
    time::{Duration, Instant},
};

use moxlet_ids::Vmid;

use crate::{Error, Result, error::io, process::read_bounded};

/// The largest file that the cluster's file system takes.
const MAX: u64 = 1 << 20;
/// systemd refuses to start a unit, and a CT's is named by its number, that was started five times in this time.
const WINDOW: Duration = Duration::from_secs(10);
/// So a number that was started so often gets no new CT; one more is left for somebody else.
const STARTS: usize = 4;

/// The VMIDs that CTs of pods get, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmidRange {
    first: Vmid,
    last: Vmid,
}

impl VmidRange {
    /// A range.
    ///
    /// # Errors
    /// The first is above the last.
    pub fn new(first: Vmid, last: Vmid) -> Result<Self> {
        if first > last {
            return Err(Error::Invalid {
                what: "VMID range".into(),
                value: format!("{first} to {last}"),
                reason: "its first is above its last".into(),
            });
        }
        Ok(Self { first, last })
    }

    /// Its first.
    #[must_use]
    pub fn first(&self) -> Vmid {
        self.first
    }

    /// Its last.
    #[must_use]
    pub fn last(&self) -> Vmid {
        self.last
    }

    /// Whether a VMID is one of it.
    #[must_use]
    pub fn contains(&self, vmid: Vmid) -> bool {
        (self.first..=self.last).contains(&vmid)
    }

    /// What to say where Proxmox VE itself hands out VMIDs of the range; `next` is where it looks, the second excluded.
    #[must_use]
    pub fn overlap(&self, next: (u32, u32)) -> Option<String> {
        let (lower, upper) = next;
        (self.first.get() < upper && lower <= self.last.get()).then(|| {
            format!(
                "Proxmox VE hands out VMIDs from {lower} to {}, which is in the range of the pods ({} to {}): a new guest and a \
                 new pod may want the same one, and the later is refused; set another range here, or `next-id: \
                 lower=100,upper={}` in the datacenter's options",
                upper.saturating_sub(1),
                self.first,
                self.last,
                self.first
            )
        })
    }

    /// The lowest that is not taken.
    ///
    /// # Errors
    /// [`Error::NoVmid`]: all are.
    pub(super) fn lowest_free(&self, taken: &BTreeSet<Vmid>) -> Result<Vmid> {
        let mut next = self.first.get();
        // Those taken come in order: the first gap is it.
        for vmid in taken.range(self.first..=self.last) {
            if vmid.get() != next {
                break;
            }
            next += 1;
        }
        Vmid::new(next)
            .ok()
            .filter(|v| self.contains(*v))
            .ok_or(Error::NoVmid { first: self.first, last: self.last })
    }
}

/// When CTs of which numbers were started of late.
#[derive(Debug, Default)]
pub(super) struct Starts(BTreeMap<Vmid, Vec<Instant>>);

impl Starts {
    /// Notes a start.
    pub(super) fn note(&mut self, vmid: Vmid, now: Instant) {
        self.forget(now);
        self.0.entry(vmid).or_default().push(now);
    }

    /// The numbers that had better rest: of CTs that ended at once and were replaced, again and again.
    pub(super) fn too_many(&mut self, now: Instant) -> BTreeSet<Vmid> {
        self.forget(now);
        self.0.iter().filter(|(_, starts)| starts.len() >= STARTS).map(|(vmid, _)| *vmid).collect()
    }

    fn forget(&mut self, now: Instant) {
        self.0.retain(|_, starts| {
            starts.retain(|at| now.saturating_duration_since(*at) < WINDOW);
            !starts.is_empty()
        });
    }
}

/// The VMIDs of all guests of the cluster: of CTs and of virtual machines, on whatever node.
pub(super) fn in_use(config_dir: &Path) -> Result<BTreeSet<Vmid>> {
    let mut found = BTreeSet::new();
    let nodes = config_dir.join("nodes");
    for node in fs::read_dir(&nodes).map_err(io("read", &nodes))? {
        let node = node.map_err(io("read", &nodes))?.path();
        for kind in ["lxc", "qemu-server"] {
            let dir = node.join(kind);
            let entries = match fs::read_dir(&dir) {
                Ok(entries) => entries,
                Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => continue,
                Err(e) => return Err(io("read", dir)(e)),
            };
            for entry in entries {
                let name = entry.map_err(io("read", &dir))?.file_name();
                found.extend(name.to_str().and_then(|n| n.strip_suffix(".conf")?.parse::<Vmid>().ok()));
            }
        }
    }
    Ok(found)
}

/// The VMIDs that the cluster has rules for, whether there are guests of these numbers or not, and where: HA would start or stop a
/// pod's CT, rules of the firewall would hold for it, and who was allowed a guest that is gone would be allowed the pod.
pub(super) fn in_rules(config_dir: &Path) -> Result<BTreeMap<Vmid, String>> {
    let mut found = BTreeMap::new();
    let mut note = |vmid: Option<Vmid>, place: &str| {
        if let Some(vmid) = vmid {
            found.entry(vmid).or_insert_with(|| place.to_owned());
        }
    };
    for line in text(config_dir, "ha/resources.cfg")?.lines() {
        let id = line.strip_prefix("ct:").or_else(|| line.strip_prefix("vm:"));
        note(id.and_then(|id| id.trim().parse().ok()), "ha/resources.cfg");
    }
    for line in text(config_dir, "user.cfg")?.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        match *fields {
            ["acl", _, path, ..] => {
                let id = path.strip_prefix("/vms/").and_then(|rest| rest.split('/').next());
                note(id.and_then(|id| id.parse().ok()), "user.cfg (permissions)");
            }
            ["pool", _, _, guests, ..] => {
                for id in guests.split([',', ' ', ';']) {
                    note(id.trim().parse().ok(), "user.cfg (pools)");
                }
            }
            _ => {}
        }
    }
    let dir = config_dir.join("firewall");
    match fs::read_dir(&dir) {
        Ok(entries) => {
            for entry in entries {
                let name = entry.map_err(io("read", &dir))?.file_name();
                let name = name.to_string_lossy();
                let id = name.strip_suffix(".fw").and_then(|id| id.parse().ok());
                note(id, &format!("firewall/{name}"));
            }
        }
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(io("read", dir)(e)),
    }
    Ok(found)
}

fn text(config_dir: &Path, name: &str) -> Result<String> {
    let path = config_dir.join(name);
    match read_bounded(&path, MAX) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(String::new()),
        read => read.map_err(io("read", path)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use proptest::prelude::*;

    use super::*;

    fn v(number: u32) -> Vmid {
        Vmid::new(number).unwrap()
    }

    fn range(first: u32, last: u32) -> VmidRange {
        VmidRange::new(v(first), v(last)).unwrap()
    }

    #[test]
    fn guests_of_all_nodes_and_kinds_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        for path in [
            "nodes/a/lxc/100.conf",
            "nodes/b/qemu-server/101.conf",
            "nodes/b/lxc/102.conf.tmp.7",
            "nodes/c/lxc/x.conf",
        ] {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        assert_eq!(in_use(dir.path()).unwrap(), BTreeSet::from([v(100), v(101)]));
        assert!(in_use(&dir.path().join("none")).is_err());
    }

    #[test]
    fn numbers_that_the_cluster_has_rules_for_are_seen_with_their_place() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(in_rules(dir.path()).unwrap(), BTreeMap::new());
        for (path, text) in [
            ("ha/resources.cfg", "ct: 100\n\tstate started\n\nvm: 101\n\tcomment ct: 1\n"),
            (
                "user.cfg",
                "user:a@pve:1:0::::::\nacl:1:/:a@pve:Administrator:\nacl:1:/vms/102:a@pve:PVEVMUser:\npool:p::103,104:local:\n",
            ),
            ("firewall/105.fw", "[RULES]\n"),
            ("firewall/cluster.fw", ""),
        ] {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let found = in_rules(dir.path()).unwrap();
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), [100, 101, 102, 103, 104, 105].map(v));
        assert_eq!(
            (found[&v(102)].as_str(), found[&v(105)].as_str()),
            ("user.cfg (permissions)", "firewall/105.fw")
        );
    }

    #[test]
    fn a_number_that_was_started_too_often_rests_until_systemd_has_forgotten_it() {
        let (mut starts, begun) = (Starts::default(), Instant::now());
        let after = |ms| begun + Duration::from_millis(ms);
        for ms in [0, 2000, 4000] {
            starts.note(v(100), after(ms));
            starts.note(v(101), after(ms));
        }
        assert!(starts.too_many(after(5000)).is_empty());
        starts.note(v(100), after(5000));
        assert_eq!(starts.too_many(after(9999)), BTreeSet::from([v(100)]));
        assert!(starts.too_many(after(10_000)).is_empty());
        assert!(starts.too_many(after(15_000)).is_empty() && starts.0.is_empty());
    }

    #[test]
    fn an_exhausted_range_says_so() {
        let error =
            range(100, 101).lowest_free(&BTreeSet::from([v(100), v(101), v(102)])).unwrap_err().to_string();
        assert!(error.contains("100") && error.contains("101"), "{error}");
        assert!(VmidRange::new(v(101), v(100)).is_err());
    }

    #[test]
    fn a_range_that_proxmox_ve_hands_out_from_is_warned_of() {
        assert!(range(1_000_000, 1_009_999).overlap((100, 1_000_000)).is_none());
        assert!(range(999_999, 1_009_999).overlap((100, 1_000_000)).unwrap().contains("upper=999999"));
        assert!(range(200, 300).overlap((301, 400)).is_none());
    }

    proptest! {
        #[test]
        fn the_lowest_free_one_is_taken(taken in proptest::collection::btree_set(100u32..140, 0..45)) {
            let set: BTreeSet<Vmid> = taken.iter().map(|n| v(*n)).collect();
            let expected = (105..=130).find(|n| !taken.contains(n));
            prop_assert_eq!(range(105, 130).lowest_free(&set).ok().map(Vmid::get), expected);
        }
    }
}
