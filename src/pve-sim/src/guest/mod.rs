//! A CT's configuration file and the values in it.

pub(crate) mod backup;
mod conf;
mod raw;
mod volume;

pub(crate) use conf::{CtConf, Keys, encode_text, is_option};

pub(crate) use volume::{Volume, VolumeKind, mount_points, parse_pairs, size_bytes};
