//! Numbers as people say them. Nothing is decided here.

pub use proto::words::{count, duration, grouped};

/// A stretch of time in its two largest sensible units: `40 s`, `12 min`, `5 h 3 min`, `3 d`.
pub fn span(ms: i64) -> String {
    let seconds = ms.max(0) / 1_000;
    let (minutes, hours, days) = (seconds / 60, seconds / 3_600, seconds / 86_400);
    match () {
        () if seconds < 60 => format!("{seconds} s"),
        () if minutes < 60 => format!("{minutes} min"),
        () if hours < 10 && minutes % 60 != 0 => format!("{hours} h {} min", minutes % 60),
        () if hours < 48 => format!("{hours} h"),
        () => format!("{days} d"),
    }
}

/// `a`, `a and b`, `a, b and c`, `a, b, c and 7 more`.
pub fn list<T: AsRef<str>>(items: &[T], shown_max: usize) -> String {
    let shown = &items[..items.len().min(shown_max)];
    let mut parts: Vec<String> = shown.iter().map(|item| item.as_ref().to_owned()).collect();
    let rest = items.len() - shown.len();
    if rest > 0 {
        parts.push(format!("{rest} more"));
    }
    match parts.split_last() {
        None => String::new(),
        Some((only, [])) => only.clone(),
        Some((last, others)) => format!("{} and {last}", others.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_short() {
        let table = [
            (-5, "0 s"),
            (59_999, "59 s"),
            (60_000, "1 min"),
            (3_600_000, "1 h"),
            (18_180_000, "5 h 3 min"),
            (47 * 3_600_000, "47 h"),
            (48 * 3_600_000, "2 d"),
        ];
        for (ms, text) in table {
            assert_eq!(span(ms), text);
        }
    }

    #[test]
    fn lists_read_well() {
        assert_eq!(list::<&str>(&[], 3), "");
        assert_eq!(list(&["a"], 3), "a");
        assert_eq!(list(&["a", "b", "c"], 3), "a, b and c");
        assert_eq!(list(&["a", "b", "c", "d"], 2), "a, b and 2 more");
    }
}
