//! `features`, `startup` and the words that a CT's configuration knows.

use std::{fmt, str::FromStr};

use super::property::{Extra, Fields, Writer};
use crate::{InvalidName, PropertyText};

/// `features` (`pve-container`'s `$features_desc`). A token may set nothing but nesting, even one of root@pam.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Features {
    /// Whether /sys is writable in an unprivileged CT.
    pub force_rw_sys: Option<bool>,
    /// Whether FUSE may be used.
    pub fuse: Option<bool>,
    /// Whether the keyctl system call is allowed.
    pub keyctl: Option<bool>,
    /// Whether device nodes may be made.
    pub mknod: Option<bool>,
    /// File systems that may be mounted.
    pub mount: Vec<PropertyText>,
    /// Whether containers may run in the CT.
    pub nesting: Option<bool>,
    /// Keys that this version does not know.
    pub extra: Extra,
}

impl FromStr for Features {
    type Err = InvalidName;
    fn from_str(s: &str) -> Result<Self, InvalidName> {
        let mut fields = Fields::parse("list of features", s, None)?;
        let force_rw_sys = fields.flag("force_rw_sys")?;
        let fuse = fields.flag("fuse")?;
        let keyctl = fields.flag("keyctl")?;
        let mknod = fields.flag("mknod")?;
        let mount = fields.list("mount", "a file system is none")?;
        let nesting = fields.flag("nesting")?;
        Ok(Self { force_rw_sys, fuse, keyctl, mknod, mount, nesting, extra: fields.rest()? })
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut w = Writer::default();
        w.flag("force_rw_sys", self.force_rw_sys);
        w.flag("fuse", self.fuse);
        w.flag("keyctl", self.keyctl);
        w.flag("mknod", self.mknod);
        w.list("mount", &self.mount);
        w.flag("nesting", self.nesting);
        w.extra(&self.extra);
        w.finish(f)
    }
}

/// `startup`: in which order guests come up with their host, and how long they get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Startup {
    /// Lower comes up earlier and goes down later.
    pub order: Option<u32>,
    /// Seconds before the next one starts.
    pub up: Option<u32>,
    /// Seconds that it gets to end.
    pub down: Option<u32>,
}

impl FromStr for Startup {
    type Err = InvalidName;
    fn from_str(s: &str) -> Result<Self, InvalidName> {
        let mut fields = Fields::parse("startup order", s, Some("order"))?;
        let order = fields.parsed("order", "the order is no number")?;
        let up = fields.parsed("up", "`up` is no number of seconds")?;
        let down = fields.parsed("down", "`down` is no number of seconds")?;
        if !fields.rest()?.is_empty() {
            return Err(InvalidName::new("startup order", s, "it has an unknown key"));
        }
        Ok(Self { order, up, down })
    }
}

impl fmt::Display for Startup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut w = Writer::default();
        w.maybe("order", self.order);
        w.maybe("up", self.up);
        w.maybe("down", self.down);
        w.finish(f)
    }
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $kind:literal, { $($(#[$vdoc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$vdoc])* $variant),+
        }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];
        }

        impl FromStr for $name {
            type Err = InvalidName;
            fn from_str(s: &str) -> Result<Self, InvalidName> {
                match s {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(InvalidName::new($kind, s, "it is not one that we know")),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $word),+ })
            }
        }
    };
}

words!(
    /** A CT's architecture. */
    Arch, "architecture", {
        /// x86-64.
        Amd64 = "amd64",
        /// x86, 32 bits.
        I386 = "i386",
        /// ARM, 64 bits.
        Arm64 = "arm64",
        /// ARM, 32 bits.
        Armhf = "armhf",
        /// RISC-V, 32 bits.
        Riscv32 = "riscv32",
        /// RISC-V, 64 bits.
        Riscv64 = "riscv64",
    }
);
words!(
    /** What the console shows. */
    ConsoleMode, "console mode", {
        /// /dev/console.
        Console = "console",
        /// A shell of its own.
        Shell = "shell",
        /// A tty with a getty.
        Tty = "tty",
    }
);
