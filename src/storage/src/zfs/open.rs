//! From what is on disk to the index: one listing, then whatever a crash left half-made is removed.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    os::unix::fs::PermissionsExt,
    str::FromStr,
    sync::Mutex,
};

use moxlet_ids::ChainId;
use rustix::fs::StatVfsMountFlags;

use super::{
    IdStyle, Inner, Turns, Waits, ZfsConfig,
    attach::{self, Access, Namespaces},
    cli::Cli,
    index::{Copy, Index, Layer, Root},
    make_private_dir,
    names::{self, FORMAT, IDS, INODES, Kind, MAP, OBJECTS, OWNER, PARENT, QUOTA, Snapshot, TOP, VERSION},
};
use crate::{
    error::{Attempt, Error, Result},
    mounts,
};

/// Objects of a dataset without any file.
pub(super) const OWN_OBJECTS: u64 = 6;

const COLUMNS: [&str; 13] =
    ["name", "origin", "referenced", "guid", OWNER, VERSION, PARENT, OBJECTS, INODES, TOP, MAP, QUOTA, IDS];

/// The groups right below the store's dataset.
const GROUPS: [&str; 4] = ["layers", "drafts", "roots", "shifted"];

/// What makes Linux files whole, whatever the pool's own settings are. Snapshots that a schedule makes of everything would
/// keep what we remove. Compression and the rest are the pool's.
const FOR_FILES: [&str; 8] = [
    "atime=off",
    "xattr=sa",
    "acltype=posixacl",
    "snapdir=hidden",
    "normalization=none",
    "casesensitivity=sensitive",
    "utf8only=off",
    "com.sun:auto-snapshot=false",
];

/// A line of the listing.
struct Row(HashMap<&'static str, String>);

impl Row {
    fn get(&self, column: &str) -> &str {
        self.0.get(column).map_or("-", String::as_str)
    }

    fn number<T: FromStr>(&self, column: &str) -> Option<T> {
        self.get(column).parse().ok()
    }

    /// A layer's name, or none for `-`; nothing at all if it is neither.
    fn chain(&self, column: &str) -> Option<Option<ChainId>> {
        match self.get(column) {
            "-" => Some(None),
            hex => names::chain(hex).map(Some),
        }
    }

    fn layer(&self, snapshot: &Self) -> Option<Layer> {
        Some(Layer {
            parent: self.chain(PARENT)?,
            referenced: snapshot.number("referenced")?,
            objects: self.number(OBJECTS)?,
            inodes: self.number(INODES)?,
            guid: snapshot.get("guid").to_owned(),
        })
    }

    fn root(&self) -> Option<Root> {
        let ids = match self.get(IDS) {
            "idmapped" => IdStyle::Idmapped,
            "shifted" => IdStyle::Shifted,
            _ => return None,
        };
        let quota = match self.get(QUOTA) {
            "-" => None,
            text => Some(text.parse().ok()?),
        };
        let origin = self.get("origin").rsplit_once('@').and_then(|(_, name)| Snapshot::of_name(name));
        let (top, map) = (self.chain(TOP)?, names::map_of(self.get(MAP))?);
        Some(Root { top, map, quota, ids, snapshot: origin.unwrap_or_default() })
    }
}

/// What is done where there is no store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    IsMade,
    IsRefused,
}

/// Opens a store, unless nobody waits for it any more: others may have it open then.
pub(super) fn open(config: ZfsConfig, missing: Missing, waits: &Waits) -> Result<Inner> {
    names::check(&config.dataset)?;
    make_private_dir(&config.run_dir)?;
    let run_dir = fs::canonicalize(&config.run_dir).attempt("look at", &config.run_dir)?;
    fs::set_permissions(&run_dir, fs::Permissions::from_mode(0o700)).attempt("set the mode of", &run_dir)?;
    // Shared, so that what is unmounted here goes from every mount namespace that was copied from ours: a dataset stays
    // busy for as long as one of them has it.
    mounts::make_shared_dir(&run_dir)?;
    for name in ["drafts", "views", "state"] {
        make_private_dir(&run_dir.join(name))?;
    }
    let cli = Cli::find(&run_dir)?;
    let mut inner = Inner {
        cli,
        dataset: config.dataset,
        run_dir,
        ids: IdStyle::Idmapped,
        namespaces: Namespaces::default(),
        index: Mutex::default(),
        turns: Turns::default(),
    };
    let wanted = || if waits.still() { Ok(()) } else { Err(Error::Stopped) };
    let rows = inner.list(missing)?;
    inner.check(&rows)?;
    wanted()?;
    inner.complete(&rows)?;
    wanted()?;
    for name in ["drafts", "views"] {
        inner.clear_mount_points(name)?;
    }
    let index = inner.take_stock(&rows);
    *inner.index() = index;
    wanted()?;
    inner.mount_state()?;
    inner.ids = match config.ids {
        Some(ids) => ids,
        None if attach::knows_idmapped(&inner.state_dir(), &inner.namespaces)? => IdStyle::Idmapped,
        None => IdStyle::Shifted,
    };
    inner.cli.wait_for_suspended_pools();
    Ok(inner)
}

