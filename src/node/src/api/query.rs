//! What a request asks for in its query, as the kubelet reads it: log options, streams of exec and attach, ports.

use jiff::Timestamp;

/// The most arguments of one command.
const MAX_COMMAND: usize = 4096;

/// The pairs of a query, in their order; what is no UTF-8 becomes the replacement character.
pub(crate) fn pairs(query: Option<&str>) -> Vec<(String, String)> {
    form_urlencoded::parse(query.unwrap_or_default().as_bytes()).into_owned().collect()
}

fn first<'a>(pairs: &'a [(String, String)], name: &str) -> Option<&'a str> {
    pairs.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
}

fn truthy(pairs: &[(String, String)], names: &[&str]) -> bool {
    names.iter().any(|name| matches!(first(pairs, name), Some("1" | "true")))
}

/// Options of `/containerLogs`, checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LogOptions {
    pub(crate) follow: bool,
    pub(crate) previous: bool,
    pub(crate) timestamps: bool,
    pub(crate) tail_lines: Option<u64>,
    pub(crate) limit_bytes: Option<u64>,
    /// UNIX nanoseconds.
    pub(crate) since_nanos: Option<i64>,
    /// `stdout` or `stderr`.
    pub(crate) stream: Option<&'static str>,
}

/// Why options are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BadOptions {
    /// A value cannot be read: 400.
    Undecodable,
    /// A value is out of its range, or two exclude each other: 422.
    Invalid,
}

impl LogOptions {
    /// Reads and checks them.
    pub(crate) fn parse(query: Option<&str>, now: Timestamp) -> Result<Self, BadOptions> {
        let pairs = pairs(query);
        let get = |name: &str| first(&pairs, name).filter(|v| !v.is_empty());
        let number =
            |name: &str| get(name).map(|v| v.parse::<i64>().map_err(|_| BadOptions::Undecodable)).transpose();
        // As Kubernetes decodes a bool in a query: there without a value, or with any but these, is true.
        let flag =
            |name: &str| first(&pairs, name).is_some_and(|v| !(v == "0" || v.eq_ignore_ascii_case("false")));
        let tail = match get("tail") {
            Some("all") => None,
            Some(_) => number("tail")?,
            None => number("tailLines")?,
        };
        let at_least = |value: Option<i64>, least: i64| match value {
            Some(v) if v < least => Err(BadOptions::Invalid),
            v => Ok(v.and_then(|v| u64::try_from(v).ok())),
        };
        let since_seconds = at_least(number("sinceSeconds")?, 1)?;
        let since_time = get("sinceTime")
            .map(|v| v.parse::<Timestamp>().map_err(|_| BadOptions::Undecodable))
            .transpose()?;
        let since_nanos = match (since_seconds, since_time) {
            (Some(_), Some(_)) => return Err(BadOptions::Invalid),
            (Some(seconds), None) => {
                let nanos = i64::try_from(now.as_nanosecond()).unwrap_or(i64::MAX);
                let back = i64::try_from(seconds).unwrap_or(i64::MAX).saturating_mul(1_000_000_000);
                Some(nanos.saturating_sub(back).max(0))
            }
            (None, Some(time)) => {
                Some(i64::try_from(time.as_nanosecond()).unwrap_or(if time > now { i64::MAX } else { 0 }))
            }
            (None, None) => None,
        };
        let stream = match get("stream") {
            None | Some("All") => None,
            Some("Stdout") => Some("stdout"),
            Some("Stderr") => Some("stderr"),
            Some(_) => return Err(BadOptions::Invalid),
        };
        let tail_lines = at_least(tail, 0)?;
        if stream.is_some() && tail_lines.is_some() {
            return Err(BadOptions::Invalid);
        }
        Ok(Self {
            follow: flag("follow"),
            previous: flag("previous"),
            timestamps: flag("timestamps"),
            tail_lines,
            limit_bytes: at_least(number("limitBytes")?, 1)?,
            since_nanos,
            stream,
        })
    }
}

/// What exec or attach asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Streams {
    pub(crate) command: Vec<String>,
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
    pub(crate) tty: bool,
}

impl Streams {
    /// Reads it; at least one stream must be asked for.
    pub(crate) fn parse(query: Option<&str>) -> Result<Self, &'static str> {
        let pairs = pairs(query);
        let tty = truthy(&pairs, &["tty"]);
        let streams = Self {
            stdin: truthy(&pairs, &["input", "stdin"]),
            stdout: truthy(&pairs, &["output", "stdout"]),
            // A terminal has one output: the kubelet drops stderr then.
            stderr: truthy(&pairs, &["error", "stderr"]) && !tty,
            tty,
            command: pairs.into_iter().filter(|(n, _)| n == "command").map(|(_, v)| v).collect(),
        };
        if streams.command.len() > MAX_COMMAND {
            return Err("the command has too many arguments");
        }
        if !(streams.stdin || streams.stdout || streams.stderr) {
            return Err("you must specify at least 1 of stdin, stdout, stderr");
        }
        Ok(streams)
    }
}

