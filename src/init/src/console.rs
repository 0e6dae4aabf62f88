//! The CT's console, for whoever looks at it on the host: the states of the containers and what they write.
//!
//! Nobody may be reading there, so nothing is waited for: what does not fit is left out. What containers write is cut,
//! cleaned of everything that could steer a terminal, and bounded in lines a second: it is a view, the logs are elsewhere.

use std::{
    fs::OpenOptions,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    sync::Mutex,
};

use crate::sys::{lock, now_ns};

const PATH: &str = "/dev/console";
/// Bytes of a line that are shown.
const MAX_LINE: usize = 512;
/// Lines a second that are shown.
const MAX_LINES: u32 = 100;
const SECOND: i64 = 1_000_000_000;

/// The console, if there is one.
#[derive(Debug, Default)]
pub(crate) struct Console(Option<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    fd: OwnedFd,
    pace: Pace,
}

/// How much was shown of late.
#[derive(Debug, Default)]
struct Pace {
    second: i64,
    shown: u32,
    left_out: u64,
}

impl Pace {
    /// Whether one more may be shown, and how many were not before.
    fn take(&mut self, now: i64) -> (bool, u64) {
        if now / SECOND != self.second {
            let left_out = std::mem::take(&mut self.left_out);
            (self.second, self.shown) = (now / SECOND, 1);
            return (true, left_out);
        }
        if self.shown < MAX_LINES {
            self.shown += 1;
            return (true, 0);
        }
        self.left_out += 1;
        (false, 0)
    }
}

impl Console {
    /// Opens it. Where it is none (a CT without one, a test) all is left out.
    pub(crate) fn open() -> Self {
        let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
        let file = OpenOptions::new().write(true).custom_flags(flags).open(PATH).ok();
        let terminal = file.filter(|f| rustix::termios::isatty(f.as_fd()));
        Self(terminal.map(|file| Mutex::new(Inner { fd: file.into(), pace: Pace::default() })))
    }

    /// Whether anything is shown.
    pub(crate) fn is_there(&self) -> bool {
        self.0.is_some()
    }

    /// Shows a word of our own.
    pub(crate) fn say(&self, text: &str) {
        if let Some(inner) = &self.0 {
            put(&lock(inner).fd, &line("moxlet", text.as_bytes()));
        }
    }

    /// Shows a line of a container.
    pub(crate) fn show(&self, name: &str, text: &[u8]) {
        let Some(inner) = &self.0 else { return };
        let mut inner = lock(inner);
        let (shown, left_out) = inner.pace.take(now_ns());
        if left_out > 0 {
            put(&inner.fd, &line("moxlet", format!("{left_out} lines left out").as_bytes()));
        }
        if shown {
            put(&inner.fd, &line(name, text));
        }
    }
}

fn put(fd: &OwnedFd, bytes: &[u8]) {
    let _ = rustix::io::write(fd, bytes);
}

/// A line as a terminal may have it.
fn line(name: &str, text: &[u8]) -> Vec<u8> {
    let cut = text.get(..MAX_LINE).unwrap_or(text);
    let mut out = format!("[{}] ", clean(name)).into_bytes();
    out.extend_from_slice(clean(&String::from_utf8_lossy(cut)).as_bytes());
    if cut.len() < text.len() {
        out.extend_from_slice(b" ...");
    }
    out.extend_from_slice(b"\r\n");
    out
}

/// Without control characters, of which some begin orders to a terminal.
pub(crate) fn clean(text: &str) -> String {
    let visible = |c: char| if c.is_control() && c != '\t' { '?' } else { c };
    text.trim_end_matches('\r').chars().map(visible).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_steers_a_terminal_gets_through() {
        assert_eq!(line("web", b"a\x1b[2Jb\tc\r"), b"[web] a?[2Jb\tc\r\n");
        assert_eq!(line("w\n", "\u{9b}x".as_bytes()), b"[w?] ?x\r\n");
        let long = line("w", &[b'x'; 2000]);
        assert!(long.len() < MAX_LINE + 20 && long.ends_with(b" ...\r\n"));
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let mut pace = Pace::default();
        let shown = (0..250).filter(|_| pace.take(5 * SECOND).0).count();
        assert_eq!(shown, MAX_LINES as usize);
        assert_eq!(pace.take(6 * SECOND), (true, 150));
        assert_eq!(pace.take(6 * SECOND), (true, 0));
    }

    #[test]
    fn without_a_console_nothing_happens() {
        let none = Console::default();
        none.say("x");
        none.show("a", b"b");
        assert!(!none.is_there());
    }
}