impl Inner {
    /// All that may be ours, by the name below the store's dataset (which is the empty one).
    fn list(&self, missing: Missing) -> Result<HashMap<String, Row>> {
        let columns = COLUMNS.join(",");
        let args =
            ["list", "-H", "-p", "-t", "filesystem,snapshot", "-d", "4", "-r", "-o", &columns, &self.dataset];
        let table = match self.cli.table(&args) {
            Ok(table) => table,
            Err(Error::NoSuchDataset(_)) if missing == Missing::IsMade => {
                let mut all = vec!["mountpoint=legacy".to_owned(), "canmount=off".to_owned()];
                all.push(format!("{OWNER}={}", Kind::Top));
                all.push(format!("{VERSION}={FORMAT}"));
                self.create(&self.dataset, &all)?;
                self.cli.table(&args)?
            }
            Err(error) => return Err(error),
        };
        let rows = table.into_iter().filter_map(|line| {
            let name = line.first()?.strip_prefix(&self.dataset)?;
            // Either the dataset itself, or one below it, or a snapshot of either.
            let name = name.strip_prefix('/').unwrap_or(name).to_owned();
            Some((name, Row(COLUMNS.into_iter().zip(line).collect())))
        });
        let rows: HashMap<String, Row> = rows.collect();
        let is_ours = |row: &Row| row.get(OWNER) == Kind::State.to_string();
        if missing == Missing::IsRefused && !rows.get(&Kind::State.path()).is_some_and(is_ours) {
            return Err(Error::NoStore(self.dataset.clone()));
        }
        Ok(rows)
    }

    fn create(&self, dataset: &str, properties: &[String]) -> Result<()> {
        let mut args = vec!["create", "-u"];
        for property in FOR_FILES.into_iter().chain(properties.iter().map(String::as_str)) {
            args.extend(["-o", property]);
        }
        args.push(dataset);
        self.cli.zfs(&args).map(drop)
    }

    /// Refuses what a newer version wrote, and names of ours that are somebody else's, before anything is changed.
    fn check(&self, rows: &HashMap<String, Row>) -> Result<()> {
        for (path, row) in rows {
            if path.contains('@') || Kind::of_mark(row.get(OWNER)).is_none_or(|k| k.path() != *path) {
                continue;
            }
            let version = row.number(VERSION).unwrap_or(FORMAT);
            if version > FORMAT {
                return Err(Error::TooNew { what: row.get("name").to_owned(), version, known: FORMAT });
            }
        }
        for (name, kind) in groups() {
            if rows.get(&name).is_some_and(|row| row.get(OWNER) != kind.to_string()) {
                let dataset = self.name(&kind);
                return Err(Error::Foreign { dataset, what: "the store needs that name for itself" });
            }
        }
        Ok(())
    }

    /// Makes the groups that are missing.
    fn complete(&self, rows: &HashMap<String, Row>) -> Result<()> {
        for (name, kind) in groups() {
            if rows.contains_key(&name) {
                continue;
            }
            let canmount = if kind == Kind::State { "canmount=noauto" } else { "canmount=off" };
            let mut all = vec!["mountpoint=legacy".to_owned(), canmount.to_owned()];
            all.push(format!("{OWNER}={kind}"));
            all.push(format!("{VERSION}={FORMAT}"));
            self.create(&self.name(&kind), &all)?;
        }
        Ok(())
    }

