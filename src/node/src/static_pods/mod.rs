//! Static pods: pods of manifests in a folder, and their mirrors, the copies of them that the API server shows.

pub(crate) mod files;
pub(crate) mod mirror;
