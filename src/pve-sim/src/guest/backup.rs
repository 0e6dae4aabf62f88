//! Files of backups: their names, and the archive itself, a tar that begins with `./etc/vzdump/pct.conf`.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::Path,
};

use super::{CtConf, Volume, mount_points};

/// Where the config lies in an archive, and below a backup's temporary directory.
pub(crate) const CONF: &str = "etc/vzdump/pct.conf";
/// The same of the firewall's rules.
pub(crate) const FIREWALL: &str = "etc/vzdump/pct.fw";
/// The longest config that is read of an archive.
const CONF_MAX: u64 = 1 << 20;
/// How many entries of an archive are looked at for its config.
const LOOKED_AT: usize = 1000;

/// How an archive is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// What an archive's name ends with, which is also its format.
    pub(crate) fn extension(self) -> &'static str {
        match self {
            Self::None => "tar",
            Self::Gzip => "tar.gz",
            Self::Zstd => "tar.zst",
        }
    }

    /// How tar is told.
    pub(crate) fn option(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Gzip => Some("--gzip"),
            Self::Zstd => Some("--zstd"),
        }
    }
}

/// What the name of a backup says: `vzdump-lxc-<vmid>-<year>_<month>_<day>-<hour>_<minute>_<second>.<format>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) vmid: u32,
    /// Seconds since 1970.
    pub(crate) at: i64,
    pub(crate) compression: Compression,
}

/// The name without its ending, of a backup that was begun at this time.
pub(crate) fn basename(vmid: u32, at: &jiff::Zoned) -> String {
    format!("vzdump-lxc-{vmid}-{}", at.strftime(TIME))
}

const TIME: &str = "%Y_%m_%d-%H_%M_%S";

impl Named {
    /// `PVE::Storage::archive_info`, of what this simulator makes.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let rest = name.strip_prefix("vzdump-lxc-")?;
        let (vmid, rest) = rest.split_once('-')?;
        let (time, ending) = rest.split_once('.')?;
        let at = jiff::civil::DateTime::strptime(TIME, time).ok()?;
        let at = at.to_zoned(jiff::tz::TimeZone::system()).ok()?.timestamp().as_second();
        let compression = [Compression::None, Compression::Gzip, Compression::Zstd]
            .into_iter()
            .find(|c| c.extension() == ending)?;
        Some(Self { vmid: vmid.parse().ok().filter(|v| *v >= 100)?, at, compression })
    }
}

/// Whether a mount point is in its CT's backups, and why: `PVE::LXC::Config::mountpoint_backup_enabled`.
pub(crate) fn is_backed_up(point: &Volume) -> (bool, &'static str) {
    if point.key == "rootfs" {
        (true, "rootfs")
    } else if point.kind_name() != "volume" {
        (false, "not a volume")
    } else if point.options.get("backup").is_some_and(|v| v == "1") {
        (true, "enabled")
    } else {
        (false, "disabled")
    }
}

/// The mount points that are in a CT's backups.
pub(crate) fn backed_up(conf: &CtConf) -> Vec<Volume> {
    mount_points(conf).into_iter().filter(|p| is_backed_up(p).0).collect()
}

/// The config as it stands in a backup: without what is of the moment.
pub(crate) fn conf_for_backup(conf: &CtConf) -> CtConf {
    let mut main = conf.main.clone();
    for key in ["lock", "parent"] {
        main.values.remove(key);
    }
    CtConf { main, ..CtConf::default() }
}

/// Writes an archive of what lies below a directory under these names.
pub(crate) fn write(file: &Path, compression: Compression, dir: &Path, names: &[&str]) -> io::Result<()> {
    let out = File::create(file)?;
    let mut tar = tar::Builder::new(compressor(out, compression)?);
    for name in names {
        let bytes = fs::read(dir.join(name))?;
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        // Set as it is: `set_path` would take the `./` away, by which Proxmox VE knows the file.
        let path = format!("./{name}");
        if let Some(place) = header.as_old_mut().name.get_mut(..path.len()) {
            place.copy_from_slice(path.as_bytes());
        }
        header.set_cksum();
        tar.append(&header, bytes.as_slice())?;
    }
    tar.into_inner()?.finish()
}

/// A writer whose end has to be written.
trait Finish: Write {
    fn finish(self: Box<Self>) -> io::Result<()>;
}

impl Finish for File {
    fn finish(self: Box<Self>) -> io::Result<()> {
        self.sync_all()
    }
}

impl Finish for flate2::write::GzEncoder<File> {
    fn finish(self: Box<Self>) -> io::Result<()> {
        flate2::write::GzEncoder::finish(*self)?.sync_all()
    }
}

impl Finish for zstd::Encoder<'static, File> {
    fn finish(self: Box<Self>) -> io::Result<()> {
        zstd::Encoder::finish(*self)?.sync_all()
    }
}

