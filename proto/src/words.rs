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
}
