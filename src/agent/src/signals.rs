//! The signal that asks a container to end, as images and CRI write it.

use moxlet_cri::v1;
use moxlet_image::ImageConfig;
use nix::sys::signal::Signal;

use crate::error::{Error, Result};

/// The signal that nothing outlives.
pub(crate) const KILL: i32 = rustix::process::Signal::KILL.as_raw();

/// The request's stop signal, else the image's, else SIGTERM.
pub(crate) fn of_container(config: &v1::ContainerConfig, image: &ImageConfig) -> Result<i32> {
    let asked = config.stop_signal();
    if asked != v1::Signal::RuntimeDefault {
        return parsed(asked.as_str_name());
    }
    match image.stop_signal.as_str() {
        "" => Ok(15),
        text => parsed(text),
    }
}

/// The first real-time signal, as the C library counts them.
const RTMIN: i32 = 34;
/// The last.
const RTMAX: i32 = 64;

/// A signal as images and CRI write it: `SIGQUIT`, `QUIT`, `3`, `SIGRTMIN+3`, `SIGRTMINPLUS3`.
fn parsed(text: &str) -> Result<i32> {
    let upper = text.trim().to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let within = |n: i32| (1..=RTMAX).contains(&n).then_some(n);
    let real_time = |rest: &str, base: i32, sign: i32| {
        let rest = rest.trim_start_matches("PLUS").trim_start_matches("MINUS").trim_start_matches(['+', '-']);
        let offset: i32 =
            if rest.is_empty() { 0 } else { rest.parse().ok().filter(|n| (0..=30).contains(n))? };
        within(base + sign * offset)
    };
    let number = if let Ok(number) = name.parse() {
        within(number)
    } else if let Some(rest) = name.strip_prefix("RTMIN") {
        real_time(rest, RTMIN, 1)
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        real_time(rest, RTMAX, -1)
    } else {
        let plain = match name {
            "IOT" => "ABRT",
            "CLD" => "CHLD",
            "POLL" => "IO",
            other => other,
        };
        format!("SIG{plain}").parse::<Signal>().ok().map(|signal| signal as i32)
    };
    number.ok_or_else(|| Error::Invalid(format!("{text:?} is no signal")))
}

/// A signal's number as CRI's enum names it.
pub(crate) fn as_cri(number: i32) -> v1::Signal {
    let name = match Signal::try_from(number) {
        Ok(signal) => signal.as_str().to_owned(),
        Err(_) if number == RTMIN => "SIGRTMIN".to_owned(),
        Err(_) if number == RTMAX => "SIGRTMAX".to_owned(),
        Err(_) if number <= RTMIN + 15 => format!("SIGRTMINPLUS{}", number - RTMIN),
        Err(_) => format!("SIGRTMAXMINUS{}", RTMAX - number),
    };
    v1::Signal::from_str_name(&name).unwrap_or(v1::Signal::RuntimeDefault)
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
            assert_eq!(parsed(text).unwrap(), number, "{text}");
        }
        for bad in ["", "SIGFOO", "0", "65", "-9", "RTMIN+99"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_number_has_the_name_that_cri_gives_it() {
        for (number, name) in [
            (15, "SIGTERM"),
            (9, "SIGKILL"),
            (34, "SIGRTMIN"),
            (37, "SIGRTMINPLUS3"),
            (49, "SIGRTMINPLUS15"),
            (50, "SIGRTMAXMINUS14"),
            (64, "SIGRTMAX"),
        ] {
            assert_eq!(as_cri(number).as_str_name(), name);
        }
    }
}