fn compressor(out: File, compression: Compression) -> io::Result<Box<dyn Finish>> {
    Ok(match compression {
        Compression::None => Box::new(out),
        Compression::Gzip => Box::new(flate2::write::GzEncoder::new(out, flate2::Compression::default())),
        Compression::Zstd => Box::new(zstd::Encoder::new(out, 0)?),
    })
}

/// The config in an archive, with what has to be said where there is none.
pub(crate) fn read_conf(file: &Path, compression: Compression) -> Result<String, String> {
    let text = read(file, compression, CONF)?;
    text.ok_or_else(|| "ERROR: archive contains no configuration file".into())
}

/// A small file at the beginning of an archive.
pub(crate) fn read(file: &Path, compression: Compression, name: &str) -> Result<Option<String>, String> {
    let failed = |e: io::Error| format!("unable to open file '{}' - {e}", file.display());
    let input = File::open(file).map_err(|_| format!("ERROR: file '{}' does not exist", file.display()))?;
    let input: Box<dyn Read> = match compression {
        Compression::None => Box::new(input),
        Compression::Gzip => Box::new(flate2::read::GzDecoder::new(input)),
        Compression::Zstd => Box::new(zstd::Decoder::new(input).map_err(failed)?),
    };
    let mut tar = tar::Archive::new(input);
    for entry in tar.entries().map_err(failed)?.take(LOOKED_AT) {
        let entry = entry.map_err(failed)?;
        if *entry.path_bytes() == *format!("./{name}").as_bytes() {
            let mut text = String::new();
            entry.take(CONF_MAX).read_to_string(&mut text).map_err(failed)?;
            return Ok(Some(text));
        }
    }
    Ok(None)
}

/// A size as Proxmox VE's log has it.
pub(crate) fn format_size(bytes: u64) -> String {
    let unit = |shift: u32| bytes >> shift;
    match bytes {
        0..0x10_0000 => format!("{}KB", unit(10)),
        0x10_0000..0x4000_0000 => format!("{}MB", unit(20)),
        _ => format!("{:.2}GB", bytes as f64 / f64::from(1 << 30)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_archives_config_is_read_however_it_is_compressed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("etc/vzdump")).unwrap();
        fs::write(dir.path().join(CONF), "arch: amd64\n").unwrap();
        fs::write(dir.path().join(FIREWALL), "").unwrap();
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let file = dir.path().join(compression.extension());
            write(&file, compression, dir.path(), &[FIREWALL, CONF]).unwrap();
            assert_eq!(read_conf(&file, compression).unwrap(), "arch: amd64\n");
            // GNU tar finds it under the name by which Proxmox VE asks for it.
            let listed = std::process::Command::new("tar").arg("-tf").arg(&file).output().unwrap();
            assert_eq!(
                String::from_utf8(listed.stdout).unwrap(),
                "./etc/vzdump/pct.fw\n./etc/vzdump/pct.conf\n"
            );
        }
        write(&dir.path().join("x"), Compression::None, dir.path(), &[FIREWALL]).unwrap();
        let missing = read_conf(&dir.path().join("x"), Compression::None).unwrap_err();
        assert_eq!(missing, "ERROR: archive contains no configuration file");
    }

    #[test]
    fn a_backups_name_tells_guest_time_and_format() {
        let at = jiff::Timestamp::from_second(1_764_323_000).unwrap().to_zoned(jiff::tz::TimeZone::system());
        let name = format!("{}.tar.zst", basename(1_000_000, &at));
        let named = Named { vmid: 1_000_000, at: 1_764_323_000, compression: Compression::Zstd };
        assert_eq!(Named::parse(&name), Some(named));
        for odd in [
            "vzdump-lxc-100.tar",
            "vzdump-qemu-100-2026_01_01-00_00_00.vma",
            "x.tar",
            "vzdump-lxc-7-2026_01_01-00_00_00.tar",
        ] {
            assert_eq!(Named::parse(odd), None, "{odd}");
        }
    }

    #[test]
    fn only_the_root_and_volumes_that_ask_for_it_are_backed_up() {
        let conf = CtConf::parse(
            "rootfs: z:a,size=1G\nmp0: /guard,mp=/g\nmp1: z:b,mp=/b,backup=1\nmp2: z:c,mp=/c\nlock: x\nparent: y\n[y]\nmemory: 1\n",
        );
        let keys: Vec<_> = backed_up(&conf).into_iter().map(|p| p.key).collect();
        assert_eq!(keys, ["rootfs", "mp1"]);
        let text = conf_for_backup(&conf).format();
        assert!(!text.contains("lock") && !text.contains("parent") && !text.contains("[y]"), "{text}");
        assert!(text.contains("mp0: /guard"), "{text}");
    }
}
