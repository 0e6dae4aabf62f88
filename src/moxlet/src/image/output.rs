//! How images look on a terminal.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use moxlet_cri::host::StoredImage;
use serde_json::json;

/// Digits of an id that are shown.
const SHORT_ID: usize = 12;

/// Bytes as people read them, in powers of 1000 as registries do.
pub(crate) fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 999.5 {
            return if unit == "B" { format!("{value:.0} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

/// The beginning of an id.
pub(crate) fn short(id: &str) -> &str {
    let digits = id.strip_prefix("sha256:").unwrap_or(id);
    digits.get(..SHORT_ID).unwrap_or(digits)
}

/// How long ago something was, in its greatest unit.
fn ago(at: i64, now: SystemTime) -> String {
    let Ok(at) = u64::try_from(at) else { return "-".to_owned() };
    if at == 0 {
        return "-".to_owned();
    }
    let seconds = now.duration_since(UNIX_EPOCH + Duration::from_secs(at)).unwrap_or_default().as_secs();
    match seconds {
        0..60 => format!("{seconds}s ago"),
        60..3600 => format!("{}m ago", seconds / 60),
        3600..86_400 => format!("{}h ago", seconds / 3600),
        _ => format!("{}d ago", seconds / 86_400),
    }
}

/// The names of an image as rows show them.
fn names(image: &StoredImage) -> Vec<String> {
    if !image.repo_tags.is_empty() {
        return image.repo_tags.clone();
    }
    let of_digest = |d: &String| d.split_once('@').map(|(name, _)| format!("{name}:<none>"));
    match image.repo_digests.first().and_then(of_digest) {
        Some(name) => vec![name],
        None => vec!["<none>".to_owned()],
    }
}

/// A table, one row a name.
pub(crate) fn table(images: &[StoredImage], now: SystemTime) -> String {
    let mut rows = vec![["NAME", "ID", "SIZE", "ADDED", "LAST USED", "USED BY", ""].map(str::to_owned)];
    for image in images {
        for name in names(image) {
            rows.push([
                name,
                short(&image.id).to_owned(),
                size(image.size_bytes),
                ago(image.added_at, now),
                ago(image.last_used_at, now),
                image.in_use_by.len().to_string(),
                if image.pinned { "pinned".to_owned() } else { String::new() },
            ]);
        }
    }
    if let Some(body) = rows.get_mut(1..) {
        body.sort();
    }
    let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 7] = std::array::from_fn(width);
    let line = |row: &[String; 7]| {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// An array of objects.
pub(crate) fn json(images: &[StoredImage]) -> serde_json::Value {
    let time = |seconds: i64| (seconds > 0).then_some(seconds);
    images
        .iter()
        .map(|i| {
            json!({
                "id": i.id,
                "repoTags": i.repo_tags,
                "repoDigests": i.repo_digests,
                "sizeBytes": i.size_bytes,
                "pinned": i.pinned,
                "addedAt": time(i.added_at),
                "lastUsedAt": time(i.last_used_at),
                "inUseBy": i.in_use_by,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn image(id: char, tags: &[&str]) -> StoredImage {
        StoredImage {
            id: format!("sha256:{}", id.to_string().repeat(64)),
            repo_tags: tags.iter().map(|t| (*t).to_owned()).collect(),
            repo_digests: vec!["a.b/c@sha256:1".to_owned()],
            size_bytes: 1_234_567,
            pinned: tags.len() > 1,
            added_at: 1000,
            last_used_at: 0,
            in_use_by: vec!["container 1".to_owned()],
        }
    }

    #[test]
    fn a_table_has_a_row_for_each_name() {
        let now = UNIX_EPOCH + Duration::from_secs(1000 + 7300);
        let text = table(&[image('1', &["z:1", "y:1"]), image('2', &[])], now);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "NAME          ID            SIZE    ADDED   LAST USED  USED BY");
        assert_eq!(lines[1], "a.b/c:<none>  222222222222  1.2 MB  2h ago  -          1");
        assert_eq!(lines[2], "y:1           111111111111  1.2 MB  2h ago  -          1        pinned");
        assert_eq!(lines.len(), 4);
    }

    #[test]
    fn sizes_have_a_unit() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (999_999_999, "1.0 GB"),
            (u64::MAX, "18446744.1 TB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
