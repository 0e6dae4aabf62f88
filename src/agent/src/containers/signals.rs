//! The signal that asks a container to end, as images and CRI write it.

use moxlet_cri::v1;
use moxlet_image::ImageConfig;

use crate::error::{Error, Result};

/// The signal that nothing outlives.
pub(super) const KILL: i32 = rustix::process::Signal::KILL.as_raw();

/// The request's stop signal, else the image's, else SIGTERM.
pub(super) fn of_container(config: &v1::ContainerConfig, image: &ImageConfig) -> Result<i32> {
    let asked = config.stop_signal();
    if asked != v1::Signal::RuntimeDefault {
        return signal_number(asked.as_str_name());
    }
    match image.stop_signal.as_str() {
        "" => Ok(15),
        text => signal_number(text),
    }
}

/// A signal as images and CRI write it: `SIGQUIT`, `QUIT`, `3`, `SIGRTMIN+3`, `SIGRTMINPLUS3`.
fn signal_number(text: &str) -> Result<i32> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
        "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
        "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    let upper = text.trim().to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let within = |n: i32| (1..=64).contains(&n).then_some(n);
    let real_time = |rest: &str, base: i32, sign: i32| {
        let rest = rest.trim_start_matches("PLUS").trim_start_matches("MINUS").trim_start_matches(['+', '-']);
        let offset: i32 =
            if rest.is_empty() { 0 } else { rest.parse().ok().filter(|n| (0..=30).contains(n))? };
        within(base + sign * offset)
    };
    let number = if let Ok(number) = name.parse() {
        within(number)
    } else if let Some(rest) = name.strip_prefix("RTMIN") {
        real_time(rest, 34, 1)
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        real_time(rest, 64, -1)
    } else {
        let plain = match name {
            "IOT" => "ABRT",
            "CLD" => "CHLD",
            "POLL" => "IO",
            other => other,
        };
        NAMES.iter().position(|n| *n == plain).and_then(|at| i32::try_from(at + 1).ok())
    };
    number.ok_or_else(|| Error::Invalid(format!("{text:?} is no signal")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn signals_are_read_in_every_spelling() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("quit", 3),
            ("9", 9),
            ("SIGRTMIN+3", 37),
            ("SIGRTMINPLUS1", 35),
            ("SIGRTMAXMINUS1", 63),
            ("SIGPOLL", 29),
        ] {
            assert_eq!(signal_number(text).unwrap(), number, "{text}");
        }
        for bad in ["", "SIGFOO", "0", "65", "-9", "RTMIN+99"] {
            assert!(signal_number(bad).is_err(), "{bad}");
        }
    }
}
