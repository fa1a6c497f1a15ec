//! Which known name was meant by one that nobody knows. Only a hint for people: nothing is ever done under a guessed name.

/// The known name that is nearest to what was typed: one edit away, two for names of eight characters and more. A transposition
/// of neighbours is one edit. The first in the order of `known` where several are equally near.
pub fn meant<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let edits_max = if typed.chars().count() >= 8 { 2 } else { 1 };
    let near = known.into_iter().map(|name| (distance(typed, name), name));
    let near = near.filter(|(distance, _)| (1..=edits_max).contains(distance));
    near.min_by_key(|(distance, _)| *distance).map(|(_, name)| name)
}

/// `; did you mean NAME?`, or nothing.
pub fn did_you_mean<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    meant(typed, known).map_or_else(String::new, |name| format!("; did you mean {name}?"))
}

/// Edits that turn one text into the other: insertions, deletions, substitutions and transpositions of neighbours (optimal
/// string alignment).
pub fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for (i, x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let substituted = rows[i][j] + usize::from(x != y);
            let mut least = substituted.min(rows[i][j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *x == b[j - 1] && a[i - 1] == *y {
                least = least.min(rows[i - 1][j - 1] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_finger_is_told_and_another_name_is_not() {
        let known = ["orders", "billing", "orders-2"];
        for typed in ["ordrs", "orderss", "orders1", "odrers", "prders"] {
            assert_eq!(meant(typed, known), Some("orders"), "{typed}");
        }
        assert_eq!(meant("billnig", known), Some("billing"));
        for typed in ["orders", "ord", "shop", ""] {
            let others = known.into_iter().filter(|name| *name != "orders");
            assert_eq!(meant(typed, others), None, "{typed}");
        }
        assert_eq!(meant("orders", ["orders"]), None, "that is the name itself");
        assert_eq!(did_you_mean("ordrs", known), "; did you mean orders?");
        assert_eq!(did_you_mean("shop", known), "");
    }

    #[test]
    fn distances_count_edits() {
        for (a, b, edits) in
            [("", "", 0), ("", "ab", 2), ("kitten", "sitting", 3), ("ab", "ba", 1), ("ä", "a", 1)]
        {
            assert_eq!((distance(a, b), distance(b, a)), (edits, edits), "{a} {b}");
        }
    }
}
