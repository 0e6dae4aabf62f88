//! What somebody may have meant who mistyped a word.

/// The candidate nearest to `word`, if one is near enough to be meant.
pub(crate) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = word.to_lowercase();
    let distance = |other: &str| strsim::damerau_levenshtein(&lower, &other.to_lowercase());
    // A letter in three may be wrong, and at least one.
    let most = (word.chars().count() / 3).max(1);
    candidates.into_iter().map(|c| (distance(c), c)).filter(|(d, _)| *d <= most).min().map(|(_, c)| c)
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn a_near_word_is_found_and_a_far_one_is_not() {
        let words = ["max_pods", "node_name", "log"];
        assert_eq!(nearest("max_podz", words), Some("max_pods"));
        assert_eq!(nearest("nodeName", words), Some("node_name"));
        assert_eq!(nearest("colour", words), None);
    }
}
