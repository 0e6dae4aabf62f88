//! Who a container runs as: the request's user, else the image's, looked up in the image's own `/etc/passwd` and `/etc/group`.
//!
//! Those files are written by whoever made the image: opened inside its root, bounded, and every odd line is passed over.

use std::{io::Read, path::Path};

use moxlet_cri::{annotations::RUN_AS_NON_ROOT, v1};
use moxlet_storage::IdMap;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

use crate::error::{Error, Result};

/// A larger file is refused.
const MAX_FILE: u64 = 1 << 20;
/// The kernel's bound.
const MAX_GROUPS: usize = 65_536;

/// Ids of the container's first process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Begins with the primary group.
    pub(super) groups: Vec<u32>,
}

/// A line of `/etc/passwd`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PasswdEntry {
    pub(super) name: String,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// A line of `/etc/group`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GroupEntry {
    pub(super) name: String,
    pub(super) gid: u32,
    pub(super) members: Vec<String>,
}

pub(super) fn parse_passwd(text: &str) -> Vec<PasswdEntry> {
    let entry = |line: &str| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|n| !n.is_empty() && !n.starts_with('#'))?.to_owned();
        let uid = fields.nth(1)?.trim().parse().ok()?;
        let gid = fields.next()?.trim().parse().ok()?;
        Some(PasswdEntry { name, uid, gid })
    };
    text.lines().filter_map(entry).collect()
}

pub(super) fn parse_group(text: &str) -> Vec<GroupEntry> {
    let entry = |line: &str| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|n| !n.is_empty() && !n.starts_with('#'))?.to_owned();
        let gid = fields.nth(1)?.trim().parse().ok()?;
        let members = fields.next().unwrap_or("").split(',').map(str::trim);
        let members = members.filter(|m| !m.is_empty()).map(str::to_owned).collect();
        Some(GroupEntry { name, gid, members })
    };
    text.lines().filter_map(entry).collect()
}

/// The text of a file in the image; empty if there is none.
fn read_in_root(root: &Path, path: &str) -> Result<String> {
    let failed = |e: std::io::Error| Error::io(format!("{path} of the image"), e);
    let dir = openat(CWD, root, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| failed(e.into()))?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = match openat2(&dir, path, flags, Mode::empty(), inside) {
        Ok(fd) => std::fs::File::from(fd),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(String::new()),
        Err(e) => return Err(failed(e.into())),
    };
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(Error::Invalid(format!("{path} of the image is no regular file")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::Invalid(format!("{path} of the image is larger than {MAX_FILE} bytes")));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Finds out who a container runs as.
pub(super) fn resolve(
    config: &v1::ContainerConfig,
    image_user: &str,
    root: &Path,
    map: IdMap,
) -> Result<User> {
    let none = v1::LinuxContainerSecurityContext::default();
    let context = config.linux.as_ref().and_then(|l| l.security_context.as_ref()).unwrap_or(&none);
    let wanted = Wanted::of(context, image_user)?;
    if config.annotations.get(RUN_AS_NON_ROOT).is_some_and(|v| v == "true") {
        wanted.check_non_root()?;
    }
    let passwd = parse_passwd(&read_in_root(root, "etc/passwd")?);
    let group = parse_group(&read_in_root(root, "etc/group")?);
    let name = wanted.user.as_str();
    let numeric = name.parse::<i64>().ok();
    let entry = match numeric {
        Some(uid) => passwd.iter().find(|e| i64::from(e.uid) == uid),
        None => passwd.iter().find(|e| e.name == name),
    };
    let uid = match (numeric, entry) {
        (Some(uid), _) => id_in(map, uid, "user")?,
        (None, Some(entry)) => id_in(map, entry.uid.into(), "user")?,
        (None, None) if name == "root" => 0,
        (None, None) => {
            return Err(Error::Invalid(format!("user {name:?} is not in /etc/passwd of the image")));
        }
    };
    let gid = match &wanted.group {
        None => id_in(map, entry.map_or(0, |e| e.gid.into()), "group")?,
        Some(text) => match (text.parse::<i64>(), group.iter().find(|g| g.name == *text)) {
            (Ok(gid), _) => id_in(map, gid, "group")?,
            (_, Some(entry)) => id_in(map, entry.gid.into(), "group")?,
            _ => return Err(Error::Invalid(format!("group {text:?} is not in /etc/group of the image"))),
        },
    };
    let user = entry.map_or(name, |e| e.name.as_str());
    Ok(User { uid, gid, groups: groups(context, user, gid, &group, map)? })
}

/// An id that the CT has.
fn id_in(map: IdMap, value: i64, what: &str) -> Result<u32> {
    let id = u32::try_from(value).ok().filter(|id| map.host_id(*id).is_some());
    id.ok_or_else(|| {
        Error::Invalid(format!("{what} {value} is outside of the CT's ids (0 to {})", map.size - 1))
    })
}

/// What is asked for: a name or number, and a group or none.
struct Wanted {
    user: String,
    group: Option<String>,
    from_image: bool,
}

impl Wanted {
    fn of(context: &v1::LinuxContainerSecurityContext, image_user: &str) -> Result<Self> {
        let requested = match (&context.run_as_user, context.run_as_username.as_str()) {
            (Some(uid), "") => Some(uid.value.to_string()),
            (_, "") => None,
            (_, name) => Some(name.to_owned()),
        };
        let from_image = requested.is_none();
        let gid = context.run_as_group.as_ref().map(|g| g.value);
        let (user, group) = match (requested, gid) {
            (None, Some(gid)) => {
                return Err(Error::Invalid(format!("user group \"{gid}\" is specified without user")));
            }
            (Some(user), gid) => (user, gid.map(|gid| gid.to_string())),
            (None, None) => match image_user.split_once(':') {
                Some((user, group)) => (user.to_owned(), Some(group.to_owned())),
                None => (image_user.to_owned(), None),
            },
        };
        let user = if user.is_empty() { "0".to_owned() } else { user };
        Ok(Self { user, group: group.filter(|g| !g.is_empty()), from_image })
    }

    /// The kubelet's words.
    fn check_non_root(&self) -> Result<()> {
        let why = match self.user.parse::<i64>() {
            Ok(0) if self.from_image => "container has runAsNonRoot and image will run as root".to_owned(),
            Ok(0) => "container's runAsUser breaks non-root policy".to_owned(),
            Ok(_) => return Ok(()),
            Err(_) => format!(
                "container has runAsNonRoot and image has non-numeric user ({}), cannot verify user is non-root",
                self.user
            ),
        };
        Err(Error::Invalid(why))
    }
}

/// The groups of a user: the primary one first, those of the image that have the user, if they are asked for, and the request's.
fn groups(
    context: &v1::LinuxContainerSecurityContext,
    user: &str,
    primary: u32,
    known: &[GroupEntry],
    map: IdMap,
) -> Result<Vec<u32>> {
    let mut groups = vec![primary];
    if context.supplemental_groups_policy == v1::SupplementalGroupsPolicy::Merge as i32 {
        for entry in known.iter().filter(|g| g.members.iter().any(|m| m == user)) {
            groups.push(id_in(map, entry.gid.into(), "group")?);
        }
    }
    for gid in &context.supplemental_groups {
        groups.push(id_in(map, *gid, "supplemental group")?);
    }
    let mut seen = std::collections::HashSet::new();
    groups.retain(|g| seen.insert(*g));
    if groups.len() > MAX_GROUPS {
        return Err(Error::Invalid(format!("more than {MAX_GROUPS} supplemental groups")));
    }
    Ok(groups)
}
