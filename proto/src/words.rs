//! Numbers as people say them.

/// `1 table`, `2 tables`.
pub fn count(n: u64, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{} {noun}s", grouped(n)) }
}

/// `41,882,113`.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A length of time as people say it, from milliseconds, rounded to the nearest of what is shown.
pub fn duration(ms: i64) -> String {
    let shown_ms = match ms {
        ..1_000 => 1,
        1_000..10_000 => 100,
        10_000..3_600_000 => 1_000,
        3_600_000..172_800_000 => 60_000,
        _ => 3_600_000,
    };
    let ms = ms.saturating_add(shown_ms / 2) / shown_ms * shown_ms;
    let s = ms / 1_000;
    match ms {
        ..0 => "0 ms".to_owned(),
        0..1_000 => format!("{ms} ms"),
        1_000..10_000 => format!("{}.{} s", s, (ms % 1_000) / 100),
        10_000..60_000 => format!("{s} s"),
        60_000..3_600_000 => format!("{}m{:02}s", s / 60, s % 60),
        3_600_000..172_800_000 => format!("{}h{:02}m", s / 3_600, s / 60 % 60),
        _ => format!("{}d{:02}h", s / 86_400, s / 3_600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(grouped(41_882_113), "41,882,113");
        assert_eq!(grouped(212), "212");
        assert_eq!(count(0, "row"), "0 rows");
        assert_eq!(count(1, "table"), "1 table");
        assert_eq!(count(1_000, "row"), "1,000 rows");
    }

    #[test]
    fn times_are_said_in_units_that_fit() {
        let said: Vec<String> =
            [5, 1_500, 59_400, 61_000, 3_661_000, 400_000_000].into_iter().map(duration).collect();
        assert_eq!(said, ["5 ms", "1.5 s", "59 s", "1m01s", "1h01m", "4d15h"]);
    }

    #[test]
    fn times_are_rounded_to_what_is_shown() {
        let said: Vec<String> = [-5, 999, 1_960, 9_960, 59_900, 3_599_700, 172_799_000]
            .into_iter()
            .map(duration)
            .collect();
        assert_eq!(said, ["0 ms", "999 ms", "2.0 s", "10 s", "1m00s", "1h00m", "2d00h"]);
    }
}
