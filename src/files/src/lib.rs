//! Files of a host: read within bounds, replaced as a whole; and work on them outside of the async threads.
//!
//! Every crate reads and writes its small files (records, ledgers, keys, configuration) with these, so that a size is bounded,
//! a crash leaves either the old or the new content, and nothing blocks an async thread, in the same way everywhere.

#[cfg(feature = "async")]
mod blocking;
mod read;
mod replace;

#[cfg(feature = "async")]
pub use blocking::blocking;
pub use read::{read_bounded, read_text_bounded, read_to_bound};
pub use replace::{replace, sync_dir};