/// The ports of a port-forward that names them in its query (WebSocket).
pub(crate) fn ports(query: Option<&str>) -> Result<Vec<i32>, String> {
    let values = pairs(query).into_iter().filter(|(n, _)| n == "port" || n == "ports");
    let mut ports = Vec::new();
    for part in values.flat_map(|(_, v)| v.split(',').map(str::to_owned).collect::<Vec<_>>()) {
        match part.parse::<u16>() {
            Ok(port) if port > 0 && ports.len() < 256 => ports.push(i32::from(port)),
            _ => return Err(format!("invalid port {part:?}")),
        }
    }
    Ok(ports)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use proptest::prelude::*;

    use super::*;

    fn parse(query: &str) -> Result<LogOptions, BadOptions> {
        LogOptions::parse(Some(query), Timestamp::from_second(1000).unwrap())
    }

    #[test]
    fn log_options() {
        let all = parse("follow=true&previous=false&timestamps=1&tailLines=0&limitBytes=7&sinceSeconds=10")
            .unwrap();
        assert!(all.follow && !all.previous && all.timestamps);
        assert_eq!(
            (all.tail_lines, all.limit_bytes, all.since_nanos),
            (Some(0), Some(7), Some(990_000_000_000))
        );
        assert_eq!(parse("sinceTime=1970-01-01T00:00:05Z").unwrap().since_nanos, Some(5_000_000_000));
        assert_eq!(parse("stream=Stderr").unwrap().stream, Some("stderr"));
        assert_eq!(parse("tail=all&tailLines=3").unwrap().tail_lines, None);
        assert_eq!(parse("tail=4").unwrap().tail_lines, Some(4));
        assert_eq!(LogOptions::parse(None, Timestamp::UNIX_EPOCH).unwrap(), LogOptions::default());
    }

    #[test]
    fn bad_log_options() {
        for (query, why) in [
            ("tailLines=x", BadOptions::Undecodable),
            ("sinceTime=yesterday", BadOptions::Undecodable),
            ("tailLines=-1", BadOptions::Invalid),
            ("limitBytes=0", BadOptions::Invalid),
            ("sinceSeconds=0", BadOptions::Invalid),
            ("sinceSeconds=1&sinceTime=1970-01-01T00:00:05Z", BadOptions::Invalid),
            ("stream=stdin", BadOptions::Invalid),
            ("stream=Stdout&tailLines=1", BadOptions::Invalid),
        ] {
            assert_eq!(parse(query), Err(why), "{query}");
        }
    }

    #[test]
    fn streams() {
        let got =
            Streams::parse(Some("command=sh&command=-c&command=echo+a%26b&input=1&output=1&error=1&tty=1"))
                .unwrap();
        assert_eq!(got.command, ["sh", "-c", "echo a&b"]);
        assert!(got.stdin && got.stdout && !got.stderr && got.tty);
        let got = Streams::parse(Some("stdout=true&stderr=true")).unwrap();
        assert!(got.stdout && got.stderr && !got.stdin && !got.tty);
        assert!(Streams::parse(Some("command=x")).is_err());
    }

    #[test]
    fn port_lists() {
        assert_eq!(ports(Some("port=80&port=443,1")).unwrap(), [80, 443, 1]);
        assert_eq!(ports(None).unwrap(), Vec::<i32>::new());
        assert!(ports(Some("port=0")).is_err() && ports(Some("port=70000")).is_err());
    }

    proptest! {
        #[test]
        fn any_query_is_read_without_harm(query in ".{0,200}") {
            let _ = parse(&query);
            let _ = Streams::parse(Some(&query));
            let _ = ports(Some(&query));
        }

        #[test]
        fn numbers_come_through(tail in 0..=i64::MAX, limit in 1..=i64::MAX, since in 1..=i64::MAX) {
            let got = parse(&format!("tailLines={tail}&limitBytes={limit}&sinceSeconds={since}")).unwrap();
            prop_assert_eq!(got.tail_lines, Some(tail as u64));
            prop_assert_eq!(got.limit_bytes, Some(limit as u64));
            prop_assert!(got.since_nanos.unwrap() >= 0);
        }

        #[test]
        fn decoding_undoes_encoding(text in "\\PC{0,60}") {
            let encoded: String = text.bytes().map(|b| format!("%{b:02X}")).collect();
            prop_assert_eq!(pairs(Some(&format!("a={encoded}"))), [("a".to_owned(), text)]);
        }
    }
}