    fn clear_mount_points(&self, name: &str) -> Result<()> {
        let dir = self.run_dir.join(name);
        mounts::unmount_all_below(&dir)?;
        for entry in fs::read_dir(&dir).attempt("list", &dir)? {
            let path = entry.attempt("list", &dir)?.path();
            match fs::remove_dir(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).attempt("remove", path),
                _ => {}
            }
        }
        Ok(())
    }

    /// What is whole; the rest is removed.
    fn take_stock(&self, rows: &HashMap<String, Row>) -> Index {
        let mut index = Index::default();
        let mut broken: Vec<(Kind, &'static str)> = Vec::new();
        let snapshot_of = |path: &str| rows.get(&Snapshot::FIRST.of(path));
        for (path, row) in rows.iter().filter(|(path, _)| !path.contains('@')) {
            let Some(kind) = Kind::of_mark(row.get(OWNER)) else { continue };
            if let Some(name) = path.strip_prefix("drafts/") {
                // A mark that a foreign child inherits is that of a group or of another draft's.
                let direct = !name.contains('/') && !matches!(kind, Kind::Group(_) | Kind::Top | Kind::State);
                let own = !matches!(&kind, Kind::Draft(of) if of != name);
                if direct && own {
                    broken.push((Kind::Draft(name.to_owned()), "unfinished"));
                }
                continue;
            }
            if kind.path() != *path {
                continue;
            }
            match kind {
                Kind::Layer(chain) => match snapshot_of(path).and_then(|s| row.layer(s)) {
                    Some(layer) => drop(index.layers.insert(chain, layer)),
                    None => broken.push((Kind::Layer(chain), "not whole")),
                },
                Kind::Shifted(map, chain) => match snapshot_of(path).and_then(|s| s.number("referenced")) {
                    Some(referenced) => drop(index.copies.insert((map, chain), Copy { referenced })),
                    None => broken.push((Kind::Shifted(map, chain), "not whole")),
                },
                Kind::Root(id) => match row.root() {
                    Some(root) => drop(index.roots.insert(id, root)),
                    None => broken.push((Kind::Root(id), "damaged")),
                },
                Kind::Group(name) => {
                    index.groups.extend(name.strip_prefix("shifted/").and_then(names::map_of));
                }
                Kind::Top | Kind::State | Kind::Draft(_) => {}
            }
        }
        let layers: HashSet<ChainId> = index.layers.keys().cloned().collect();
        let orphan = |root: &Root| root.top.as_ref().is_some_and(|top| !layers.contains(top));
        let orphans: Vec<_> =
            index.roots.iter().filter(|(_, r)| orphan(r)).map(|(id, _)| id.clone()).collect();
        for id in orphans {
            index.roots.remove(&id);
            broken.push((Kind::Root(id), "without its layers"));
        }
        self.remove_broken(broken, &mut index);
        index
    }

    /// Roots and drafts before the layers that they stand on.
    fn remove_broken(&self, mut broken: Vec<(Kind, &'static str)>, index: &mut Index) {
        broken.sort_by_key(|(kind, _)| match kind {
            Kind::Draft(_) | Kind::Root(_) => 0,
            Kind::Shifted(..) => 1,
            _ => 2,
        });
        for (kind, why) in broken {
            let dataset = self.name(&kind);
            match self.destroy(&dataset) {
                Ok(()) => tracing::info!(dataset, "removed: it was {why}"),
                Err(error) => {
                    tracing::warn!(dataset, %error, "it is {why} and could not be removed");
                    if matches!(kind, Kind::Draft(_)) {
                        index.gone.insert(dataset, None);
                    }
                }
            }
        }
    }

    fn mount_state(&self) -> Result<()> {
        let (path, dataset) = (self.state_dir(), self.name(&Kind::State));
        if mounts::source_of(&path)?.is_some_and(|source| source != dataset) {
            // Left by a store that had the same directory.
            mounts::unmount(&path)?;
        }
        if let Some(place) = attach::place_for(&path)? {
            attach::put(&attach::detached(&dataset, Access::Write)?, &place, &path)?;
        }
        let stat = rustix::fs::statvfs(&path).attempt("look at", &path)?;
        if stat.f_flag.contains(StatVfsMountFlags::RDONLY) {
            return Err(Error::ReadOnly { doing: format!("open the store on dataset {}", self.dataset) });
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).attempt("set the mode of", path)
    }
}

fn groups() -> impl Iterator<Item = (String, Kind)> {
    let groups = GROUPS.into_iter().map(|name| Kind::Group(name.to_owned()));
    groups.chain([Kind::State]).map(|kind| (kind.path(), kind))
}
