//! Tables and ages as kubectl prints them.

use std::{
    io::Write as _,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};

/// Rows below a head, in columns three spaces apart.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(head.get(column).map(|cell| cell.len())).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..head.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells: Vec<_> = cells.zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("   ").trim_end().to_owned() + "\n"
    };
    let mut text = line(&mut head.iter().copied());
    for row in rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

/// How long ago that was (nanoseconds of UNIX time), as `kubectl get` shows ages.
pub(crate) fn age(at: i64, now: SystemTime) -> String {
    if at <= 0 {
        return "<unknown>".to_owned();
    }
    let now = now.duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX));
    let s = now.saturating_sub(at).max(0) / 1_000_000_000;
    let two = |big: i64, big_unit, small: i64, small_unit| match small {
        0 => format!("{big}{big_unit}"),
        _ => format!("{big}{big_unit}{small}{small_unit}"),
    };
    let (minutes, hours, days) = (s / 60, s / 3600, s / 86_400);
    match s {
        0..120 => format!("{s}s"),
        120..600 => two(minutes, 'm', s % 60, 's'),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => two(hours, 'h', minutes % 60, 'm'),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => two(days, 'd', hours % 24, 'h'),
        691_200..63_072_000 => format!("{days}d"),
        _ => two(days / 365, 'y', days % 365, 'd'),
    }
}

/// A time (nanoseconds of UNIX time) as RFC 3339; none where there is none.
pub(crate) fn time(at: i64) -> Option<String> {
    let at = jiff::Timestamp::from_nanosecond(i128::from(at)).ok().filter(|_| at > 0)?;
    Some(at.to_string())
}

/// Prints text. A reader that has gone is no failure worth a message.
///
/// # Errors
/// It cannot be written.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write to standard output"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn ages_are_kubectls() {
        let start = 1_000_000_000_000_000_000;
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (150, "2m30s"),
            (900, "15m"),
            (10_800 + 300, "3h5m"),
            (36_000, "10h"),
            (180_000, "2d2h"),
            (864_000, "10d"),
            (70_000_000, "2y80d"),
        ] {
            let now = UNIX_EPOCH + Duration::from_secs(1_000_000_000 + seconds);
            assert_eq!(age(start, now), text, "{seconds}");
        }
        assert_eq!(age(0, UNIX_EPOCH), "<unknown>");
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["default".to_owned(), "web".to_owned()], vec!["a".to_owned(), "b".to_owned()]];
        assert_eq!(
            table(&["NAMESPACE", "NAME"], &rows),
            "NAMESPACE   NAME\ndefault     web\na           b\n"
        );
    }

    #[test]
    fn times_are_rfc_3339() {
        assert_eq!(time(1_000_000_000_000_000_000).as_deref(), Some("2001-09-09T01:46:40Z"));
        assert_eq!(time(0), None);
    }
}
